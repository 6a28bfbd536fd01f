"""Files of weights as they are found: single safetensors, shards with an index, ``.pth``, and folders of those."""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import re
from typing import Any

from wovr_jax.bridge import torch_io
from wovr_jax.core import disk
from wovr_jax.weights.safetensors import FileError
from wovr_jax.weights.source import Source, read_by_name, read_header

PREFIXES = ("pipe.dit.", "model.diffusion_model.", "model.")
"""What training scripts put before every name of a network; the first that fits counts."""

INDEX = ".safetensors.index.json"
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.safetensors$)")


def find(path: str | os.PathLike) -> list[pathlib.Path]:
    """Lists what can be opened at ``path``: itself if it is a file; in a folder every set of weights, one entry each.

    The folders ``transformer`` and ``vae`` of a diffusers pipeline are looked into. A set of
    shards is its index, or its first shard where there is no index.

    Raises:
      FileError: nothing there.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileError(f"{path}: no such file or folder.")
    sets: dict[str, pathlib.Path] = {}
    for folder in (path, path / "transformer", path / "vae"):
        # An index comes first, and its shards are then no entries of their own.
        files = sorted(folder.glob("*")) if folder.is_dir() else []
        for file in sorted(files, key=lambda file: not file.name.endswith(INDEX)):
            if file.name.endswith((INDEX, ".safetensors", ".pth")):
                stem = _SHARD.sub("", file.name).removesuffix(".index.json")
                sets.setdefault(str(folder / stem), file)
    if not sets:
        raise FileError(f"{path}: no .safetensors and no .pth in it, nor in transformer/ or vae/ below it.")
    return list(sets.values())


def open_source(path: str | os.PathLike) -> Source:
    """Opens one entry of :func:`find`.

    Raises:
      FileError: damaged, incomplete, or not weights.
    """
    path = pathlib.Path(path).expanduser()
    # By the name: a .pth is opened by torch, which must not be asked to guess.
    if path.suffix == ".pth":
        source = _open_pth(path)
    elif path.name.endswith((INDEX, ".safetensors")):
        source = _open_safetensors(path, _shards(path))
    else:
        raise FileError(f"{path}: expected a .safetensors file, an index of shards ({INDEX}) or a .pth file.")
    return _without_prefix(dataclasses.replace(source, config=_config(path.with_name("config.json"))))


def _config(path: pathlib.Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return dict(disk.read_json(path))
    except (ValueError, TypeError) as error:
        raise FileError(f"{path} cannot be read as JSON settings: {error}.") from error


def _open_pth(path: pathlib.Path) -> Source:
    state = torch_io.load(path)
    facts = {name: torch_io.fact(tensor) for name, tensor in state.tensors.items()}
    return Source(
        str(path),
        facts,
        lambda name: torch_io.to_numpy(state.tensors[name]),
        container=state.container,
        others=state.others,
        files=(path,),
    )


def _shards(path: pathlib.Path) -> list[pathlib.Path]:
    """Lists the files that belong to ``path``, which is an index, one of the shards, or a file alone."""
    if path.name.endswith(INDEX):
        return sorted({path.with_name(name) for name in _weight_map(path).values()})
    if not (shard := _SHARD.search(path.name)):
        return [path]
    index = path.with_name(_SHARD.sub("", path.name).removesuffix(".safetensors") + INDEX)
    if index.is_file():
        return _shards(index)
    count = int(shard[0][-5:])  # "-00001-of-00003": without an index, the names themselves say how many there are
    names = [path.name.replace(shard[0], f"-{i + 1:05d}-of-{count:05d}") for i in range(count)]
    return [path.with_name(name) for name in names]


def _open_safetensors(path: pathlib.Path, files: list[pathlib.Path]) -> Source:
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise FileError(f"{path}: {len(absent)} of its {len(files)} shards are not there: {', '.join(absent)}.")
    headers, twice = zip(*(read_header(file) for file in files), strict=True)
    # A name in two shards would silently be the later one; the plan reports it.
    home = {name: header for header in headers for name in header.facts}
    counts = collections.Counter(name for header in headers for name in header.facts)
    doubled = {name for name, count in counts.items() if count > 1}.union(*twice)
    if path.name.endswith(INDEX):
        # An index that was copied without its shards, or the other way round, would mix two sets of weights.
        listed = _weight_map(path)
        wrong = [name for name, file in listed.items() if name not in home or home[name].path.name != file]
        wrong = sorted({*wrong, *(home.keys() - listed.keys())} - doubled)
        if wrong:
            raise FileError(f"{path} and its shards disagree about {len(wrong)} tensors, {wrong[0]!r} among them.")
    facts = {name: header.facts[name] for name, header in home.items()}
    opened = tuple(dict.fromkeys((path, *files)))
    return Source(str(path), facts, lambda name: read_by_name(home[name], name), sorted(doubled), files=opened)


def _weight_map(path: pathlib.Path) -> dict[str, str]:
    try:
        listed = disk.read_json(path)["weight_map"]
        return {str(name): pathlib.PurePath(file).name for name, file in listed.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise FileError(f"{path} is not an index of shards: it has no weight_map ({error}).") from error


def _without_prefix(source: Source) -> Source:
    # Only a prefix that every name has is one: a network may have a part that is called "model".
    whole = (prefix for prefix in PREFIXES if source.facts and all(name.startswith(prefix) for name in source.facts))
    prefix = next(whole, "")
    return dataclasses.replace(
        source,
        facts={name.removeprefix(prefix): fact for name, fact in source.facts.items()},
        read=lambda name: source.read(prefix + name),
        doubled=[name.removeprefix(prefix) for name in source.doubled],
        prefix=prefix,
    )
