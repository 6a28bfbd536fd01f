"""What stands beside a network's weights in a release, and what an export puts back.

An import keeps it in the folder ``<name>.rest``: ``tensors.safetensors`` holds the tensors that the
network does not use, under their own names, and ``files`` the other files of the release as they are
(config, tokenizer, statistics, code). Nothing in them is run or read by this package.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from wovr_jax.core import disk
from wovr_jax.weights import safetensors, writer
from wovr_jax.weights.safetensors import Fact, FileError
from wovr_jax.weights.source import read_by_name

TENSORS, FILES = "tensors.safetensors", "files"
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
"""Files that an export writes new; as other files of a release they would be the old weights."""
OTHER_WEIGHTS = re.compile(r"pytorch_model(-\d{5}-of-\d{5})?\.bin|pytorch_model\.bin\.index\.json|full_weights\.pt")
"""The same network as torch or RLinf saves it: not copied either."""


def folder_name(name: str) -> str:
    """Returns the name of the folder beside ``<name>.json`` that holds what an import kept."""
    return f"{name}.rest"


def is_weights(name: str) -> bool:
    """Returns whether a file at the top of a release holds the network itself, by its name."""
    return bool(WEIGHTS.fullmatch(name) or OTHER_WEIGHTS.fullmatch(name))


def other_files(weights: Iterable[pathlib.Path]) -> list[pathlib.Path]:
    """Lists all files of a release but its weights, relative to its folder.

    Hidden folders are left out (a clone's ``.git`` would be copied whole), hidden files are not.
    """
    weights = list(weights)
    if not weights:
        return []
    folder, own = weights[0].parent, {file.name for file in weights}
    files = []  # names relative to the release, in an order that does not depend on the file system
    for at, inside, names in os.walk(folder):
        inside[:] = sorted(name for name in inside if not name.startswith("."))  # os.walk goes where this list says
        below = pathlib.Path(at).relative_to(folder)
        is_top = below == pathlib.Path()
        files += [below / name for name in sorted(names) if not (is_top and (name in own or is_weights(name)))]
    return files


def write(
    folder: pathlib.Path,
    facts: Mapping[str, Fact],
    kept: Iterable[tuple[str, np.ndarray]],
    source: pathlib.Path,
    files: Iterable[pathlib.Path],
) -> dict[str, str]:
    """Fills the empty ``folder`` and returns the SHA-256 of every file in it.

    Args:
      folder: made by :func:`core.disk.fresh_folder`.
      facts: name -> shape and dtype of the tensors to keep.
      kept: those tensors, one after another.
      source: folder of the release.
      files: to copy, relative to ``source``.
    """
    writer.write(folder / TENSORS, facts, kept)
    for file in files:
        (folder / FILES / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, folder / FILES / file)  # of a link, what it leads to
    return {file.as_posix(): disk.sha256(folder / file) for file in _all_files(folder)}


@dataclasses.dataclass(frozen=True)
class Rest:
    """An opened folder of this kind.

    Attributes:
      folder: where it is.
      facts: name -> shape and dtype of the kept tensors.
      read: name -> the tensor.
      files: the other files, relative to ``folder / FILES``.
    """

    folder: pathlib.Path
    facts: dict[str, Fact]
    read: Callable[[str], np.ndarray]
    files: list[pathlib.Path]

    def copy_files(self, to: pathlib.Path) -> list[pathlib.Path]:
        """Writes the other files into ``to``, byte for byte, each whole or not at all."""
        for file in self.files:
            with disk.replace_file(to / file) as fresh:
                shutil.copyfile(self.folder / FILES / file, fresh)
        return [to / file for file in self.files]


def open_rest(folder: pathlib.Path, digests: Mapping[str, str]) -> Rest:
    """Opens what an import kept; ``digests`` as :func:`write` returned them.

    Raises:
      FileError: a file is missing, changed, or was put there later.
    """
    # Files that came later count too: an export copies all of them into a folder that torch runs code from.
    names = {file.as_posix() for file in _all_files(folder)} if folder.is_dir() else set()
    wrong = sorted(names ^ digests.keys()) + [
        name for name in sorted(names & digests.keys()) if disk.sha256(folder / name) != digests[name]
    ]
    if wrong:
        raise FileError(
            f"{folder} is not as the import left it: {len(wrong)} files are missing, new or changed, {wrong[0]} among "
            "them. Import the release again."
        )
    opened = safetensors.header(folder / TENSORS)
    files = [pathlib.Path(name).relative_to(FILES) for name in digests if name != TENSORS]
    return Rest(folder, opened.facts, lambda name: read_by_name(opened, name), files)


def _all_files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
