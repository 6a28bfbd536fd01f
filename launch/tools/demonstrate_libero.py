"""Demonstrations of LIBERO tasks by the scripted expert, as episodes; no download of data needed.

    python launch/tools/demonstrate_libero.py --suite libero_spatial --out data/spatial_expert
    python launch/tools/demonstrate_libero.py --suite libero_object --tasks 0,3 --inits 0:10 --size 128 --out data/two
    python launch/tools/demonstrate_libero.py --suite libero_spatial --flaw early_release --share 0.3 --out data/base
    python launch/tools/demonstrate_libero.py --suite libero_object --measure      success only, nothing drawn

Needs make libero. The expert knows libero_spatial and libero_object. Begun again, the same command goes on with the
tasks that are not there yet. Prints success by task with 95 % intervals. A training run on LIBERO calls this program
for its demonstrations (--for-run) and reads what it has written.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[2])

from launch import called, command, flags

if TYPE_CHECKING:
    from wovr_jax.sim.libero.rollout import Outcome
    from wovr_jax.sim.libero.tasks import Trial


def main() -> None:
    """Runs the expert as the command line says."""
    args = parse()
    with command.explain_errors("Stopped. Tasks that are whole are kept; the same command continues."):
        if args.for_run:
            record_for_run(args)
        else:
            print(measure(args) if args.measure else record(args))


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = command.Parser(__doc__)
    parser.add_argument("--suite", default="libero_spatial", help="libero_spatial or libero_object")
    parser.add_argument("--tasks", type=numbers, help="of the suite, e.g. 0,3 or 0:5; default all")
    parser.add_argument("--inits", type=numbers, default=list(range(50)), help="official initial states; default 0:50")
    parser.add_argument("--seed", type=int, default=0, help="of resets, noise and flaws (default 0)")
    parser.add_argument("--protocol", default="openvla", help="how episodes begin and end: openvla or rlinf")
    parser.add_argument("--noise", type=float, default=0.0, help="standard deviation added to executed motion")
    parser.add_argument("--flaw", default="none", help="early_release, wrong_object or missed_grasp")
    parser.add_argument("--share", type=float, default=1.0, help="of the episodes that carry the flaw (default 1)")
    parser.add_argument("--linger", type=int, default=8, help="steps after the first success (default 8)")
    parser.add_argument("--keep", choices=("all", "successes"), default="all", help="which episodes are written")
    parser.add_argument("--size", type=flags.positive, default=256, help="pixels of a frame (default 256)")
    parser.add_argument("--no-wrist", action="store_true", help="leave the camera in the hand out")
    parser.add_argument("--drawing", default="libero", help="libero, or fast: without smoothed edges and reflections")
    parser.add_argument(
        "--soft-reset", action="store_true", help="ten times faster; fixtures stand a little differently"
    )
    parser.add_argument(
        "--workers", type=flags.positive, default=2, help="environments at a time, 1 to 1.5 GB each (default 2)"
    )
    parser.add_argument("--videos", type=int, default=0, help="mp4 files of the first episodes, beside the episodes")
    parser.add_argument("--out", type=pathlib.Path, help="episode folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    parser.add_argument("--measure", action="store_true", help="only success, nothing drawn or written")
    text = "JSON with cfg, seed, count and validation of a training run, in the place of all other flags but --out"
    parser.add_argument("--for-run", metavar="SETTINGS", help=text)
    args = parser.parse_args()
    # Exactly one of the two.
    if args.measure == bool(args.out):
        parser.error("give either --out FOLDER to record episodes, or --measure to count successes")
    return args


def numbers(text: str) -> list[int]:
    """Reads ``"0,3"`` or ``"0:5"`` or both; the end of a range is left out."""
    listed: list[int] = []
    for part in text.split(","):
        low, colon, high = part.partition(":")
        listed += range(int(low), int(high)) if colon else [int(low)]
    return listed


def measure(args: argparse.Namespace) -> str:
    """Counts successes; returns their table."""
    from wovr_jax.sim.libero.collect import check_verdicts, line_of
    from wovr_jax.sim.libero.demonstrate import demonstrations
    from wovr_jax.sim.libero.evaluate import table, trials
    from wovr_jax.sim.libero.pool import Pool
    from wovr_jax.sim.libero.tasks import SceneConfig, protocol, tasks

    wanted = trials(args.suite, args.inits, only=args.tasks, seed=args.seed)
    # Size 0: nothing is drawn, as the expert looks at the simulator's state.
    with Pool(args.workers, SceneConfig(size=0, hard_reset=not args.soft_reset)) as pool:
        made = demonstrations(pool, wanted, protocol(args.protocol), expert(args), draw="none")
        lines = [line_of(outcome) for outcome in bar(made, len(wanted))]
    check_verdicts(lines)
    return table(lines, {task.index: task.instruction for task in tasks(args.suite)})


def record(args: argparse.Namespace) -> str:
    """Records episodes; returns the table of their successes."""
    from wovr_jax.core import config
    from wovr_jax.data.episodes import EpisodesError
    from wovr_jax.sim.libero.collect import collect
    from wovr_jax.sim.libero.demonstrate import demonstrations
    from wovr_jax.sim.libero.evaluate import table, trials
    from wovr_jax.sim.libero.machine import fingerprint
    from wovr_jax.sim.libero.pool import Pool
    from wovr_jax.sim.libero.tasks import SceneConfig, protocol, tasks

    folder = args.out.expanduser().absolute()
    if folder.exists() and not args.overwrite:
        raise EpisodesError(f"{folder} exists already; add --overwrite to replace it, or name another folder.")
    flags = {"size": args.size, "wrist": not args.no_wrist, "drawing": args.drawing}
    scene = config.from_dict(SceneConfig, flags | {"hard_reset": not args.soft_reset}, "scene")
    wanted = trials(args.suite, args.inits, only=args.tasks, seed=args.seed)
    with Pool(args.workers, scene) as pool:
        # All that decides an episode goes beside the episodes, the renderer and a hash of the meshes included.
        meta: dict[str, Any] = {"sim": args.suite, "protocol": args.protocol, "scene": dataclasses.asdict(scene)}
        meta |= {"expert": dataclasses.asdict(expert(args)), "fingerprint": fingerprint(pool.renderer)}

        def play(part: Sequence[Trial]) -> Iterator[Outcome]:
            outcomes = demonstrations(pool, part, protocol(args.protocol), expert(args))
            return drop_failures(outcomes) if args.keep == "successes" else outcomes

        facts = collect(play, wanted, args.out, meta=meta | {"keep": args.keep})
    write_films(args)
    rates = table(facts["meta"]["outcomes"], {task.index: task.instruction for task in tasks(args.suite)})
    return f"{rates}\n{args.out}: {facts['episodes']} episodes, {facts['steps']} steps"


def record_for_run(args: argparse.Namespace) -> None:
    """Records the demonstrations of a training run, which has called this program, waits for it and tells the rest."""
    called.end_with_run()

    from wovr_jax.core import config
    from wovr_jax.sim.libero.demonstrate import demonstrate_run
    from wovr_jax.sim.libero.tasks import LiberoConfig

    asked = json.loads(args.for_run)
    cfg = config.from_dict(LiberoConfig, asked.pop("cfg"), "libero")
    demonstrate_run(args.out.absolute(), cfg, **asked)


def drop_failures(outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
    """Leaves out the episodes of failures; how their trials ended is told all the same."""
    for outcome in outcomes:
        yield outcome if outcome.success else dataclasses.replace(outcome, episode=None)


def expert(args: argparse.Namespace) -> Any:
    """Returns the expert's settings."""
    from wovr_jax.core import config
    from wovr_jax.sim.libero.tasks import LiberoExpertConfig

    flags = {"noise": args.noise, "flaw": args.flaw, "flawed_share": args.share, "linger": args.linger}
    return config.from_dict(LiberoExpertConfig, flags | {"seed": args.seed}, "expert")


def write_films(args: argparse.Namespace) -> None:
    """Writes the first episodes as mp4, both cameras side by side, in real time."""
    import numpy as np

    from wovr_jax.core import pixels
    from wovr_jax.data import episodes as disk

    source = disk.EpisodeSource(args.out, verify=False)  # just written
    for number in range(min(args.videos, len(source))):
        episode = source[number]
        # (S, H, W, 3) each; side by side along the width.
        views = [episode.frame_SHWC] + ([] if episode.wrist_SHWC is None else [episode.wrist_SHWC])
        name = f"task-{episode.task:02d}-init-{episode.origin['init']:02d}.mp4"
        pixels.video(args.out / "videos" / name, np.concatenate(views, axis=2), fps=20)


def bar(outcomes: Any, count: int) -> Any:
    """A progress bar over trials, on stderr."""
    from tqdm import tqdm

    return tqdm(outcomes, total=count, unit="episode")


if __name__ == "__main__":
    main()
