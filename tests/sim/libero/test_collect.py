"""Collection task by task: order, resumption, what is kept. Fake outcomes; no simulator."""

from __future__ import annotations

import argparse

import numpy as np
import pytest

from launch.tools.demonstrate_libero import drop_failures
from launch.tools.demonstrate_libero import record as record_demonstrations
from wovr_jax.data import episodes as disk
from wovr_jax.data.episodes import EpisodesError
from wovr_jax.sim.libero.collect import collect, in_order, line_of
from wovr_jax.sim.libero.evaluate import table
from wovr_jax.sim.libero.rollout import Outcome, record
from wovr_jax.sim.libero.setup import LiberoError
from wovr_jax.sim.libero.tasks import Task, Trial
from wovr_jax.sim.libero.worker import Observations

TASKS = [Task("libero_x", index, f"task_{index}", f"task {index}") for index in range(3)]
WANTED = [Trial(task, init) for task in TASKS for init in range(3)]
META = {"sim": "libero_x"}


def outcome(trial, success=True):
    rng = np.random.default_rng([trial.task.index, trial.init])
    seen = [
        Observations(
            rng.integers(0, 256, (1, 4, 4, 3), np.uint8),
            rng.integers(0, 256, (1, 4, 4, 3), np.uint8),
            rng.normal(size=(1, 8)).astype(np.float32),
            np.array([success and step == 2]),
        )
        for step in range(3)
    ]
    action_SA = rng.uniform(-1, 1, (2, 7))
    episode = record(trial, seen, action_SA, action_SA, "expert", {"protocol": "openvla"})
    return Outcome(trial, success, 2, episode=episode)


def backwards(trials):
    """As workers of unequal speed would end."""
    return (outcome(trial) for trial in reversed(trials))


def test_episodes_lie_in_the_order_of_their_trials(tmp_path):
    facts = collect(backwards, WANTED, tmp_path / "made", meta=META)
    made = disk.read(tmp_path / "made")
    assert [(episode.task, episode.origin["init"]) for episode in made] == [(t, i) for t in range(3) for i in range(3)]
    assert facts["successes"] == 9 and facts["meta"]["outcomes"][5]["trial"] == "libero_x/1/2/0"
    assert made[0].state_SD.shape == (3, 8) and made[0].wrist_SHWC.shape == (3, 4, 4, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]


def test_an_interruption_costs_the_task_it_was_in(tmp_path):
    ran = []

    def act(trials):
        for trial in trials:
            if trial.task.index == 1 and trial.init == 2 and len(ran) < 6:
                raise KeyboardInterrupt
            ran.append((trial.task.index, trial.init))
            yield outcome(trial)

    with pytest.raises(KeyboardInterrupt):
        collect(act, WANTED, tmp_path / "made", meta=META)
    assert not (tmp_path / "made").exists()
    with pytest.raises(EpisodesError, match="was begun with other settings"):
        collect(act, WANTED, tmp_path / "made", meta={"sim": "another"})
    ran.append("again")
    collect(act, WANTED, tmp_path / "made", meta=META)
    assert ran[6:] == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]  # task 0 was whole
    collect(backwards, WANTED, tmp_path / "once", meta=META)
    pairs = zip(disk.read(tmp_path / "made"), disk.read(tmp_path / "once"), strict=True)
    assert all(np.array_equal(a.frame_SHWC, b.frame_SHWC) for a, b in pairs)


def test_only_successes_and_a_task_without_any(tmp_path):
    def act(trials):
        return drop_failures(outcome(trial, success=trial.task.index == 2 and trial.init > 0) for trial in trials)

    facts = collect(act, WANTED, tmp_path / "made", meta=META)
    assert facts["episodes"] == 2 and len(facts["meta"]["outcomes"]) == 9
    with pytest.raises(EpisodesError, match="no episodes were given"):
        collect(lambda trials: drop_failures(outcome(t, False) for t in trials), WANTED, tmp_path / "b", meta=META)


def test_a_door_replaces_episodes_only_when_asked(tmp_path):
    with pytest.raises(EpisodesError, match="exists already; add --overwrite"):
        record_demonstrations(argparse.Namespace(out=tmp_path, overwrite=False))


def test_a_part_with_a_lost_trial_is_recorded_again(tmp_path):
    ran = []

    def act(trials, broken):
        for trial in trials:
            ran.append((trial.task.index, trial.init))
            lost = broken and (trial.task.index, trial.init) == (1, 2)
            yield Outcome(trial, None, 0, 3, ("died",) * 3) if lost else outcome(trial)

    with pytest.raises(LiberoError, match="1 of 3 trials came to no verdict; libero_x/1/2/0 was lost 3 times: died"):
        collect(lambda trials: act(trials, True), WANTED, tmp_path / "made", meta=META)
    ran.clear()
    facts = collect(lambda trials: act(trials, False), WANTED, tmp_path / "made", meta=META)
    assert facts["episodes"] == 9 and ran == [(t, i) for t in (1, 2) for i in range(3)]  # task 0 was whole


def test_the_table_does_not_count_lost_trials():
    lines = [line_of(outcome(trial)) for trial in WANTED[:3]]
    lines.append(line_of(Outcome(WANTED[3], None, 0, 3, ("died",) * 3)))
    shown = table(lines, {task.index: task.instruction for task in TASKS})
    assert "3/3     1.00  [0.439, 1.000]" in shown and "0/0        -" in shown
    assert "  3/3     1.00" in shown.splitlines()[-2] and "1 more were lost" in shown


def test_in_order_waits_only_for_what_is_due():
    order = in_order((outcome(WANTED[i]) for i in (1, 0, 2)), WANTED[:3])
    assert [out.trial for out in order] == WANTED[:3]
