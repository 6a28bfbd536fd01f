"""Structural similarity against scikit-image's, and errors by hand."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import structural_similarity

from wovr_jax.audit import pictures


@pytest.mark.parametrize(("height", "width"), [(11, 13), (24, 32)])
def test_ssim_is_that_of_scikit_image(height: int, width: int) -> None:
    rng = np.random.default_rng(height)
    smooth = np.linspace(-0.9, 0.8, height * width * 3, dtype=np.float32).reshape(1, height, width, 3)
    pairs = [
        (rng.uniform(-1, 1, (1, height, width, 3)), rng.uniform(-1, 1, (1, height, width, 3))),
        (smooth, smooth + rng.normal(0, 0.05, smooth.shape)),
        (smooth, np.roll(smooth, 2, axis=2)),
        (smooth, smooth),
    ]
    a, b = (np.concatenate([pair[side] for pair in pairs]).astype(np.float32) for side in (0, 1))
    how = {"gaussian_weights": True, "use_sample_covariance": False, "data_range": 2.0, "channel_axis": -1}
    want = [structural_similarity(x, y, **how) for x, y in zip(a, b)]
    made = pictures.structural_similarity(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(made, want, atol=1e-4)
    assert made[3] == pytest.approx(1.0, abs=1e-5) and made[0] < 0.2


def test_pictures_smaller_than_the_window_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 11 pixels on a side, got \(10, 16\)"):
        pictures.structural_similarity(jnp.zeros((1, 10, 16, 3)), jnp.zeros((1, 10, 16, 3)))


def test_errors_are_of_each_step_and_pixels_may_be_bytes() -> None:
    first = np.zeros((2, 12, 12, 3), np.float32)
    true = np.stack([first, first + 0.5], axis=1)
    seen = true + np.array([[0.0, 0.1], [0.2, 0.0]], np.float32)[..., None, None, None]
    made = pictures.compare_frames(first, true, seen)
    np.testing.assert_allclose(made["error"], [[0.0, 0.01], [0.04, 0.0]], atol=1e-6)
    np.testing.assert_allclose(made["still"], [[0.0, 0.25], [0.0, 0.25]], atol=1e-6)
    np.testing.assert_allclose(made["ssim"][[0, 1], [0, 1]], 1.0, atol=1e-5)
    bytes_ = [np.round((x + 1) * 127.5).astype(np.uint8) for x in (first, true, seen)]
    np.testing.assert_allclose(pictures.compare_frames(*bytes_)["error"], made["error"], atol=2e-3)
