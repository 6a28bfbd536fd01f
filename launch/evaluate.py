"""Measures a policy on the real LIBERO by its official protocol.

    python launch/evaluate.py --config=configs/evaluate.py:libero_spatial --config.policy=runs/mine/bundle
    python launch/evaluate.py --config=configs/evaluate.py:libero_goal,rlinf --config.policy=... --config.workers=16
    python launch/evaluate.py --config=... --run=runs/new --against=runs/old     and the paired gain over another run
    python launch/evaluate.py --config=... --json                                results.json on stdout, for a program

The same command goes on with a run that was interrupted, kill -9 included. ``results.json`` in the run folder holds
every outcome and what decided it: protocol, versions, renderer and a hash of the assets. Needs make libero.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from launch import command, terminal

if TYPE_CHECKING:
    from wovr_jax.sim.libero.evaluate import LiberoEvaluation
    from wovr_jax.sim.libero.runner import Policy


def main() -> None:
    """Reads the settings, runs the trials that are not there yet, prints the table."""
    parser = command.Parser(__doc__)
    command.add_config(parser)
    parser.add_argument("--against", metavar="FOLDER", help="run of another policy, compared trial by trial")
    parser.add_argument("--json", action="store_true", help="for a program: nothing but JSON on stdout")
    request = command.read(parser, door="evaluate")
    folder, other = request.run, request.options.against
    with command.explain_errors(f"Stopped. {folder} is kept up to here; the same command continues it."):
        # Only now: importing jax takes seconds, a misspelt flag none.
        from wovr_jax.core import processes
        from wovr_jax.core.config import from_dict
        from wovr_jax.core.disk import read_json
        from wovr_jax.sim.libero.evaluate import RESULTS, LiberoEvaluation

        # Several processes would play the same trials and write the same file.
        if processes.detect(os.environ, on_tpu=False):
            raise processes.ProcessError("launch/evaluate.py measures in one process, with as many workers as cores.")
        # The job only said which door this is.
        settings = {name: value for name, value in request.settings.items() if name != "job"}
        table = measure(from_dict(LiberoEvaluation, settings), folder)
        gain = compare(folder, other) if other else None
        if request.options.json:
            results = read_json(folder / RESULTS)
            terminal.print_json({"run": str(folder), "results": results, "against": other, "gain": gain})
            return
    print(f"{table}{describe_gain(gain, other) if gain else ''}\n\n{folder / RESULTS}")


def measure(cfg: LiberoEvaluation, folder: pathlib.Path) -> str:
    """Runs the trials that the run folder does not hold yet, writes its results and returns their table."""
    from tqdm import tqdm

    from wovr_jax.run.folder import Run
    from wovr_jax.sim.libero import collect, evaluate
    from wovr_jax.sim.libero.machine import fingerprint
    from wovr_jax.sim.libero.runner import TrialRunner
    from wovr_jax.sim.libero.tasks import tasks

    wanted = evaluate.trials(cfg.suite, range(*cfg.inits), only=list(cfg.tasks) or None, seed=cfg.seed)
    # Before anything is started: trials that training saw are refused.
    shared = evaluate.check_overlap(wanted, cfg)
    if remark := evaluate.explain_twins(wanted, cfg):
        print(remark, file=sys.stderr)
    run = Run(folder, dataclasses.asdict(cfg))
    # The policy is opened when the first trial wants it: a run that is complete is only tabled again.
    runner = TrialRunner(cfg, folder, lambda: load_policy(cfg))
    with tqdm(total=len(wanted), desc=folder.name, unit="trial") as bar:
        outcomes: list[bool] = []

        def show(line: Mapping[str, Any]) -> None:
            if line["success"] is not None:
                outcomes.append(line["success"])
            bar.set_postfix_str(f"success {sum(outcomes)}/{len(outcomes)}")
            bar.update()

        lines = collect.measure(runner, wanted, folder, show)
    # A trial that was never played is no failure, and a rate without it none of this policy.
    collect.check_verdicts(lines)
    facts = fingerprint(runner.renderer) | {"trials_seen_in_training": shared if cfg.trained_on else None}
    evaluate.save_results(folder, evaluate.results(lines, dataclasses.asdict(cfg), facts))
    run.close()
    return evaluate.table(lines, {task.index: task.instruction for task in tasks(cfg.suite)})


def load_policy(cfg: LiberoEvaluation) -> tuple[Policy, int]:
    """Opens a robot's bundle; returns its policy and the pixels of the frames that it takes."""
    from wovr_jax.export.robot import Robot

    robot = Robot.load(cfg.policy)

    def act(frame_BHWC: Any, tasks: Any, seeds: Any) -> Any:
        instructions = [task.instruction for task in tasks]
        return robot.act(frame_BHWC, instructions, seeds=seeds, temperature=cfg.temperature).action_BTA

    return act, robot.frame_shape[0]


def compare(folder: pathlib.Path, other: str) -> dict[str, Any]:
    """Returns the paired gain over another run: ``gain``, ``low``, ``high``, of ``n`` trials that both played."""
    from wovr_jax.sim.libero import evaluate

    return evaluate.compare(evaluate.load_results(folder), evaluate.load_results(other))


def describe_gain(gain: Mapping[str, Any], other: str) -> str:
    """Returns it as a line, in points."""
    low, high = 100 * gain["low"], 100 * gain["high"]
    return f"\n{100 * gain['gain']:+.1f} points [{low:.1f}, {high:.1f}] over {other}, {gain['n']} paired trials"


if __name__ == "__main__":
    main()
