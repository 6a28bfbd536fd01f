"""Files of weights as they are found: safetensors and what torch saves, alone, in shards, and in folders of those.

What training leaves in the names is taken off here: wrappers that torch.compile, DistributedDataParallel and FSDP put
around a network when it was saved, and whatever else stands before every name.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
import pathlib
import re
from collections.abc import Iterable, Iterator

from wovr_jax.bridge import strangers, torch_io
from wovr_jax.bridge.formats import FORMATS
from wovr_jax.bridge.strangers import READABLE, TORCH
from wovr_jax.weights.safetensors import FileError
from wovr_jax.weights.source import Source, read_by_name, read_header

PREFIXES = ("pipe.dit.", "model.diffusion_model.", "model.", "module.")
"""What training scripts put before every name of a network, often several of them."""

WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning Fabric",
}
"""Part of a name, wherever it stands -> what wrapped the layer when it was saved."""

BESIDE = re.compile(
    r".+--.+_checkpoint\.pt|adapter_model\..+|training_args\.bin|trainer_state\..+"
    r"|(optimizer|scheduler|rng_state|scaler|random_states)(_?\d+)?\.(pt|pth|bin|pkl)"
)
"""Files of a training's folder that end as weights do and are not those of a network of ours."""

INDEX = ".safetensors.index.json"
_INDICES = (INDEX, ".bin.index.json")
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.(safetensors|bin)$)")
_DEPTH, _FOLDERS = 5, 500
"""How far below a folder without weights some are looked for, and in how many folders."""


def find(path: str | os.PathLike) -> list[pathlib.Path]:
    """Lists what can be opened at ``path``: itself if it is a file; in a folder every set of weights, one entry each.

    The folders ``transformer`` and ``vae`` of a diffusers pipeline are looked into. A set of
    shards is its index, or its first shard where there is no index.

    Raises:
      FileError: nothing there; weights that lie deeper are named, and checkpoints in pieces.
    """
    path = pathlib.Path(path).expanduser()
    try:
        if path.is_file():
            return [path]
        if not path.is_dir():
            raise FileError(f"{path}: no such file or folder.")
        sets = _sets(path) | _sets(path / "transformer") | _sets(path / "vae")
        if not sets:
            raise FileError(
                f"{path}: no .safetensors and no .pth in it, nor in transformer/ or vae/ below it.{_hint(path)}"
            )
    except OSError as error:
        raise FileError(f"{error.filename or path} cannot be opened: {error.strerror or error}.") from error
    return list(sets.values())


def _sets(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns stem -> file of every set of weights in a folder."""
    sets: dict[str, pathlib.Path] = {}
    # An index comes first, and its shards are then no entries of their own.
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    for file in sorted(files, key=lambda file: not file.name.endswith(_INDICES)):
        is_weights = file.name.endswith((*_INDICES, ".safetensors", *TORCH)) and not BESIDE.fullmatch(file.name)
        if is_weights and not strangers.piece(file.name):
            stem = _SHARD.sub("", file.name).removesuffix(".index.json")
            sets.setdefault(str(folder / stem), file)
    return sets


def _hint(folder: pathlib.Path) -> str:
    """Says what a folder without weights has instead, and where below it some are."""
    deeper, pieces = [], {}
    # Breadth first: what is nearest is most likely meant, and a whole disk is not searched.
    level, seen = [folder], 0
    for _ in range(_DEPTH):
        level = [below for at in level for below in sorted(at.iterdir()) if below.is_dir()] if level else []
        level = level[: max(0, _FOLDERS - seen)]
        seen += len(level)
        deeper += [
            f"{at} ({', '.join(sorted(file.name for file in sets.values()))})" for at in level if (sets := _sets(at))
        ]
        pieces |= _pieces([*level, folder])
    if deeper:
        more = f" and {len(deeper) - 5} more" if len(deeper) > 5 else ""
        return f" There are weights deeper; name the folder that is meant: {'; '.join(deeper[:5])}{more}."
    if pieces:
        return " " + " ".join(f"{at} holds {what}." for at, what in pieces.items())
    if (folder / "adapter_config.json").is_file():
        return " It is a folder of LoRA adapters: name the policy's folder, and this one with --adapter-folder."
    return READABLE


def _pieces(folders: Iterable[pathlib.Path]) -> dict[pathlib.Path, str]:
    found = ((at, strangers.piece(file.name)) for at in folders for file in at.iterdir())
    return {at: what for at, what in found if what}


def open_source(path: str | os.PathLike, *, cut: bool = True) -> Source:
    """Opens one entry of :func:`find`.

    Args:
      path: the file or index.
      cut: whether what stands before every name is taken off.

    Raises:
      FileError: damaged, incomplete, or not weights.
    """
    path = pathlib.Path(path).expanduser()
    if not path.name.endswith((*_INDICES, ".safetensors", *TORCH)):
        if path.is_file():
            strangers.refuse(path)
        endings = f"a .safetensors file, an index of shards ({INDEX}) or a file that torch saved ({', '.join(TORCH)})"
        raise FileError(f"{path}: expected {endings}.{READABLE}")
    source = _open_files(path, _shards(path))
    config = path.with_name("config.json")
    described = strangers.read_settings(config) if config.is_file() else None
    return unwrap(dataclasses.replace(source, config=described), cut)


def _open(path: pathlib.Path) -> Source:
    """Opens one file. By its name: what torch wrote is opened by torch, which must not be asked to guess."""
    if path.is_file():
        strangers.refuse(path)
    if path.suffix in TORCH:
        state = torch_io.load(path)
        facts = {name: torch_io.fact(tensor) for name, tensor in state.tensors.items()}
        return Source(
            str(path),
            facts,
            lambda name: torch_io.to_numpy(state.tensors[name]),
            container=state.container,
            others=state.others,
            warnings=tuple(f"{path.name} {text}" for text in state.warnings),
            files=(path,),
        )
    header, doubled = read_header(path)
    said = {name: value for name, value in header.metadata.items() if name != "format"}
    notes = [f"{path.name} says of itself: {', '.join(f'{name} {value!r:.80}' for name, value in said.items())}"]
    layout = header.metadata.get("format", "pt")
    odd = [f"{path.name} says that {layout!r} wrote it, not torch: its layouts may be others"] if layout != "pt" else []
    return Source(
        str(path),
        header.facts,
        lambda name: read_by_name(header, name),
        doubled,
        notes=tuple(notes if said else []),
        warnings=tuple(odd),
        files=(path,),
    )


def _shards(path: pathlib.Path) -> list[pathlib.Path]:
    """Lists the files that belong to ``path``, which is an index, one of the shards, or a file alone."""
    if path.name.endswith(_INDICES):
        return sorted({path.with_name(name) for name in _weight_map(path).values()})
    if not (shard := _SHARD.search(path.name)):
        return [path]
    index = path.with_name(f"{_SHARD.sub('', path.name)}.index.json")
    if index.is_file():
        return _shards(index)
    count = int(shard[0][-5:])  # "-00001-of-00003": without an index, the names themselves say how many there are
    names = [path.name.replace(shard[0], f"-{i + 1:05d}-of-{count:05d}") for i in range(count)]
    return [path.with_name(name) for name in names]


def _open_files(path: pathlib.Path, files: list[pathlib.Path]) -> Source:
    if files == [path]:
        return _open(path)
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise FileError(f"{path}: {len(absent)} of its {len(files)} shards are not there: {', '.join(absent)}.")
    opened = [_open(file) for file in files]
    # A name in two shards would silently be the later one; the plan reports it.
    home = {name: source for source in opened for name in source.facts}
    counts = collections.Counter(name for source in opened for name in source.facts)
    doubled = {name for name, count in counts.items() if count > 1}.union(*(source.doubled for source in opened))
    if path.name.endswith(_INDICES):
        # An index that was copied without its shards, or the other way round, would mix two sets of weights.
        listed = _weight_map(path)
        wrong = [name for name, file in listed.items() if name not in home or home[name].files[0].name != file]
        wrong = sorted({*wrong, *(home.keys() - listed.keys())} - doubled)
        if wrong:
            raise FileError(f"{path} and its shards disagree about {len(wrong)} tensors, {wrong[0]!r} among them.")
    return Source(
        str(path),
        {name: source.facts[name] for name, source in home.items()},
        lambda name: home[name].read(name),
        sorted(doubled),
        container=opened[0].container,
        others=list(dict.fromkeys(itertools.chain.from_iterable(source.others for source in opened))),
        notes=tuple(dict.fromkeys(itertools.chain.from_iterable(source.notes for source in opened))),
        warnings=tuple(dict.fromkeys(itertools.chain.from_iterable(source.warnings for source in opened))),
        files=tuple(dict.fromkeys((path, *files))),
    )


def _weight_map(path: pathlib.Path) -> dict[str, str]:
    listed = strangers.read_settings(path)
    try:
        return {str(name): pathlib.PurePath(file).name for name, file in listed["weight_map"].items()}
    except (KeyError, AttributeError, TypeError) as error:
        raise FileError(f"{path} is not an index of shards: it has no weight_map ({error}).") from error


def unwrap(source: Source, cut: bool = True) -> Source:
    """Returns the source under the names that its network has, without what training put around and before them."""
    plain, wrappers = {}, set()
    for name in source.facts:
        parts = name.split(".")
        wrappers |= WRAPPERS.keys() & set(parts)
        plain[name] = ".".join(part for part in parts if part not in WRAPPERS)
    for prefix in _prefixes(list(plain.values())) if cut else ():
        plain = {name: short.removeprefix(prefix) for name, short in plain.items()}
    counts = collections.Counter(plain.values())
    back = {short: name for name, short in plain.items()}
    # The same before every name can be put back by an export; what stood within names cannot.
    starts = {name.removesuffix(short) for name, short in plain.items()}
    prefix = starts.pop() if len(starts) == 1 else ""
    notes = [f"names were cleared of {part!r}, which {WRAPPERS[part]} puts there" for part in sorted(wrappers)]
    return dataclasses.replace(
        source,
        facts={plain[name]: fact for name, fact in source.facts.items()},
        read=lambda name: source.read(back[name]),
        doubled=sorted(
            {plain.get(name, name) for name in source.doubled} | {n for n, count in counts.items() if count > 1}
        ),
        prefix=prefix,
        notes=(*source.notes, *notes),
    )


def _prefixes(names: list[str]) -> Iterator[str]:
    """Yields what stands before every name, one prefix after another, until the names are those of a known format."""
    # Only a prefix that every name has is one: a network may have a part that is called "model".
    while names and (cut := next((p for p in PREFIXES if all(name.startswith(p) for name in names)), "")):
        yield cut
        names = [name.removeprefix(cut) for name in names]
    # Whatever a script called the network: "generator.", "actor.model.".
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared: list[str] = [column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns)]
    for count in range(len(shared) + 1):
        cut = "".join(f"{part}." for part in shared[:count])
        if any(re.match(kind.mark, name.removeprefix(cut)) for kind in FORMATS for name in names):
            yield cut
            return
