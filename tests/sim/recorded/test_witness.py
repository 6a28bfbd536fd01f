"""What a recorded evaluation shows an audit, and what it cannot show."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from wovr_jax.data import episodes as disk
from wovr_jax.sim.arena import Actor
from wovr_jax.sim.recorded.arena import Recorded, RecordedConfig, RecordedError
from wovr_jax.sim.recorded.witness import RecordedWitness
from wovr_jax.types import Episode

STEPS, LENGTHS = 16, (16, 11, 9)
ROBOT = RecordedConfig("recordings", "franka", ("open it", "shut it"), "it is open, or shut", size=4, steps=STEPS)
PROMPTS = np.arange(6, dtype=np.int32).reshape(2, 3)


def episode(row: int) -> Episode:
    rng, steps = np.random.default_rng(row), LENGTHS[row]
    action_SA = rng.uniform(-1, 1, (steps, 7)).astype(np.float32)
    frame_SHWC = rng.integers(0, 256, (steps + 1, 4, 4, 3), np.uint8)
    won_S = np.arange(steps + 1) >= (steps if row else steps + 1)
    return Episode(frame_SHWC, action_SA, won_S, ROBOT.instructions[row % 2], row % 2, row, "grpo-1", action_SA)


def witness(run: pathlib.Path, batch: int = 2) -> RecordedWitness:
    return RecordedWitness(Recorded(ROBOT, run), PROMPTS, batch=batch, chunk=8, memory=4)


def actor(name: str) -> Actor:
    nobody: Any = None
    return Actor(nobody, dict, jax.random.key(0), 0.0, name)


def test_recorded_episodes_are_played_batch_by_batch_and_short_ones_stand_still(tmp_path: pathlib.Path) -> None:
    made = [episode(row) for row in range(3)]
    disk.write(tmp_path / "stages" / "evaluate-1" / "greedy", made)
    first, last = witness(tmp_path).play(3, actor("grpo-1"))
    assert (first.count, last.count) == (2, 1) and first.start.sim is None
    assert first.start.memory_BMHWC.shape == (2, 4, 4, 4, 3) and first.start.prompt_BL.tolist() == PROMPTS.tolist()
    video_BSHWC = np.concatenate([part.rollout.video_BNTHWC for part in (first, last)]).reshape(4, STEPS, 4, 4, 3)
    action_BSA = np.concatenate([part.rollout.action_BNTA for part in (first, last)]).reshape(4, STEPS, 7)
    truth_BS = np.concatenate([part.rollout.truth_BNT for part in (first, last)]).reshape(4, STEPS)
    for row in (0, 1, 2, 2):  # the last batch is filled up with its own
        one, n = made[row], LENGTHS[row]
        seen_SHWC = one.frame_SHWC.astype(np.float32) / 127.5 - 1
        expected_SHWC = np.concatenate([seen_SHWC[1:], np.repeat(seen_SHWC[-1:], STEPS - n, axis=0)])
        np.testing.assert_allclose(video_BSHWC[row], expected_SHWC, atol=1e-6)
        assert np.array_equal(action_BSA[row, :n], one.action_SA) and not action_BSA[row, n:, :6].any()
        assert (action_BSA[row, n:, 6] == one.action_SA[-1, 6]).all(), "the fingers hold what they hold"
        assert truth_BS[row].any() == one.success_S.any() and not truth_BS[row, : n - 1].any()


def test_what_nobody_recorded_is_not_shown(tmp_path: pathlib.Path) -> None:
    with pytest.raises(RecordedError, match="grpo-2: there is no recorded evaluation of this policy"):
        next(witness(tmp_path).play(1, actor("grpo-2")))
    none: Any = None
    with pytest.raises(RecordedError, match="nothing can be followed in truth"):
        witness(tmp_path).follow(none, np.zeros(1, int), np.zeros((1, 8, 7)))
