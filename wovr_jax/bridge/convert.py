"""Import and export of a network's weights, checked first and then leaf by leaf."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from wovr_jax.bridge import adapters, formats, rest, state_projector, torch_io
from wovr_jax.bridge.adapters import Adapters
from wovr_jax.bridge.formats import Format
from wovr_jax.bridge.sources import INDEX
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.weights import native, tensors
from wovr_jax.weights.keymap import Fact, Plan, plan, plan_export
from wovr_jax.weights.tensors import FileError, Source
from wovr_jax.world import weights
from wovr_jax.world.dit import TextDiTConfig
from wovr_jax.world.vae.net import VAEConfig

Progress = Callable[[int], None]
"""Told the bytes of every leaf or tensor that is done."""
POLICY_SHARD = 5_000_000_000
"""Most bytes of a policy's shards, where nothing else is wanted: what transformers writes."""


@dataclasses.dataclass(frozen=True)
class Import:
    """An import that was checked; no data were read yet.

    Attributes:
      source: the opened file.
      kind: what it was recognised as.
      cfg: config of the network.
      plan: which tensor goes where.
      facts: path -> shape and dtype of every leaf, fresh ones included.
      seed: of the fresh leaves.
      kept: name -> shape and dtype of the tensors that are kept beside the leaves, as they will be written.
      files: the other files of the release that are kept, relative to its folder.
      adapters: merged into the leaves and the kept tensors as they are read, or None.
      state: how the release keeps the projector of the robot's state, where that was asked for.
    """

    source: Source
    kind: Format
    cfg: Any
    plan: Plan
    facts: dict[str, Fact]
    seed: int
    kept: dict[str, Fact] = dataclasses.field(default_factory=dict)
    files: list[pathlib.Path] = dataclasses.field(default_factory=list)
    adapters: Adapters | None = None
    state: dict[str, str] | None = None

    @property
    def bytes(self) -> int:
        """Of all leaves and kept tensors."""
        return sum(map(size_of, self.facts.values())) + sum(map(size_of, self.kept.values()))

    @property
    def folder(self) -> pathlib.Path:
        """Where the source is."""
        return self.source.files[0].parent

    def leaves(self, progress: Progress = lambda _: None) -> Iterator[tuple[str, np.ndarray]]:
        """Path and value of every leaf, one in memory at a time."""
        new = {path: self.facts[path].shape for path in self.plan.fresh}
        for path, leaf in itertools.chain(self.plan.leaves(self.source.read), weights.fresh(new, self.seed)):
            progress(leaf.nbytes)
            leaf = leaf.astype(self.facts[path].dtype, copy=False)
            if self.adapters:
                self.adapters.merge(path, leaf)
            yield path, leaf

    def rest(self, progress: Progress = lambda _: None) -> Iterator[tuple[str, np.ndarray]]:
        """Name and value of every kept tensor."""
        for name, fact in self.kept.items():
            tensor = self.source.read(name)
            progress(tensor.nbytes)
            tensor = tensor.astype(fact.dtype, copy=False)
            if self.adapters:
                self.adapters.merge_kept(name, tensor)
            yield name, tensor

    def params(self) -> dict[Any, Any]:
        """All leaves, as the nested dict that the network takes."""
        return native.nested(dict(self.leaves()))

    def aside(self) -> dict[str, int]:
        """The numbers that travel beside the weights."""
        return {name: int(self.source.read(name)) for name in self.plan.table.aside}

    def report(self) -> list[str]:
        """What happens to everything in the file, in sentences."""
        size = sum(math.prod(fact.shape) for fact in self.facts.values())
        used = len(self.plan.tensor) - len(self.plan.table.aside)
        dtypes = collections.Counter(fact.dtype.name for fact in self.facts.values())
        said = [
            f"{self.source.name}: {self.kind}, {used} tensors into {len(self.facts)} leaves, {size:,} parameters, "
            + ", ".join(f"{count} {name}" for name, count in dtypes.most_common())
        ]
        if self.source.prefix:
            said += [f"names begin with {self.source.prefix!r}, which is put back on export"]
        for why, names in _by_reason(self.plan.dropped).items():
            count = sum(math.prod(self.source.facts[name].shape) for name in names)
            said += [f"dropped, {why}: {len(names)} tensors, {count:,} parameters ({names[0]}, ...)"]
        for why, paths in _by_reason(self.plan.fresh).items():
            count = sum(math.prod(self.facts[path].shape) for path in paths)
            said += [f"{why} (seed {self.seed}): {len(paths)} leaves, {count:,} parameters"]
        if self.kept:
            count = sum(math.prod(fact.shape) for fact in self.kept.values())
            said += [
                f"kept for an export, as the network does not use them: {len(self.kept)} tensors, {count:,} parameters"
            ]
        if self.files:
            size = sum((self.folder / file).stat().st_size for file in self.files)
            said += [f"copied beside the weights: {len(self.files)} other files, {size:,} bytes"]
        if self.adapters:
            said += [self.adapters.report("merged in float32 and rounded once; the folder is not copied")]
        elif any(file.parts[0] == adapters.FOLDER for file in self.files):
            said += [f"{adapters.FOLDER}/ is copied and not merged; --adapter merge would do that"]
        if self.state:
            said += [f"with {self.state['file']}, the projector of the robot's state"]
        if self.plan.table.aside:
            said += [f"kept beside the weights: {len(self.plan.table.aside)} counts of batches"]
        if isinstance(self.cfg, VAEConfig) and not self.cfg.latent_mean:
            said += ["latent statistics are not in the file and not those of a release: taken as mean 0, deviation 1"]
        if self.source.others:
            said += [f"left in the file, as they are no weights: {', '.join(self.source.others)}"]
        return said


def read_import(
    source: Source,
    *,
    cfg: Any = None,
    heads: int | None = None,
    text: bool = False,
    seed: int = 0,
    dtype: str | None = None,
    recipe: str = "rlinf",
    images: int = 1,
    state: bool = False,
    merge: pathlib.Path | None = None,
) -> Import:
    """Recognises a file and checks all of it against the network.

    Args:
      source: the opened file.
      cfg: config of the network; by default read off the file.
      heads: attention heads, where neither file nor config tells them.
      text: keep a text-conditioned transformer as it is. By default its text path is dropped
        and action modules are made.
      seed: of new action modules.
      dtype: cast to; by default nothing is cast.
      recipe, images: of a policy's sequence, as in ``VLAConfig``.
      state: the policy takes the robot's state; its projector is read from ``proprio_projector--*.pt``.
      merge: a PEFT folder of adapters that are merged into a policy.

    Raises:
      FileError: not a known format.
      KeymapError: with everything that does not fit.
    """
    kind = formats.detect(source)
    if (state or merge or images > 1) and kind.part != "policy":
        raise FileError(f"{source.name} is {kind}; pictures, state and adapters are a policy's.")
    state = state or bool(getattr(cfg, "proprio", 0))
    source, beside = state_projector.joined(source) if state else (source, None)
    if cfg is not None and formats.part_of(cfg) != kind.part:
        raise FileError(f"{source.name} is {kind}; the config given is for {formats.part_of(cfg)}.")
    from_text = kind.is_text and not (text or isinstance(cfg, TextDiTConfig))
    if cfg is None:
        own = formats.config_of(source, kind, heads, recipe, images)
        cfg = formats.with_actions(own) if from_text else own
    checked = plan(
        source.name,
        formats.table_of(cfg, kind, from_text=from_text),
        source.facts,
        formats.shapes(cfg),
        source.doubled,
    )
    usual = collections.Counter(fact.dtype for fact in checked.leaf.values()).most_common(1)[0][0]
    facts = dict(checked.leaf)
    facts |= {path: Fact(shape, usual) for path, shape in formats.shapes(cfg).items() if path in checked.fresh}
    kept = dict(checked.kept)
    if dtype is not None:
        facts, kept = (
            {path: Fact(fact.shape, np.dtype(jnp.dtype(dtype))) for path, fact in group.items()}
            for group in (facts, kept)
        )
    files = rest.other_files(source.files) if kept else []
    opened = adapters.open_peft(merge, cfg) if merge and isinstance(cfg, VLAConfig) else None
    if merge and merge.parent == source.files[0].parent:  # merged twice, it would count twice
        files = [file for file in files if file.parts[0] != merge.name]
    return Import(source, kind, cfg, checked, facts, seed, kept, files, opened, beside)


def write_import(
    ready: Import, folder: str | os.PathLike, name: str | None = None, progress: Progress = lambda _: None
) -> pathlib.Path:
    """Writes an import in our own form and returns its json."""
    origin: dict[str, Any] = {
        "file": pathlib.Path(ready.source.name).name,
        "format": ready.kind.name,
        "prefix": ready.source.prefix,
        "container": ready.source.container,
        "aside": ready.aside(),
        **({"state": ready.state} if ready.state else {}),
    }
    name = name or ready.kind.part
    beside = pathlib.Path(folder) / rest_name(name)
    fresh = tensors.beside(beside)
    try:
        if ready.kept:
            origin["rest"] = rest.write(fresh, ready.kept, ready.rest(progress), ready.folder, ready.files)
        about = {"source": origin, "report": ready.report()[1:]}
        card = native.write(folder, name, ready.cfg, ready.facts, ready.leaves(progress), about)
        if ready.kept:
            rest.replace(fresh, beside)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return card


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
      progress: told of each tensor.

    Returns:
      The files, in the order in which they were written.

    Raises:
      FileError: not ours, or the format has no place for this network.
      KeymapError: with everything that does not fit.
    """
    cfg, source, about = native.open_native(path)
    kind = formats.named(cfg, to)
    origin = about.get("source", {})
    if kind.part == "policy":
        return _write_policy(pathlib.Path(path), cfg, kind, source, origin, pathlib.Path(folder), shard_bytes, progress)
    checked = plan_export(source.name, formats.table_of(cfg, kind), source.facts)
    same = origin.get("format") == to
    prefix = origin.get("prefix", "") if same else ""
    stream = _told(checked.tensors(source.read, origin.get("aside")), progress)
    named = ((prefix + name, tensor) for name, tensor in stream)
    folder = pathlib.Path(folder)
    if kind.file.endswith(".pth"):
        file = folder / export_names(cfg, kind)[0]
        fresh = tensors.beside(file)
        torch_io.save(fresh, named, origin.get("container") if same else None)
        return [fresh.replace(file)]
    facts = {prefix + name: fact for name, fact in checked.tensor.items()}
    written = _write_shards(folder / kind.file, facts, named, shard_bytes)
    if to == "diffusers":
        make = weights.diffusers_of_dit_config if kind.part == "dit" else weights.diffusers_of_vae_config
        written.append(folder / "config.json")
        written[-1].write_text(json.dumps(make(cfg), indent=2) + "\n")
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
    """Weights and index new, everything else of the release that the policy came from byte for byte."""
    if not origin.get("rest"):
        raise FileError(
            f"{card}: the folder that torch loads also holds tensors and files which this policy does not have. "
            "Only a policy that was imported from a release can be written as one."
        )
    kept = rest.open_rest(card.with_name(rest_name(card.stem)), origin["rest"])
    checked = plan_export(source.name, formats.table_of(cfg, kind), source.facts, kept.facts)
    facts = {**checked.tensor, **checked.kept}
    splitter = state_projector.Splitter(origin["state"]) if cfg.proprio else None
    if splitter:
        facts = {name: fact for name, fact in facts.items() if not name.startswith(state_projector.NAMES)}
    most = shard_bytes or POLICY_SHARD
    groups = shards(kind.file, facts, most)
    names = {file for file, _ in groups} | ({pathlib.Path(kind.file).stem + INDEX} if len(groups) > 1 else set())
    stale = [file.name for file in sorted(folder.glob("*")) if rest.WEIGHTS.fullmatch(file.name)]
    if stale := [name for name in stale if name not in names]:
        raise FileError(f"{folder} holds {', '.join(stale)}, which would be loaded with the new weights; remove them.")
    stream = itertools.chain(checked.tensors(source.read), ((name, kept.read(name)) for name in checked.kept))
    stream = _told(stream, progress)
    stream = splitter.without(stream) if splitter else stream
    written = _write_shards(folder / kind.file, facts, stream, most)
    written += [splitter.write(folder, stream)] if splitter else []
    return written + kept.copy_files(folder)


def rest_name(name: str) -> str:
    """The folder beside ``<name>.json`` that holds what an import kept."""
    return f"{name}.rest"


def export_names(cfg: Any, kind: Format) -> list[str]:
    """What an export writes, where it is not split into shards."""
    file = "taskemb_resnet_rm.pth" if getattr(cfg, "head", "") == "task" else kind.file
    return [file, "config.json"] if kind.name == "diffusers" else [file]


def _write_shards(
    path: pathlib.Path, facts: Mapping[str, Fact], stream: Iterator[tuple[str, np.ndarray]], most: int | None
) -> list[pathlib.Path]:
    """One file, or several of at most ``most`` bytes of tensors, in the order of the stream, and their index."""
    groups = shards(path.name, facts, most)
    for name, group in groups:
        fresh = tensors.beside(path.with_name(name))
        tensors.write(fresh, group, itertools.islice(stream, len(group)), {"format": "pt"})
        fresh.replace(path.with_name(name))
    written = [path.with_name(name) for name, _ in groups]
    if len(groups) > 1:
        written.append(path.with_name(path.stem + INDEX))
        written[-1].write_text(json.dumps(index(groups), indent=2) + "\n")
    return written


def shards(file: str, facts: Mapping[str, Fact], most: int | None) -> list[tuple[str, dict[str, Fact]]]:
    """Names of the files and what each will hold, at most ``most`` bytes of tensors, in their order."""
    groups: list[dict[str, Fact]] = [{}]
    size = 0
    for name, fact in facts.items():
        if most and groups[-1] and size + size_of(fact) > most:
            groups.append({})
            size = 0
        groups[-1][name] = fact
        size += size_of(fact)
    if len(groups) == 1:
        return [(file, groups[0])]
    stem, count = pathlib.PurePath(file).stem, len(groups)
    return [(f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors", group) for i, group in enumerate(groups)]


def index(groups: list[tuple[str, dict[str, Fact]]]) -> dict[str, Any]:
    """The json that says which shard holds which tensor."""
    size = sum(size_of(fact) for _, group in groups for fact in group.values())
    return {
        "metadata": {"total_size": size},
        "weight_map": {tensor: file for file, group in groups for tensor in group},
    }


def _told(stream: Iterator[tuple[str, np.ndarray]], progress: Progress) -> Iterator[tuple[str, np.ndarray]]:
    for name, tensor in stream:
        progress(tensor.nbytes)
        yield name, tensor


def size_of(fact: Fact) -> int:
    """Bytes of a tensor."""
    return math.prod(fact.shape) * fact.dtype.itemsize


def _by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, why in reasons.items():
        found.setdefault(why, []).append(name)
    return found
