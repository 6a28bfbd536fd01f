"""LIBERO without LIBERO: a pool whose workers push a white square about, for tests of everything around them.

The square moves with the action's x; the goal holds while it lies in the right half of the picture. Where it begins
depends on the trial. A demonstration pushes it right, a flawed one (every third seed) left.
"""

from __future__ import annotations

import pathlib
from typing import ClassVar

import numpy as np

from wovr_jax.sim.libero.expert import Demonstration
from wovr_jax.sim.libero.pool import Lost
from wovr_jax.sim.libero.tasks import Task
from wovr_jax.sim.libero.worker import Observations

THINGS = ("milk", "butter")
TASKS = tuple(Task("libero_object", i, f"pick_up_the_{name}", f"pick up the {name}") for i, name in enumerate(THINGS))
PUSH = 0.06
DEMONSTRATE = pathlib.Path(__file__).with_name("fake_demonstrate.py")
"""The scripted expert's program with this fake in it."""


class FakePool:
    """Speaks as ``sim.libero.pool.Pool`` does, answers in another order than it was asked, and may lose a worker."""

    opened = 0
    losing: ClassVar[set[tuple[int, int, int]]] = set()
    """(task, init, seed) of trials whose worker is lost, once each."""

    def __init__(self, workers, scene):
        FakePool.opened += 1
        self.workers, self.scene, self.renderer = workers, scene, "none"
        self.answers, self.x, self.trial = [], {}, {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __len__(self):
        return self.workers

    def send(self, index, function, *arguments):
        self.answers.append((index, getattr(self, function.__name__)(index, *arguments)))

    def receive(self):
        return self.answers.pop()

    def map(self, function, jobs, tries=1):
        for number, job in reversed(list(enumerate(jobs))):
            for _ in range(tries):
                answer = getattr(self, function.__name__)(*job)
                if not isinstance(answer, Lost):
                    break
            yield number, answer

    def begin(self, index, trial, protocol):
        assert protocol.settle == 15
        where = (trial.task.index, trial.init, trial.seed)
        if where in FakePool.losing:
            FakePool.losing.discard(where)
            return Lost("it died")
        self.trial[index], self.x[index] = trial, 0.15 + 0.02 * (sum(where) % 5)
        return self._seen(index, [self.x[index]])

    def play(self, index, action_TA, draw, stop):
        where = []
        for action_A in action_TA:
            self.x[index] = float(np.clip(self.x[index] + PUSH * action_A[0], 0, 1))
            where.append(self.x[index])
            if stop and self.x[index] > 0.5:
                break
        return self._seen(index, where, draw)

    def replay(self, trial, protocol, action_SA, first, film):
        if isinstance(begun := self.begin(0, trial, protocol), Lost):
            return begun
        seen = self.play(0, action_SA[: protocol.horizons[trial.task.suite]], "all", False)
        success_S = np.logical_or.accumulate(seen.success_T[first:])
        success_S = np.pad(success_S, (0, len(action_SA) - first - len(success_S)), "edge")
        last = int(success_S.argmax()) if success_S.any() else len(seen.frame_FHWC) - first - 1
        return success_S, seen.frame_FHWC[first:][np.minimum(np.arange(len(success_S)), last)] if film else np.zeros(0)

    def demonstrate(self, trial, protocol, cfg, draw):
        flaw = "early_release" if trial.seed % 3 == 2 else "none"
        push = -1.0 if flaw != "none" else 1.0
        seen, actions = [self.begin(0, trial, protocol)], []
        while len(actions) < protocol.horizons[trial.task.suite] and not (actions and self.x[0] > 0.7):
            actions.append(np.array([push, 0, 0, 0, 0, 0, 1.0 if len(actions) > 3 else -1.0]))
            seen.append(self.play(0, actions[-1][None], draw, False))
        return Demonstration(seen, np.stack(actions), np.stack(actions), flaw)

    def _seen(self, index, places, draw="all"):
        size = self.scene.size
        frames = np.zeros((len(places), size, size, 3), np.uint8)
        for frame_HWC, x in zip(frames, places, strict=True):
            left = int(x * (size - 4))
            frame_HWC[4:8, left : left + 4] = 255
        drawn = {"all": frames, "last": frames[-1:], "none": frames[:0]}[draw]
        return Observations(drawn, None, np.zeros((len(places), 8), np.float32), np.array(places) > 0.5)
