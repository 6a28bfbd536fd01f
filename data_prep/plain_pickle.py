"""``.npy`` files of Python objects, read without letting them run anything.

Such a file is a pickle, and a pickle may call any function of any installed package. This
reader knows no function at all. The few names that numpy's own arrays need are answered by
stand-ins, which note what an array was made of; arrays are built from those notes, by numbers
that were checked. Whatever else a file names is refused, and so is everything that is not an
array of numbers or text, a dict, a list, a tuple, a string, a number, a bool or None.
"""

from __future__ import annotations

import io
import math
import os
import pathlib
import pickle
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

_NUMBER = re.compile(r"[biufc](1|2|4|8|16)|[SU]\d+")
"""Codes of numpy types that are plain numbers or text: kind and bytes."""
_DEEPEST = 50
"""How deep lists and dicts may be nested: far more than any data need, and long before the stack runs out."""


class RefusedError(ValueError):
    """A file that holds more than plain data, or is no file of objects; the message says what and where."""


def load(path: str | os.PathLike) -> Any:
    """Reads an ``.npy`` file of objects as lists, dicts and plain arrays.

    Raises:
      RefusedError: cut short, another kind of file, or with anything but plain data in it.
    """
    path = pathlib.Path(path)
    try:
        with path.open("rb") as file:
            shape = _object_shape(file)
            content = _plain(_Unpickler(file).load(), path.name)
            # Bytes behind the pickle could be a second one, for a reader less careful than this.
            if file.read(1):
                raise RefusedError("bytes follow after the end of the pickle")
    except FileNotFoundError:
        raise RefusedError(f"{path}: no such file.") from None
    except RefusedError as error:
        raise RefusedError(f"{path}: refused, {error}.") from None
    except Exception as error:  # a damaged pickle fails in every way there is
        raise RefusedError(f"{path}: damaged or cut short ({type(error).__name__}: {error}).") from error
    # numpy wraps what it saves in an array of objects; lists that were pickled plainly are read too.
    flat = content.reshape(-1).tolist() if isinstance(content, np.ndarray) else content
    if not isinstance(flat, list) or len(flat) != math.prod(shape):
        raise RefusedError(f"{path}: refused, the header says {shape} and something else follows.")
    return flat


def _object_shape(file: io.BufferedReader) -> tuple[int, ...]:
    """Reads the header of an ``.npy`` file and returns the shape it tells."""
    try:
        version = np.lib.format.read_magic(file)
    except ValueError as error:
        raise RefusedError(f"it is not an .npy file ({error})") from None
    # The header is plain text; numpy reads it without evaluating anything but a literal.
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype != np.dtype(object):
        raise RefusedError(f"it is an array of {dtype}{list(shape)}, not of objects")
    return shape


# ---------------------------------------------------------------- stand-ins


class _StandIn:
    """What a file may name. It can be made, and it can be given the state of an array, and nothing else."""

    def __setstate__(self, state: Any) -> None:
        # Without this, a pickle could set attributes of the stand-in, and of its class.
        raise RefusedError(f"it changes what it should only read ({type(self).__name__.lstrip('_')})")


class _Class(_StandIn):
    """``numpy.ndarray``, which is named as a type and never called."""

    def __init__(self, *_: Any):
        raise RefusedError("it makes an array without content")


class _Dtype(_StandIn):
    """``numpy.dtype``: notes its code and byte order."""

    def __init__(self, code: Any, *_: Any):
        # Checked here, where it is named: an array of anything else never gets any bytes.
        self.code, self.order = str(code), "="
        if self.code not in ("O", "O8") and not _NUMBER.fullmatch(self.code):
            raise RefusedError(f"it holds an array of type {self.code!r}")

    def __setstate__(self, state: tuple) -> None:
        _, order, subdtype, names, fields, *_ = state
        if order not in ("<", ">", "|", "=") or subdtype is not None or names is not None or fields is not None:
            raise RefusedError("it holds an array of a compound type")
        self.order = order

    @property
    def real(self) -> np.dtype:
        if self.code.startswith("O"):
            raise RefusedError("it holds objects where numbers were expected")
        return np.dtype(self.code).newbyteorder(self.order if self.order in "<>" else "=")


class _Array(_StandIn):
    """An array whose content comes next."""

    def __init__(self, *_: Any):
        self.state: tuple | None = None

    def __setstate__(self, state: tuple) -> None:
        self.state = state


class _Scalar(_StandIn):
    """A number of numpy's."""

    def __init__(self, dtype: Any, data: Any = None):
        self.state = (1, (), dtype, False, data)


class _Buffer(_StandIn):
    """An array whose bytes come as one block."""

    def __init__(self, data: Any, dtype: Any, shape: tuple, order: str):
        self.state = (1, shape, dtype, order == "F", bytes(data))


class _Latin(_StandIn):
    """Bytes as pickles before protocol 3 wrote them: text, or nothing at all."""

    def __new__(cls, text: str = "", encoding: str = "latin1") -> bytes:
        if encoding != "latin1":
            raise RefusedError(f"it asks for the codec {encoding!r}")
        return text.encode("latin1")


_KNOWN = {
    "multiarray._reconstruct": _Array,
    "multiarray.scalar": _Scalar,
    "numeric._frombuffer": _Buffer,
    "numpy.ndarray": _Class,
    "numpy.dtype": _Dtype,
    "_codecs.encode": _Latin,
    "__builtin__.bytes": _Latin,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # numpy.core became numpy._core in numpy 2.
        # Only these names are answered, and by classes of this file; nothing of numpy itself is called.
        short = re.sub(r"^numpy\._?core\.", "", module)
        try:
            return _KNOWN[f"{short}.{name}"]
        except KeyError:
            raise RefusedError(f"it names {module}.{name}, which plain data do not need") from None

    def persistent_load(self, pid: Any) -> Any:
        raise RefusedError("it refers to something outside itself")


# ---------------------------------------------------------------- from notes to data


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """Returns ``value`` with every stand-in replaced by the array or number it stands for."""
    if depth > _DEEPEST:
        raise RefusedError(f"{where} is nested more than {_DEEPEST} deep")
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    # Containers are rebuilt item by item, so that nothing else can hide in them.
    if isinstance(value, dict):
        return {_key(key, where): _plain(item, f"{where}[{key!r}]", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_items(value, where, depth))
    if isinstance(value, _Array | _Scalar | _Buffer) and value.state is not None:
        return _array(value.state, where, depth)
    kind = type(value).__name__.lstrip("_")
    raise RefusedError(f"{where} is of type {kind}; only arrays, dicts, lists, strings and numbers are read")


def _items(values: Iterable[Any], where: str, depth: int) -> list[Any]:
    return [_plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(values)]


def _key(key: Any, where: str) -> str | int:
    if not isinstance(key, str | int):
        raise RefusedError(f"{where} has a key of type {type(key).__name__}")
    return key


def _array(state: tuple, where: str, depth: int) -> Any:
    """Builds an array, or a number where the shape is empty, from what a stand-in noted."""
    _, shape, dtype, fortran, data = state
    shape = tuple(int(length) for length in shape)
    if not isinstance(dtype, _Dtype) or min(shape, default=0) < 0:
        raise RefusedError(f"{where} is an array of shape {shape} whose type is missing")
    if isinstance(data, list):
        if not dtype.code.startswith("O") or len(data) != math.prod(shape):
            raise RefusedError(f"{where} is an array of {shape} with {len(data)} objects")
        # Filled afterwards: np.array would look into the items and might make another shape of them.
        flat = np.empty(len(data), object)
        flat[:] = _items(data, where, depth)
        return flat.reshape(shape, order="F" if fortran else "C")
    if not isinstance(data, bytes | bytearray) or len(data) != math.prod(shape) * dtype.real.itemsize:
        raise RefusedError(f"{where} is an array of {shape} without the bytes for it")
    # Exactly as many bytes as shape and type ask for, or it was refused above.
    array = np.frombuffer(bytes(data), dtype.real).reshape(shape, order="F" if fortran else "C")
    return array if shape else array[()]
