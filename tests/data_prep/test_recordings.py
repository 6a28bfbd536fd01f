"""Recordings of a policy server to LeRobot and back: the episodes are the same but for their last frame."""

from __future__ import annotations

import sys

import numpy as np
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("PIL.Image")
import pyarrow.parquet as pq

from data_prep import lerobot, to_lerobot
from tests.export.recording import Robot, Served
from wovr_jax.data import episodes as disk
from wovr_jax.data.episodes import EpisodesError
from wovr_jax.label.store import Store


@pytest.fixture
def recordings(tmp_path):
    """Three episodes that two clients drove, of two tasks; one more goes on."""
    folder = tmp_path / "recordings"
    with Served(folder) as served, Robot(served.url, 1) as one, Robot(served.url, 2) as two:
        two.start("drop it")
        for robot, prompt, outcome in (
            (one, "lift it", "success"),
            (one, "drop it", "failure"),
            (two, None, "success"),
        ):
            if prompt:
                robot.start(prompt)
            robot.ask({"prompt": "lift it", "observation/image": robot.sent("image")[-1]})
            robot.step(5)
            assert robot.end(outcome)["state"] == "written"
        one.start("lift it")
        one.step()
        yield folder


def test_there_and_back(recordings, tmp_path, monkeypatch, capsys):
    arguments = [str(recordings), "--out", str(tmp_path / "set"), "--executed", "--fps", "10"]
    monkeypatch.setattr(sys, "argv", ["to_lerobot", *arguments])
    to_lerobot.main()
    assert "3 episodes, 15 frames, 2 tasks" in capsys.readouterr().out
    monkeypatch.setattr(
        sys, "argv", ["lerobot", str(tmp_path / "set"), "--out", str(tmp_path / "back"), "--keep-noops"]
    )
    lerobot.main()
    names = sorted(path.name for path in recordings.iterdir() if not path.name.startswith("."))
    ours = [episode for name in names for episode in disk.read(recordings / name)]
    for before, after in zip(ours, disk.read(tmp_path / "back"), strict=True):
        assert after.instruction == before.instruction
        np.testing.assert_array_equal(after.action_SA, before.action_SA)
        np.testing.assert_array_equal(after.success_S[1:], before.success_S[1:])
        np.testing.assert_array_equal(after.state_SD[:-1], before.state_SD[:-1])
        for camera in ("frame_SHWC", "wrist_SHWC"):
            np.testing.assert_array_equal(getattr(after, camera)[:-1], getattr(before, camera)[:-1])
    # Without --executed it is what the policy proposed.
    to_lerobot.write(to_lerobot.open_folder(recordings), tmp_path / "proposed", fps=10)
    monkeypatch.setattr(
        sys, "argv", ["lerobot", str(tmp_path / "proposed"), "--out", str(tmp_path / "again"), "--keep-noops"]
    )
    lerobot.main()
    for before, after in zip(ours, disk.read(tmp_path / "again"), strict=True):
        np.testing.assert_array_equal(after.action_SA, before.label_SA)
        assert (before.label_SA != before.action_SA).any()


def test_recordings_of_several_kinds_are_refused(recordings, tmp_path):
    with Served(recordings) as served, Robot(served.url, wrist=False) as robot:
        robot.start("lift it")
        robot.step()
        robot.end("success")
    with pytest.raises(EpisodesError, match=r"wrist is missing, in .* \[2, 2, 3\]"):
        to_lerobot.open_folder(recordings)


def test_labels_go_along(recordings, tmp_path):
    store = Store(recordings, "ada")
    store.mark(0, "discard", None, None)
    store.mark(1, "success", 2, None)
    to_lerobot.write(to_lerobot.open_folder(recordings), tmp_path / "set")
    rows = pq.read_table(tmp_path / "set/data/chunk-000/file-000.parquet").to_pydict()
    assert rows["episode_index"] == [0] * 5 + [1] * 5
    assert rows["next.reward"] == [0, 1, 1, 1, 1] + [0] * 5  # the last was recorded as a failure
    for number in (1, 2):
        store.mark(number, "discard", None, None)
    with pytest.raises(EpisodesError, match="every recording in it is discarded"):
        to_lerobot.open_folder(recordings)
