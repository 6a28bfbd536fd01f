"""Masked sums and means, intervals of success rates, and how far pictures are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Axis = int | tuple[int, ...] | None


def masked_sum(x: Array, where: Array, axis: Axis = None, keepdims: bool = False) -> Array:
    """Sum of the chosen values."""
    chosen = jnp.broadcast_to(where, x.shape)
    return jnp.sum(jnp.where(chosen, x, jnp.zeros_like(x)), axis, keepdims=keepdims)


def masked_mean(x: Array, where: Array, axis: Axis = None, keepdims: bool = False) -> Array:
    """Mean of the chosen values; 0 where none is chosen."""
    return masked_sum(x, where, axis, keepdims) / jnp.maximum(_count(x, where, axis, keepdims), 1)


def masked_std(x: Array, where: Array, axis: Axis = None, ddof: int = 0, keepdims: bool = False) -> Array:
    """Standard deviation of the chosen values, sum of squares over ``count - ddof``.

    ``ddof=0`` is numpy's default, ``ddof=1`` is torch's. 0 where ``count <= ddof``.
    """
    square = jnp.square(x - masked_mean(x, where, axis, keepdims=True))
    count = _count(x, where, axis, keepdims)
    variance = masked_sum(square, where, axis, keepdims) / jnp.maximum(count - ddof, 1)
    return jnp.sqrt(jnp.where(count > ddof, variance, jnp.zeros_like(variance)))


def _count(x: Array, where: Array, axis: Axis, keepdims: bool) -> Array:
    return jnp.sum(jnp.broadcast_to(where, x.shape), axis, dtype=x.dtype, keepdims=keepdims)


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval (low, high) of a success rate; (0, 1) for no trials."""
    if not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n, got {successes} of {n}.")
    if n == 0:
        return 0.0, 1.0
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # At 0 and n of n one end is exact; rounding must not move it.
    return (0.0 if successes == 0 else max(0.0, centre - half)), (1.0 if successes == n else min(1.0, centre + half))


def difference(successes: int, n: int, base_successes: int, base_n: int, z: float = 1.96) -> tuple[float, float, float]:
    """Gain in success rate over independent trials of a base: (gain, low, high).

    Newcombe's hybrid score interval (Statistics in Medicine 17:873, 1998, method 10).
    """
    if not n or not base_n:
        return 0.0, -1.0, 1.0
    ends, base_ends = wilson(successes, n, z), wilson(base_successes, base_n, z)
    return _hybrid(successes / n, ends, base_successes / base_n, base_ends, 0.0)


def paired_difference(
    success: Sequence[bool] | np.ndarray, base: Sequence[bool] | np.ndarray, z: float = 1.96
) -> tuple[float, float, float]:
    """Gain in success rate over a base that ran from the same start states: (gain, low, high).

    ``success[i]`` and ``base[i]`` are outcomes of the same start. Newcombe's hybrid score
    interval for paired proportions (Statistics in Medicine 17:2635, 1998, method 10): the
    correlation of the outcomes narrows the interval of :func:`difference`.
    """
    won, base_won = np.asarray(success, bool), np.asarray(base, bool)
    if won.shape != base_won.shape or won.ndim != 1:
        raise ValueError(f"expected two equal lists of outcomes, got shapes {won.shape} and {base_won.shape}.")
    n = len(won)
    if n == 0:
        return 0.0, -1.0, 1.0
    both, neither = int((won & base_won).sum()), int((~won & ~base_won).sum())
    gained, lost = int((won & ~base_won).sum()), int((~won & base_won).sum())
    margins = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    excess = both * neither - gained * lost
    # Newcombe's continuity correction, applied to a positive correlation only.
    excess = max(excess - n / 2, 0.0) if excess > 0 else excess
    correlation = excess / math.sqrt(margins) if margins else 0.0
    ours, theirs = both + gained, both + lost
    return _hybrid(ours / n, wilson(ours, n, z), theirs / n, wilson(theirs, n, z), correlation)


def gain(success: Sequence[bool] | np.ndarray, base: Sequence[bool] | np.ndarray) -> dict[str, float]:
    """``paired_difference`` as results keep it: ``gain``, and ``low`` and ``high`` of its 95 % interval."""
    return dict(zip(("gain", "low", "high"), paired_difference(success, base), strict=True))


def _hybrid(
    rate: float, ends: tuple[float, float], base_rate: float, base_ends: tuple[float, float], correlation: float
) -> tuple[float, float, float]:
    def reach(ours: float, theirs: float) -> float:
        return math.sqrt(max(0.0, ours**2 - 2 * correlation * ours * theirs + theirs**2))

    gain = rate - base_rate
    down = reach(rate - ends[0], base_ends[1] - base_rate)
    up = reach(ends[1] - rate, base_rate - base_ends[0])
    return gain, max(-1.0, gain - down), min(1.0, gain + up)


def psnr(frame: jax.Array, reference: jax.Array, span: float = 2.0) -> jax.Array:
    """Peak signal to noise ratio in dB of (..., H, W, C) frames, one value for each frame.

    ``span`` is the range of the pixels, 2 for [-1, 1]. Equal frames give 100 dB, not infinity.
    """
    error = jnp.mean(jnp.square(frame - reference), axis=(-3, -2, -1))
    return 10.0 * jnp.log10(span**2 / jnp.maximum(error, span**2 * 1e-10))


def ssim(frame: jax.Array, reference: jax.Array, span: float = 2.0) -> jax.Array:
    """Structural similarity of (..., H, W, C) frames, one value for each frame.

    Wang et al. 2004: Gaussian window of 11 x 11 pixels and sigma 1.5, K1 0.01, K2 0.03, mean
    over full windows and channels. Frames need at least 11 pixels on each side.
    """
    if min(frame.shape[-3:-1]) < 11:
        raise ValueError(f"SSIM needs frames of at least 11 x 11 pixels, got {frame.shape[-3:-1]}.")
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    mean_a, mean_b = _blur(frame), _blur(reference)
    # Mean of the product minus product of the means cancels: shift the pixels to the frame's mean first.
    offset = jnp.mean(reference, axis=(-3, -2), keepdims=True)
    a, b = frame - offset, reference - offset
    var_a = _blur(a * a) - jnp.square(mean_a - offset)
    var_b = _blur(b * b) - jnp.square(mean_b - offset)
    covariance = _blur(a * b) - (mean_a - offset) * (mean_b - offset)
    # The formula is for pixels that begin at 0.
    mean_a, mean_b = mean_a + span / 2, mean_b + span / 2
    light = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return jnp.mean(light * (2 * covariance + c2) / (var_a + var_b + c2), axis=(-3, -2, -1))


def _blur(frame: jax.Array) -> jax.Array:
    """Gaussian mean over each full 11 x 11 window, as two banded matrix products."""
    rows, columns = _band(frame.shape[-3]), _band(frame.shape[-2])
    return jnp.einsum("ph,...hwc,qw->...pqc", rows, frame, columns, precision="highest")


def _band(size: int) -> jax.Array:
    weight = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    weight /= weight.sum()
    return jnp.asarray(sum(np.eye(size - 10, size, k) * weight[k] for k in range(11)), jnp.float32)
