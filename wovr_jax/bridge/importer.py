"""Weights of a release become ours: the file is recognised, checked as a whole, and then read leaf by leaf."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from wovr_jax.bridge import adapters, beliefs, formats, rest, state_projector
from wovr_jax.bridge.adapters import Adapters
from wovr_jax.bridge.beliefs import Beliefs
from wovr_jax.bridge.formats import Format
from wovr_jax.bridge.text_dit import TextDiTConfig, with_actions
from wovr_jax.core import disk
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.weights import native, writer
from wovr_jax.weights.plan import Plan, plan_import
from wovr_jax.weights.safetensors import Fact, FileError
from wovr_jax.weights.source import Source
from wovr_jax.weights.writer import Progress
from wovr_jax.world import weights
from wovr_jax.world.vae.net import VAEConfig


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
      beliefs: what was believed and what looks odd, beside what the fields above say.
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
    beliefs: Beliefs = Beliefs()

    @property
    def bytes(self) -> int:
        """How many bytes all leaves and kept tensors take."""
        return sum(fact.nbytes for fact in (*self.facts.values(), *self.kept.values()))

    @property
    def folder(self) -> pathlib.Path:
        """The folder in which the source lies."""
        return self.source.files[0].parent

    def leaves(self, progress: Progress = lambda _: None) -> Iterator[tuple[str, np.ndarray]]:
        """Yields path and value of every leaf, one in memory at a time."""
        new = {path: self.facts[path].shape for path in self.plan.fresh}
        # New leaves come after those of the file, in the same stream: a writer need not know which is which.
        for path, leaf in itertools.chain(self.plan.leaves(self.source.read), weights.fresh(new, self.seed)):
            progress(leaf.nbytes)
            leaf = leaf.astype(self.facts[path].dtype, copy=False)
            # After the cast: what is merged is rounded once, to the dtype that stays.
            if self.adapters:
                self.adapters.merge(path, leaf)
            _refuse_not_finite(self.source.name, path, leaf)
            yield path, leaf

    def rest(self, progress: Progress = lambda _: None) -> Iterator[tuple[str, np.ndarray]]:
        """Yields name and value of every kept tensor, one in memory at a time."""
        for name, fact in self.kept.items():
            tensor = self.source.read(name)
            progress(tensor.nbytes)
            tensor = tensor.astype(fact.dtype, copy=False)
            if self.adapters:
                self.adapters.merge_kept(name, tensor)
            yield name, tensor

    def params(self) -> dict[Any, Any]:
        """Returns all leaves, as the nested dict that the network takes."""
        return native.unflatten(dict(self.leaves()))

    def aside(self) -> dict[str, int]:
        """Returns the numbers that travel beside the weights."""
        return {name: int(self.source.read(name)) for name in self.plan.table.aside}

    def report(self) -> list[str]:
        """Says what happens to everything in the file, in sentences."""
        size = sum(fact.size for fact in self.facts.values())
        # Counts of batches are tensors of the file, but no weights.
        used = len(self.plan.tensor) - len(self.plan.table.aside)
        dtypes = collections.Counter(fact.dtype.name for fact in self.facts.values())
        lines = [
            f"{self.source.name}: {self.kind}, {used} tensors into {len(self.facts)} leaves, {size:,} parameters, "
            + ", ".join(f"{count} {name}" for name, count in dtypes.most_common())
        ]
        lines += self.beliefs.notes
        for why, names in _by_reason(self.plan.dropped).items():
            count = sum(self.source.facts[name].size for name in names)
            lines += [f"dropped, {why}: {len(names)} tensors, {count:,} parameters ({names[0]}, ...)"]
        for why, paths in _by_reason(self.plan.fresh).items():
            count = sum(self.facts[path].size for path in paths)
            lines += [f"{why} (seed {self.seed}): {len(paths)} leaves, {count:,} parameters"]
        if self.kept:
            count = sum(fact.size for fact in self.kept.values())
            lines += [
                f"kept for an export, as the network does not use them: {len(self.kept)} tensors, {count:,} parameters"
            ]
        if self.files:
            size = sum((self.folder / file).stat().st_size for file in self.files)
            lines += [f"copied beside the weights: {len(self.files)} other files, {size:,} bytes"]
        if self.adapters:
            lines += [self.adapters.report("merged in float32 and rounded once; the folder is not copied")]
        elif any(file.parts[0] == adapters.FOLDER for file in self.files):
            lines += [f"{adapters.FOLDER}/ is copied and not merged; --adapter merge would do that"]
        if self.state:
            lines += [f"with {self.state['file']}, the projector of the robot's state"]
        if self.plan.table.aside:
            lines += [f"kept beside the weights: {len(self.plan.table.aside)} counts of batches"]
        if isinstance(self.cfg, VAEConfig) and not self.cfg.latent_mean:
            lines += ["latent statistics are not in the file and not those of a release: taken as mean 0, deviation 1"]
        if self.source.others:
            lines += [f"left in the file, as they are no weights: {', '.join(self.source.others)}"]
        return lines

    def warnings(self) -> list[str]:
        """Says what looks odd, in sentences."""
        merged = self.adapters.warnings() if self.adapters else []
        return [*self.beliefs.warnings, *merged]


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
    # Asked of another network, these would be ignored without a word.
    if (state or merge or images > 1) and kind.part != "policy":
        raise FileError(f"{source.name} is {kind}; pictures, state and adapters are a policy's.")
    # A config that is given may ask for the state as well as the flag.
    state = state or bool(getattr(cfg, "proprio", 0))
    source, state_file = state_projector.join(source) if state else (source, None)
    if cfg is not None and formats.part_of(cfg) != kind.part:
        raise FileError(f"{source.name} is {kind}; the config given is for {formats.part_of(cfg)}.")
    # A transformer that is conditioned on text becomes one of actions, unless it is to stay what it is.
    from_text = kind.is_text and not (text or isinstance(cfg, TextDiTConfig))
    if cfg is None:
        cfg = formats.config_of(source, kind, heads, recipe, images)
        cfg = with_actions(cfg) if from_text else cfg
    # Everything is compared here, on names and shapes alone; data are read by the writer.
    checked = plan_import(
        source.name,
        formats.table_of(cfg, kind, from_text=from_text),
        source.facts,
        formats.shapes(cfg),
        source.doubled,
    )
    # New leaves get the dtype that most others have.
    usual = collections.Counter(fact.dtype for fact in checked.leaf.values()).most_common(1)[0][0]
    facts = dict(checked.leaf)
    facts |= {path: Fact(shape, usual) for path, shape in formats.shapes(cfg).items() if path in checked.fresh}
    kept = dict(checked.kept)
    # Only what will be written changes here; the plan keeps what will be read, and leaves are cast one by one.
    if dtype is not None:
        facts, kept = (
            {path: Fact(fact.shape, np.dtype(jnp.dtype(dtype))) for path, fact in group.items()}
            for group in (facts, kept)
        )
    # Only a policy has kept tensors, and only its releases have files that an export needs.
    files = rest.other_files(source.files) if kept else []
    opened = adapters.open_peft(merge, cfg) if merge and isinstance(cfg, VLAConfig) else None
    said = beliefs.of_source(source, kind, cfg, heads)
    if merge and merge.parent == source.files[0].parent:  # merged twice, it would count twice
        files = [file for file in files if file.parts[0] != merge.name]
    if isinstance(cfg, VLAConfig) and source.files:
        said += beliefs.of_policy(source, cfg, source.files[0].parent, files)
    return Import(source, kind, cfg, checked, facts, seed, kept, files, opened, state_file, said)


def write_import(
    ready: Import, folder: str | os.PathLike, name: str | None = None, progress: Progress = lambda _: None
) -> pathlib.Path:
    """Writes an import in our own form and returns its json."""
    # What an export needs to give the same file back, and no leaf holds.
    origin: dict[str, Any] = {
        "file": pathlib.Path(ready.source.name).name,
        "format": ready.kind.name,
        "prefix": ready.source.prefix,
        "container": ready.source.container,
        "aside": ready.aside(),
        **({"state": ready.state} if ready.state else {}),
    }
    name = name or ready.kind.part
    kept = pathlib.Path(folder) / rest.folder_name(name)
    # The rest is written first and put in place last: a json that is there has its rest beside it.
    fresh = disk.fresh_folder(kept)
    try:
        if ready.kept:
            origin["rest"] = rest.write(fresh, ready.kept, ready.rest(progress), ready.folder, ready.files)
        about = {"source": origin, "report": ready.report()[1:], "warnings": ready.warnings()}
        card = writer.write_native(folder, name, ready.cfg, ready.facts, ready.leaves(progress), about)
        if ready.kept:
            disk.replace_folder(fresh, kept)
    finally:
        disk.drop_folder(fresh)
    return card


def _refuse_not_finite(what: str, path: str, leaf: np.ndarray) -> None:
    """Raises FileError for a leaf with a NaN or an infinity: from it on, everything that the network says is NaN."""
    flat = leaf.reshape(-1)
    # In pieces: what tells a number from none takes as much memory again.
    for begin in range(0, flat.size, 2**22):
        if not np.isfinite(flat[begin : begin + 2**22]).all():
            raise FileError(
                f"{what}: {path} is not finite, in {leaf.dtype.name}. A training that diverged leaves such weights, "
                "and so does a cast to float16 of what it cannot hold: take an earlier checkpoint, or another --dtype."
            )


def _by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name, why in reasons.items():
        names.setdefault(why, []).append(name)
    return names
