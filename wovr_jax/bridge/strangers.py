"""What lies where weights are expected and is none: said by what it is, and with what to do about it.

A clone without Git LFS, a download that ended in a login page, a file that one may not open, a checkpoint that its
trainer left in pieces: a reader of weights would call each of them damaged.
"""

from __future__ import annotations

import os
import pathlib
import re
from typing import Any

from wovr_jax.core import disk
from wovr_jax.weights.safetensors import FileError, refuse_pointer

TORCH = (".pt", ".pth", ".bin", ".ckpt")
"""Endings under which trainers keep what ``torch.save`` writes."""

READABLE = """
  What is read:
    .safetensors             alone, or shards with an index
    .pt  .pth  .bin  .ckpt   a state dict of torch, such as RLinf's full_weights.pt; the last two alone or in shards
  Anything else: load it where it was written and call torch.save(model.state_dict(), "full_weights.pt"), or
  model.save_pretrained(FOLDER), and give that."""
"""Is put behind a message about a file of another kind."""

_SIGNS: tuple[tuple[bytes, str], ...] = (
    (rb"# xet version", "a pointer of Git Xet, not the file itself: fetch it with `git xet` or download it"),
    (rb"(\.git)?/?annex/objects/", "a pointer of git-annex, not the file itself: fetch it with `git annex get`"),
    (rb"(?i)\s*(<!doctype html|<html|<\?xml)", "a web page: the download was answered with one. Log in and repeat it"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|\x28\xb5\x2f\xfd", "a compressed archive: unpack it first"),
    (rb"\x89HDF", "an HDF5 file"),
    (rb"\x93NUMPY", "an array of NumPy"),
    (rb"GGUF", "a GGUF file, whose weights are quantised"),
)
_PIECES: tuple[tuple[str, str], ...] = (
    (
        r"__\d+_\d+\.distcp|\.metadata",
        "a distributed checkpoint of torch in pieces: "
        "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER full_weights.pt",
    ),
    (
        r"(model|optim|extra_state)_world_size_\d+_rank_\d+\.pt",
        "an FSDP checkpoint in one piece a process, as verl leaves it: merge it with verl's model_merger",
    ),
    (
        r"(zero_pp_rank_\d+_)?mp_rank_\d+_(model|optim)_states\.pt",
        "a checkpoint of DeepSpeed in pieces: merge it with the zero_to_fp32.py beside it",
    ),
)


def refuse(path: pathlib.Path) -> None:
    """Raises for a file that cannot be opened, and for one whose beginning or name says that it is something else.

    Raises:
      FileError: with what it is and what to do.
    """
    try:
        refuse_pointer(path)
        with path.open("rb") as file:
            begin = file.read(512)
    except OSError as error:
        raise FileError(
            f"{path} cannot be opened: {error.strerror or error}. Give this user the right to read it, or copy it."
        ) from error
    if why := piece(path.name):
        raise FileError(f"{path} is part of {why}.")
    if not begin:
        raise FileError(f"{path} is empty: the copy or download was interrupted. Repeat it.")
    for sign, what in _SIGNS:
        if re.match(sign, begin):
            raise FileError(f"{path} is {what}.{READABLE if what.startswith('an ') else ''}")
    # The two formats under each other's names: the ending decides who reads a file.
    is_torch, is_zip = path.suffix in TORCH, begin.startswith(b"PK\x03\x04")
    if is_torch and re.match(rb".{6}\x00\x00\{", begin, re.DOTALL):
        raise FileError(f"{path} is a safetensors file under another name: rename it to {path.stem}.safetensors.")
    if path.suffix == ".safetensors" and (is_zip or re.match(rb"\x80[\x02-\x05]", begin)):
        raise FileError(f"{path} is what torch.save writes, under another name: rename it to {path.stem}.pt.")


def piece(name: str) -> str | None:
    """Returns what a file of that name is a part of, where a trainer left its checkpoint in pieces."""
    return next((what for pattern, what in _PIECES if re.fullmatch(pattern, name)), None)


def read_settings(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a JSON object that somebody else wrote.

    Raises:
      FileError: not there, not to be opened, not JSON, or no object.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileError(f"{path}: no such file.")
    refuse(path)
    try:
        return dict(disk.read_json(path))
    except (OSError, ValueError, TypeError) as error:
        raise FileError(f"{path} cannot be read as JSON settings: {error}.") from error
