"""Measures a policy on the real LIBERO by its official protocol.

    python launch/evaluate.py --config=configs/evaluate.py:libero_spatial --config.policy=runs/mine/bundle
    python launch/evaluate.py --config=configs/evaluate.py:libero_goal,rlinf --config.policy=... --config.workers=16
    python launch/evaluate.py --config=... --run=runs/new --against=runs/old     and the paired gain over another run

The same command goes on with a run that was interrupted, kill -9 included. ``results.json`` in the run folder holds
every outcome and what decided it: protocol, versions, renderer and a hash of the assets. Needs make libero.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from absl import app, flags

from launch import train as door

_AGAINST = flags.DEFINE_string("against", None, "Run folder of another policy, compared trial by trial.")


def main(argv: Sequence[str]) -> None:
    """Reads the settings, runs the trials that are not there yet, prints the table."""
    settings, folder = door.asked(argv)
    if settings.pop("job") != "evaluate":
        door.refuse("launch/evaluate.py measures; its config is configs/evaluate.py. For other jobs: launch/train.py.")

    from wovr_jax.core import processes
    from wovr_jax.core.config import ConfigError, from_dict
    from wovr_jax.data.episodes import EpisodesError
    from wovr_jax.export.robot import BundleError
    from wovr_jax.run.folder import RunError
    from wovr_jax.sim.libero.evaluate import EvaluateConfig
    from wovr_jax.sim.libero.setup import LiberoError

    try:
        if processes.detect(os.environ, on_tpu=False):
            raise processes.ProcessError("launch/evaluate.py measures in one process, with as many workers as cores.")
        cfg = from_dict(EvaluateConfig, settings)
        shown = evaluate(cfg, folder)
        against = compared(folder, _AGAINST.value) if _AGAINST.value else ""
    except (ConfigError, RunError, LiberoError, BundleError, EpisodesError, processes.ProcessError) as error:
        door.refuse(str(error))
    except KeyboardInterrupt:
        print(f"\nStopped. {folder} is kept up to here; the same command continues it.", file=sys.stderr)
        sys.exit(130)
    print(f"{shown}{against}\n\n{folder / 'results.json'}")


def evaluate(cfg: Any, folder: pathlib.Path) -> str:
    """Runs what is left of a run and writes its results; the table."""
    from tqdm import tqdm

    from wovr_jax.run.folder import Run
    from wovr_jax.sim.libero import collect as libero_collect
    from wovr_jax.sim.libero import evaluate as libero_evaluate
    from wovr_jax.sim.libero.setup import fingerprint
    from wovr_jax.sim.libero.tasks import tasks, trials

    wanted = trials(cfg.suite, range(*cfg.inits), only=list(cfg.tasks) or None, seed=cfg.seed)
    shared = libero_evaluate.apart(wanted, cfg)
    # How many work at a time decides no outcome, and may change when a run is taken up again.
    Run(folder, {name: value for name, value in dataclasses.asdict(cfg).items() if name != "workers"})
    with tqdm(total=len(wanted), desc=folder.name, unit="trial") as bar:
        won: list[bool] = []

        def tell(line: Any) -> None:
            won.append(bool(line["success"]))
            bar.set_postfix_str(f"success {sum(won)}/{len(won)}")
            bar.update()

        runner = _Runner(cfg, folder)
        lines = libero_evaluate.measure(runner, wanted, folder, tell)
    facts = fingerprint(runner.renderer) | {"trials_seen_in_training": shared if cfg.trained_on else None}
    found = libero_evaluate.results(lines, dataclasses.asdict(cfg), facts)
    libero_evaluate.save(folder, found)
    return libero_collect.table(lines, {task.index: task.instruction for task in tasks(cfg.suite)})


class _Runner:
    """Runs trials with the policy that was asked for; nothing is started before the first is wanted."""

    def __init__(self, cfg: Any, folder: pathlib.Path):
        from wovr_jax.sim.libero.setup import choose_renderer

        self.cfg, self.folder = cfg, folder
        self.renderer = None if cfg.policy == "expert" and not cfg.videos else choose_renderer()

    def __call__(self, wanted: Sequence[Any]) -> Iterator[Any]:
        filmed = [trial for trial in wanted if trial.init < self.cfg.inits[0] + self.cfg.videos]
        yield from self._run(filmed, "all")
        yield from self._run([trial for trial in wanted if trial not in filmed], "last")

    def _run(self, wanted: Sequence[Any], draw: str) -> Iterator[Any]:
        from wovr_jax.sim.libero.pool import Pool
        from wovr_jax.sim.libero.settings import SceneConfig

        if not wanted:
            return
        play, size = (self._expert, 256) if self.cfg.policy == "expert" else self._policy()
        size = 0 if self.cfg.policy == "expert" and draw != "all" else (self.cfg.size or size)
        scene = SceneConfig(size=size, wrist=False, drawing=self.cfg.drawing)
        with Pool(min(self.cfg.workers, len(wanted)), scene) as pool:
            for outcome in play(pool, wanted, draw):
                if outcome.episode is not None:
                    self._film(outcome.episode)
                yield dataclasses.replace(outcome, episode=None)

    def _expert(self, pool: Any, wanted: Sequence[Any], draw: str) -> Iterable[Any]:
        from wovr_jax.sim.libero.rollout import demonstrations
        from wovr_jax.sim.libero.tasks import protocol

        return demonstrations(pool, wanted, protocol(self.cfg.protocol), draw="all" if draw == "all" else "none")

    def _policy(self) -> tuple[Callable[..., Iterable[Any]], int]:
        from wovr_jax.export.robot import Robot
        from wovr_jax.sim.libero.rollout import rollouts
        from wovr_jax.sim.libero.tasks import protocol

        robot = Robot.load(self.cfg.policy)

        def play(pool: Any, wanted: Sequence[Any], draw: str) -> Iterable[Any]:
            act = acting(robot, len(pool), self.cfg.temperature)
            return rollouts(pool, act, wanted, protocol(self.cfg.protocol), draw=draw, actor=self.cfg.policy)

        return play, robot.frame_shape[0]

    def _film(self, episode: Any) -> None:
        from wovr_jax.core import pixels

        name = f"task-{episode.task:02d}-init-{episode.origin['init']:02d}.mp4"
        pixels.video(self.folder / "videos" / name, episode.frame_SHWC, fps=20)


def acting(robot: Any, batch: int, temperature: float) -> Callable[[Sequence[Any]], Any]:
    """A robot as what ``rollouts`` asks: always a batch of one size, so that one program is compiled."""
    import numpy as np

    from wovr_jax.sim.libero.evaluate import draw_seed

    def act(views: Sequence[Any]) -> np.ndarray:
        rows = np.resize(np.arange(len(views)), batch)
        frame_BHWC = np.stack([views[row].frame_HWC for row in rows])
        instructions = [views[row].trial.task.instruction for row in rows]
        seeds = [draw_seed(views[row].trial, views[row].chunk) for row in rows]
        answer = robot.act(frame_BHWC, instructions, seeds=seeds, temperature=temperature)
        return answer.action_BTA[: len(views)]

    return act


def compared(folder: pathlib.Path, other: str) -> str:
    """The paired gain over another run, in a line."""
    from wovr_jax.sim.libero import evaluate as libero_evaluate

    found = libero_evaluate.compare(libero_evaluate.load(folder), libero_evaluate.load(other))
    low, high = 100 * found["low"], 100 * found["high"]
    return f"\n{100 * found['gain']:+.1f} points [{low:.1f}, {high:.1f}] over {other}, {found['n']} paired trials"


if __name__ == "__main__":
    app.run(main, flags_parser=door.parse)
