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
from wovr_jax.data.episodes import FORMAT, MANIFEST, SCHEMA, EpisodesError, EpisodeSource, add_counts, manifest

ALIKE = ("frame", "wrist", "state", "action")
"""What all episodes of a folder have in common."""


def merge(
    parts: Sequence[str | os.PathLike],
    folder: str | os.PathLike,
    *,
    meta: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes the episodes of ``parts``, in their order, to ``folder`` and returns its manifest.

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
    # Before a byte is copied: a damaged shard would be copied with a hash that it does not have.
    sources = [EpisodeSource(part) for part in parts]  # verifies every shard
    facts = _sum([source.manifest for source in sources], parts)
    # Beside the final name, so that an interruption leaves the parts and no half of a folder.
    fresh = fresh_folder(folder)
    for source in sources:
        for shard in source.manifest["shards"]:
            # Every part begins to count its shards at 0.
            name = f"shard-{len(facts['shards']):05d}.array_record"
            # The bytes are copied and not decoded, so the hash of the part's manifest is the copy's too.
            shutil.copyfile(source.folder / shard["file"], fresh / name)
            facts["shards"].append(shard | {"file": name})
    facts["meta"] = dict(meta or {})
    write_json(fresh / MANIFEST, facts, each=True)
    replace_folder(fresh, folder)
    return manifest(folder)


def _sum(manifests: Sequence[Mapping[str, Any]], parts: Sequence[str | os.PathLike]) -> dict[str, Any]:
    """Adds up the counts of all manifests, and refuses manifests of different kinds."""
    first = {name: manifests[0].get(name) for name in ALIKE}
    total: dict[str, Any] = {"format": FORMAT, "schema": SCHEMA, "episodes": 0, "steps": 0, "successes": 0}
    total |= first | {"tasks": {}, "actors": {}, "shards": []}
    for facts, part in zip(manifests, parts, strict=True):
        for name in ALIKE:
            if facts.get(name) != first[name]:
                raise EpisodesError(
                    f"{part}: {name} is {facts.get(name)}, in {parts[0]} it is {first[name]}; not merged."
                )
        for task, counts in facts["tasks"].items():
            # Equal numbers have to mean equal tasks, or a policy would be asked for one and shown another.
            known = total["tasks"].get(task, counts)
            if known["instruction"] != counts["instruction"]:
                raise EpisodesError(
                    f"{part}: task {task} is {counts['instruction']!r}, elsewhere {known['instruction']!r}; "
                    "the parts number their tasks differently."
                )
        add_counts(total, facts)
    return total
