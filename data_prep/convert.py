"""What every converter does with its sources: parts that survive an interruption, a table, and action statistics.

Each source (a file) becomes an episode folder under ``<out>.parts``. The same command goes on after an interruption
with the sources that are not there yet. When all are there they are merged into ``<out>``, OpenVLA's
``dataset_statistics.json`` is written into it, and the parts are removed. A source that cannot be read is named; then
nothing is merged, unless the command says to skip such sources.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from data_prep.demos import GRIPPERS, ROTATIONS, Conventions, Demo, SourceError, to_episode
from wovr_jax.core.disk import write_json
from wovr_jax.core.tables import text_table
from wovr_jax.data import episodes as disk
from wovr_jax.data import normalize
from wovr_jax.types import Episode

Read = Callable[[Any], Iterable[Demo]]
Source = tuple[str, Any]
"""A name, and what a reader turns into demonstrations."""


def convert(
    sources: Sequence[Source],
    read: Read,
    instructions: Sequence[str],
    out: pathlib.Path,
    how: Conventions,
    *,
    key: str,
    meta: dict[str, Any],
    skip: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Converts every source, merges what comes out and returns the manifest.

    Args:
      sources: in the order in which their episodes are to lie.
      read: gives the demonstrations of a source.
      instructions: in the order of the tasks' numbers.
      out: the episode folder.
      how: conventions of the data set.
      key: name of the data set in its statistics, e.g. ``"libero_spatial_no_noops"``.
      meta: facts for the manifest.
      skip: whether sources that cannot be read are left out.
      overwrite: whether an episode folder that is there may be replaced.

    Raises:
      SourceError: sources that cannot be read, or an instruction that is not among ``instructions``.
      EpisodesError: a folder that may not be replaced.
    """
    out = out.expanduser().absolute()
    if out.exists() and not overwrite:
        raise disk.EpisodesError(f"{out} exists already; add --overwrite to replace it, or name another folder.")
    # All that decides what an episode looks like; it is in the name of each part and in the manifest.
    asked = {"how": vars(how), "instructions": list(instructions), **meta}
    parts_folder = out.with_name(f"{out.name}.parts")
    parts, refused, first = [], [], 0
    for name, source in tqdm(sources, desc="sources", disable=len(sources) < 2):
        part = parts_folder / _part_name(name, asked)
        try:
            # A part that has its manifest is whole: an earlier try of the same command finished it.
            if not (part / disk.MANIFEST).is_file():
                made = _episodes(name, read(source), instructions, how, first)
                disk.write(part, made, meta=asked, overwrite=True)
        except SourceError as error:
            refused.append(str(error))
            continue
        parts.append(part)
        first += disk.manifest(part)["episodes"]  # seeds are numbers that no two episodes share
    # All sources have been tried by now, so one message names all that are wrong.
    if refused and not (skip and parts):
        raise SourceError("\n".join(["These sources cannot be read; --skip leaves them out.", *refused]))
    for message in refused:
        print(f"skipped: {message}", file=sys.stderr)
    facts = disk.merge(parts, out, meta=asked | {"skipped": refused}, overwrite=overwrite)
    save_statistics(out / "dataset_statistics.json", normalize.statistics(disk.EpisodeSource(out), key))
    # Only now, when the whole folder is in place.
    shutil.rmtree(parts_folder)
    return facts


def save_statistics(path: pathlib.Path, table: dict[str, Any]) -> None:
    """Writes ``dataset_statistics.json``.

    Raises:
      StatisticsError: for an entry that ``normalize.check`` refuses; nothing is written then.
    """
    # All entries before the first byte: a file that was good is not replaced by one that is not.
    for key, entry in table.items():
        normalize.check(entry.get("action", {}), f"statistics {key!r}")
    write_json(path, table, indent=2, each=True)


def _episodes(
    name: str, demos: Iterable[Demo], instructions: Sequence[str], how: Conventions, first: int
) -> Iterator[Episode]:
    """Yields the episodes of a source; their seeds count on from ``first``."""
    # By its text: sources know nothing of numbers, and each numbers its own.
    numbers = {text: number for number, text in enumerate(instructions)}
    for seed, demo in enumerate(tqdm(demos, desc=name, leave=False, mininterval=0.5), first):
        if demo.instruction not in numbers:
            raise SourceError(f"{demo.name}: {demo.instruction!r} is not among the {len(numbers)} tasks.")
        yield to_episode(demo, numbers[demo.instruction], seed, how)


def _part_name(name: str, asked: dict[str, Any]) -> str:
    """Returns the folder of a source; another convention gives another name."""
    # So a changed command never goes on with what an older one made.
    digest = hashlib.sha256(json.dumps([name, asked], sort_keys=True).encode()).hexdigest()[:8]
    return f"{pathlib.PurePath(name).stem}-{digest}"


def render_table(folder: pathlib.Path) -> str:
    """Returns episodes, lengths and success by task, and the range of each action dimension, as text."""
    lengths: dict[int, list[int]] = {}
    successes: dict[int, int] = {}
    names, actions = {}, []
    for episode in disk.EpisodeSource(folder, verify=False):
        lengths.setdefault(episode.task, []).append(len(episode.action_SA))
        successes[episode.task] = successes.get(episode.task, 0) + bool(episode.success_S.any())
        names[episode.task] = episode.instruction
        actions.append(episode.action_SA)
    rows = [("task", "episodes", "fewest steps", "mean", "most", "success", "instruction")]
    for task, steps in sorted(lengths.items()):
        spread = (str(min(steps)), f"{np.mean(steps):.1f}", str(max(steps)))
        rows.append((str(task), str(len(steps)), *spread, str(successes[task]), names[task]))
    # Quantiles beside the extremes: a wrong scale or sign shows in the first, a broken step in the second only.
    action_NA = np.concatenate(actions)
    low, high = np.quantile(action_NA, [0.01, 0.99], axis=0)
    ranges = [("action", "min", "q01", "q99", "max")]
    for name, *numbers in zip(
        ("x", "y", "z", "roll", "pitch", "yaw", "gripper"), action_NA.min(0), low, high, action_NA.max(0)
    ):
        ranges.append((name, *(f"{number:.3f}" for number in numbers)))
    return f"{text_table(rows, left=(6,))}\n\n{text_table(ranges)}"


# ---------------------------------------------------------------- the command line that converters share


def parser(doc: str | None, *, rotation: str, gripper: str, actor: str) -> argparse.ArgumentParser:
    """Returns the flags of a converter; the defaults are those of its format."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("source", type=pathlib.Path, help="folder of the data set")
    made.add_argument("--out", type=pathlib.Path, required=True, help="episode folder to write")
    made.add_argument("--key", help="name in the statistics; default: the source's name and _no_noops")
    made.add_argument("--tasks", type=pathlib.Path, help="text file, one instruction a line, in order of task number")
    made.add_argument("--rotation", choices=ROTATIONS, default=rotation, help=f"of frames (default {rotation})")
    made.add_argument("--gripper", choices=GRIPPERS, default=gripper, help=f"convention (default {gripper})")
    made.add_argument("--actor", default=actor, help=f"who is recorded as having acted (default {actor})")
    made.add_argument("--keep-noops", action="store_true", help="keep steps without a command")
    made.add_argument("--skip", action="store_true", help="leave out what cannot be read, and say so")
    made.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    return made


def run(
    args: argparse.Namespace, sources: Sequence[Source], read: Read, instructions: Sequence[str], kind: str
) -> None:
    """Converts as the command line says and prints the table; what is wrong ends in one message.

    Args:
      args: of :func:`parser`.
      sources: of the data set.
      read: gives the demonstrations of a source.
      instructions: those of the data set, used in alphabetical order where ``--tasks`` gives none.
      kind: of the format, for the manifest.
    """
    given = args.tasks.read_text().strip().splitlines() if args.tasks else sorted(set(instructions))
    how = Conventions(args.rotation, args.gripper, not args.keep_noops, args.actor)
    # The name that OpenVLA gives a set without its no-ops, under which its users look for it.
    key = args.key or f"{args.source.resolve().name}{'' if args.keep_noops else '_no_noops'}"
    meta = {"format": kind, "source": args.source.resolve().name}
    try:
        facts = convert(
            sources, read, given, args.out, how, key=key, meta=meta, skip=args.skip, overwrite=args.overwrite
        )
    except KeyboardInterrupt:
        sys.exit("\nStopped. What is complete is kept beside --out; the same command continues.")
    print(render_table(args.out))
    print(f"{args.out}: {facts['episodes']} episodes, {facts['steps']} steps, statistics {key!r}")
