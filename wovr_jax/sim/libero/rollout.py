"""The real LIBERO: trials, and policies that act in many environments at once.

::

    with Pool(8, SceneConfig(size=256)) as pool:
        wanted = trials("libero_spatial", inits=range(50))
        for outcome in rollouts(pool, act, wanted, protocol("openvla")):
            ...

A trial is a task, an official initial state and a seed. The environment is seeded before every reset, so a trial
begins in the same state whatever came before it, in whichever worker. A worker that dies or hangs costs the episode
that it was in; that trial is begun again, and its outcome says so.
"""

from __future__ import annotations

import collections
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from wovr_jax.sim.libero import expert, worker
from wovr_jax.sim.libero.expert import Demonstration
from wovr_jax.sim.libero.pool import Lost, Pool
from wovr_jax.sim.libero.settings import LiberoExpertConfig
from wovr_jax.sim.libero.tasks import Protocol, Trial
from wovr_jax.sim.libero.worker import Seen
from wovr_jax.types import Episode


@dataclasses.dataclass
class View:
    """What a policy may look at before it chooses a chunk.

    Attributes:
      trial: the episode.
      chunk: how many chunks it has played.
      frame_HWC: uint8, from the table's camera.
      wrist_HWC: uint8, from the hand, or None.
      state_D: (8,) float32.
    """

    trial: Trial
    chunk: int
    frame_HWC: np.ndarray
    wrist_HWC: np.ndarray | None
    state_D: np.ndarray


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
      trial: which.
      success: whether the goal held after any step; None when no worker could finish it.
      steps: control steps, no-op steps not counted.
      tries: how often it was begun.
      lost: why the tries before this one, or all of them, came to nothing.
      episode: the recording, when every frame was drawn.
    """

    trial: Trial
    success: bool | None
    steps: int
    tries: int = 1
    lost: tuple[str, ...] = ()
    episode: Episode | None = None


Act = Callable[[Sequence[View]], np.ndarray]
"""``act(views) -> (B, T, 7)`` environment actions, a chunk for each view."""


def rollouts(
    pool: Pool,
    act: Act,
    wanted: Iterable[Trial],
    protocol: Protocol,
    *,
    draw: str = "last",
    actor: str = "policy",
    tries: int = 3,
) -> Iterator[Outcome]:
    """Runs a policy in every trial, as many at a time as the pool has workers.

    Args:
      pool: the environments.
      act: the policy; it gets the views of all running episodes at once.
      wanted: the trials.
      protocol: how episodes begin and end.
      draw: ``"all"`` to record episodes with every frame, ``"last"`` to draw only what the policy sees.
      actor: who is recorded as having acted.
      tries: how often a trial is begun whose worker is lost.

    Yields:
      an outcome for each trial, in the order in which they end.
    """
    waiting: collections.deque[tuple[Trial, tuple[str, ...]]] = collections.deque((trial, ()) for trial in wanted)
    running: dict[int, _Running] = {}
    while waiting or running:
        for index in range(len(pool)):
            if index not in running and waiting:
                running[index] = _Running(*waiting.popleft(), protocol)
                pool.send(index, worker.begin, running[index].trial, protocol)
        moving = [index for index, run in running.items() if run.begun]
        if moving:
            action_BTA = np.asarray(act([running[index].view for index in moving]), np.float32)
            for index, action_TA in zip(moving, action_BTA, strict=True):
                pool.send(index, worker.play, running[index].take(action_TA), draw, protocol.stops)
        for _ in range(len(running)):
            index, answer = pool.receive()
            run = running[index]
            if isinstance(answer, Lost):
                del running[index]
                reasons = (*run.lost, answer.reason)
                print(f"{run.trial}: {answer.reason}", file=sys.stderr, flush=True)
                if len(reasons) < tries:
                    waiting.append((run.trial, reasons))
                else:
                    yield Outcome(run.trial, None, 0, len(reasons), reasons)
            elif run.add(answer):
                del running[index]
                yield run.outcome(actor, pool.renderer, draw == "all")


class _Running:
    """An episode in the making."""

    def __init__(self, trial: Trial, lost: tuple[str, ...], protocol: Protocol):
        self.trial, self.lost, self.protocol = trial, lost, protocol
        self.horizon = protocol.horizons[trial.task.suite]
        self.seen: list[Seen] = []
        self.actions: list[np.ndarray] = []

    @property
    def begun(self) -> bool:
        return bool(self.seen)

    @property
    def steps(self) -> int:
        return sum(len(seen.success_T) for seen in self.seen[1:])

    @property
    def view(self) -> View:
        last = self.seen[-1]
        wrist = None if last.wrist_FHWC is None else last.wrist_FHWC[-1]
        return View(self.trial, len(self.seen) - 1, last.frame_FHWC[-1], wrist, last.state_TD[-1])

    def take(self, action_TA: np.ndarray) -> np.ndarray:
        """The part of a chunk that the horizon leaves."""
        self.actions.append(action_TA[: self.horizon - self.steps])
        return self.actions[-1]

    def add(self, seen: Seen) -> bool:
        """Takes in what was seen; whether the episode is over."""
        self.seen.append(seen)
        won = self.protocol.stops and bool(seen.success_T.any())
        return len(self.seen) > 1 and (won or self.steps >= self.horizon)

    def outcome(self, actor: str, renderer: str | None, whole: bool) -> Outcome:
        success = any(seen.success_T.any() for seen in self.seen)
        episode = None
        if whole:
            action_SA = np.concatenate(self.actions)[: self.steps]
            origin = {"protocol": self.protocol.name, "renderer": renderer}
            episode = record(self.trial, self.seen, action_SA, action_SA, actor, origin)
        return Outcome(self.trial, bool(success), self.steps, len(self.lost) + 1, self.lost, episode)


def record(
    trial: Trial,
    seen: Sequence[Seen],
    action_SA: np.ndarray,
    label_SA: np.ndarray,
    actor: str,
    origin: dict[str, Any] | None = None,
) -> Episode:
    """An episode of everything that was seen, the first frame included."""
    wrists = [part.wrist_FHWC for part in seen if part.wrist_FHWC is not None]
    return Episode(
        frame_SHWC=np.concatenate([part.frame_FHWC for part in seen]),
        action_SA=np.asarray(action_SA, np.float32),
        success_S=np.concatenate([part.success_T for part in seen]),
        instruction=trial.task.instruction,
        task=trial.task.index,
        seed=trial.seed,
        actor=actor,
        label_SA=np.asarray(label_SA, np.float32),
        wrist_SHWC=np.concatenate(wrists) if wrists else None,
        state_SD=np.concatenate([part.state_TD for part in seen]),
        origin={"suite": trial.task.suite, "init": trial.init, **(origin or {})},
    )


def demonstrations(
    pool: Pool,
    wanted: Iterable[Trial],
    protocol: Protocol,
    cfg: LiberoExpertConfig | None = None,
    *,
    draw: str = "all",
    tries: int = 3,
) -> Iterator[Outcome]:
    """The scripted expert in every trial; each runs within one worker, as workers come free.

    Args:
      pool: the environments.
      wanted: the trials.
      protocol: how episodes begin, and their horizon.
      cfg: how demonstrations are made.
      draw: ``"all"`` to record episodes, ``"none"`` to see only whether they succeed.
      tries: how often a trial is begun whose worker is lost.

    Yields:
      an outcome for each trial, in the order in which they end.
    """
    cfg = cfg or LiberoExpertConfig()
    left: list[tuple[Trial, tuple[str, ...]]] = [(trial, ()) for trial in wanted]
    while left:
        now, left = left, []
        jobs = [(trial, protocol, cfg, draw) for trial, _ in now]
        for number, made in pool.map(expert.demonstrate, jobs):
            trial, lost = now[number]
            if not isinstance(made, Lost):
                yield _demonstrated(trial, lost, made, protocol, pool.renderer, draw == "all")
                continue
            lost = (*lost, made.reason)
            print(f"{trial}: {made.reason}", file=sys.stderr, flush=True)
            if len(lost) < tries:
                left.append((trial, lost))
            else:
                yield Outcome(trial, None, 0, len(lost), lost)


def _demonstrated(
    trial: Trial, lost: tuple[str, ...], made: Demonstration, protocol: Protocol, renderer: str | None, whole: bool
) -> Outcome:
    success = bool(np.any([seen.success_T.any() for seen in made.seen]))
    origin = {"protocol": protocol.name, "renderer": renderer, "flaw": made.flaw}
    episode = record(trial, made.seen, made.action_SA, made.label_SA, "expert", origin) if whole else None
    return Outcome(trial, success, len(made.action_SA), len(lost) + 1, lost, episode)
