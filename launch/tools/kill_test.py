"""Kills a run at random moments, starts it again each time, and holds what comes out against a run that was left alone.

    python launch/tools/kill_test.py --kills=30                               the whole loop at its smallest, SIGKILL
    python launch/tools/kill_test.py --kills=30 --signal=TERM                 as a scheduler ends a job
    python launch/tools/kill_test.py --config=configs/pace.py:smoke --kills=5 another config
    python launch/tools/kill_test.py ... -- --config.seed=1                   settings of both runs after a --

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[2])

from launch import command as command_line
from launch import flags
from launch.command import ROOT

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
    """Runs, kills, compares, prints tables of the kills; returns the exit status."""
    args, begin = parse(argv), time.monotonic()
    command = [sys.executable, str(ROOT / "launch" / "train.py"), f"--config={args.config}"]
    # States are saved far more often than a run would, or nearly no kill would meet one that is being saved.
    command += ["--config.checkpoints.every_s=0.02", *args.settings]

    # Two runs that are left alone: the truth, and how long each stage takes once its programs are compiled.
    whole, again, cut = (args.folder / name for name in ("whole", "again", f"cut-{args.signal.lower()}"))
    for run in (whole, again):
        if not (run / "results.json").exists():
            run_to_end([*command, f"--run={run}"], run.with_suffix(".log"))

    # A third run that is killed, and goes on at last until it ends.
    shutil.rmtree(cut, ignore_errors=True)
    command, log = [*command, f"--run={cut}"], cut.with_suffix(".log")
    moments = plan(stage_seconds(again), stage_steps(again), args.kills, args.seed)
    kills = []
    print(f"{'kill':>4}  {'aimed at':24} {'after':>7}  {'met':24} {'saved':>6} {'status':>6}  left")
    first = time.monotonic()
    for count, moment in enumerate(moments, 1):
        kills.append(kill_at(command, cut, moment, args.signal, log))
        # As long as the kills so far took on average.
        left = (time.monotonic() - first) / count * (len(moments) - count)
        print(f"{count:4}  {format_kill(kills[-1])}  {left:4.0f} s", flush=True)
    run_to_end(command, log)

    outcome = summarize(kills, list(stage_seconds(whole)), time.monotonic() - begin)
    outcome |= {"signal": args.signal, "repeats": differences(whole, again), "differences": differences(whole, cut)}
    (args.folder / f"kill-{args.signal.lower()}.json").write_text(json.dumps(outcome, indent=1), encoding="utf-8")
    print(format_outcome(outcome))
    return 1 if outcome["differences"] or outcome["repeats"] else 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the command line and makes the folder of the runs."""
    parser = command_line.Parser(__doc__)
    parser.add_argument("--config", default=f"{ROOT}/configs/pace.py:tiny", metavar="FILE[:PRESET]")
    parser.add_argument("--kills", type=flags.positive, default=30, help="default 30")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "runs" / "kill_test", help="of all runs")
    parser.add_argument("settings", nargs="*", help="flags of launch/train.py, after a --")
    args = parser.parse_args(argv)
    args.folder = args.folder.absolute()
    args.folder.mkdir(parents=True, exist_ok=True)
    return args


def run_to_end(command: Sequence[str], log: pathlib.Path) -> None:
    """Runs a command whose output goes to ``log``; a failure ends the test."""
    with log.open("a", encoding="utf-8") as out:
        status = subprocess.run(command, stdout=out, stderr=out).returncode
    if status:
        command_line.refuse(f"The run failed with status {status}; see {log}.")


# --- the moments -----------------------------------------------------------------------------


def stage_seconds(run: pathlib.Path) -> dict[str, float]:
    """How long each stage of a finished run took, in their order."""
    marks = sorted(run.glob("stages/*/done.json"), key=lambda mark: mark.stat().st_mtime)
    return {mark.parent.name: json.loads(mark.read_text(encoding="utf-8"))["seconds"] for mark in marks}


def stage_steps(run: pathlib.Path) -> dict[str, int]:
    """Steps of the stages that are trainings."""
    return {path.parent.name: newest_step(run, path.parent.name) for path in run.glob("stages/*/fit")}


def newest_step(run: pathlib.Path, stage: str) -> int:
    """The newest step that a training has saved; -1 where there is none."""
    return max((int(path.name) for path in (run / "stages" / stage / "fit").glob("*[0-9]")), default=-1)


def plan(seconds: Mapping[str, float], steps: Mapping[str, int], kills: int, seed: int) -> list[Moment]:
    """Draws moments in the order of the stages: one in each as far as they reach, the others where the time goes.

    Those of a training are by turns after a saved step and after its beginning.
    """
    rng, stages = np.random.default_rng(seed), list(seconds)
    # One kill a stage, chosen without repeats while they reach; every further one falls where a real one would.
    share = np.array([seconds[stage] for stage in stages])
    more = rng.choice(len(stages), max(0, kills - len(stages)), p=share / share.sum())
    drawn = sorted([*rng.permutation(len(stages))[:kills].tolist(), *more.tolist()])
    moments = []
    for n, stage in enumerate(stages[k] for k in drawn):
        # Not the last step: a training that has saved it is done before the kill can come.
        step = int(rng.integers(1, steps[stage])) if stage in steps and n % 2 == 0 else 0
        after_s = float(rng.uniform() * (STEP_S if step else seconds[stage]))
        moments.append(Moment(stage, after_s, step))
    return sorted(moments, key=lambda moment: (stages.index(moment.stage), moment.step))


# --- a kill ----------------------------------------------------------------------------------


def kill_at(command: Sequence[str], run: pathlib.Path, moment: Moment, name: str, log: pathlib.Path) -> Kill:
    """Starts the run and kills it at the moment.

    A run that is past the stage is killed so many seconds after the first stage that it begins; one that ends first, as
    the last stages may, is not killed any more.
    """
    with log.open("a", encoding="utf-8") as out:
        # The log holds what earlier processes wrote; where it ends now, this one begins.
        out.seek(0, 2)
        begun = stage_reader(log, out.tell())
        process = subprocess.Popen(command, stdout=out, stderr=out)
    with process:
        spent, looked = 0.0, time.monotonic()  # in the stage itself, not in those that it asks for
        while process.poll() is None and spent <= moment.after_s:
            time.sleep(LOOK_S)
            now = time.monotonic()
            # True counts as one: the time of this look is spent only if the stage was under way.
            spent += (now - looked) * is_reached(begun(), run, moment)
            looked = now
        if process.poll() is None:
            process.send_signal(signal.Signals[f"SIG{name}"])
            met = stage_under_way(begun(), run)
            # SIGTERM lets the run save; one that takes too long is a scheduler's SIGKILL.
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
        elif process.returncode:
            command_line.refuse(f"The run failed by itself with status {process.returncode}; see {log}.")
        else:
            met = ENDED
    return Kill(moment, met, newest_step(run, met), process.returncode)


def stage_reader(log: pathlib.Path, first: int) -> Callable[[], list[str]]:
    """Gives a function that reads the stages begun so far out of a log, from byte ``first`` on."""

    def begun() -> list[str]:
        with log.open("rb") as file:
            file.seek(first)
            # Progress bars write bytes that a kill may cut in two.
            lines = file.read().decode(errors="replace").splitlines()
        return [line.removeprefix("== ") for line in lines if line.startswith("== ")]

    return begun


def is_reached(begun: Sequence[str], run: pathlib.Path, moment: Moment) -> bool:
    """Whether this process is in the stage, the step saved; if that was done before, whether it has begun any stage."""
    if (run / "stages" / moment.stage / "done.json").exists():
        return bool(begun)
    if stage_under_way(begun, run) != moment.stage:
        return False
    return not moment.step or newest_step(run, moment.stage) >= moment.step


def stage_under_way(begun: Sequence[str], run: pathlib.Path) -> str:
    """The innermost stage that this process has begun and not done."""
    # A stage asks for others before it begins itself, so the newest that is not done is the innermost.
    open_stages = [stage for stage in begun if not (run / "stages" / stage / "done.json").exists()]
    return open_stages[-1] if open_stages else (BETWEEN if begun else START)


# --- what came out ---------------------------------------------------------------------------


def summarize(kills: Sequence[Kill], stages: Sequence[str], seconds: float) -> dict[str, Any]:
    """Counts the kills by stage, and those that met a training which had saved something."""
    # A run that ended before its moment came was not killed.
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


def format_kill(kill: Kill) -> str:
    """A kill as a row: aimed at, after, met, saved, status."""
    aimed = kill.aimed.stage + (f", step {kill.aimed.step}" if kill.aimed.step else "")
    saved = kill.saved if kill.saved >= 0 else "-"
    return f"{aimed:24} {kill.aimed.after_s:6.2f}s  {kill.met:24} {saved:>6} {kill.status:6}"


def format_outcome(outcome: Mapping[str, Any]) -> str:
    """The kills of each stage, and every difference that they made."""
    lines = [f"{stage:24} {count:5}" for stage, count in outcome["by_stage"].items()]
    lines += [f"{'all':24} {outcome['kills']:5}   in {outcome['seconds']:.0f} s"]
    lines += [f"Two runs that were left alone: {line}" for line in outcome["repeats"]]
    lines += outcome["differences"] or ["Everything is as in the run that was left alone, bit for bit."]
    return "\n".join(["", f"{'kills in':24}", *lines])


# --- the comparison of two runs --------------------------------------------------------------


def differences(whole: pathlib.Path, cut: pathlib.Path) -> list[str]:
    """Lists everything in which two finished runs differ, a line each."""
    # Readers, not contents: a product is read when its turn comes, so that two of them are in memory at a time.
    mine, other = (dict(list_products(run)) for run in (whole, cut))
    lines = [f"{name}: only in {whole.name if name in mine else cut.name}" for name in sorted(set(mine) ^ set(other))]
    for name in sorted(set(mine) & set(other)):
        lines += [f"{name}{part}: differs" for part in list_unequal(mine[name](), other[name]())]
    return lines


def list_products(run: pathlib.Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and reader of all that a run made: checkpoints as arrays, JSON without the clock, other files as bytes.

    Of the states of a training only the last is compared: which others are kept depends on when they were saved.
    """
    from wovr_jax.core import checkpoint  # only now: importing jax takes seconds

    for mark in run.glob(f"stages/**/{checkpoint.META}"):
        folder = mark.parent.parent if mark.parent.name == checkpoint.ITEM else mark.parent
        if folder.parent.name != "fit" or folder == max(folder.parent.glob("*[0-9]")):
            yield folder.relative_to(run).as_posix(), lambda folder=folder: array_bytes(checkpoint.load(folder))
    for path in run.glob("stages/**/*"):
        inside = any(checkpoint.exists(above) for above in path.parents)
        if path.is_file() and not inside and path.name not in ("tried.json", "done.json"):
            yield path.relative_to(run).as_posix(), lambda path=path: path.read_bytes()
    for path in (*run.glob("stages/*/done.json"), run / "results.json"):
        yield (
            path.relative_to(run).as_posix(),
            lambda path=path: drop_clock(json.loads(path.read_text(encoding="utf-8"))),
        )
    yield "metrics.jsonl", lambda: read_metric_lines(run)


def array_bytes(tree: Any, path: str = "") -> dict[str, bytes]:
    """Bytes of every array by its path."""
    if isinstance(tree, Mapping):
        return {k: v for name, part in tree.items() for k, v in array_bytes(part, f"{path}/{name}").items()}
    if isinstance(tree, list | tuple):
        return array_bytes(dict(enumerate(tree)), path)
    # Bytes, so that a NaN equals itself and -0.0 does not equal 0.0.
    return {} if tree is None else {path: np.asarray(tree).tobytes()}


def drop_clock(value: Any) -> Any:
    """``value`` without the numbers that two equal runs need not share."""
    if isinstance(value, Mapping):
        return {name: drop_clock(part) for name, part in value.items() if name not in CLOCK}
    return [drop_clock(part) for part in value] if isinstance(value, list) else value


def read_metric_lines(run: pathlib.Path) -> dict[str, Any]:
    """Metrics by stage and step. A line that a resumed run wrote once more is the same line or a difference."""
    from wovr_jax.core.log import read_metrics

    lines: dict[str, Any] = {}
    for line in map(drop_clock, read_metrics(run)):
        name = f"/{line['stage']}/{line['step']}/{','.join(sorted(line))}"
        # Two lines of one name that differ are kept as a pair, which no single line equals.
        lines[name] = line if lines.get(name, line) == line else (lines[name], line)
    return lines


def list_unequal(mine: Any, other: Any) -> list[str]:
    """Names of what differs: arrays and metrics one by one, anything else as a whole."""
    if not (isinstance(mine, dict) and isinstance(other, dict)):
        return [] if mine == other else [""]
    names = [name for name in sorted({*mine, *other}) if mine.get(name) != other.get(name)]
    return [name if name.startswith("/") else f" ({name})" for name in names]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
