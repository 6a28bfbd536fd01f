"""Episodes to LeRobot and back: nothing is lost but the last frame, and films are close."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("PIL.Image")
import pyarrow.parquet as pq

from data_prep import lerobot, to_lerobot
from wovr_jax.data import episodes as disk
from wovr_jax.data.episodes import EpisodesError
from wovr_jax.types import Episode


def make(number, steps, size=32):
    ramp = np.linspace(0, 120, size)[:, None, None]
    shades = [ramp + 9 * step + 20 * number for step in range(steps + 1)]
    frame_SHWC = np.stack([np.broadcast_to(shade, (size, size, 3)) for shade in shades])
    rng = np.random.default_rng(number)
    action_SA = rng.uniform(-1, 1, (steps, 7)).astype(np.float32)
    action_SA[:, 6] = np.where(np.arange(steps) > 2, 1, -1)
    return Episode(
        frame_SHWC=frame_SHWC.astype(np.uint8),
        action_SA=action_SA * 0.5,
        success_S=np.arange(steps + 1) >= (steps if number % 2 else steps + 9),
        instruction=f"task {number % 2}",
        task=4 + number % 2,
        seed=number,
        actor="expert",
        label_SA=action_SA,
        wrist_SHWC=255 - frame_SHWC.astype(np.uint8),
        state_SD=rng.normal(size=(steps + 1, 8)).astype(np.float32),
    )


@pytest.mark.parametrize("video", [False, True])
def test_there_and_back(tmp_path, monkeypatch, capsys, video):
    monkeypatch.setattr(to_lerobot, "EACH", 2)
    made = [make(number, 5 + number) for number in range(3)]
    disk.write(tmp_path / "ours", made)
    arguments = [str(tmp_path / "ours"), "--out", str(tmp_path / "set"), *(["--video"] if video else [])]
    monkeypatch.setattr(sys, "argv", ["to_lerobot", *arguments])
    to_lerobot.main()
    assert "3 episodes, 18 frames, 2 tasks" in capsys.readouterr().out
    arguments = [str(tmp_path / "set"), "--out", str(tmp_path / "back"), "--keep-noops"]
    monkeypatch.setattr(sys, "argv", ["lerobot", *arguments])
    lerobot.main()
    for before, after in zip(made, disk.read(tmp_path / "back"), strict=True):
        assert after.instruction == before.instruction and after.task == before.task - 4
        assert np.array_equal(after.action_SA, before.label_SA)
        assert np.array_equal(after.state_SD[:-1], before.state_SD[:-1])
        assert np.array_equal(after.success_S[1:], before.success_S[1:])
        for camera in ("frame_SHWC", "wrist_SHWC"):
            error = getattr(after, camera)[:-1].astype(int) - getattr(before, camera)[:-1]
            assert np.abs(error).mean() < (4 if video else 1e-9)


def test_the_tables_are_those_of_version_3(tmp_path):
    disk.write(tmp_path / "ours", [make(number, 4) for number in range(2)])
    info = to_lerobot.write(disk.EpisodeSource(tmp_path / "ours"), tmp_path / "set", video=True)
    assert json.loads((tmp_path / "set/meta/info.json").read_text()) == info
    assert info["codebase_version"] == "v3.0" and info["splits"] == {"train": "0:2"} and info["fps"] == 20
    assert info["features"]["observation.state"]["names"][-1] == "finger2"
    listing = pq.read_table(tmp_path / "set/meta/episodes/chunk-000/file-000.parquet").to_pydict()
    assert listing["dataset_from_index"] == [0, 4] and listing["dataset_to_index"] == [4, 8]
    assert listing["videos/observation.images.image/from_timestamp"] == [0.0, 0.2]
    tasks = pq.read_table(tmp_path / "set/meta/tasks.parquet")
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]
    rows = pq.read_table(tmp_path / "set/data/chunk-000/file-000.parquet").to_pydict()
    assert rows["next.done"] == [False, False, False, True] * 2 and rows["index"] == list(range(8))
    assert rows["next.reward"] == [0, 0, 0, 0, 0, 0, 0, 1]
    stats = json.loads((tmp_path / "set/meta/stats.json").read_text())
    assert stats["action"]["count"] == [8] and len(stats["observation.state"]["mean"]) == 8
    assert np.shape(stats["observation.images.image"]["mean"]) == (3, 1, 1)
    with pytest.raises(EpisodesError, match="exists already"):
        to_lerobot.write(disk.EpisodeSource(tmp_path / "ours"), tmp_path / "set")


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    disk.write(tmp_path / "ours", [make(0, 4)])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(to_lerobot, "film", full)
    with pytest.raises(OSError, match="No space"):
        to_lerobot.write(disk.EpisodeSource(tmp_path / "ours"), tmp_path / "set", video=True)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_executed_actions_are_those_that_led_to_the_frames(tmp_path, monkeypatch):
    made = [make(number, 4) for number in range(2)]
    disk.write(tmp_path / "ours", made)
    arguments = [str(tmp_path / "ours"), "--out", str(tmp_path / "set"), "--executed", "--robot", "table"]
    monkeypatch.setattr(sys, "argv", ["to_lerobot", *arguments])
    to_lerobot.main()
    rows = pq.read_table(tmp_path / "set/data/chunk-000/file-000.parquet").to_pydict()
    executed = np.concatenate([episode.action_SA for episode in made])
    assert np.array_equal(np.array(rows["action"], np.float32), executed)
    assert json.loads((tmp_path / "set/meta/info.json").read_text())["robot_type"] == "table"
    stats = json.loads((tmp_path / "set/meta/stats.json").read_text())
    assert np.allclose(stats["action"]["max"], executed.max(0))
