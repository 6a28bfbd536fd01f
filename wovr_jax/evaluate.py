"""Success rates with their intervals, and imagination held against the truth.

Three questions, kept apart. How good is the policy? Roll it in the true simulator, on start
states that training never saw, with the sampler that acted in training. What does the world
model make of actions that were chosen in truth? Replay them in it and count where the verdicts
differ. And what is the learner paid for? Follow in truth the actions that a policy chose in
imagination: only this closed loop sees a policy that exploits its world.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax.core import pixels, sharding, stats
from wovr_jax.types import NULL_ACTION, Array, Imagined

KINDS = ("", "_keyframe")
WATCHED = tuple(f"{name}{kind}" for kind in KINDS for name in ("true_success", "false_success", "precision"))
"""Of the rollouts of an iteration, and of those from keyframes alone: true success, the share of true failures that are
paid as successes, and the share of paid successes that are true."""


def find_successes(rollout: Imagined) -> np.ndarray:
    """Returns (B,) bool, whether the world itself saw success in any frame (LIBERO's ``success_once``)."""
    return np.any(np.asarray(_own_verdict(rollout)), axis=(1, 2))


def _own_verdict(rollout: Imagined) -> Array:
    # A classifier may have judged a rollout of the true simulator; what the simulator knows comes before that.
    return rollout.success_BNT if rollout.truth_BNT is None else rollout.truth_BNT


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


def summarize_closed_loop(imagined_K: np.ndarray, true_K: np.ndarray, keyframe_K: np.ndarray) -> dict[str, Any]:
    """Returns what rollouts chosen in imagination were paid for, ready for JSON: all of them, and by kind of start.

    Args:
      imagined_K, true_K: success of the same actions in either world.
      keyframe_K: whether a rollout began at a keyframe.

    Returns:
      ``all``, ``episode_start`` and ``keyframe``, None where there is no such rollout: the four counts, and rates with
      intervals (see :func:`summarize_outcomes`) of ``imagined`` and ``true`` success, of ``false_success``, the share
      of true failures that are paid as successes, and of ``precision``, the share of paid successes that are true;
      these two are None where no rollout fails, or none is paid.
    """
    imagined_K, true_K = np.asarray(imagined_K, bool), np.asarray(true_K, bool)

    def summarize(rows_K: np.ndarray) -> dict[str, Any]:
        imagined, true = imagined_K[rows_K], true_K[rows_K]
        counts = count_verdicts(imagined, true)
        shares = {
            "imagined": imagined,
            "true": true,
            "false_success": imagined[~true],
            "precision": true[imagined],
        }
        rates = {name: summarize_outcomes(outcomes) if outcomes.size else None for name, outcomes in shares.items()}
        return {count: counts[count] for count in ("tp", "fp", "fn", "tn")} | rates

    kinds = {"all": np.ones_like(keyframe_K), "episode_start": ~keyframe_K, "keyframe": keyframe_K}
    return {kind: summarize(rows_K) if rows_K.any() else None for kind, rows_K in kinds.items()}


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


def measure_fidelity(imagined: Imagined, true: Imagined) -> list[float]:
    """Returns the PSNR (dB) of each chunk between two rollouts of the same actions, both with video.

    The mean is taken over the squared differences of all rollouts and only then turned into dB: so a rollout that went
    astray counts in full, which a mean of ratios would hide.

    Raises:
      ValueError: when either rollout has no video.
    """
    if imagined.video_BNTHWC is None or true.video_BNTHWC is None:
        raise ValueError("fidelity compares frames: make both rollouts with video=True")
    chex.assert_rank(true.video_BNTHWC, 6)
    chex.assert_equal_shape([imagined.video_BNTHWC, true.video_BNTHWC])
    # (B, N, T, H, W, C) -> (B, N) -> (N,)
    error_N = jnp.mean((imagined.video_BNTHWC - true.video_BNTHWC) ** 2, axis=(2, 3, 4, 5)).mean(0)
    return [float(stats.psnr(float(error))) for error in error_N]


def loosen_gripper(rollout: Imagined) -> dict[str, Array]:
    """Returns the actions of a rollout (B, N, T, A) with other fingers, and the arm as it was.

    ``open_fingers`` never close; ``dropped`` let go for good half way between their first closing and the first
    success, or the end. Where a task needs a grasp nothing comes of either: a world model that sees successes there
    has learned from the arm what it should see in the fingers, and a policy would learn from it not to care about them.
    """
    action_BNTA = jnp.asarray(rollout.action_BNTA)
    chex.assert_rank(action_BNTA, 4)
    batch, steps = len(action_BNTA), action_BNTA.shape[1] * action_BNTA.shape[2]

    def first_step(event_BNT: Array) -> Array:
        # (B, N, T) -> (B, S); an event that never comes is put behind the last step.
        event_BS = event_BNT.reshape(batch, steps)
        return jnp.where(event_BS.any(axis=1), event_BS.argmax(axis=1), steps)

    # The gripper closes at commands above 0; see the conventions in types.py.
    closes_B, ends_B = first_step(action_BNTA[..., -1] > 0), first_step(jnp.asarray(_own_verdict(rollout)))
    step_NT = jnp.arange(steps).reshape(action_BNTA.shape[1:3])
    # Half way: the hand has the thing by then and has not put it down yet.
    after_BNT = step_NT >= ((closes_B + ends_B) // 2)[:, None, None]
    arm_BNTA, gripper_BNT = action_BNTA[..., :-1], action_BNTA[..., -1]

    def with_gripper(command_BNT: Array) -> Array:
        return jnp.concatenate([arm_BNTA, command_BNT[..., None]], axis=-1)

    return {
        "open_fingers": with_gripper(jnp.full_like(gripper_BNT, NULL_ACTION[-1])),
        "dropped": with_gripper(jnp.where(after_BNT, NULL_ACTION[-1], gripper_BNT)),
    }


def compare_verdicts(
    true: Imagined, imagined: Imagined, loose: Mapping[str, np.ndarray], threshold: float
) -> dict[str, Any]:
    """Returns what imagination said of true rollouts whose actions it played, against what happened.

    Args:
      true, imagined: the two sides, both with video.
      loose: for each entry of :func:`loosen_gripper` the probabilities (B, N, T) that imagination gave.
      threshold: the probability above which a frame counts as success; one such frame makes its episode one.
    """
    every = (imagined.prob_BNT, *loose.values())
    chex.assert_rank(every, 3)
    chex.assert_equal_shape(every)
    # One frame above the threshold is enough, as one success is in the true world.
    imagined_B, *loose_B = (np.any(np.asarray(prob_BNT) > threshold, axis=(1, 2)) for prob_BNT in every)
    return {
        "verdicts": count_verdicts(imagined_B, find_successes(true)),
        "imagined_success": float(imagined_B.mean()),
        "imagined_outcomes": imagined_B.astype(int).tolist(),
        **{how: float(won_B.mean()) for how, won_B in zip(loose, loose_B, strict=True)},
        "psnr": measure_fidelity(imagined, true),
    }


def join(parts: Sequence[Imagined], count: int | None = None) -> Imagined:
    """Joins rollouts of equal shape one after another on the host and keeps the first ``count`` rows."""
    # On the host, because all rollouts with their videos would not fit beside the networks.
    host = [sharding.host(part) for part in parts]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *host)


def draw_film(true: Imagined, imagined: Imagined, row: int) -> np.ndarray:
    """Returns uint8 frames (S + 1, H, 2 W + gap, C) of one row: the truth on the left, imagination on the right.

    Raises:
      ValueError: when either rollout has no video.
    """
    halves = []
    for rollout in (true, imagined):
        if rollout.video_BNTHWC is None:
            raise ValueError("a film needs frames: make both rollouts with video=True")
        # (N, T, H, W, C) -> (S, H, W, C), after the frame from which the rollout began.
        video_SHWC = rollout.video_BNTHWC[row].reshape(-1, *rollout.video_BNTHWC.shape[3:])
        halves.append(pixels.to_uint8(np.concatenate([rollout.frame_BNHWC[row, :1], video_SHWC])))
    return pixels.side_by_side(*halves)
