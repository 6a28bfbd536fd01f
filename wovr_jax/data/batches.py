"""Training sets from episodes: world-model windows, imitation chunks, reward frames.

The host builds index arrays once; frames stay uint8 and lie once on the device; batches are
drawn and gathered inside the jitted train step from a key, so no step waits for the host. The
sets are pytrees: ``jax.device_put`` them once and hand them to the step as an argument (a
constant closed over would be compiled in, and compiled again for the next round's data).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from wovr_jax.core.pixels import to_float
from wovr_jax.data.records import Head
from wovr_jax.types import ACTION_DIM, NULL_ACTION, Array, Episode

Column = Array | np.ndarray
"""Built on the host; used on the device."""


class NoDataError(ValueError):
    """A training set that would be empty or one-sided; the message says what is missing."""


def split(
    episodes: Sequence[Episode | Head], val_share: float, flags: Sequence[bool] | np.ndarray | None = None
) -> np.ndarray:
    """Which episodes validate: (E,) bool, stable under growth of the data.

    An episode's side depends only on its task and seed, so a start layout stays on its side
    when a later collection is added. Shares are approximate; but where there are two
    episodes (of each kind, with ``flags``) neither side is empty.

    Args:
      episodes: the episodes.
      val_share: expected share in [0, 1).
      flags: optionally a kind of each episode, say success, to be present on both sides.
    """
    if not 0.0 <= val_share < 1.0:
        raise ValueError(f"val_share must be in [0, 1), got {val_share}.")
    place_E = np.array([_place(episode) for episode in episodes])
    val_E = place_E < val_share
    kinds = np.zeros(len(episodes), int) if flags is None else np.asarray(flags, int)
    for kind in np.unique(kinds):
        member = np.flatnonzero(kinds == kind)
        if len(member) == 1:
            val_E[member] = False  # the only one is for training
        elif val_share:
            order = member[np.argsort(place_E[member], kind="stable")]
            if not val_E[member].any():
                val_E[order[0]] = True
            if val_E[member].all():
                val_E[order[-1]] = False
    return val_E


def _place(episode: Episode | Head) -> float:
    """A number in [0, 1) that is uniform over start layouts."""
    digest = hashlib.sha256(f"{episode.task}/{episode.seed}".encode()).digest()
    return int.from_bytes(digest[:8], "little") / 2**64


def _stack(arrays: Sequence[np.ndarray], fill: np.ndarray | None = None) -> np.ndarray:
    """Arrays of unequal length as one, padded at the end with ``fill`` or with their last row."""
    longest = max(map(len, arrays))
    rows = [
        np.concatenate(
            [array, np.broadcast_to(array[-1] if fill is None else fill, (longest - len(array), *array.shape[1:]))]
        )
        for array in arrays
    ]
    return np.stack(rows)


# --- world-model windows -------------------------------------------------------------------


@struct.dataclass
class Windows:
    """Episodes on the device and the windows that may be cut from them.

    A window is (episode, start): frame 0 as the anchor, then ``memory + new`` consecutive frames
    from ``start``. Frames before the episode are frame 0 with the null action, so ``start = 1 -
    memory`` is the window of the first chunk: the anchor, ``memory`` copies of frame 0, ``new`` frames.

    Attributes:
      frame_ESHWC: (E, S + 1, H, W, 3) uint8; short episodes repeat their last frame.
      action_ESA: (E, S, A) float32; short episodes end in null actions.
      task_E: (E,) int32.
      train_I2, val_I2: (I, 2) int32 rows (episode, start). The first ``train_starts`` (``val_starts``)
        rows are the episode-start windows, one an episode.
    """

    frame_ESHWC: Column
    action_ESA: Column
    task_E: Column
    train_I2: Column
    val_I2: Column
    train_starts: int = struct.field(pytree_node=False)
    val_starts: int = struct.field(pytree_node=False)
    memory: int = struct.field(pytree_node=False, default=4)
    new: int = struct.field(pytree_node=False, default=8)


def windows(
    episodes: Sequence[Episode],
    *,
    memory: int = 4,
    new: int = 8,
    start_cap: int | None = None,
    stride: int = 1,
    partial: bool = False,
    val_share: float = 0.1,
) -> Windows:
    """All world-model windows of ``episodes`` (DiffSynth fork: trainers/utils.py, RLinfNpyDataset).

    Args:
      episodes: of any lengths; one shorter than ``new`` steps gives no window.
      memory: frames of memory.
      new: frames to generate.
      start_cap: windows begin below this frame. The reference uses 250 for episodes of more
        than 256 frames; None allows every window.
      stride: steps between the starts of an episode's windows.
      partial: also windows whose memory reaches one or more frames before the episode, which
        keyframes in the first ``memory - 1`` steps lead to.
      val_share: share of episodes held out.

    Raises:
      NoDataError: when no episode is long enough.
    """
    val_E = split(episodes, val_share) if episodes else np.zeros(0, bool)
    how = (memory, new, start_cap, stride, partial)
    rows = {side: _window_rows(episodes, val_E == side, *how) for side in (False, True)}
    if not len(rows[False][0]):
        longest = max((len(episode.action_SA) for episode in episodes), default=0)
        raise NoDataError(
            f"no world-model window: a window needs {new} steps, the longest of {len(episodes)} episodes has {longest}."
        )
    return Windows(
        frame_ESHWC=_stack([episode.frame_SHWC for episode in episodes]),
        action_ESA=_stack([episode.action_SA for episode in episodes], np.asarray(NULL_ACTION, np.float32)),
        task_E=np.array([episode.task for episode in episodes], np.int32),
        train_I2=rows[False][0],
        train_starts=rows[False][1],
        val_I2=rows[True][0],
        val_starts=rows[True][1],
        memory=memory,
        new=new,
    )


def _window_rows(
    episodes: Sequence[Episode],
    keep_E: np.ndarray,
    memory: int,
    new: int,
    start_cap: int | None,
    stride: int,
    partial: bool,
) -> tuple[np.ndarray, int]:
    """Rows (episode, start) of the episodes in ``keep_E``, episode starts first, and how many those are."""
    lengths = [(e, len(episode.action_SA)) for e, episode in enumerate(episodes) if keep_E[e]]
    begin = [(e, 1 - memory) for e, steps in lengths if steps >= new]
    later = []
    for e, steps in lengths:
        later += [(e, start) for start in later_starts(steps, memory, new, start_cap, stride, partial)]
    return np.array(begin + later, np.int32).reshape(-1, 2), len(begin)


def later_starts(steps: int, memory: int, new: int, start_cap: int | None, stride: int, partial: bool) -> range:
    """Starts of an episode's windows but for its first one; see :func:`windows`."""
    # Frames are 0 ... steps, and the last of the window is start + memory + new - 1.
    end = steps + 1 - (memory + new) + 1
    return range(2 - memory if partial else 0, end if start_cap is None else min(end, start_cap), stride)


def sample_rows(key: Array, batch: int, starts: int, rows: int, start_share: float = 0.05) -> Array:
    """(batch,) int32 rows of a window index: an episode start with probability ``start_share``, else any other.

    ``starts`` and ``rows`` are static: ``windows.train_starts`` and ``len(windows.train_I2)``.
    """
    k_kind, k_start, k_other = jax.random.split(key, 3)
    if starts == rows:
        return jax.random.randint(k_start, (batch,), 0, rows)
    start_B = jax.random.randint(k_start, (batch,), 0, max(starts, 1))
    other_B = jax.random.randint(k_other, (batch,), starts, rows)
    is_start_B = jax.random.bernoulli(k_kind, start_share if starts else 0.0, (batch,))
    return jnp.where(is_start_B, start_B, other_B)


def gather_windows(data: Windows, row_B2: Array) -> tuple[Array, Array]:
    """The windows of (episode, start) rows.

    Returns:
      frame_BFHWC float32 in [-1, 1] and action_BFA float32, F = 1 + memory + new; action slot i
      holds the action that produced frame i, the null action where none did.
    """
    episode_B1, start_B = row_B2[:, :1], row_B2[:, 1]
    step_BF = start_B[:, None] + jnp.arange(data.memory + data.new)
    step_BF = jnp.concatenate([jnp.zeros_like(step_BF[:, :1]), step_BF], axis=1)
    frame_BFHWC = to_float(jnp.asarray(data.frame_ESHWC)[episode_B1, jnp.maximum(step_BF, 0)])
    action_BFA = jnp.asarray(data.action_ESA)[episode_B1, jnp.maximum(step_BF - 1, 0)]
    return frame_BFHWC, jnp.where((step_BF > 0)[..., None], action_BFA, jnp.asarray(NULL_ACTION))


# --- imitation -----------------------------------------------------------------------------


def sft_chunks(
    episodes: Sequence[Episode],
    chunk: int = 8,
    *,
    stride: int = 1,
    random_offset: bool = False,
    early: int = 1,
    seed: int = 0,
    prompt_KL: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Samples for imitation: a frame and the ``chunk`` labels from it on.

    Labels beyond the end of an episode are no motion with the last gripper command.

    Args:
      episodes: demonstrations.
      chunk: T.
      stride: steps between samples of an episode; 1 takes every step, ``chunk`` the chunk boundaries.
      random_offset: shift each episode's samples by a random number of steps below ``stride``;
        step 0, where every rollout begins, is taken all the same.
      early: how often samples of the first half chunk are repeated. Every rollout begins there, before
        the robot's own motion gives the goal away, so they are the ones worth learning from.
      seed: of the offsets.
      prompt_KL: (tasks, L) int32 prompt tokens; adds ``prompt_BL``.

    Returns:
      frame_BHWC uint8, label_BTA float32, task_B, episode_B, step_B int32.

    Raises:
      NoDataError: when there are no episodes.
    """
    if not episodes:
        raise NoDataError("no episodes to imitate.")
    rng = np.random.default_rng(seed)
    out: dict[str, list[Any]] = {name: [] for name in ("frame_BHWC", "label_BTA", "task_B", "episode_B", "step_B")}
    for e, episode in enumerate(episodes):
        offset = int(rng.integers(stride)) if random_offset else 0
        steps = np.union1d([0], np.arange(offset, len(episode.label_SA), stride)).astype(np.int32)
        steps = np.repeat(steps, np.where(steps < chunk // 2, early, 1))
        out["frame_BHWC"].append(episode.frame_SHWC[steps])
        out["label_BTA"].append(_padded_labels(episode, chunk)[steps[:, None] + np.arange(chunk)])
        out["task_B"].append(np.full(len(steps), episode.task, np.int32))
        out["episode_B"].append(np.full(len(steps), e, np.int32))
        out["step_B"].append(steps)
    found = {name: np.concatenate(parts) for name, parts in out.items()}
    return found if prompt_KL is None else found | {"prompt_BL": np.asarray(prompt_KL)[found["task_B"]]}


def _padded_labels(episode: Episode, chunk: int) -> np.ndarray:
    still = np.zeros((chunk, ACTION_DIM), np.float32)
    still[:, -1] = episode.label_SA[-1, -1]
    return np.concatenate([episode.label_SA, still])


# --- reward frames -------------------------------------------------------------------------


@struct.dataclass
class RewardFrames:
    """Frames for the success classifier, with rows by class on each side of the split.

    Attributes:
      frame_NHWC: (N, H, W, 3) uint8; every frame of every episode.
      task_N: (N,) int32.
      success_N: (N,) bool.
      positive_I, negative_I, hard_I: int32 rows of training frames: success; no success; and
        of the latter the near misses and late frames of failures.
      val_N: (V,) int32 rows of all frames of held-out episodes.
    """

    frame_NHWC: Column
    task_N: Column
    success_N: Column
    positive_I: Column
    negative_I: Column
    hard_I: Column
    val_N: Column


def reward_frames(
    episodes: Sequence[Episode], *, late: float = 1 / 3, near: int = 4, val_share: float = 0.1
) -> RewardFrames:
    """Frames with success labels, hard negatives found, episodes split.

    Args:
      episodes: rollouts, successes and failures.
      late: the last share of a failed episode, whose frames count as hard.
      near: frames just before a success that count as hard.
      val_share: share of episodes held out, of successes and failures alike.

    Raises:
      NoDataError: when no frame is a success, or every frame is: nothing can be learned.
    """
    if not episodes:
        raise NoDataError("no episodes to train the reward on.")
    won_E = np.array([episode.success_S.any() for episode in episodes])
    success_N = np.concatenate([episode.success_S for episode in episodes])
    actors = ", ".join(sorted({episode.actor for episode in episodes}))
    if not success_N.any() or success_N.all():
        lacking = "success" if not success_N.any() else "failure"
        raise NoDataError(
            f"none of the {len(success_N)} frames of {len(episodes)} episodes by {actors} shows a {lacking}: "
            f"the reward classifier needs both. Collect more episodes, or add some of another actor."
        )
    side_E = split(episodes, val_share, won_E)
    val_N = np.concatenate([np.full(len(ep.success_S), val) for ep, val in zip(episodes, side_E, strict=True)])
    hard_N = np.concatenate([_hard(episode.success_S, late, near) for episode in episodes])
    return RewardFrames(
        frame_NHWC=np.concatenate([episode.frame_SHWC for episode in episodes]),
        task_N=np.concatenate([np.full(len(ep.success_S), ep.task, np.int32) for ep in episodes]),
        success_N=success_N,
        positive_I=_rows(success_N & ~val_N),
        negative_I=_rows(~success_N & ~val_N),
        hard_I=_rows(hard_N & ~val_N),
        val_N=_rows(val_N),
    )


def _rows(where: np.ndarray) -> np.ndarray:
    return np.flatnonzero(where).astype(np.int32)


def _hard(success_S: np.ndarray, late: float, near: int) -> np.ndarray:
    """Negatives that look like a success: the frames before one, or the last part of a failure."""
    if not success_S.any():
        return np.arange(len(success_S)) >= round(len(success_S) * (1 - late))
    ahead = np.array([success_S[step + 1 : step + 1 + near].any() for step in range(len(success_S))])
    return ahead & ~success_S


def sample_reward(
    data: RewardFrames, key: Array, batch: int, *, positive: float = 1 / 3, hard: float = 1 / 3
) -> tuple[Array, Array, Array]:
    """A balanced batch drawn on the device.

    Args:
      data: from :func:`reward_frames`.
      key: PRNG key.
      batch: B.
      positive: share of success frames.
      hard: share of hard negatives; the rest is any negative.

    Returns:
      frame_BHWC float32 in [-1, 1], task_B int32, label_B float32 in {0, 1}.
    """
    positives = round(batch * positive)
    hards = round(batch * hard) if len(data.hard_I) else 0
    counts = (positives, hards, batch - positives - hards)
    pools = (data.positive_I, data.hard_I, data.negative_I)
    keys = jax.random.split(key, 3)
    picks = [
        jnp.asarray(p)[jax.random.randint(k, (n,), 0, max(len(p), 1))]
        for k, n, p in zip(keys, counts, pools, strict=True)
        if n
    ]
    row_B = jnp.concatenate(picks)
    frame_BHWC = to_float(jnp.asarray(data.frame_NHWC)[row_B])
    return frame_BHWC, jnp.asarray(data.task_N)[row_B], jnp.asarray(data.success_N)[row_B].astype(jnp.float32)
