"""Safetensors files, tensor by tensor.

The library maps a file into memory or takes all tensors at once; either way a process that
converts 10 GB is charged for 20. Here the header is read, then one tensor at a time by seek
and read, and written the same way, so that a conversion holds one tensor of each side.

Format: 8 bytes little-endian header length; a JSON header, name -> dtype, shape and the
tensor's begin and end after the header; the data (huggingface/safetensors:README.md).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from wovr_jax.weights.keymap import Fact
from wovr_jax.weights.transforms import Shape

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


class FileError(ValueError):
    """A file of weights that is missing, damaged, or not of the format its name promises."""


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


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened file, or set of shards; nothing but headers was read.

    Attributes:
      name: for messages.
      facts: name without prefix -> shape and dtype.
      read: name without prefix -> the tensor.
      doubled: names that are there more than once.
      prefix: what stood before every name.
      container: key under which a ``.pth`` kept its state dict.
      others: what a ``.pth`` held beside it.
      config: the ``config.json`` beside the file, or None.
      files: what was opened: the file, or the shards and their index.
    """

    name: str
    facts: dict[str, Fact]
    read: Callable[[str], np.ndarray]
    doubled: list[str] = dataclasses.field(default_factory=list)
    prefix: str = ""
    container: str | None = None
    others: list[str] = dataclasses.field(default_factory=list)
    config: dict[str, Any] | None = None
    files: tuple[pathlib.Path, ...] = ()

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: fact.shape for name, fact in self.facts.items()}


def header(path: str | os.PathLike) -> Header:
    """Reads and checks the header.

    Raises:
      FileError: no such file, no safetensors, cut short, or with data that do not add up.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileError(f"{path}: no such file.")
    refuse_pointer(path)
    size, doubled = path.stat().st_size, []

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in found]
        doubled.extend(
            sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        )
        return dict(found)

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(HEADER_BYTES, size - 8):
            raise FileError(f"{path} is not a safetensors file, or cut short: its header would be {length} bytes long.")
        try:
            described = json.loads(file.read(length), object_pairs_hook=pairs)
        except ValueError as error:
            raise FileError(f"{path} is not a safetensors file: its header is not JSON ({error}).") from error
    metadata = described.pop("__metadata__", {})
    facts, begin = {}, {}
    for name, entry in described.items():
        facts[name], begin[name] = _entry(path, name, entry, 8 + length, size)
    return Header(path, facts, begin, doubled, metadata)


def _entry(path: pathlib.Path, name: str, entry: Mapping[str, Any], start: int, size: int) -> tuple[Fact, int]:
    try:
        dtype, shape, (begin, end) = _CODES[entry["dtype"]], tuple(map(int, entry["shape"])), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"{path}: the header's entry for {name!r} cannot be read: {entry}.") from error
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise FileError(f"{path}: {name!r} is {entry['dtype']}{list(shape)} but has {end - begin} bytes.")
    if start + end > size:
        raise FileError(f"{path} is cut short: {name!r} ends at byte {start + end}, the file at {size}. Copy it again.")
    return Fact(shape, dtype), start + begin


def refuse_pointer(path: pathlib.Path) -> None:
    """Raises for the small text that git leaves in the place of a large file that was not downloaded."""
    with path.open("rb") as file:
        if file.read(len(LFS)) == LFS:
            raise FileError(f"{path} is a pointer of Git LFS, not the weights: fetch them with `git lfs pull`.")


def read(found: Header, name: str) -> np.ndarray:
    """One tensor, in memory of its own."""
    array = np.empty(found.facts[name].shape, found.facts[name].dtype)
    with found.path.open("rb", buffering=0) as file:
        file.seek(found.begin[name])
        view = array.reshape(-1).view(np.uint8).data  # a 0-d or bfloat16 array has no buffer of its own
        while view:
            count = file.readinto(view)
            if not count:
                raise FileError(f"{found.path} was cut short while it was read, at {name!r}.")
            view = view[count:]
    return array


def write(
    path: str | os.PathLike,
    facts: Mapping[str, Fact],
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file from tensors that come one after another, in any order.

    Args:
      path: the file, which must not be one that is worth keeping: use :func:`beside`.
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
            file.seek(begin[name])
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        file.truncate(size)
    if waiting:
        raise ValueError(f"{path}: {len(waiting)} tensors did not come, {min(waiting)!r} among them")


def layout(facts: Mapping[str, Fact], metadata: Mapping[str, str] | None) -> tuple[bytes, dict[str, int], int]:
    """The bytes before the data, where each tensor begins, and the size of the file."""
    order = sorted(facts, key=lambda name: (-facts[name].dtype.itemsize, name))  # widest first keeps data aligned
    described: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin, at = {}, 0
    for name in order:
        shape, dtype = facts[name]
        end = at + math.prod(shape) * dtype.itemsize
        described[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        begin[name], at = at, end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + at for name, at in begin.items()}, start + at


def beside(path: pathlib.Path) -> pathlib.Path:
    """Where the file is made before it is renamed into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f"{path.name}.new")
