"""Measures what a phase really takes on the devices that are here, to hold the compiler's account against."""

from __future__ import annotations

import ctypes
import gc
import os
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax.core import sharding
from wovr_jax.plan.chips import Topology
from wovr_jax.plan.phases import PHASES, Phase, Placement
from wovr_jax.run.recipe import Recipe

STATUS, CLEAR = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's names for them


class MeasureError(ValueError):
    """Tells that what is here cannot be measured."""


class Measured(NamedTuple):
    """What a phase took.

    Attributes:
      bytes: of each device, at the peak, that were not there before.
      seconds: of each run after the first.
    """

    bytes: int
    seconds: tuple[float, ...]


def measure_phase(name: str, recipe: Recipe, here: Topology, runs: int = 1) -> Measured:
    """Runs the phase on made-up arrays, once to warm up and ``runs`` times more.

    On a CPU the bytes are the process's, shared out over its devices, from Linux's account of it, in runs of their own,
    during which the C library keeps no large block that is freed. An accelerator knows its peak since the process
    began, so measure one phase in each process there.

    Raises:
      MeasureError: on a CPU whose system is not Linux, or keeps its account to itself.
    """
    over = sharding.mesh(recipe.mesh, here.devices)
    phase = PHASES[name](recipe, Placement(over))
    with jax.set_mesh(over):
        program = phase.program.lower(*phase.args).compile()
        if here.devices[0].platform == "cpu":
            # Memory and time in runs of their own: the settings that make memory visible cost time.
            grown = _measure_growth(lambda count: _run(program, phase, count))
            _, *took = _run(program, phase, runs + 1)
            return Measured(grown // len(here.devices), tuple(took))
        # The first device stands for all: each holds the same share of everything.
        before = here.devices[0].memory_stats()["bytes_in_use"]
        _, *took = _run(program, phase, runs + 1)
        return Measured(here.devices[0].memory_stats()["peak_bytes_in_use"] - before, tuple(took))


def _run(program: Any, phase: Phase, runs: int) -> list[float]:
    """Returns the seconds of each run; nothing of it stays."""
    args, took = jax.tree.map(_make_array, phase.args), []
    for _ in range(runs):
        # The arrays are made before the clock starts, and JAX returns before the work is done: hence the wait.
        begin = time.perf_counter()
        result = jax.block_until_ready(program(*args))
        took.append(time.perf_counter() - begin)
        # A training step donates its state, so the next run needs the new one.
        args = (result[0], *args[1:]) if phase.chains else args
        del result  # or two of them would be there at the next peak
    return took


def _make_array(shape: Any) -> Any:
    """Makes zeros in their place, or a key.

    Of flags the last one of every other row is set: with no success at all, or nothing else, an update has no advantage
    to learn from and skips its work.
    """
    if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return jax.device_put(jax.random.key(0), shape.sharding)
    array = np.zeros(shape.shape, shape.dtype)
    if shape.dtype == bool and shape.ndim:
        array.reshape(len(array), -1)[1::2, -1] = True
    # A copy: the untouched pages of np.zeros are no memory to Linux, and what NumPy owns cannot be donated.
    return jax.device_put(array, shape.sharding, may_alias=False)


def _measure_growth(run: Callable[[int], object]) -> int:
    """Returns by how many bytes the process is larger at the peak of two runs than after one, which loads libraries."""
    if not os.access(CLEAR, os.W_OK):
        raise MeasureError(
            f"a CPU's memory is measured by Linux, through {CLEAR}, which cannot be written: plan without it"
        )
    c = ctypes.CDLL(None)
    c.mallopt(_MMAP_THRESHOLD, 2**20)  # blocks from here on go back to Linux as soon as they are freed
    try:
        run(1)
        gc.collect()
        time.sleep(0.2)  # XLA's threads let go of temporary memory only after the result is there
        c.malloc_trim(0)
        CLEAR.write_text("5", encoding="utf-8")  # Linux forgets the peak so far
        before = _read_status("VmRSS")
        run(2)
        return _read_status("VmHWM") - before
    finally:
        c.mallopt(_MMAP_THRESHOLD, 2**25)  # where both end by themselves after large blocks
        c.mallopt(_TRIM_THRESHOLD, 2**26)


def _read_status(field: str) -> int:
    """Returns a field of Linux's account of this process, in bytes."""
    line = re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text(encoding="utf-8"))
    assert line is not None
    return int(line.group(1)) * 1024
