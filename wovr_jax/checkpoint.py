"""One tree of arrays in one folder, written whole or not at all.

The format is Orbax's. A save goes to a folder beside the target and is renamed into place,
and the previous checkpoint is removed only after that, so a process that dies at any moment
leaves one that restores. A restore compares key paths, shapes and dtypes first, because
Orbax casts a dtype silently and reports one mismatch at a time.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

META = "wovr.json"
ROOT = "tree"
"""Orbax wants a container at the top; under this name any tree fits, a single array too."""
SHOWN = 12
"""Mismatching leaves listed in an error before the rest is only counted."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, foreign, or does not fit what was asked for."""


def save(path: str | os.PathLike, tree: Any, meta: Mapping[str, Any] | None = None) -> None:
    """Writes ``tree`` to the folder ``path``, replacing a checkpoint that is there.

    Args:
      path: the checkpoint folder; parents are made.
      tree: nested dicts, tuples and optax states of arrays and numbers; typed PRNG keys
        are stored as their key data.
      meta: JSON facts kept beside the arrays (see :func:`meta`).

    Raises:
      CheckpointError: when ``path`` holds something that is not a checkpoint.
    """
    path = _settle(path)
    if path.exists() and not _is_checkpoint(path):
        raise CheckpointError(f"{path} exists and is not a checkpoint; choose another folder or remove it.")
    fresh, old = _beside(path)
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        # What an interrupted save left: never the only copy, because _settle ran.
        for stale in (fresh, old, *path.parent.glob(f"{fresh.name}.orbax-checkpoint-tmp*")):
            shutil.rmtree(stale, ignore_errors=True)
    _barrier(f"clean {path}")
    with ocp.StandardCheckpointer() as writer:
        writer.save(fresh, {ROOT: jax.tree.map(_storable, tree)})
    if jax.process_index() == 0:
        (fresh / META).write_text(json.dumps(dict(meta or {})))
        if path.exists():
            path.rename(old)
        fresh.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    _barrier(f"saved {path}")


def restore(path: str | os.PathLike, like: Any) -> Any:
    """Reads the tree at ``path`` in the structure, dtypes and shardings of ``like``.

    Args:
      path: a folder that :func:`save` wrote.
      like: a tree of arrays, of ``jax.ShapeDtypeStruct`` (whose sharding is used when it
        has one), or of numbers. Leaves that are numpy arrays or numbers come back as numpy,
        arrays that no device was chosen for come back so.

    Raises:
      CheckpointError: when there is no checkpoint, or naming every leaf that is missing,
        left over, or of another shape or dtype.
    """
    path = _found(path)
    _compare(path, like)
    with ocp.StandardCheckpointer() as reader:
        stored = reader.restore(path, {ROOT: jax.tree.map(_target, like)})
    return jax.tree.map(_revive, like, stored[ROOT])


def exists(path: str | os.PathLike) -> bool:
    """Whether ``path`` holds a complete checkpoint."""
    return _is_checkpoint(_settle(path))


def meta(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON facts saved with the checkpoint."""
    return json.loads((_found(path) / META).read_text())


def _beside(path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    return path.with_name(path.name + ".new"), path.with_name(path.name + ".old")


def _settle(path: str | os.PathLike) -> pathlib.Path:
    """The absolute path, after finishing a rename that a dying process left half done."""
    path = pathlib.Path(path).expanduser().absolute()
    fresh, old = _beside(path)
    if not path.exists() and jax.process_index() == 0:
        for candidate in (fresh, old):
            # Without META the save died before it was complete.
            if _is_checkpoint(candidate):
                candidate.rename(path)
                break
    return path


def _is_checkpoint(path: pathlib.Path) -> bool:
    return (path / META).is_file() and (path / "_METADATA").is_file()


def _found(path: str | os.PathLike) -> pathlib.Path:
    path = _settle(path)
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}: nothing is there. Run the stage that writes it first.")
    if not _is_checkpoint(path):
        raise CheckpointError(f"{path} is not a checkpoint of this project: {META} or _METADATA is missing in it.")
    return path


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _storable(leaf: Any) -> Any:
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _shape(leaf: Any) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, dtype) that ``leaf`` has on disk."""
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    elif not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    return tuple(leaf.shape), np.dtype(leaf.dtype)


def _target(leaf: Any) -> Any:
    """What Orbax is told to restore this leaf into."""
    shape, dtype = _shape(leaf)
    if _is_free(leaf) or not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return np.empty(shape, dtype)
    # A typed key's sharding describes the key, not its data: a key is small, put it on one device.
    sharding = None if _is_key(leaf) else leaf.sharding
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0]))


def _is_free(leaf: Any) -> bool:
    """Whether ``leaf`` is tied to no device. It must stay so: JAX compiles anew for an array that is."""
    return isinstance(leaf, jax.Array) and not leaf.committed


def _revive(like: Any, stored: Any) -> Any:
    stored = jax.device_put(stored) if _is_free(like) else stored
    if not _is_key(like):
        return stored
    impl = jax.random.key_impl(like) if isinstance(like, jax.Array) else like.dtype._impl.name
    return jax.random.wrap_key_data(stored, impl=impl)


def _leaves(tree: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): _shape(leaf) for keys, leaf in flat}


def _compare(path: pathlib.Path, like: Any) -> None:
    """Raises unless the stored leaves are exactly those of ``like``."""
    with ocp.StandardCheckpointer() as reader:
        there = _leaves(reader.metadata(path).item_metadata.tree[ROOT])
    wanted = _leaves(like)
    shown = [f"{name}: expected {_text(wanted[name])}, not in the checkpoint" for name in wanted if name not in there]
    shown += [f"{name}: in the checkpoint {_text(there[name])}, not expected" for name in there if name not in wanted]
    shown += [
        f"{name}: expected {_text(wanted[name])}, got {_text(there[name])}"
        for name in wanted
        if name in there and wanted[name] != there[name]
    ]
    if shown:
        rest = [f"... and {len(shown) - SHOWN} more"] if len(shown) > SHOWN else []
        lines = "\n  ".join(shown[:SHOWN] + rest)
        raise CheckpointError(
            f"{path} does not fit the tree to restore: {len(shown)} leaves differ "
            f"(was it written with another config?).\n  {lines}"
        )


def _text(shape_dtype: tuple[tuple[int, ...], np.dtype]) -> str:
    shape, dtype = shape_dtype
    return f"{dtype.name}[{','.join(map(str, shape))}]"
