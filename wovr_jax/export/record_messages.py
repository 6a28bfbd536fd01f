"""Reads the messages of a recording; what each may hold, see ``export.recording``. Nothing in them is trusted."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from wovr_jax.export.observation import IMAGE, LONGEST_PROMPT, PROMPT, STATE, WRIST
from wovr_jax.export.recorder import RecordError
from wovr_jax.types import ACTION_DIM

TIME, ACTION = ("time",), ("action",)
ENDS = ("success", "failure")
KINDS = ("start", "step", *ENDS, "discard")
LONGEST_STATE, LONGEST_NAME = 64, 100
"""Most numbers of a state, and characters of who operates the robot."""
MOST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Begun:
    """What a start says, and every step has to keep to.

    Attributes:
      instruction: what the robot is asked to do.
      task: its number, None where the client does not say.
      layout: number of the initial placement, None likewise; episodes of one placement share it.
      by: who operates the robot; may be empty.
      frame_HWC, wrist_HWC: uint8 first frames; no wrist, no such camera in this episode.
      state_D: float32 first state, None without.
      time: seconds on the client's clock, None where the server's counts.
    """

    instruction: str
    task: int | None
    layout: int | None
    by: str
    frame_HWC: np.ndarray
    wrist_HWC: np.ndarray | None
    state_D: np.ndarray | None
    time: float | None


@dataclasses.dataclass(frozen=True)
class Steps:
    """One or several steps that follow each other.

    Attributes:
      frame_NHWC, wrist_NHWC, state_ND: the frame that each step led to, as in ``Begun``.
      action_NA: (n, 7) float32 executed actions, None where the proposed ones were executed.
      person: whether a person steered.
      time_N: seconds on the client's clock.
    """

    frame_NHWC: np.ndarray
    wrist_NHWC: np.ndarray | None
    state_ND: np.ndarray | None
    action_NA: np.ndarray | None
    person: bool
    time_N: np.ndarray | None


def read_start(message: dict[Any, Any], frame: tuple[int, int, int]) -> Begun:
    """Returns what a start says.

    Args:
      message: the message.
      frame: (H, W, 3), the shape of the policy's frames.

    Raises:
      RecordError: naming the key that is missing, unknown or not as expected.
    """
    _allow(message, ("record", "task", "layout", "by"), IMAGE, WRIST, STATE, PROMPT, TIME)
    wrist_HWC, state_D = _find(message, WRIST), _find(message, STATE)
    if wrist_HWC is not None:
        # The policy has no such camera, so the start says how large its frames are.
        wrist_HWC = _get_frames(message, WRIST, (*np.shape(wrist_HWC)[:2], 3))
    if state_D is not None:
        state_D = _get_numbers(message, STATE, (np.size(state_D),))
        if not 1 <= state_D.size <= LONGEST_STATE:
            raise RecordError(f"{STATE[0]!r}: expected 1 to {LONGEST_STATE} numbers, got {state_D.size}")
    text, by = _find(message, PROMPT), message.get("by", "")
    if not isinstance(text, str) or not text.strip() or len(text) > LONGEST_PROMPT:
        raise RecordError(f"{PROMPT[0]!r}: expected text of 1 to {LONGEST_PROMPT} characters, got {_kind(text)}")
    if not isinstance(by, str) or len(by) > LONGEST_NAME:
        raise RecordError(f"'by': expected text of at most {LONGEST_NAME} characters, got {_kind(by)}")
    task, layout = (None if message.get(name) is None else _get_count(message, name) for name in ("task", "layout"))
    frame_HWC = _get_frames(message, IMAGE, frame)
    clock = None if _find(message, TIME) is None else float(_get_numbers(message, TIME, (), np.float64))
    return Begun(text, task, layout, by, frame_HWC, wrist_HWC, state_D, clock)


def read_steps(message: dict[Any, Any], begun: Begun, done: int, before: float) -> Steps:
    """Returns the steps of a message.

    Args:
      message: the message.
      begun: how the episode began.
      done: steps that are here already.
      before: time of the last one.

    Raises:
      RecordError: as :func:`read_start`; also when other steps should come first.
    """
    _allow(message, ("record", "step", "person"), IMAGE, WRIST, STATE, ACTION, TIME)
    # Numbered, so that an episode has no gap after a message that was refused, and no step twice after one sent again.
    if (first := _get_count(message, "step")) != done + 1:
        raise RecordError(f"'step': {done} steps are here, so the next is number {done + 1}, got {first}")
    frames = _find(message, IMAGE)
    count = len(frames) if isinstance(frames, np.ndarray) and frames.ndim == 4 else 1
    for names, first in ((WRIST, begun.wrist_HWC), (STATE, begun.state_D), (TIME, begun.time)):
        if (_find(message, names) is None) != (first is None):
            was = "without it" if first is None else "with it"
            raise RecordError(f"{names[0]!r}: the episode began {was}, so every step comes {was}")
    wrist, state, when = begun.wrist_HWC, begun.state_D, begun.time
    time_N = None if when is None else _get_numbers(message, TIME, (count,), np.float64)
    if time_N is not None and (np.diff(time_N, prepend=before) < 0).any():
        raise RecordError("'time': expected seconds that never go back")
    if not isinstance(person := message.get("person", False), bool):
        raise RecordError(f"'person': expected true or false, got {_kind(person)}")
    return Steps(
        frame_NHWC=_get_frames(message, IMAGE, (count, *begun.frame_HWC.shape)),
        wrist_NHWC=None if wrist is None else _get_frames(message, WRIST, (count, *wrist.shape)),
        state_ND=None if state is None else _get_numbers(message, STATE, (count, *state.shape)),
        action_NA=_get_numbers(message, ACTION, (count, ACTION_DIM)) if "action" in message else None,
        person=person,
        time_N=time_N,
    )


def read_end(message: dict[Any, Any], done: int) -> int | None:
    """Returns the first frame of the success, None where the end says none.

    Args:
      message: a success or a failure.
      done: steps that are here.

    Raises:
      RecordError: as :func:`read_start`; also when the client counts other steps, or there are none.
    """
    _allow(message, ("record", "steps", "first_success"))
    if (steps := _get_count(message, "steps")) != done:
        raise RecordError(
            f"'steps': the episode had {steps}, and {done} are here; send the others first, or discard it"
        )
    if not done:
        raise RecordError("an episode needs at least one step; discard ends one without")
    if message.get("first_success") is None:
        return None
    first = _get_count(message, "first_success")
    if message["record"] != "success" or first > done:
        raise RecordError(f"'first_success': expected a frame from 0 to {done} of a success, got {first}")
    return first


def _allow(message: dict[Any, Any], *names: tuple[str, ...]) -> None:
    known = [name for group in names for name in group]
    # What a stranger sends is quoted in part only.
    if unknown := [str(key)[:80] for key in message if key not in known]:
        raise RecordError(f"{message['record']}: unknown key {unknown[0]!r}; expected {', '.join(known)}")


def _find(message: dict[Any, Any], names: tuple[str, ...]) -> Any:
    """Returns what stands under one of several names, None where nothing does."""
    present = [name for name in names if message.get(name) is not None]
    if len(present) > 1:
        raise RecordError(f"both {' and '.join(map(repr, present))}; expected one of them")
    return message[present[0]] if present else None


def _get_frames(message: dict[Any, Any], names: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
    frames = _find(message, names)
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.shape != shape or not frames.size:
        raise RecordError(f"{names[0]!r}: expected uint8 {list(shape)}, got {_kind(frames)}")
    return frames


def _get_numbers(
    message: dict[Any, Any], names: tuple[str, ...], shape: tuple[int, ...], dtype: Any = np.float32
) -> np.ndarray:
    value = _find(message, names)
    # A list of numbers will do as well, as it does for openpi's state; a map or a text will not.
    try:
        array = np.asarray(value)
    except ValueError:  # rows of several lengths
        array = np.asarray(None)
    if array.dtype.kind not in "fiu" or array.shape != shape or not np.isfinite(array.astype(dtype)).all():
        raise RecordError(f"{names[0]!r}: expected finite numbers {list(shape)}, got {_kind(value)}")
    return array.astype(dtype)


def _get_count(message: dict[Any, Any], name: str) -> int:
    value = message.get(name)
    # Not isinstance: True is an int for Python.
    if type(value) is not int or not 0 <= value <= MOST:
        raise RecordError(f"{name!r}: expected a whole number from 0 to {MOST}, got {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        odd = ", some not finite" if value.dtype.kind == "f" and not np.isfinite(value).all() else ""
        return f"{value.dtype} {list(value.shape)}{odd}"
    if isinstance(value, str | bytes | list):
        return f"{type(value).__name__} of length {len(value)}"
    return "nothing" if value is None else f"{str(value)[:40]} ({type(value).__name__})"
