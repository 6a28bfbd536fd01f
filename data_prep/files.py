"""What a file of a data set really is, said before a library for its format calls it damaged.

A clone without Git LFS has small texts in the place of its data, a download may have saved a page of the web, a copy
may have ended after nothing, and a folder may be one too high. Each of them has its own cure, and none is a damaged
file.
"""

from __future__ import annotations

import argparse
import errno
import os
import pathlib
from collections.abc import Callable

from data_prep.demos import SourceError

LFS = b"version https://git-lfs.github.com/spec/"
"""How a pointer of Git LFS begins."""
KINDS = {
    b"PAR1": "a parquet file",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"\x93NUMPY": "a file of numpy",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\x1f\x8b": "packed by gzip; unpack it",
    b"\x28\xb5\x2f\xfd": "packed by zstd; unpack it",
    b"\xfd7zXZ": "packed by xz; unpack it",
    b"<!DOCTYPE": "a page of the web, as a failed download leaves it; fetch the file again",
    b"<html": "a page of the web, as a failed download leaves it; fetch the file again",
    b"oid sha256:": "part of a pointer of Git LFS; fetch the file with `git lfs pull`",
}
"""How well-known files begin, and what to say of them where another kind was expected."""


def place(text: str) -> pathlib.Path:
    """Returns the path of a flag, with the home folder for its ``~``, which a shell leaves alone in --name=value.

    Raises:
      ArgumentTypeError: an address such as gs://bucket/data, or no home folder.
    """
    if "://" in text:
        raise argparse.ArgumentTypeError(f"expected a path on this machine, got the address {text} (docs/scaling.md)")
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError as error:  # a container's user without an entry in /etc/passwd
        raise argparse.ArgumentTypeError(f"{text}: there is no home folder for ~; write the whole path") from error


def check(path: pathlib.Path, kind: str, begins: bytes | None = None) -> None:
    """Raises a SourceError that says what ``path`` is, when it is no file that could hold data.

    Args:
      path: the file.
      kind: what is expected, with its article, e.g. ``"a parquet file"``.
      begins: the bytes that every file of this kind begins with, where there are such.
    """
    if path.is_dir():
        raise SourceError(f"{path}: expected {kind}, this is a folder.")
    if not path.exists():
        link = f"a link to {os.readlink(path)}, which is not there" if path.is_symlink() else "missing"
        raise SourceError(f"{path}: {link}; expected {kind}.")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise SourceError(unreadable(path, kind, error)) from error
    if head.startswith(LFS):
        raise SourceError(f"{path}: a pointer of Git LFS, not {kind}: fetch the data with `git lfs pull`.")
    if not head:
        raise SourceError(f"{path}: empty (0 bytes), expected {kind}; copy or fetch it again.")
    other = next((text for start, text in KINDS.items() if head.startswith(start)), None)
    # A format without a mark of its own is tried only against those that have one.
    if (begins and head.startswith(begins)) or other is None:
        return
    raise SourceError(f"{path}: expected {kind}, this is {other}.")


def unreadable(path: pathlib.Path, kind: str, error: Exception) -> str:
    """Returns what the system's error means for a file that is there, and what to do."""
    number = getattr(error, "errno", None)
    if number in (errno.EACCES, errno.EPERM):
        return f"{path}: this user may not read it; change its permissions (chmod u+r)."
    # HDF5 locks what it opens, and names the number only in its text.
    if number in (errno.EAGAIN, errno.EDEADLK, errno.ENOLCK) or "unable to lock file" in str(error):
        return (
            f"{path}: locked: another program has it open for writing, or its file system has no locks. Close that "
            "program; where there is none, set HDF5_USE_FILE_LOCKING=FALSE."
        )
    return f"{path}: damaged or cut short, expected {kind} ({type(error).__name__}: {error})."


def nearby(folder: pathlib.Path, fits: Callable[[pathlib.Path], bool], wanted: str) -> str:
    """Returns what is in the place of a data set, for the end of a message that says that there is none.

    Args:
      folder: the folder that was named.
      fits: whether a path is what was sought.
      wanted: what was sought, for the sentence.
    """
    if not folder.exists():
        return "the folder does not exist"
    if not folder.is_dir():
        return "it is a file; name the folder that it lies in"
    # Two folders down, as archives and downloads by version leave them; a walk through all could take minutes.
    below = sorted({path.parent for level in ("*/*", "*/*/*") for path in folder.glob(level) if fits(path)})
    # A converter is often given the file's own folder instead of the set's.
    above = next((path for path in folder.absolute().parents[:2] if path.is_dir() and any(map(fits, _in(path)))), None)
    if below:
        names = ", ".join(str(path.relative_to(folder)) for path in below[:5])
        return f"{wanted} lies in {names}{' and others' if len(below) > 5 else ''}; name one of these folders"
    if above:
        return f"{wanted} lies in {above}; name that folder"
    names = [path.name for path in sorted(folder.iterdir())]
    return f"in it there is {', '.join(names[:8]) or 'nothing'}{' and more' if len(names) > 8 else ''}"


def _in(folder: pathlib.Path) -> list[pathlib.Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []
