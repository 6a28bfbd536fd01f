"""Our weights become a release's: checked as a whole and then written tensor by tensor, in an outside format."""

from __future__ import annotations

import itertools
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from wovr_jax.bridge import formats, rest, state_projector, torch_io
from wovr_jax.bridge.formats import Format
from wovr_jax.bridge.sources import INDEX
from wovr_jax.bridge.text_dit import diffusers_of_text_dit_config
from wovr_jax.core import disk
from wovr_jax.weights import writer
from wovr_jax.weights.plan import plan_export
from wovr_jax.weights.safetensors import Fact, FileError
from wovr_jax.weights.source import Source, open_native
from wovr_jax.weights.writer import Progress
from wovr_jax.world import weights

POLICY_SHARD = 5_000_000_000
"""Most bytes of a policy's shards, where nothing else is wanted: what transformers writes."""


def write_export(
    path: str | os.PathLike,
    to: str,
    folder: str | os.PathLike,
    *,
    shard_bytes: int | None = None,
    progress: Progress = lambda _: None,
) -> list[pathlib.Path]:
    """Writes imported or trained weights in an outside format.

    Args:
      path: json of our own form.
      to: "wan", "rlinf", "diffusers" or "openvla".
      folder: where; files of the same name are replaced, each once it is complete.
      shard_bytes: most bytes of a safetensors file; more make shards and an index. By default one
        file, for a policy 5 GB as Hugging Face has it.
      progress: called with the bytes of each tensor.

    Returns:
      The files, in the order in which they were written.

    Raises:
      FileError: not ours, or the format has no place for this network.
      KeymapError: with everything that does not fit.
    """
    cfg, source, about = open_native(path)
    kind = formats.named(cfg, to)
    origin = about.get("source", {})
    folder = pathlib.Path(folder)
    if kind.part == "policy":
        return _write_policy(pathlib.Path(path), cfg, kind, source, origin, folder, shard_bytes, progress)
    checked = plan_export(source.name, formats.table_of(cfg, kind), source.facts)
    # What the import cut off is put back only where the file goes back to the format that it came from.
    is_same = origin.get("format") == to
    prefix = origin.get("prefix", "") if is_same else ""
    stream = _count(checked.tensors(source.read, origin.get("aside")), progress)
    named = ((prefix + name, tensor) for name, tensor in stream)
    # torch's pickle is written as a whole; it is the format of the small networks only.
    if kind.file.endswith(".pth"):
        file = folder / export_names(cfg, kind)[0]
        with disk.replace_file(file) as fresh:
            torch_io.save(fresh, named, origin.get("container") if is_same else None)
        return [file]
    facts = {prefix + name: fact for name, fact in checked.tensor.items()}
    written = _write_shards(folder / kind.file, facts, named, shard_bytes)
    if to == "diffusers":
        make = diffusers_of_text_dit_config if kind.part == "dit" else weights.diffusers_of_vae_config
        written.append(folder / "config.json")
        disk.write_json(written[-1], make(cfg), indent=2, each=True)
    return written


def _write_policy(
    card: pathlib.Path,
    cfg: Any,
    kind: Format,
    source: Source,
    origin: Mapping[str, Any],
    folder: pathlib.Path,
    shard_bytes: int | None,
    progress: Progress,
) -> list[pathlib.Path]:
    """Writes weights and index new, and everything else of the release that the policy came from byte for byte."""
    if not origin.get("rest"):
        raise FileError(
            f"{card}: the folder that torch loads also holds tensors and files which this policy does not have. "
            "Only a policy that was imported from a release can be written as one."
        )
    # Every file of the rest is compared with its sum first: half of a release is worse than none.
    kept = rest.open_rest(card.with_name(rest.folder_name(card.stem)), origin["rest"])
    checked = plan_export(source.name, formats.table_of(cfg, kind), source.facts, kept.facts)
    facts = {**checked.tensor, **checked.kept}
    splitter = state_projector.Splitter(origin["state"]) if cfg.proprio else None
    # The projector of the robot's state goes into a file of its own and counts for no shard.
    if splitter:
        facts = {name: fact for name, fact in facts.items() if not name.startswith(state_projector.NAMES)}
    most = shard_bytes or POLICY_SHARD
    groups = shards(kind.file, facts, most)
    names = {file for file, _ in groups} | ({pathlib.Path(kind.file).stem + INDEX} if len(groups) > 1 else set())
    # transformers loads whatever has the name of weights: shards of an earlier export would be taken for these.
    stale = [file.name for file in sorted(folder.glob("*")) if rest.WEIGHTS.fullmatch(file.name)]
    if stale := [name for name in stale if name not in names]:
        raise FileError(f"{folder} holds {', '.join(stale)}, which would be loaded with the new weights; remove them.")
    # The policy's tensors and then the kept ones, in one stream over all shards.
    stream = itertools.chain(checked.tensors(source.read), ((name, kept.read(name)) for name in checked.kept))
    stream = _count(stream, progress)
    stream = splitter.without(stream) if splitter else stream
    written = _write_shards(folder / kind.file, facts, stream, most)
    written += [splitter.write(folder, stream)] if splitter else []
    return written + kept.copy_files(folder)


def export_names(cfg: Any, kind: Format) -> list[str]:
    """Returns the names of what an export writes, where it is not split into shards."""
    file = "taskemb_resnet_rm.pth" if getattr(cfg, "head", "") == "task" else kind.file
    return [file, "config.json"] if kind.name == "diffusers" else [file]


def _write_shards(
    path: pathlib.Path, facts: Mapping[str, Fact], stream: Iterator[tuple[str, np.ndarray]], most: int | None
) -> list[pathlib.Path]:
    """Writes one file, or several of at most ``most`` bytes of tensors, in the order of the stream, and their index."""
    # Shards are cut in the order of the stream: each is full before the next begins, and nothing waits in memory.
    groups = shards(path.name, facts, most)
    for name, group in groups:
        with disk.replace_file(path.with_name(name)) as fresh:
            writer.write(fresh, group, itertools.islice(stream, len(group)), {"format": "pt"})
    written = [path.with_name(name) for name, _ in groups]
    if len(groups) > 1:
        written.append(path.with_name(path.stem + INDEX))
        disk.write_json(written[-1], index(groups), indent=2, each=True)
    return written


def shards(file: str, facts: Mapping[str, Fact], most: int | None) -> list[tuple[str, dict[str, Fact]]]:
    """Returns names of the files and what each will hold, at most ``most`` bytes of tensors, in their order."""
    groups: list[dict[str, Fact]] = [{}]
    size = 0
    for name, fact in facts.items():
        # A tensor that is larger than a shard gets one alone.
        if most and groups[-1] and size + fact.nbytes > most:
            groups.append({})
            size = 0
        groups[-1][name] = fact
        size += fact.nbytes
    if len(groups) == 1:
        return [(file, groups[0])]
    stem, count = pathlib.PurePath(file).stem, len(groups)
    return [(f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors", group) for i, group in enumerate(groups)]


def index(groups: list[tuple[str, dict[str, Fact]]]) -> dict[str, Any]:
    """Returns the content of the json that says which shard holds which tensor."""
    size = sum(fact.nbytes for _, group in groups for fact in group.values())
    return {
        "metadata": {"total_size": size},
        "weight_map": {tensor: file for file, group in groups for tensor in group},
    }


def _count(stream: Iterator[tuple[str, np.ndarray]], progress: Progress) -> Iterator[tuple[str, np.ndarray]]:
    for name, tensor in stream:
        progress(tensor.nbytes)
        yield name, tensor
