"""A policy in the simulators of one host: on the host's own devices, chunk by chunk, and what is kept of it.

The programs of a run need all of its processes at once, and a simulator takes as long as it takes: processes that
stepped theirs together would wait for the slowest at every chunk. So each takes the policy onto its own devices, plays
its share of the trials there, and meets the others afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from wovr_jax.core import processes, sharding
from wovr_jax.core.pixels import to_float
from wovr_jax.core.sharding import Axes
from wovr_jax.sim.arena import Actor, true_rollout
from wovr_jax.sim.libero.collect import PATIENCE_S
from wovr_jax.sim.libero.rollout import Act, Outcome, View
from wovr_jax.sim.libero.tasks import Trial, draw_seed
from wovr_jax.types import Array, Imagined


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


def check_mesh(shapes: Any, axes: Axes) -> None:
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


# --- a policy between the chunks ------------------------------------------------------------


def make_act(actor: Actor, prompt_KL: np.ndarray, batch: int) -> Act:
    """Returns a policy as what ``rollouts`` asks."""

    def act(views: Sequence[View]) -> np.ndarray:
        frame_BHWC, prompt_BL, seed_B = _fill_batch(views, batch, prompt_KL)
        action_BTA = actor.acting.act(actor.params, frame_BHWC, prompt_BL, actor.key, seed_B, actor.temperature)
        return np.asarray(action_BTA)[: len(views)]

    return act


def _fill_batch(views: Sequence[View], batch: int, prompt_KL: np.ndarray) -> tuple[Array, Array, Array]:
    """Returns frames, prompts and seeds of the views, which are repeated until the batch is full."""
    # Always a batch of one size, so that one program is compiled; answers to the repeats are dropped.
    rows = [views[n % len(views)] for n in range(batch)]
    return (
        jnp.asarray(np.stack([view.frame_HWC for view in rows])),
        jnp.asarray(prompt_KL[[view.trial.task.index for view in rows]]),
        jnp.asarray([draw_seed(view.trial, view.chunk) for view in rows], jnp.uint32),
    )


class RolloutRecorder:
    """A policy that acts for ``rollouts`` and keeps what a learner has to know: frames, tokens, log-probabilities."""

    def __init__(self, actor: Actor, prompt_KL: np.ndarray, batch: int):
        self._actor, self._prompt_KL, self._batch = actor, prompt_KL, batch
        self._chunks: dict[tuple[Trial, int], tuple[np.ndarray, ...]] = {}

    def act(self, views: Sequence[View]) -> np.ndarray:
        """Chooses a chunk for each view."""
        frame_BHWC, prompt_BL, seed_B = _fill_batch(views, self._batch, self._prompt_KL)
        choice = self._actor.acting.sample(self._actor.params, frame_BHWC, prompt_BL, self._actor.key, seed_B)
        token_BTA, logp_BTA, action_BTA = (np.asarray(part) for part in choice)
        for n, view in enumerate(views):
            self._chunks[view.trial, view.chunk] = (view.frame_HWC, token_BTA[n], logp_BTA[n], action_BTA[n])
        return action_BTA[: len(views)]

    def stack(self, outcomes: Sequence[Outcome], chunks: int) -> Imagined:
        """Returns trials as rows. After its first success nothing of a row is true; a learner's mask leaves it out."""
        rows = []
        for trial in (outcome.trial for outcome in outcomes):
            played = [self._chunks[trial, n] for n in range(chunks) if (trial, n) in self._chunks]
            columns = [np.stack(column) for column in zip(*played, strict=True)]
            # All rows have as many chunks; those after the end are zeros.
            rows.append(
                [np.pad(column, [(0, chunks - len(played))] + [(0, 0)] * (column.ndim - 1)) for column in columns]
            )
        frame_BNHWC, token_BNTA, logp_BNTA, action_BNTA = (np.stack(column) for column in zip(*rows, strict=True))
        steps = chunks * token_BNTA.shape[2]
        # A success holds from its step on; without one the end lies behind the last step.
        end_B = np.array([outcome.steps if outcome.success else steps + 1 for outcome in outcomes])
        success_BS = np.arange(1, steps + 1) >= end_B[:, None]
        return true_rollout(
            frame_BNHWC=to_float(frame_BNHWC),
            task_B=np.array([outcome.trial.task.index for outcome in outcomes], np.int32),
            prompt_KL=self._prompt_KL,
            token_BNTA=token_BNTA,
            logp_BNTA=logp_BNTA,
            action_BNTA=action_BNTA,
            success_BNT=success_BS.reshape(token_BNTA.shape[:3]),
        )
