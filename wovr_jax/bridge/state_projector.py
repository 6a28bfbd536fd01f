"""The projector of the robot's state, which OpenVLA-OFT keeps beside the weights: ``proprio_projector--*.pt``.

An import that asks for it reads its tensors as if they lay among the weights, under ``proprio_projector.``; an export
writes them into a file of that name again. The file is a state dict, sometimes of a module wrapped for several
processes (``module.`` before every name).
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from wovr_jax.bridge import sources, torch_io
from wovr_jax.core import disk
from wovr_jax.policy.weights import STATE
from wovr_jax.weights.safetensors import FileError
from wovr_jax.weights.source import Source

PATTERN, NAMES = "proprio_projector--*.pt", f"{STATE}."


def join(source: Source) -> tuple[Source, dict[str, str]]:
    """Returns ``source`` with the projector's tensors among its own, and what an export needs to write the file back.

    Raises:
      FileError: not exactly one such file beside the weights.
    """
    folder = source.files[0].parent
    files = sorted(folder.glob(PATTERN))
    if len(files) != 1:
        named = ", ".join(file.name for file in files) or "none"
        raise FileError(f"{folder}: expected one {PATTERN}, the projector of the robot's state; there is: {named}.")
    # What wrapped the module when it was saved is before every name; it is put back on export.
    held = sources.open_source(files[0])
    facts = {NAMES + name: fact for name, fact in held.facts.items()}

    # One source for both files, so that the plan sees all tensors of the policy at once.
    def read(name: str) -> np.ndarray:
        return held.read(name.removeprefix(NAMES)) if name in facts else source.read(name)

    both = dataclasses.replace(
        source,
        facts={**source.facts, **facts},
        read=read,
        files=(*source.files, files[0]),
        notes=(*source.notes, *held.notes),
        warnings=(*source.warnings, *held.warnings),
    )
    return both, {"file": files[0].name, "prefix": held.prefix}


class Splitter:
    """Takes the projector's tensors out of an export's stream and writes them into their file."""

    def __init__(self, origin: Mapping[str, Any]):
        self.file, self.prefix = origin["file"], origin["prefix"]
        self._tensors: dict[str, np.ndarray] = {}

    def without(self, stream: Iterator[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the other tensors, in their order."""
        for name, tensor in stream:
            if name.startswith(NAMES):
                self._tensors[self.prefix + name.removeprefix(NAMES)] = tensor
            else:
                yield name, tensor

    def write(self, folder: pathlib.Path, rest: Iterator[tuple[str, np.ndarray]]) -> pathlib.Path:
        """Writes the file; ``rest`` is what is left of :meth:`without`, in which the last of them may come."""
        collections.deque(rest, maxlen=0)  # runs the stream to its end
        with disk.replace_file(folder / self.file) as fresh:
            torch_io.save(fresh, self._tensors.items())
        return folder / self.file
