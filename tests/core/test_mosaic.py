"""A mosaic holds its views bit for bit and its state to a byte, on the host and on the device."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.core import pixels

RNG = np.random.default_rng(0)
VIEWS = [RNG.uniform(-1, 1, (2, 5, 8, 8, 3)).astype(np.float32) for _ in range(2)]
STATE = RNG.uniform(-1, 1, (2, 5, 3)).astype(np.float32)


@pytest.mark.parametrize("xp", [np, jnp])
def test_what_is_joined_is_taken_apart_again(xp: Any) -> None:
    views, state = [xp.asarray(view) for view in VIEWS], xp.asarray(STATE)
    mosaic = pixels.make_mosaic(views, state, 4)
    assert mosaic.shape == (2, 5, 8, 20, 3) and type(mosaic) is type(views[0]), "numpy gives numpy"
    apart = pixels.split_views(mosaic, 2)
    for v, view in enumerate(VIEWS):
        np.testing.assert_array_equal(apart[..., v, :, :, :], view)
        np.testing.assert_array_equal(mosaic[..., 8 * v : 8 * v + 8, :], view)
    np.testing.assert_allclose(pixels.read_state(mosaic, 2, 3), STATE, atol=1e-6)
    # Three bands of two rows, and what is left at the bottom is the middle of the range.
    assert (mosaic[..., 0:2, 16:, :] == STATE[..., 0, None, None, None]).all()
    assert (mosaic[..., 6:, 16:, :] == 0).all()


def test_bytes_hold_a_state_to_one_of_255_steps_and_cut_what_is_beyond() -> None:
    state = np.array([[-1.0, 1.0, 0.1234], [-3.0, 2.0, 0.0]], np.float32)
    views = [np.zeros((2, 6, 6, 3), np.float32)]
    stored = pixels.to_uint8(pixels.make_mosaic(views, state, 2))
    seen = pixels.read_state(pixels.to_float(stored), 1, 3)
    np.testing.assert_allclose(seen, np.clip(state, -1, 1), atol=1.01 / 255)
    np.testing.assert_array_equal(seen[:, :2], [[-1, 1], [-1, 1]])


def test_without_a_strip_there_is_no_state_and_one_view_is_a_picture() -> None:
    np.testing.assert_array_equal(pixels.make_mosaic(VIEWS[:1]), VIEWS[0])
    assert pixels.make_mosaic(VIEWS, STATE).shape == (2, 5, 8, 16, 3)
