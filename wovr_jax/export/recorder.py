"""Writes what clients of the policy server record: each ended episode is an episode folder of its own.

::

    folder/
      20261130T085213-104233-00000-3fa9c1/   a recording: an episode folder (data/episodes.py) with one episode
      20261130T085421-000871-00001-3fa9c1/
      .unfinished-robot7-3fa9c1/             frames of episodes that still go on; goes when the server ends

Frames go to the disk while the episode goes on, in one thread of the recorder's own; nobody who waits for an action
waits for it. When the episode ends, the thread makes the folder inside ``.unfinished-...``, reads it back, and renames
it into place: a recording is there whole or not at all. What a killed server left is removed by the next one.

A name is the UTC time at which the episode began, a number that counts up, and six random digits of the server, so
names sort by time and two servers never choose the same.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import datetime
import fcntl
import itertools
import logging
import os
import pathlib
import secrets
import shutil
import socket
import threading
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from wovr_jax.core.config import Count, checked
from wovr_jax.core.disk import CLOSED, FULL, not_written
from wovr_jax.data.episodes import MANIFEST, EpisodeSource, EpisodeWriter, manifest
from wovr_jax.data.records import EpisodesError
from wovr_jax.types import Episode

LOG = logging.getLogger(__name__)

UNFINISHED = ".unfinished-"
"""Begins the name of the folder in which a server keeps what has not ended."""


class RecordError(ValueError):
    """Tells why a message of a recording cannot be followed, and what was expected."""


@checked
@dataclasses.dataclass(frozen=True)
class RecordConfig:
    """Where to record, and the limits.

    Attributes:
      folder: gets a folder for each episode; made when missing.
      max_steps: steps of the longest episode; a longer one is not kept.
      max_bytes: bytes of its frames, as they lie on the disk while it goes on.
      waiting_bytes: bytes of frames in memory, of all clients together, that the disk has not taken yet; an episode
        that would bring more is not kept, because the robot does not wait for the disk.
    """

    folder: str
    max_steps: Count = 5_000
    max_bytes: Count = 4 * 2**30
    waiting_bytes: Count = 256 * 2**20


class Take:
    """One episode while it goes on: its frames in files that grow, the rest in memory.

    Only the recorder's thread touches the files.

    Args:
      name: of the recording that it becomes.
      place: folder for its frames.

    Attributes:
      lost: why it cannot become a recording any more, in words; empty while it can.
    """

    def __init__(self, name: str, place: pathlib.Path):
        self.name, self.place, self.lost = name, place, ""
        self._files: dict[str, Any] = {}
        self._frames: collections.Counter[str] = collections.Counter()
        self._shapes: dict[str, tuple[int, ...]] = {}

    def append(self, frames: Mapping[str, np.ndarray]) -> None:
        """Adds frames to the files of their cameras.

        Args:
          frames: (n, H, W, 3) uint8 for each camera.
        """
        self.place.mkdir(exist_ok=True)
        for camera, frame_NHWC in frames.items():
            if camera not in self._files:
                # Without a buffer of Python's: what the disk does not take is said now, and not when the file is shut.
                self._files[camera] = (self.place / camera).open("wb", buffering=0)
            _write(self._files[camera], np.ascontiguousarray(frame_NHWC).data.cast("B"))
            self._frames[camera] += len(frame_NHWC)
            self._shapes[camera] = frame_NHWC.shape[1:]

    def read(self, camera: str) -> np.ndarray | None:
        """Returns all frames of a camera, mapped and not read; None where there are none."""
        if not self._frames[camera]:
            return None
        shape = (self._frames[camera], *self._shapes[camera])
        return np.memmap(self.place / camera, np.uint8, "r", shape=shape)

    def drop(self) -> None:
        """Removes what is on the disk."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        shutil.rmtree(self.place, ignore_errors=True)


class Recorder:
    """Writes recordings, in a thread of its own.

    Args:
      cfg: where, and the limits.
      policy: facts on the policy that acts, for the ``Episode.origin`` of every recording; ``policy`` is its name.
      tell: is given a sentence about each episode that ends.

    Raises:
      OSError: the folder cannot be made or written to.
      EpisodesError: a recording that is there cannot be read.
    """

    def __init__(self, cfg: RecordConfig, policy: Mapping[str, Any], tell: Callable[[str], None] = LOG.info):
        self.cfg, self.policy, self.tell = cfg, dict(policy), tell
        self.folder = pathlib.Path(cfg.folder).expanduser().absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._tasks: dict[str, int] = {}
        self._read: set[str] = set()
        # Now, where nobody waits: there may be thousands of recordings.
        self._read_tasks()
        self._token = secrets.token_hex(3)
        remove_leftovers(self.folder)
        self._unfinished = self.folder / f"{UNFINISHED}{socket.gethostname()}-{self._token}"
        # Locked before it has the name by which another server would look whether its owner lives.
        fresh = self.folder / f".{self._token}"
        fresh.mkdir()
        self._held = _hold(fresh)
        fresh.rename(self._unfinished)
        self._count = itertools.count()
        self._waiting, self._lock = 0, threading.Lock()
        # One thread: frames of one episode are written in their order, and the disk is asked for one thing at a time.
        self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="recorder")

    def begin(self) -> Take:
        """Returns a new episode."""
        now = datetime.datetime.now(datetime.UTC)
        name = f"{now:%Y%m%dT%H%M%S-%f}-{next(self._count):05d}-{self._token}"
        return Take(name, self._unfinished / name)

    def append(self, take: Take, frames: Mapping[str, np.ndarray]) -> None:
        """Has frames written, some time soon; returns at once. ``take.lost`` says later if they could not be."""
        size = sum(frame.nbytes for frame in frames.values())
        with self._lock:
            full = self._waiting + size > self.cfg.waiting_bytes
            self._waiting += 0 if full else size
        if full:
            self.lose(take, f"the disk is too slow: {self._waiting / 2**20:.0f} MiB of frames wait for it")
        else:
            self._thread.submit(self._append, take, frames, size)

    async def write(self, take: Take, make: Callable[[], Episode]) -> None:
        """Makes a recording of an episode, and returns once it is in place or ``take.lost`` says why not.

        Args:
          take: the episode.
          make: returns it whole, from its frames; called in the recorder's thread.
        """
        await asyncio.get_running_loop().run_in_executor(self._thread, self._write, take, make)

    def lose(self, take: Take, why: str) -> None:
        """Gives an episode up; the first reason counts."""
        take.lost = take.lost or why
        self._thread.submit(take.drop)

    def number_task(self, instruction: str, number: int | None = None) -> int:
        """Returns the number that an instruction has in the recordings of this folder.

        Args:
          instruction: the instruction; a new one gets ``number``, or the next that is free.
          number: what the client calls it.

        Raises:
          RecordError: when the folder knows the instruction by another number, or another one by this number.
        """
        if instruction not in self._tasks:
            # Another server may have written here meanwhile.
            try:
                self._read_tasks()
            except EpisodesError as error:
                raise RecordError(f"start: {error}") from error
        known = {number: text for text, number in self._tasks.items()}
        if number is None:
            number = self._tasks.get(instruction, 1 + max(known, default=-1))
        # Equal numbers have to mean equal tasks, or the episodes of this folder cannot be joined.
        if known.get(number, instruction) != instruction or self._tasks.get(instruction, number) != number:
            listed = "; ".join(f"{number}: {known[number][:80]!r}" for number in sorted(known)[:10])
            raise RecordError(f"'task': {number} does not fit the recordings that are there: {listed}")
        self._tasks[instruction] = number
        return number

    def close(self) -> None:
        """Waits for what is being written, and removes what never ended."""
        self._thread.shutdown()
        self._held.close()
        shutil.rmtree(self._unfinished, ignore_errors=True)

    def _append(self, take: Take, frames: Mapping[str, np.ndarray], size: int) -> None:
        try:
            if not take.lost:
                take.append(frames)
        except Exception as error:
            self._fail(take, error)
        finally:
            with self._lock:
                self._waiting -= size

    def _write(self, take: Take, make: Callable[[], Episode]) -> None:
        try:
            if take.lost:
                return
            made = take.place / "episode"
            with EpisodeWriter(made) as writer:
                writer.add(make())
            # Whatever the disk was told, the record has to be in it: the manifest is of what lies there.
            EpisodeSource(made).head(0)
            made.rename(self.folder / take.name)
        except Exception as error:
            self._fail(take, error)
        finally:
            take.drop()

    def _fail(self, take: Take, error: Exception) -> None:
        """Gives an episode up for what the disk, or whatever writes to it, has met."""
        # The library that writes records says what the system said, without its number.
        number = next((number for number in (*FULL, *CLOSED) if os.strerror(number) in str(error)), None)
        words = not_written(OSError(number, str(error)) if number else error, self.folder)
        if not words and not isinstance(error, ValueError):
            LOG.error("a recording was not written", exc_info=error)
        take.lost = take.lost or words or f"it could not be written ({type(error).__name__}: {error})"
        take.drop()

    def _read_tasks(self) -> None:
        """Learns what the recordings that are there call their tasks."""
        for path in sorted(self.folder.glob(f"*/{MANIFEST}")):
            if path.parent.name not in self._read:
                for number, facts in manifest(path.parent)["tasks"].items():
                    self._tasks.setdefault(facts["instruction"], int(number))
                self._read.add(path.parent.name)


def number_layout(name: str) -> int:
    """Returns a seed for a recording that names no layout: no two share one, as far as 31 bits go."""
    return zlib.crc32(name.encode()) & (2**31 - 1)


def remove_leftovers(folder: pathlib.Path) -> None:
    """Removes what servers of this machine left in ``folder`` that were killed."""
    for left in folder.glob(f"{UNFINISHED}{socket.gethostname()}-*"):
        # The system gives a lock free when its process ends, however it ends. That of a server which lives stays.
        if held := _hold(left):
            shutil.rmtree(left, ignore_errors=True)
            held.close()


def _hold(folder: pathlib.Path) -> Any:
    """Returns an open file that locks a folder until it is closed, None where another process holds it."""
    file = (folder / "lock").open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _write(file: Any, data: memoryview) -> None:
    """Writes all of ``data``; the system may take less at once."""
    while len(data):
        data = data[file.write(data) :]
