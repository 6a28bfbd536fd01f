"""One tree of arrays in one folder, written whole or not at all.

The format is Orbax's. A save goes to a folder beside the target and is renamed into place,
and the previous checkpoint is removed only after that, so a process that dies at any moment
leaves one that restores. A restore compares every file with its SHA-256 first, then key paths,
shapes and dtypes, because Orbax casts a dtype silently and reports one mismatch at a time.

The processes of one run share the folder: each writes the pieces that it holds, each looks after
its share of the files, and process 0 renames.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from wovr_jax.core import processes
from wovr_jax.core.disk import not_written

META = "wovr.json"
SUMS = "sha256-{}.json"
"""SHA-256 of the files that one process looks after."""
ROOT = "tree"
"""Orbax wants a container at the top; under this name any tree fits, a single array too."""
SHOWN = 12
"""Mismatching leaves listed in an error before the rest is only counted."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, foreign, or does not fit what was asked for, or that could not be written."""


class BrokenError(CheckpointError):
    """A checkpoint whose files are not those that were written."""


def save(path: str | os.PathLike, tree: Any, meta: Mapping[str, Any] | None = None) -> None:
    """Writes ``tree`` to the folder ``path``, replacing a checkpoint that is there.

    Args:
      path: the checkpoint folder; parents are made.
      tree: nested dicts, tuples and optax states of arrays and numbers; typed PRNG keys
        are stored as their key data.
      meta: JSON facts kept beside the arrays (see :func:`meta`).

    Raises:
      CheckpointError: when ``path`` holds something that is not a checkpoint, or cannot be written (a full disk).
    """
    begin(path, tree, meta)()


def begin(path: str | os.PathLike, tree: Any, meta: Mapping[str, Any] | None = None) -> Callable[[], None]:
    """:func:`save` in two parts: when this returns the arrays have left an accelerator, and calling what it
    returns writes the rest, in any thread if this is the only process."""
    path = _settle(path)
    if path.exists() and not _is_checkpoint(path):
        raise CheckpointError(f"{path} exists and is not a checkpoint; choose another folder or remove it.")
    fresh, _ = _beside(path)
    facts = json.dumps(dict(meta or {}))  # now: the caller may go on writing into what it gave
    with _explained(path):
        if jax.process_index() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            _sweep(path)
        barrier(f"clean {path}")
        writer = ocp.StandardCheckpointer()
        writer.save(fresh, {ROOT: jax.tree.map(_storable, tree)})

    def finish() -> None:
        with _explained(path):
            with writer:
                writer.wait_until_finished()
            _seal(path, facts)

    return finish


def _sweep(path: pathlib.Path) -> None:
    """Removes what an interrupted save left: never the only copy, because _settle ran."""
    fresh, old = _beside(path)
    for stale in (fresh, old, *path.parent.glob(f"{fresh.name}.orbax-checkpoint-tmp*")):
        shutil.rmtree(stale, ignore_errors=True)


def _seal(path: pathlib.Path, facts: str) -> None:
    """Notes the sums, then the facts that mark the checkpoint as complete, then puts it in its place."""
    fresh, old = _beside(path)
    sums = {name: _sha256(fresh / name) for name in _share(_files(fresh))}
    barrier(f"written {path}")
    if jax.process_index() == 0:
        sums[META] = hashlib.sha256(facts.encode()).hexdigest()
    (fresh / SUMS.format(jax.process_index())).write_text(json.dumps(sums))
    barrier(f"summed {path}")
    if jax.process_index() == 0:
        mark = fresh / f"{META}.tmp"
        mark.write_text(facts)  # a full disk leaves a file with nothing in it, which must not have the mark's name
        mark.rename(fresh / META)
        if path.exists():
            path.rename(old)
        fresh.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    barrier(f"saved {path}")


@contextlib.contextmanager
def _explained(path: pathlib.Path) -> Iterator[None]:
    """What kept us from writing, in words; the half-written folder is removed, it may fill the disk."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:  # a failed write is any of them in TensorStore
        if not (why := not_written(error, path.parent)):
            raise
        _sweep(_settle(path))
        raise CheckpointError(
            f"{path} could not be written: {why} What was saved before is as it was, and the same command goes on "
            "from there."
        ) from error


def restore(path: str | os.PathLike, like: Any) -> Any:
    """Reads the tree at ``path`` in the structure, dtypes and shardings of ``like``.

    Args:
      path: a folder that :func:`save` wrote.
      like: a tree of arrays, of ``jax.ShapeDtypeStruct`` (whose sharding is used when it
        has one), or of numbers. Leaves that are numpy arrays or numbers come back as numpy,
        arrays that no device was chosen for come back so.

    Raises:
      BrokenError: naming the files that are missing or changed. Checkpoints of before there were sums have none
        to compare.
      CheckpointError: when there is no checkpoint, or naming every leaf that is missing,
        left over, or of another shape or dtype.
    """
    path = _found(path)
    verify(path)
    _compare(path, like)
    with ocp.StandardCheckpointer() as reader:
        stored = reader.restore(path, {ROOT: jax.tree.map(_target, like)})
    return jax.tree.map(_revive, like, stored[ROOT])


def load(path: str | os.PathLike) -> Any:
    """The tree as it lies there: nested dicts and lists of numpy arrays, whatever it was saved from.

    Raises:
      CheckpointError: as :func:`restore`.
    """
    path = _found(path)
    verify(path)
    with ocp.PyTreeCheckpointer() as reader:
        shapes = reader.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        return reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))[ROOT]


def exists(path: str | os.PathLike) -> bool:
    """Whether ``path`` holds a complete checkpoint."""
    return _is_checkpoint(_settle(path))


def meta(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON facts saved with the checkpoint."""
    return json.loads((_found(path) / META).read_text())


def remove(path: str | os.PathLike) -> None:
    """Removes a checkpoint; at no moment is half of one there under its name."""
    path = pathlib.Path(path)
    _, old = _beside(path)
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def verify(path: str | os.PathLike) -> None:
    """Compares every file of the checkpoint with its SHA-256; the processes of a run share the work.

    Raises:
      BrokenError: on every process, wherever the fault was found.
    """
    path = pathlib.Path(path)
    sums = {name: sum_ for one in path.glob(SUMS.format("*")) for name, sum_ in _read_sums(one).items()}
    wrong = [name for name in _share(sorted(sums)) if not (path / name).is_file() or _sha256(path / name) != sums[name]]
    if any(_everyone(len(wrong))):
        named = ", ".join(wrong[:SHOWN]) or "files that another process looked at"
        raise BrokenError(f"{path} is broken: missing or changed since it was written: {named}.")


def _read_sums(path: pathlib.Path) -> dict[str, str]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise BrokenError(f"{path.parent} is broken: {path.name} in it is not JSON ({error}).") from error


def _files(folder: pathlib.Path) -> list[str]:
    """What Orbax wrote."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _share(names: list[str]) -> list[str]:
    """Those that this process looks after."""
    return names[jax.process_index() :: jax.process_count()]


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _everyone(number: int) -> list[int]:
    """The number of each process."""
    if jax.process_count() == 1:
        return [number]
    return np.ravel(multihost_utils.process_allgather(np.int32(number))).tolist()


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


def barrier(name: str) -> None:
    """Every process of the run waits here for the others."""
    processes.meet(name)


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
