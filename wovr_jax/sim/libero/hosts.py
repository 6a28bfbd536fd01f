"""A policy for the simulators of one host, when a run has several.

The programs of a run need all of its processes at once, and a simulator takes as long as it takes: processes that
stepped theirs together would wait for the slowest at every chunk. So each takes the policy onto its own devices, plays
its share of the trials there, and meets the others afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from wovr_jax.core import processes, sharding
from wovr_jax.core.sharding import Axes
from wovr_jax.sim.arena import Actor
from wovr_jax.sim.libero.collect import PATIENCE_S


@contextlib.contextmanager
def alone(actor: Actor) -> Iterator[Actor]:
    """Inside, the mesh is of this process's devices, which hold the policy; at the end the processes meet again.

    Between host and devices nothing moves. A device holds, beside its piece of the policy that the run cuts over all
    devices, one of a copy that is cut over those of its process. With one process nothing changes.

    Raises:
      ShardingError: where the devices of a process cannot hold the policy, or processes have unlike numbers of them.
      ProcessError: when another process does not come back.
    """
    over = _shared()
    if over is None:
        yield actor
        return
    own, every = _meshes(over)
    processes.meet("take the policy to their simulators")
    with jax.set_mesh(every):
        spread = jax.block_until_ready(_spread(actor.params, actor.acting.axes))
    at = sharding.shardings(actor.params, actor.acting.axes, own)

    def piece(leaf: jax.Array, at: jax.sharding.Sharding) -> jax.Array:
        held = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, at, held)

    params = jax.tree.map(piece, spread, at)
    raw = sharding.host(jax.random.key_data(actor.key))  # of the mesh of all, where keys are drawn
    with jax.set_mesh(own):
        yield dataclasses.replace(actor, load=lambda: params, key=jax.random.wrap_key_data(jnp.asarray(raw)))
    processes.meet("play their trials", wait_s=PATIENCE_S)


@functools.partial(jax.jit, static_argnums=1)
def _spread(params: Any, axes: Axes) -> Any:
    """As the mesh in use has it, in one program: of several in flight two processes may take the collectives in another
    order, and wait for ever."""
    return sharding.keep(params, axes)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Inside, this process computes over its own devices only."""
    over = _shared()
    if over is None:
        yield
        return
    with jax.set_mesh(_meshes(over)[0]):
        yield


def check(shapes: Any, axes: Axes) -> None:
    """Refuses at once what ``alone`` would refuse hours later.

    Args:
      shapes: of the policy's parameters.
      axes: how they lie on a mesh.

    Raises:
      ShardingError: also where two processes hold the same rows of a batch: each would play them, not quite alike.
    """
    over = _shared()
    if over is None:
        return
    sharding.shardings(shapes, axes, _meshes(over)[0])
    if any(
        len({device.process_index for device in row}) > 1 for row in over.devices.reshape(-1, over.devices.shape[-1])
    ):
        raise sharding.ShardingError(
            f"mesh: tensor {over.devices.shape[-1]} reaches over several processes, whose simulators would play the "
            "same trials. Let it be at most the devices of one (--config.mesh.tensor=...), and fsdp take the others."
        )


def _shared() -> Mesh | None:
    """The mesh in use, where it reaches over several processes."""
    return sharding.current() if processes.count() > 1 else None


def _meshes(over: Mesh) -> tuple[Mesh, Mesh]:
    """Of this process's devices; and of all, a row for each process, which holds a whole copy of what lies there."""
    by_process: dict[int, list[Any]] = {}
    for device in over.devices.flat:
        by_process.setdefault(device.process_index, []).append(device)
    counts = {process: len(devices) for process, devices in by_process.items()}
    if len(set(counts.values())) > 1:
        raise sharding.ShardingError(
            f"mesh: processes have {counts} of its devices; for simulators on each of them they need equally many. "
            "Let one axis take what is left (--config.mesh.data=-1)."
        )
    mine = by_process[jax.process_index()]
    every = np.asarray([by_process[process] for process in sorted(by_process)])[..., None]
    kinds = (AxisType.Auto,) * len(sharding.MESH_AXES)
    return sharding.mesh(sharding.MeshConfig(fsdp=len(mine)), mine), Mesh(every, sharding.MESH_AXES, axis_types=kinds)
