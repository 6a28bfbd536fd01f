"""Files and folders that are whole or not there, and errors of the disk in words.

Whatever a run may still need is written beside its place and renamed into it: a rename is one step for the file
system, so a reader, or a process that starts after a crash, sees the old content or the new one and never a half.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from filelock import SoftFileLease, Timeout

from wovr_jax.core import processes

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)


def not_written(error: Exception, folder: pathlib.Path) -> str:
    """Says why the system did not write into ``folder`` and what to do; empty when the error is not the system's."""
    # TensorStore's errors have no number, but name it in their text.
    named = re.search(r"OS error (\d+)", str(error))
    number = getattr(error, "errno", None) or (int(named[1]) if named else None)
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if number in FULL:
        free = shutil.disk_usage(place).free / 2**20
        return f"the disk is full ({free:.0f} MiB are free at {place}). Free some space, or choose another disk."
    if number in CLOSED:
        return f"{place} cannot be written to by this user. Choose another folder, or change its permissions."
    return f"{type(error).__name__}: {error}." if number else ""


def _follow(path: pathlib.Path) -> pathlib.Path:
    """Returns what a link stands for (a larger disk, say): a rename would replace the link."""
    return path.resolve() if path.is_symlink() else path


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def replace_file(path: str | os.PathLike, *, keep_suffix: bool = False) -> Iterator[pathlib.Path]:
    """Gives a path beside ``path`` to write to, and renames it to ``path`` when the block ends without an error.

    >>> with replace_file("runs/a/facts.txt") as fresh:  # doctest: +SKIP
    ...     fresh.write_text("text", encoding="utf-8")

    Args:
      path: the file, or a link to it, which stays a link; its parents are made. What is there stays as it is when the
        block fails.
      keep_suffix: whether the other name ends as ``path`` does, for programs that read the format from it. By default
        it ends with ``.new``, so that no pattern such as ``*.safetensors`` takes what a killed process left for whole.
    """
    path = _follow(pathlib.Path(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.stem}.new{path.suffix}" if keep_suffix else f"{path.name}.new")
    try:
        yield fresh
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)  # half a file may be what fills the disk
        raise


def sha256(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file in hexadecimal, reading it piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file.

    Raises:
      OSError: it is not there or cannot be read.
      ValueError: it is not JSON, or not UTF-8.
    """
    return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))


def write_json(path: str | os.PathLike, value: Any, *, indent: int | None = 1, each: bool = False) -> None:
    """Writes a JSON file, whole or not at all. Of several processes the first one does, or ``each``."""
    # Processes of one run share the folder: two that write one file would take each other's fresh one away.
    if not (each or processes.first()):
        return
    with replace_file(path) as fresh:
        fresh.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- owners

BEAT_S, LEASE_S = 2.0, 30.0
"""Seconds between an owner's signs of life, and those without one after which it is taken for dead."""


class InUseError(ValueError):
    """A place that another process writes into; the message says which process, and what to do."""


def own(mark: pathlib.Path, place: pathlib.Path) -> SoftFileLease:
    """Makes this process the only one that writes into ``place``, until it releases that or ends.

    The file ``mark`` names the owner, who touches it every ``BEAT_S`` seconds. An owner on this machine that is dead
    is seen at once, one on another machine that shares the disk after ``LEASE_S`` seconds. A process may own a place
    several times over.

    Args:
      mark: the file; its folder is there.
      place: what is said to be in use.

    Raises:
      InUseError: when another process, which lives, owns it; after two signs of its life.
    """
    # A file and no lock of the kernel: not every network's file system passes those on to other machines.
    hold = SoftFileLease(mark, lease_duration=LEASE_S, heartbeat_interval=BEAT_S, is_singleton=True, thread_local=False)
    signs: list[int] = []
    while len(set(signs)) < 2:
        with contextlib.suppress(Timeout):
            hold.acquire(timeout=BEAT_S, poll_interval=0.2)
            return hold
        if not signs:
            processes.say(f"{place}: looking for at most {LEASE_S:.0f} s whether the process that began it lives")
        with contextlib.suppress(FileNotFoundError):  # released meanwhile
            signs.append(mark.stat().st_mtime_ns)
        # The library gives up the mark of the dead by a swap of two names, which file systems of a network may refuse.
        if len(signs) > LEASE_S / BEAT_S + 2 and len(set(signs)) < 2:
            mark.unlink(missing_ok=True)
    # In a container the library writes more than the name of the machine.
    who = f"process {owner.pid} on {owner.hostname.partition('?')[0]}" if (owner := hold.owner) else "another process"
    raise InUseError(
        f"{place} is in use by {who}, and two that write into one place destroy each other's files. Wait until it has "
        "ended, stop it, or choose another folder."
    )


# ---------------------------------------------------------------- folders

_FRESH: dict[pathlib.Path, SoftFileLease] = {}
"""The folders that this process writes, owned until they are in place."""


def fresh_folder(folder: pathlib.Path) -> pathlib.Path:
    """Makes an empty folder beside ``folder`` to write into.

    :func:`replace_folder` puts it in place, :func:`drop_folder` gives it up; one of them has to come.

    Raises:
      InUseError: when another process writes the same folder.
    """
    folder = _follow(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.with_name(folder.name + ".new")
    _FRESH[fresh] = own(folder.with_name(folder.name + ".owner"), folder)
    shutil.rmtree(fresh, ignore_errors=True)  # what an interrupted attempt left
    fresh.mkdir()
    return fresh


def replace_folder(fresh: pathlib.Path, folder: pathlib.Path) -> None:
    """Renames ``fresh`` to ``folder``; what was there is removed only afterwards.

    A folder with something in it cannot be renamed over, so there are two renames; :func:`settle_folder` finishes
    them where a process died between the two.
    """
    folder = _follow(folder)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    drop_folder(fresh)


def drop_folder(fresh: pathlib.Path) -> None:
    """Removes what :func:`fresh_folder` made, if it is not in place, and gives its name free for another process."""
    if lease := _FRESH.pop(fresh, None):
        shutil.rmtree(fresh, ignore_errors=True)
        lease.release(force=True)


def settle_folder(folder: str | os.PathLike, complete: Callable[[pathlib.Path], bool]) -> pathlib.Path:
    """Returns the absolute path, after finishing a :func:`replace_folder` that died between its renames.

    Args:
      folder: the final name, or a link to it.
      complete: whether a folder holds all that was to be written; the mark must be written last.
    """
    folder = _follow(pathlib.Path(folder).expanduser().absolute())
    if not folder.exists() and processes.first():
        # The new one first: where it is complete, the old one was to be replaced.
        for candidate in (folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")):
            if complete(candidate):
                candidate.rename(folder)
                break
    return folder
