"""Success rates with their intervals, and what a watched training was paid for.

How good is the policy? Roll it in the true simulator, on start states that training never saw, with the sampler that
acted in training. Imagination is held against the truth by ``audit``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax.core import stats
from wovr_jax.types import Array, Imagined

KINDS = ("", "_keyframe")
WATCHED = tuple(f"{name}{kind}" for kind in KINDS for name in ("true_success", "false_success", "precision"))
"""Of the rollouts of an iteration, and of those from keyframes alone: true success, the share of true failures that are
paid as successes, and the share of paid successes that are true."""


def summarize_outcomes(success_B: np.ndarray | Sequence[bool]) -> dict[str, Any]:
    """Returns n, successes, rate and the ends low and high of its 95 % Wilson interval, ready for JSON.

    Raises:
      ValueError: for no episodes at all.
    """
    success_B = np.asarray(success_B, bool)
    chex.assert_rank(success_B, 1)
    if success_B.size == 0:
        raise ValueError("a success rate needs at least one episode, got none; raise evaluate.episodes")
    successes = int(success_B.sum())
    # Hundreds of episodes leave an interval of several points: a rate without it says too much.
    low, high = stats.wilson(successes, success_B.size)
    rate = float(success_B.mean())
    return {"n": int(success_B.size), "successes": successes, "rate": rate, "low": low, "high": high}


@jax.jit
def watch_rewards(imagined: Imagined) -> dict[str, Array]:
    """Returns the shares ``WATCHED`` of a batch of rollouts that knows the truth; NaN where a share has no cases."""
    assert imagined.truth_BNT is not None
    live_BNT = True if imagined.live_BNT is None else imagined.live_BNT
    paid_B, true_B = (jnp.any(flag & live_BNT, axis=(1, 2)) for flag in (imagined.success_BNT, imagined.truth_BNT))
    keyframe_B = jnp.zeros_like(true_B) if imagined.keyframe_B is None else imagined.keyframe_B

    def share(flag_B: Array, among_B: Array) -> Array:
        return jnp.sum(flag_B & among_B) / jnp.sum(among_B)

    return {
        f"{name}{kind}": value
        for kind, rows_B in zip(KINDS, (jnp.ones_like(true_B), keyframe_B), strict=True)
        for name, value in {
            "true_success": share(true_B, rows_B),
            "false_success": share(paid_B, rows_B & ~true_B),
            "precision": share(true_B, rows_B & paid_B),
        }.items()
    }
