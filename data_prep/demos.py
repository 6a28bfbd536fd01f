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
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from wovr_jax.types import ACTION_DIM, Episode

PAIRINGS = ("before", "after")
GRIPPERS = ("environment", "openvla")
ROTATIONS = ("none", "turn", "flip")
STILL = 1e-4
"""A shorter motion command than this is none; OpenVLA's number."""


class SourceError(ValueError):
    """A file or record that cannot be converted; the message names it."""


@dataclasses.dataclass(frozen=True)
class Demo:
    """One demonstration, T actions.

    Attributes:
      name: file and record, for messages and provenance.
      frame_THWC: uint8, one for each action.
      action_TA: (T, 7).
      success_T: bool, after each action.
      instruction: what was asked.
      wrist_THWC: uint8, or None.
      state_TD: with each frame, or None.
      pairing: ``"before"`` or ``"after"``: when a frame was taken, seen from its action.
    """

    name: str
    frame_THWC: np.ndarray
    action_TA: np.ndarray
    success_T: np.ndarray
    instruction: str
    wrist_THWC: np.ndarray | None = None
    state_TD: np.ndarray | None = None
    pairing: str = "before"


@dataclasses.dataclass(frozen=True)
class Conventions:
    """How a data set is to be read.

    Attributes:
      rotation: of the frames: ``"turn"`` by 180 degrees (raw LIBERO frames), ``"flip"`` rows only, ``"none"``.
      gripper: ``"environment"`` (-1 open, +1 closed) or ``"openvla"`` (1 open, 0 closed).
      drop_noops: whether steps without a command are left out.
      actor: who acted.
    """

    rotation: str = "none"
    gripper: str = "environment"
    drop_noops: bool = True
    actor: str = "human"

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
    arrays: dict[str, np.ndarray | None] = {
        "frame_SHWC": turn_frames(demo.frame_THWC, how.rotation),
        "wrist_SHWC": None if demo.wrist_THWC is None else turn_frames(demo.wrist_THWC, how.rotation),
        "state_SD": None if demo.state_TD is None else np.asarray(demo.state_TD, np.float32),
    }
    if demo.pairing == "before":
        # No frame shows what the last action led to: the last frame stands in for it. Nothing had succeeded at first.
        arrays = {name: None if x is None else np.concatenate([x, x[-1:]]) for name, x in arrays.items()}
        success_S = np.append(False, demo.success_T)
    else:
        # The first frame is what the first action led to, so no frame shows what that action was chosen in.
        action_SA, success_S = action_SA[1:], np.asarray(demo.success_T, bool)
    if how.drop_noops:
        kept_S = find_commanded(action_SA)
        # The frames in which the kept actions were chosen, and the last frame, to which the last of them led.
        frames = np.append(np.flatnonzero(kept_S), len(kept_S))
        action_SA, success_S = action_SA[kept_S], success_S[frames]
        arrays = {name: None if x is None else x[frames] for name, x in arrays.items()}
    if not len(action_SA):
        raise SourceError(f"{demo.name}: no step with a command in it.")
    # What was done to the recording can be read off the episode for ever.
    origin = {"source": demo.name, "last_frame": "repeated" if demo.pairing == "before" else "recorded"}
    return Episode(
        action_SA=action_SA,
        label_SA=action_SA,
        success_S=success_S.astype(bool),
        instruction=demo.instruction,
        task=task,
        seed=seed,
        actor=how.actor,
        origin=origin | {"noops": "dropped" if how.drop_noops else "kept"},
        **{name: None if x is None else np.ascontiguousarray(x) for name, x in arrays.items()},  # type: ignore
    )


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
        if frames is not None and (frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8):
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
    low, high = (-1.0, 1.0) if convention == "environment" else (0.0, 1.0)
    if gripper_T.min() < low - 1e-3 or gripper_T.max() > high + 1e-3:
        raise SourceError(
            f"{where}: gripper commands from {gripper_T.min():.3g} to {gripper_T.max():.3g}, "
            f"and the convention {convention!r} has {low:g} to {high:g}; name another with --gripper."
        )
    # 1 is open there and 0 closed.
    if convention == "openvla":
        return 1.0 - 2.0 * gripper_T
    # 0 is no command in the environment's convention, and OpenVLA's word for closed.
    if gripper_T.min() >= 0.0 and (gripper_T == 0.0).any():
        raise SourceError(f"{where}: gripper commands of 0 and 1 look like 1 = open; name it with --gripper openvla.")
    return gripper_T


def turn_frames(frame_THWC: np.ndarray, rotation: str) -> np.ndarray:
    """Returns the frames turned by 180 degrees, flipped upside down or as they are."""
    if rotation == "turn":
        return frame_THWC[:, ::-1, ::-1]
    return frame_THWC[:, ::-1] if rotation == "flip" else frame_THWC


def _kind(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}"
