"""Replaying recorded episodes: what the world is given, and which of its frames belong to which episode."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from wovr_jax.core.pixels import to_float
from wovr_jax.run import programs
from wovr_jax.types import NULL_ACTION, Episode, Imagined

PROMPT_KL = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)


def episode(index: int, steps: int) -> Episode:
    frame = np.full((steps + 1, 4, 4, 3), index, np.uint8)
    action = np.full((steps, 7), index / 10, np.float32)
    return Episode(frame, action, np.zeros(steps + 1, bool), "reach", index % 2, index, "base", action)


def test_episodes_are_replayed_in_equal_batches_from_their_own_first_frames() -> None:
    made, asked = [episode(0, 16), episode(1, 12), episode(2, 3)], []

    def play(start, action_BNTA, low):
        """Frames that count the steps: 100 after the first."""
        asked.append((start, np.asarray(action_BNTA), low))
        none = {field.name: None for field in dataclasses.fields(Imagined)}
        step_NT = 100 + np.arange(16).reshape(2, 8)
        video = np.broadcast_to(to_float(step_NT.astype(np.uint8))[None, ..., None, None, None], (2, 2, 8, 4, 4, 3))
        return Imagined(**none | {"frame_BNHWC": video[:, :, 0], "video_BNTHWC": video})

    size = {"batch": 2, "steps": 16, "chunk": 8, "memory": 4}
    films = list(programs.replay_episodes(play, made, PROMPT_KL, **size))
    assert [len(film) for film in films] == [17, 13, 4]
    for index, film in enumerate(films):
        assert film.dtype == np.uint8
        assert film[:, 0, 0, 0].tolist() == [index, *range(100, 100 + len(film) - 1)]

    assert [low for *_, low in asked] == [0, 2]
    (first, action, _), (last, filled, _) = asked
    np.testing.assert_allclose(first.anchor_BHWC[:, 0, 0, 0], to_float(np.array([0, 1], np.uint8)), atol=1e-6)
    np.testing.assert_array_equal(first.prompt_BL, PROMPT_KL)
    assert action.shape == filled.shape == (2, 2, 8, 7)
    done = action[1].reshape(16, 7)  # an episode that is over does nothing
    np.testing.assert_array_equal(done[:12], np.float32(0.1))
    np.testing.assert_array_equal(done[12:], np.broadcast_to(np.float32(NULL_ACTION), (4, 7)))
    np.testing.assert_array_equal(filled[0], filled[1])  # the last batch is filled up, so that one program does
    assert last.task_B.tolist() == [0, 0]
