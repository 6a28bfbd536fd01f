"""Run by tests in processes of their own: one state, saved by some devices, restored by others.

    python tests/core/moved_checkpoint.py save FOLDER 2x2x2        prints the SHA-256 of the state's arrays
    python tests/core/moved_checkpoint.py restore FOLDER 1x4x1     the same of what it restored

JAX makes forced CPU devices only as it starts: XLA_FLAGS holds --xla_force_host_platform_device_count=8.
"""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from tests import joined  # noqa: F401  # before anything is computed
from wovr_jax.core import checkpoint, sharding
from wovr_jax.train import step
from wovr_jax.world import dit, model, train
from wovr_jax.world.dit import DiTConfig

WORLD = model.WorldConfig.fake(dit=DiTConfig.fake(dim=48, heads=4, ffn=64))  # divided by four devices


def state(mesh: jax.sharding.Mesh) -> Any:
    """Shapes of a training state of the world model: parameters, their average, moments; where they lie on ``mesh``."""
    objective = train.WorldObjective(WORLD, train.WorldTrainConfig(ema=0.99), (32,))
    shapes = model.networks(WORLD)[0].shapes()
    whole = jax.eval_shape(lambda params: step.create(objective, params), shapes)
    at = sharding.shardings(whole, dit.AXES, mesh)
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), whole, at)


def filled(shapes: Any) -> Any:
    """Random numbers in every array, the moments too."""
    rng = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        host = rng.integers(0, 1000, leaf.shape).astype(leaf.dtype) if leaf.dtype == np.int32 else None
        host = rng.normal(size=leaf.shape).astype(leaf.dtype) if host is None else host
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: host[index])

    return jax.tree.map(fill, shapes)


def digest(tree: Any) -> str:
    """Of every array, gathered from all processes."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        host = leaf if jax.process_count() == 1 else multihost_utils.process_allgather(leaf, tiled=True)
        found.update(jax.tree_util.keystr(path).encode() + np.ascontiguousarray(host).tobytes())
    return found.hexdigest()


def cut(tree: Any) -> int:
    """Arrays of which no device holds everything."""
    return sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(tree))


def main(what: str, folder: str, name: str) -> None:
    with sharding.use(sharding.MeshConfig(*map(int, name.split("x")))) as mesh:
        assert mesh is not None
        shapes = state(mesh)
        if what == "save":
            tree = filled(shapes)
            checkpoint.save(folder, tree)
        else:
            tree = checkpoint.restore(folder, shapes)
        assert all(leaf.sharding == at.sharding for leaf, at in zip(*map(jax.tree.leaves, (tree, shapes)), strict=True))
        print(digest(tree), cut(tree))


if __name__ == "__main__":
    main(*sys.argv[1:])
