"""Several episode folders become one, without decoding an episode.

Long conversions and collections write a folder for each part, so that an interruption costs one part; this puts the
parts together. Shards are copied as they are and their hashes taken over.
"""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from wovr_jax.core.disk import fresh_folder, replace_folder, write_json
from wovr_jax.data.episodes import (
    FORMAT,
    MANIFEST,
    SCHEMA,
    EpisodesError,
    EpisodeSource,
    manifest,
)

ALIKE = ("frame", "wrist", "state", "action")
"""What all episodes of a folder have in common."""


def merge(
    parts: Sequence[str | os.PathLike],
    folder: str | os.PathLike,
    *,
    meta: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes the episodes of ``parts``, in their order, to ``folder``; returns its manifest.

    Args:
      parts: episode folders; they stay.
      folder: the new one.
      meta: facts for the new manifest.
      overwrite: whether an episode folder that is there may be replaced.

    Raises:
      EpisodesError: no parts, a damaged shard, parts of different kinds, or a folder that may not be replaced.
    """
    folder = pathlib.Path(folder).expanduser().absolute()
    if not parts:
        raise EpisodesError(f"no parts were given for {folder}.")
    if folder.exists() and not (overwrite and (folder / MANIFEST).is_file()):
        raise EpisodesError(
            f"{folder} exists already; pass overwrite=True to replace an episode folder, or name another."
        )
    sources = [EpisodeSource(part) for part in parts]  # verifies every shard
    facts = _sum([source.manifest for source in sources], parts)
    fresh = fresh_folder(folder)
    for source in sources:
        for shard in source.manifest["shards"]:
            name = f"shard-{len(facts['shards']):05d}.array_record"
            shutil.copyfile(source.folder / shard["file"], fresh / name)
            facts["shards"].append(shard | {"file": name})
    facts["meta"] = dict(meta or {})
    write_json(fresh / MANIFEST, facts, each=True)
    replace_folder(fresh, folder)
    return manifest(folder)


def _sum(manifests: Sequence[Mapping[str, Any]], parts: Sequence[str | os.PathLike]) -> dict[str, Any]:
    """The counts of all manifests together."""
    first = {name: manifests[0].get(name) for name in ALIKE}
    total: dict[str, Any] = {"format": FORMAT, "schema": SCHEMA, "episodes": 0, "steps": 0, "successes": 0}
    total |= first | {"tasks": {}, "actors": {}, "shards": []}
    for one, part in zip(manifests, parts, strict=True):
        for name in ALIKE:
            if one.get(name) != first[name]:
                raise EpisodesError(
                    f"{part}: {name} is {one.get(name)}, in {parts[0]} it is {first[name]}; not merged."
                )
        for name in ("episodes", "steps", "successes"):
            total[name] += one[name]
        for actor, count in one["actors"].items():
            total["actors"][actor] = total["actors"].get(actor, 0) + count
        for task, counts in one["tasks"].items():
            known = total["tasks"].setdefault(task, counts | {"episodes": 0, "successes": 0})
            if known["instruction"] != counts["instruction"]:
                raise EpisodesError(
                    f"{part}: task {task} is {counts['instruction']!r}, elsewhere {known['instruction']!r}; "
                    "the parts number their tasks differently."
                )
            known["episodes"] += counts["episodes"]
            known["successes"] += counts["successes"]
    return total
