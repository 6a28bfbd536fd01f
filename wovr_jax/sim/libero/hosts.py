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
def on_own_devices(actor: Actor) -> Iterator[Actor]:
    """Gives a policy on this process's devices, which are the mesh inside; at the end the processes meet again.

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
    own, by_process = _meshes(over)
    processes.meet("take the policy to their simulators")
    with jax.set_mesh(by_process):
        copies = jax.block_until_ready(_copy_to_each_process(actor.params, actor.acting.axes))
    at = sharding.shardings(actor.params, actor.acting.axes, own)

    def piece(leaf: jax.Array, at: jax.sharding.Sharding) -> jax.Array:
        # The copy of this process, seen as an array of its own mesh.
        shards = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, at, shards)

    params = jax.tree.map(piece, copies, at)
    # Keys are drawn on the mesh of all, and an array of that mesh cannot be used on this one.
    raw_key = sharding.host(jax.random.key_data(actor.key))
    with jax.set_mesh(own):
        yield dataclasses.replace(actor, load=lambda: params, key=jax.random.wrap_key_data(jnp.asarray(raw_key)))
    processes.meet("play their trials", wait_s=PATIENCE_S)


@functools.partial(jax.jit, static_argnums=1)
def _copy_to_each_process(params: Any, axes: Axes) -> Any:
    """Lays the parameters out as the mesh in use has them, a row of which is a process."""
    # One program: of several in flight two processes may take the collectives in another order, and wait for ever.
    return sharding.keep(params, axes)


def check(shapes: Any, axes: Axes) -> None:
    """Refuses at once what ``on_own_devices`` would refuse hours later.

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
    # (data, fsdp, tensor) -> rows of neighbours along ``tensor``, which hold the same rows of a batch.
    tensor_rows = over.devices.reshape(-1, over.devices.shape[-1])
    if any(len({device.process_index for device in row}) > 1 for row in tensor_rows):
        raise sharding.ShardingError(
            f"mesh: tensor {over.devices.shape[-1]} reaches over several processes, whose simulators would play the "
            "same trials. Let it be at most the devices of one (--config.mesh.tensor=...), and fsdp take the others."
        )


def _shared() -> Mesh | None:
    """Returns the mesh in use, where it reaches over several processes."""
    return sharding.current() if processes.count() > 1 else None


def _meshes(over: Mesh) -> tuple[Mesh, Mesh]:
    """Returns the mesh of this process's devices, and one of all whose rows are the processes."""
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
    # (processes, devices of each, 1): parameters are cut over the second axis, and so whole within each process.
    every = np.asarray([by_process[process] for process in sorted(by_process)])[..., None]
    kinds = (AxisType.Auto,) * len(sharding.MESH_AXES)
    return sharding.mesh(sharding.MeshConfig(fsdp=len(mine)), mine), Mesh(every, sharding.MESH_AXES, axis_types=kinds)
