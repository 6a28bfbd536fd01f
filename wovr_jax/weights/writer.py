"""Writing of weights, leaf by leaf, for imports and exports of networks that no host holds twice; not part of training.

The form of a safetensors file is in ``safetensors``, that of our own weights in ``native``.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from wovr_jax.weights import native
from wovr_jax.weights.safetensors import CODES, Fact, bytes_of

Progress = Callable[[int], None]
"""Takes the bytes of each leaf or tensor once it is done."""

_NAMES = {dtype: code for code, dtype in CODES.items()}


def write_native(
    folder: str | os.PathLike,
    name: str,
    cfg: Any,
    facts: Mapping[str, Fact],
    leaves: Iterable[tuple[str, np.ndarray]],
    about: Mapping[str, Any],
) -> pathlib.Path:
    """Writes both files of our own form, whole or not at all, and returns the json's path.

    Args:
      folder, name, cfg, about: as for ``native.write``.
      facts: path -> shape and dtype of every leaf.
      leaves: the leaves, in any order.
    """
    dotted = {path.replace("/", "."): fact for path, fact in facts.items()}
    tensors = ((path.replace("/", "."), leaf) for path, leaf in leaves)
    parameters = sum(fact.size for fact in facts.values())
    return native.write(folder, name, cfg, parameters, about, lambda fresh: write(fresh, dotted, tensors))


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
            file.write(bytes_of(tensor))
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
