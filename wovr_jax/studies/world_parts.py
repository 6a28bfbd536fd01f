"""What each part of the world model contributes: six trainings a seed that differ in one thing, one table.

Scripted episodes that never come to rest (``sim.wander``) are made and encoded once for each seed. Every
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

from wovr_jax.core import checkpoint, config, keys, sharding
from wovr_jax.data import episodes as disk
from wovr_jax.run.folder import Product, Run
from wovr_jax.run.recipe import Recipe
from wovr_jax.run.stages.episodes import Demonstrations
from wovr_jax.run.stages.vae import open_vae
from wovr_jax.run.stages.world import start_world, windows
from wovr_jax.sim import embedded
from wovr_jax.sim.arena import layouts
from wovr_jax.sim.tabletop.wander import wander
from wovr_jax.studies import open_loop
from wovr_jax.studies.variants import REFERENCE, Settings, Variant, choose_variants, merge_settings
from wovr_jax.train import loop
from wovr_jax.types import Array, Episode, Params
from wovr_jax.weights import native
from wovr_jax.world import dit, fidelity
from wovr_jax.world import train as training
from wovr_jax.world.model import WorldConfig, networks

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
Errors = dict[str, dict[str, dict[str, list[float]]]]
"""Name -> seed -> ``latent`` and ``psnr``, each a list over chunks."""
REFERENCES = {"still": "(first frame held still)", "vae": "(true frames through the VAE)"}


def study(recipe: Recipe, run: Run, keep: Callable[[dict[str, Any]], None] = lambda results: None) -> dict[str, Any]:
    """Trains and measures every variant on every seed; returns the numbers and their table.

    ``keep`` is given the same of what is there after each of them.

    Raises:
      ConfigError: when the episodes are too short for the last chunk of the table.
    """
    if recipe.outside or recipe.relay:
        where = next(name for name in ("libero", "recorded", "relay") if getattr(recipe, name))
        raise config.ConfigError(f"config.{where}: this study plays episodes of the embedded table only")
    needed = max(CHUNKS) * recipe.world.chunk
    if recipe.sim.horizon < needed or recipe.sim.horizon % recipe.world.chunk:
        raise config.ConfigError(
            f"config.sim.horizon: chunk {max(CHUNKS)} of an episode ends at step {needed}, so the horizon should be "
            f"that or a longer multiple of {recipe.world.chunk}, got {recipe.sim.horizon}"
        )
    variants = choose_variants(VARIANTS, recipe.variants)
    errors: Errors = {name: {} for name in (*(variant.name for variant in variants), *REFERENCES)}
    # Seed by seed, so that whatever is there at any time compares all variants on the same episodes.
    for seed in recipe.seeds:
        one_seed = Seed(dataclasses.replace(recipe, seed=seed), run)
        for name in errors:
            facts = one_seed.measure(name)
            errors[name][str(seed)] = {key: facts[key] for key in ("latent", "psnr")}
            keep(_results(errors))
    return _results(errors)


def _results(errors: Errors) -> dict[str, Any]:
    return {JOB: errors, "tables": [table(errors)]}


def load(recipe: Recipe, run: Run, name: str, seed: str | int) -> tuple[Recipe, WorldConfig, Params]:
    """Returns recipe, settings and weights of a finished variant on a seed."""
    trained = Seed(dataclasses.replace(recipe, seed=int(seed)), run)
    # Its stage is marked as done, so this reads and does not train.
    return trained.recipe, *trained.train(next(variant for variant in VARIANTS if variant.name == name))


class Seed:
    """The episodes of one seed, and what each variant makes of them."""

    def __init__(self, recipe: Recipe, run: Run):
        self.recipe, self.run, self.key = recipe, run, functools.partial(keys.key, recipe.seed)

    def measure(self, name: str) -> Settings:
        """Returns the errors by chunk of a variant or a reference."""
        known = {variant.name: variant for variant in VARIANTS}

        def make(folder: pathlib.Path) -> Settings:
            first_BHWC, action_BNTA, true_BNTHWC = self.held_out
            # The reference's settings for all: the same windows are encoded, whatever a variant was trained to see.
            cfg, vae_params = self.vae(self.recipe.world)
            if name in known:
                world = self.train(known[name])
                seen_BNTHWC = open_loop.play(*world, first_BHWC, action_BNTA, self.key("world study"))
            elif name == "still":
                seen_BNTHWC = jnp.broadcast_to(first_BHWC[:, None, None], true_BNTHWC.shape)
            else:
                seen_BNTHWC = fidelity.reconstruct(cfg, vae_params, first_BHWC, true_BNTHWC)
            errors = fidelity.measure_errors(cfg, vae_params, first_BHWC, true_BNTHWC, seen_BNTHWC)
            frames = int(np.prod(seen_BNTHWC.shape[:3]))
            return {key: errors[f"{key}_N"].tolist() for key in ("latent", "psnr")} | {"imagined_frames": frames}

        if name in known:
            self.train(known[name])  # first, so that the seconds of each stage are its own
        return self.run.stage(f"replay-{self._name(name)}", make, lambda folder: None).facts

    @functools.cached_property
    def episodes(self) -> list[Episode]:
        """The episodes to train on."""
        return self._wander("train", "demonstrations", self.recipe.collect.demonstrations)

    @functools.cached_property
    def held_out(self) -> tuple[Array, Array, Array]:
        """First frames, actions and true frames of the episodes to replay."""
        episodes = self._wander("held", "evaluate", self.recipe.evaluate.compare)
        return open_loop.stack_episodes(episodes, self.recipe.world.chunk)

    def _wander(self, part: str, purpose: str, count: int) -> list[Episode]:
        cfg, key = self.recipe, self.key("wander", part)

        def make(folder: pathlib.Path) -> Settings:
            # The purpose keeps the layouts of training and of evaluation apart.
            seeds = layouts(cfg.seed, purpose, count)
            made = embedded.play_demonstrations(seeds, key, cfg.expert, cfg.sim, cfg.collect.batch, wander)
            facts = disk.write(folder / "episodes", made, meta={"sim": "tabletop"}, overwrite=True)
            return {"episodes": facts["episodes"], "successes": facts["successes"]}

        return self.run.stage(self._name(part), make, lambda folder: disk.read(folder / "episodes")).value

    def vae(self, world: WorldConfig) -> tuple[WorldConfig, Params]:
        """Returns a world model's settings with the statistics of the VAE that all variants share, and its weights."""
        # Loaded when a VAE is to be trained; the package's own needs no episode.
        episodes = Product(lambda: Demonstrations(self.episodes, []))
        folder = pathlib.Path(self.recipe.assets).expanduser() if self.recipe.assets else native.FOLDER
        return open_vae(self.run, world, self.recipe.vae, folder, self.recipe.vae_train, episodes).value

    def train(self, variant: Variant, cut: Callable[[Any], Any] = lambda frame: frame) -> tuple[WorldConfig, Params]:
        """Trains a variant's world model, or reads it; returns its settings and weights.

        ``cut`` makes of the episodes' frames (S, H, W, 3) what this variant is shown.
        """
        changed = config.from_dict(WorldConfig, merge_settings(config.to_dict(self.recipe.world), variant.change))
        train, name = self.recipe.world_train, self._name(variant.name)
        cfg, vae_params = self.vae(changed)

        def make(folder: pathlib.Path) -> Settings:
            start = start_world(cfg, self.recipe.world_weights, self.key)
            shown = [dataclasses.replace(episode, frame_SHWC=cut(episode.frame_SHWC)) for episode in self.episodes]
            data, _ = windows(cfg, train, vae_params, shown, self.run.folder / "latents", held_out=0.0)
            # The key does not depend on the variant: all draw the same windows and the same noise.
            state, step = training.make(cfg, train, start, data, self.key("world study"))
            state = loop.fit(name, state, step, train.steps, log=self.run.log, folder=folder)
            checkpoint.save(folder / "dit", training.merge_weights(train, state.result, start))
            return {"windows": data.count}

        def load(folder: pathlib.Path) -> Params:
            return checkpoint.restore(folder / "dit", sharding.describe(networks(cfg)[0].shapes(), dit.AXES))

        return cfg, {"dit": self.run.stage(name, make, load).value, "vae": vae_params}

    def _name(self, kind: str) -> str:
        return f"{kind}-seed{self.recipe.seed}"


def table(errors: Errors) -> dict[str, Any]:
    """Tables mean and standard deviation over seeds, chunk by chunk, and on how many seeds the full model is ahead."""
    head = ["variant", *(f"latent error, chunk {n}" for n in CHUNKS), *(f"PSNR {n}" for n in CHUNKS)]
    rows, full = [[*head, f"behind full at chunk {CHUNKS[-1]}"]], errors[REFERENCE]
    for name, says in ({variant.name: variant.says for variant in VARIANTS} | REFERENCES).items():
        if seeds := errors.get(name):
            # Chunks are counted from 1 in the table, lists from 0.
            cells = [_format_spread([error["latent"][n - 1] for error in seeds.values()], 3) for n in CHUNKS]
            cells += [_format_spread([error["psnr"][n - 1] for error in seeds.values()], 1) for n in CHUNKS]
            last = CHUNKS[-1] - 1
            # The last chunk decides: errors that feed on themselves show there, and a short rollout hides them.
            behind = sum(error["latent"][last] > full[seed]["latent"][last] for seed, error in seeds.items())
            compared = name != REFERENCE and name not in REFERENCES
            rows.append([says, *cells, f"{behind} of {len(seeds)} seeds" if compared else "-"])
    return {
        "title": "Parts of the world model",
        "why": "Recorded actions of held-out episodes, played from the first frame. Latent error: mean squared "
        "difference of normalised latents of imagined and true frames. PSNR in dB. Mean and standard deviation over "
        f"seeds ({', '.join(full)}), each with episodes and weights of its own.",
        "rows": rows,
    }


def _format_spread(values: Sequence[float], digits: int) -> str:
    # One seed has no spread to tell; of several it is that of a sample.
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"
