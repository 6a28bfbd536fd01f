"""Evaluation that can be interrupted, and comparisons that are fair. Fake outcomes; no simulator."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from wovr_jax.core.config import ConfigError, from_dict
from wovr_jax.data import episodes as disk
from wovr_jax.sim.libero import evaluate
from wovr_jax.sim.libero.collect import measure
from wovr_jax.sim.libero.evaluate import LiberoEvaluation, check_overlap, compare, results, success_rate
from wovr_jax.sim.libero.rollout import Outcome, View, record
from wovr_jax.sim.libero.runner import act_in_batches
from wovr_jax.sim.libero.setup import LiberoError
from wovr_jax.sim.libero.tasks import Task, Trial, draw_seed
from wovr_jax.sim.libero.worker import Observations

TASKS = [Task("libero_spatial", index, f"task_{index}", f"task {index}") for index in range(2)]
WANTED = [Trial(task, init) for task in TASKS for init in range(4)]
SETTINGS = {"policy": "somewhere", "suite": "libero_spatial", "protocol": "openvla"}


def verdict(trial):
    """Depends on the trial alone, as a simulator's does."""
    return (trial.task.index + trial.init) % 3 != 0


def run(trials, *, dies_after=None):
    for number, trial in enumerate(reversed(trials)):  # workers end in any order
        if number == dies_after:
            raise KeyboardInterrupt
        yield Outcome(trial, verdict(trial), 10 + trial.init)


def finished(folder, *runs):
    for act in runs[:-1]:
        with pytest.raises(KeyboardInterrupt):
            measure(act, WANTED, folder)
    return results(measure(runs[-1], WANTED, folder), SETTINGS, {"renderer": "egl"})


def test_a_run_that_was_killed_ends_in_the_same_results(tmp_path):
    (tmp_path / "calm").mkdir(), (tmp_path / "rough").mkdir()
    calm = finished(tmp_path / "calm", run)
    with pytest.raises(KeyboardInterrupt):
        measure(lambda trials: run(trials, dies_after=3), WANTED, tmp_path / "rough")
    path = tmp_path / "rough" / "trials.jsonl"
    path.write_text(path.read_text() + '{"trial": "libero_spa')  # what kill -9 leaves
    ran = []

    def rest(trials):
        ran.extend(trials)
        return run(trials)

    rough = finished(tmp_path / "rough", rest)
    assert len(ran) == 5 and rough == calm
    assert calm["all"]["successes"] == 5 and calm["tasks"]["1"]["n"] == 4 and calm["unfinished"] == 0
    assert len(path.read_text().splitlines()) == 8  # the half line is gone
    assert finished(tmp_path / "rough", lambda trials: pytest.fail("nothing is left to run")) == calm


def lose(trials):
    return [Outcome(trial, None if trial.init == 1 else True, 9, 3, ("died",) * 3) for trial in trials]


def test_a_trial_without_a_verdict_is_not_counted_and_played_again(tmp_path):
    found = finished(tmp_path, lose)
    assert found["unfinished"] == 2 and found["all"] == success_rate([{"success": True}] * 6)
    assert found["outcomes"]["libero_spatial/0/1/0"] is None
    ran = []

    def mended(trials):
        ran.extend(trial.init for trial in trials)
        return [Outcome(trial, True, 9) for trial in trials]

    found = finished(tmp_path, mended)
    assert ran == [1, 1] and found["unfinished"] == 0 and found["all"]["successes"] == 8
    finished(tmp_path, lambda trials: pytest.fail("nothing is left to run"))


def test_results_without_any_verdict_have_no_rate():
    lines = [{"trial": "libero_spatial/0/0/0", "success": None, "steps": 0}]
    assert evaluate.results(lines, {}, {})["all"] == {"n": 0, "successes": 0, "rate": None, "low": 0.0, "high": 1.0}
    assert "0/0        -  [0.000, 1.000]" in evaluate.table(lines, {0: "pick up"})


def test_an_evaluation_with_a_lost_trial_ends_in_words_and_without_results(tmp_path, monkeypatch):
    from launch import evaluate as door

    runner = type("Runner", (), {"renderer": None, "__call__": lambda self, left: lose(left)})
    monkeypatch.setattr("wovr_jax.sim.libero.runner.TrialRunner", lambda *_: runner())
    monkeypatch.setattr(evaluate, "trials", lambda *_, **__: WANTED)
    monkeypatch.setattr(evaluate, "explain_twins", lambda *_: "")
    with pytest.raises(LiberoError, match=r"2 of 8 trials came to no verdict; libero_spatial/0/1/0 was lost 3 times"):
        door.measure(LiberoEvaluation("expert"), tmp_path / "run")
    assert not (tmp_path / "run" / "results.json").exists()


def test_the_door_tells_a_program_the_results_and_the_gain(tmp_path, monkeypatch, opened):
    def play(self, left):
        return run(left)

    runner = type("Runner", (), {"renderer": "egl", "__call__": play})
    monkeypatch.setattr("wovr_jax.sim.libero.runner.TrialRunner", lambda *_: runner())
    monkeypatch.setattr("wovr_jax.sim.libero.machine.fingerprint", lambda renderer: {"renderer": renderer})
    monkeypatch.setattr("wovr_jax.sim.libero.tasks.tasks", lambda suite: TASKS)
    monkeypatch.setattr(evaluate, "trials", lambda *_, **__: WANTED)
    monkeypatch.setattr(evaluate, "explain_twins", lambda *_: "")
    base = tmp_path / "base"
    base.mkdir()
    evaluate.save_results(base, finished(base, run))
    words = ("--config=configs/evaluate.py", f"--run={tmp_path / 'run'}", f"--against={base}")
    status, out, _ = opened("evaluate.py", *words, "--json")
    told = json.loads(out)
    assert not status and told["run"] == str(tmp_path / "run") and told["against"] == str(base)
    assert told["results"] == json.loads((tmp_path / "run" / "results.json").read_text())
    gain = told["gain"]
    assert told["results"]["all"]["successes"] == 5 and gain == compare(told["results"], told["results"])
    # The same for a person.
    status, out, _ = opened("evaluate.py", *words)
    shown = f"+0.0 points [{100 * gain['low']:.1f}, {100 * gain['high']:.1f}] over {base}, 8 paired trials"
    assert not status and shown in out


def test_runs_of_before_are_compared_on_trials_with_a_verdict(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    base = finished(tmp_path / "b", lose)
    assert compare(finished(tmp_path / "a", run), base)["n"] == 6


def test_runs_are_compared_on_the_trials_that_both_have(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    good = finished(tmp_path / "a", lambda trials: [Outcome(trial, True, 9) for trial in trials])
    base = finished(tmp_path / "b", run)
    del base["outcomes"]["libero_spatial/0/0/0"]
    found = compare(good, base)
    assert found["n"] == 7 and found["gain"] == pytest.approx(2 / 7) and found["low"] < 2 / 7 < found["high"]
    with pytest.raises(LiberoError, match="the protocol of the two runs is 'openvla' and 'rlinf'"):
        compare(good, base | {"settings": SETTINGS | {"protocol": "rlinf"}})
    with pytest.raises(LiberoError, match="no trial in common"):
        compare(good, base | {"outcomes": {"libero_spatial/0/0/7": True}})


def collected(folder, init):
    """An episode folder as ``collect`` leaves it."""
    seen = [Observations(np.zeros((1, 4, 4, 3), np.uint8), None, np.zeros((1, 8), np.float32), np.array([False]))] * 2
    action_SA = np.zeros((1, 7))
    meta = {"outcomes": [{"trial": f"libero_spatial/0/{init}/5"}]}
    disk.write(folder, [record(Trial(TASKS[0], init), seen, action_SA, action_SA, "base")], meta=meta)
    return str(folder)


def test_initial_states_that_training_saw_are_refused(tmp_path):
    seen, other = collected(tmp_path / "a", 2), collected(tmp_path / "b", 30)
    cfg = LiberoEvaluation("x", trained_on=(other,))
    assert check_overlap(WANTED, cfg) == 0 and check_overlap(WANTED, dataclasses.replace(cfg, trained_on=())) == 0
    with pytest.raises(LiberoError, match=r"1 of 8 trials begin at initial states that training saw"):
        check_overlap(WANTED, dataclasses.replace(cfg, trained_on=(other, seen)))
    assert check_overlap(WANTED, dataclasses.replace(cfg, trained_on=(seen,), overlap=True)) == 1
    disk.write(tmp_path / "foreign", disk.read(other))
    with pytest.raises(LiberoError, match="foreign does not say from which initial states"):
        check_overlap(WANTED, dataclasses.replace(cfg, trained_on=(str(tmp_path / "foreign"),)))


def test_a_seed_that_changes_nothing_is_remarked(monkeypatch):
    monkeypatch.setattr(evaluate, "draws_fixtures", lambda task: task.index == 0)
    greedy = LiberoEvaluation("bundle", seed=1)
    assert "seed=1: 4 of 8 trials are those of seed 0 again" in evaluate.explain_twins(WANTED, greedy)
    for cfg in (dataclasses.replace(greedy, seed=0), dataclasses.replace(greedy, temperature=1.0)):
        assert evaluate.explain_twins(WANTED, cfg) == ""
    assert evaluate.explain_twins(WANTED[:4], greedy) == ""  # a seed places the fixtures of task 0


def test_draws_depend_on_trial_and_chunk_alone():
    seeds = {draw_seed(trial, chunk) for trial in WANTED for chunk in range(5)}
    assert len(seeds) == 40 and max(seeds) < 2**32
    assert draw_seed(WANTED[0], 0) == draw_seed(Trial(TASKS[0], 0), 0) != draw_seed(Trial(TASKS[0], 0, seed=1), 0)


def test_the_config_file_is_the_config_and_its_presets_are_known():
    from configs import evaluate

    settings = json.loads(evaluate.get_config("libero_10,rlinf").to_json())
    assert settings.pop("job") == "evaluate"
    cfg = from_dict(LiberoEvaluation, settings)
    assert (cfg.suite, cfg.protocol, cfg.temperature, cfg.inits) == ("libero_10", "rlinf", 1.6, (0, 50))
    with pytest.raises(ConfigError, match="LiberoEvaluation has no such setting"):
        from_dict(LiberoEvaluation, settings | {"worker": 3})


class Answered:
    """A robot that notes what it was asked."""

    frame_shape = (4, 4, 3)

    def __init__(self):
        self.asked = []

    def act(self, frame_BHWC, instructions, *, seeds, temperature):
        self.asked.append((frame_BHWC.shape, list(instructions), list(seeds), temperature))

        class Answer:
            action_BTA = np.arange(len(instructions))[:, None, None] * np.ones((1, 8, 7))

        return Answer


def test_a_robot_always_gets_a_full_batch(monkeypatch):
    from launch.evaluate import load_policy
    from wovr_jax.export.robot import Robot

    robot = Answered()
    views = [View(trial, 3, np.zeros((4, 4, 3), np.uint8), None, np.zeros(8)) for trial in WANTED[:2]]
    monkeypatch.setattr(Robot, "load", lambda folder: robot)
    policy, size = load_policy(LiberoEvaluation("bundle", temperature=1.6))
    chunk = act_in_batches(policy, 5)(views)
    assert size == 4
    shape, instructions, seeds, temperature = robot.asked[0]
    assert chunk.shape == (2, 8, 7) and shape == (5, 4, 4, 3) and temperature == 1.6
    assert instructions == ["task 0"] * 5 and seeds[:2] == [draw_seed(trial, 3) for trial in WANTED[:2]]


def test_no_results_yet(tmp_path):
    with pytest.raises(LiberoError, match="the run is not finished"):
        evaluate.load_results(tmp_path)
    evaluate.save_results(tmp_path, {"all": 1})
    assert evaluate.load_results(tmp_path) == {"all": 1}
