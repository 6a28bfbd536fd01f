"""Batches from episodes: windows for the world model, chunks for imitation, and who is held out of both.

The host builds index arrays once; frames stay uint8 and lie once on the device; batches are
drawn and gathered inside the jitted train step from a key, so no step waits for the host. The
sets are pytrees: ``jax.device_put`` them once and hand them to the step as an argument (a
constant closed over would be compiled in, and compiled again for the next round's data).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from wovr_jax.core.pixels import to_float
from wovr_jax.data.records import Head
from wovr_jax.types import ACTION_DIM, NULL_ACTION, Array, Episode

Column = Array | np.ndarray
"""One array of a set, built on the host and used on the device."""


class NoDataError(ValueError):
    """A training set that would be empty or one-sided; the message says what is missing."""


HELD_OUT = 0.15
"""Share of the episodes that VAE, world model and success classifier all hold out: one that judges trained none."""
SHIFTS = 2
"""How often a window that is moved comes, each time moved by another draw."""


def split(episodes: Sequence[Episode | Head], val_share: float = HELD_OUT) -> np.ndarray:
    """Returns (E,) bool, which episodes are held out: the same ones in whatever stage and round, whoever else is there.

    An episode's side depends on its task and seed, and where that would leave a side empty, on the others of its
    collection, all of which have to be among the episodes. A collection is what one actor did. Shares are approximate;
    but of several successes (failures) in a collection some are on each side, and of several episodes one is held out.

    Args:
      episodes: whole collections.
      val_share: expected share in [0, 1).

    Raises:
      ValueError: for a share outside [0, 1).
    """
    if not 0.0 <= val_share < 1.0:
        raise ValueError(f"val_share must be in [0, 1), got {val_share}.")
    val_E = np.zeros(len(episodes), bool)
    if not val_share:
        return val_E
    place_E = np.array([_place(episode) for episode in episodes])
    won_E = np.array([one.won if isinstance(one, Head) else one.success_S.any() for one in episodes], bool)
    actor_E = np.array([episode.actor for episode in episodes])
    for actor in np.unique(actor_E):
        acted_E = actor_E == actor
        for won in (False, True):
            # In the order of a number of each episode's own; the first of several always, the last never.
            order = np.flatnonzero(acted_E & (won_E == won))
            order = order[np.argsort(place_E[order], kind="stable")]
            val_E[order] = place_E[order] < val_share
            val_E[order[:1]] = len(order) > 1
            val_E[order[-1:]] = False
        if acted_E.sum() > 1 and not val_E[acted_E].any():  # one success and one failure
            val_E[np.argmin(np.where(acted_E, place_E, 1.0))] = True
    return val_E


def _place(episode: Episode | Head) -> float:
    """Returns a number in [0, 1) that is uniform over start layouts and the same on every machine."""
    # Not Python's hash, which is another number in every process, nor a generator, which would need an order.
    digest = hashlib.sha256(f"{episode.task}/{episode.seed}".encode()).digest()
    return int.from_bytes(digest[:8], "little") / 2**64


def stack(arrays: Sequence[np.ndarray], fill: np.ndarray | None = None) -> np.ndarray:
    """Stacks arrays of unequal length, padded at the end with ``fill`` or with their last row."""
    # One array for all episodes, because a compiled program indexes one array.
    longest, rows = max(map(len, arrays)), []
    for array in arrays:
        row = array[-1] if fill is None else fill
        rows.append(np.concatenate([array, np.broadcast_to(row, (longest - len(array), *array.shape[1:]))]))
    return np.stack(rows)


# ---------------------------------------------------------------- windows for the world model


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which windows are cut from an episode (DiffSynth fork: trainers/utils.py, RLinfNpyDataset).

    Attributes:
      memory: frames of memory.
      new: frames to generate.
      start_cap: windows begin below this frame. The reference uses 250 for episodes of more
        than 256 frames; None allows every window.
      stride: steps between the starts of an episode's windows.
      partial: also windows whose memory reaches one or more frames before the episode, which
        keyframes in the first ``memory - 1`` steps lead to.
      start_share: share of the windows drawn that begin an episode, see :func:`sample_rows`.
      shift: windows to learn from are moved by up to so many pixels along height and width, as if the camera stood a
        little elsewhere; each comes ``SHIFTS`` times.
    """

    memory: int = 4
    new: int = 8
    start_cap: int | None = None
    stride: int = 1
    partial: bool = False
    start_share: float = 0.05
    shift: int = 0

    @property
    def first(self) -> int:
        """Start of an episode's first window, whose memory is all copies of frame 0, as at the start of a rollout."""
        return 1 - self.memory

    def later(self, steps: int) -> range:
        """Returns the starts of the windows of an episode of ``steps`` steps, but for the first one."""
        # Frames are 0 ... steps, and the last of the window is start + memory + new - 1.
        end = steps + 1 - (self.memory + self.new) + 1
        begin = 2 - self.memory if self.partial else 0
        return range(begin, end if self.start_cap is None else min(end, self.start_cap), self.stride)


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
      train_I2, val_I2: (I, 2) int32 rows (episode, start); with ``Layout.shift`` those to learn from are (I, 4), with
        how far down and right the window looks. The first ``train_starts`` (``val_starts``) rows are the
        episode-start windows.
      seen_ESHWC: the same episodes as a world model imagined them, of the shape of ``frame_ESHWC``. Where there are
        some, the memory of a window shows them, and what follows it is the truth.
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
    seen_ESHWC: Column | None = None


def windows(episodes: Sequence[Episode], layout: Layout = Layout(), *, val_share: float = HELD_OUT) -> Windows:
    """Returns all world-model windows of ``episodes``.

    Args:
      episodes: of any lengths; one shorter than ``layout.new`` steps gives no window.
      layout: of the windows.
      val_share: share of episodes held out.

    Raises:
      NoDataError: when no episode is long enough.
    """
    # By episode and not by window: neighbouring windows share most of their frames.
    val_E = split(episodes, val_share)
    train_I2, train_starts = _window_rows(episodes, ~val_E, layout)
    val_I2, val_starts = _window_rows(episodes, val_E, layout)
    if not len(train_I2):
        longest = max((len(episode.action_SA) for episode in episodes), default=0)
        raise NoDataError(
            f"no world-model window: a window needs {layout.new} steps, the longest of {len(episodes)} episodes has "
            f"{longest}."
        )
    if layout.shift:
        by_I2 = np.random.default_rng(0).integers(
            -layout.shift, layout.shift + 1, (SHIFTS * len(train_I2), 2), np.int32
        )
        train_I2, train_starts = np.hstack([np.repeat(train_I2, SHIFTS, axis=0), by_I2]), SHIFTS * train_starts
    return Windows(
        frame_ESHWC=stack([episode.frame_SHWC for episode in episodes]),
        action_ESA=stack([episode.action_SA for episode in episodes], np.asarray(NULL_ACTION, np.float32)),
        task_E=np.array([episode.task for episode in episodes], np.int32),
        train_I2=train_I2,
        train_starts=train_starts,
        val_I2=val_I2,
        val_starts=val_starts,
        memory=layout.memory,
        new=layout.new,
    )


def _window_rows(episodes: Sequence[Episode], keep_E: np.ndarray, layout: Layout) -> tuple[np.ndarray, int]:
    """Returns rows (episode, start) of the episodes in ``keep_E``, episode starts first, and how many those are."""
    lengths = [(e, len(episode.action_SA)) for e, episode in enumerate(episodes) if keep_E[e]]
    begin = [(e, layout.first) for e, steps in lengths if steps >= layout.new]
    later = [(e, start) for e, steps in lengths for start in layout.later(steps)]
    return np.array(begin + later, np.int32).reshape(-1, 2), len(begin)


def sample_rows(key: Array, batch: int, starts: int, rows: int, start_share: float = 0.05) -> Array:
    """Draws (batch,) int32 rows of a window index: an episode start with probability ``start_share``, else any other.

    Episode starts are few among all windows, yet every imagined rollout begins with one.

    Args:
      key: of the draw.
      batch: how many.
      starts, rows: static; ``windows.train_starts`` and ``len(windows.train_I2)``.
      start_share: expected share of episode starts.
    """
    k_kind, k_start, k_other = jax.random.split(key, 3)
    # Episodes that are all as short as one window have nothing but episode starts.
    if starts == rows:
        return jax.random.randint(k_start, (batch,), 0, rows)
    start_B = jax.random.randint(k_start, (batch,), 0, max(starts, 1))
    # Both kinds are drawn for every row and one is kept: a program's shapes cannot depend on a coin.
    other_B = jax.random.randint(k_other, (batch,), starts, rows)
    is_start_B = jax.random.bernoulli(k_kind, start_share if starts else 0.0, (batch,))
    return jnp.where(is_start_B, start_B, other_B)


def gather_windows(data: Windows, row_B2: Array) -> tuple[Array, Array]:
    """Gathers the windows of rows of ``Windows``; runs inside a compiled step.

    Returns:
      frame_BFHWC float32 in [-1, 1] and action_BFA float32, F = 1 + memory + new; action slot i
      holds the action that produced frame i, the null action where none did.
    """
    chex.assert_shape(row_B2, (None, {2, 4}))
    chex.assert_rank([data.frame_ESHWC, data.action_ESA], [5, 3])
    chex.assert_type(data.frame_ESHWC, np.uint8)
    episode_B1, start_B = row_B2[:, :1], row_B2[:, 1]
    # The anchor is step 0, then consecutive steps; those before the episode are negative and show frame 0.
    step_BF = start_B[:, None] + jnp.arange(data.memory + data.new)
    step_BF = jnp.concatenate([jnp.zeros_like(step_BF[:, :1]), step_BF], axis=1)
    row_BF = (episode_B1, jnp.maximum(step_BF, 0))
    frame_BFHWC = jnp.asarray(data.frame_ESHWC)[row_BF]
    if data.seen_ESHWC is not None:
        memory = np.s_[:, 1 : 1 + data.memory]
        frame_BFHWC = frame_BFHWC.at[memory].set(jnp.asarray(data.seen_ESHWC)[row_BF][memory])
    frame_BFHWC = to_float(frame_BFHWC)
    if row_B2.shape[1] > 2:
        frame_BFHWC = jax.vmap(lambda frame, by: shift_frames(frame, by, jnp.take))(frame_BFHWC, row_B2[:, 2:])
    # action_SA[i] leads from frame i to frame i + 1, so the action that produced frame i is the one before it.
    action_BFA = jnp.asarray(data.action_ESA)[episode_B1, jnp.maximum(step_BF - 1, 0)]
    return frame_BFHWC, jnp.where((step_BF > 0)[..., None], action_BFA, jnp.asarray(NULL_ACTION))


def shift_frames(frame_FHWC: Any, by_2: Any, take: Callable = np.take) -> Any:
    """Returns frames that show what lies ``by_2`` pixels further down and right; the border is repeated.

    Of a mosaic (``core.pixels``) the first view alone is moved, whose camera does not go with the hand.
    """
    height = frame_FHWC.shape[1]
    view_FHHC, rest_FHWC = frame_FHWC[:, :, :height], frame_FHWC[:, :, height:]
    for axis, by in zip((1, 2), by_2, strict=True):
        view_FHHC = take(view_FHHC, np.arange(height) + by, axis=axis, mode="clip")
    return view_FHHC.__array_namespace__().concatenate([view_FHHC, rest_FHWC], axis=2)


# ---------------------------------------------------------------- chunks for imitation


def sft_chunks(
    episodes: Sequence[Episode], chunk: int = 8, *, stride: int = 1, early: int = 1
) -> dict[str, np.ndarray]:
    """Returns samples for imitation: a frame, and the ``chunk`` labels from it on.

    Labels beyond the end of an episode are no motion with the last gripper command.

    Args:
      episodes: demonstrations.
      chunk: T.
      stride: steps between samples of an episode; 1 takes every step, ``chunk`` the chunk boundaries.
      early: how often samples of the first half chunk are repeated. Every rollout begins there, before
        the robot's own motion gives the goal away, so they are the ones worth learning from.

    Returns:
      frame_BHWC uint8, label_BTA float32, task_B, episode_B, step_B int32.

    Raises:
      NoDataError: when there are no episodes.
    """
    if not episodes:
        raise NoDataError("no episodes to imitate.")
    parts: list[dict[str, np.ndarray]] = []
    for e, episode in enumerate(episodes):
        steps = np.arange(0, len(episode.label_SA), stride, dtype=np.int32)
        # Repeated rows cost memory on the device, and keep drawing a batch a single uniform draw.
        steps = np.repeat(steps, np.where(steps < chunk // 2, early, 1))
        # An arm that stands still and a hand that holds what it holds: what a robot does when it has arrived.
        still_TA = np.zeros((chunk, ACTION_DIM), np.float32)
        still_TA[:, -1] = episode.label_SA[-1, -1]
        label_SA = np.concatenate([episode.label_SA, still_TA])
        part = {
            "frame_BHWC": episode.frame_SHWC[steps],
            "label_BTA": label_SA[steps[:, None] + np.arange(chunk)],
            "task_B": np.full(len(steps), episode.task, np.int32),
            "episode_B": np.full(len(steps), e, np.int32),
            "step_B": steps,
        }
        parts.append(part)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
