"""An evaluation on LIBERO as ``launch/evaluate.py`` runs it: its settings, results, comparisons and tables.

``collect.measure`` runs the trials. A run folder holds ``config.json`` (what was asked; other settings are refused),
``trials.jsonl`` (a line for each trial) and at the end ``results.json``. Training does not import this file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wovr_jax.core.config import Count, Faults, Natural, NonNegative, Seed, checked
from wovr_jax.core.disk import write_json
from wovr_jax.core.stats import paired_difference, wilson
from wovr_jax.data import episodes as disk
from wovr_jax.sim.libero.setup import LiberoError
from wovr_jax.sim.libero.tasks import Drawing, Init, ProtocolName, Suite, Trial, draws_fixtures, tasks

RESULTS = "results.json"


@checked
@dataclasses.dataclass(frozen=True)
class LiberoEvaluation:
    """What is measured. The fields are those of ``configs/evaluate.py``.

    Attributes:
      policy: folder of a robot bundle, or ``"expert"`` for the scripted one.
      suite: one of ``SUITES``.
      tasks: indices of tasks of the suite; empty for all.
      inits: the official initial states, as a half-open range [first, end).
      protocol: ``"openvla"`` or ``"rlinf"``.
      seed: seed of every reset, and of the policy's draws together with trial and chunk.
      temperature: of the sampling; 0 takes the likeliest tokens.
      workers: environments at a time.
      size: pixels of the camera; None for the policy's own size.
      drawing: ``"libero"`` as the benchmark draws, or ``"fast"``.
      videos: films of the first trials of each task.
      trained_on: episode folders whose initial states the policy learned from.
      overlap: whether a trial may begin where one of these did.
    """

    policy: str
    suite: Suite = "libero_spatial"
    tasks: tuple[Natural, ...] = ()
    inits: tuple[Init, Init] = (0, 50)
    protocol: ProtocolName = "openvla"
    seed: Seed = 0
    temperature: NonNegative = 0.0
    workers: Count = 2
    size: Count | None = None
    drawing: Drawing = "libero"
    videos: Natural = 0
    trained_on: tuple[str, ...] = ()
    overlap: bool = False

    def faults(self) -> Faults:
        """Yields a range without an initial state."""
        if self.inits[0] >= self.inits[1]:
            yield "inits", f"expected the first initial state and the one after the last, got {self.inits}"


def trials(suite: str, inits: Iterable[int], *, only: Sequence[int] | None = None, seed: int = 0) -> list[Trial]:
    """Returns every task of a suite at every initial state, task by task.

    Args:
      suite: one of ``SUITES``.
      inits: numbers of official initial states.
      only: indices of the tasks that are wanted; None for all of them.
      seed: the seed of every reset.

    Raises:
      LiberoError: for an unknown suite or task.
    """
    # A task that is missing would otherwise show as an IndexError hours later in a worker.
    known = tasks(suite)
    for index in only or ():
        if not 0 <= index < len(known):
            raise LiberoError(f"{suite} has tasks 0 to {len(known) - 1}, and {index} was asked for.")
    wanted = known if only is None else [known[index] for index in only]
    # An iterator would be used up by the first task.
    states = list(inits)
    return [Trial(task, init, seed) for task in wanted for init in states]


def explain_twins(wanted: Sequence[Trial], cfg: LiberoEvaluation) -> str:
    """Returns a remark where another seed only gives the same trials again, which must not be counted twice."""
    # A greedy policy does the same from the same state, and the scripted expert too.
    if cfg.temperature or not cfg.seed or not (twins := [one for one in wanted if not draws_fixtures(one.task)]):
        return ""
    return (
        f"seed={cfg.seed}: {len(twins)} of {len(wanted)} trials are those of seed 0 again, as their tasks have no "
        "fixtures that a seed places and nothing is sampled. They say nothing new; do not add them to those."
    )


def check_overlap(wanted: Sequence[Trial], cfg: LiberoEvaluation) -> int:
    """Returns how many trials begin where an episode of ``cfg.trained_on`` did.

    Raises:
      LiberoError: when there are any and ``cfg.overlap`` does not allow it.
    """
    known = training_starts(cfg.trained_on)
    # The reset's seed does not matter: it moves fixtures by centimetres, and the objects stand as they stood.
    shared = sum((trial.task.suite, trial.task.index, trial.init) in known for trial in wanted)
    if shared and not cfg.overlap:
        raise LiberoError(
            f"{shared} of {len(wanted)} trials begin at initial states that training saw. "
            "Measure others.\n  --config.inits=<first>,<last + 1>   (or --config.overlap=True)"
        )
    return shared


def training_starts(folders: Iterable[str | os.PathLike]) -> set[tuple[str, int, int]]:
    """Returns (suite, task, initial state) of every episode in folders that were collected on LIBERO.

    Raises:
      EpisodesError: no such folder.
      LiberoError: episodes that do not say where they began.
    """
    starts = set()
    for folder in folders:
        outcomes = disk.manifest(folder)["meta"].get("outcomes")
        if outcomes is None:
            raise LiberoError(f"{folder} does not say from which initial states its episodes began.")
        for line in outcomes:
            # See `Trial.name`.
            suite, task, init, _ = line["trial"].split("/")
            starts.add((suite, int(task), int(init)))
    return starts


def results(
    lines: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], fingerprint: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the content of ``results.json``: rates by task and over all, every outcome, and what decided them.

    A trial that no worker finished is counted under ``unfinished`` alone.

    Args:
      lines: of ``collect.measure``.
      settings: what was measured.
      fingerprint: of ``machine.fingerprint``.
    """
    return {
        "settings": dict(settings),
        "fingerprint": dict(fingerprint),
        "all": success_rate(lines),
        "tasks": {str(task): success_rate(part) for task, part in _by_task(lines).items()},
        "unfinished": sum(line["success"] is None for line in lines),
        # Single trials, so that another run can be compared with this one without its folder.
        "outcomes": {line["trial"]: line["success"] for line in lines},
        "steps": {line["trial"]: line["steps"] for line in lines},
    }


def success_rate(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns trials with a verdict, successes, rate (None without a trial) and its 95 % Wilson interval."""
    verdicts = [line["success"] for line in lines if line["success"] is not None]
    won, n = sum(verdicts), len(verdicts)
    # Wilson's interval holds at rates near 0 and 1 too, where the normal one leaves [0, 1].
    low, high = wilson(won, n)
    return {"n": n, "successes": won, "rate": won / n if n else None, "low": low, "high": high}


def compare(run: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the gain of one run over another on the trials that both have, with the interval for paired outcomes.

    Raises:
      LiberoError: when they have no trial in common, or another suite or protocol.
    """
    # Trials are named alike under both protocols, but have other horizons.
    for name in ("suite", "protocol"):
        if run["settings"][name] != base["settings"][name]:
            raise LiberoError(
                f"the {name} of the two runs is {run['settings'][name]!r} and {base['settings'][name]!r}; "
                "what is compared has to have met the same."
            )
    # One of the runs may have had fewer tasks or initial states; results of before may hold trials without a verdict.
    both = [
        trial for trial, won in run["outcomes"].items() if won is not None and base["outcomes"].get(trial) is not None
    ]
    if not both:
        raise LiberoError("the two runs have no trial in common (task, initial state and seed).")
    won, base_won = ([bool(side["outcomes"][trial]) for trial in both] for side in (run, base))
    # Paired: what makes a trial hard is the same for both policies and cancels in the difference.
    gain, low, high = paired_difference(won, base_won)
    return {"n": len(both), "gain": gain, "low": low, "high": high}


def save_results(folder: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes ``results.json``."""
    write_json(folder / RESULTS, content)


def load_results(folder: str | os.PathLike) -> dict[str, Any]:
    """Returns the results of a finished run.

    Raises:
      LiberoError: when there are none.
    """
    path = pathlib.Path(folder).expanduser() / RESULTS
    if not path.is_file():
        raise LiberoError(f"{path}: no results; the run is not finished, or it is another folder.")
    return json.loads(path.read_text(encoding="utf-8"))


def table(lines: Sequence[Mapping[str, Any]], instructions: Mapping[int, str]) -> str:
    """Returns success by task and over all as text, with 95 % Wilson intervals and the mean steps of successes.

    Trials that no worker finished are not counted.
    """
    rows = ["task   success  rate  95 %            steps  instruction"]
    rows += [f"{task:4d}  {_row(part)}  {instructions[task]}" for task, part in sorted(_by_task(lines).items())]
    rows.append(f" all  {_row(lines)}")
    if unfinished := sum(line["success"] is None for line in lines):
        rows.append(f"{unfinished} more were lost with their workers, every time they were tried")
    return "\n".join(rows)


def _row(lines: Sequence[Mapping[str, Any]]) -> str:
    # Steps of successes alone: failures all last until the horizon and would hide how fast the policy is.
    rate, won = success_rate(lines), [line["steps"] for line in lines if line["success"]]
    steps = f"{sum(won) / len(won):5.0f}" if won else "    -"
    share = f"{rate['successes']:3d}/{rate['n']:<4d}  {'   -' if rate['rate'] is None else format(rate['rate'], '.2f')}"
    return f"{share}  [{rate['low']:.3f}, {rate['high']:.3f}]  {steps}"


def _by_task(lines: Sequence[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    """Groups lines by the index of their task, in the order in which tasks first occur."""
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for line in lines:
        groups.setdefault(int(line["trial"].split("/")[1]), []).append(line)
    return groups
