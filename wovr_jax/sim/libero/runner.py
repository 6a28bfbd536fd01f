"""Runs the trials of a measurement: the scripted expert or any policy, and films of the first trials of each task."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from wovr_jax.core import config, pixels
from wovr_jax.sim.libero.demonstrate import demonstrations
from wovr_jax.sim.libero.evaluate import LiberoEvaluation
from wovr_jax.sim.libero.machine import choose_renderer
from wovr_jax.sim.libero.pool import Pool
from wovr_jax.sim.libero.rollout import Act, Outcome, View, rollouts
from wovr_jax.sim.libero.tasks import SceneConfig, Task, Trial, draw_seed, protocol
from wovr_jax.types import Episode

Policy = Callable[[np.ndarray, Sequence[Task], Sequence[int]], np.ndarray]
"""``policy(frame_BHWC, tasks, seeds) -> action_BTA``: uint8 frames, the task and the seed of the draw of each row."""


def act_in_batches(policy: Policy, batch: int) -> Act:
    """Returns a policy as ``rollouts`` asks for it: always a batch of one size, so that one program is compiled."""

    def act(views: Sequence[View]) -> np.ndarray:
        # The views again and again until the batch is full; what the policy says to the repeats is dropped.
        rows = [views[n % len(views)] for n in range(batch)]
        frame_BHWC = np.stack([row.frame_HWC for row in rows])
        seeds = [draw_seed(row.trial, row.chunk) for row in rows]
        return np.asarray(policy(frame_BHWC, [row.trial.task for row in rows], seeds))[: len(views)]

    return act


class TrialRunner:
    """What ``collect.measure`` asks: plays trials in worker processes. Nothing is started before a trial is wanted.

    Args:
      cfg: what is measured.
      folder: the run's folder; films go to ``videos/`` in it.
      load: returns the policy and the pixels of its frames; not called where the scripted expert is measured.
    """

    def __init__(self, cfg: LiberoEvaluation, folder: pathlib.Path, load: Callable[[], tuple[Policy, int]]):
        self.cfg, self.folder, self._load = cfg, folder, load
        self.scripted = cfg.policy == "expert"
        # The expert looks at the simulator's state, so without films nothing is drawn.
        self.renderer = None if self.scripted and not cfg.videos else choose_renderer()

    def __call__(self, wanted: Sequence[Trial]) -> Iterator[Outcome]:
        """Plays trials and yields their outcomes; the filmed ones first, with every frame drawn."""
        filmed = [trial for trial in wanted if trial.init < self.cfg.inits[0] + self.cfg.videos]
        yield from self._run(filmed, film=True)
        yield from self._run([trial for trial in wanted if trial not in filmed], film=False)

    @functools.cached_property
    def _policy(self) -> tuple[Policy, int]:
        return self._load()

    def _run(self, wanted: Sequence[Trial], *, film: bool) -> Iterator[Outcome]:
        if not wanted:
            return
        policy, size = (None, 256 if film else 0) if self.scripted else self._policy
        if film or not self.scripted:
            size = self.cfg.size or size
        scene = config.from_dict(SceneConfig, {"size": size, "wrist": False, "drawing": self.cfg.drawing})
        with Pool(min(self.cfg.workers, len(wanted)), scene) as pool:
            for outcome in self._play(pool, wanted, policy, film):
                if outcome.episode is not None:
                    self._film(outcome.episode)
                # A measurement keeps verdicts; the frames of all trials would fill the memory.
                yield dataclasses.replace(outcome, episode=None)

    def _play(self, pool: Pool, wanted: Sequence[Trial], policy: Policy | None, film: bool) -> Iterable[Outcome]:
        rules = protocol(self.cfg.protocol)
        if policy is None:
            return demonstrations(pool, wanted, rules, draw="all" if film else "none")
        act = act_in_batches(policy, len(pool))
        return rollouts(pool, act, wanted, rules, draw="all" if film else "last", actor=self.cfg.policy)

    def _film(self, episode: Episode) -> None:
        name = f"task-{episode.task:02d}-init-{episode.origin['init']:02d}.mp4"
        pixels.video(self.folder / "videos" / name, episode.frame_SHWC, fps=20)
