"""How fast LIBERO steps here: without a camera, one camera in every step, both, and one frame for a chunk of eight.

    python launch/benchmark.py libero                    1 and 2 workers, libero_spatial, task 0
    python launch/benchmark.py libero --workers 1,4,16 --steps 200

Steps are control steps of 1/20 s, counted over all workers; building and reset are measured by themselves. CPU time is
that of the workers, and says more than wall time on a machine with other work. Needs make libero.
"""

from __future__ import annotations

import argparse
import resource
import time
from typing import Any

from launch.flags import positive

CHUNK = 8
WAYS: dict[str, tuple[dict[str, Any], str]] = {
    "no camera": ({"size": 0}, "none"),
    "one camera, every step": ({"size": 256, "wrist": False}, "all"),
    "both cameras, every step": ({"size": 256}, "all"),
    "both, fast drawing": ({"size": 256, "drawing": "fast"}, "all"),
    "one camera, chunk's last": ({"size": 256, "wrist": False}, "last"),
    "one, last, fast drawing": ({"size": 256, "wrist": False, "drawing": "fast"}, "last"),
}
"""How it is drawn -> settings of the scene, and which frames."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this measurement."""
    parser.add_argument("--workers", type=counts, default=[1, 2], help="numbers of workers, e.g. 1,4; default 1,2")
    parser.add_argument(
        "--steps", type=positive, default=48, help="control steps of each worker, in chunks of 8 (default 48)"
    )
    parser.add_argument("--suite", default="libero_spatial")


def run(args: argparse.Namespace) -> None:
    """Measures every way with every number of workers and prints a table."""
    print("workers  way                       steps/s  CPU ms/step  reset s  GB a worker")
    for workers in args.workers:
        for way in WAYS:
            print(
                f"{workers:7d}  {way:24s}  {measure(workers, way, args.suite, max(args.steps // CHUNK, 1))}", flush=True
            )


def counts(text: str) -> list[int]:
    """Reads ``"1,4"`` as numbers of workers."""
    return [positive(part) for part in text.split(",")]


def measure(workers: int, way: str, suite: str, chunks: int) -> str:
    """Returns a row of the table."""
    from wovr_jax.sim.libero.evaluate import trials
    from wovr_jax.sim.libero.pool import Pool
    from wovr_jax.sim.libero.tasks import SceneConfig, protocol

    settings, draw = WAYS[way]
    trial = trials(suite, [0], only=[0])[0]
    with Pool(workers, SceneConfig(**settings)) as pool:
        for _ in pool.map(episode, [(trial, protocol("openvla"), 1, draw)] * workers):
            pass  # builds the scenes and compiles what numba compiles
        began = time.perf_counter()
        measured = [value for _, value in pool.map(episode, [(trial, protocol("openvla"), chunks, draw)] * workers)]
        wall = time.perf_counter() - began
    # Resets are measured by themselves: every worker does one at the beginning, side by side with the others.
    resets = sum(worker["reset"] for worker in measured) / workers
    steps = workers * chunks * CHUNK
    cpu = 1000 * sum(worker["cpu"] for worker in measured) / steps
    memory = max(worker["memory"] for worker in measured)
    return f"{steps / (wall - resets):7.1f}  {cpu:11.0f}  {resets:7.1f}  {memory:11.2f}"


def episode(state: Any, trial: Any, protocol: Any, chunks: int, draw: str) -> dict[str, float]:
    """Runs in a worker: a reset and some chunks of random motion."""
    import numpy as np

    began = time.perf_counter()
    scene = state.open_scene(trial.task)
    scene.reset(trial, protocol)
    reset, used = time.perf_counter() - began, time.process_time()
    for action_TA in np.random.default_rng(0).uniform(-1, 1, (chunks, CHUNK, 7)):
        # A success would end the episode early, and the ways would not step the same.
        scene.play(action_TA, draw, stop=False)
        state.heartbeat()
    # The largest so far, of this worker; Linux counts kibibytes.
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"reset": reset, "cpu": time.process_time() - used, "memory": memory}
