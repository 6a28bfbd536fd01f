"""What a client sends: one camera frame and an instruction, under the names that clients use.

    observation/image        uint8 (H, W, 3), upright, red green blue            also: image
    prompt                   the instruction                                    also: instruction
    seed                     optional whole number; of the sampling
    observation/wrist_image  accepted and not used: the policy has one camera   also: wrist_image
    observation/state        accepted and not used: the policy has no proprio   also: state

The first names are those of openpi's LIBERO clients. Any other key is refused, so that a misspelt one is noticed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

IMAGE = ("observation/image", "image")
PROMPT = ("prompt", "instruction")
SEED = ("seed",)
UNUSED = ("observation/wrist_image", "wrist_image", "observation/state", "state")
LONGEST_PROMPT = 1000
"""Characters of an instruction."""


class ObservationError(ValueError):
    """An observation that the policy cannot act on; the message names what was expected."""


@dataclasses.dataclass(frozen=True)
class Observation:
    """One moment.

    Attributes:
      frame_HWC: uint8.
      instruction: what to do.
      seed: of the sampling, or None.
    """

    frame_HWC: np.ndarray
    instruction: str
    seed: int | None


def read(message: Any, frame: tuple[int, int, int]) -> Observation:
    """The observation in a message.

    Args:
      message: as it was unpacked.
      frame: (H, W, 3) that the policy takes.

    Raises:
      ObservationError: naming the key that is missing, unknown or not as expected.
    """
    if not isinstance(message, dict):
        raise ObservationError(f"expected a map with {expected(frame)}; got {type(message).__name__}")
    unknown = [str(key)[:80] for key in message if key not in IMAGE + PROMPT + SEED + UNUSED]
    if unknown:
        raise ObservationError(f"unknown key {unknown[0]!r} (of {len(unknown)}); expected {expected(frame)}")
    image = _one(message, IMAGE, frame)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape != frame:
        raise ObservationError(f"{IMAGE[0]!r}: expected uint8 {list(frame)}, got {_shown(image)}")
    text = _one(message, PROMPT, frame)
    if not isinstance(text, str) or len(text) > LONGEST_PROMPT:
        raise ObservationError(
            f"{PROMPT[0]!r}: expected text of at most {LONGEST_PROMPT} characters, got {_shown(text)}"
        )
    seed = message.get(SEED[0])
    if seed is not None and not (type(seed) is int and 0 <= seed < 2**32):
        raise ObservationError(f"{SEED[0]!r}: expected a whole number from 0 to 2**32 - 1, got {_shown(seed)}")
    return Observation(image, text, seed)


def expected(frame: tuple[int, int, int]) -> str:
    """What an observation holds, in words."""
    return f"{IMAGE[0]!r} (uint8 {list(frame)}) and {PROMPT[0]!r} (text), optionally {SEED[0]!r}"


def _one(message: dict[Any, Any], names: tuple[str, ...], frame: tuple[int, int, int]) -> Any:
    """The value under one of two names."""
    given = [name for name in names if name in message]
    if len(given) != 1:
        what = "both " + " and ".join(map(repr, given)) if given else f"no {names[0]!r}"
        raise ObservationError(f"{what} in the observation; expected {expected(frame)}")
    return message[given[0]]


def _shown(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, str | bytes):
        return f"{type(value).__name__} of length {len(value)}"
    return f"{str(value)[:40]} ({type(value).__name__})"
