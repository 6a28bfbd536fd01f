"""Films: many episodes of one cost one decoding of it, and an episode is in memory once."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

pytest.importorskip("pyarrow")

from data_prep import film, lerobot, to_lerobot
from data_prep.demos import Conventions, Demo, SourceError, Stream
from data_prep.demos import to_episode as make_episode
from tests.data_prep import test_lerobot as sets
from wovr_jax.data import episodes as disk
from wovr_jax.types import Episode


def write_film(path, count, size, fps=20):
    shade_T = (np.arange(count) % 50 * 4).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    to_lerobot.film(path, np.broadcast_to(shade_T[:, None, None, None], (count, size, size, 3)), fps)


def test_many_episodes_of_one_film_cost_one_decoding(tmp_path, monkeypatch):
    counts = {"opened": 0, "decoded": 0}
    real_open, real_pull = film.Film._open, film.Film._pull

    def count_open(self, *arguments):
        counts["opened"] += 1
        real_open(self, *arguments)

    def count_pull(self, *arguments):
        frame = real_pull(self, *arguments)
        counts["decoded"] += frame is not None
        return frame

    monkeypatch.setattr(film.Film, "_open", count_open)
    monkeypatch.setattr(film.Film, "_pull", count_pull)
    episodes, steps = 120, 4
    made = [make_film_episode(number, steps) for number in range(episodes)]
    disk.write(tmp_path / "ours", made)
    monkeypatch.setattr(to_lerobot, "EACH", episodes)
    to_lerobot.write(disk.EpisodeSource(tmp_path / "ours"), tmp_path / "set", video=True)
    sets.run(monkeypatch, tmp_path / "set", "--out", tmp_path / "back", "--keep-noops")
    back = disk.read(tmp_path / "back")
    assert len(back) == episodes and counts == {"opened": 1, "decoded": episodes * steps}
    for before, after in zip(made, back, strict=True):
        assert np.abs(before.frame_SHWC[:-1].astype(int) - after.frame_SHWC[:-1]).max() <= 4


def make_film_episode(number, steps, size=32):
    shade_S = 2 * (number + np.arange(steps + 1)) % 250
    frame_SHWC = np.broadcast_to(shade_S[:, None, None, None], (steps + 1, size, size, 3)).astype(np.uint8)
    action_SA = np.random.default_rng(number).uniform(-0.5, 0.5, (steps, 7)).astype(np.float32)
    action_SA[:, 6] = np.where(np.arange(steps) < 2, -1, 1)
    success_S = np.arange(steps + 1) == steps
    return Episode(frame_SHWC, action_SA, success_S, "open the drawer", 0, number, "expert", action_SA)


def test_a_film_is_jumped_over_and_gone_back_in(tmp_path):
    write_film(tmp_path / "a.mp4", 700, 16)
    opened = film.Film(tmp_path / "a.mp4", 20)
    for first in (650, 3, 4, 300, 299):
        frames = list(opened.read(first / 20, 5, "here"))
        assert [round(float(frame.mean()) / 4) for frame in frames] == [(first + i) % 50 for i in range(5)]
    # Backwards and far forwards by a key frame, which is never far; not from the beginning.
    assert opened.decoded < 40
    opened.close()
    assert lerobot.video_frames(tmp_path / "a.mp4", 690, 10, "here").shape == (10, 16, 16, 3)
    with pytest.raises(SourceError, match=r"here: a.mp4 ends after 10 of its 11 frames"):
        lerobot.video_frames(tmp_path / "a.mp4", 690, 11, "here")


def test_a_film_of_another_rate_is_said(tmp_path):
    write_film(tmp_path / "a.mp4", 60, 16, fps=30)
    odd = []
    opened = film.Film(tmp_path / "a.mp4", 20)
    assert len(list(opened.read(0.0, 60, "here", odd))) == 60
    assert odd == ["its film takes 1.97 s for what is 2.95 s of rows"]
    with pytest.raises(SourceError, match=r"ends after 0 of its 5 frames"):
        list(opened.read(9.0, 5, "here"))


def test_an_episode_is_in_memory_once(tmp_path, monkeypatch):
    monkeypatch.setattr(to_lerobot, "EACH", 3)
    steps, size = 40, 256
    disk.write(tmp_path / "ours", [make_film_episode(number, steps, size) for number in range(3)])
    to_lerobot.write(disk.EpisodeSource(tmp_path / "ours"), tmp_path / "set", video=True)
    sets.run(monkeypatch, tmp_path / "set", "--out", tmp_path / "warm")  # what is imported late
    tracemalloc.start()
    try:
        sets.run(monkeypatch, tmp_path / "set", "--out", tmp_path / "back")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.3 * (steps + 1) * size * size * 3


def test_frames_of_dropped_steps_are_never_stored():
    action_TA = np.zeros((6, 7))
    action_TA[[1, 4], 0], action_TA[:, 6] = 0.5, -1
    frames = Stream(6, lambda: (np.full((2, 2, 3), t, np.uint8) for t in range(6)))
    episode = make_episode(Demo("here", frames, action_TA, np.zeros(6, bool), "x"), 0, 0, Conventions())
    assert episode.frame_SHWC[:, 0, 0, 0].tolist() == [1, 4, 5]
    short = Stream(6, lambda: iter([np.zeros((2, 2, 3), np.uint8)]))
    with pytest.raises(SourceError, match="0 of its 3 frames are there"):
        make_episode(Demo("here", short, action_TA, np.zeros(6, bool), "x"), 0, 0, Conventions())


def test_a_film_that_is_smeared_is_said(tmp_path):
    path = tmp_path / "a.mp4"
    noise = np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3), np.uint8)
    to_lerobot.film(path, noise, 20)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    path.write_bytes(data)
    odd = []
    opened = film.Film(path, 20)
    try:
        list(opened.read(0.0, 30, "here", odd))
    except SourceError as error:
        odd.append(str(error))
    opened.close()
    assert odd and ("may be damaged, ffmpeg says" in odd[0] or "of its 30 frames" in odd[0])
