"""Reading of safetensors files, tensor by tensor; ``writer`` writes them so.

The library maps a file into memory or takes all tensors at once; either way a process that
converts 10 GB is charged for 20. Here the header is read, then one tensor at a time by seek
and read, so that a conversion holds one tensor of each side.

Format: 8 bytes little-endian header length; a JSON header, name -> dtype, shape and the
tensor's begin and end after the header; the data (huggingface/safetensors:README.md).
"""

from __future__ import annotations

import io
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

HEADER_BYTES = 100_000_000
"""Longest header that the library accepts."""

CODES = {f"{letter}{n}": np.dtype(f"{kind}{n}") for letter, kind in zip("IU", ("int", "uint")) for n in (64, 32, 16, 8)}
CODES |= {f"F{n}": np.dtype(f"float{n}") for n in (64, 32, 16)} | {"BOOL": np.dtype(np.bool_)}
_NARROW = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
CODES |= {code: np.dtype(getattr(jnp, name)) for code, name in _NARROW.items()}
"""Code of the format -> dtype."""

LFS = b"version https://git-lfs.github.com/spec/"
"""How a pointer of Git LFS begins."""


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


class Header(NamedTuple):
    """What a file says of itself.

    Attributes:
      path: the file.
      facts: name -> shape and dtype.
      begin: name -> where its data begin in the file.
      metadata: the strings kept beside the tensors.
    """

    path: pathlib.Path
    facts: dict[str, Fact]
    begin: dict[str, int]
    metadata: dict[str, str]


def header(path: str | os.PathLike, make: Callable[[list[tuple[str, Any]]], dict[str, Any]] = dict) -> Header:
    """Reads and checks the header.

    Args:
      path: the file.
      make: makes each object of its JSON out of names and values; of a name given twice ``dict`` keeps the last.

    Raises:
      FileError: no such file, no safetensors, cut short, or with data that do not add up.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileError(f"{path}: no such file.")
    refuse_pointer(path)  # first: read as safetensors, its few lines would only be "cut short"
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        # Any file begins with eight bytes; as a length they are absurd unless it is one of these.
        if not 2 <= length <= min(HEADER_BYTES, size - 8):
            raise FileError(f"{path} is not a safetensors file, or cut short: its header would be {length} bytes long.")
        try:
            described = json.loads(file.read(length), object_pairs_hook=make)
        except ValueError as error:
            raise FileError(f"{path} is not a safetensors file: its header is not JSON ({error}).") from error
    metadata = described.pop("__metadata__", {})
    facts, begin = {}, {}
    for name, entry in described.items():
        facts[name], begin[name] = _entry(path, name, entry, 8 + length, size)
    return Header(path, facts, begin, metadata)


def _entry(path: pathlib.Path, name: str, entry: Mapping[str, Any], start: int, size: int) -> tuple[Fact, int]:
    try:
        fact = Fact(tuple(map(int, entry["shape"])), CODES[entry["dtype"]])
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


def read_all(opened: Header, hashed: Callable[[Any], None] | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Reads all tensors in the order of the file, each once the one before it was taken; keeps none of them.

    Args:
      opened: the header.
      hashed: takes every byte of the file in order, ``hashlib.sha256().update`` for instance, so that reading and
        hashing are one pass. It has taken all of them when the iteration has ended.
    """
    with opened.path.open("rb", buffering=0) as file:

        def pass_over(end: int) -> None:
            # What lies before the first tensor (the header), between tensors, and behind the last one.
            while hashed and (missing := end - file.tell()) > 0 and (piece := file.read(min(missing, 2**24))):
                hashed(piece)

        # By begin, and by size because tensors without a number begin where the next one does.
        for name in sorted(opened.facts, key=lambda name: (opened.begin[name], opened.facts[name].nbytes)):
            pass_over(opened.begin[name])
            file.seek(opened.begin[name])
            tensor = read_tensor(file, opened, name)
            if hashed:
                hashed(bytes_of(tensor))
            yield name, tensor
            del tensor  # before the next one is made: this one is the caller's
        pass_over(opened.path.stat().st_size)


def read_tensor(file: io.FileIO, opened: Header, name: str) -> np.ndarray:
    """Reads a tensor from where the file stands, into memory of its own."""
    fact = opened.facts[name]
    # Begun at a multiple of 64 bytes, it can be handed to a CPU device as it lies; elsewhere it would be there twice.
    memory = np.empty(fact.nbytes + 64, np.uint8)
    tensor = memory[-memory.ctypes.data % 64 :][: fact.nbytes].view(fact.dtype).reshape(fact.shape)
    view = bytes_of(tensor)
    while view:
        count = file.readinto(view)
        if not count:  # raw reads may come in pieces, but an empty one is the end
            raise FileError(f"{opened.path} was cut short while it was read, at {name!r}.")
        view = view[count:]
    return tensor


def bytes_of(tensor: np.ndarray) -> memoryview:
    """Returns the bytes of an array as a file holds them."""
    # Through uint8: a 0-d or bfloat16 array has no buffer of its own.
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
