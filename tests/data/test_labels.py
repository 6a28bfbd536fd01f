"""Recordings and the labels beside them."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from wovr_jax.data import episodes as disk
from wovr_jax.data.episodes import EpisodesError
from wovr_jax.data.recordings import FORMAT, LABELS, read_recordings
from wovr_jax.types import Episode

STEPS = 5


def episode(**changes: Any) -> Episode:
    rng = np.random.default_rng(changes.pop("draw", 0))
    action_SA = rng.uniform(-1, 1, (STEPS, 7)).astype(np.float32)
    one = Episode(
        frame_SHWC=rng.integers(0, 256, (STEPS + 1, 4, 4, 3), np.uint8),
        action_SA=action_SA,
        success_S=np.zeros(STEPS + 1, bool),
        instruction="push the button",
        task=0,
        seed=7,
        actor="pace, grpo-1",
        label_SA=action_SA,
        origin={"weights": "ab"},
    )
    return dataclasses.replace(one, **changes)


def record(folder: pathlib.Path, names: str = "abc", **changes: Any) -> None:
    """A recording of one episode for each letter."""
    for draw, name in enumerate(names):
        disk.write(folder / name, [episode(draw=draw, **changes)])


def label(folder: pathlib.Path, *labels: dict[str, Any], **head: Any) -> None:
    table = {"format": FORMAT, "schema": 1, "labels": list(labels)} | head
    (folder / LABELS).write_text(json.dumps(table))


def say(recording: str, outcome: str, **more: Any) -> dict[str, Any]:
    return {"recording": recording, "episode": 0, "outcome": outcome, **more}


def wins(folder: pathlib.Path, **how: Any) -> list[list[int]]:
    """The frames that show a success, episode by episode."""
    return [np.flatnonzero(one.success_S).tolist() for one in read_recordings(folder, **how)]


def test_recordings_come_by_name_and_half_written_ones_do_not(tmp_path: pathlib.Path) -> None:
    record(tmp_path, "cab")
    for name in ("d.new", "a.old", ".unfinished-robot7"):
        (tmp_path / name).mkdir()
    found = read_recordings(tmp_path)
    assert [place.folder.name for place in found.places] == ["a", "b", "c"]
    assert [place.header["origin"]["weights"] for place in found.places] == ["ab"] * 3
    assert np.array_equal(found[1].frame_SHWC, episode(draw=2).frame_SHWC) and len(found[1:]) == 2
    assert len(read_recordings(tmp_path / "not there")) == 0


def test_an_episode_folder_of_ours_is_one_recording(tmp_path: pathlib.Path) -> None:
    disk.write(tmp_path / "demos", [episode(draw=n) for n in range(3)])
    label(tmp_path / "demos", say("demos", "success", episode=2))
    assert wins(tmp_path / "demos") == [[], [], [STEPS]]


def test_a_success_holds_from_the_marked_frame_or_in_the_last_ones(tmp_path: pathlib.Path) -> None:
    won = np.arange(STEPS + 1) >= 4
    record(tmp_path, "abcd", success_S=won)
    label(
        tmp_path,
        say("a", "success", first_success=2, by="kim", at="2026-11-30T09:00:00+00:00"),
        say("b", "success"),
        say("c", "failure"),
    )
    assert wins(tmp_path) == [[2, 3, 4, 5], [5], [], [4, 5]], "d as it was recorded"
    assert wins(tmp_path, last=3)[1] == [3, 4, 5]
    assert [place.won for place in read_recordings(tmp_path).places] == [True, True, False, True]


def test_the_last_word_counts_and_what_is_discarded_is_left_out(tmp_path: pathlib.Path) -> None:
    record(tmp_path)
    label(
        tmp_path,
        say("a", "success"),
        say("b", "discard"),
        say("a", "failure"),
        say("c", "discard"),
        say("c", "success"),
    )
    found = read_recordings(tmp_path)
    assert [place.folder.name for place in found.places] == ["a", "c"] and wins(tmp_path) == [[], [STEPS]]


@pytest.mark.parametrize(
    ("labels", "head", "said"),
    [
        ([say("a", "won")], {}, r"label 0: outcome: expected one of success, failure, discard, got 'won'"),
        ([say("a", "success"), say("a", "failure", first_success=1)], {}, "label 1: a failure has no first_success"),
        ([say("a", "success", first_success=-1)], {}, "first_success: expected a number from 0 on, got -1"),
        ([say("a", "success", first_success=True)], {}, "first_success: expected a number from 0 on, got True"),
        ([say("a", "success", episode=None)], {}, "episode: expected a number from 0 on, got None"),
        ([say("a", "success", first_succes=1)], {}, "expected an object of recording, episode, outcome"),
        ([say("a", "success", by=3)], {}, "by: expected text, got 3"),
        ([{"recording": "a"}], {}, "expected an object of"),
        ([say("z", "success")], {}, "a label is of episode 0 of 'z', which is not there"),
        ([say("a", "success", episode=1)], {}, "a label is of episode 1 of 'a', which is not there"),
        ([], {"format": "other"}, "does not hold labels"),
        ([], {"labels": 3}, "does not hold labels"),
        ([], {"schema": 2}, "has schema 2; this code reads up to 1"),
    ],
)
def test_labels_that_cannot_be_meant_are_refused(
    tmp_path: pathlib.Path, labels: list[dict[str, Any]], head: dict[str, Any], said: str
) -> None:
    record(tmp_path)
    label(tmp_path, *labels, **head)
    with pytest.raises(EpisodesError, match=said):
        read_recordings(tmp_path)


def test_a_mark_behind_the_end_and_half_a_file_are_refused(tmp_path: pathlib.Path) -> None:
    record(tmp_path)
    label(tmp_path, say("b", "success", first_success=STEPS + 1))
    with pytest.raises(EpisodesError, match=r"episode 0 of 'b' has frames 0 to 5, and first_success is 6"):
        list(read_recordings(tmp_path))
    (tmp_path / LABELS).write_text('{"format": "wov')
    with pytest.raises(EpisodesError, match="is not JSON"):
        read_recordings(tmp_path)


def test_recordings_that_do_not_belong_together_are_refused(tmp_path: pathlib.Path) -> None:
    record(tmp_path, "ab")
    with pytest.raises(EpisodesError, match=r"does not know 'push the button'; it knows: open the door"):
        read_recordings(tmp_path, instructions=["open the door"])
    assert len(read_recordings(tmp_path, instructions=["open the door", "Push  the button"])) == 2
    disk.write(tmp_path / "c", [episode(instruction="open the door")])
    with pytest.raises(EpisodesError, match="task 0 is 'open the door', in .*/a 'push the button'; .* differently"):
        read_recordings(tmp_path)
    assert len(read_recordings(tmp_path, instructions=["open the door", "push the button"])) == 3
    disk.write(tmp_path / "d", [episode(frame_SHWC=np.zeros((STEPS + 1, 4, 8, 3), np.uint8))])
    with pytest.raises(EpisodesError, match=r"/d, episode 0: frame is \[4, 8, 3\], in .*/a \[4, 4, 3\]"):
        read_recordings(tmp_path, instructions=["open the door", "push the button"])


def test_a_folder_that_is_no_recording_is_refused(tmp_path: pathlib.Path) -> None:
    record(tmp_path, "ab")
    (tmp_path / "notes").mkdir()
    with pytest.raises(EpisodesError, match="/notes is no recording: manifest.json is missing"):
        read_recordings(tmp_path)
