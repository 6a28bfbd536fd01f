"""Packs and unpacks messages of the policy server: msgpack maps with numpy arrays, in openpi's encoding.

An array travels as the map ``{b"__ndarray__": True, b"data": bytes, b"dtype": "|u1", b"shape": [...]}`` and a numpy
scalar as ``{b"__npgeneric__": True, b"data": number, b"dtype": "<f4"}`` (openpi:
packages/openpi-client/src/openpi_client/msgpack_numpy.py). Nothing is ever unpickled: numbers and booleans are the
only dtypes, whatever a message asks for.

What comes in is not trusted. Nothing is allocated that the message itself does not fill: lengths that a message
only claims are bounded, and an array is a view of the bytes that came.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

ITEMS = 1024
"""Most entries of a list or map, and most levels of nesting; a whole observation has a dozen."""
RANK = 8
"""Most axes of an array."""

# Byte order, then kind and bytes of an item: "|u1", "<f4". Objects ("O"), records and text have no place here.
_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
_ARRAY, _SCALAR = b"__ndarray__", b"__npgeneric__"


class WireError(ValueError):
    """Tells why bytes are no message, and what was expected."""


def pack(message: Mapping[str, Any]) -> bytes:
    """Returns a message as bytes.

    Raises:
      TypeError: for a value that has no place in a message.
    """
    data: Any = msgpack.packb(dict(message), default=_encode)
    return data


def unpack(data: bytes) -> Any:
    """Returns the message that ``pack``, or a client of openpi's, made into bytes.

    Raises:
      WireError: for bytes that are cut short, are not msgpack, or hold an array that does not fit its description.
    """
    # Extension types could carry anything, and openpi sends none.
    limits = {"max_array_len": ITEMS, "max_map_len": ITEMS, "max_ext_len": 0}
    try:
        return msgpack.unpackb(data, object_hook=_decode, **limits)
    except WireError:
        raise
    except (ValueError, TypeError, RecursionError) as error:  # all that msgpack raises for bytes that it cannot read
        reason = (str(error) or type(error).__name__)[:200]
        raise WireError(f"expected one whole msgpack map, got {len(data)} bytes that are not ({reason})") from error


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray) and _DTYPE.fullmatch(value.dtype.str):
        return {_ARRAY: True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic) and _DTYPE.fullmatch(value.dtype.str):
        return {_SCALAR: True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"cannot send {type(value).__name__}; expected numbers, text, lists, maps and arrays of numbers")


def _decode(entries: dict[Any, Any]) -> Any:
    # msgpack calls this for every map, innermost first; most are plain.
    if _ARRAY in entries:
        return _decode_array(entries)
    if _SCALAR in entries:
        dtype, value = _decode_dtype(entries), entries.get(b"data")
        if not isinstance(value, int | float):
            raise WireError(f"numpy scalar: expected a number as data, got {type(value).__name__}")
        try:
            # A float that is too large becomes infinity, which is a number too.
            with np.errstate(over="ignore"):
                return dtype.type(value)
        except OverflowError as error:
            raise WireError(f"numpy scalar: {value} does not fit {dtype}") from error
    return entries


def _decode_array(entries: dict[Any, Any]) -> np.ndarray:
    dtype, data, shape = _decode_dtype(entries), entries.get(b"data"), entries.get(b"shape")
    if not isinstance(shape, list) or len(shape) > RANK or not all(type(n) is int and n >= 0 for n in shape):
        raise WireError(f"array: expected a shape of at most {RANK} whole numbers, got {str(shape)[:80]}")
    # Python's product does not overflow, so a huge claimed shape cannot pass for a small one.
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.itemsize:
        size = len(data) if isinstance(data, bytes) else type(data).__name__
        raise WireError(f"array: {dtype} {str(shape)[:80]} is {math.prod(shape) * dtype.itemsize} bytes, got {size}")
    return np.frombuffer(data, dtype).reshape(shape)


def _decode_dtype(entries: dict[Any, Any]) -> np.dtype:
    name = entries.get(b"dtype")
    # Matched before numpy sees it: numpy parses commas, repeats and objects in a dtype's text.
    if not isinstance(name, str) or not _DTYPE.fullmatch(name):
        raise WireError(f"array: expected a dtype of numbers or booleans such as '|u1', got {str(name)[:40]!r}")
    return np.dtype(name)
