"""Verdicts on the same actions: what imagination says of them, and what is true.

Imagination is the test and truth is what it is tested for. Here are the parts that every such question shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import chex
import jax
import numpy as np

from wovr_jax.core import sharding
from wovr_jax.types import Array, Imagined


def find_successes(rollout: Imagined) -> np.ndarray:
    """Returns (B,) bool, whether the world itself saw success in any frame (LIBERO's ``success_once``)."""
    return np.any(np.asarray(read_verdict(rollout)), axis=(1, 2))


def read_verdict(rollout: Imagined) -> Array:
    """Returns (B, N, T), whether the world that a rollout happened in saw success in each frame."""
    # A classifier may have judged a rollout of the true simulator; what the simulator knows comes before that.
    return rollout.success_BNT if rollout.truth_BNT is None else rollout.truth_BNT


def count_verdicts(imagined_B: np.ndarray, true_B: np.ndarray) -> dict[str, Any]:
    """Counts imagined against true success: tp, fp, fn and tn, with tpr and fpr (None where nothing can be counted)."""
    imagined_B, true_B = np.asarray(imagined_B, bool), np.asarray(true_B, bool)
    chex.assert_equal_shape([imagined_B, true_B])
    # Imagination is the test and truth what it is tested for.
    tp, fp = int((imagined_B & true_B).sum()), int((imagined_B & ~true_B).sum())
    fn, tn = int((~imagined_B & true_B).sum()), int((~imagined_B & ~true_B).sum())
    return {
        "tp": tp,
        "fp": fp,
        "fn": fn,
        "tn": tn,
        "tpr": tp / (tp + fn) if tp + fn else None,
        "fpr": fp / (fp + tn) if fp + tn else None,
    }


def join(parts: Sequence[Imagined], count: int | None = None) -> Imagined:
    """Joins rollouts of equal shape one after another on the host and keeps the first ``count`` rows."""
    # On the host, because all rollouts with their videos would not fit beside the networks.
    host = [sharding.host(part) for part in parts]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *host)
