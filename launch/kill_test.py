"""Kills a run at random moments, starts it again each time, and holds what comes out against a run that was left alone.

    python launch/kill_test.py --kills=30                               the embedded loop at its smallest, SIGKILL
    python launch/kill_test.py --kills=30 --signal=TERM                 as a scheduler ends a job
    python launch/kill_test.py --config=configs/pace.py --kills=5       another config
    python launch/kill_test.py ... -- --config.seed=1                   settings of both runs after a --

Moments are drawn from --seed and spread over all stages by their order; a state is saved every half second, so that
many fall into a save. Parameters, episodes, start states, films, facts and metrics of every stage have to be equal bit
for bit; the exit status is 1 if they are not. Both runs lie in --folder; one that was left alone is used again if it is
there already.
"""

from __future__ import annotations

import argparse
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
ENDED = "finished before"
GRACE_S = 120.0
"""For a run that was asked to end to save its state."""


@dataclasses.dataclass(frozen=True)
class Moment:
    """A kill: so many seconds after a stage has begun."""

    stage: str
    after_s: float


def main(argv: Sequence[str]) -> int:
    """Runs, kills, compares, prints a table of the kills; the exit status."""
    args = _arguments(argv)
    whole, cut = args.folder / "whole", args.folder / "cut"
    command = [sys.executable, str(ROOT / "launch" / "train.py"), f"--config={args.config}"]
    command += ["--config.checkpoints.every_s=0.5", *args.settings]
    if not (whole / "results.json").exists():
        _finish([*command, f"--run={whole}"], args.folder / "whole.log")
    shutil.rmtree(cut, ignore_errors=True)
    moments = plan(stage_seconds(whole), args.kills, args.seed)
    print(f"{'kill':>4}  {'aimed at':28} {'after':>7}  {'met':28} {'status':>6}")
    killed = 0
    for count, moment in enumerate(moments, 1):
        met, status = kill_at([*command, f"--run={cut}"], cut, moment, args.signal, args.folder / "cut.log")
        print(f"{count:4}  {moment.stage:28} {moment.after_s:6.1f}s  {met:28} {status:6}", flush=True)
        killed += met != ENDED
    _finish([*command, f"--run={cut}"], args.folder / "cut.log")
    different = differences(whole, cut)
    print("\n".join(different) or f"After {killed} kills everything is as in the run that was left alone.")
    return 1 if different else 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=f"{ROOT}/configs/pace.py:smoke")
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


def plan(seconds: Mapping[str, float], kills: int, seed: int) -> list[Moment]:
    """Moments in the order of the stages; with as many kills as stages each has one, with more some have more.

    Early moments are likelier than late ones: a run that is started again finds its programs compiled, and is faster
    than the one whose seconds these are.
    """
    rng = np.random.default_rng(seed)
    stages = list(seconds)
    rounds = [rng.permutation(len(stages)) for _ in range(-(-kills // len(stages)))]
    chosen = sorted(np.concatenate(rounds)[:kills]) if kills else []
    return [Moment(stages[k], float(rng.uniform() ** 2 * seconds[stages[k]])) for k in chosen]


def kill_at(command: Sequence[str], run: pathlib.Path, moment: Moment, name: str, log: pathlib.Path) -> tuple[str, int]:
    """Starts the run and kills it at the moment; the stage that it was in, and its exit status.

    A run that is past the stage is killed so many seconds after the stage that it is in began; one that ends first, as
    the last stages may, is not killed any more.
    """
    with log.open("a") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        while process.poll() is None and not _reached(run, moment.stage):
            time.sleep(0.02)
        end = time.monotonic() + moment.after_s
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        met = under_way(run) or "between stages"
        if process.poll() is None:
            process.send_signal(signal.Signals[f"SIG{name}"])
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
        elif process.returncode:
            raise SystemExit(f"The run failed by itself with status {process.returncode}; see {log}.")
        else:
            met = ENDED
    return met, process.returncode


def _reached(run: pathlib.Path, stage: str) -> bool:
    """Whether the stage has begun; if it is done already, whether any other is under way."""
    folder = run / "stages" / stage
    return bool(under_way(run)) if (folder / "done.json").exists() else folder.is_dir()


def under_way(run: pathlib.Path) -> str:
    """The stage that has begun and is not done; an outer one, whose product asks for others first, has not begun."""
    begun = [path for path in (run / "stages").glob("*") if not (path / "done.json").exists()]
    return max(begun, key=lambda path: path.stat().st_mtime).name if begun else ""


def _finish(command: Sequence[str], log: pathlib.Path) -> None:
    with log.open("a") as out:
        done = subprocess.run(command, stdout=out, stderr=out)
    if done.returncode:
        raise SystemExit(f"The run failed with status {done.returncode}; see {log}.")


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
    from wovr_jax import checkpoint  # only now: importing jax takes seconds

    for mark in run.glob(f"stages/**/{checkpoint.META}"):
        folder = mark.parent
        if folder.parent.name != "fit" or folder == max(folder.parent.glob("*[0-9]")):
            yield folder.relative_to(run).as_posix(), lambda folder=folder: _flat(checkpoint.load(folder))
    for path in run.glob("stages/**/*"):
        inside = any((above / checkpoint.META).exists() for above in path.parents)
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
    from wovr_jax import metrics

    found: dict[str, Any] = {}
    for line in map(_timeless, metrics.read_metrics(path.parent)):
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
