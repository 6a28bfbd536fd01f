"""Trials on the real LIBERO: a policy acts in many environments at once.

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
from typing import Any, NamedTuple

import numpy as np

from wovr_jax.sim.libero import worker
from wovr_jax.sim.libero.pool import Lost, Pool
from wovr_jax.sim.libero.setup import LiberoError
from wovr_jax.sim.libero.tasks import CLOSE, OPEN, EvaluationProtocol, Trial, draw_seed
from wovr_jax.sim.libero.worker import Observations
from wovr_jax.types import Episode


@dataclasses.dataclass
class View:
    """What a policy may look at before it chooses a chunk.

    Attributes:
      trial: the episode's trial.
      chunk: how many chunks the episode has played.
      frame_HWC: uint8 frame of the table's camera.
      wrist_HWC: uint8 frame of the camera in the hand, or None.
      state_D: (8,) float32, see ``worker.Observations``.
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
      trial: the trial.
      success: whether the goal held after any step; None when no worker could finish the trial.
      steps: actions played; no-op steps do not count.
      tries: how often the trial was begun.
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
    protocol: EvaluationProtocol,
    *,
    draw: str = "last",
    actor: str = "policy",
    intervened_share: float = 0.0,
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
      intervened_share: share of the trials in which the gripper does something else than the policy says, see
        ``draw_intervention``. What is recorded is what was done; the episode's origin has the kind as ``intervened``.
      tries: how often a trial is begun whose worker is lost.

    Yields:
      an outcome for each trial, in the order in which they end.

    Raises:
      LiberoError: a trial was given up before any had begun.
    """
    begun = False
    waiting: collections.deque[tuple[Trial, tuple[str, ...]]] = collections.deque((trial, ()) for trial in wanted)
    running: dict[int, _Running] = {}
    while waiting or running:
        for index in range(len(pool)):
            if index not in running and waiting:
                running[index] = _Running(*waiting.popleft(), protocol, intervened_share)
                pool.send(index, worker.begin, running[index].trial, protocol)
        # Episodes that began in this turn are still in their reset; they join the policy's next batch.
        moving = [index for index, run in running.items() if run.observed]
        if moving:
            action_BTA = np.asarray(act([running[index].view for index in moving]), np.float32)
            # The workers step at the same time; the policy waits for all of them below.
            for index, action_TA in zip(moving, action_BTA, strict=True):
                pool.send(index, worker.play, running[index].take(action_TA), draw, protocol.stops)
        for _ in range(len(running)):
            # Every running episode has exactly one call under way, so as many answers are due.
            index, answer = pool.receive()
            run = running[index]
            if isinstance(answer, Lost):
                del running[index]
                reasons = (*run.lost, answer.reason)
                print(f"{run.trial}: {answer.reason}", file=sys.stderr, flush=True)
                # Behind the others: if the trial itself kills workers, the rest is done first.
                if len(reasons) < tries:
                    waiting.append((run.trial, reasons))
                else:
                    yield give_up(run.trial, reasons, begun)
                continue
            begun = True
            if run.add(answer):
                del running[index]
                yield run.outcome(actor, pool.renderer, draw == "all")


def give_up(trial: Trial, lost: tuple[str, ...], begun: bool) -> Outcome:
    """Returns the outcome of a trial that is not tried again.

    Raises:
      LiberoError: no trial has ``begun`` at all, so it is not the trial that is to blame.
    """
    if not begun:
        why = f"the simulator does not start ({trial}: {lost[-1].strip().splitlines()[-1]})"
        raise LiberoError(f"{why}.\n  python launch/doctor.py --step")
    return Outcome(trial, None, 0, len(lost), lost)


class _Running:
    """An episode in the making."""

    def __init__(self, trial: Trial, lost: tuple[str, ...], protocol: EvaluationProtocol, intervened_share: float):
        self.trial, self.lost, self.protocol = trial, lost, protocol
        self.horizon = protocol.horizons[trial.task.suite]
        self.intervention = draw_intervention(trial, intervened_share, self.horizon)
        # The first entry is the moment after the reset, each further one a chunk.
        self.observed: list[Observations] = []
        self.actions: list[np.ndarray] = []

    @property
    def steps(self) -> int:
        return sum(len(part.success_T) for part in self.observed[1:])

    @property
    def view(self) -> View:
        last = self.observed[-1]
        wrist_HWC = None if last.wrist_FHWC is None else last.wrist_FHWC[-1]
        return View(self.trial, len(self.observed) - 1, last.frame_FHWC[-1], wrist_HWC, last.state_TD[-1])

    def take(self, action_TA: np.ndarray) -> np.ndarray:
        """Keeps and returns the part of a chunk that the horizon leaves, with the gripper of an intervention."""
        # A copy: what the policy returned may be its own buffer.
        action_TA = np.array(action_TA[: self.horizon - self.steps])
        if intervention := self.intervention:
            step_T = self.steps + np.arange(len(action_TA))
            # The gripper is the last number of an action.
            action_TA[(step_T >= intervention.first) & (step_T < intervention.end), -1] = intervention.gripper
        self.actions.append(action_TA)
        return action_TA

    def add(self, part: Observations) -> bool:
        """Keeps what was observed; returns whether the episode is over."""
        self.observed.append(part)
        stopped = self.protocol.stops and bool(part.success_T.any())
        # A success straight after the reset ends nothing: the policy has not acted yet.
        return len(self.observed) > 1 and (stopped or self.steps >= self.horizon)

    def outcome(self, actor: str, renderer: str | None, whole: bool) -> Outcome:
        success = any(part.success_T.any() for part in self.observed)
        episode = None
        if whole:
            # An episode that stopped at its success has not played the rest of the last chunk.
            action_SA = np.concatenate(self.actions)[: self.steps]
            origin = {"protocol": self.protocol.name, "renderer": renderer}
            # Whoever begins rollouts in the middle of episodes must know that this one's course is not the policy's.
            origin |= {"intervened": self.intervention.kind} if self.intervention else {}
            episode = record(self.trial, self.observed, action_SA, action_SA, actor, origin)
        return Outcome(self.trial, bool(success), self.steps, len(self.lost) + 1, self.lost, episode)


def record(
    trial: Trial,
    observed: Sequence[Observations],
    action_SA: np.ndarray,
    label_SA: np.ndarray,
    actor: str,
    origin: dict[str, Any] | None = None,
) -> Episode:
    """Returns what was observed as an episode of S actions and S + 1 frames, the first one from after the reset."""
    wrists = [part.wrist_FHWC for part in observed if part.wrist_FHWC is not None]
    return Episode(
        frame_SHWC=np.concatenate([part.frame_FHWC for part in observed]),
        action_SA=np.asarray(action_SA, np.float32),
        success_S=np.concatenate([part.success_T for part in observed]),
        instruction=trial.task.instruction,
        task=trial.task.index,
        seed=trial.seed,
        actor=actor,
        label_SA=np.asarray(label_SA, np.float32),
        wrist_SHWC=np.concatenate(wrists) if wrists else None,
        state_SD=np.concatenate([part.state_TD for part in observed]),
        origin={"suite": trial.task.suite, "init": trial.init, **(origin or {})},
    )


# --- interventions: the gripper does something else than the policy says ----------------------
#
# In a policy's own rollouts the arm gives away what the fingers do: where a thing has slipped, it halts or turns back.
# A world model can then predict the frame without looking at the fingers. It imagines that things are carried which
# nothing holds, and a policy trained in it stops using its fingers. An intervention leaves the arm to the policy and
# takes the gripper, so that the same motion is seen with other fingers.

INTERVENTION_STARTS = (0.25, 0.65)
"""Where in the episode an intervention that opens the gripper begins, as shares of its length."""
GRASP_STARTS, GRASP_ENDS = (0.25, 0.42), (0.6, 0.7)
"""Where one that keeps the gripper closed begins and ends."""
INTERVENTIONS = {"never closes": 0.2, "lets go": 0.35, "twitches": 0.15, "holds on": 0.3}
"""Kind of intervention -> its share: open all the time, open from some step on, open for one to three steps, or closed
whatever the policy says."""


class Intervention(NamedTuple):
    """What the gripper is told in an episode instead of the policy's command.

    Attributes:
      kind: one of ``INTERVENTIONS``.
      gripper: the command.
      first, end: the half-open range of steps [first, end) that get it.
    """

    kind: str
    gripper: float
    first: int
    end: int


def draw_intervention(trial: Trial, share: float, steps: int) -> Intervention | None:
    """Returns the intervention of a trial.

    The trial alone decides, so a trial that is begun again has the same intervention.

    Args:
      trial: the trial.
      share: share of the trials that have an intervention; the others get None.
      steps: length of the episode.
    """
    rng = np.random.default_rng([draw_seed(trial, 0), 1])
    if rng.random() >= share:
        return None
    # As plain text, which JSON can hold.
    kind = str(rng.choice(list(INTERVENTIONS), p=list(INTERVENTIONS.values())))
    # All three are drawn for every kind, so that the kinds' shares can change without moving the draws.
    ranges = (INTERVENTION_STARTS, GRASP_STARTS, GRASP_ENDS)
    first, grasp_first, grasp_end = (int(rng.uniform(*shares) * steps) for shares in ranges)
    if kind == "never closes":
        return Intervention(kind, OPEN, 0, steps)
    if kind == "lets go":
        return Intervention(kind, OPEN, first, steps)
    if kind == "twitches":
        return Intervention(kind, OPEN, first, first + int(rng.integers(1, 4)))
    return Intervention(kind, CLOSE, grasp_first, grasp_end)
