"""Windows, chunks and reward frames, checked against numbered frames."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.core import keys
from wovr_jax.data import batches, records
from wovr_jax.data.batches import Layout, NoDataError
from wovr_jax.types import NULL_ACTION, Episode

NULL = np.asarray(NULL_ACTION, np.float32)


def numbered(steps: int, seed: int = 0, first_success: int | None = None, task: int = 1) -> Episode:
    """Frame t is filled with t (plus 100 x seed, modulo 256); action t is t / 100 with the gripper closed."""
    action = np.repeat(np.arange(steps, dtype=np.float32)[:, None] / 100, 7, axis=1)
    action[:, -1] = 1.0
    frame = np.broadcast_to(np.arange(steps + 1)[:, None, None, None], (steps + 1, 2, 2, 3))
    return Episode(
        frame_SHWC=((frame + 100 * seed) % 256).astype(np.uint8),
        action_SA=action,
        success_S=np.arange(steps + 1) >= (steps + 1 if first_success is None else first_success),
        instruction="x",
        task=task,
        seed=seed,
        actor="base",
        label_SA=action + 0.5 * np.eye(7, dtype=np.float32)[0],
    )


def frame_numbers(frame_BFHWC) -> list[list[int]]:
    return np.round((np.asarray(frame_BFHWC)[:, :, 0, 0, 0] + 1) * 127.5).astype(int).tolist()


def test_window_layout_and_action_alignment():
    data = batches.windows([numbered(24)], val_share=0.0)
    rows = jnp.array([[0, -3], [0, 0], [0, 5], [0, 13]])
    frame, action = batches.gather_windows(data, rows)
    assert frame.shape == (4, 13, 2, 2, 3) and frame.dtype == jnp.float32
    numbers = frame_numbers(frame)
    assert numbers[0] == [0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]  # the episode start of the reference
    assert numbers[1] == [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert numbers[2] == [0, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    assert numbers[3][-1] == 24
    # Slot i holds the action that produced frame i: frame t comes from action t - 1.
    np.testing.assert_allclose(action[2, 1:, 0], (np.arange(5, 17) - 1) / 100, rtol=1e-6)
    np.testing.assert_array_equal(action[:, 0], np.tile(NULL, (4, 1)))
    np.testing.assert_array_equal(action[0, :5], np.tile(NULL, (5, 1)))
    np.testing.assert_allclose(action[0, 5:, 0], np.arange(8) / 100, rtol=1e-6)
    np.testing.assert_array_equal(action[1, 1], NULL)  # frame 0 was produced by nothing


def test_window_index():
    # 25 frames: starts 0 ... 13, as the reference's [0, T - 11).
    data = batches.windows([numbered(24)], val_share=0.0)
    assert data.train_I2.tolist() == [[0, -3]] + [[0, start] for start in range(14)]
    assert data.train_starts == 1 and len(data.val_I2) == 0
    capped = batches.windows([numbered(24)], Layout(start_cap=3), val_share=0.0)
    assert capped.train_I2[:, 1].tolist() == [-3, 0, 1, 2]
    partial = batches.windows([numbered(24)], Layout(partial=True), val_share=0.0)
    assert partial.train_I2[:, 1].tolist() == list(range(-3, 14))
    frame, action = batches.gather_windows(partial, jnp.array([[0, -1]]))
    assert frame_numbers(frame)[0] == [0, 0, 0, *range(1, 11)]
    np.testing.assert_array_equal(action[0, 1:3], np.tile(NULL, (2, 1)))


def test_windows_to_learn_from_are_moved_and_those_that_judge_are_not():
    episodes = [numbered(24, seed) for seed in range(8)]
    plain, moved = (batches.windows(episodes, Layout(partial=True, shift=shift)) for shift in (0, 2))
    assert moved.train_I2.shape == (batches.SHIFTS * len(plain.train_I2), 4)
    np.testing.assert_array_equal(moved.train_I2[:, :2], np.repeat(plain.train_I2, batches.SHIFTS, axis=0))
    assert moved.train_starts == batches.SHIFTS * plain.train_starts, "episode starts are first all the same"
    assert set(np.unique(moved.train_I2[:, 2:])) == {-2, -1, 0, 1, 2}
    np.testing.assert_array_equal(moved.val_I2, plain.val_I2)
    # What is seen is the same scene from elsewhere, in all frames of a window alike; actions stay as they are.
    rng = np.random.default_rng(0)
    drawn = [dataclasses.replace(e, frame_SHWC=rng.integers(0, 256, (25, 5, 5, 3), np.uint8)) for e in episodes]
    moved = batches.windows(drawn, Layout(partial=True, shift=2))
    row_B4 = jnp.asarray(moved.train_I2)[:16]
    frame_BFHWC, action_BFA = batches.gather_windows(moved, row_B4)
    still_BFHWC, same_BFA = batches.gather_windows(moved, row_B4[:, :2])
    np.testing.assert_array_equal(action_BFA, same_BFA)
    for frame_FHWC, still_FHWC, (_, _, down, right) in zip(frame_BFHWC, still_BFHWC, np.asarray(row_B4), strict=True):
        rows, columns = np.clip(np.arange(5) + down, 0, 4), np.clip(np.arange(5) + right, 0, 4)
        np.testing.assert_array_equal(frame_FHWC, np.asarray(still_FHWC)[:, rows][:, :, columns])


def test_of_a_mosaic_only_the_camera_above_is_moved():
    rng = np.random.default_rng(0)
    frame_FHWC, by_2 = rng.integers(0, 256, (3, 6, 15, 3), np.uint8), np.array([2, -1])
    moved = batches.shift_frames(frame_FHWC, by_2)
    np.testing.assert_array_equal(moved[:, :, :6], batches.shift_frames(frame_FHWC[:, :, :6], by_2))
    assert (moved[:, :, :6] != frame_FHWC[:, :, :6]).any()
    np.testing.assert_array_equal(moved[:, :, 6:], frame_FHWC[:, :, 6:])
    np.testing.assert_array_equal(batches.shift_frames(jnp.asarray(frame_FHWC), by_2, jnp.take), moved)


def test_unequal_lengths_never_reach_padding():
    lengths = [24, 9, 5, 11, 12]
    data = batches.windows([numbered(steps, seed) for seed, steps in enumerate(lengths)], val_share=0.0)
    assert data.frame_ESHWC.shape == (5, 25, 2, 2, 3) and data.action_ESA.shape == (5, 24, 7)
    counts = np.bincount(data.train_I2[:, 0], minlength=5).tolist()
    assert counts == [15, 1, 0, 2, 3]  # 9 steps: only the first chunk; 5 steps: nothing
    for episode, start in data.train_I2.tolist():
        assert start + 11 <= lengths[episode]
    with pytest.raises(NoDataError, match="needs 8 steps, the longest of 2 episodes has 7"):
        batches.windows([numbered(7), numbered(6)])
    with pytest.raises(NoDataError, match="0 episodes"):
        batches.windows([])


def test_rows_are_drawn_on_the_device_with_the_start_share():
    data = jax.device_put(batches.windows([numbered(24, seed) for seed in range(8)], val_share=0.0))

    @functools.partial(jax.jit, static_argnames="share")
    def batch(data, key, share):
        row = batches.sample_rows(key, 4000, data.train_starts, len(data.train_I2), share)
        return row, batches.gather_windows(data, data.train_I2[row[:4]])

    row, (frame, action) = batch(data, keys.key(0, "batch"), share=0.05)
    assert 0.03 < np.mean(np.asarray(row) < 8) < 0.07
    assert set(np.asarray(row).tolist()) == set(range(len(data.train_I2)))
    assert frame.shape == (4, 13, 2, 2, 3) and action.shape == (4, 13, 7)
    assert (np.asarray(batch(data, keys.key(0), share=0.0)[0]) >= 8).all()
    short = batches.windows([numbered(9)], val_share=0.0)  # nothing but episode starts
    assert (batches.sample_rows(keys.key(0), 5, short.train_starts, len(short.train_I2)) == 0).all()


def test_split_is_stable_under_growth_and_never_one_sided():
    first = [numbered(12, seed) for seed in range(200)]
    val = batches.split(first, 0.1)
    assert 0.04 < val.mean() < 0.18
    grown = batches.split(first + [numbered(12, seed) for seed in range(200, 300)], 0.1)
    np.testing.assert_array_equal(grown[:200], val)
    assert not batches.split(first, 0.0).any()
    for seed in range(20):
        assert batches.split([numbered(12, seed), numbered(12, seed + 50)], 0.01).sum() == 1
        assert not batches.split([numbered(12, seed)], 0.9).any()
    won = [index % 50 == 0 for index in range(200)]
    mixed = [dataclasses.replace(one, success_S=one.success_S | wins) for one, wins in zip(first, won, strict=True)]
    both = batches.split(mixed, 0.01)
    assert 1 <= both[won].sum() < 4
    assert batches.split([mixed[0], mixed[1]], 0.01).sum() == 1, "one success and one failure"
    # What others did changes nothing, not even where something had to be moved to the other side; nor does the disk.
    others = [dataclasses.replace(one, actor="another") for one in mixed]
    np.testing.assert_array_equal(batches.split(others[:70] + mixed, 0.01)[70:], both)
    np.testing.assert_array_equal(batches.split([records.peek(records.encode(one)) for one in mixed], 0.01), both)
    assert batches.split([]).tolist() == []
    with pytest.raises(ValueError, match=r"val_share must be in \[0, 1\)"):
        batches.split(first, 1.0)


def test_train_and_validation_windows_share_no_episode():
    data = batches.windows([numbered(24, seed) for seed in range(40)], val_share=0.2)
    train, val = set(data.train_I2[:, 0].tolist()), set(data.val_I2[:, 0].tolist())
    assert not train & val and len(train | val) == 40
    assert (data.val_I2[: data.val_starts, 1] == -3).all() and (data.val_I2[data.val_starts :, 1] >= 0).all()


def test_every_step_is_an_imitation_sample():
    found = batches.sft_chunks([numbered(10, 0), numbered(8, 1)])
    assert found["frame_BHWC"].shape == (18, 2, 2, 3) and found["label_BTA"].shape == (18, 8, 7)
    assert found["step_B"].tolist() == [*range(10), *range(8)]
    np.testing.assert_allclose(found["label_BTA"][0, :, 0], np.arange(8) / 100 + 0.5, rtol=1e-6)
    assert found["task_B"].tolist() == [1] * 18 and found["episode_B"].tolist() == [0] * 10 + [1] * 8
    # Sample 7 of the first episode: labels 7, 8, 9, then no motion with the gripper still closed.
    label = found["label_BTA"][7]
    np.testing.assert_allclose(label[:3, 1], [0.07, 0.08, 0.09], rtol=1e-6)
    np.testing.assert_array_equal(label[3:], np.tile([0, 0, 0, 0, 0, 0, 1], (5, 1)))


def test_chunk_boundaries_and_repeated_beginnings():
    episodes = [numbered(24, seed) for seed in range(20)]
    steps = batches.sft_chunks(episodes, stride=8)["step_B"].reshape(20, 3)
    assert (steps == [0, 8, 16]).all()
    early = batches.sft_chunks([numbered(24, 0)], stride=2, early=3)["step_B"]
    assert early.tolist() == [0, 0, 0, 2, 2, 2, *range(4, 24, 2)], "the first half chunk three times"
    with pytest.raises(NoDataError):
        batches.sft_chunks([])


def test_rows_and_frames_of_another_kind_are_refused():
    data = batches.windows([numbered(24)], val_share=0.0)
    with pytest.raises(AssertionError, match="shape"):
        batches.gather_windows(data, jnp.zeros((2, 3), jnp.int32))
    with pytest.raises(AssertionError, match="type"):
        batches.gather_windows(data.replace(frame_ESHWC=data.frame_ESHWC.astype(np.float32)), data.train_I2[:1])
