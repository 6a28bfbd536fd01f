"""What a run asks of its true environment, whichever it is.

The stages know no simulator. They ask an arena for instructions, demonstrations, true rollouts of a policy and its true
success; ``arena.tabletop`` answers with compiled programs on the device, ``arena.libero`` with worker processes on the
host. Start states are named by a purpose and a number, and those of two purposes are never the same.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from wovr_jax.data import episodes as disk
from wovr_jax.policy.actions import Codec
from wovr_jax.run.programs import Programs
from wovr_jax.types import Array, Episode, Imagined, Start

SPAN = 10_000_000
"""Layout seeds of one run: demonstrations, collections, online RL and evaluation have disjoint parts of this range."""


def layouts(seed: int, purpose: str, count: int) -> np.ndarray:
    """Reset seeds, disjoint between runs and purposes: evaluate, online, demonstrations, ``"collect-<round>"``."""
    if purpose in ("evaluate", "online"):
        low = SPAN - 1_000_000 * (1 + (purpose == "online"))
    elif purpose == "demonstrations":
        low = 0
    else:
        low = 1_000_000 * (1 + int(purpose.removeprefix("collect-")))
    return seed * SPAN + low + np.arange(count, dtype=np.int32)


def in_turn(folder: pathlib.Path, *, lazily: bool = False) -> Sequence[Episode]:
    """The episodes of a folder in the order of their layouts, in which tasks take turns; it may hold them task by task.

    Who takes the first or the last of them, as the training of the reward does, then has some of every task. Read
    ``lazily`` they stay on disk.
    """
    if not lazily:
        return sorted(disk.read(folder), key=lambda episode: episode.seed)
    source = disk.EpisodeSource(folder)
    return disk.Lazy([(source, e) for e in sorted(range(len(source)), key=lambda e: source.head(e).seed)])


@dataclasses.dataclass(frozen=True)
class Actor:
    """A policy that is to act.

    Attributes:
      programs: the compiled programs of the run.
      params: the policy's weights.
      key: of its draws.
      temperature: 0 takes the likeliest tokens.
      name: who is recorded as having acted.
    """

    programs: Programs
    params: dict[str, Any]
    key: Array
    temperature: float
    name: str = "policy"


class Measured(NamedTuple):
    """True success of a policy.

    Attributes:
      success_B: bool, start state by start state.
      subgoals: share of the episodes that reached each of them; empty where the environment knows none.
      steps: simulator steps that it took.
    """

    success_B: np.ndarray
    subgoals: dict[str, float]
    steps: int


class Played(NamedTuple):
    """A batch of true rollouts with every frame; rows from ``count`` on are padding.

    Attributes:
      start: where they began; without the state of a simulator, as imagination knows it.
      rollout: what happened.
      count: of the rows that were asked for.
    """

    start: Start
    rollout: Imagined
    count: int


class Arena(Protocol):
    """A true environment and its tasks.

    Attributes:
      name: of the tasks, for manifests and statistics.
      instructions: what the robot may be asked to do; a task index is an index into it.
      prompt_KL: (tasks, L) int32 prompt tokens of every instruction.
      codec: of a released policy; None where the demonstrations' statistics say what actions are like.
      steps: of an episode, a multiple of the chunk. Scripted ones may be shorter.
      explore: ``explore(n, actor)``: true rollouts for the n-th iteration of online RL, in the groups that the recipe's
        ``dream`` asks for. None where the environment is a compiled program, and part of ``Programs.dream``.
    """

    name: str
    instructions: tuple[str, ...]
    prompt_KL: np.ndarray
    codec: Codec | None
    steps: int
    explore: Callable[[int, Actor], Imagined] | None

    def demonstrate(self, folder: pathlib.Path, key: Array) -> dict[str, Any]:
        """Writes ``folder/episodes`` and ``folder/validation``; facts: ``episodes``, ``successes``."""
        ...

    def collect(self, folder: pathlib.Path, purpose: str, count: int, actor: Actor) -> dict[str, Any]:
        """Writes rollouts as episodes into ``folder``; facts: ``episodes``, ``successes``, ``true_steps``."""
        ...

    def measure(self, folder: pathlib.Path, count: int, actor: Actor) -> Measured:
        """Success from the first ``count`` start states of the evaluation; ``folder`` may keep what is done so far."""
        ...

    def play(self, count: int, actor: Actor) -> Iterator[Played]:
        """Rollouts from the first ``count`` start states of the evaluation, batch by batch."""
        ...
