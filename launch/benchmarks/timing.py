"""Measures compiled programs: seconds, operations, memory, and what this device's matrix products reach.

Imported after the command line is read, for it imports jax.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax.plan import flops

LEAST = 0.05
"""Seconds that a measurement should have: a quicker program is called several times in it."""
MOST_CALLS = 50
SIZES = {"cpu": (512, 1024, 2048), "gpu": (4096, 8192, 16384), "tpu": (4096, 8192)}
"""Sides of the square matrices whose product is timed; of a platform that is not here, those of a GPU."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A program with what it is called on.

    Attributes:
      name: of the part of a run.
      batch: rows that it takes at once; None where the settings say how many.
      program: jitted.
      args: arrays on the device.
      dtype: of its matrix products.
      frames: new frames of a call, 0 where it makes none.
      chains: whether its first result takes the place of its first argument, which is donated, as in training.
    """

    name: str
    batch: int | None
    program: Any
    args: tuple[Any, ...]
    dtype: str
    frames: int = 0
    chains: bool = False


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program and what the compiler and the trace say of it.

    Attributes:
      executable: to be called.
      trace_s, compile_s: seconds of making it. A program that JAX finds in its cache on disk is read, not compiled.
      flops: matrix products and convolutions of the trace, two for each multiplication and addition, loops by turns.
      compiler_flops: the compiler's own count of all operations, with the body of every loop once; None without one.
      bytes: arguments, results and temporary memory by the compiler's account; None without one.
    """

    executable: Any
    trace_s: float
    compile_s: float
    flops: int
    compiler_flops: float | None
    bytes: int | None


def lower(part: Part) -> Callable[[], Compiled]:
    """Traces a part and returns what compiles it, which another thread may call."""
    begin = time.perf_counter()
    traced = part.program.trace(*part.args)
    count, lowered = flops.count(traced.jaxpr.jaxpr), traced.lower()
    trace_s = time.perf_counter() - begin

    def compile_now() -> Compiled:
        begin = time.perf_counter()
        executable = lowered.compile()
        compile_s = time.perf_counter() - begin
        # Both accounts are the backend's to give or not.
        cost, memory = executable.cost_analysis() or {}, executable.memory_analysis()
        size = None
        if memory is not None:
            # A donated argument and its result are one memory.
            kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
            size = memory.argument_size_in_bytes + memory.temp_size_in_bytes + kept
        return Compiled(executable, trace_s, compile_s, count, cost.get("flops"), size)

    return compile_now


class Bench:
    """A compiled part that is called again and again.

    Attributes:
      part, compiled: what is called.
      calls: how often in one measurement.
      peak: bytes on the device at its peak, where the device says so and no earlier program had a higher one.
    """

    def __init__(self, part: Part, compiled: Compiled):
        self.part, self.compiled, self.calls = part, compiled, 1
        self._args = part.args
        before = device_peak()
        warm = self.measure()  # what is loaded or allocated at a first call is not part of a measurement
        after = device_peak()
        # A device knows its peak since the process began, so only a new one belongs to this program.
        self.peak = after if before is not None and after is not None and after > before else None
        if warm < LEAST:
            self.calls = int(np.clip(LEAST / max(self.measure(), 1e-6), 1, MOST_CALLS))

    def measure(self) -> float:
        """Returns the seconds of a call, the device's work included."""
        begin = time.perf_counter()
        self._call()
        return (time.perf_counter() - begin) / self.calls

    def _call(self) -> None:
        result = None
        for _ in range(self.calls):
            # One after another on the device, while the host hands over the next: what starting a call costs is hidden.
            result = self.compiled.executable(*self._args)
            if self.part.chains:
                self._args = (result[0], *self._args[1:])
        jax.block_until_ready(result)


def repeat(benches: Sequence[Bench], repeats: int, seconds: float) -> list[list[float]]:
    """Measures several programs in turn, A B A B, so that what else the machine does meets all of them alike.

    Args:
      benches: to measure.
      repeats: measurements of each.
      seconds: after so many no further round begins; each has at least one.

    Returns:
      the seconds of each measurement, for each program.
    """
    taken: list[list[float]] = [[] for _ in benches]
    begin = time.perf_counter()
    for turn in range(repeats):
        if turn and time.perf_counter() - begin > seconds:
            break
        for bench, times in zip(benches, taken, strict=True):
            times.append(bench.measure())
    return taken


def spread(values: Sequence[float]) -> dict[str, float]:
    """Returns median, low and high."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def measure_matrix(dtype: str, sizes: Sequence[int] | None = None, repeats: int = 10) -> dict[str, Any]:
    """Measures products of square matrices of random numbers; the best of the sizes is this device's rate.

    float32 is multiplied as JAX does it here by default, which on newer GPUs and TPUs is with fewer digits.

    Returns:
      ``rate``, operations a second at the best size; ``size``; ``rates`` by size.
    """
    sizes = SIZES.get(jax.default_backend(), SIZES["gpu"]) if sizes is None else sizes
    product, rates = jax.jit(jnp.matmul), {}
    for size in sizes:
        # Random numbers: a chip that multiplies zeros clocks higher.
        a, b = (jax.random.normal(jax.random.key(k), (size, size), jnp.dtype(dtype)) for k in range(2))
        part = Part("matrix", size, product, (a, b), dtype)
        bench = Bench(part, lower(part)())
        # The best and not the median: this is what the device can do, beside which other work only takes away.
        rates[size] = 2 * size**3 / min(repeat([bench], repeats, 5.0)[0])
    best = max(rates, key=lambda size: rates[size])
    return {"rate": rates[best], "size": best, "rates": {str(size): rate for size, rate in rates.items()}}


def device_peak() -> int | None:
    """Returns the highest memory of the first device since the process began; None where it keeps no account."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
