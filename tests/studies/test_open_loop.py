"""Recorded actions in open loop: where the frames go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.run import programs
from wovr_jax.studies import open_loop
from wovr_jax.types import NULL_ACTION, Episode
from wovr_jax.world import model
from wovr_jax.world.model import WorldConfig

CFG = WorldConfig.fake()


def episodes(count=2, steps=24):
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (count, steps + 1, 16, 16, 3), np.uint8)
    action = rng.uniform(-1, 1, (count, steps, 7)).astype(np.float32)
    none = np.zeros(steps + 1, bool)
    return [Episode(frame[e], action[e], none, "reach", 0, e, "base", action[e]) for e in range(count)]


def test_recorded_episodes_are_cut_into_chunks():
    first, action, true = open_loop.stack_episodes(episodes(), 8)
    assert (first.shape, action.shape, true.shape) == ((2, 16, 16, 3), (2, 3, 8, 7), (2, 3, 8, 16, 16, 3))
    want = episodes()[1].frame_SHWC
    np.testing.assert_allclose(true[1, 2, 0], want[17] / 127.5 - 1.0, atol=1e-6)
    with pytest.raises(ValueError, match=r"a multiple of 8 steps, got \[20\]"):
        open_loop.stack_episodes(episodes(steps=20), 8)


def test_later_chunks_are_imagined_from_imagined_frames(monkeypatch):
    seen = []

    def chunk(cfg, params, state, action_BTA, key_B):
        jax.debug.callback(lambda *x: seen.append(jax.device_get(x)), state, action_BTA)
        return state.memory_BMHWC[:, -1:] + jnp.arange(1, 9).reshape(1, 8, 1, 1, 1)  # counts on from the last frame

    monkeypatch.setattr(model, "chunk", chunk)
    programs.replay.cache_clear()  # one that is compiled already would not see it
    first, action, _ = open_loop.stack_episodes(episodes(), 8)
    with jax.disable_jit():
        video = open_loop.play(CFG, {}, first * 0, action, jax.random.key(0))
    np.testing.assert_array_equal(
        video[:, :, :, 0, 0, 0], np.broadcast_to(np.arange(1, 25).reshape(1, 3, 8), (2, 3, 8))
    )
    programs.replay.cache_clear()
    begin, later = seen[0][0], seen[2][0]
    np.testing.assert_array_equal(begin.action_BMA, np.broadcast_to(np.float32(NULL_ACTION), (2, 4, 7)))
    np.testing.assert_array_equal(later.memory_BMHWC[:, :, 0, 0, 0], [[13, 14, 15, 16]] * 2)
    np.testing.assert_array_equal(later.anchor_BHWC, 0)
    np.testing.assert_array_equal(later.action_BMA, action[:, 1, 4:])
