"""Episodes of the real simulator onto the disk, in parts, so that an interruption costs the part that it was in.

A part, up to 25 trials of a task, is a folder under ``<folder>.parts``; when all are there they are merged into
``folder``. The same call goes on after an interruption. How every trial ended, recorded or not, stands in the
manifest's meta under ``outcomes``. Of several processes that see the folder each makes every n-th part.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from wovr_jax.core import processes
from wovr_jax.core.disk import write_json
from wovr_jax.core.stats import wilson
from wovr_jax.data import episodes as disk
from wovr_jax.data.merge import merge
from wovr_jax.sim.libero.rollout import Outcome
from wovr_jax.sim.libero.tasks import Task, Trial
from wovr_jax.types import Episode

KEEPS = ("all", "successes")
OUTCOMES = "outcomes.json"
PART = 25
"""Trials of a part: what an interruption costs at most."""
PATIENCE_S = 24 * 3600
"""For the simulators of other processes, which may take turns of hours."""


def collect(
    act: Callable[[Sequence[Trial]], Iterable[Outcome]],
    wanted: Sequence[Trial],
    folder: str | os.PathLike,
    *,
    meta: Mapping[str, Any],
    keep: str = "all",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes the episodes of ``wanted`` to ``folder`` and returns the manifest.

    Args:
      act: runs trials and records them, e.g. ``lambda part: demonstrations(pool, part, protocol)``.
      wanted: the trials.
      folder: the episode folder.
      meta: facts for the manifest; other facts begin anew, equal ones go on.
      keep: ``"all"`` episodes or only ``"successes"``.
      overwrite: whether an episode folder that is there may be replaced.

    Raises:
      EpisodesError: a folder that may not be replaced, parts that were made with other facts, or no episode to keep.
    """
    if keep not in KEEPS:
        raise ValueError(f"keep: expected one of {', '.join(KEEPS)}, got {keep!r}")
    folder = pathlib.Path(folder).expanduser().absolute()
    parts = folder.with_name(f"{folder.name}.parts")
    asked = {**meta, "keep": keep, "trials": [name_of(trial) for trial in wanted]}
    processes.once(lambda: _claim(folder, parts, asked, overwrite), f"open {parts}", wait_s=PATIENCE_S)
    tasks = dict.fromkeys(trial.task for trial in wanted)
    cut = {name: trials for task in tasks for name, trials in _cut(task, wanted)}
    mine = dict(list(cut.items())[processes.index() :: processes.count()])
    own = sum(map(len, mine.values()))
    with tqdm(total=own, desc=folder.name, unit="episode", disable=not processes.first()) as bar:
        for name, trials in mine.items():
            if not (parts / name / OUTCOMES).is_file():
                _part(act, trials, parts / name, keep, bar)
            else:
                bar.update(len(trials))
    processes.meet("record their episodes", wait_s=PATIENCE_S)
    how = {"meta": {**meta, "keep": keep}, "overwrite": overwrite}
    return processes.once(lambda: _joined(parts, list(cut), folder, **how), f"join {parts}", wait_s=PATIENCE_S)


def _joined(
    parts: pathlib.Path, names: Sequence[str], folder: pathlib.Path, *, meta: Mapping[str, Any], overwrite: bool
) -> dict[str, Any]:
    """Merges the parts, which are all there, and removes them."""
    made = [parts / name for name in names]
    outcomes = [line for part in made for line in json.loads((part / OUTCOMES).read_text())]
    recorded = [part / "episodes" for part in made if (part / "episodes").is_dir()]
    facts = merge(recorded, folder, meta={**meta, "outcomes": outcomes}, overwrite=overwrite)
    shutil.rmtree(parts)
    return facts


def _cut(task: Task, wanted: Sequence[Trial]) -> Iterator[tuple[str, list[Trial]]]:
    """The trials of a task in parts of ``PART``, with their names."""
    trials = [trial for trial in wanted if trial.task == task]
    for low in range(0, len(trials), PART):
        yield f"{task.suite}-{task.index:02d}-{low:04d}", trials[low : low + PART]


def _claim(folder: pathlib.Path, parts: pathlib.Path, asked: Mapping[str, Any], overwrite: bool) -> None:
    """A folder is not replaced unasked, and parts go on only with the settings that they were begun with."""
    if folder.exists() and not overwrite:
        raise disk.EpisodesError(f"{folder} exists already; add --overwrite to replace it, or name another folder.")
    mark, asked = parts / "asked.json", json.loads(json.dumps(asked))
    if mark.is_file() and json.loads(mark.read_text()) != asked:
        raise disk.EpisodesError(
            f"{parts} was begun with other settings. Ask for the same again to finish it, or remove it to begin anew."
        )
    parts.mkdir(parents=True, exist_ok=True)
    write_json(mark, asked)


def _part(
    act: Callable[[Sequence[Trial]], Iterable[Outcome]],
    trials: Sequence[Trial],
    part: pathlib.Path,
    keep: str,
    bar: Any,
) -> None:
    outcomes: list[dict[str, Any]] = []

    def recorded() -> Iterator[Episode]:
        for outcome in in_order(act(trials), trials):
            outcomes.append(line_of(outcome))
            bar.set_postfix_str(f"{sum(bool(line['success']) for line in outcomes)} of {len(outcomes)} in this part")
            bar.update()
            if outcome.episode is not None and (keep == "all" or outcome.success):
                yield outcome.episode

    part.mkdir(parents=True, exist_ok=True)
    episodes = recorded()
    first = next(episodes, None)
    if first is not None:
        with disk.EpisodeWriter(part / "episodes", overwrite=True) as writer:
            writer.add(first)
            for episode in episodes:
                writer.add(episode)
    write_json(part / OUTCOMES, outcomes, each=True)


def in_order(outcomes: Iterable[Outcome], trials: Sequence[Trial]) -> Iterator[Outcome]:
    """The outcomes in the order of their trials, however the workers took turns: equal runs make equal folders."""
    early: dict[Trial, Outcome] = {}
    order = iter(trials)
    due = next(order, None)
    for outcome in outcomes:
        early[outcome.trial] = outcome
        while due in early:
            yield early.pop(due)
            due = next(order, None)


def name_of(trial: Trial) -> str:
    """A trial as a word, for files: ``libero_spatial/3/17/0`` is task 3 from state 17 with seed 0."""
    repeat = f"/{trial.repeat}" if trial.repeat else ""
    return f"{trial.task.suite}/{trial.task.index}/{trial.init}/{trial.seed}{repeat}"


def line_of(outcome: Outcome) -> dict[str, Any]:
    """What is kept of an outcome besides its episode."""
    return {
        "trial": name_of(outcome.trial),
        "success": outcome.success,
        "steps": outcome.steps,
        "tries": outcome.tries,
        "lost": list(outcome.lost),
    }


def table(lines: Sequence[Mapping[str, Any]], instructions: Mapping[int, str]) -> str:
    """Success by task and over all, with 95 % Wilson intervals; trials that no worker finished count as failures."""
    rows = ["task   success  rate  95 %            steps  instruction"]
    by_task: dict[int, list[Mapping[str, Any]]] = {}
    for line in lines:
        by_task.setdefault(int(line["trial"].split("/")[1]), []).append(line)
    for task, found in sorted(by_task.items()):
        rows.append(f"{task:4d}  {_rate(found)}  {instructions[task]}")
    rows.append(f" all  {_rate(lines)}")
    if unfinished := sum(line["success"] is None for line in lines):
        rows.append(f"{unfinished} of them were lost with their workers, every time they were tried")
    return "\n".join(rows)


def _rate(lines: Sequence[Mapping[str, Any]]) -> str:
    won = [line for line in lines if line["success"]]
    low, high = wilson(len(won), len(lines))
    steps = f"{sum(line['steps'] for line in won) / len(won):5.0f}" if won else "    -"
    return f"{len(won):3d}/{len(lines):<4d}  {len(won) / len(lines):.2f}  [{low:.3f}, {high:.3f}]  {steps}"
