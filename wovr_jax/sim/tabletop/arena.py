"""The embedded table as an arena: rollouts are compiled programs, policy and simulator in one."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax.core import sharding
from wovr_jax.data import episodes as disk
from wovr_jax.sim.arena import Actor, Groups, Measured, Played, layouts
from wovr_jax.sim.tabletop import collect, table
from wovr_jax.sim.tabletop.expert import ExpertConfig
from wovr_jax.sim.tabletop.table import TabletopConfig
from wovr_jax.types import Array, Imagined


class Tabletop:
    """The table of a run; see ``sim.arena.Arena``.

    Args:
      sim: the simulator.
      expert: who demonstrates.
      seed: of the run.
      batch: episodes rolled at once.
      memory: M, memory frames of a start state.
      prompt_KL: (tasks, L) int32 prompt tokens of every instruction.
    """

    name = "tabletop"
    instructions = table.INSTRUCTIONS
    hold = 1
    explore: Callable[[int, Actor, Groups], Imagined] | None = None

    def __init__(
        self, sim: TabletopConfig, expert: ExpertConfig, *, seed: int, batch: int, memory: int, prompt_KL: Array
    ):
        self.sim, self.expert, self.seed, self.batch, self.memory = sim, expert, seed, batch, memory
        self.prompt_KL, self.steps = prompt_KL, sim.horizon

    def demonstrate(self, folder: pathlib.Path, key: Array, count: int, validation: int) -> dict[str, Any]:
        """Scripted episodes, a share of them flawed."""
        seeds = layouts(self.seed, "demonstrations", count + validation)
        made = collect.demonstrations(seeds, key, self.expert, self.sim)
        write = functools.partial(disk.write, meta={"sim": self.name}, overwrite=True)
        facts = write(folder / "episodes", itertools.islice(made, count))
        write(folder / "validation", made)
        return {"episodes": facts["episodes"], "successes": facts["successes"]}

    def collect(self, folder: pathlib.Path, purpose: str, count: int, actor: Actor) -> dict[str, Any]:
        """Rollouts from fresh layouts."""
        rollouts = self._roll(layouts(self.seed, purpose, count), actor)
        made = (episode for seeds, rollout in rollouts for episode in collect.episodes(rollout, seeds, actor.name))
        facts = disk.write(folder, made, meta={"sim": self.name}, overwrite=True)
        return {"episodes": count, "successes": facts["successes"], "true_steps": count * self.steps}

    def measure(self, folder: pathlib.Path, count: int, actor: Actor) -> Measured:
        """Success, and sub-goals by replaying what was done."""
        del folder  # a minute's work
        seeds = layouts(self.seed, "evaluate", count)
        parts = [sharding.host(rollout) for _, rollout in self._roll(seeds, actor)]
        rollout = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)  # without the last padding
        reached = collect.subgoal_rates(rollout, jnp.asarray(seeds), self.sim)
        return Measured(rollout.truth_BNT.any(axis=(1, 2)), reached, count * self.steps)

    def play(self, count: int, actor: Actor) -> Iterator[Played]:
        """Rollouts on the device."""
        for seeds, rollout in self._roll(layouts(self.seed, "evaluate", count), actor):
            padded_B = jnp.asarray(np.resize(seeds, self.batch))
            start = collect.begin(padded_B, self.prompt_KL, self.sim, self.memory)
            yield Played(dataclasses.replace(start, sim=None), rollout, len(seeds))

    def _roll(self, seeds: np.ndarray, actor: Actor) -> Iterator[tuple[np.ndarray, Imagined]]:
        """Rollouts in equal batches of seeds, so that one program does; rows beyond the seeds given are padding."""
        for low in range(0, len(seeds), self.batch):
            part = seeds[low : low + self.batch]
            padded_B = jnp.asarray(np.resize(part, self.batch))
            key = jax.random.fold_in(actor.key, low)
            yield part, actor.acting.roll(actor.params, padded_B, key, actor.temperature)
