"""Success rates with their intervals, and imagination held against the truth.

Two questions, kept apart. How good is the policy? Roll it in the true simulator, on start
states that training never saw, with the sampler that acted in training. How honest is the
world model? Play the same actions from the same start states in both worlds and count where
the verdicts differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax.core import sharding, stats
from wovr_jax.types import NULL_ACTION, Array, Imagined


def succeeded(rollout: Imagined) -> np.ndarray:
    """(B,) bool: the world's own verdict, success in any frame (LIBERO's ``success_once``)."""
    return np.any(np.asarray(_verdict(rollout)), axis=(1, 2))


def _verdict(rollout: Imagined) -> Array:
    return rollout.success_BNT if rollout.truth_BNT is None else rollout.truth_BNT


def rate(success_B: np.ndarray | Sequence[bool]) -> dict[str, Any]:
    """n, successes, rate and the 95 % Wilson interval, JSON-able.

    Raises:
      ValueError: for no episodes at all.
    """
    success_B = np.asarray(success_B, bool)
    if success_B.size == 0:
        raise ValueError("a success rate needs at least one episode, got none; raise evaluate.episodes")
    low, high = stats.wilson(int(success_B.sum()), success_B.size)
    return {
        "n": int(success_B.size),
        "successes": int(success_B.sum()),
        "rate": float(success_B.mean()),
        "low": low,
        "high": high,
    }


def verdicts(imagined_B: np.ndarray, true_B: np.ndarray) -> dict[str, Any]:
    """The four counts of imagined against true success, with TPR and FPR (None when undefined)."""
    imagined_B, true_B = np.asarray(imagined_B, bool), np.asarray(true_B, bool)
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


def fidelity(imagined: Imagined, true: Imagined) -> list[float]:
    """Mean PSNR (dB) of each chunk between two rollouts of the same actions, both with video.

    Raises:
      ValueError: when either rollout has no video.
    """
    if imagined.video_BNTHWC is None or true.video_BNTHWC is None:
        raise ValueError("fidelity compares frames: make both rollouts with video=True")
    error_N = jnp.mean((imagined.video_BNTHWC - true.video_BNTHWC) ** 2, axis=(2, 3, 4, 5)).mean(0)
    return [float(10.0 * np.log10(4.0 / max(float(error), 1e-10))) for error in error_N]


def loosened(rollout: Imagined) -> dict[str, Array]:
    """The actions of a rollout (B, N, T, A) with other fingers, and the arm as it was.

    ``open_fingers`` never close; ``dropped`` let go for good half way between their first closing and the first
    success, or the end. Where a task needs a grasp nothing comes of either: a world model that sees successes there
    has learned from the arm what it should see in the fingers, and a policy would learn from it not to care about them.
    """
    action_BNTA = jnp.asarray(rollout.action_BNTA)
    batch, steps = len(action_BNTA), action_BNTA.shape[1] * action_BNTA.shape[2]

    def first(event_BNT: Array) -> Array:
        event_BS = event_BNT.reshape(batch, steps)
        return jnp.where(event_BS.any(axis=1), event_BS.argmax(axis=1), steps)

    closes_B, ends_B = first(action_BNTA[..., -1] > 0), first(jnp.asarray(_verdict(rollout)))
    step_NT = jnp.arange(steps).reshape(action_BNTA.shape[1:3])
    after_BNT = step_NT >= ((closes_B + ends_B) // 2)[:, None, None]
    wrist_BNTA, gripper_BNT = action_BNTA[..., :-1], action_BNTA[..., -1]

    def gripped(command_BNT: Array) -> Array:
        return jnp.concatenate([wrist_BNTA, command_BNT[..., None]], axis=-1)

    return {
        "open_fingers": gripped(jnp.full_like(gripper_BNT, NULL_ACTION[-1])),
        "dropped": gripped(jnp.where(after_BNT, NULL_ACTION[-1], gripper_BNT)),
    }


def compared(true: Imagined, imagined: Imagined, loose: Mapping[str, np.ndarray], threshold: float) -> dict[str, Any]:
    """What imagination said of true rollouts whose actions it played, against what happened; both with video.

    Args:
      true, imagined: the two sides.
      loose: of each way of ``loosened``, the probabilities (B, N, T) that imagination gave.
      threshold: of a success.
    """
    every = (imagined.prob_BNT, *loose.values())
    imagined_B, *loose_B = (np.any(np.asarray(prob_BNT) > threshold, axis=(1, 2)) for prob_BNT in every)
    return {
        "verdicts": verdicts(imagined_B, succeeded(true)),
        "imagined_success": float(imagined_B.mean()),
        "imagined_outcomes": imagined_B.astype(int).tolist(),
        **{how: float(won_B.mean()) for how, won_B in zip(loose, loose_B, strict=True)},
        "psnr": fidelity(imagined, true),
    }


def film(rollout: Imagined, row: int) -> np.ndarray:
    """All frames (S + 1, H, W, C) of one rollout with video, the first one included."""
    assert rollout.video_BNTHWC is not None
    video_SHWC = rollout.video_BNTHWC[row].reshape(-1, *rollout.video_BNTHWC.shape[3:])
    return np.concatenate([rollout.frame_BNHWC[row, :1], video_SHWC])


def join(parts: Sequence[Imagined], count: int | None = None) -> Imagined:
    """Rollouts of equal shape one after another on the host, cut to the first ``count`` rows."""
    host = [sharding.host(part) for part in parts]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *host)


def side_by_side(true_SHWC: Array | np.ndarray, imagined_SHWC: Array | np.ndarray) -> np.ndarray:
    """uint8 frames (S, H, 2W + gap, C): the truth on the left, imagination on the right."""
    left, right = (
        np.clip(np.round((np.asarray(x) + 1) * 127.5), 0, 255).astype(np.uint8) for x in (true_SHWC, imagined_SHWC)
    )
    gap = np.full((*left.shape[:2], max(1, left.shape[2] // 16), 3), 255, np.uint8)
    return np.concatenate([left, gap, right], axis=2)
