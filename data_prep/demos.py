"""From a demonstration as other formats hold it to an episode: alignment, no-ops, gripper, rotation.

**Alignment.** An episode has one frame more than it has actions. Other formats have as many: either each frame was
taken *before* its action (OpenVLA's RLDS data, LeRobot), and the last action has no frame after it; or *after* it
(LIBERO's own HDF5 files, whose images come out of the step), and the first action has none before it. In the first
case the last frame is repeated, so that no action and no success is lost, and ``origin`` says so; in the second the
first action is dropped.

**No-ops.** OpenVLA leaves out steps whose motion is below 1e-4 and whose gripper command is that of the last kept
step, by replaying the rest in the simulator. Here the recorded steps are left out; a frame always stays with the action
that was chosen in it.

**Gripper.** Episodes hold -1 for open and +1 for closed, as the simulator takes it.

**Memory.** Frames may come one by one (:class:`Stream`). An episode's array is made once, at the size that it keeps,
and filled as they come; frames of steps that are left out are never stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from wovr_jax.types import ACTION_DIM, Episode

PAIRINGS = ("before", "after")
GRIPPERS = {"environment": (-1.0, 1.0), "openvla": (1.0, 0.0), "position": (0.0, 1.0), "reversed": (1.0, -1.0)}
"""Convention -> its numbers for open and for closed."""
ROTATIONS = ("none", "turn", "flip")
STILL = 1e-4
"""A shorter motion command than this is none; OpenVLA's number."""


class SourceError(ValueError):
    """A file or record that cannot be converted; the message names it."""


@dataclasses.dataclass(frozen=True)
class Stream:
    """Frames that are decoded when they are asked for, one after another.

    Attributes:
      count: how many there are.
      make: gives them, each (H, W, 3) uint8; may raise a SourceError.
    """

    count: int
    make: Callable[[], Iterator[np.ndarray]]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.make()


@dataclasses.dataclass(frozen=True)
class Demo:
    """One demonstration, T actions.

    Attributes:
      name: file and record, for messages and provenance.
      frame_THWC: uint8, one for each action; an array, or a stream of T frames.
      action_TA: (T, 7).
      success_T: bool, after each action.
      instruction: what was asked.
      wrist_THWC: as ``frame_THWC``, or None.
      state_TD: with each frame, or None.
      pairing: ``"before"`` or ``"after"``: when a frame was taken, seen from its action.
      odd: what looks odd in it, each a clause that goes on from "its"; a stream may add to it while it is read.
    """

    name: str
    frame_THWC: np.ndarray | Stream
    action_TA: np.ndarray
    success_T: np.ndarray
    instruction: str
    wrist_THWC: np.ndarray | Stream | None = None
    state_TD: np.ndarray | None = None
    pairing: str = "before"
    odd: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Conventions:
    """How a data set is to be read.

    Attributes:
      rotation: of the frames: ``"turn"`` by 180 degrees (raw LIBERO frames), ``"flip"`` rows only, ``"none"``.
      gripper: ``"environment"`` (-1 open, +1 closed), ``"openvla"`` (1 open, 0 closed), ``"position"`` (0 open, 1
        closed, as measured) or ``"reversed"`` (1 open, -1 closed).
      drop_noops: whether steps without a command are left out.
      actor: who acted.
      instruction: of demonstrations that come without one; empty where they are to be refused.
    """

    rotation: str = "none"
    gripper: str = "environment"
    drop_noops: bool = True
    actor: str = "human"
    instruction: str = ""

    def __post_init__(self) -> None:
        for name, known in (("rotation", ROTATIONS), ("gripper", GRIPPERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")


def to_episode(demo: Demo, task: int, seed: int, how: Conventions) -> Episode:
    """Returns the episode of a demonstration.

    Args:
      demo: the demonstration.
      task: number of its instruction.
      seed: number of the demonstration, since no reset seed is known.
      how: the conventions of its data set.

    Raises:
      SourceError: arrays that do not fit together, or values outside the conventions.
    """
    check(demo)
    # A copy, for the gripper is changed below and the source may be read again.
    action_SA = np.asarray(demo.action_TA, np.float32).copy()
    action_SA[:, -1] = gripper_to_environment(action_SA[:, -1], how.gripper, demo.name)
    state_SD = None if demo.state_TD is None else np.asarray(demo.state_TD, np.float32)
    success_S = np.asarray(demo.success_T, bool)
    # Which row of the recording each frame of the episode is.
    frames = np.arange(len(action_SA))
    if demo.pairing == "before":
        # No frame shows what the last action led to: the last frame stands in for it. Nothing had succeeded at first.
        frames, success_S = np.append(frames, frames[-1]), np.append(False, success_S)
    else:
        # The first frame is what the first action led to, so no frame shows what that action was chosen in.
        action_SA = action_SA[1:]
    if how.drop_noops:
        kept_S = find_commanded(action_SA)
        # The frames in which the kept actions were chosen, and the last frame, to which the last of them led.
        places = np.append(np.flatnonzero(kept_S), len(kept_S))
        action_SA, success_S, frames = action_SA[kept_S], success_S[places], frames[places]
    if not len(action_SA):
        raise SourceError(f"{demo.name}: no step with a command in it.")
    # What was done to the recording can be read off the episode for ever.
    origin = {"source": demo.name, "last_frame": "repeated" if demo.pairing == "before" else "recorded"}
    return Episode(
        frame_SHWC=collect(demo.frame_THWC, frames, how.rotation, f"{demo.name}, frame_THWC"),
        action_SA=action_SA,
        label_SA=action_SA,
        success_S=success_S,
        instruction=demo.instruction,
        task=task,
        seed=seed,
        actor=how.actor,
        wrist_SHWC=None
        if demo.wrist_THWC is None
        else collect(demo.wrist_THWC, frames, how.rotation, f"{demo.name}, wrist_THWC"),
        state_SD=None if state_SD is None else state_SD[frames],
        origin=origin | {"noops": "dropped" if how.drop_noops else "kept"},
    )


def collect(frames: np.ndarray | Stream, rows: np.ndarray, rotation: str, where: str) -> np.ndarray:
    """Returns the frames of the given rows, turned, in one array that is filled as they come.

    Args:
      frames: those of a recording.
      rows: ascending; a row may come twice.
      rotation: of ``ROTATIONS``.
      where: for messages.

    Raises:
      SourceError: a frame of another kind or size, or fewer frames than rows ask for.
    """
    pixels, filled = np.empty(0, np.uint8), 0
    for row, frame_HWC in enumerate(frames):
        if frame_HWC.ndim != 3 or frame_HWC.shape[2] != 3 or frame_HWC.dtype != np.uint8:
            raise SourceError(f"{where}: expected a frame as uint8 (H, W, 3), got {_kind(frame_HWC)}.")
        if not row:
            pixels = np.empty((len(rows), *frame_HWC.shape), np.uint8)
        if frame_HWC.shape != pixels.shape[1:]:
            raise SourceError(
                f"{where}: frame {row} is {list(frame_HWC.shape)}, those before it {list(pixels.shape[1:])}."
            )
        while filled < len(rows) and rows[filled] == row:
            pixels[filled] = turn_frames(frame_HWC[None], rotation)[0]
            filled += 1
        if filled == len(rows):
            return pixels
    raise SourceError(f"{where}: {filled} of its {len(rows)} frames are there.")


def check(demo: Demo) -> None:
    """Raises a SourceError unless the arrays of a demonstration fit together."""
    steps = len(demo.action_TA)
    # One action would leave nothing where the first or the last one is dropped.
    if demo.action_TA.shape != (steps, ACTION_DIM) or steps < 2:
        raise SourceError(
            f"{demo.name}: expected two or more actions of {ACTION_DIM} numbers, got {demo.action_TA.shape}."
        )
    if demo.pairing not in PAIRINGS:
        raise SourceError(f"{demo.name}: pairing is one of {', '.join(PAIRINGS)}, got {demo.pairing!r}.")
    for name in ("frame_THWC", "wrist_THWC"):
        frames = getattr(demo, name)
        # Those of a stream are looked at as they come.
        if isinstance(frames, np.ndarray) and (frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8):
            raise SourceError(f"{demo.name}: expected {name} as uint8 (T, H, W, 3), got {_kind(frames)}.")
    for name in ("frame_THWC", "wrist_THWC", "state_TD", "success_T"):
        array = getattr(demo, name)
        if array is not None and len(array) != steps:
            raise SourceError(f"{demo.name}: {steps} actions and {len(array)} rows of {name}; cut short?")
    for name in ("action_TA", "state_TD"):
        array = getattr(demo, name)
        if array is not None and not np.isfinite(array).all():
            raise SourceError(f"{demo.name}: {name} holds NaN or infinity.")


def find_commanded(action_SA: np.ndarray) -> np.ndarray:
    """Returns (S,) bool, False for a no-op: a step without motion whose gripper is as in the last step kept."""
    kept_S = np.ones(len(action_SA), bool)
    # Not by arrays: whether a step is kept depends on which one was kept before it.
    before = None
    for step, action_A in enumerate(action_SA):
        still = np.linalg.norm(action_A[:-1]) < STILL
        # The very first step is judged by its motion alone.
        kept_S[step] = not (still and (before is None or action_A[-1] == before))
        if kept_S[step]:
            before = action_A[-1]
    return kept_S


def gripper_to_environment(gripper_T: np.ndarray, convention: str, where: str) -> np.ndarray:
    """Returns gripper commands as the simulator takes them, -1 for open and +1 for closed.

    Raises:
      SourceError: values that the convention does not have.
    """
    # A little slack for numbers that went through a scaling.
    opened, closed = GRIPPERS[convention]
    low, high = min(opened, closed), max(opened, closed)
    # Measured ones overshoot a little.
    slack = 0.05 if convention == "position" else 1e-3
    if gripper_T.min() < low - slack or gripper_T.max() > high + slack:
        raise SourceError(
            f"{where}: gripper commands from {gripper_T.min():.3g} to {gripper_T.max():.3g}, "
            f"and the convention {convention!r} has {low:g} to {high:g}; name another with --gripper."
        )
    # 0 is no command where the ends are -1 and 1. An episode that goes from one end of 0 to 1 to the other, and never
    # below, has those ends: every step of it would be taken for the same command.
    if low < 0 and -0.1 < gripper_T.min() < 0.3 and (gripper_T.max() > 0.7 or (gripper_T == 0.0).all()):
        if np.isin(gripper_T, (0.0, 1.0)).all():
            raise SourceError(
                f"{where}: gripper commands of 0 and 1 look like 1 = open; name it with --gripper openvla, or "
                "--gripper position where 1 is closed."
            )
        raise SourceError(f"{where}: {one_sided(gripper_T.min(), gripper_T.max(), convention)}")
    if convention == "environment":
        return gripper_T
    return np.clip(-1.0 + 2.0 * (gripper_T - opened) / (closed - opened), -1.0, 1.0)


def one_sided(low: float, high: float, convention: str) -> str:
    """Returns what to say of gripper values from ``low`` to ``high`` that never reach the convention's -1."""
    return (
        f"gripper values from {low:.3g} to {high:.3g} never reach -1, which is "
        f"{'open' if GRIPPERS[convention][0] < 0 else 'closed'} by the convention {convention!r}; name another with "
        "--gripper: position (0 open, 1 closed) or openvla (1 open, 0 closed)."
    )


def find_success(reward_T: Any, name: str, odd: list[str]) -> np.ndarray:
    """Returns (T,) bool, whether rewards or flags of success say that the task was done after each action.

    Zeros and ones mean what they say. Any other numbers are a reward that is shaped, in which a positive one may only
    mean progress: then 1 and more counts as success, and ``odd`` says so.

    Raises:
      SourceError: NaN or infinity among them.
    """
    value_T = np.asarray(reward_T, np.float64)
    value_T = value_T.reshape(len(value_T), -1)[:, 0] if value_T.size else value_T.reshape(-1)
    if not np.isfinite(value_T).all():
        raise SourceError(f"{name}: rewards hold NaN or infinity, so success cannot be read from them.")
    if np.isin(value_T, (0.0, 1.0)).all():
        return value_T > 0
    odd.append("its rewards are not 0 or 1, so that only 1 and more is taken as success")
    return value_T >= 1


def turn_frames(frame_THWC: np.ndarray, rotation: str) -> np.ndarray:
    """Returns the frames turned by 180 degrees, flipped upside down or as they are."""
    if rotation == "turn":
        return frame_THWC[:, ::-1, ::-1]
    return frame_THWC[:, ::-1] if rotation == "flip" else frame_THWC


def _kind(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}"
