"""What a phase really takes on the devices that are here, to hold the compiler's account against."""

from __future__ import annotations

import pathlib
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax import sharding
from wovr_jax.plan.chips import Topology
from wovr_jax.plan.phases import PHASES, On
from wovr_jax.recipe import Recipe

STATUS, CLEAR = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")


class Measured(NamedTuple):
    """What a phase took.

    Attributes:
      bytes: at the peak, that were not there before.
      seconds: of each run after the first.
    """

    bytes: int
    seconds: tuple[float, ...]


def measured(name: str, recipe: Recipe, here: Topology, runs: int = 1) -> Measured:
    """Runs the phase on made-up arrays, once to warm up and ``runs`` times more.

    On a CPU the bytes are those of the process, all its devices together, from Linux's account of it. An accelerator
    knows its peak since the process began, so measure one phase in each process there.
    """
    over = sharding.mesh(recipe.mesh, here.devices)
    phase = PHASES[name](recipe, On(over))
    with jax.set_mesh(over):
        program = phase.program.lower(*phase.args).compile()
        before = _now(here)
        args = jax.tree.map(_made, phase.args)
        took = []
        for _ in range(runs + 1):
            begin = time.perf_counter()
            result = jax.block_until_ready(program(*args))
            took.append(time.perf_counter() - begin)
            args = (result[0], *args[1:]) if phase.chains else args
            del result  # or two of them would be there at the next peak
    return Measured(_peak(here) - before, tuple(took[1:]))


def _made(shape: Any) -> Any:
    """Zeros in their place, or a key. Of flags the last one of every other row is set: successes to learn from."""
    if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return jax.device_put(jax.random.key(0), shape.sharding)
    made = np.zeros(shape.shape, shape.dtype)
    if shape.dtype == bool and shape.ndim:
        made.reshape(len(made), -1)[1::2, -1] = True
    return jax.device_put(made, shape.sharding)


def _now(here: Topology) -> int:
    """Bytes in use; on a CPU, Linux forgets the peak so far."""
    if here.devices[0].platform != "cpu":
        return here.devices[0].memory_stats()["bytes_in_use"]
    CLEAR.write_text("5")
    return _status("VmRSS")


def _peak(here: Topology) -> int:
    if here.devices[0].platform != "cpu":
        return here.devices[0].memory_stats()["peak_bytes_in_use"]
    return _status("VmHWM")


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return int(found.group(1)) * 1024
