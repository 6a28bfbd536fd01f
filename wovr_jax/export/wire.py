"""Messages of the policy server: msgpack maps with numpy arrays, in openpi's encoding.

An array travels as the map ``{b"__ndarray__": True, b"data": bytes, b"dtype": "|u1", b"shape": [...]}`` and a numpy
scalar as ``{b"__npgeneric__": True, b"data": number, b"dtype": "<f4"}`` (openpi: packages/openpi-client,
msgpack_numpy). Never pickle: numbers and booleans are the only dtypes, whatever a message asks for.

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

_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
_ARRAY, _SCALAR = b"__ndarray__", b"__npgeneric__"


class WireError(ValueError):
    """Bytes that are no message; the text says what was expected."""


def pack(message: Mapping[str, Any]) -> bytes:
    """A message as bytes.

    Raises:
      TypeError: for a value that has no place in one.
    """
    data: Any = msgpack.packb(dict(message), default=_packed)
    return data


def unpack(data: bytes) -> Any:
    """What ``pack``, or a client of openpi's, made into bytes.

    Raises:
      WireError: cut short, not msgpack, or with an array that is not what it says.
    """
    limits = {"max_array_len": ITEMS, "max_map_len": ITEMS, "max_ext_len": 0}
    try:
        return msgpack.unpackb(data, object_hook=_revived, **limits)
    except WireError:
        raise
    except (ValueError, TypeError, RecursionError) as error:  # all that msgpack raises of bytes that it cannot read
        said = str(error) or type(error).__name__
        raise WireError(f"expected one whole msgpack map, got {len(data)} bytes that are not ({said[:200]})") from error


def _packed(value: Any) -> Any:
    if isinstance(value, np.ndarray) and _DTYPE.fullmatch(value.dtype.str):
        return {_ARRAY: True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic) and _DTYPE.fullmatch(value.dtype.str):
        return {_SCALAR: True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"cannot send {type(value).__name__}; expected numbers, text, lists, maps and arrays of numbers")


def _revived(found: dict[Any, Any]) -> Any:
    if _ARRAY in found:
        return _array(found)
    if _SCALAR in found:
        dtype, value = _dtype(found), found.get(b"data")
        if not isinstance(value, int | float):
            raise WireError(f"numpy scalar: expected a number as data, got {type(value).__name__}")
        try:
            with np.errstate(over="ignore"):  # infinity is a number too
                return dtype.type(value)
        except OverflowError as error:
            raise WireError(f"numpy scalar: {value} does not fit {dtype}") from error
    return found


def _array(found: dict[Any, Any]) -> np.ndarray:
    dtype, data, shape = _dtype(found), found.get(b"data"), found.get(b"shape")
    if not isinstance(shape, list) or len(shape) > RANK or not all(type(n) is int and n >= 0 for n in shape):
        raise WireError(f"array: expected a shape of at most {RANK} whole numbers, got {str(shape)[:80]}")
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.itemsize:
        size = len(data) if isinstance(data, bytes) else type(data).__name__
        raise WireError(f"array: {dtype} {str(shape)[:80]} is {math.prod(shape) * dtype.itemsize} bytes, got {size}")
    return np.frombuffer(data, dtype).reshape(shape)


def _dtype(found: dict[Any, Any]) -> np.dtype:
    name = found.get(b"dtype")
    if not isinstance(name, str) or not _DTYPE.fullmatch(name):
        raise WireError(f"array: expected a dtype of numbers or booleans such as '|u1', got {str(name)[:40]!r}")
    return np.dtype(name)
