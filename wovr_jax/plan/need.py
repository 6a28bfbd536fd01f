"""Asks the compiler what a program needs of every device."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from wovr_jax.core import sharding
from wovr_jax.core.sharding import MeshConfig
from wovr_jax.plan import flops
from wovr_jax.plan.chips import SLICES, Topology, topology
from wovr_jax.plan.phases import PHASES, Placement
from wovr_jax.run.recipe import Recipe

COLLECTIVE = re.compile(r"[])}] (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
"""An operation of a compiled program, behind its type, which may be a tuple."""
REFUSED = re.compile(r"\(?([\d.]+)([KMGT])\)?(?: of|\) exceeds)")
"""In what the TPU compiler says of a program that its memory does not hold: how much that would be."""
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes on each device unless it says otherwise.

    Attributes:
      name: of the phase.
      held: name -> arguments: parameters, optimizer state, batch.
      beside: name -> what stays in memory and this program does not read.
      temporary: activations, gradients, buffers and results that take the place of no argument, at their peak.
      flops: of all devices together, one run of the program.
      times: how often a whole run runs it.
      collectives: kind -> how often it stands in the program; one inside a loop counts once.
      refused: what the compiler said if it found that the program does not fit.
    """

    name: str
    held: dict[str, int]
    beside: dict[str, int]
    temporary: int
    flops: int
    times: int
    collectives: dict[str, int]
    refused: str = ""

    @property
    def alone(self) -> int:
        """What the program itself takes: its arguments, and what it makes on the way."""
        return sum(self.held.values()) + self.temporary

    @property
    def peak(self) -> int:
        """All of it, with what lies beside."""
        return self.alone + sum(self.beside.values())

    def fits(self, where: Topology) -> bool:
        """Whether these devices hold it."""
        return not self.refused and self.peak < where.chip.gib * GIB

    def seconds(self, where: Topology, efficiency: float) -> float:
        """Of one run of the program, at a share of the devices' peak; not a number where that is not known."""
        # The whole program's operations, so against the peak of all devices together.
        peak = len(where.devices) * where.chip.tflops * 1e12
        return self.flops / (peak * efficiency) if peak else math.nan


def need(name: str, recipe: Recipe, where: Topology) -> Need:
    """Returns what the phase ``name`` of ``PHASES`` needs on the recipe's mesh of these devices.

    Raises:
      ShardingError: when there are too few devices, or the mesh does not divide a batch or a parameter.
    """
    over = sharding.mesh(recipe.mesh, where.devices)
    phase = PHASES[name](recipe, Placement(over))
    held, beside = ({part: count_bytes(tree) for part, tree in trees.items()} for trees in (phase.held, phase.beside))
    with jax.set_mesh(over):
        # Counted in the trace: the compiler's own count has the body of a loop once.
        traced = phase.program.trace(*phase.args)
        count = flops.count(traced.jaxpr.jaxpr)
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            # A TPU's compiler refuses what does not fit, and a plan is to say that too. Anything else is a fault.
            said = str(error)
            if "RESOURCE_EXHAUSTED" not in said:
                raise
            # The figure is of all that the program would have had in memory at once.
            return Need(name, held, beside, max(_exhausted(said) - sum(held.values()), 0), count, phase.times, {}, said)
    sizes = compiled.memory_analysis()
    # Donated arguments and their results are one memory, which ``held`` counts already.
    kept = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    collectives = dict(collections.Counter(COLLECTIVE.findall(compiled.as_text())))
    return Need(name, held, beside, sizes.temp_size_in_bytes + kept, count, phase.times, collectives)


def find_smallest_slice(name: str, recipe: Recipe, generation: str) -> tuple[Recipe, Topology, Need]:
    """Finds the smallest slice of a generation on which a phase fits, its parameters cut over all of its chips.

    Slices that cannot hold what the program is given are passed over without compiling for them.

    Returns:
      the recipe with that mesh, the slice, and the need; of the largest slice, when the phase fits on none.

    Raises:
      ConfigError: when a mesh does not divide a batch of the recipe.
      ShardingError: when it does not divide a parameter.
    """
    for shape in SLICES[generation]:
        where = topology(f"{generation}:{shape}")
        tried = dataclasses.replace(recipe, mesh=MeshConfig(fsdp=len(where.devices)))
        last = shape == SLICES[generation][-1]
        # Compiling a full-size program takes minutes, and adding up its arguments none.
        if not last and count_held_bytes(name, tried, where) > where.chip.gib * GIB:
            continue
        required = need(name, tried, where)
        if last or required.fits(where):
            return tried, where, required
    raise AssertionError("the last slice returns")


def count_held_bytes(name: str, recipe: Recipe, where: Topology) -> int:
    """Counts the bytes that a phase has in memory before its program begins; nothing is compiled."""
    phase = PHASES[name](recipe, Placement(sharding.mesh(recipe.mesh, where.devices)))
    return count_bytes((phase.held, phase.beside))


def count_bytes(tree: Any) -> int:
    """Counts the bytes of shapes that have a place, on the device that holds most."""
    # Keys are left out: a few bytes, and their elements have no size to ask for.
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def _exhausted(said: str) -> int:
    """Returns the bytes that a compiler names which refuses a program."""
    # It names several figures, the largest of which is the whole.
    sizes = [float(size) * 1024 ** "KMGT".index(unit) * 1024 for size, unit in REFUSED.findall(said)]
    return int(max(sizes, default=0))
