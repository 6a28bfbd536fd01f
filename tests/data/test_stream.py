"""Windows from disk: the same ones that are cut in memory, and the same batches whoever reads them from where on."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.shards import write_shards
from wovr_jax.core import pixels
from wovr_jax.data import batches, stream
from wovr_jax.data import episodes as disk
from wovr_jax.data.batches import Layout
from wovr_jax.data.stream import Feed, Stream, StreamConfig
from wovr_jax.types import Episode

LAYOUT = Layout(memory=4, new=4, partial=True, start_share=0.25)
STEPS = (9, 24, 3, 12, 16, 24)
"""The third one is too short for a window, the last one is held out."""


def episodes() -> list[Episode]:
    rng = np.random.default_rng(0)
    made = []
    for e, steps in enumerate(STEPS):
        frame_SHWC = rng.integers(0, 256, (steps + 1, 4, 4, 3), np.uint8)
        frame_SHWC[:, 0, 0, 0], frame_SHWC[:, 0, 0, 1] = e, np.arange(steps + 1)  # each pixel says whose frame it is
        action_SA = rng.uniform(-1, 1, (steps, 7)).astype(np.float32)
        made.append(Episode(frame_SHWC, action_SA, np.zeros(steps + 1, bool), "reach", 0, e, "base", action_SA))
    return made


def reader(source=None, **changes) -> Stream:
    use_E = np.arange(len(STEPS)) < 5
    return Stream(source or episodes(), np.array(STEPS), use_E, LAYOUT, StreamConfig(**{"visit": 3, **changes}))


def drawn(feed: Feed, steps) -> list[np.ndarray]:
    return [np.asarray(feed(i)["frame"]) for i in steps]


def test_a_window_is_the_one_that_is_cut_on_the_device() -> None:
    made = [episodes()[1]]
    cut = batches.windows(made, LAYOUT, val_share=0.0)
    frames, actions = batches.gather_windows(cut, jnp.asarray(cut.train_I2))
    for (_, start), frame_FHWC, action_FA in zip(cut.train_I2, frames, actions, strict=True):
        ours, action = stream.window(made[0], int(start), LAYOUT)
        np.testing.assert_allclose(pixels.to_float(ours), frame_FHWC, atol=2e-7)
        np.testing.assert_array_equal(action, action_FA)
    assert reader(made, visit=1).layout.later(24) == range(-2, 18)


def test_windows_of_a_stream_are_moved_too_each_by_itself() -> None:
    still, moved = reader(), reader()
    moved.layout = dataclasses.replace(moved.layout, shift=2)
    found = set()
    for row in range(16):
        plain, other = (one.visit((7,), 0, row) for one in (still, moved))
        np.testing.assert_array_equal(plain["action"], other["action"])
        for frame_FHWC, seen_FHWC in zip(plain["frame"], other["frame"], strict=True):
            by = [
                (down, right)
                for down in range(-2, 3)
                for right in range(-2, 3)
                if np.array_equal(batches.shift_frames(frame_FHWC, (down, right)), seen_FHWC)
            ]
            assert len(by) == 1, "the same window from elsewhere"
            found.update(by)
    assert len(found) > 15, "each by itself"


def test_every_window_of_the_chosen_episodes_is_drawn_as_often_as_the_next() -> None:
    read = reader()
    assert read.count == sum(1 + len(LAYOUT.later(steps)) for steps in (9, 24, 12, 16))  # not the short, not the held
    seen = [read.visit((7,), group, row)["frame"] for group in range(250) for row in range(4)]
    frame_KFHWC = np.concatenate(seen)
    episode_K, last_K = frame_KFHWC[:, 0, 0, 0, 0], frame_KFHWC[:, -1, 0, 0, 1]
    assert set(episode_K) == {0, 1, 3, 4}
    begins = last_K == 4
    assert abs(begins.mean() - 0.25) < 0.03
    counts = np.array([(episode_K == e).mean() for e in (0, 1, 3, 4)])
    expected = np.array([1 + len(LAYOUT.later(STEPS[e])) for e in (0, 1, 3, 4)]) / read.count
    np.testing.assert_allclose(counts, expected, atol=0.05)
    assert set(last_K[episode_K == 1]) == set(range(4, 25))  # the last frame of an episode too


def test_batches_depend_on_seed_and_step_alone() -> None:
    whole = drawn(Feed(reader(), 4, (1,), 20), range(10))
    resumed = drawn(Feed(reader(threads=2, ahead=1), 4, (1,), 20), range(5, 10))
    for ours, theirs in zip(whole[5:], resumed, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not np.array_equal(whole[0], drawn(Feed(reader(), 4, (2,), 20), [0])[0])
    assert len({batch.tobytes() for batch in whole}) == 10  # a visit's windows are not one window again and again


def test_processes_read_their_own_rows_of_one_batch() -> None:
    whole = list(itertools.islice(reader().read((1,), np.arange(4), 0, 6), 6))
    halves = [list(itertools.islice(reader().read((1,), rows, 0, 6), 6)) for rows in (np.arange(2), np.arange(2, 4))]
    for step, batch in enumerate(whole):
        np.testing.assert_array_equal(batch["frame"], np.concatenate([half[step]["frame"] for half in halves]))


def test_the_folder_gives_what_the_list_gives_and_is_not_decoded_to_be_counted(tmp_path, monkeypatch) -> None:
    write_shards(tmp_path / "base", episodes(), per_shard=2)
    source = disk.EpisodeSource(tmp_path / "base")
    with monkeypatch.context() as patch:
        patch.setattr(disk, "decode", None)
        assert [head.steps for head in disk.heads(source)] == list(STEPS)
    assert disk.heads(source) == disk.heads(episodes())
    for ours, theirs in zip(
        drawn(Feed(reader(source), 4, (1,), 6), range(4)), drawn(Feed(reader(), 4, (1,), 6), range(4))
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_a_damaged_record_is_named(tmp_path) -> None:
    write_shards(tmp_path / "base", episodes(), per_shard=2)
    source = disk.EpisodeSource(tmp_path / "base")
    records = list(source._records)
    source._records = [record[:-9] if e == 3 else record for e, record in enumerate(records)]
    with pytest.raises(disk.EpisodesError, match=r"shard-00001\.array_record, record 1: damaged record"):
        drawn(Feed(reader(source), 4, (1,), 60), range(60))


def test_reading_processes_change_nothing(tmp_path) -> None:
    disk.write(tmp_path / "base", episodes())
    source = disk.EpisodeSource(tmp_path / "base")
    plain, apart = (Feed(reader(source, workers=workers), 4, (1,), 6) for workers in (0, 1))
    for ours, theirs in zip(drawn(plain, range(6)), drawn(apart, range(6)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_settings_and_data_that_give_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="visit: expected at least 1"):
        StreamConfig(visit=0)
    short = dataclasses.replace(LAYOUT, new=30)
    with pytest.raises(batches.NoDataError, match="a window needs 30 steps, the longest of 5 episodes has 24"):
        Stream(episodes(), np.array(STEPS), np.arange(6) < 5, short, StreamConfig())


def test_batches_lie_on_the_device_before_they_are_asked_for() -> None:
    feed = Feed(reader(), 4, (1,), 20)
    batch = feed(0)
    assert isinstance(batch["frame"], jax.Array) and batch["frame"].dtype == jnp.uint8
    assert feed.waited > 0.0
