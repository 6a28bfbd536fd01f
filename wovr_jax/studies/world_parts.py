"""What each part of the world model contributes: six trainings a seed that differ in one thing, one table.

Scripted episodes that never come to rest (``sim.experts.wander``) are made and encoded once for each seed. Every
variant trains on them with the same settings and the same draws, then plays the recorded actions of held-out
episodes from their first frame: how far is chunk 1 from the truth, chunk 4, chunk 16 (WoVR, table 4)? Two
references need no training: the first frame held still, and the truth through the VAE and back.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from wovr_jax.core import checkpoint, config
from wovr_jax.data import episodes as disk
from wovr_jax.run.folder import Run
from wovr_jax.run.recipe import Recipe
from wovr_jax.run.stages import Stages
from wovr_jax.sim.arena import layouts
from wovr_jax.sim.tabletop import collect
from wovr_jax.sim.tabletop import expert as experts
from wovr_jax.studies.variants import REFERENCE, Settings, Variant, chosen, merged
from wovr_jax.train import loop
from wovr_jax.types import Array, Episode, Params
from wovr_jax.world import fit, replay
from wovr_jax.world import train as training
from wovr_jax.world.model import WorldConfig

JOB = "world_study"
CHUNKS = (1, 4, 16)
"""Chunks of the table, counted from 1."""

VARIANTS = (
    Variant(REFERENCE, "full", {}),
    Variant("no_anchor", "no first-frame anchor", {"anchor": False}),
    Variant("memory_1", "one memory frame", {"memory": 1}),
    Variant("clean_context", "no noisy context", {"noisy_context": False}),
    Variant("adaln", "actions through AdaLN only", {"dit": {"action_conditioning": "adaln"}}),
    Variant("cross", "actions through cross-attention only", {"dit": {"action_conditioning": "cross"}}),
)
"""``change`` is laid over the world model's settings."""
Found = dict[str, dict[str, dict[str, list[float]]]]
"""Name -> seed -> ``latent`` and ``psnr``, each a list over chunks."""
REFERENCES = {"still": "(first frame held still)", "vae": "(true frames through the VAE)"}


def study(recipe: Recipe, run: Run, keep: Callable[[dict[str, Any]], None] = lambda results: None) -> dict[str, Any]:
    """Trains and measures every variant on every seed; returns the numbers and their table.

    ``keep`` is given the same of what is there after each of them.

    Raises:
      ConfigError: when the episodes are too short for the last chunk of the table.
    """
    if recipe.libero:
        raise config.ConfigError("config.libero: this study plays episodes of the embedded table only")
    needed = max(CHUNKS) * recipe.world.chunk
    if recipe.sim.horizon < needed or recipe.sim.horizon % recipe.world.chunk:
        raise config.ConfigError(
            f"config.sim.horizon: chunk {max(CHUNKS)} of an episode ends at step {needed}, so the horizon should be "
            f"that or a longer multiple of {recipe.world.chunk}, got {recipe.sim.horizon}"
        )
    variants = chosen(VARIANTS, recipe.variants)
    found: Found = {name: {} for name in (*(variant.name for variant in variants), *REFERENCES)}
    for seed in recipe.seeds:
        one = _Seed(dataclasses.replace(recipe, seed=seed), run)
        for name in found:
            facts = one.measured(name)
            found[name][str(seed)] = {key: facts[key] for key in ("latent", "psnr")}
            keep(_results(found))
    return _results(found)


def _results(found: Found) -> dict[str, Any]:
    return {JOB: found, "tables": [table(found)]}


def load(recipe: Recipe, run: Run, name: str, seed: str | int) -> tuple[Recipe, WorldConfig, Params]:
    """Recipe, settings and weights of a finished variant on a seed."""
    one = _Seed(dataclasses.replace(recipe, seed=int(seed)), run)
    return one.recipe, *one.trained(next(variant for variant in VARIANTS if variant.name == name))


class _Seed:
    """The episodes of one seed, and what each variant makes of them."""

    def __init__(self, recipe: Recipe, run: Run):
        self.recipe, self.run, self.plain = recipe, run, Stages(recipe, run)

    def measured(self, name: str) -> Settings:
        """Errors by chunk of a variant or a reference."""
        known = {variant.name: variant for variant in VARIANTS}

        def make(folder: pathlib.Path) -> Settings:
            first_BHWC, _, true_BNTHWC = self.held
            seen_BNTHWC = self._played(known[name]) if name in known else self._reference(name)
            found = replay.errors(*self.plain.vae, first_BHWC, true_BNTHWC, seen_BNTHWC)
            frames = int(np.prod(seen_BNTHWC.shape[:3]))
            return {key: found[f"{key}_N"].tolist() for key in ("latent", "psnr")} | {"imagined_frames": frames}

        if name in known:
            self.trained(known[name])
        replayed = f"replay-{self._name(name)}"
        return self.run.stage(replayed, make, lambda folder: self.run.facts[replayed])

    @functools.cached_property
    def episodes(self) -> list[Episode]:
        """Those to train on."""
        return self._wandering("train", "demonstrations", self.recipe.collect.demonstrations)

    @functools.cached_property
    def held(self) -> tuple[Array, Array, Array]:
        """First frames, actions and true frames of the episodes to replay."""
        return replay.recorded(
            self._wandering("held", "evaluate", self.recipe.evaluate.compare), self.recipe.world.chunk
        )

    def _wandering(self, part: str, purpose: str, count: int) -> list[Episode]:
        cfg, key = self.recipe, self.plain.key("wander", part)

        def make(folder: pathlib.Path) -> Settings:
            seeds = layouts(cfg.seed, purpose, count)
            made = collect.demonstrations(seeds, key, cfg.expert, cfg.sim, cfg.collect.batch, experts.wander)
            facts = disk.write(folder / "episodes", made, meta={"sim": "tabletop"}, overwrite=True)
            return {"episodes": facts["episodes"], "successes": facts["successes"]}

        return self.run.stage(self._name(part), make, lambda folder: disk.read(folder / "episodes"))

    def stages(self, variant: Variant) -> Stages:
        """Networks and fresh weights of a variant."""
        settings = merged(config.to_dict(self.recipe), {"world": variant.change})
        return Stages(config.from_dict(Recipe, settings), self.run)

    def trained(self, variant: Variant) -> tuple[WorldConfig, Params]:
        """Settings and weights of a variant's world model."""
        stages, train, name = self.stages(variant), self.recipe.world_train, self._name(variant.name)
        cfg, vae = stages.vae

        def make(folder: pathlib.Path) -> Settings:
            cache = self.run.folder / "latents"
            data, _ = fit.windows(cfg, train, vae, self.episodes, cache, held_out=0.0)
            state, step = training.make(cfg, train, stages.fresh_world, data, stages.key("world study"))
            state = loop.fit(name, state, step, train.steps, log=self.run.log, folder=folder)
            checkpoint.save(folder / "dit", training.merge_weights(train, state.result, stages.fresh_world))
            return {"windows": data.count}

        dit = self.run.stage(name, make, lambda folder: checkpoint.restore(folder / "dit", stages.fresh_world))
        return cfg, {"dit": dit, "vae": vae}

    def _played(self, variant: Variant) -> Array:
        cfg, params = self.trained(variant)
        first_BHWC, action_BNTA, _ = self.held
        return replay.play(cfg, params, first_BHWC, action_BNTA, self.plain.key("world study"))

    def _reference(self, kind: str) -> Array:
        first_BHWC, _, true_BNTHWC = self.held
        if kind == "still":
            return jnp.broadcast_to(first_BHWC[:, None, None], true_BNTHWC.shape)
        return replay.reconstructed(*self.plain.vae, first_BHWC, true_BNTHWC)

    def _name(self, kind: str) -> str:
        return f"{kind}-seed{self.recipe.seed}"


def table(found: Found) -> dict[str, Any]:
    """Mean and standard deviation over seeds, chunk by chunk, and on how many seeds the full model is ahead."""
    head = ["variant", *(f"latent error, chunk {n}" for n in CHUNKS), *(f"PSNR {n}" for n in CHUNKS)]
    rows, full = [[*head, f"behind full at chunk {CHUNKS[-1]}"]], found[REFERENCE]
    for name, says in ({one.name: one.says for one in VARIANTS} | REFERENCES).items():
        if seeds := found.get(name):
            cells = [_spread([one["latent"][n - 1] for one in seeds.values()], 3) for n in CHUNKS]
            cells += [_spread([one["psnr"][n - 1] for one in seeds.values()], 1) for n in CHUNKS]
            last = CHUNKS[-1] - 1
            behind = sum(one["latent"][last] > full[seed]["latent"][last] for seed, one in seeds.items())
            compared = name != REFERENCE and name not in REFERENCES
            rows.append([says, *cells, f"{behind} of {len(seeds)} seeds" if compared else "-"])
    return {
        "title": "Parts of the world model",
        "why": "Recorded actions of held-out episodes, played from the first frame. Latent error: mean squared "
        "difference of normalised latents of imagined and true frames. PSNR in dB. Mean and standard deviation over "
        f"seeds ({', '.join(full)}), each with episodes and weights of its own.",
        "rows": rows,
    }


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"
