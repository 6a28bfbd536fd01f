"""Imagined frames against true ones, frame by frame: squared error, and structural similarity."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax.core.pixels import to_float
from wovr_jax.types import Array

SIDE, SIGMA = 11, 1.5
"""Pixels and standard deviation of SSIM's Gaussian window."""
SPAN = 2.0
"""Of the pixels, which lie in [-1, 1]."""


def structural_similarity(a_BHWC: Array, b_BHWC: Array) -> Array:
    """Returns (B,) the structural similarity (SSIM) of pictures in [-1, 1]: 1 for equal ones.

    As Wang et al. define it (IEEE Transactions on Image Processing 13:600, 2004): a Gaussian window of 11 pixels and
    deviation 1.5, constants 0.01 and 0.03 of the pixels' span, channel by channel, the mean over the places at which
    the window lies inside. That is ``skimage.metrics.structural_similarity`` with gaussian_weights=True and
    use_sample_covariance=False.

    Raises:
      ValueError: pictures smaller than the window.
    """
    if min(a_BHWC.shape[1:3]) < SIDE:
        raise ValueError(f"SSIM needs pictures of at least {SIDE} pixels on a side, got {a_BHWC.shape[1:3]}.")
    place = np.arange(SIDE) - SIDE // 2
    weight = np.exp(-(place**2) / (2 * SIGMA**2))
    weight = jnp.asarray(weight / weight.sum(), jnp.float32)

    def blur(x_BHWC: Array) -> Array:
        # The window is a product of a row and a column: two passes of eleven products instead of one of 121.
        height, width = (side - SIDE + 1 for side in x_BHWC.shape[1:3])
        rows_BHWC = sum((weight[i] * x_BHWC[:, i : i + height] for i in range(SIDE)), start=jnp.zeros(()))
        return sum((weight[i] * rows_BHWC[:, :, i : i + width] for i in range(SIDE)), start=jnp.zeros(()))

    mean_a, mean_b = blur(a_BHWC), blur(b_BHWC)
    var_a, var_b = blur(a_BHWC**2) - mean_a**2, blur(b_BHWC**2) - mean_b**2
    covariance = blur(a_BHWC * b_BHWC) - mean_a * mean_b
    c1, c2 = (0.01 * SPAN) ** 2, (0.03 * SPAN) ** 2
    alike = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (alike / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean(axis=(1, 2, 3))


def compare_frames(first_BHWC: Array, true_BSHWC: Array, seen_BSHWC: Array) -> dict[str, np.ndarray]:
    """Compares imagined with true videos that begin at the same frame, step by step.

    Args:
      first_BHWC: the frame before the first step; uint8, or float32 in [-1, 1], as the others.
      true_BSHWC, seen_BSHWC: frames after each of S steps.

    Returns:
      (B, S) each: ``error``, the mean squared difference of pixels in [-1, 1]; ``still``, the same of the first frame
      held still, which is what a world without motion would be off by; ``ssim``.
    """
    made = _compare(first_BHWC, true_BSHWC, seen_BSHWC)
    return {name: np.asarray(value_BS) for name, value_BS in made.items()}


@jax.jit
def _compare(first_BHWC: Array, true_BSHWC: Array, seen_BSHWC: Array) -> dict[str, Array]:
    def episode(videos: tuple[Array, Array, Array]) -> dict[str, Array]:
        first_HWC, true_SHWC, seen_SHWC = (to_float(x) if x.dtype == jnp.uint8 else x for x in videos)
        return {
            "error": jnp.square(true_SHWC - seen_SHWC).mean(axis=(1, 2, 3)),
            "still": jnp.square(true_SHWC - first_HWC).mean(axis=(1, 2, 3)),
            "ssim": structural_similarity(true_SHWC, seen_SHWC),
        }

    # One after another: the blurred pictures of all of them together are many times the videos.
    return jax.lax.map(episode, (first_BHWC, true_BSHWC, seen_BSHWC))
