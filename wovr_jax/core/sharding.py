"""Over how many devices, and what lies where: one mesh, one rule table.

A mesh has three axes. ``data`` copies the parameters, ``fsdp`` cuts them and gathers a layer's
when it is computed, ``tensor`` cuts the computation of a layer as well. Batches are cut over
``data`` and ``fsdp`` together.

Each network says in ``AXES``, beside its layers, what the axes of its large parameters mean
("embed", "heads", ...), and ``RULES`` says on which mesh axis each meaning lies. A state of training
(parameters, averages, moments of the optimizer) is one tree, and what ends in the path of a
parameter lies as that parameter does. A large leaf that no line describes, or that cannot be
cut as the rules say, is an error: left alone, it would sit whole on every device.

Without a mesh every function here gives back what it was given, so one device costs nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import jax
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from wovr_jax.core import processes
from wovr_jax.core.config import Between, Faults, checked

MESH_AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
"""Mesh axes that cut a batch."""

RULES = {
    "layers": None,  # a scan walks over it, and a cut layer axis would be gathered whole at each step of the scan
    "embed": "fsdp",  # cut for memory alone: gathered with its layer, just before that is computed
    "heads": "tensor",  # heads do not see each other: attention needs no communication inside
    "mlp": "tensor",  # the hidden axis between two matmuls: one sum over devices after the second
    "vocab": "tensor",
}
"""Meaning of a parameter's axis -> mesh axis; None and unnamed axes stay whole."""

LARGE = 2**20
"""Numbers in a leaf from which on it has to be described, and is not left whole quietly."""

Axes = Sequence[tuple[str, tuple[str | None, ...]]]
"""Lines of (pattern of a path, meaning of each axis); the first that fits counts. ``()`` leaves a leaf whole."""


WHOLE: Axes = (("*", ()),)
"""A network that sits whole on every device."""


class ShardingError(ValueError):
    """A mesh that the devices cannot form, or a leaf that cannot lie on it; the message names every one."""


Devices = Annotated[int, Between(1, also=(-1,))]


@checked
@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; one of them may be -1, "all that are left".

    Attributes:
      data: copies of the parameters.
      fsdp: pieces of the parameters and of the optimizer's state.
      tensor: pieces of the computation of each layer, within one fast network (NVLink, an ICI axis).
    """

    data: Devices = 1
    fsdp: Devices = 1
    tensor: Devices = 1

    def faults(self) -> Faults:
        """Yields more than one axis that is to take what is left."""
        if (sizes := dataclasses.astuple(self)).count(-1) > 1:
            yield "", f"expected -1 once at most, for all devices that are left, got {_product(sizes)}"

    def sizes(self, devices: int) -> tuple[int, int, int]:
        """Returns the sizes of the three axes on so many devices.

        Raises:
          ShardingError: when the devices are too few, or -1 cannot use all of them.
        """
        asked = dataclasses.astuple(self)
        known = math.prod(size for size in asked if size != -1)
        if known > devices:
            raise ShardingError(
                f"mesh: {_product(asked)} needs {known} devices, there are {devices}. Ask for a smaller mesh "
                "(--config.mesh.data=... and the like), or start on more devices."
            )
        if -1 in asked and devices % known:
            raise ShardingError(
                f"mesh: {_product(asked)} cannot use all of {devices} devices: {devices} is not a multiple of {known}."
            )
        data, fsdp, tensor = (devices // known if size == -1 else size for size in asked)
        return data, fsdp, tensor


def mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh of a config over ``devices``, all of JAX's by default.

    ``tensor`` is the innermost axis: its devices are neighbours.

    Raises:
      ShardingError: see ``MeshConfig.sizes``.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = cfg.sizes(len(devices))
    used = np.asarray(devices[: math.prod(sizes)]).reshape(sizes)
    # Auto: XLA chooses how the arrays in between are cut; arguments, results and batches are said to it.
    return Mesh(used, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


@contextlib.contextmanager
def use(cfg: MeshConfig) -> Iterator[Mesh | None]:
    """Traces and places everything inside the block for the mesh of ``cfg``; a mesh of one device changes nothing.

    Raises:
      ShardingError: see ``MeshConfig.sizes``; also when a process has no device in the mesh.
    """
    # Without a mesh arrays stay tied to no device, and programs are those that the cache holds already.
    if math.prod(cfg.sizes(jax.device_count())) == 1 and jax.process_count() == 1:
        yield None
        return
    over = mesh(cfg)
    # A process without a device would run the same program and wait in its first collective for ever.
    if without := set(range(jax.process_count())) - {device.process_index for device in over.devices.flat}:
        raise ShardingError(
            f"mesh: {_product(over.devices.shape)} has no device of processes {sorted(without)} of "
            f"{jax.process_count()}. Let one axis take what is left (--config.mesh.data=-1), or start fewer processes."
        )
    with jax.set_mesh(over):
        _connect(over)
        yield over


def _connect(over: Mesh) -> None:
    """Opens the connections of CPU processes while all of them are here.

    Each group of devices that computes together has its own, made when it is first used, and Gloo waits for the others
    for half a minute only: less than one process may compile longer than another.
    """
    if processes.count() == 1 or jax.default_backend() != "cpu":
        return
    processes.meet("connect")
    wide = [axis for axis in MESH_AXES if over.shape[axis] > 1]
    # Any set of mesh axes may be summed or gathered over, and each is a group of devices of its own.
    for axes in itertools.chain.from_iterable(itertools.combinations(wide, n) for n in range(1, len(wide) + 1)):
        zeros = np.zeros(math.prod(over.shape[axis] for axis in axes), np.float32)
        at = NamedSharding(over, PartitionSpec(axes))
        cut = jax.make_array_from_callback(zeros.shape, at, lambda index, zeros=zeros: zeros[index])
        # From cut to whole is an all-gather, the smallest program that makes the group connect.
        jax.jit(lambda x: x, out_shardings=NamedSharding(over, PartitionSpec()))(cut).block_until_ready()


def shardings(tree: Any, axes: Axes, over: Mesh | AbstractMesh) -> Any:
    """Returns a tree of ``NamedSharding`` for the leaves of ``tree``.

    Args:
      tree: arrays or ``jax.ShapeDtypeStruct``: parameters, or a state of training around them.
      axes: the lines of the network; patterns are those of ``fnmatch`` and fit the end of a path as well.
      over: the mesh.

    Raises:
      ShardingError: naming every large leaf that no line fits, whose rank differs from the line's, or
        that the mesh does not divide.
    """
    faults: list[str] = []  # all of them, so that a new network's table is mended in one go

    def place(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        spec, fault = _spec(path, leaf.shape, axes, over)
        faults.extend([fault] if fault else [])
        return NamedSharding(over, spec)

    placed = jax.tree_util.tree_map_with_path(place, tree)
    if faults:
        raise ShardingError(
            f"sharding: {len(faults)} leaves cannot lie on a mesh of {_product(over.shape)}:\n  " + "\n  ".join(faults)
        )
    return placed


def place(tree: Any, axes: Axes) -> Any:
    """Puts ``tree`` on the mesh in use, cut as ``axes`` says; in a program that is being traced, see ``keep``."""
    # Inside a program a sharding is a constraint; nothing can be moved by hand.
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree)):
        return keep(tree, axes)
    over = current()
    return tree if over is None else put(tree, shardings(tree, axes, over))


def describe(shapes: Any, axes: Axes) -> Any:
    """``shapes`` with the place that each leaf has on the mesh in use, so that a reader can put it there at once."""
    over = current()
    if over is None:
        return shapes
    where = shardings(shapes, axes, over)
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, where)


def host(tree: Any) -> Any:
    """Returns ``tree`` as numpy arrays on the host, in every process, wherever its pieces lie."""

    def fetch(leaf: Any) -> Any:
        # A collective, so all processes have to come here, and in the same order of leaves.
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return jax.device_get(leaf)

    return jax.tree.map(fetch, tree)


def whole(tree: Any) -> Any:
    """Puts a copy of ``tree`` on every device of the mesh in use: data sets, start states, small networks."""
    over = current()
    if over is None:
        return tree
    return put(tree, jax.tree.map(lambda _: NamedSharding(over, PartitionSpec()), tree))


def put(tree: Any, at: Any) -> Any:
    """Puts the leaves of ``tree`` where the shardings ``at`` say.

    Of several processes, which all hold it, each takes its pieces from its own copy: JAX would first send every array
    around to compare.
    """

    def piece(leaf: Any, at: NamedSharding) -> jax.Array:
        if jax.process_count() == 1 or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
            return jax.device_put(leaf, at)
        host_copy = np.asarray(leaf)
        return jax.make_array_from_callback(host_copy.shape, at, lambda index: host_copy[index])

    return jax.tree.map(piece, tree, at)


def batch(tree: Any, *, even: bool = True) -> Any:
    """Cuts the leading axis of every leaf over the batch axes of the mesh in use; for the inside of ``jit``.

    Args:
      tree: arrays of one leading axis.
      even: whether an axis that they do not divide is refused, as it should be where a batch of training or a
        rollout is made. Inside a network, where a ragged set of held-out samples comes by too, it is left whole.

    Raises:
      ShardingError: see ``even``.
    """
    over = jax.sharding.get_abstract_mesh()  # the other one, get_mesh, refuses while a program is traced
    if over.empty:
        return tree
    pieces = math.prod(over.shape[axis] for axis in BATCH)

    def cut(leaf: Any) -> Any:
        if leaf.shape[0] % pieces and not even:
            return leaf
        if leaf.shape[0] % pieces:
            raise ShardingError(_uneven(leaf.shape[0], pieces, over.shape))
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec(BATCH))

    return jax.tree.map(cut, tree)


def rows(size: int) -> tuple[np.ndarray, Callable[[Any], Any]]:
    """Returns which rows of a batch of ``size`` the devices of this process hold, and a function that puts them there.

    The function takes arrays whose leading axis are these rows and returns global ones of ``size`` rows, cut over
    the batch axes of the mesh that is in use now. It may be called in any thread.

    Raises:
      ShardingError: when the mesh does not divide the batch.
    """
    over = current()
    if over is None:
        return np.arange(size), jax.device_put
    pieces = math.prod(over.shape[axis] for axis in BATCH)
    if size % pieces:
        raise ShardingError(_uneven(size, pieces, over.shape))
    cut = NamedSharding(over, PartitionSpec(BATCH))

    def span(index: Any) -> range:
        return range(*index[0].indices(size))

    # Devices along ``tensor`` hold the same rows, which are read once: hence unique.
    mine = np.unique(np.concatenate([span(index) for index in cut.addressable_devices_indices_map((size,)).values()]))

    def put_leaf(leaf: np.ndarray) -> Any:
        shape = (size, *leaf.shape[1:])
        # JAX asks for rows of the whole batch; ``leaf`` holds only ``mine``, in ascending order.
        return jax.make_array_from_callback(shape, cut, lambda index: leaf[np.searchsorted(mine, span(index))])

    return mine, lambda tree: jax.tree.map(put_leaf, tree)


def keep(tree: Any, axes: Axes) -> Any:
    """Makes the state that a step returns lie as the one that it was given; for the inside of ``jit``."""
    # XLA would choose a layout of its own: donated memory could not be used again, and the next call would compile.
    over = jax.sharding.get_abstract_mesh()
    if over.empty:
        return tree
    return jax.tree.map(lambda leaf, at: jax.lax.with_sharding_constraint(leaf, at), tree, shardings(tree, axes, over))


def current() -> Mesh | None:
    """Returns the mesh in use; None without one."""
    over = jax.sharding.get_mesh()
    return None if over.empty else over


def _spec(path: str, shape: tuple[int, ...], axes: Axes, over: Mesh | AbstractMesh) -> tuple[PartitionSpec, str]:
    """Returns where a leaf lies, and what is wrong with that (empty when nothing is)."""
    large = math.prod(shape) >= LARGE
    # The end of a path fits as well: the moments of a parameter are ``opt/0/mu/`` and the parameter's own path.
    names = next((names for pattern, names in axes if fnmatch.fnmatchcase(f"/{path}", f"*/{pattern}")), None)
    if names is None:
        return PartitionSpec(), f"{path} {shape}: no line of AXES fits it" if large else ""
    if names and len(names) != len(shape):
        return PartitionSpec(), f"{path} {shape}: AXES describes {len(names)} axes {names}"
    mesh_axes = [RULES.get(name) if name else None for name in names]
    uneven = [i for i, axis in enumerate(mesh_axes) if axis and shape[i] % over.shape[axis]]
    if uneven and large:
        sizes = [f"{names[i]} = {shape[i]} over {mesh_axes[i]} = {over.shape[mesh_axes[i] or '']}" for i in uneven]
        return PartitionSpec(), f"{path} {shape}: not divisible, {', '.join(sizes)}"
    # JAX wants even pieces. A small leaf costs nothing when an axis stays whole; a large one was refused above.
    return PartitionSpec(*(None if i in uneven else axis for i, axis in enumerate(mesh_axes))), ""


def _uneven(size: int, pieces: int, shape: Any) -> str:
    return (
        f"sharding: a batch of {size} cannot be cut over {pieces} devices ({_product(shape)}). "
        f"Choose batches, groups and microbatches that are multiples of {pieces}."
    )


def _product(sizes: Any) -> str:
    sizes = tuple(sizes.values()) if hasattr(sizes, "values") else sizes
    return " x ".join(f"{name} {size}" for name, size in zip(MESH_AXES, sizes, strict=True))
