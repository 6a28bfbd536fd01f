"""Labels are on the disk once a mark is answered; the last word counts, and what others say stays."""

from __future__ import annotations

import concurrent.futures
import datetime
import errno
import json
import pathlib

import numpy as np
import pytest

from tests.label.small import STEPS, episode, record
from wovr_jax.data import episodes as disk
from wovr_jax.data.recordings import LABELS, read_labels, read_recordings
from wovr_jax.data.records import EpisodesError
from wovr_jax.label import store as stores
from wovr_jax.label.messages import Scores, Session
from wovr_jax.label.store import LabelError, Store, disagreement, order


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    record(tmp_path / "recordings", 4)
    return tmp_path / "recordings"


def entries(folder: pathlib.Path) -> list[dict]:
    return json.loads((folder / LABELS).read_text())["labels"]


def test_a_mark_is_what_readers_of_recordings_take(folder):
    store = Store(folder, "ada")
    assert [item.won for item in store.items] == [True, False, True, False] and store.items[1].instruction == "task 1"
    store.mark(0, "failure", None, None)
    store.mark(1, "success", 3, None)
    store.mark(2, "discard", None, 5)
    first, second, fourth = read_recordings(folder)
    assert not first.success_S.any() and second.success_S.tolist() == [False] * 3 + [True] * 4
    assert not fourth.success_S.any() and fourth.seed == 3
    label = store.label_of(2)
    assert label is not None and label.by == "ada" and label.lies_from == 5
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(label.at)
    assert datetime.timedelta() <= age < datetime.timedelta(minutes=1)


def test_the_last_word_counts_and_the_others_are_kept(folder):
    store = Store(folder, "ada")
    store.mark(0, "failure", None, None)
    Store(folder, "bob").mark(0, "success", None, None)
    store.mark(1, "failure", None, None)
    assert [(entry["by"], entry["outcome"]) for entry in entries(folder)] == [
        ("ada", "failure"),
        ("bob", "success"),
        ("ada", "failure"),
    ]
    label = store.label_of(0)
    assert label is not None and label.by == "bob"


def test_undo_brings_back_what_was_said_before(folder):
    session = Session(Store(folder, "ada"))
    with pytest.raises(LabelError, match="nothing to undo"):
        session.answer({"do": "undo"})
    mark = {"do": "mark", "item": 0, "first_success": None, "lies_from": None}
    session.answer(mark | {"outcome": "failure"})
    session.answer(mark | {"outcome": "success", "first_success": 2})
    Store(folder, "bob").mark(3, "success", None, None)
    undone = session.answer({"do": "undo"})
    assert undone["label"]["outcome"] == "failure"
    assert session.answer({"do": "undo"}) == {"told": "undone", "item": 0, "label": None}
    assert [entry["by"] for entry in entries(folder)] == ["bob"]
    session.answer(mark | {"outcome": "failure"})
    (folder / LABELS).unlink()
    with pytest.raises(LabelError, match="is not in labels.json any more"):
        session.answer({"do": "undo"})


def test_two_who_label_at_once_lose_nothing(folder):
    def label(name: str) -> None:
        store = Store(folder, name)
        for turn in range(25):
            store.mark(turn % 4, "success", turn % STEPS, None)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(label, ("ada", "bob", "cyd", "dan")))
    assert len(entries(folder)) == 100 and len(read_labels(folder)) == 4


def test_what_cannot_be_said_is_refused_and_nothing_is_written(folder):
    store = Store(folder, "ada")
    wrong = {
        "expected one of success, failure, discard, got 'won'": ("won", None, None),
        "'first_success': expected a frame from 0 to 6, got 7": ("success", 7, None),
        "'lies_from': expected a frame from 0 to 6, got True": ("success", None, True),
        "'first_success': a failure has none, got 3": ("failure", 3, None),
    }
    for words, mark in wrong.items():
        with pytest.raises(LabelError, match=words):
            store.mark(0, *mark)
    assert not (folder / LABELS).exists()


def test_a_full_disk_is_said_and_the_labels_before_stay(folder, monkeypatch):
    store = Store(folder, "ada")
    store.mark(0, "failure", None, None)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(stores, "write_json", refuse)
        with pytest.raises(LabelError, match="was not written: the disk is full"):
            store.mark(1, "failure", None, None)
    assert len(entries(folder)) == 1 and store.label_of(1) is None


def test_labels_that_are_malformed_are_not_written_over(folder):
    (folder / LABELS).write_text("[1, 2")
    with pytest.raises(EpisodesError, match="is not JSON"):
        Store(folder, "ada")
    (folder / LABELS).unlink()
    store = Store(folder, "ada")
    (folder / LABELS).write_text("{}")
    with pytest.raises(EpisodesError, match="does not hold labels"):
        store.mark(0, "failure", None, None)
    assert (folder / LABELS).read_text() == "{}"


def test_folders_without_recordings_and_folders_of_many_episodes(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "none"):
        with pytest.raises(LabelError, match="no recordings in it"):
            Store(folder, "ada")
    disk.write(tmp_path / "stage" / "episodes", [episode(number, won=number > 0) for number in range(3)])
    for folder in (tmp_path / "stage", tmp_path / "stage" / "episodes"):
        store = Store(folder, "ada")
        assert [(item.recording, item.episode, item.won) for item in store.items] == [
            ("episodes", 0, False),
            ("episodes", 1, True),
            ("episodes", 2, True),
        ]
        assert store.read(2).frame_SHWC[0, 0, 0, 0] == 2


def test_what_is_recorded_meanwhile_comes_to_the_list(folder):
    session = Session(Store(folder, "ada"))
    assert len(session.answer({"do": "list"})["items"]) == 4
    disk.write(folder / "20270101T000000-000000-00009-3fa9c1", [episode(9)])
    told = session.answer({"do": "list"})
    assert len(told["items"]) == 5 and told["order"][-1] == 4


def test_what_the_classifier_contradicts_comes_first_and_then_what_has_no_label(folder):
    store = Store(folder, "ada")
    sure = {number: np.full(STEPS + 1, 0.1, np.float32) for number in range(4)}
    assert [order(store, {}, 0.5), order(store, sure, 0.5)] == [[0, 1, 2, 3], [0, 2, 1, 3]]
    store.mark(0, "failure", None, None)
    sure[3][4] = 0.95
    assert order(store, sure, 0.5) == [3, 2, 1, 0]
    store.mark(2, "discard", None, None)
    told = Session(store, Scores("robot, round 0", 0.5, sure)).answer({"do": "list"})
    assert told["order"] == [3, 1, 0, 2] and told["judge"] == "robot, round 0"
    assert [round(item["against"], 2) for item in told["items"]] == [0, 0, 0, 0.45]
    assert told["items"][3]["prob"].dtype == np.float32
    item, label = store.items[3], store.label_of(3)
    assert disagreement(item, label, None, 0.5) == 0


def test_frames_come_in_pieces(folder, monkeypatch):
    session = Session(Store(folder, "ada"))
    piece = session.answer({"do": "frames", "item": 1, "low": 2, "count": 3})
    assert piece["frame"].shape == (3, 8, 8, 3) and piece["wrist"].shape == (3, 4, 4, 3)
    assert piece["frame"][:, 0, 0, 0].tolist() == [21, 31, 41]
    monkeypatch.setattr("wovr_jax.label.messages.MOST_BYTES", 500)
    assert len(session.answer({"do": "frames", "item": 1, "low": 0, "count": 7})["frame"]) == 2
    wrong = {
        r"'do': expected one of list, frames, mark, undo, got \"\['a'\]\"": {"do": ["a"]},
        "'item': expected a whole number from 0 to 3, got 4": {"do": "frames", "item": 4},
        "'low': expected a whole number from 0 to 6, got -1": {"do": "frames", "item": 0, "low": -1},
        "'count': expected a whole number from 0 to 2, got 3": {"do": "frames", "item": 0, "low": 5, "count": 3},
        "undo: expected the fields none, got 'item' too": {"do": "undo", "item": 1},
    }
    for words, message in wrong.items():
        with pytest.raises(LabelError, match=words):
            session.answer(message)
