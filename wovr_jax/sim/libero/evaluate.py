"""Success rates on LIBERO, measured so that an interruption costs the running trials and nothing else.

A run folder holds ``config.json`` (what was asked; other settings are refused), ``trials.jsonl`` (a line as each trial
ends, on the disk before the next begins; of several processes each has a file of its own, ``trials-1.jsonl``) and at
the end ``results.json``. The same command goes on with the trials that have no line yet. Because a trial's course
depends on its task, state and seed alone, a run that was killed and taken up again ends in the same results as one that
was not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from wovr_jax.core import processes
from wovr_jax.core.config import Count, Faults, Natural, NonNegative, Seed, checked
from wovr_jax.core.disk import write_json
from wovr_jax.core.stats import paired_difference, wilson
from wovr_jax.data import episodes as disk
from wovr_jax.sim.libero.collect import PATIENCE_S, line_of, name_of
from wovr_jax.sim.libero.rollout import Outcome
from wovr_jax.sim.libero.settings import Drawing, Init, ProtocolName, Suite
from wovr_jax.sim.libero.setup import LiberoError
from wovr_jax.sim.libero.tasks import Trial

LINES, RESULTS = "trials.jsonl", "results.json"


@checked
@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What is measured. Fields are those of ``configs/evaluate.py``.

    Attributes:
      policy: folder of a robot bundle, or ``"expert"`` for the scripted one.
      suite: one of ``settings.SUITES``.
      tasks: indices; all without.
      inits: official initial states: the first, and the one after the last.
      protocol: ``"openvla"`` or ``"rlinf"``.
      seed: of every reset, and of the policy's draws together with trial and chunk.
      temperature: 0 takes the likeliest tokens.
      workers: environments at a time.
      size: pixels of the camera; None for what the policy takes.
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


def measure(
    act: Callable[[Sequence[Trial]], Iterable[Outcome]],
    wanted: Sequence[Trial],
    folder: pathlib.Path,
    tell: Callable[[Mapping[str, Any]], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Runs the trials that have no line in ``folder`` yet; a line for each trial, in the order of ``wanted``.

    Args:
      act: runs trials.
      wanted: all trials of the run.
      folder: of the run.
      tell: told of each line, those that are there already first.
    """
    kept = processes.once(lambda: _kept(folder), f"read {folder}")
    for line in kept:
        tell(line)
    done = {line["trial"] for line in kept}
    left = [trial for trial in wanted if name_of(trial) not in done]
    lines = list(_played(act, left[processes.index() :: processes.count()], folder, tell))
    parts = processes.gather(lines, "measure their trials", wait_s=PATIENCE_S)
    for line in itertools.chain(*parts[: processes.index()], *parts[processes.index() + 1 :]):
        tell(line)
    known = {line["trial"]: line for line in itertools.chain(kept, *parts)}
    return [known[name_of(trial)] for trial in wanted]


def _played(
    act: Callable[[Sequence[Trial]], Iterable[Outcome]],
    left: Sequence[Trial],
    folder: pathlib.Path,
    tell: Callable[[Mapping[str, Any]], None],
) -> Iterator[dict[str, Any]]:
    if not left:
        return
    name = LINES if processes.first() else f"{LINES.removesuffix('.jsonl')}-{processes.index()}.jsonl"
    with (folder / name).open("a") as file:
        for outcome in act(left):
            line = line_of(outcome)
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
            tell(line)
            yield line


def _kept(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Every line that is there, whichever process wrote it."""
    paths = sorted(folder.glob(f"{LINES.removesuffix('.jsonl')}*.jsonl"))
    return [line for path in paths for line in _whole_lines(path)]


def _whole_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a file, after cutting off one that a killed process left half written."""
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def results(
    lines: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], fingerprint: Mapping[str, Any]
) -> dict[str, Any]:
    """What ``results.json`` holds: rates by task and over all, every outcome, and what decided them.

    A trial that no worker finished counts as a failure, and is counted under ``unfinished`` too.
    """
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        by_task.setdefault(line["trial"].split("/")[1], []).append(line)
    return {
        "settings": dict(settings),
        "fingerprint": dict(fingerprint),
        "all": rate(lines),
        "tasks": {task: rate(found) for task, found in by_task.items()},
        "unfinished": sum(line["success"] is None for line in lines),
        "outcomes": {line["trial"]: line["success"] for line in lines},
        "steps": {line["trial"]: line["steps"] for line in lines},
    }


def rate(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Trials, successes, rate and its 95 % Wilson interval."""
    won = sum(bool(line["success"]) for line in lines)
    low, high = wilson(won, len(lines))
    return {"n": len(lines), "successes": won, "rate": won / len(lines), "low": low, "high": high}


def compare(run: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Gain of one run over another on the trials that both have, with the interval for paired outcomes.

    Raises:
      LiberoError: when they have no trial in common, or another protocol.
    """
    for name in ("suite", "protocol"):
        if run["settings"][name] != base["settings"][name]:
            raise LiberoError(
                f"the {name} of the two runs is {run['settings'][name]!r} and {base['settings'][name]!r}; "
                "what is compared has to have met the same."
            )
    both = [trial for trial in run["outcomes"] if trial in base["outcomes"]]
    if not both:
        raise LiberoError("the two runs have no trial in common (task, initial state and seed).")
    won, base_won = ([bool(one["outcomes"][trial]) for trial in both] for one in (run, base))
    gain, low, high = paired_difference(won, base_won)
    return {"n": len(both), "gain": gain, "low": low, "high": high}


def began_at(folders: Iterable[str | os.PathLike]) -> set[tuple[str, int, int]]:
    """(suite, task, initial state) of every episode in episode folders that were collected on LIBERO.

    Raises:
      EpisodesError: no such folder.
      LiberoError: episodes that do not say where they began.
    """
    found = set()
    for folder in folders:
        outcomes = disk.manifest(folder)["meta"].get("outcomes")
        if outcomes is None:
            raise LiberoError(f"{folder} does not say from which initial states its episodes began.")
        for line in outcomes:
            suite, task, init, _ = line["trial"].split("/")
            found.add((suite, int(task), int(init)))
    return found


def apart(wanted: Sequence[Trial], cfg: EvaluateConfig) -> int:
    """How many trials begin where an episode of ``cfg.trained_on`` did.

    Raises:
      LiberoError: when there are any and ``cfg.overlap`` does not allow it.
    """
    known = began_at(cfg.trained_on)
    shared = sum((trial.task.suite, trial.task.index, trial.init) in known for trial in wanted)
    if shared and not cfg.overlap:
        raise LiberoError(
            f"{shared} of {len(wanted)} trials begin at initial states that training saw. "
            "Measure others.\n  --config.inits=<first>,<last + 1>   (or --config.overlap=True)"
        )
    return shared


def draw_seed(trial: Trial, chunk: int) -> int:
    """The seed of a policy's draw, from the trial and the number of the chunk alone; in [0, 2**32)."""
    digest = hashlib.sha256(f"{name_of(trial)}/{chunk}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def save(folder: pathlib.Path, found: Mapping[str, Any]) -> None:
    """Writes ``results.json``."""
    write_json(folder / RESULTS, found)


def load(folder: str | os.PathLike) -> dict[str, Any]:
    """The results of a finished run.

    Raises:
      LiberoError: when there are none.
    """
    path = pathlib.Path(folder) / RESULTS
    if not path.is_file():
        raise LiberoError(f"{path}: no results; the run is not finished, or it is another folder.")
    return json.loads(path.read_text())
