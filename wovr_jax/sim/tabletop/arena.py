"""The embedded table as an arena: rollouts are compiled programs, policy and simulator in one."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from wovr_jax import evaluate
from wovr_jax.data import episodes as disk
from wovr_jax.policy.actions import Codec
from wovr_jax.policy.tokenizer import Tokenizer
from wovr_jax.run.recipe import Recipe
from wovr_jax.sim.arena import Actor, Measured, Played, layouts
from wovr_jax.sim.tabletop import collect
from wovr_jax.sim.tabletop import table as tabletop
from wovr_jax.types import Array, Imagined


class Tabletop:
    """The table of a recipe; see ``arena.base.Arena``."""

    name = "tabletop"
    instructions = tabletop.INSTRUCTIONS
    codec: Codec | None = None
    explore: Callable[[int, Actor], Imagined] | None = None

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.prompt_KL = Tokenizer.tabletop().prompts(tabletop.INSTRUCTIONS)
        self.steps = recipe.sim.horizon

    def demonstrate(self, folder: pathlib.Path, key: Array) -> dict[str, Any]:
        """Scripted episodes, a share of them flawed."""
        cfg = self.recipe
        seeds = layouts(cfg.seed, "demonstrations", cfg.collect.demonstrations + cfg.collect.validation)
        made = collect.demonstrations(seeds, key, cfg.expert, cfg.sim)
        write = functools.partial(disk.write, meta={"sim": self.name}, overwrite=True)
        facts = write(folder / "episodes", itertools.islice(made, cfg.collect.demonstrations))
        write(folder / "validation", made)
        return {"episodes": facts["episodes"], "successes": facts["successes"]}

    def collect(self, folder: pathlib.Path, purpose: str, count: int, actor: Actor) -> dict[str, Any]:
        """Rollouts from fresh layouts."""
        seeds = layouts(self.recipe.seed, purpose, count)
        rollouts = actor.programs.live_batches(actor.params, seeds, actor.key, actor.temperature)
        made = (episode for part, rollout in rollouts for episode in collect.episodes(rollout, part, actor.name))
        facts = disk.write(folder, made, meta={"sim": self.name}, overwrite=True)
        return {"episodes": count, "successes": facts["successes"], "true_steps": count * self.steps}

    def measure(self, folder: pathlib.Path, count: int, actor: Actor) -> Measured:
        """Success, and sub-goals by replaying what was done."""
        del folder  # a minute's work
        seeds = layouts(self.recipe.seed, "evaluate", count)
        batches = actor.programs.live_batches(actor.params, seeds, actor.key, actor.temperature)
        rollout = evaluate.join([rollout for _, rollout in batches], count)
        reached = collect.subgoal_rates(rollout, jnp.asarray(seeds), self.recipe.sim)
        return Measured(evaluate.find_successes(rollout), reached, count * self.steps)

    def play(self, count: int, actor: Actor) -> Iterator[Played]:
        """Rollouts on the device."""
        cfg, programs = self.recipe, actor.programs
        seeds = layouts(cfg.seed, "evaluate", count)
        for part, rollout in programs.live_batches(actor.params, seeds, actor.key, actor.temperature):
            padded = jnp.asarray(np.resize(part, cfg.collect.batch))
            start = collect.begin(padded, programs.prompt_KL, cfg.sim, cfg.world.slots)
            yield Played(dataclasses.replace(start, sim=None), rollout, len(part))
