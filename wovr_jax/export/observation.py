"""Reads what a client sends: one camera frame and an instruction, under the names that clients use.

    observation/image        uint8 (H, W, 3), upright, red green blue            also: image
    prompt                   the instruction                                    also: instruction
    seed                     optional whole number, the seed of the sampling
    observation/wrist_image  accepted and not used: the policy has one camera   also: wrist_image
    observation/state        accepted and not used: the policy has no proprio   also: state

The first names are those of openpi's LIBERO clients (openpi: examples/libero/main.py). Any other key is refused, so
that a misspelt one is noticed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

IMAGE = ("observation/image", "image")
PROMPT = ("prompt", "instruction")
SEED = ("seed",)
# openpi's clients always send these. Refusing them would only make users change their clients.
UNUSED = ("observation/wrist_image", "wrist_image", "observation/state", "state")
LONGEST_PROMPT = 1000
"""Most characters of an instruction."""


class ObservationError(ValueError):
    """Tells why the policy cannot act on an observation, and what was expected."""


@dataclasses.dataclass(frozen=True)
class Observation:
    """What the policy acts on at one moment.

    Attributes:
      frame_HWC: uint8 camera frame.
      instruction: what to do.
      seed: seed of the sampling, or None for the server's own.
    """

    frame_HWC: np.ndarray
    instruction: str
    seed: int | None


def read(message: Any, frame: tuple[int, int, int]) -> Observation:
    """Returns the observation in a message.

    Args:
      message: the message after ``wire.unpack``; nothing in it is trusted.
      frame: (H, W, 3), the shape of the frames that the policy takes.

    Raises:
      ObservationError: naming the key that is missing, unknown or not as expected.
    """
    if not isinstance(message, dict):
        raise ObservationError(f"expected a map with {describe(frame)}; got {type(message).__name__}")
    # What a stranger sends is quoted in part only: a key may be a megabyte long.
    unknown = [str(key)[:80] for key in message if key not in IMAGE + PROMPT + SEED + UNUSED]
    if unknown:
        raise ObservationError(f"unknown key {unknown[0]!r} (of {len(unknown)}); expected {describe(frame)}")
    # A frame of another size is refused and not resized: the policy was trained with one way of resizing.
    image = _get(message, IMAGE, frame)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape != frame:
        raise ObservationError(f"{IMAGE[0]!r}: expected uint8 {list(frame)}, got {_kind(image)}")
    # Bounded, because an instruction is tokenized before it can be refused.
    text = _get(message, PROMPT, frame)
    if not isinstance(text, str) or len(text) > LONGEST_PROMPT:
        raise ObservationError(
            f"{PROMPT[0]!r}: expected text of at most {LONGEST_PROMPT} characters, got {_kind(text)}"
        )
    seed = message.get(SEED[0])
    # Not isinstance: True is an int for Python.
    if seed is not None and not (type(seed) is int and 0 <= seed < 2**32):
        raise ObservationError(f"{SEED[0]!r}: expected a whole number from 0 to 2**32 - 1, got {_kind(seed)}")
    return Observation(image, text, seed)


def describe(frame: tuple[int, int, int]) -> str:
    """Returns in words what an observation holds."""
    return f"{IMAGE[0]!r} (uint8 {list(frame)}) and {PROMPT[0]!r} (text), optionally {SEED[0]!r}"


def _get(message: dict[Any, Any], names: tuple[str, ...], frame: tuple[int, int, int]) -> Any:
    """Returns the value that stands under exactly one of two names."""
    present = [name for name in names if name in message]
    # With both, either could be meant, and a robot moves by it.
    if len(present) != 1:
        what = "both " + " and ".join(map(repr, present)) if present else f"no {names[0]!r}"
        raise ObservationError(f"{what} in the observation; expected {describe(frame)}")
    return message[present[0]]


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, str | bytes):
        return f"{type(value).__name__} of length {len(value)}"
    return f"{str(value)[:40]} ({type(value).__name__})"
