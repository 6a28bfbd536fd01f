"""Files that are whole or not there, and errors of the disk in words."""

from __future__ import annotations

import errno
import json
import pathlib
import re
import shutil
from typing import Any

from wovr_jax.core import processes

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)


def not_written(error: Exception, folder: pathlib.Path) -> str:
    """Why the system did not write into ``folder``, and what to do; empty when the error is not the system's."""
    # TensorStore's errors have no number, but name it in their text.
    named = re.search(r"OS error (\d+)", str(error))
    number = getattr(error, "errno", None) or (int(named[1]) if named else None)
    there = next(one for one in (folder, *folder.parents) if one.exists())
    if number in FULL:
        free = shutil.disk_usage(there).free / 2**20
        return f"the disk is full ({free:.0f} MiB are free at {there}). Free some space, or choose another disk."
    if number in CLOSED:
        return f"{there} cannot be written to by this user. Choose another folder, or change its permissions."
    return f"{type(error).__name__}: {error}." if number else ""


def write_json(path: pathlib.Path, value: Any, *, each: bool = False) -> None:
    """Writes beside, then renames: a reader never sees half a file. Of several processes the first one, or ``each``."""
    if not (each or processes.first()):
        return
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(value, indent=1))
    beside.replace(path)
