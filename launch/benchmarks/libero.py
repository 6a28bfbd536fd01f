"""How fast LIBERO steps here: without a camera, one camera in every step, both, and one frame for a chunk of eight.

    python launch/benchmark_libero.py                    1 and 2 workers, libero_spatial, task 0
    python launch/benchmark_libero.py --workers 1,4,16 --steps 200

Steps are control steps of 1/20 s, counted over all workers; building and reset are measured by themselves. CPU time is
that of the workers, and says more than wall time on a machine with other work. Needs make libero.
"""

from __future__ import annotations

import argparse
import pathlib
import resource
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

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


def main() -> None:
    """Measures every way with every number of workers and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="1,2", help="numbers of workers, e.g. 1,2 (default)")
    parser.add_argument("--steps", type=int, default=48, help="control steps of each worker (default 48)")
    parser.add_argument("--suite", default="libero_spatial")
    args = parser.parse_args()

    from wovr_jax.sim.libero.setup import LiberoError

    print("workers  way                       steps/s  CPU ms/step  reset s  GB a worker")
    try:
        for workers in map(int, args.workers.split(",")):
            for way in WAYS:
                print(f"{workers:7d}  {way:24s}  {measure(workers, way, args.suite, args.steps // CHUNK)}", flush=True)
    except LiberoError as error:
        sys.exit(str(error))


def measure(workers: int, way: str, suite: str, chunks: int) -> str:
    """One row."""
    from wovr_jax.sim.libero.pool import Pool
    from wovr_jax.sim.libero.settings import SceneConfig
    from wovr_jax.sim.libero.tasks import protocol, trials

    settings, draw = WAYS[way]
    trial = trials(suite, [0], only=[0])[0]
    with Pool(workers, SceneConfig(**settings)) as pool:
        for _ in pool.map(episode, [(trial, protocol("openvla"), 1, draw)] * workers):
            pass  # builds the scenes and compiles what numba compiles
        began = time.perf_counter()
        found = [value for _, value in pool.map(episode, [(trial, protocol("openvla"), chunks, draw)] * workers)]
        wall = time.perf_counter() - began
    resets = sum(one["reset"] for one in found) / workers
    steps = workers * chunks * CHUNK
    cpu = 1000 * sum(one["cpu"] for one in found) / steps
    memory = max(one["memory"] for one in found)
    return f"{steps / (wall - resets):7.1f}  {cpu:11.0f}  {resets:7.1f}  {memory:11.2f}"


def episode(bench: Any, trial: Any, protocol: Any, chunks: int, draw: str) -> dict[str, float]:
    """In a worker: a reset and some chunks of random motion."""
    import numpy as np

    began = time.perf_counter()
    scene = bench.at(trial.task)
    scene.reset(trial, protocol)
    reset, used = time.perf_counter() - began, time.process_time()
    for action_TA in np.random.default_rng(0).uniform(-1, 1, (chunks, CHUNK, 7)):
        scene.play(action_TA, draw, stop=False)
        bench.beat()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"reset": reset, "cpu": time.process_time() - used, "memory": memory}


if __name__ == "__main__":
    main()
