"""Safetensors files, tensor by tensor.

The library maps a file into memory or takes all tensors at once; either way a process that
converts 10 GB is charged for 20. Here the header is read, then one tensor at a time by seek
and read, and written the same way, so that a conversion holds one tensor of each side.

Format: 8 bytes little-endian header length; a JSON header, name -> dtype, shape and the
tensor's begin and end after the header; the data (huggingface/safetensors:README.md).
"""

from __future__ import annotations

import io
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

HEADER_BYTES = 100_000_000
"""Longest header that the library accepts."""

_CODES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: code for code, dtype in _CODES.items()}

LFS = b"version https://git-lfs.github.com/spec/"
"""How a pointer of Git LFS begins."""

_PIECE = 2**24
"""Bytes read at a time where nothing but their hash is wanted."""

Progress = Callable[[int], None]
"""Takes the bytes of each leaf or tensor once it is done."""


class FileError(ValueError):
    """A file of weights that is missing, damaged, or not of the format or network that was promised."""


class Fact(NamedTuple):
    """What is known of a tensor before its data are read."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes they take."""
        return self.size * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype.name}[{','.join(map(str, self.shape))}]"


def facts_of(arrays: Mapping[str, Any]) -> dict[str, Fact]:
    """Returns the shape and dtype of each array."""
    return {name: Fact(tuple(array.shape), np.dtype(array.dtype)) for name, array in arrays.items()}


class Header(NamedTuple):
    """What a file says of itself.

    Attributes:
      path: the file.
      facts: name -> shape and dtype.
      begin: name -> where its data begin in the file.
      doubled: names that the header gives more than once.
      metadata: the strings kept beside the tensors.
    """

    path: pathlib.Path
    facts: dict[str, Fact]
    begin: dict[str, int]
    doubled: list[str]
    metadata: dict[str, str]


# ---------------------------------------------------------------- reading


def header(path: str | os.PathLike) -> Header:
    """Reads and checks the header.

    Raises:
      FileError: no such file, no safetensors, cut short, or with data that do not add up.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileError(f"{path}: no such file.")
    refuse_pointer(path)  # first: read as safetensors, its few lines would only be "cut short"
    size, doubled = path.stat().st_size, []

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # JSON allows a name twice and Python keeps the last, so they are counted here.
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            doubled.extend(sorted({name for name in names if names.count(name) > 1}))
        return dict(pairs)

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        # Any file begins with eight bytes; as a length they are absurd unless it is one of these.
        if not 2 <= length <= min(HEADER_BYTES, size - 8):
            raise FileError(f"{path} is not a safetensors file, or cut short: its header would be {length} bytes long.")
        try:
            described = json.loads(file.read(length), object_pairs_hook=to_dict)
        except ValueError as error:
            raise FileError(f"{path} is not a safetensors file: its header is not JSON ({error}).") from error
    metadata = described.pop("__metadata__", {})
    facts, begin = {}, {}
    for name, entry in described.items():
        facts[name], begin[name] = _entry(path, name, entry, 8 + length, size)
    return Header(path, facts, begin, doubled, metadata)


def _entry(path: pathlib.Path, name: str, entry: Mapping[str, Any], start: int, size: int) -> tuple[Fact, int]:
    try:
        fact = Fact(tuple(map(int, entry["shape"])), _CODES[entry["dtype"]])
        begin, end = entry["data_offsets"]  # counted from the end of the header
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"{path}: the header's entry for {name!r} cannot be read: {entry}.") from error
    # Both would be noticed on reading at the latest; here it is before hours of work, and with the reason.
    if end - begin != fact.nbytes:
        raise FileError(f"{path}: {name!r} is {entry['dtype']}{list(fact.shape)} but has {end - begin} bytes.")
    if start + end > size:
        raise FileError(f"{path} is cut short: {name!r} ends at byte {start + end}, the file at {size}. Copy it again.")
    return fact, start + begin


def refuse_pointer(path: pathlib.Path) -> None:
    """Raises for the small text that git leaves in the place of a large file that was not downloaded."""
    with path.open("rb") as file:
        if file.read(len(LFS)) == LFS:
            raise FileError(f"{path} is a pointer of Git LFS, not the weights: fetch them with `git lfs pull`.")


def read(opened: Header, name: str) -> np.ndarray:
    """Reads one tensor, into memory of its own."""
    with opened.path.open("rb", buffering=0) as file:
        file.seek(opened.begin[name])
        return _read_tensor(file, opened, name)


def read_all(opened: Header, hashed: Callable[[Any], None] | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Reads all tensors in the order of the file, each once the one before it was taken; keeps none of them.

    Args:
      opened: the header.
      hashed: takes every byte of the file in order, ``hashlib.sha256().update`` for instance, so that reading and
        hashing are one pass. It has taken all of them when the iteration has ended.
    """
    # By begin, and by size because tensors without a number begin where the next one does.
    order = sorted(opened.facts, key=lambda name: (opened.begin[name], opened.facts[name].nbytes))
    with opened.path.open("rb", buffering=0) as file:

        def pass_over(end: int) -> None:
            # What lies before the first tensor (the header), between tensors, and behind the last one.
            while hashed and (missing := end - file.tell()) > 0 and (piece := file.read(min(missing, _PIECE))):
                hashed(piece)

        for name in order:
            pass_over(opened.begin[name])
            file.seek(opened.begin[name])
            tensor = _read_tensor(file, opened, name)
            if hashed:
                hashed(_bytes_of(tensor))
            yield name, tensor
            del tensor  # before the next one is made: this one is the caller's
        pass_over(opened.path.stat().st_size)


def _read_tensor(file: io.FileIO, opened: Header, name: str) -> np.ndarray:
    tensor = np.empty(opened.facts[name].shape, opened.facts[name].dtype)
    view = _bytes_of(tensor)
    while view:
        count = file.readinto(view)
        if not count:  # raw reads may come in pieces, but an empty one is the end
            raise FileError(f"{opened.path} was cut short while it was read, at {name!r}.")
        view = view[count:]
    return tensor


def _bytes_of(tensor: np.ndarray) -> memoryview:
    # Through uint8: a 0-d or bfloat16 array has no buffer of its own.
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data


# ---------------------------------------------------------------- writing


def write(
    path: str | os.PathLike,
    facts: Mapping[str, Fact],
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file from tensors that come one after another, in any order.

    Args:
      path: the file, which must not be one that is worth keeping: use :func:`core.disk.replace_file`.
      facts: shape and dtype of all of them.
      tensors: each of ``facts`` once.
      metadata: strings for the header.

    Raises:
      ValueError: for a tensor that was not announced, is not as announced, or did not come.
    """
    text, begin, size = layout(facts, metadata)
    waiting = set(facts)
    with open(path, "wb") as file:
        file.write(text)
        for name, tensor in tensors:
            if name not in waiting or Fact(tensor.shape, tensor.dtype) != facts[name]:
                raise ValueError(
                    f"{name}: {tensor.dtype}{list(tensor.shape)} came, {facts.get(name)} was announced once"
                )
            waiting.remove(name)
            file.seek(begin[name])  # they may come in another order than they lie
            file.write(_bytes_of(tensor))
        file.truncate(size)  # a tensor without numbers at the end writes nothing
    if waiting:
        raise ValueError(f"{path}: {len(waiting)} tensors did not come, {min(waiting)!r} among them")


def layout(facts: Mapping[str, Fact], metadata: Mapping[str, str] | None) -> tuple[bytes, dict[str, int], int]:
    """Returns the bytes before the data, where each tensor begins, and the size of the file."""
    order = sorted(facts, key=lambda name: (-facts[name].dtype.itemsize, name))  # widest first keeps data aligned
    described: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin, at = {}, 0
    for name in order:
        end = at + facts[name].nbytes
        described[name] = {
            "dtype": _NAMES[facts[name].dtype],
            "shape": list(facts[name].shape),
            "data_offsets": [at, end],
        }
        begin[name], at = at, end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data begin aligned to 8 bytes
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + at for name, at in begin.items()}, start + at
