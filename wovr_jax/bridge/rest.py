"""What stands beside a network's weights in a release, and what an export puts back.

An import keeps it in the folder ``<name>.rest``: ``tensors.safetensors`` holds the tensors that the
network does not use, under their own names, and ``files`` the other files of the release as they are
(config, tokenizer, statistics, code). Nothing in them is run or read by this package.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from wovr_jax.weights import tensors
from wovr_jax.weights.keymap import Fact
from wovr_jax.weights.tensors import FileError

TENSORS, FILES = "tensors.safetensors", "files"
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
"""Files that an export writes new; as other files of a release they would be the old weights."""


def other_files(weights: Iterable[pathlib.Path]) -> list[pathlib.Path]:
    """All files of a release but its weights, relative to its folder. Hidden folders are left out, hidden files not."""
    weights = list(weights)
    if not weights:
        return []
    folder, own = weights[0].parent, {file.name for file in weights}
    found = []
    for at, inside, names in os.walk(folder):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        below = pathlib.Path(at).relative_to(folder)
        is_top = below == pathlib.Path()
        found += [below / name for name in sorted(names) if not (is_top and (name in own or WEIGHTS.fullmatch(name)))]
    return found


def write(
    folder: pathlib.Path,
    facts: Mapping[str, Fact],
    kept: Iterable[tuple[str, np.ndarray]],
    source: pathlib.Path,
    files: Iterable[pathlib.Path],
) -> dict[str, str]:
    """Fills ``folder``, which is made and must not be worth keeping, and returns the SHA-256 of every file in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tensors.write(folder / TENSORS, facts, kept)
    for file in files:
        (folder / FILES / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, folder / FILES / file)  # of a link, what it leads to
    return {file.as_posix(): _digest(folder / file) for file in _all_files(folder)}


def replace(fresh: pathlib.Path, folder: pathlib.Path) -> None:
    """Puts a filled folder where it belongs."""
    shutil.rmtree(folder, ignore_errors=True)
    fresh.replace(folder)


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
            fresh = tensors.beside(to / file)
            shutil.copyfile(self.folder / FILES / file, fresh)
            fresh.replace(to / file)
        return [to / file for file in self.files]


def open_rest(folder: pathlib.Path, digests: Mapping[str, str]) -> Rest:
    """Opens what an import kept; ``digests`` as :func:`write` returned them.

    Raises:
      FileError: a file is missing, changed, or was put there later.
    """
    there = {file.as_posix() for file in _all_files(folder)} if folder.is_dir() else set()
    wrong = sorted(there ^ digests.keys()) + [
        name for name in sorted(there & digests.keys()) if _digest(folder / name) != digests[name]
    ]
    if wrong:
        raise FileError(
            f"{folder} is not as the import left it: {len(wrong)} files are missing, new or changed, {wrong[0]} among "
            "them. Import the release again."
        )
    found = tensors.header(folder / TENSORS)
    files = [pathlib.Path(name).relative_to(FILES) for name in digests if name != TENSORS]
    return Rest(folder, found.facts, lambda name: tensors.read(found, name), files)


def _all_files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
