"""Which witness belongs to which true environment: the only place that knows all of them."""

from __future__ import annotations

import numpy as np

from wovr_jax.run.bind import Environment
from wovr_jax.run.recipe import Recipe
from wovr_jax.sim.embedded import Embedded
from wovr_jax.sim.libero.arena import Libero
from wovr_jax.sim.libero.witness import LiberoWitness
from wovr_jax.sim.recorded.arena import Recorded
from wovr_jax.sim.recorded.witness import RecordedWitness
from wovr_jax.sim.witness import EmbeddedWitness, Witness


def open_witness(recipe: Recipe, environment: Environment) -> Witness:
    """Returns what an audit may ask of the true environment of a run.

    Raises:
      TypeError: for an environment that has no witness yet.
    """
    arena = environment.arena
    if isinstance(arena, Embedded):
        return EmbeddedWitness(arena)
    if isinstance(arena, Libero):
        return LiberoWitness(arena)
    if isinstance(arena, Recorded):
        sizes = {"batch": recipe.collect.batch, "chunk": recipe.policy.chunk, "memory": recipe.world.slots}
        return RecordedWitness(arena, np.asarray(environment.prompt_KL), **sizes)
    raise TypeError(f"no witness for {type(arena).__name__}: add one to audit/witnesses.py")
