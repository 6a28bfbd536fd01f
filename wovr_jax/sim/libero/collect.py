"""Trials whose outcomes go to the disk as they end, so that an interruption costs the trials that were running.

``collect`` records episodes. It works in parts of up to 25 trials of a task, each a folder under ``<folder>.parts``,
and merges them into ``folder`` when all are complete. How every trial ended, recorded or not, stands in the manifest's
meta under ``outcomes``.

``measure`` keeps outcomes alone: ``trials.jsonl`` gets a line as each trial ends, on the disk before the next begins.

The same call goes on after an interruption. Because a trial's course depends on its task, initial state and seed alone,
a run that was killed and taken up again ends in the same results as one that was not. Of n processes that see the
folder, each does every n-th part or trial.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from wovr_jax.core import processes
from wovr_jax.core.disk import write_json
from wovr_jax.data import episodes as disk
from wovr_jax.sim.libero.rollout import Outcome
from wovr_jax.sim.libero.setup import LiberoError
from wovr_jax.sim.libero.tasks import Trial
from wovr_jax.types import Episode

OUTCOMES = "outcomes.json"
LINES = "trials"
"""Stem of the files of lines: ``trials.jsonl``, and ``trials-1.jsonl`` of process 1."""
PART = 25
"""Trials of a part: what an interruption costs at most."""
PATIENCE_S = 24 * 3600
"""How long to wait for the simulators of other processes, whose speeds may differ by hours."""

Run = Callable[[Sequence[Trial]], Iterable[Outcome]]
"""Runs trials and yields their outcomes in any order."""


def collect(act: Run, wanted: Sequence[Trial], folder: str | os.PathLike, *, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the episodes of ``wanted`` to ``folder``, in the place of those that are there; returns the manifest.

    Args:
      act: runs trials and records them, e.g. ``lambda part: demonstrations(pool, part, protocol)``.
      wanted: the trials.
      folder: the episode folder.
      meta: facts for the manifest. Parts of an interrupted call are used only if they were made with the same.

    Raises:
      EpisodesError: parts that were made with other facts, or no episode to keep.
      LiberoError: trials without a verdict; their part is recorded again by the next call.
    """
    folder = pathlib.Path(folder).expanduser().absolute()
    parts = folder.with_name(f"{folder.name}.parts")
    asked = {**meta, "trials": [trial.name for trial in wanted]}
    processes.once(lambda: _claim(parts, asked), f"open {parts}", wait_s=PATIENCE_S)

    trials_of: dict[str, list[Trial]] = {}
    for task in dict.fromkeys(trial.task for trial in wanted):
        trials = [trial for trial in wanted if trial.task == task]
        # Within a task: the names sort in the order of tasks, and so do the merged episodes.
        for low in range(0, len(trials), PART):
            trials_of[f"{task.suite}-{task.index:02d}-{low:04d}"] = trials[low : low + PART]
    # Parts go to processes in turn, so that each gets some of every task; tasks differ in length.
    mine = dict(list(trials_of.items())[processes.index() :: processes.count()])

    total = sum(map(len, mine.values()))
    with tqdm(total=total, desc=folder.name, unit="episode", disable=not processes.first()) as bar:
        for name, trials in mine.items():
            # The outcomes are written last, so a part that has them is complete.
            if not (parts / name / OUTCOMES).is_file():
                _record_part(act, trials, parts / name, bar)
            else:
                bar.update(len(trials))
    # All parts have to be complete before one process joins them.
    processes.meet("record their episodes", wait_s=PATIENCE_S)

    def join() -> dict[str, Any]:
        # In the order of the parts' names, whichever process made them.
        done = [parts / name for name in trials_of]
        outcomes = [line for part in done for line in json.loads((part / OUTCOMES).read_text(encoding="utf-8"))]
        recorded = [part / "episodes" for part in done if (part / "episodes").is_dir()]
        facts = disk.merge(recorded, folder, meta={**meta, "outcomes": outcomes}, overwrite=True)
        shutil.rmtree(parts)
        return facts

    return processes.once(join, f"join {parts}", wait_s=PATIENCE_S)


def _claim(parts: pathlib.Path, asked: Mapping[str, Any]) -> None:
    """Makes the folder of parts; refuses one that was begun otherwise."""
    # Through JSON, as the file gives it back: tuples are lists then.
    mark, asked = parts / "asked.json", json.loads(json.dumps(asked))
    if mark.is_file() and json.loads(mark.read_text(encoding="utf-8")) != asked:
        raise disk.EpisodesError(
            f"{parts} was begun with other settings. Ask for the same again to finish it, or remove it to begin anew."
        )
    parts.mkdir(parents=True, exist_ok=True)
    write_json(mark, asked)


def _record_part(act: Run, trials: Sequence[Trial], part: pathlib.Path, bar: Any) -> None:
    outcomes: list[dict[str, Any]] = []

    def episodes_to_keep() -> Iterator[Episode]:
        for outcome in in_order(act(trials), trials):
            outcomes.append(line_of(outcome))
            # Counted here, where lost trials have lines too.
            bar.set_postfix_str(f"{sum(bool(line['success']) for line in outcomes)} of {len(outcomes)} in this part")
            bar.update()
            if outcome.episode is not None:
                yield outcome.episode

    part.mkdir(parents=True, exist_ok=True)
    episodes = episodes_to_keep()
    # A part without an episode has nothing to keep and no folder of episodes; a writer would leave an empty one.
    first = next(episodes, None)
    if first is not None:
        with disk.EpisodeWriter(part / "episodes", overwrite=True) as writer:
            writer.add(first)
            for episode in episodes:
                writer.add(episode)
    check_verdicts(outcomes)
    write_json(part / OUTCOMES, outcomes, each=True)


def in_order(outcomes: Iterable[Outcome], trials: Sequence[Trial]) -> Iterator[Outcome]:
    """Yields outcomes in the order of their trials, however the workers took turns: equal runs make equal folders."""
    early: dict[Trial, Outcome] = {}
    order = iter(trials)
    due = next(order, None)
    for outcome in outcomes:
        # Held back in memory until all before it have ended; workers differ by an episode or two.
        early[outcome.trial] = outcome
        while due in early:
            yield early.pop(due)
            due = next(order, None)


def line_of(outcome: Outcome) -> dict[str, Any]:
    """Returns what is kept of an outcome besides its episode."""
    return {
        "trial": outcome.trial.name,
        "success": outcome.success,
        "steps": outcome.steps,
        "tries": outcome.tries,
        "lost": list(outcome.lost),
    }


def check_verdicts(lines: Sequence[Mapping[str, Any]]) -> None:
    """Refuses trials that no worker could finish: they say nothing of who acted, least of all that it failed.

    Raises:
      LiberoError: there are some among ``lines``.
    """
    if lost := [line for line in lines if line["success"] is None]:
        why = (lost[0]["lost"] or ["?"])[-1].strip().splitlines()[-1]
        raise LiberoError(
            f"{len(lost)} of {len(lines)} trials came to no verdict; {lost[0]['trial']} was lost {lost[0]['tries']} "
            f"times: {why}. The same command plays them again.\n  python launch/doctor.py --step"
        )


def measure(
    act: Run,
    wanted: Sequence[Trial],
    folder: pathlib.Path,
    tell: Callable[[Mapping[str, Any]], object] = lambda line: None,
) -> list[dict[str, Any]]:
    """Runs the trials that have no verdict in ``folder`` yet and returns all lines, in the order of ``wanted``.

    Args:
      act: runs trials.
      wanted: all trials of the run.
      folder: the run's folder.
      tell: called with each line, first with those that an earlier call has left.
    """
    # Lost trials are played again: what lost them (a machine without its renderer, say) may be mended by now.
    kept = [x for x in processes.once(lambda: _read_lines(folder), f"read {folder}") if x["success"] is not None]
    for line in kept:
        tell(line)
    done = {line["trial"] for line in kept}
    left = [trial for trial in wanted if trial.name not in done][processes.index() :: processes.count()]
    lines: list[dict[str, Any]] = []
    if left:
        # A file for each process: a shared file system does not append for two at once.
        name = f"{LINES}.jsonl" if processes.first() else f"{LINES}-{processes.index()}.jsonl"
        with (folder / name).open("a", encoding="utf-8") as file:
            for outcome in act(left):
                lines.append(line_of(outcome))
                file.write(json.dumps(lines[-1]) + "\n")
                file.flush()
                # A trial costs minutes, and a sync costs milliseconds.
                os.fsync(file.fileno())
                tell(lines[-1])
    by_process = processes.gather(lines, "measure their trials", wait_s=PATIENCE_S)
    for line in itertools.chain(*by_process[: processes.index()], *by_process[processes.index() + 1 :]):
        tell(line)
    # By name, because workers end in any order.
    known = {line["trial"]: line for line in itertools.chain(kept, *by_process)}
    return [known[trial.name] for trial in wanted]


def _read_lines(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Reads the lines of all processes, after cutting off one that a killed process left half written."""
    lines = []
    for path in sorted(folder.glob(f"{LINES}*.jsonl")):
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            # Or the next line would be appended to the half one.
            with path.open("r+b") as file:
                file.truncate(len(whole))
        lines += [json.loads(line) for line in whole.splitlines()]
    return lines
