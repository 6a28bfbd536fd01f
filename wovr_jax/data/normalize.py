"""Action statistics in OpenVLA's ``dataset_statistics.json`` form.

::

    {key: {"action": {mean, std, max, min, q01, q99, mask}, "num_transitions": n, "num_trajectories": m}}

The gripper. An episode holds environment actions, -1 open and +1 closed. OpenVLA's LIBERO data
is flipped to 1 = open and 0 = closed, and its mask exempts the gripper from normalisation. The
statistics here describe that flipped gripper, as the files of released checkpoints do; turning
one into the other is the action codec's work (openvla-oft:
prismatic/vla/datasets/rlds/oxe/transforms.py, libero_dataset_transform).
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wovr_jax.core.disk import read_json
from wovr_jax.types import ACTION_DIM, Episode

FILE, CONFIG = "dataset_statistics.json", "config.json"
"""Where a folder holds statistics; the second is that of a released policy."""
FIELDS = ("mean", "std", "max", "min", "q01", "q99")


class StatisticsError(ValueError):
    """Statistics that are missing or malformed; the message names file and key."""


def statistics(episodes: Sequence[Episode], key: str) -> dict[str, Any]:
    """Returns the statistics of the actions to imitate, as the content of ``dataset_statistics.json``.

    A motion that never changes gets q01 = q99, as in OpenVLA: every token then decodes to the constant.

    Args:
      episodes: the demonstrations.
      key: the data set's name in the file, e.g. ``"libero_spatial_no_noops"``.

    Raises:
      StatisticsError: without episodes.
    """
    if not episodes:
        raise StatisticsError(f"no episodes to compute the statistics {key!r} from.")
    return tabulate(np.concatenate([episode.label_SA for episode in episodes]), len(episodes), key)


def tabulate(action_NA: np.ndarray, trajectories: int, key: str) -> dict[str, Any]:
    """Returns the statistics of (N, 7) actions out of so many trajectories; see :func:`statistics`."""
    # In float64: the sum over a large data set would lose digits in float32.
    action_NA = action_NA.astype(np.float64)
    action_NA[:, -1] = action_NA[:, -1] < 0  # 1 = open, 0 = closed
    q01, q99 = np.quantile(action_NA, [0.01, 0.99], axis=0)
    values = {name: getattr(action_NA, name)(0) for name in FIELDS[:4]} | {"q01": q01, "q99": q99}
    action = {name: value.tolist() for name, value in values.items()}
    # The gripper is a command, not a motion: it is not scaled.
    action["mask"] = [True] * (ACTION_DIM - 1) + [False]
    return {key: {"action": action, "num_transitions": len(action_NA), "num_trajectories": trajectories}}


def load(folder: str | os.PathLike, key: str | None = None) -> dict[str, Any]:
    """Reads the statistics ``key`` (``unnorm_key``) of a folder: ``action``, and ``proprio`` where it has them.

    ``dataset_statistics.json`` counts, or ``norm_stats`` of ``config.json``, as releases have it, where there is none.
    A plain suite name also finds its ``_no_noops`` entry; without a key there must be one entry.

    Raises:
      StatisticsError: no statistics, no such key (the message lists those there are), or a malformed entry.
    """
    path, config = pathlib.Path(folder) / FILE, pathlib.Path(folder) / CONFIG
    # The file of its own comes first: fine-tuning writes it anew and leaves the norm_stats of the base model in place.
    if path.is_file():
        return entry(table(path), key, str(path))
    norm_stats = read_json(config).get("norm_stats") if config.is_file() else None
    if not norm_stats:
        raise StatisticsError(f"{folder}: neither {FILE} nor norm_stats in {CONFIG} is there")
    return entry(norm_stats, key, f"norm_stats of {config}")


def table(path: str | os.PathLike) -> dict[str, Any]:
    """Returns the content of a ``dataset_statistics.json``.

    Raises:
      StatisticsError: when it cannot be read.
    """
    try:
        return dict(read_json(path))
    except (OSError, ValueError, TypeError) as error:
        raise StatisticsError(f"{path} cannot be read as action statistics: {error}") from error


def entry(table: Mapping[str, Any], key: str | None, where: str) -> dict[str, Any]:
    """Returns what a table says under ``key``: ``action``, and ``proprio`` where it has that.

    A plain suite name also finds its ``_no_noops`` entry. Without ``key`` the table must have one entry.

    Raises:
      StatisticsError: no such key, or a malformed entry.
    """
    # OpenVLA publishes the suites without their no-ops, and its users leave that out of the name.
    keys = list(table) if key is None else [name for name in (key, f"{key}_no_noops") if name in table][:1]
    if len(keys) != 1:
        wanted = "exactly one entry" if key is None else f"an entry {key!r}"
        raise StatisticsError(f"{where}: expected {wanted}, the file has {', '.join(table) or 'none'}.")
    check(table[keys[0]].get("action", {}), f"{where}, entry {keys[0]!r}")
    return dict(table[keys[0]])


def check(entry: Mapping[str, Any], where: str) -> None:
    """Raises a StatisticsError unless ``entry`` has every field, of one length, finite and in order."""
    # All at once: a file from elsewhere mostly lacks several.
    if lacking := [name for name in FIELDS if name not in entry]:
        raise StatisticsError(f"{where}: action statistics lack {', '.join(lacking)}.")
    # The mask is OpenVLA's addition to an older form and may be missing.
    lengths = {name: len(entry[name]) for name in (*FIELDS, *(["mask"] if "mask" in entry else []))}
    if len(set(lengths.values())) != 1:
        raise StatisticsError(f"{where}: fields of unequal length: {lengths}.")
    # Equal ends are allowed: a motion that never changes has them.
    low, high = np.asarray(entry["q01"], float), np.asarray(entry["q99"], float)
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low <= high).all()):
        raise StatisticsError(f"{where}: q01 and q99 must be finite with q01 <= q99, got {low} and {high}.")
