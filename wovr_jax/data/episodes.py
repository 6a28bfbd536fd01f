"""Episodes on disk: ArrayRecord shards, one record an episode, and a manifest with hashes.

A folder holds ``shard-00000.array_record`` and so on, and ``manifest.json``, which is written
last. The folder is made beside its final name and renamed, so it is there whole or not at all.

A record is ``MAGIC``, the header's length (4 bytes, little-endian), a JSON header, and one zlib
stream of, in this order: frames as uint8 differences to the frame before (modulo 256, hence
lossless; a still background becomes zeros), ``action_SA`` and ``label_SA`` as little-endian
float32, ``success_S`` as bytes; then, where the header gives their shapes, ``wrist_SHWC`` as
differences and ``state_SD`` as little-endian float32 (schema 2; records of schema 1 have
neither). No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from wovr_jax.types import ACTION_DIM, Episode

SCHEMA = 2
FORMAT = "wovr_jax episodes"
MANIFEST = "manifest.json"
MAGIC = b"WEP1"


class EpisodesError(ValueError):
    """An episode folder, shard or record that cannot be used; the message names it."""


class EpisodeWriter:
    """Writes an episode folder from a stream of episodes.

    >>> with EpisodeWriter("runs/a/base", meta={"sim": to_dict(cfg)}) as writer:  # doctest: +SKIP
    ...     writer.add(episode)

    Nothing appears under the final name until the block ends without an error.

    Args:
      folder: the final folder.
      meta: JSON facts to keep in the manifest, such as the simulator's config.
      overwrite: whether an episode folder that is there may be replaced.
      per_shard: episodes in a shard.

    Raises:
      EpisodesError: when ``folder`` exists and ``overwrite`` is not set or it holds something
        else, when an episode is malformed, or when none was added.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        meta: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        per_shard: int = 256,
    ):
        self.folder = settle(folder, _complete)
        if self.folder.exists() and not overwrite:
            raise EpisodesError(
                f"{self.folder} exists already; pass overwrite=True to replace it, or name another folder."
            )
        if self.folder.exists() and not _complete(self.folder):
            raise EpisodesError(f"{self.folder} exists and is not an episode folder; it is not replaced.")
        self._per_shard = per_shard
        self._fresh = fresh_folder(self.folder)
        self._shard: Any = None
        self._shards: list[dict[str, Any]] = []
        self._facts: dict[str, Any] = {"format": FORMAT, "schema": SCHEMA, "episodes": 0, "steps": 0, "successes": 0}
        self._facts |= {"frame": None, "wrist": None, "state": None, "action": ACTION_DIM, "tasks": {}, "actors": {}}
        self._facts["meta"] = dict(meta or {})

    def __enter__(self) -> EpisodeWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._end_shard()
            shutil.rmtree(self._fresh, ignore_errors=True)

    def add(self, episode: Episode) -> None:
        """Appends one episode."""
        where = f"episode {self._facts['episodes']} for {self.folder}"
        check(episode, where)
        self._settle_layout(episode, where)
        if self._shard is None:
            name = f"shard-{len(self._shards):05d}.array_record"
            self._shards.append({"file": name, "episodes": 0})
            # Records are compressed already; groups of one make each of them addressable.
            self._shard = ArrayRecordWriter(str(self._fresh / name), "group_size:1,uncompressed")
        self._shard.write(encode(episode))
        self._shards[-1]["episodes"] += 1
        self._count(episode)
        if self._shards[-1]["episodes"] == self._per_shard:
            self._end_shard()

    def close(self) -> None:
        """Finishes the manifest and puts the folder in place."""
        self._end_shard()
        if not self._facts["episodes"]:
            shutil.rmtree(self._fresh, ignore_errors=True)
            raise EpisodesError(f"no episodes were given for {self.folder}; an empty folder is not written.")
        for shard in self._shards:
            path = self._fresh / shard["file"]
            shard |= {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        text = json.dumps(self._facts | {"shards": self._shards}, indent=1)
        (self._fresh / MANIFEST).write_text(text)
        put_in_place(self._fresh, self.folder)

    def _settle_layout(self, episode: Episode, where: str) -> None:
        """The first episode says what each one holds: the size of frames, a wrist camera or none, a state or none."""
        layout = {
            "frame": list(episode.frame_SHWC.shape[1:]),
            "wrist": None if episode.wrist_SHWC is None else list(episode.wrist_SHWC.shape[1:]),
            "state": None if episode.state_SD is None else episode.state_SD.shape[1],
        }
        for name, found in layout.items():
            if self._facts["episodes"] and found != self._facts[name]:
                raise EpisodesError(
                    f"{where}: {name} is {found}, before it was {self._facts[name]}; one folder, one kind of episode."
                )
        self._facts |= layout

    def _count(self, episode: Episode) -> None:
        success = bool(episode.success_S.any())
        self._facts["episodes"] += 1
        self._facts["steps"] += len(episode.action_SA)
        self._facts["successes"] += success
        self._facts["actors"][episode.actor] = self._facts["actors"].get(episode.actor, 0) + 1
        blank = {"instruction": episode.instruction, "episodes": 0, "successes": 0}
        task = self._facts["tasks"].setdefault(str(episode.task), blank)
        task["episodes"] += 1
        task["successes"] += success

    def _end_shard(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None


def write(
    folder: str | os.PathLike,
    episodes: Iterable[Episode],
    *,
    meta: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    per_shard: int = 256,
) -> dict[str, Any]:
    """Writes all ``episodes`` to ``folder`` and returns the manifest. See :class:`EpisodeWriter`."""
    with EpisodeWriter(folder, meta=meta, overwrite=overwrite, per_shard=per_shard) as writer:
        for episode in episodes:
            writer.add(episode)
    return manifest(folder)


def manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """The manifest of an episode folder.

    Raises:
      EpisodesError: no folder, not an episode folder, or a schema newer than this code.
    """
    folder = settle(folder, _complete)
    if not folder.is_dir():
        raise EpisodesError(f"no episodes at {folder}: the folder does not exist. Collect or convert episodes first.")
    if not _complete(folder):
        raise EpisodesError(f"{folder} is not an episode folder: {MANIFEST} is missing in it.")
    try:
        facts = json.loads((folder / MANIFEST).read_text())
    except ValueError as error:
        raise EpisodesError(f"{folder / MANIFEST} is not JSON: {error}") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise EpisodesError(f"{folder / MANIFEST} does not describe episodes: expected format {FORMAT!r}.")
    if facts["schema"] > SCHEMA:
        raise EpisodesError(
            f"{folder} was written with schema {facts['schema']}; this code reads up to {SCHEMA}. Update wovr_jax."
        )
    return facts


class EpisodeSource:
    """Random access to the episodes of a folder, read when asked for (a Grain data source).

    Args:
      folder: an episode folder.
      verify: whether to compare each shard's SHA-256 with the manifest now; its presence and
        size always are.

    Raises:
      EpisodesError: naming the shard that is missing, cut short or changed.
    """

    def __init__(self, folder: str | os.PathLike, *, verify: bool = True):
        self.manifest = manifest(folder)
        self.folder = pathlib.Path(folder).expanduser().absolute()
        shards = self.manifest["shards"]
        for shard in shards:
            _check_shard(self.folder, shard, verify)
        self._records: Any = grain.sources.ArrayRecordDataSource([str(self.folder / shard["file"]) for shard in shards])
        self._first = np.cumsum([0] + [shard["episodes"] for shard in shards])
        if len(self._records) != self._first[-1]:
            raise EpisodesError(
                f"{self.folder}: the manifest counts {self._first[-1]} episodes, the shards hold {len(self._records)}."
            )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Episode:
        return decode(self._records[index], self._where(index))

    def __iter__(self) -> Iterator[Episode]:
        return (self[index] for index in range(len(self)))

    def _where(self, index: int) -> str:
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        return f"{self.folder / self.manifest['shards'][shard]['file']}, record {index - self._first[shard]}"


def read(folder: str | os.PathLike, *, verify: bool = True) -> list[Episode]:
    """All episodes of ``folder``. See :class:`EpisodeSource` for what is checked."""
    return list(EpisodeSource(folder, verify=verify))


def check(episode: Episode, where: str) -> None:
    """Raises an EpisodesError naming ``where`` unless shapes, dtypes and ranges are those of ``Episode``."""
    steps = len(episode.action_SA)
    if episode.action_SA.ndim != 2 or episode.action_SA.shape[1] != ACTION_DIM:
        raise EpisodesError(f"{where}: expected actions of shape (steps, {ACTION_DIM}), got {episode.action_SA.shape}.")
    expected = {
        "action_SA": ((steps, ACTION_DIM), np.float32),
        "label_SA": ((steps, ACTION_DIM), np.float32),
        "success_S": ((steps + 1,), np.bool_),
        "frame_SHWC": ((steps + 1, *episode.frame_SHWC.shape[1:3], 3), np.uint8),
    }
    if episode.wrist_SHWC is not None:
        expected["wrist_SHWC"] = ((steps + 1, *episode.wrist_SHWC.shape[1:3], 3), np.uint8)
    if episode.state_SD is not None:
        expected["state_SD"] = ((steps + 1, *episode.state_SD.shape[1:2]), np.float32)
    for name, (shape, dtype) in expected.items():
        array = getattr(episode, name)
        if array.shape != shape or array.dtype != dtype:
            raise EpisodesError(
                f"{where}: expected {name} of shape {shape} and type {np.dtype(dtype).name} "
                f"for {steps} steps, got {array.shape} and {array.dtype}."
            )
    if not steps:
        raise EpisodesError(f"{where}: an episode needs at least one step.")
    for name in ("action_SA", "label_SA", "state_SD"):
        array = getattr(episode, name)
        if array is not None and not np.isfinite(array).all():
            raise EpisodesError(f"{where}: {name} holds NaN or infinity.")


def encode(episode: Episode) -> bytes:
    """One episode as the bytes of a record."""
    header = {name: getattr(episode, name) for name in ("instruction", "actor")}
    header |= {"task": int(episode.task), "seed": int(episode.seed)}
    header |= {"frame": list(episode.frame_SHWC.shape), "action": list(episode.action_SA.shape)}
    arrays = [_changes(episode.frame_SHWC), episode.action_SA.astype("<f4"), episode.label_SA.astype("<f4")]
    arrays.append(episode.success_S)
    if episode.wrist_SHWC is not None:
        header["wrist"] = list(episode.wrist_SHWC.shape)
        arrays.append(_changes(episode.wrist_SHWC))
    if episode.state_SD is not None:
        header["state"] = list(episode.state_SD.shape)
        arrays.append(episode.state_SD.astype("<f4"))
    header["origin"] = dict(episode.origin)
    text = json.dumps(header).encode()
    body = zlib.compress(b"".join(array.tobytes() for array in arrays), level=6)
    return MAGIC + struct.pack("<I", len(text)) + text + body


def decode(record: bytes, where: str = "record") -> Episode:
    """The episode in the bytes of a record.

    Raises:
      EpisodesError: naming ``where``, when the bytes are damaged or another format.
    """
    if record[:4] != MAGIC:
        raise EpisodesError(f"{where}: not an episode record (begins with {record[:4]!r}, not {MAGIC!r}).")
    try:
        (length,) = struct.unpack("<I", record[4:8])
        header = json.loads(record[8 : 8 + length])
        body = zlib.decompress(record[8 + length :])
        episode = _unpack(header, body)
    except (ValueError, KeyError, TypeError, struct.error, zlib.error) as error:
        raise EpisodesError(f"{where}: damaged record ({type(error).__name__}: {error}).") from error
    check(episode, where)
    return episode


def _unpack(header: dict[str, Any], body: bytes) -> Episode:
    frames, actions = header["frame"], header["action"]
    layout = [(frames, np.uint8), (actions, "<f4"), (actions, "<f4"), (frames[:1], np.bool_)]
    layout += [(header[name], kind) for name, kind in (("wrist", np.uint8), ("state", "<f4")) if name in header]
    sizes = [int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in layout]
    if sum(sizes) != len(body):
        raise ValueError(f"expected {sum(sizes)} bytes of arrays, got {len(body)}")
    ends = np.cumsum([0, *sizes])
    change_SHWC, action_SA, label_SA, success_S, *more = (
        np.frombuffer(body[low:high], dtype).reshape(shape)
        for (shape, dtype), low, high in zip(layout, ends, ends[1:], strict=False)
    )
    return Episode(
        frame_SHWC=np.cumsum(change_SHWC, axis=0, dtype=np.uint8),
        action_SA=action_SA.astype(np.float32),
        label_SA=label_SA.astype(np.float32),
        success_S=success_S.copy(),
        wrist_SHWC=np.cumsum(more.pop(0), axis=0, dtype=np.uint8) if "wrist" in header else None,
        state_SD=more.pop(0).astype(np.float32) if "state" in header else None,
        origin=header.get("origin", {}),
        **{name: header[name] for name in ("instruction", "task", "seed", "actor")},
    )


def _changes(frame_SHWC: np.ndarray) -> np.ndarray:
    """Differences to the frame before, modulo 256; the first frame as it is."""
    return np.diff(frame_SHWC, axis=0, prepend=np.zeros_like(frame_SHWC[:1]))


def to_float(frame: Any) -> Any:
    """uint8 pixels -> float32 in [-1, 1]; numpy in, numpy out, and the same for device arrays."""
    return frame.astype(np.float32) / 127.5 - 1.0


def to_uint8(frame: Any) -> np.ndarray:
    """Pixels in [-1, 1] -> uint8 on the host: clipped, and rounded (truncation would darken)."""
    return np.clip(np.round((np.asarray(frame, np.float32) + 1.0) * 127.5), 0, 255).astype(np.uint8)


def fresh_folder(folder: pathlib.Path) -> pathlib.Path:
    """An empty folder beside ``folder`` to write into."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    return fresh


def put_in_place(fresh: pathlib.Path, folder: pathlib.Path) -> None:
    """Renames ``fresh`` to ``folder``; what was there is removed only afterwards."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def settle(folder: str | os.PathLike, complete: Callable[[pathlib.Path], bool]) -> pathlib.Path:
    """The absolute path, after finishing a :func:`put_in_place` that died between its renames."""
    folder = pathlib.Path(folder).expanduser().absolute()
    if not folder.exists():
        for beside in (folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")):
            if complete(beside):
                beside.rename(folder)
                break
    return folder


def _complete(folder: pathlib.Path) -> bool:
    return (folder / MANIFEST).is_file()


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_shard(folder: pathlib.Path, shard: dict[str, Any], verify: bool) -> None:
    path = folder / shard["file"]
    if not path.is_file():
        raise EpisodesError(f"{path} is missing; the manifest expects {shard['episodes']} episodes in it.")
    size = path.stat().st_size
    if size != shard["bytes"]:
        state = "cut short" if size < shard["bytes"] else "changed"
        raise EpisodesError(
            f"{path} is {state}: expected {shard['bytes']} bytes, got {size}. Copy or collect it again."
        )
    if verify and _sha256(path) != shard["sha256"]:
        raise EpisodesError(f"{path} is damaged: its SHA-256 is not the manifest's. Copy or collect it again.")
