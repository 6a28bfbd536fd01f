"""Weights that are opened but not read: a file, a set of shards, or our own form, whose tensors are read one by one."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from wovr_jax.core import disk
from wovr_jax.weights import native, safetensors
from wovr_jax.weights.safetensors import Fact


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
      notes: what was believed when it was opened, in sentences.
      warnings: what looked odd.
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
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name without prefix -> shape."""
        return {name: fact.shape for name, fact in self.facts.items()}


def read_header(path: str | os.PathLike) -> tuple[safetensors.Header, list[str]]:
    """Reads and checks the header of a file of somebody else; also returns the names that it gives more than once."""
    doubled: list[str] = []

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # JSON allows a name twice and Python keeps the last, so they are counted here.
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            doubled.extend(sorted({name for name in names if names.count(name) > 1}))
        return dict(pairs)

    return safetensors.header(path, to_dict), doubled


def read_by_name(opened: safetensors.Header, name: str) -> np.ndarray:
    """Reads one tensor, into memory of its own."""
    with opened.path.open("rb", buffering=0) as file:
        file.seek(opened.begin[name])
        return safetensors.read_tensor(file, opened, name)


def is_native(path: pathlib.Path) -> bool:
    """Returns whether ``path`` is the json of our own form."""
    whole = path.suffix == ".json" and path.is_file() and path.with_suffix(".safetensors").is_file()
    # A release has a config.json beside its weights too; ours alone says of which class the config is.
    return whole and '"config_class"' in path.read_text(encoding="utf-8", errors="replace")


def open_native(path: str | os.PathLike, *, verify: bool = False) -> tuple[Any, Source, dict[str, Any]]:
    """Opens weights without reading them.

    Args:
      path: the json.
      verify: also compare the SHA-256, which reads the whole file.

    Returns:
      the config, the leaves as a source with paths for names, and all that the json says.

    Raises:
      FileError: a file is missing, damaged, or not of this form.
      config.ConfigError: the config's class no longer has the fields.
    """
    path = pathlib.Path(path)
    about = native.describe(path)
    weights = path.with_suffix(".safetensors")
    if verify:  # a pass of its own: whoever opens a source reads its leaves in any order
        native.compare_digest(path, about, disk.sha256(weights))
    cfg = native.read_config(path, about)
    opened = safetensors.header(weights)
    facts = {name.replace(".", "/"): fact for name, fact in opened.facts.items()}
    return cfg, Source(str(path), facts, lambda leaf: read_by_name(opened, leaf.replace("/", "."))), about
