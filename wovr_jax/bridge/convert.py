"""Import and export of a network's weights, checked first and then leaf by leaf."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from wovr_jax.bridge import formats, native, tensors, torch_io
from wovr_jax.bridge.formats import Format
from wovr_jax.bridge.sources import INDEX, Source
from wovr_jax.bridge.tensors import FileError
from wovr_jax.keymap import Fact, Plan, plan, plan_export
from wovr_jax.world import weights
from wovr_jax.world.dit import TextDiTConfig
from wovr_jax.world.vae import VAEConfig

Progress = Callable[[int], None]
"""Told the bytes of every leaf or tensor that is done."""


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
    """

    source: Source
    kind: Format
    cfg: Any
    plan: Plan
    facts: dict[str, Fact]
    seed: int

    @property
    def bytes(self) -> int:
        """Of all leaves."""
        return sum(size_of(fact) for fact in self.facts.values())

    def leaves(self, progress: Progress = lambda _: None) -> Iterator[tuple[str, np.ndarray]]:
        """Path and value of every leaf, one in memory at a time."""
        new = {path: self.facts[path].shape for path in self.plan.fresh}
        for path, leaf in itertools.chain(self.plan.leaves(self.source.read), weights.fresh(new, self.seed)):
            progress(leaf.nbytes)
            yield path, leaf.astype(self.facts[path].dtype, copy=False)

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

    Raises:
      FileError: not a known format.
      KeymapError: with everything that does not fit.
    """
    kind = formats.detect(source)
    if cfg is not None and formats.part_of(cfg) != kind.part:
        raise FileError(f"{source.name} is {kind}; the config given is for {formats.part_of(cfg)}.")
    from_text = kind.is_text and not (text or isinstance(cfg, TextDiTConfig))
    if cfg is None:
        own = formats.config_of(source, kind, heads)
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
    if dtype is not None:
        facts = {path: Fact(fact.shape, np.dtype(jnp.dtype(dtype))) for path, fact in facts.items()}
    return Import(source, kind, cfg, checked, facts, seed)


def write_import(
    ready: Import, folder: str | os.PathLike, name: str | None = None, progress: Progress = lambda _: None
) -> pathlib.Path:
    """Writes an import in our own form and returns its json."""
    about = {
        "source": {
            "file": pathlib.Path(ready.source.name).name,
            "format": ready.kind.name,
            "prefix": ready.source.prefix,
            "container": ready.source.container,
            "aside": ready.aside(),
        },
        "report": ready.report()[1:],
    }
    return native.write(folder, name or ready.kind.part, ready.cfg, ready.facts, ready.leaves(progress), about)


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
      to: "wan", "rlinf" or "diffusers".
      folder: where; files of the same name are replaced, each once it is complete.
      shard_bytes: most bytes of a safetensors file; more make shards and an index.
      progress: told of each tensor.

    Returns:
      The files, in the order in which they were written.

    Raises:
      FileError: not ours, or the format has no place for this network.
      KeymapError: with everything that does not fit.
    """
    cfg, source, about = native.open_native(path)
    kind = formats.named(cfg, to)
    checked = plan_export(source.name, formats.table_of(cfg, kind), source.facts)
    origin = about.get("source", {})
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


def export_names(cfg: Any, kind: Format) -> list[str]:
    """What an export writes, where it is not split into shards."""
    file = "taskemb_resnet_rm.pth" if getattr(cfg, "head", "") == "task" else kind.file
    return [file, "config.json"] if kind.name == "diffusers" else [file]


def _write_shards(
    path: pathlib.Path, facts: Mapping[str, Fact], stream: Iterator[tuple[str, np.ndarray]], most: int | None
) -> list[pathlib.Path]:
    """One file, or several of at most ``most`` bytes of tensors, in the order of the stream, and their index."""
    groups: list[dict[str, Fact]] = [{}]
    for name, fact in facts.items():
        if most and groups[-1] and sum(map(size_of, groups[-1].values())) + size_of(fact) > most:
            groups.append({})
        groups[-1][name] = fact
    names = [path.name]
    if len(groups) > 1:
        names = [f"{path.stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    for name, group in zip(names, groups, strict=True):
        fresh = tensors.beside(path.with_name(name))
        tensors.write(fresh, group, itertools.islice(stream, len(group)), {"format": "pt"})
        fresh.replace(path.with_name(name))
    written = [path.with_name(name) for name in names]
    if len(groups) > 1:
        home = {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group}
        index = {"metadata": {"total_size": sum(map(size_of, facts.values()))}, "weight_map": home}
        written.append(path.with_name(path.stem + INDEX))
        written[-1].write_text(json.dumps(index, indent=2) + "\n")
    return written


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
