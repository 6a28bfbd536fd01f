"""What a stage wants of a robot, held against what is recorded; in words, and as a note for programs."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from wovr_jax.core import pixels
from wovr_jax.core.config import ConfigError, from_dict
from wovr_jax.data import episodes as disk
from wovr_jax.data.episodes import EpisodesError
from wovr_jax.data.recordings import FORMAT, LABELS
from wovr_jax.sim.recorded import gather
from wovr_jax.sim.recorded.arena import RecordedConfig
from wovr_jax.sim.recorded.gather import Policy, Wanted
from wovr_jax.types import Episode

TASKS = ("open the door", "push the button")
ROBOT = RecordedConfig("recordings", "franka", TASKS, "it is open, or it is lit", size=4, steps=6, hz=2.0)


def episode(task: int = 0, seed: int = 0, steps: int = 4, side: int = 4, won: bool = False, **origin: Any) -> Episode:
    action_SA = np.full((steps, 7), seed % 9 / 10, np.float32)
    success_S = np.arange(steps + 1) >= (steps if won else steps + 1)
    frame_SHWC = np.full((steps + 1, side, side, 3), seed % 256, np.uint8)
    origin = {"policy": "robot, sft", "weights": "ab12", "temperature": 1.3} | origin
    return Episode(frame_SHWC, action_SA, success_S, TASKS[task].title(), 5, seed, "him", action_SA, origin=origin)


def record(folder: pathlib.Path, *episodes: Episode) -> None:
    for one in episodes:
        disk.write(folder / f"{len(list(folder.glob('*-*'))):03d}-{one.seed}", [one])


def wanted(root: pathlib.Path, stage: str = "collect-0", count: int = 5, temperature: float = 1.3) -> Wanted:
    cfg = dataclasses.replace(ROBOT, folder=str(root / "recordings"))
    policy = Policy("base", root / "run" / "policies" / "base", "ab12", temperature)
    parts = {root / "run" / "stages" / stage / "episodes": count}
    return Wanted(cfg, root / "run", stage, parts, None if stage == "demonstrations" else policy)


def test_what_is_missing_is_said_in_words_and_as_a_note(tmp_path: pathlib.Path) -> None:
    asked = wanted(tmp_path)
    record(asked.folder, episode(0, 1), episode(0, 2), episode(0, 3), episode(0, 4), episode(1, 5))
    found = gather.find(asked)
    assert found.there == (4, 1) and len(found.places) == 4, "the fourth of the first task is not wanted"
    text = gather.describe(asked, found)
    for part in (
        f"{tmp_path}/run waits for 1 of 5 recorded episodes of its policy base.",
        "'open the door': 4 of 3 there",
        "'push the button': 1 of 2 there",
        f"{tmp_path}/recordings/collect-0",
        "(weights ab12)",
        "it is open, or it is lit",
        "at most 6 steps at 2 Hz; at most 0.1 minutes in all",
        f"launch/serve.py {asked.policy.bundle} --temperature 1.3 --record {asked.folder}",
        "The same command goes on when the episodes are there.",
    ):
        assert part in text, text
    note = json.loads(json.dumps(gather.note(asked, found)))
    assert (note["episodes"], note["missing"], note["stage"]) == (5, 1, "collect-0")
    assert [(task["wanted"], task["there"]) for task in note["tasks"]] == [(3, 4), (2, 1)]
    assert note["policy"]["weights"] == "ab12" and note["command"][-2:] == ["--record", str(asked.folder)]


def test_the_command_for_a_greedy_policy_names_no_temperature(tmp_path: pathlib.Path) -> None:
    asked = wanted(tmp_path, "evaluate-0", temperature=0.0)
    assert "--temperature" not in gather.command_of(asked)


def test_what_another_policy_did_passes_for_nobody_elses(tmp_path: pathlib.Path) -> None:
    asked = wanted(tmp_path, count=2)
    record(
        asked.folder,
        episode(0, 1),
        episode(0, 2, weights="cd34", policy="robot, grpo-1"),
        episode(1, 3, temperature=0.0),
        dataclasses.replace(episode(1, 4), origin={}),
        episode(1, 5, intervened="person"),
    )
    found = gather.find(asked)
    assert [place.header["seed"] for place in found.places] == [1, 5], "help is no bar to learn from an episode"
    text = gather.describe(asked, dataclasses.replace(found, places=()))
    assert "1 that are of another policy (robot, grpo-1)" in text and "1 that were sampled at temperature 0" in text
    assert "1 that do not say whose actions they are" in text


def test_in_an_evaluation_nobody_may_help(tmp_path: pathlib.Path) -> None:
    asked = wanted(tmp_path, "evaluate-1", count=2, temperature=0.0)
    record(asked.folder, episode(0, 1, temperature=0.0), episode(1, 5, temperature=0.0, intervened="person"))
    found = gather.find(asked)
    assert found.there == (1, 0) and "had a person's help" in gather.describe(asked, found)


def test_a_stage_gets_the_episodes_under_its_own_names(tmp_path: pathlib.Path) -> None:
    asked = wanted(tmp_path, count=4)
    record(asked.folder, episode(1, 11), episode(0, 12, won=True), episode(1, 13), episode(0, 14), episode(0, 15))
    labels = [{"recording": "000-11", "episode": 0, "outcome": "success", "first_success": 2}]
    (asked.folder / LABELS).write_text(json.dumps({"format": FORMAT, "schema": 1, "labels": labels}))
    gather.write(asked, gather.find(asked))
    (folder,) = asked.parts
    made, meta = disk.read(folder), disk.manifest(folder)["meta"]
    assert [(one.task, one.seed, one.instruction) for one in made] == [
        (task, seed, TASKS[task]) for task, seed in ((0, 12), (1, 11), (0, 14), (1, 13))
    ]
    assert {(one.actor, one.origin["recorded"]) for one in made} == {("base", "him")}
    assert made[1].origin["recording"] == "000-11" and np.flatnonzero(made[1].success_S).tolist() == [2, 3, 4]
    assert meta["outcomes"] == [1, 1, 0, 0] and meta["sim"] == "franka"


def test_evaluations_are_pairs_where_both_began_in_the_same_placements(tmp_path: pathlib.Path) -> None:
    starts = []
    for stage, seeds in (("evaluate-0", (7, 8, 9, 6)), ("evaluate-1", (9, 6, 7, 8)), ("evaluate-2", (1, 6, 7, 8))):
        asked = wanted(tmp_path, stage, count=4, temperature=0.0)
        record(asked.folder, *(episode(seed % 2, seed, won=seed == 7, temperature=0.0) for seed in seeds))
        gather.write(asked, gather.find(asked))
        meta = disk.manifest(next(iter(asked.parts)))["meta"]
        starts.append(meta["starts"])
        if 9 in seeds:
            assert meta["outcomes"] == [0, 0, 1, 0], "by task and placement: 6, 8, 7, 9"
    assert starts[0] == starts[1] == [[0, 6], [0, 8], [1, 7], [1, 9]] and starts[2] != starts[0]


def test_where_nobody_notes_placements_none_are_alike(tmp_path: pathlib.Path) -> None:
    starts = []
    for stage in ("evaluate-0", "evaluate-1"):
        asked = wanted(tmp_path, stage, count=2, temperature=0.0)
        record(asked.folder, episode(0, 3, temperature=0.0), episode(1, 3, temperature=0.0))
        gather.write(asked, gather.find(asked))
        made = disk.read(next(iter(asked.parts)))
        assert [one.seed for one in made] == [0, 1], "or a split would take them for one placement"
        starts.append(disk.manifest(next(iter(asked.parts)))["meta"]["starts"])
    assert starts[0] != starts[1]


def test_demonstrations_are_whatever_people_showed_and_some_are_held_out(tmp_path: pathlib.Path) -> None:
    asked = wanted(tmp_path, "demonstrations")
    folder = tmp_path / "run" / "stages" / "demonstrations"
    asked = dataclasses.replace(asked, parts={folder / "episodes": 3, folder / "validation": 2})
    plain = [dataclasses.replace(episode(0, seed, won=True), origin={}) for seed in range(4)]
    record(asked.folder, *plain)
    assert "waits for 1 of 5 recorded demonstrations" in gather.describe(asked, gather.find(asked))
    record(asked.folder, dataclasses.replace(episode(1, 9, won=True), origin={}))
    gather.write(asked, gather.find(asked))
    first, held = disk.read(folder / "episodes"), disk.read(folder / "validation")
    assert [one.seed for one in (*first, *held)] == [0, 9, 1, 2, 3] and {one.actor for one in first} == {gather.ACTOR}


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (episode(0, 1, steps=7), r"has 7 steps, the longest episode of the run 6 \(recorded.steps\)"),
        (episode(0, 1, side=8), r"frames of \[8, 8\] pixels, the run has 4 \(recorded.size\)"),
        (dataclasses.replace(episode(0, 1), instruction="dance"), "the run does not know 'dance'"),
    ],
)
def test_recordings_that_do_not_fit_the_settings_are_refused(tmp_path: pathlib.Path, one: Episode, said: str) -> None:
    asked = wanted(tmp_path)
    record(asked.folder, one)
    with pytest.raises(EpisodesError, match=said):
        gather.find(asked)


def test_a_robot_says_what_only_its_laboratory_knows() -> None:
    with pytest.raises(ConfigError, match=r"folder(.|\n)*instructions(.|\n)*success"):
        from_dict(RecordedConfig, {})


def test_cameras_and_state_become_mosaics_on_one_scale(tmp_path: pathlib.Path) -> None:
    """The demonstrations say what -1 and 1 are, for everything that comes after them."""
    cfg = dataclasses.replace(ROBOT, views=2, state=2, strip=2)

    def sensing(seed: int, reach: float, **origin: Any) -> Episode:
        one = episode(0, seed, **origin)
        state_SD = np.linspace([0.0, -reach], [reach, reach], 5).astype(np.float32)
        return dataclasses.replace(one, wrist_SHWC=255 - one.frame_SHWC, state_SD=state_SD)

    for stage, reach in (("demonstrations", 1.0), ("collect-0", 3.0)):
        asked = wanted(tmp_path, stage, count=2)
        asked = dataclasses.replace(asked, cfg=dataclasses.replace(cfg, folder=asked.cfg.folder))
        record(asked.folder, sensing(7, reach), sensing(8, reach))
        gather.write(asked, gather.find(asked))
        (folder,) = asked.parts
        made = disk.read(folder)[0]
        assert made.frame_SHWC.shape == (5, 4, 10, 3) and made.wrist_SHWC is None
        assert (made.frame_SHWC[:, :, :4] == 7).all() and (made.frame_SHWC[:, :, 4:8] == 248).all()
        seen = pixels.read_state(pixels.to_float(made.frame_SHWC), 2, 2)
        want = np.clip(np.linspace([-1.0, -reach], [2 * reach - 1, reach], 5), -1, 1)
        np.testing.assert_allclose(seen, want, atol=0.03)
        np.testing.assert_allclose(disk.manifest(folder)["meta"]["proprio"]["q99"], [1.0, 1.0], atol=0.05)
        np.testing.assert_allclose(made.state_SD[-1], [reach, reach], err_msg="the robot's own units stay beside it")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, r"the run sees a camera in the hand too \(recorded.views\), and there are none"),
        ({"wrist_SHWC": np.zeros((5, 2, 2, 3), np.uint8)}, r"there are frames of \[2, 2\] pixels of it"),
        ({"wrist_SHWC": np.zeros((5, 4, 4, 3), np.uint8)}, r"a state of 0 numbers, the run has 2 \(recorded.state\)"),
    ],
)
def test_recordings_without_a_sense_are_refused(tmp_path: pathlib.Path, change: dict[str, Any], said: str) -> None:
    asked = wanted(tmp_path)
    asked = dataclasses.replace(asked, cfg=dataclasses.replace(asked.cfg, views=2, state=2, strip=2))
    record(asked.folder, dataclasses.replace(episode(), **change))
    with pytest.raises(EpisodesError, match=said):
        gather.find(asked)
