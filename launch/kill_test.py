"""Kills a run at random moments, starts it again each time, and holds what comes out against a run that was left alone.

    python launch/kill_test.py --kills=30                               the whole loop at its smallest, SIGKILL
    python launch/kill_test.py --kills=30 --signal=TERM                 as a scheduler ends a job
    python launch/kill_test.py --config=configs/pace.py:smoke --kills=5 another config
    python launch/kill_test.py ... -- --config.seed=1                   settings of both runs after a --

Moments are drawn from --seed: one in every stage, the others in proportion to what the stages take. In a training every
second one waits for a random step to be saved, the others are by the clock from its beginning, where it compiles. A
state is saved after nearly every step, so that many fall into a save. Parameters, episodes, start states, films, facts
and metrics of every stage have to be equal bit for bit; the exit status is 1 if they are not. Two runs are left alone:
a second one shows that the machine repeats itself at all, and how long the stages take when their programs are compiled
already. All runs lie in --folder; those that were left alone are used again if they are there already.
``kill-<signal>.json`` beside them holds the table and the outcome.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

CLOCK = ("seconds", "seconds_now", "peak_rss_gb", "time", "input_wait_ms")
"""Numbers that are of the machine and the hour, not of the run."""
START, BETWEEN, ENDED = "its start", "between stages", "finished before"
LOOK_S = 0.003
"""Between two looks at what a run has begun: some stages take milliseconds."""
STEP_S = 0.2
"""A kill after a saved step comes within this."""
GRACE_S = 120.0
"""For a run that was asked to end to save its state."""


@dataclasses.dataclass(frozen=True)
class Moment:
    """A kill: so many seconds after a stage has begun, or after a training has saved a step."""

    stage: str
    after_s: float
    step: int = 0


@dataclasses.dataclass(frozen=True)
class Kill:
    """What a kill met.

    Attributes:
      aimed: the moment that was drawn.
      met: the stage in which it fell, or ``START`` before any, or ``ENDED``.
      saved: newest step saved in that stage; -1 where nothing was.
      status: exit status of the process.
    """

    aimed: Moment
    met: str
    saved: int
    status: int


def main(argv: Sequence[str]) -> int:
    """Runs, kills, compares, prints tables of the kills; the exit status."""
    args, begin = _arguments(argv), time.monotonic()
    command = [sys.executable, str(ROOT / "launch" / "train.py"), f"--config={args.config}"]
    command += ["--config.checkpoints.every_s=0.02", *args.settings]
    whole, again, cut = (args.folder / name for name in ("whole", "again", f"cut-{args.signal.lower()}"))
    for run in (whole, again):
        if not (run / "results.json").exists():
            _finish([*command, f"--run={run}"], run.with_suffix(".log"))
    shutil.rmtree(cut, ignore_errors=True)
    log = cut.with_suffix(".log")
    moments = plan(stage_seconds(again), stage_steps(again), args.kills, args.seed)
    kills = _killed([*command, f"--run={cut}"], cut, log, moments, args.signal)
    _finish([*command, f"--run={cut}"], log)
    found = _outcome(kills, list(stage_seconds(whole)), time.monotonic() - begin)
    found |= {"signal": args.signal, "repeats": differences(whole, again), "differences": differences(whole, cut)}
    (args.folder / f"kill-{args.signal.lower()}.json").write_text(json.dumps(found, indent=1))
    print(_told(found))
    return 1 if found["differences"] or found["repeats"] else 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=f"{ROOT}/configs/pace.py:tiny")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "runs" / "kill_test")
    parser.add_argument("settings", nargs="*", help="of launch/train.py")
    args = parser.parse_args(argv)
    if args.kills < 1:
        parser.error(f"--kills: expected at least 1, got {args.kills}")
    args.folder = args.folder.absolute()
    args.folder.mkdir(parents=True, exist_ok=True)
    return args


def stage_seconds(run: pathlib.Path) -> dict[str, float]:
    """How long each stage of a finished run took, in their order."""
    marks = sorted(run.glob("stages/*/done.json"), key=lambda mark: mark.stat().st_mtime)
    return {mark.parent.name: json.loads(mark.read_text())["seconds"] for mark in marks}


def stage_steps(run: pathlib.Path) -> dict[str, int]:
    """Steps of the stages that are trainings."""
    return {path.parent.name: _newest(run, path.parent.name) for path in run.glob("stages/*/fit")}


def plan(seconds: Mapping[str, float], steps: Mapping[str, int], kills: int, seed: int) -> list[Moment]:
    """Moments in the order of the stages: one in each as far as they reach, the others where the time goes.

    Those of a training are by turns after a saved step and after its beginning.
    """
    rng, stages = np.random.default_rng(seed), list(seconds)
    share = np.array([seconds[stage] for stage in stages])
    more = rng.choice(len(stages), max(0, kills - len(stages)), p=share / share.sum())
    chosen = sorted([*rng.permutation(len(stages))[:kills].tolist(), *more.tolist()])
    moments = []
    for n, stage in enumerate(stages[k] for k in chosen):
        step = int(rng.integers(1, steps[stage])) if stage in steps and n % 2 == 0 else 0
        after_s = float(rng.uniform() * (STEP_S if step else seconds[stage]))
        moments.append(Moment(stage, after_s, step))
    return sorted(moments, key=lambda moment: (stages.index(moment.stage), moment.step))


def _killed(
    command: Sequence[str], run: pathlib.Path, log: pathlib.Path, moments: Sequence[Moment], name: str
) -> list[Kill]:
    """Kills at all the moments; a line each, with the time that is left."""
    print(f"{'kill':>4}  {'aimed at':24} {'after':>7}  {'met':24} {'saved':>6} {'status':>6}  left")
    kills, begin = [], time.monotonic()
    for count, moment in enumerate(moments, 1):
        kill = kill_at(command, run, moment, name, log)
        kills.append(kill)
        left = (time.monotonic() - begin) / count * (len(moments) - count)
        saved = kill.saved if kill.saved >= 0 else "-"
        aimed = (
            f"{count:4}  {moment.stage + (f', step {moment.step}' if moment.step else ''):24} {moment.after_s:6.2f}s"
        )
        print(f"{aimed}  {kill.met:24} {saved:>6} {kill.status:6}  {left:4.0f} s", flush=True)
    return kills


def kill_at(command: Sequence[str], run: pathlib.Path, moment: Moment, name: str, log: pathlib.Path) -> Kill:
    """Starts the run and kills it at the moment.

    A run that is past the stage is killed so many seconds after the first stage that it begins; one that ends first, as
    the last stages may, is not killed any more.
    """
    with log.open("a") as out:
        out.seek(0, 2)
        said = _Said(log, out.tell())
        process = subprocess.Popen(command, stdout=out, stderr=out)
    with process:
        spent, looked = 0.0, time.monotonic()  # in the stage itself, not in those that it asks for
        while process.poll() is None and spent <= moment.after_s:
            time.sleep(LOOK_S)
            now = time.monotonic()
            spent += (now - looked) * _reached(said.begun(), run, moment)
            looked = now
        if process.poll() is None:
            process.send_signal(signal.Signals[f"SIG{name}"])
            met = _under_way(said.begun(), run)
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
        elif process.returncode:
            raise SystemExit(f"The run failed by itself with status {process.returncode}; see {log}.")
        else:
            met = ENDED
    return Kill(moment, met, _newest(run, met), process.returncode)


class _Said:
    """The stages that a process has begun, out of its log from where it began."""

    def __init__(self, log: pathlib.Path, first: int):
        self._log, self._first = log, first

    def begun(self) -> list[str]:
        with self._log.open("rb") as file:
            file.seek(self._first)
            lines = file.read().decode(errors="replace").splitlines()
        return [line.removeprefix("== ") for line in lines if line.startswith("== ")]


def _reached(begun: Sequence[str], run: pathlib.Path, moment: Moment) -> bool:
    """Whether this process is in the stage, the step saved; if that was done before, whether it has begun any stage."""
    if (run / "stages" / moment.stage / "done.json").exists():
        return bool(begun)
    return _under_way(begun, run) == moment.stage and (not moment.step or _newest(run, moment.stage) >= moment.step)


def _newest(run: pathlib.Path, stage: str) -> int:
    """The newest step that a training has saved; -1 where there is none."""
    return max((int(path.name) for path in (run / "stages" / stage / "fit").glob("*[0-9]")), default=-1)


def _under_way(begun: Sequence[str], run: pathlib.Path) -> str:
    """The innermost stage that this process has begun and not done."""
    there = [stage for stage in begun if not (run / "stages" / stage / "done.json").exists()]
    return there[-1] if there else (BETWEEN if begun else START)


def _finish(command: Sequence[str], log: pathlib.Path) -> None:
    with log.open("a") as out:
        done = subprocess.run(command, stdout=out, stderr=out)
    if done.returncode:
        raise SystemExit(f"The run failed with status {done.returncode}; see {log}.")


def _outcome(kills: Sequence[Kill], stages: Sequence[str], seconds: float) -> dict[str, Any]:
    """The kills by stage, and how many of them met a training that had saved something."""
    met = collections.Counter(kill.met for kill in kills if kill.met != ENDED)
    by_stage = {stage: met.pop(stage, 0) for stage in stages} | dict(met)
    statuses = collections.Counter(str(kill.status) for kill in kills)
    return {
        "kills": sum(by_stage.values()),
        "by_stage": by_stage,
        "after_a_save": sum(kill.saved >= 0 for kill in kills),
        "statuses": dict(statuses),
        "seconds": round(seconds, 1),
        "each": [dataclasses.asdict(kill) for kill in kills],
    }


def _told(found: Mapping[str, Any]) -> str:
    lines = [f"{stage:24} {count:5}" for stage, count in found["by_stage"].items()]
    lines += [f"{'all':24} {found['kills']:5}   in {found['seconds']:.0f} s"]
    lines += [f"Two runs that were left alone: {line}" for line in found["repeats"]]
    lines += found["differences"] or ["Everything is as in the run that was left alone, bit for bit."]
    return "\n".join(["", f"{'kills in':24}", *lines])


def differences(whole: pathlib.Path, cut: pathlib.Path) -> list[str]:
    """Everything in which two finished runs differ, a line each."""
    mine, other = (dict(_products(run)) for run in (whole, cut))
    lines = [f"{name}: only in {whole.name if name in mine else cut.name}" for name in sorted(set(mine) ^ set(other))]
    for name in sorted(set(mine) & set(other)):
        lines += [f"{name}{what}: differs" for what in _unequal(mine[name](), other[name]())]
    return lines


def _products(run: pathlib.Path) -> Iterator[tuple[str, Any]]:
    """Name and reader of all that a run made: checkpoints as arrays, JSON without the clock, other files as bytes.

    Of the states of a training only the last is compared: which others are kept depends on when they were saved.
    """
    from wovr_jax.core import checkpoint  # only now: importing jax takes seconds

    for mark in run.glob(f"stages/**/{checkpoint.META}"):
        folder = mark.parent.parent if mark.parent.name == checkpoint.ITEM else mark.parent
        if folder.parent.name != "fit" or folder == max(folder.parent.glob("*[0-9]")):
            yield folder.relative_to(run).as_posix(), lambda folder=folder: _flat(checkpoint.load(folder))
    for path in run.glob("stages/**/*"):
        inside = any(checkpoint.exists(above) for above in path.parents)
        if path.is_file() and not inside and path.name not in ("tried.json", "done.json"):
            yield path.relative_to(run).as_posix(), lambda path=path: path.read_bytes()
    for path in (*run.glob("stages/*/done.json"), run / "results.json"):
        yield path.relative_to(run).as_posix(), lambda path=path: _timeless(json.loads(path.read_text()))
    yield "metrics.jsonl", lambda: _lines(run / "metrics.jsonl")


def _flat(tree: Any, at: str = "") -> dict[str, bytes]:
    """Bytes of every array by its path."""
    if isinstance(tree, Mapping):
        return {k: v for name, part in tree.items() for k, v in _flat(part, f"{at}/{name}").items()}
    if isinstance(tree, list | tuple):
        return _flat(dict(enumerate(tree)), at)
    return {} if tree is None else {at: np.asarray(tree).tobytes()}


def _timeless(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _timeless(part) for name, part in value.items() if name not in CLOCK}
    return [_timeless(part) for part in value] if isinstance(value, list) else value


def _lines(path: pathlib.Path) -> dict[str, Any]:
    """Metrics by stage and step. A line that a resumed run wrote once more is the same line or a difference."""
    from wovr_jax.core.log import read_metrics

    found: dict[str, Any] = {}
    for line in map(_timeless, read_metrics(path.parent)):
        at = f"/{line['stage']}/{line['step']}/{','.join(sorted(line))}"
        found[at] = line if found.get(at, line) == line else (found[at], line)
    return found


def _unequal(mine: Any, other: Any) -> list[str]:
    """Names of what differs: arrays and metrics one by one, anything else as a whole."""
    if isinstance(mine, dict) and isinstance(other, dict):
        return [name if name.startswith("/") else f" ({name})" for name in sorted({*mine, *other})
                if mine.get(name) != other.get(name)]  # fmt: skip
    return [] if mine == other else [""]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
