"""One tree of arrays in one folder, written whole or not at all.

Orbax writes it: the folder gets its name only when all of it is on disk. This module adds what Orbax does not do:

* the SHA-256 of each file, compared on each restore, and the caller's facts. Both are written before the folder gets
  its name: Orbax calls ``finalize`` of a handler at that moment, in process 0, which reads all files for it;
* one message that names every leaf that does not fit. Orbax casts a dtype silently, and stops at the first mismatch;
* replacing a checkpoint. Orbax removes the old folder before it writes the new one; a kill in between leaves neither;
* a failed write in words.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from wovr_jax.core import disk, processes

META = "wovr.json"
"""The facts. A folder that holds this file is a checkpoint of ours."""
SUMS = "sha256-{}.json"
"""SHA-256 of the files. Earlier versions wrote one such file for each process."""
ROOT = "tree"
"""Orbax wants a container at the top; under this name any tree fits, a single array too."""
ITEM = "default"
"""Orbax's name for the only item of a step: the subfolder of its files. Earlier versions had them in the step's own."""
LISTED = 12
"""Differences listed in an error before the rest is only counted."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, foreign, or does not fit what was asked for, or that could not be written."""


class BrokenError(CheckpointError):
    """A checkpoint whose files are not those that were written."""


# ---------------------------------------------------------------- one tree in one folder


def save(path: str | os.PathLike, tree: Any, facts: Mapping[str, Any] | None = None) -> None:
    """Writes ``tree`` to the folder ``path``, replacing a checkpoint that is there.

    A process that dies at any moment leaves the old checkpoint or the new one.

    Args:
      path: the checkpoint folder; parents are made.
      tree: nested dicts, tuples and optax states of arrays and numbers; typed PRNG keys are stored as their key data.
      facts: JSON facts kept beside the arrays (see :func:`meta`).

    Raises:
      CheckpointError: when ``path`` holds something that is not a checkpoint, or cannot be written (a full disk).
    """
    path = _settle(path)
    # A mistyped path must not cost somebody their folder.
    if path.exists() and not exists(path):
        raise CheckpointError(f"{path} exists and is not a checkpoint; choose another folder or remove it.")
    new = path.with_name(path.name + ".new")
    with explain_failure(path):
        if processes.first():
            sweep(path.parent, path.name)
        processes.meet(f"clear the place of {path}")
        ocp.Checkpointer(_Handler()).save(new, args=save_args(tree, facts))
        if processes.first():
            disk.replace_folder(new, path)
        processes.meet(f"save {path}")  # the others may restore it at once


def restore(path: str | os.PathLike, like: Any) -> Any:
    """Reads the tree at ``path`` in the structure, dtypes and shardings of ``like``.

    Args:
      path: a folder that :func:`save` wrote, or the folder of a step of a :class:`History`.
      like: a tree of arrays, of ``jax.ShapeDtypeStruct`` (whose sharding is used when it has one), or of numbers.
        Leaves that are numpy arrays or numbers come back as numpy. Arrays that no device was chosen for come back so,
        and those whose description has no sharding.

    Raises:
      BrokenError: naming the files that are missing or changed. Checkpoints of before there were sums have none.
      CheckpointError: when there is no checkpoint, or naming every leaf that is missing, left over, or of another
        shape or dtype.
    """
    folder = _locate(path)
    verify(folder)  # first: files that are damaged would be reported as leaves that do not fit
    compare(folder, like)
    return jax.tree.map(_revive, like, _read(folder, jax.tree.map(_target, like)))


def compare(path: str | os.PathLike, like: Any) -> None:
    """Checks that the checkpoint has the leaves of ``like``, as :func:`restore` would want it; reads no arrays.

    Raises:
      CheckpointError: as :func:`restore`.
    """
    folder = _locate(path)
    # By path and not by structure: Orbax gives tuples and optax's states back as dicts and lists.
    if differences := list_differences(_describe_leaves(like), _describe_leaves(_stored(folder))):
        raise CheckpointError(f"{folder} does not fit the tree to restore (of another config?): {differences}")


def list_differences(wanted: Mapping[str, str], stored: Mapping[str, str]) -> str:
    """Says which leaves differ, given what each of them is; empty when none does."""
    lines = [
        f"{name}: expected {wanted.get(name, 'nothing')}, got {stored.get(name, 'nothing')}"
        for name in {**wanted, **stored}
        if wanted.get(name) != stored.get(name)
    ]
    rest = [f"... and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    return "\n  ".join([f"{len(lines)} leaves differ.", *lines[:LISTED], *rest]) if lines else ""


def load(path: str | os.PathLike) -> Any:
    """Reads the tree as it is stored: nested dicts and lists of numpy arrays, whatever it was saved from.

    Raises:
      CheckpointError: as :func:`restore`.
    """
    folder = _locate(path)
    verify(folder)
    return _read(folder, jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), _stored(folder)))


def exists(path: str | os.PathLike) -> bool:
    """Returns whether ``path`` holds a complete checkpoint."""
    return _find(_settle(path)) is not None


def meta(path: str | os.PathLike) -> dict[str, Any]:
    """Returns the JSON facts saved with the checkpoint."""
    return disk.read_json(_locate(path) / META)


def verify(path: str | os.PathLike) -> None:
    """Compares every file of the checkpoint with its SHA-256; the processes of a run share the work.

    Raises:
      BrokenError: on every process, wherever the fault was found.
    """
    folder, sums = _locate(path), {}
    for file in folder.glob(SUMS.format("*")):
        try:
            sums |= disk.read_json(file)
        except ValueError as error:
            raise BrokenError(f"{folder} is broken: {file.name} in it is not JSON ({error}).") from error
    # The whole checkpoint is read once by all together; on many hosts each would read all of it otherwise.
    mine = sorted(sums)[processes.index() :: processes.count()]
    wrong = [name for name, digest in _sha256(folder, mine).items() if digest != sums[name]]
    if any(processes.gather(len(wrong), f"compare the files of {folder}")):
        listed = ", ".join(wrong[:LISTED]) or "files that another process looked at"
        raise BrokenError(f"{folder} is broken: missing or changed since it was written: {listed}.")


class _Handler(ocp.StandardCheckpointHandler):
    """Orbax's writer and reader of a tree, which also notes the facts and the sums of all files."""

    async def async_save(self, directory: Any, item: Any = None, save_args: Any = None, args: Any = None) -> Any:
        self._facts = args.facts
        return await super().async_save(directory, args=args)

    def finalize(self, directory: Any) -> None:
        """Completes the files. Orbax calls this in process 0 and renames the folder when it has returned."""
        super().finalize(directory)  # merges what the processes wrote, so there is nothing to sum before this
        folder = pathlib.Path(directory)
        (folder / META).write_text(self._facts, encoding="utf-8")
        # Orbax adds the time to its own file of a product once more after this; nobody reads it.
        files = [file for file in folder.rglob("*") if file.is_file() and file.name != "_CHECKPOINT_METADATA"]
        sums = _sha256(folder, sorted(str(file.relative_to(folder)) for file in files))
        (folder / SUMS.format(0)).write_text(json.dumps(sums), encoding="utf-8")


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _SaveArgs(ocp.args.StandardSave):
    facts: str = "{}"


def save_args(tree: Any, facts: Mapping[str, Any] | None) -> ocp.args.CheckpointArgs:
    """Returns what Orbax is told to write: the tree and, as text, its facts."""
    # The facts become text now: the caller may go on writing into what it gave.
    return _SaveArgs({ROOT: jax.tree.map(_storable, tree)}, facts=json.dumps(dict(facts or {})))


def _stored(folder: Any) -> Any:
    """Returns the shapes and dtypes on disk."""
    # Not through ocp.Checkpointer: a step has one of the files it looks for outside of its item, and it would warn.
    return _Handler().metadata(folder).tree[ROOT]


def _read(folder: Any, target: Any) -> Any:
    return _Handler().restore(folder, args=ocp.args.StandardRestore({ROOT: target}))[ROOT]


def _sha256(folder: pathlib.Path, names: Sequence[str]) -> dict[str, str]:
    """Returns the sum of each file, empty where there is none."""
    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing releases Python's lock
        digests = pool.map(lambda name: disk.sha256(folder / name) if (folder / name).is_file() else "", names)
        return dict(zip(names, digests, strict=True))


@contextlib.contextmanager
def explain_failure(path: pathlib.Path) -> Iterator[None]:
    """Says in words why ``path`` was not written, and removes what was begun, as it may fill the disk."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:  # a failed write is any of them in TensorStore
        if not (why := disk.not_written(error, path.parent)):
            raise
        sweep(_settle(path).parent, path.name)
        raise CheckpointError(
            f"{path} could not be written: {why} What was saved before is as it was, and the same command goes on "
            "from there."
        ) from error


def sweep(folder: pathlib.Path, name: str = "*") -> None:
    """Removes what interrupted saves left beside ``name``; ``_settle`` has to have run, or it may be the only copy."""
    for ending in (".orbax-checkpoint-tmp*", ".new*", ".old"):
        for stale in folder.glob(name + ending):
            shutil.rmtree(stale, ignore_errors=True)


def _settle(path: str | os.PathLike) -> pathlib.Path:
    return disk.settle_folder(path, lambda candidate: _find(candidate) is not None)


def _find(path: pathlib.Path) -> pathlib.Path | None:
    """Returns the folder of the files of the checkpoint at ``path``; META is in it when all of them are."""
    return next((folder for folder in (path / ITEM, path) if (folder / META).is_file()), None)


def _locate(path: str | os.PathLike) -> pathlib.Path:
    path = _settle(path)
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}: nothing is there. Run the stage that writes it first.")
    if folder := _find(path):
        return folder
    raise CheckpointError(f"{path} is not a checkpoint of this project: {META} is missing in it.")


# ---------------------------------------------------------------- leaves


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_free(leaf: Any) -> bool:
    """Returns whether ``leaf`` is tied to no device. It must stay so: JAX compiles anew for an array that is."""
    # The description of a leaf without a place is of one that no device was chosen for.
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.sharding is None
    return isinstance(leaf, jax.Array) and not leaf.committed


def _storable(leaf: Any) -> Any:
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _on_disk(leaf: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Returns the shape and dtype that ``leaf`` has on disk."""
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    elif not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    return tuple(leaf.shape), np.dtype(leaf.dtype)


def _target(leaf: Any) -> Any:
    """Returns what Orbax is told to restore this leaf into."""
    shape, dtype = _on_disk(leaf)
    # numpy on the way, and no int64 becomes an int32 on a device.
    if _is_free(leaf) or not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return np.empty(shape, dtype)
    # A typed key's sharding describes the key, not its data: a key is small, put it on one device.
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0]) if _is_key(leaf) else leaf.sharding
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _revive(like: Any, stored: Any) -> Any:
    stored = jax.device_put(stored) if _is_free(like) else stored
    if not _is_key(like):
        return stored
    impl = jax.random.key_impl(like) if isinstance(like, jax.Array) else like.dtype._impl.name
    return jax.random.wrap_key_data(stored, impl=impl)


def _describe_leaves(tree: Any) -> dict[str, str]:
    """Returns the path of each leaf and what it is on disk, as ``float32[2,3]``."""
    described = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        shape, dtype = _on_disk(leaf)
        name = jax.tree_util.keystr(keys, simple=True, separator="/")
        described[name] = f"{dtype.name}[{','.join(map(str, shape))}]"
    return described
