"""What a data set or a release is called, read off the path to its folder.

Statistics are kept under that name and looked up by it for years, and the last folder of a path often says nothing:
RLDS ends in a version (``libero_spatial_no_noops/1.0.0``), a hub's cache in a commit
(``datasets--openvla--modified_libero_rlds/snapshots/6ce6...``).
"""

from __future__ import annotations

import os
import pathlib
import re

_NOTHING = re.compile(
    r"v?\d+(\.\d+)+([-+.]\w+)*"  # a version
    r"|[0-9a-f]{40}|[0-9a-f]{64}|(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{7,12}"  # a commit, whole or short
    r"|\d+|(step|global_step|checkpoint|epoch)[-_]?\d+"
    r"|snapshots|blobs|refs|main|master|latest|data|dataset|datasets|train|raw|rlds|out|output|tmp",
    re.IGNORECASE,
)
"""Names of folders that do not say what is in them."""
_CACHED = re.compile(r"(?:datasets|models)--(?:.+--)?(.+)")
NO_NOOPS = "_no_noops"
"""What OpenVLA puts behind the name of a set whose steps without a command were taken out."""


def says_nothing(name: str) -> bool:
    """Returns whether a folder's name is a version, a commit, or a place where anything may lie."""
    return bool(_NOTHING.fullmatch(name))


def name_of(folder: str | os.PathLike) -> str:
    """Returns the name of the nearest folder, from the last one upwards, that says what is in it.

    Links are not followed: the name that somebody gave is better than that of the place it leads to.

    Raises:
      ValueError: when no folder of the path does.
    """
    path = pathlib.Path(os.path.abspath(os.path.expanduser(folder)))
    for part in reversed(path.parts[1:]):
        if cached := _CACHED.fullmatch(part):
            return cached[1]
        if not says_nothing(part):
            return part
    raise ValueError(f"{path}: no folder of this path says what the data set is called; give its name with --key.")


def statistics_key(folder: str | os.PathLike, *, has_noops: bool = False) -> str:
    """Returns the name under which the statistics of a data set are kept, as OpenVLA calls it.

    Args:
      folder: of the data set.
      has_noops: whether steps without a command are still in it.

    Raises:
      ValueError: as :func:`name_of`.
    """
    name = name_of(folder)
    return name if has_noops or name.endswith(NO_NOOPS) else name + NO_NOOPS
