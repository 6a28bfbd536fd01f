"""What every converter does with its sources: parts that survive an interruption, what was believed, statistics.

Each source (a file) becomes an episode folder under ``<out>.parts``. The same command goes on after an interruption
with the sources that are not there yet. When all are there they are merged into ``<out>``, OpenVLA's
``dataset_statistics.json`` is written into it, and the parts are removed. Each episode that cannot be read is named;
then nothing is merged, unless the command says to skip such episodes: the others of its file are kept.

A reader of a source yields demonstrations, and in the place of one that it cannot read the SourceError that says why.
It raises one where it cannot go on. At the end stands what was believed (:mod:`data_prep.beliefs`), printed and in the
manifest; with ``--strict`` its warnings are refusals.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from data_prep import beliefs
from data_prep.beliefs import Told
from data_prep.demos import GRIPPERS, ROTATIONS, Conventions, Demo, SourceError, to_episode
from data_prep.files import place
from wovr_jax.core.disk import own, replace_file, write_json
from wovr_jax.core.tables import text_table
from wovr_jax.data import episodes as disk
from wovr_jax.data import naming, normalize
from wovr_jax.data.records import check
from wovr_jax.types import Episode

Read = Callable[[Any], Iterable[Demo | SourceError]]
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
    told: Told | None = None,
    skip: bool = False,
    strict: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Converts every source, merges what comes out and returns the manifest.

    Args:
      sources: in the order in which their episodes are to lie.
      read: gives the demonstrations of a source, and a SourceError for each that cannot be read.
      instructions: in the order of the tasks' numbers.
      out: the episode folder.
      how: conventions of the data set.
      key: name of the data set in its statistics, e.g. ``"libero_spatial_no_noops"``.
      meta: facts for the manifest.
      told: what the reader learned of the data set; its problems are refused like episodes that cannot be read.
      skip: whether what cannot be read is left out.
      strict: whether a warning is a refusal.
      overwrite: whether an episode folder that is there may be replaced.

    Raises:
      SourceError: what cannot be read, an instruction that is not among ``instructions``, or a warning.
      EpisodesError: a folder that may not be replaced.
    """
    out, told = out.expanduser().absolute(), told or Told()
    if out.exists() and not overwrite:
        raise disk.EpisodesError(f"{out} exists already; add --overwrite to replace it, or name another folder.")
    # All that decides what an episode looks like; it is in the name of each part and in the manifest.
    asked = {"how": vars(how), "instructions": list(instructions), **meta}
    parts_folder = out.with_name(f"{out.name}.parts")
    made = _Made(refused=list(told.problems))
    for name, source in tqdm(sources, desc="sources", disable=len(sources) < 2):
        # With size and time of its files: a source that was mended since is another one.
        part = parts_folder / _part_name(name, asked, _stamps(source))
        # The notes are written after the part, and only where nothing was refused: what was may be mended by now.
        if not part.with_suffix(".npz").is_file():
            _convert_source(name, read(source), instructions, how, part, asked, made)
        if (part / disk.MANIFEST).is_file():
            made.take(part)
    # All sources have been tried by now, so one message names all that are wrong.
    if made.refused and not (skip and made.parts):
        kept = f" --skip leaves them out and keeps the other {len(made.notes)} episodes." if made.notes else ""
        raise SourceError("\n".join([f"{len(made.refused)} cannot be read.{kept}", *shorten(made.refused)]))
    if not made.parts:
        raise SourceError(f"{out}: the data set has no episodes.")
    for message in shorten(made.refused):
        print(f"skipped: {message}", file=sys.stderr)
    if contradiction := beliefs.contradict(made.notes, how):
        raise SourceError(contradiction)
    action_NA = np.concatenate(made.actions)
    table = normalize.tabulate(action_NA, len(made.notes), key)
    believed, warnings = beliefs.judge(made.notes, action_NA, table[key]["action"], made.refused, how, told)
    believed["statistics"] = f"{key!r}, of {len(action_NA)} steps; 1 % to 99 % span a policy's tokens"
    print(f"{render_table(made.notes, action_NA)}\n\n{beliefs.render(believed, warnings)}")
    if strict and warnings:
        raise SourceError("\n".join(["--strict: nothing was written, for these look odd.", *warnings]))
    asked |= {"skipped": made.refused, "believed": believed, "warnings": warnings}
    facts = disk.merge(made.parts, out, meta=asked, overwrite=overwrite)
    save_statistics(out / "dataset_statistics.json", table)
    # Only now, when the whole folder is in place.
    shutil.rmtree(parts_folder)
    return facts


class _Made:
    """What a conversion has made up to now."""

    def __init__(self, refused: list[str]):
        self.parts: list[pathlib.Path] = []
        self.notes: list[dict[str, Any]] = []
        self.actions: list[np.ndarray] = []
        self.refused = refused
        self.layout: list[Any] | None = None

    def take(self, part: pathlib.Path) -> None:
        """Adds a part and what is noted of it."""
        with np.load(part.with_suffix(".npz" if part.with_suffix(".npz").is_file() else ".some.npz")) as kept:
            self.actions.append(kept["action_NA"])
            self.notes += json.loads(str(kept["notes"]))
        self.parts.append(part)
        facts = disk.manifest(part)
        self.layout = [facts["frame"], facts["wrist"], facts["state"]]


def _convert_source(
    name: str,
    items: Iterable[Demo | SourceError],
    instructions: Sequence[str],
    how: Conventions,
    part: pathlib.Path,
    asked: dict[str, Any],
    made: _Made,
) -> None:
    """Writes the episodes of a source as a part, if there are any, and adds why others were refused."""
    notes: list[dict[str, Any]] = []
    actions: list[np.ndarray] = []
    before = len(made.refused)
    shutil.rmtree(part, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        writer = None
        try:
            for item in tqdm(items, desc=name, leave=False, mininterval=0.5):
                try:
                    # Seeds are numbers that no two episodes share.
                    episode, note = _make(item, instructions, len(made.notes) + len(notes), how)
                    _settle_layout(episode, made, note["name"])
                except (SourceError, disk.EpisodesError) as error:
                    made.refused.append(str(error))
                    continue
                # Not before there is an episode: a folder without one is not written.
                writer = writer or stack.enter_context(disk.EpisodeWriter(part, meta=asked, overwrite=True))
                writer.add(episode)
                notes.append(note)
                actions.append(episode.action_SA)
                # Before the next one is made, or there would be two in memory.
                del episode
        except SourceError as error:  # the reader cannot go on; what it gave before is whole
            made.refused.append(str(error))
    if notes:
        ending = ".npz" if len(made.refused) == before else ".some.npz"
        with replace_file(part.with_suffix(ending), keep_suffix=True) as fresh:
            np.savez(fresh, action_NA=np.concatenate(actions), notes=np.array(json.dumps(notes)))


def _make(
    item: Demo | SourceError, instructions: Sequence[str], seed: int, how: Conventions
) -> tuple[Episode, dict[str, Any]]:
    """Returns the episode of what a reader gave, and what is noted of it; raises what keeps it out."""
    if isinstance(item, SourceError):
        raise item
    demo = dataclasses.replace(item, instruction=item.instruction.strip() or how.instruction)
    if not demo.instruction:
        raise SourceError(f"{demo.name}: its instruction is empty; --instruction TEXT gives it one.")
    # By its text: sources know nothing of numbers, and each numbers its own.
    if demo.instruction not in instructions:
        raise SourceError(f"{demo.name}: {demo.instruction!r} is not among the {len(instructions)} tasks.")
    episode = to_episode(demo, list(instructions).index(demo.instruction), seed, how)
    check(episode, demo.name)
    return episode, beliefs.note(demo, episode)


def _settle_layout(episode: Episode, made: _Made, name: str) -> None:
    """Raises a SourceError for an episode of another kind than those before it: one folder holds one kind."""
    wrist, state = episode.wrist_SHWC, episode.state_SD
    layout = [list(episode.frame_SHWC.shape[1:]), None, None]
    layout[1] = None if wrist is None else list(wrist.shape[1:])
    layout[2] = None if state is None else state.shape[1]
    made.layout = made.layout or layout
    if layout != made.layout:
        raise SourceError(
            f"{name}: frames, wrist and state are {layout}, those of the episodes before it {made.layout}; one folder "
            "holds episodes of one kind."
        )


def shorten(messages: Sequence[str], most: int = 20) -> list[str]:
    """Returns the first messages, and how many more there are."""
    more = len(messages) - most
    return [*messages[:most], *([f"... and {more} more"] if more > 0 else [])]


def save_statistics(path: pathlib.Path, table: dict[str, Any]) -> None:
    """Writes ``dataset_statistics.json``.

    Raises:
      StatisticsError: for an entry that ``normalize.check`` refuses; nothing is written then.
    """
    # All entries before the first byte: a file that was good is not replaced by one that is not.
    for key, entry in table.items():
        normalize.check(entry.get("action", {}), f"statistics {key!r}")
    write_json(path, table, indent=2, each=True)


def _part_name(name: str, asked: dict[str, Any], stamps: Sequence[Any] = ()) -> str:
    """Returns the folder of a source; another convention gives another name."""
    # So a changed command never goes on with what an older one made.
    digest = hashlib.sha256(json.dumps([name, asked, stamps], sort_keys=True).encode()).hexdigest()[:8]
    return f"{pathlib.PurePath(name).stem}-{digest}"


def _stamps(source: Any) -> list[tuple[str, int, int]]:
    """Returns name, size and time of change of each file that is named somewhere in a source."""
    if isinstance(source, pathlib.Path):
        with contextlib.suppress(OSError):
            facts = source.stat()
            return [(source.name, facts.st_size, facts.st_mtime_ns)]
        return []
    if dataclasses.is_dataclass(source):
        source = list(vars(source).values())
    if isinstance(source, dict):
        source = list(source.values())
    if isinstance(source, (list, tuple)):
        return sorted({stamp for part in source for stamp in _stamps(part)})
    return []


def render_table(notes: Sequence[Mapping[str, Any]], action_NA: np.ndarray) -> str:
    """Returns episodes, lengths and success by task, and the range of each action dimension, as text."""
    by_task: dict[int, list[Mapping[str, Any]]] = {}
    for note in notes:
        by_task.setdefault(note["task"], []).append(note)
    rows = [("task", "episodes", "fewest steps", "mean", "most", "success", "instruction")]
    for task, group in sorted(by_task.items()):
        steps = [note["kept"] for note in group]
        spread = (str(min(steps)), f"{np.mean(steps):.1f}", str(max(steps)))
        won = str(sum(note["won"] for note in group))
        rows.append((str(task), str(len(steps)), *spread, won, group[0]["instruction"]))
    # Quantiles beside the extremes: a wrong scale or sign shows in the first, a broken step in the second only.
    low, high = np.quantile(action_NA, [0.01, 0.99], axis=0)
    ranges: list[tuple[str, ...]] = [("action", "min", "q01", "q99", "max")]
    for name, *numbers in zip(beliefs.DIMENSIONS, action_NA.min(0), low, high, action_NA.max(0)):
        ranges.append((name, *(f"{number:.3f}" for number in numbers)))
    return f"{text_table(rows, left=(6,))}\n\n{text_table(ranges)}"


# ---------------------------------------------------------------- the command line that converters share


def parser(doc: str | None, *, rotation: str, gripper: str, actor: str) -> argparse.ArgumentParser:
    """Returns the flags of a converter; the defaults are those of its format."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("source", type=place, help="folder of the data set")
    made.add_argument("--out", type=place, required=True, help="episode folder to write")
    made.add_argument("--key", help="name in the statistics; default: the source's name and _no_noops")
    made.add_argument("--tasks", type=place, help="text file, one instruction a line, in order of task number")
    made.add_argument("--rotation", choices=ROTATIONS, default=rotation, help=f"of frames (default {rotation})")
    made.add_argument("--gripper", choices=GRIPPERS, default=gripper, help=f"convention (default {gripper})")
    made.add_argument("--actor", default=actor, help=f"who is recorded as having acted (default {actor})")
    made.add_argument("--keep-noops", action="store_true", help="keep steps without a command")
    made.add_argument("--instruction", default="", metavar="TEXT", help="for episodes that have none")
    made.add_argument("--skip", action="store_true", help="leave out what cannot be read, and say so")
    made.add_argument("--strict", action="store_true", help="write nothing where anything looks odd")
    made.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    return made


def read_tasks(path: pathlib.Path) -> list[str]:
    """Returns the instructions of a text file, one a line, in the order of their numbers.

    Raises:
      SourceError: no such file, another encoding, an empty line or the same line twice.
    """
    try:
        # What comes first in files of some editors is a mark of the encoding and no letter.
        lines = path.read_text(encoding="utf-8-sig").strip().splitlines()
    except OSError as error:
        raise SourceError(f"--tasks {path}: cannot be read ({error.strerror or error}).") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"--tasks {path}: expected text in UTF-8 ({error}); save it so.") from error
    lines = [line.strip() for line in lines]
    for number, line in enumerate(lines):
        # A number that shifts by one would train every task with another one's words.
        if not line or line in lines[:number]:
            state = f"is there already, {line!r}" if line else "is empty"
            raise SourceError(f"--tasks {path}: line {number + 1} {state}; expected one instruction a line.")
    return lines


def run(
    args: argparse.Namespace,
    sources: Sequence[Source],
    read: Read,
    instructions: Sequence[str],
    kind: str,
    told: Told | None = None,
    meta: dict[str, Any] | None = None,
) -> None:
    """Converts as the command line says and prints table and summary; what is wrong ends in one message.

    Args:
      args: of :func:`parser`.
      sources: of the data set.
      read: gives the demonstrations of a source.
      instructions: those of the data set, used in alphabetical order where ``--tasks`` gives none.
      kind: of the format, for the manifest.
      told: what the reader learned of the data set.
      meta: what the reader chose, such as cameras; another choice never goes on with older parts.
    """
    known = {text.strip() or args.instruction for text in instructions}
    given = read_tasks(args.tasks) if args.tasks else sorted(filter(None, known))
    how = Conventions(args.rotation, args.gripper, not args.keep_noops, args.actor, args.instruction.strip())
    # The name that OpenVLA gives a set without its no-ops, under which its users look for it.
    try:
        key = args.key or naming.statistics_key(args.source, has_noops=args.keep_noops)
    except ValueError as error:  # no folder of the path says what the set is called
        sys.exit(str(error))
    meta = {"format": kind, "source": key.removesuffix(naming.NO_NOOPS), **(meta or {})}
    ways = {"skip": args.skip, "strict": args.strict, "overwrite": args.overwrite}
    try:
        args.out.absolute().parent.mkdir(parents=True, exist_ok=True)
        owned = own(args.out.absolute().with_name(f"{args.out.name}.parts.owner"), args.out)
        facts = convert(sources, read, given, args.out, how, key=key, meta=meta, told=told, **ways)
        owned.release()
    except KeyboardInterrupt:
        sys.exit("\nStopped. What is complete is kept beside --out; the same command continues.")
    print(f"{args.out}: {facts['episodes']} episodes, {facts['steps']} steps, statistics {key!r}")
