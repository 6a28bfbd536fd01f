"""Asks a trained world model whether it obeys: one command at a time, from one frame, beside the true simulator.

    python launch/probe_actions.py --run runs/pace                            the last world model of a run
    python launch/probe_actions.py --run runs/pace --stage world-0            a named one
    python launch/probe_actions.py --run runs/world_study --stage cross-seed1 one of the study

Prints how well the predicted gripper goes where it is sent, axis by axis, over start frames that no stage trained on.
Writes the numbers, and a picture of one start frame under every command, to <run>/probe/. In it amber rows are true,
blue ones imagined.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any, NoReturn

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

WORDS = {
    "sign": "goes as told",
    "slope": "distance / true",
    "correlation": "correlation",
    "across": "strays, pixels",
    "lost": "gripper lost",
}


def main() -> None:
    """Probes what the command line names; everything wrong ends in one message on stderr."""
    args = parse()

    # Only now: importing jax takes seconds, a misspelt flag none.
    from wovr_jax.core import config, keys, machine, pixels
    from wovr_jax.core.disk import write_json
    from wovr_jax.run.folder import Run, RunError
    from wovr_jax.run.recipe import read_recipe
    from wovr_jax.sim.arena import layouts
    from wovr_jax.studies import probe

    try:
        recipe = read_recipe(settings(args.run))
        if recipe.libero:
            refuse(f"{args.run} is a run on LIBERO; only the embedded table can be asked where its gripper is.")
        machine.enable_compile_cache(args.run.parent / ".jax_cache")
        stage = args.stage or latest(args.run)
        chosen = finished(args.run, stage)
        recipe, cfg, params = world(recipe, Run(args.run, config.to_dict(recipe)), chosen)
    except (config.ConfigError, RunError) as error:
        refuse(str(error))
    key, seeds = keys.key(recipe.seed, "probe"), layouts(recipe.seed, "evaluate", args.starts)
    found = probe.probe(cfg, params, recipe.sim, seeds, key)
    picture = pixels.image(args.run / "probe" / f"{stage}.png", probe.sheet(cfg, params, recipe.sim, seeds[0], key))
    write_json(picture.with_suffix(".json"), {"stage": stage, "starts": args.starts, **found})
    print(f"{args.run}, {stage}, {args.starts} start frames\n")
    print(table(found))
    print(f"\n{picture}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=pathlib.Path, required=True, metavar="FOLDER", help="a run folder")
    parser.add_argument("--stage", help="which of its world models; default: the last finished one")
    parser.add_argument("--starts", type=int, default=64, help="start frames to average over (default 64)")
    args = parser.parse_args()
    if args.starts < 2:
        parser.error("--starts is at least 2")
    args.run = args.run.expanduser()
    return args


def settings(run: pathlib.Path) -> dict[str, Any]:
    """What the run was asked for."""
    try:
        return json.loads((run / "config.json").read_text())
    except OSError:
        refuse(f"{run} is not a run folder: there is no config.json in it. Runs are made by launch/train.py.")


def models(run: pathlib.Path) -> list[str]:
    """Finished stages that hold a world model, oldest first."""
    products = [*run.glob("stages/*/dit"), *run.glob("stages/*/adapters")]
    done = [path.parent for path in products if (path.parent / "done.json").is_file()]
    return [path.name for path in sorted(done, key=lambda path: (path / "done.json").stat().st_mtime)]


def latest(run: pathlib.Path) -> str:
    """The stage that finished last."""
    found = models(run)
    return found[-1] if found else refuse(f"{run} holds no finished world model yet; let the run go on.")


def finished(run: pathlib.Path, stage: str) -> str:
    """``stage``, if it holds a finished world model."""
    found = models(run)
    return stage if stage in found else refuse(f"{run} has no finished world model {stage}; it has {', '.join(found)}.")


def world(recipe, run, stage: str) -> tuple[Any, Any, Any]:
    """Recipe (with the seed of the stage), settings and weights of a stage's world model."""
    from wovr_jax.run.stages import Stages
    from wovr_jax.studies import world_parts as world_study

    if recipe.job == world_study.JOB:
        return world_study.load(recipe, run, *stage.rsplit("-seed", 1))
    found = Stages(recipe, run)
    return recipe, found.vae[0], found.world(int(stage.removeprefix("world-")))


def table(found: dict[str, dict[str, float]]) -> str:
    """Axes down, numbers across."""
    lines = ["".join([" " * 6, *(f"{words:>17}" for words in WORDS.values())])]
    for axis, numbers in found.items():
        cells = [f"{numbers[name]:17.3f}" if name in numbers else f"{'-':>17}" for name in WORDS]
        lines.append("".join([f"{axis:6}", *cells]))
    return "\n".join(lines)


def refuse(message: str) -> NoReturn:
    """Ends the program with ``message`` on stderr and exit status 1."""
    sys.exit(message)


if __name__ == "__main__":
    main()
