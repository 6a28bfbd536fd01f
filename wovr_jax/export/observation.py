"""Reads what a client sends: what the robot senses and an instruction, under the names that clients use.

    observation/image        uint8 (H, W, 3), upright, red green blue            also: image
    prompt                   the instruction                                    also: instruction
    seed                     optional whole number, the seed of the sampling
    observation/wrist_image  uint8 of the same shape, the camera in the hand     also: wrist_image
    observation/state        numbers, as the demonstrations have them            also: state

The last two are wanted by a policy that was trained with them, and accepted and not used by any other. The first names
are those of openpi's LIBERO clients (openpi: examples/libero/main.py). Any other key is refused, so that a misspelt one
is noticed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from wovr_jax.data.senses import ONE_CAMERA, Senses

IMAGE = ("observation/image", "image")
PROMPT = ("prompt", "instruction")
SEED = ("seed",)
# openpi's clients always send these. Refusing them would only make users change their clients.
WRIST = ("observation/wrist_image", "wrist_image")
STATE = ("observation/state", "state")
LONGEST_PROMPT = 1000
"""Most characters of an instruction."""


class ObservationError(ValueError):
    """Tells why the policy cannot act on an observation, and what was expected."""


@dataclasses.dataclass(frozen=True)
class Observation:
    """What the policy acts on at one moment.

    Attributes:
      frame_HWC: uint8 camera frame, or mosaic of all that the policy senses.
      instruction: what to do.
      seed: seed of the sampling, or None for the server's own.
    """

    frame_HWC: np.ndarray
    instruction: str
    seed: int | None


def read(message: Any, frame: tuple[int, int, int], senses: Senses = ONE_CAMERA) -> Observation:
    """Returns the observation in a message.

    Args:
      message: the message after ``wire.unpack``; nothing in it is trusted.
      frame: (H, W, 3), the shape of a camera's frames.
      senses: what the policy takes of them.

    Raises:
      ObservationError: naming the key that is missing, unknown or not as expected.
    """
    expected = describe(frame, senses)
    if not isinstance(message, dict):
        raise ObservationError(f"expected a map with {expected}; got {type(message).__name__}")
    # What a stranger sends is quoted in part only: a key may be a megabyte long.
    unknown = [str(key)[:80] for key in message if key not in IMAGE + PROMPT + SEED + WRIST + STATE]
    if unknown:
        raise ObservationError(f"unknown key {unknown[0]!r} (of {len(unknown)}); expected {expected}")
    # A frame of another size is refused and not resized: the policy was trained with one way of resizing.
    views = [_get(message, names, expected) for names in (IMAGE, WRIST)[: senses.views]]
    for names, view in zip((IMAGE, WRIST), views, strict=False):
        if not isinstance(view, np.ndarray) or view.dtype != np.uint8 or view.shape != frame:
            raise ObservationError(f"{names[0]!r}: expected uint8 {list(frame)}, got {_kind(view)}")
    state = _read_state(_get(message, STATE, expected), senses.state) if senses.state else None
    # Bounded, because an instruction is tokenized before it can be refused.
    text = _get(message, PROMPT, expected)
    if not isinstance(text, str) or len(text) > LONGEST_PROMPT:
        raise ObservationError(
            f"{PROMPT[0]!r}: expected text of at most {LONGEST_PROMPT} characters, got {_kind(text)}"
        )
    seed = message.get(SEED[0])
    # Not isinstance: True is an int for Python.
    if seed is not None and not (type(seed) is int and 0 <= seed < 2**32):
        raise ObservationError(f"{SEED[0]!r}: expected a whole number from 0 to 2**32 - 1, got {_kind(seed)}")
    mosaic = views[0] if senses.plain else senses.compose(views[0], views[-1], state)
    return Observation(mosaic, text, seed)


def describe(frame: tuple[int, int, int], senses: Senses = ONE_CAMERA) -> str:
    """Returns in words what an observation holds."""
    wrist = f"{WRIST[0]!r} (as large), " if senses.views > 1 else ""
    state = f"{STATE[0]!r} ({senses.state} numbers), " if senses.state else ""
    image = f"{IMAGE[0]!r} (uint8 {list(frame)})"
    more = f", {wrist}{state}".removesuffix(", ") if wrist or state else ""
    return f"{image}{more} and {PROMPT[0]!r} (text), optionally {SEED[0]!r}"


def _read_state(state: Any, numbers: int) -> np.ndarray:
    """Returns the robot's state, (D,) float32."""
    array = np.asarray(state) if isinstance(state, np.ndarray | list | tuple) else np.zeros(0)
    if array.dtype.kind not in "fiu" or array.shape != (numbers,) or not np.isfinite(array).all():
        raise ObservationError(f"{STATE[0]!r}: expected {numbers} finite numbers, got {_kind(state)}")
    return array.astype(np.float32)


def _get(message: dict[Any, Any], names: tuple[str, ...], expected: str) -> Any:
    """Returns the value that stands under exactly one of two names."""
    present = [name for name in names if name in message]
    # With both, either could be meant, and a robot moves by it.
    if len(present) != 1:
        what = "both " + " and ".join(map(repr, present)) if present else f"no {names[0]!r}"
        raise ObservationError(f"{what} in the observation; expected {expected}")
    return message[present[0]]


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, str | bytes):
        return f"{type(value).__name__} of length {len(value)}"
    return f"{str(value)[:40]} ({type(value).__name__})"
