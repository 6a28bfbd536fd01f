"""Which witness belongs to which true environment: the only place that knows all of them."""

from __future__ import annotations

from wovr_jax.sim.arena import Arena
from wovr_jax.sim.embedded import Embedded
from wovr_jax.sim.libero.arena import Libero
from wovr_jax.sim.libero.witness import LiberoWitness
from wovr_jax.sim.witness import EmbeddedWitness, Witness


def open_witness(arena: Arena) -> Witness:
    """Returns what an audit may ask of the true environment of a run.

    Raises:
      TypeError: for an environment that has no witness yet.
    """
    if isinstance(arena, Embedded):
        return EmbeddedWitness(arena)
    if isinstance(arena, Libero):
        return LiberoWitness(arena)
    raise TypeError(f"no witness for {type(arena).__name__}: add one to audit/witnesses.py")
