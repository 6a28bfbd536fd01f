"""Episodes on disk: ArrayRecord shards, one record an episode, and a manifest with hashes.

A folder holds ``shard-00000.array_record`` and so on, and ``manifest.json``, which is written
last. The folder is made beside its final name and renamed, so it is there whole or not at all.
"""

from __future__ import annotations

import collections
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from wovr_jax.core import processes
from wovr_jax.core.disk import drop_folder, fresh_folder, read_json, replace_folder, settle_folder, sha256, write_json
from wovr_jax.data.records import EpisodesError, Head, check, decode, encode, peek
from wovr_jax.types import ACTION_DIM, Episode

SCHEMA = 2
FORMAT = "wovr_jax episodes"
MANIFEST = "manifest.json"
SHARD, PER_SHARD = "shard-{:05d}.array_record", 256
"""Name of a shard, and the episodes in it."""
LAYOUT = ("frame", "wrist", "state", "action")
"""What all episodes of a folder have in common."""


class EpisodeWriter:
    """Writes an episode folder from a stream of episodes.

    >>> with EpisodeWriter("runs/a/base", meta={"sim": to_dict(cfg)}) as writer:  # doctest: +SKIP
    ...     writer.add(episode)

    Nothing appears under the final name until the block ends without an error.

    Args:
      folder: the final folder.
      meta: JSON facts to keep in the manifest, such as the simulator's config.
      overwrite: whether an episode folder that is there may be replaced.

    Raises:
      EpisodesError: when ``folder`` exists and ``overwrite`` is not set or it holds something
        else, when an episode is malformed, or when none was added.
    """

    def __init__(self, folder: str | os.PathLike, *, meta: Mapping[str, Any] | None = None, overwrite: bool = False):
        self.folder = settle_folder(folder, _complete)
        if self.folder.exists() and not overwrite:
            raise EpisodesError(
                f"{self.folder} exists already; pass overwrite=True to replace it, or name another folder."
            )
        # Not even with overwrite: a mistyped path must not cost somebody's other folder.
        if self.folder.exists() and not _complete(self.folder):
            raise EpisodesError(f"{self.folder} exists and is not an episode folder; it is not replaced.")
        # On the same disk as the final folder, for a rename cannot cross disks.
        self._fresh = fresh_folder(self.folder)
        self._shard: Any = None
        self._shards: list[dict[str, Any]] = []
        self._facts: dict[str, Any] = {"format": FORMAT, "schema": SCHEMA, "episodes": 0, "steps": 0, "successes": 0}
        self._facts |= {"frame": None, "wrist": None, "state": None, "action": ACTION_DIM, "tasks": {}, "actors": {}}
        self._facts["meta"] = dict(meta or {})

    def __enter__(self) -> EpisodeWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error nothing is left but what was there before.
        if kind is None:
            self.close()
        else:
            self._end_shard()
            drop_folder(self._fresh)

    def add(self, episode: Episode) -> None:
        """Appends one episode."""
        where = f"episode {self._facts['episodes']} for {self.folder}"
        # Before anything is written: a malformed episode costs the block, never a shard that cannot be read back.
        check(episode, where)
        layout = {
            "frame": list(episode.frame_SHWC.shape[1:]),
            "wrist": None if episode.wrist_SHWC is None else list(episode.wrist_SHWC.shape[1:]),
            "state": None if episode.state_SD is None else episode.state_SD.shape[1],
        }
        self._settle_layout(layout, where)
        if self._shard is None:
            name = SHARD.format(len(self._shards))
            self._shards.append({"file": name, "episodes": 0})
            # Records are compressed already; groups of one make each of them addressable.
            self._shard = ArrayRecordWriter(str(self._fresh / name), "group_size:1,uncompressed")
        self._shard.write(encode(episode))
        self._shards[-1]["episodes"] += 1
        self._count(episode)
        if self._shards[-1]["episodes"] == PER_SHARD:
            self._end_shard()

    def append(self, source: EpisodeSource) -> None:
        """Copies the shards of a folder as they are, without decoding an episode."""
        theirs, ours, where = source.manifest, self._facts, str(source.folder)
        self._settle_layout({name: theirs.get(name) for name in LAYOUT}, where)
        for task, counts in theirs["tasks"].items():
            # Equal numbers have to mean equal tasks, or a policy would be asked for one and shown another.
            known = ours["tasks"].get(task, counts)
            if known["instruction"] != counts["instruction"]:
                raise EpisodesError(
                    f"{where}: task {task} is {counts['instruction']!r}, elsewhere {known['instruction']!r}; "
                    "the parts number their tasks differently."
                )
        add_counts(ours, theirs)
        for shard in theirs["shards"]:
            # Every folder begins to count its shards at 0. The hash of its manifest is the copy's too.
            self._shards.append(shard | {"file": SHARD.format(len(self._shards))})
            shutil.copyfile(source.folder / shard["file"], self._fresh / self._shards[-1]["file"])

    def close(self) -> None:
        """Finishes the manifest and puts the folder in place."""
        self._end_shard()
        # Whatever reads episodes needs one; better said here than by the stage that comes to read.
        if not self._facts["episodes"]:
            drop_folder(self._fresh)
            raise EpisodesError(f"no episodes were given for {self.folder}; an empty folder is not written.")
        for shard in self._shards:
            path = self._fresh / shard["file"]
            # A copied shard has the hash that it was checked by.
            shard |= {"bytes": path.stat().st_size, "sha256": shard.get("sha256") or sha256(path)}
        # Last, because its presence says that the folder is whole. Whoever writes an episode folder has been chosen
        # already (each process of a LIBERO collection writes its parts), so this does not ask for the first process.
        write_json(self._fresh / MANIFEST, self._facts | {"shards": self._shards}, each=True)
        replace_folder(self._fresh, self.folder)

    def _settle_layout(self, layout: Mapping[str, Any], where: str) -> None:
        """Takes from the first episode what all must hold: size of frames, wrist camera or none, state or none."""
        for name, shape in layout.items():
            if self._facts["episodes"] and shape != self._facts[name]:
                raise EpisodesError(
                    f"{where}: {name} is {shape}, before it was {self._facts[name]}; one folder, one kind of episode."
                )
        self._facts |= layout

    def _count(self, episode: Episode) -> None:
        """Adds an episode to the sums of the manifest."""
        counts = {"episodes": 1, "successes": int(episode.success_S.any())}
        # Numbers become text, as they would in JSON: the manifest in memory is the one that is read back.
        tasks = {str(episode.task): {"instruction": episode.instruction, **counts}}
        add_counts(
            self._facts, counts | {"steps": len(episode.action_SA), "actors": {episode.actor: 1}, "tasks": tasks}
        )

    def _end_shard(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None


def write(
    folder: str | os.PathLike, episodes: Iterable[Episode], *, meta: Mapping | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Writes all ``episodes`` to ``folder`` and returns the manifest; see :class:`EpisodeWriter` for the arguments.

    Of several processes, which all are given the same episodes, the first one writes and the others wait for it.

    Raises:
      EpisodesError: as :class:`EpisodeWriter`.
    """
    if processes.first():
        with EpisodeWriter(folder, meta=meta, overwrite=overwrite) as writer:
            for episode in episodes:
                writer.add(episode)
    else:
        # All processes compute the episodes together: one that did not ask for them would leave the others waiting.
        collections.deque(episodes, maxlen=0)
    # The others get the manifest from the first one and not from the disk, which may show them the folder later.
    return processes.once(lambda: manifest(folder), f"write {folder}")


def merge(
    parts: Sequence[str | os.PathLike], folder: str | os.PathLike, *, meta: Mapping[str, Any], overwrite: bool = False
) -> dict[str, Any]:
    """Writes the episodes of the folders ``parts``, in their order, to ``folder`` and returns its manifest.

    Long conversions and collections write a folder for each part, so that an interruption costs one part. The parts
    stay; their shards are copied as they are and their hashes taken over.

    Raises:
      EpisodesError: no parts, a damaged shard, parts of different kinds, or a folder that may not be replaced.
    """
    with EpisodeWriter(folder, meta=meta, overwrite=overwrite) as writer:
        # All are opened before a byte is copied: a damaged shard would be copied with a hash that it does not have.
        for source in [EpisodeSource(part) for part in parts]:
            writer.append(source)
    return manifest(folder)


def add_counts(total: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Adds the sums of the manifest ``part``, which may be that of one episode, to those of ``total``."""
    for name in ("episodes", "steps", "successes"):
        total[name] += part[name]
    for actor, count in part["actors"].items():
        total["actors"][actor] = total["actors"].get(actor, 0) + count
    for task, counts in part["tasks"].items():
        known = total["tasks"].setdefault(task, counts | {"episodes": 0, "successes": 0})
        known["episodes"] += counts["episodes"]
        known["successes"] += counts["successes"]


def manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """Returns the manifest of an episode folder.

    Raises:
      EpisodesError: no folder, not an episode folder, or a schema newer than this code.
    """
    folder = settle_folder(folder, _complete)
    if not folder.is_dir():
        raise EpisodesError(f"no episodes at {folder}: the folder does not exist. Collect or convert episodes first.")
    if not _complete(folder):
        raise EpisodesError(f"{folder} is not an episode folder: {MANIFEST} is missing in it.")
    try:
        facts = read_json(folder / MANIFEST)
    except ValueError as error:
        raise EpisodesError(f"{folder / MANIFEST} is not JSON: {error}") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise EpisodesError(f"{folder / MANIFEST} does not describe episodes: expected format {FORMAT!r}.")
    # Older schemas are read: their records only lack parts that newer ones may have.
    if facts["schema"] > SCHEMA:
        raise EpisodesError(
            f"{folder} was written with schema {facts['schema']}; this code reads up to {SCHEMA}. Update wovr_jax."
        )
    return facts


class EpisodeSource:
    """Gives random access to the episodes of a folder, each read when asked for (a Grain data source).

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
        # Number of the first episode of each shard, and of all: with it a message can name shard and record.
        self._first = np.cumsum([0] + [shard["episodes"] for shard in shards])
        if len(self._records) != self._first[-1]:
            raise EpisodesError(
                f"{self.folder}: the manifest counts {self._first[-1]} episodes, the shards hold {len(self._records)}."
            )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Episode:
        return decode(self.record(index), self._where(index))

    def record(self, index: int) -> bytes:
        """Returns the bytes of an episode as they are on disk."""
        return self._records[index]

    def __iter__(self) -> Iterator[Episode]:
        return (self[index] for index in range(len(self)))

    def head(self, index: int) -> Head:
        """Returns what a record says before its arrays, which are not decoded."""
        return peek(self.record(index), self._where(index))

    def _where(self, index: int) -> str:
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        return f"{self.folder / self.manifest['shards'][shard]['file']}, record {index - self._first[shard]}"


class Lazy(Sequence[Episode]):
    """Holds episodes that stay on disk, in any order: each is decoded whenever it is asked for.

    Args:
      places: a folder and a number in it for each episode.
    """

    def __init__(self, places: Sequence[tuple[EpisodeSource, int]]):
        self.places = tuple(places)

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Episode: ...
    @overload
    def __getitem__(self, index: slice) -> Lazy: ...
    def __getitem__(self, index: int | slice) -> Episode | Lazy:
        # A slice is cheap and stays on disk, so that held-out episodes can be cut off before anything is decoded.
        if isinstance(index, slice):
            return Lazy(self.places[index])
        # Nothing is kept: whoever asks twice decodes twice, and memory holds one episode at a time.
        source, number = self.places[index]
        return source[number]


def join(parts: Iterable[Sequence[Episode]]) -> Sequence[Episode]:
    """Joins several sequences of episodes; what comes of it stays on disk if all of them do, empty ones aside."""
    # An empty list is in memory, and must not bring all the others there.
    full = [part for part in parts if len(part)]
    lazy = [part for part in full if isinstance(part, Lazy)]
    if lazy and len(lazy) == len(full):
        return Lazy([place for part in lazy for place in part.places])
    # A mixture is decoded: what is in memory cannot be put on disk here, so nothing would be saved.
    return [episode for part in full for episode in part]


def heads(episodes: Sequence[Episode]) -> list[Head]:
    """Returns what decides how each episode is used; those on disk are not decoded for it."""
    # Frames are what takes the time to decode.
    if isinstance(episodes, EpisodeSource):
        return [episodes.head(index) for index in range(len(episodes))]
    if isinstance(episodes, Lazy):
        return [source.head(number) for source, number in episodes.places]
    return [Head(len(e.action_SA), e.task, e.seed, e.actor, bool(e.success_S.any())) for e in episodes]


def read(folder: str | os.PathLike, *, verify: bool = True) -> list[Episode]:
    """Reads all episodes of ``folder`` into memory; see :class:`EpisodeSource` for what is checked."""
    return list(EpisodeSource(folder, verify=verify))


def instruction_of(stem: str) -> str:
    """Returns what a LIBERO task asks for, from the name of its files.

    The benchmark takes an instruction from the file's name; the sentence inside a task's bddl file is another one.
    ``put_the_wine_bottle_on_the_rack`` is ``"put the wine bottle on the rack"``. The scene that libero_10 and libero_90
    put before it, and ``_demo`` after it in data files, are left out.
    """
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", stem.removesuffix("_demo")).replace("_", " ")


def _complete(folder: pathlib.Path) -> bool:
    # The manifest is written last.
    return (folder / MANIFEST).is_file()


def _check_shard(folder: pathlib.Path, shard: dict[str, Any], verify: bool) -> None:
    """Raises an EpisodesError unless a shard is there, of the size and, with ``verify``, of the hash it was written."""
    path = folder / shard["file"]
    if not path.is_file():
        raise EpisodesError(f"{path} is missing; the manifest expects {shard['episodes']} episodes in it.")
    size = path.stat().st_size
    # The size first: it costs nothing and tells a copy that was cut short from a disk that changed a byte.
    if size != shard["bytes"]:
        state = "cut short" if size < shard["bytes"] else "changed"
        raise EpisodesError(
            f"{path} is {state}: expected {shard['bytes']} bytes, got {size}. Copy or collect it again."
        )
    if verify and sha256(path) != shard["sha256"]:
        raise EpisodesError(f"{path} is damaged: its SHA-256 is not the manifest's. Copy or collect it again.")
