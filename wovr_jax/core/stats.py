"""Masked means, intervals of success rates, and how far pictures are apart.

The masked functions run inside compiled programs. The intervals are for the host: outcomes go in as numbers of Python
or numpy, and what comes out can be written as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Outcomes = Sequence[bool] | np.ndarray

# ---------------------------------------------------------------- masked means


def masked_mean(x: Array, where: Array, axis: Any = None, keepdims: bool = False) -> Array:
    """Returns the mean over ``axis`` of the values at which ``where`` holds; 0 where it holds nowhere."""
    count = jnp.sum(jnp.broadcast_to(where, x.shape), axis, dtype=x.dtype, keepdims=keepdims)
    # Not x * where: a NaN among the values left out would come through the product, and into the gradient too.
    return jnp.sum(x, axis, keepdims=keepdims, where=where) / jnp.maximum(count, 1)


# ---------------------------------------------------------------- success rates


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Returns Wilson's 95 % score interval (low, high) of a success rate; (0, 1) for no trials.

    Unlike the interval of the normal distribution it never leaves [0, 1] and never shrinks to a point at 0 or n of n
    (Newcombe, Statistics in Medicine 17:857, 1998, method 3).

    Raises:
      ValueError: unless 0 <= ``successes`` <= ``n``.
    """
    if n == 0:
        return 0.0, 1.0
    import scipy.stats  # here, since it takes 0.4 s and few programs give intervals

    low, high = scipy.stats.binomtest(successes, n).proportion_ci(method="wilson")
    return float(low), float(high)


def paired_difference(success: Outcomes, base: Outcomes, *, paired: bool = True) -> tuple[float, float, float]:
    """Returns the gain in success rate over a base that ran from the same start states: (gain, low, high).

    Newcombe's hybrid score interval for paired proportions (Statistics in Medicine 17:2635, 1998, method 10). It joins
    Wilson's intervals of the two rates; the correlation of the outcomes narrows what comes of that, for layouts that
    are hard for one policy are mostly hard for the other.

    Args:
      success, base: outcomes; ``success[i]`` and ``base[i]`` are of the same start.
      paired: without, they are not, and the interval is that of two independent rates (method 10 of Newcombe's other
        paper, Statistics in Medicine 17:873, 1998).

    Raises:
      ValueError: for lists of unequal length.
    """
    won, base_won = np.asarray(success, bool), np.asarray(base, bool)
    if won.shape != base_won.shape or won.ndim != 1:
        raise ValueError(f"expected two equal lists of outcomes, got shapes {won.shape} and {base_won.shape}.")
    n = len(won)
    if n == 0:
        return 0.0, -1.0, 1.0
    both, neither = int((won & base_won).sum()), int((~won & ~base_won).sum())
    gained, lost = int((won & ~base_won).sum()), int((~won & base_won).sum())

    # The correlation of two binary outcomes (phi), from the table of the four counts.
    margins = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    excess = both * neither - gained * lost
    # Newcombe's continuity correction, applied to a positive correlation only.
    excess = max(excess - n / 2, 0.0) if excess > 0 else excess
    correlation = excess / math.sqrt(margins) if margins and paired else 0.0

    rate, base_rate = (both + gained) / n, (both + lost) / n
    low, high = wilson(both + gained, n)
    base_low, base_high = wilson(both + lost, n)

    def reach(ours: float, theirs: float) -> float:
        # The half width of a difference whose two parts have the half widths ``ours`` and ``theirs``.
        return math.sqrt(max(0.0, ours**2 - 2 * correlation * ours * theirs + theirs**2))

    # The gain is least where our rate is low and the base's is high, and largest the other way round.
    difference = rate - base_rate
    down, up = reach(rate - low, base_high - base_rate), reach(high - rate, base_rate - base_low)
    return difference, max(-1.0, difference - down), min(1.0, difference + up)


def gain(success: Outcomes, base: Outcomes, *, paired: bool = True) -> dict[str, float]:
    """Returns ``paired_difference`` as results keep it: ``gain``, and ``low`` and ``high`` of its 95 % interval."""
    return dict(zip(("gain", "low", "high"), paired_difference(success, base, paired=paired), strict=True))


# ---------------------------------------------------------------- pictures


def psnr(mean_square: Any) -> Any:
    """Returns the peak signal to noise ratio in dB of pictures in [-1, 1], from their mean squared difference.

    Args:
      mean_square: mean of the squared differences, of numpy or jax; over which pixels is the caller's choice, and what
        the ratio is of. Below 1e-10, so for equal pictures, the ratio is 106 dB and not infinity.
    """
    xp = jnp if isinstance(mean_square, jax.Array) else np
    # The span of the pixels is 2, its square 4.
    return 10.0 * xp.log10(4.0 / xp.maximum(mean_square, 1e-10))
