"""Run by test_processes.py as one process or as each of two: the fake LIBERO, with a real policy on the devices of all.

python tests/sim/libero/host_cases.py <folder> 1x4x1      prints a line of JSON: what everything that plays came to
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import sys

import jax
import numpy as np

from tests import joined  # noqa: F401  # before anything is computed
from tests.sim.libero.fake_libero import DEMONSTRATE, TASKS, FakePool
from tests.sim.libero.test_arena import recipe
from wovr_jax.core import sharding
from wovr_jax.core.sharding import MeshConfig
from wovr_jax.data import episodes as disk
from wovr_jax.data import starts as start_states
from wovr_jax.policy import vla
from wovr_jax.policy.actions import Codec
from wovr_jax.run import programs
from wovr_jax.run.bind import open_environment
from wovr_jax.sim.arena import Actor, Groups
from wovr_jax.sim.libero import arena as libero
from wovr_jax.sim.libero import collect
from wovr_jax.sim.libero.witness import LiberoWitness


def main(folder: pathlib.Path, mesh: MeshConfig) -> None:
    """Demonstrates, collects, measures, compares, explores and follows."""
    libero.Pool, libero.tasks, collect.PART = FakePool, lambda _: TASKS, 2
    libero.DEMONSTRATE = DEMONSTRATE
    libero.setup.fingerprint = lambda renderer: {"renderer": renderer}
    with sharding.use(mesh):
        one = recipe()
        env, net = open_environment(one), vla.network(one.policy)
        arena = env.arena
        assert isinstance(arena, libero.Libero)
        acting = programs.acting(one.policy, net, Codec, env.prompt_KL, one.temperature, one.sim, one.world.slots)
        params = sharding.place(net.init(jax.random.key(1)), vla.AXES)
        policy = Actor(acting, lambda: params, jax.random.key(2), 1.0)
        said = {"demonstrated": arena.demonstrate(folder, jax.random.key(0), 6, 2)}
        said |= {"collected": arena.collect(folder / "made", "collect-0", 8, policy)}
        said |= {"hash": [_hash(folder / name) for name in ("episodes", "validation", "made")]}
        said |= {"measured": np.asarray(arena.measure(folder / "sampled", 6, policy).success_B).tolist()}
        said |= {"played": [_sums((part.start, part.rollout)) for part in LiberoWitness(arena).play(6, policy)]}
        groups = Groups(groups=2, size=4, chunks=2)
        said |= {"explored": [_sums(arena.explore(number, policy, groups)) for number in range(2)]}
        table = start_states.initial(disk.read(folder / "made"))
        pushes = np.tile(np.linspace(0, 1, 8, dtype=np.float32)[:, None, None], (1, 8, 7))
        said |= {"followed": LiberoWitness(arena).follow(table, np.arange(8), pushes)[0].tolist()}
    print(json.dumps(said))


def _hash(folder: pathlib.Path) -> str:
    made = disk.read(folder)
    parts = [part for one in made for part in (one.frame_SHWC, one.action_SA, one.success_S)]
    return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()


def _sums(tree: object) -> list[float]:
    """A number for each array, rounded: log-probabilities of two devices differ in the last bits."""
    return [round(float(np.abs(leaf, dtype=np.float64).sum()), 2) for leaf in jax.tree.leaves(sharding.host(tree))]


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), MeshConfig(*map(int, sys.argv[2].split("x"))))
