"""What a run asks of its true environment, whichever it is.

The stages know no simulator. They ask an arena for instructions, demonstrations, true rollouts of a policy and its true
success; ``sim.embedded`` answers with compiled programs on the device, ``sim.libero.arena`` with worker processes
on the host. An arena knows no network: a policy comes to it as plain functions of its weights (``Actor``). Start states
are named by a purpose and a number, and those of two purposes are never the same.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from wovr_jax.core.sharding import Axes
from wovr_jax.types import Array, Imagined, Params

SPAN = 10_000_000
"""Layout seeds of one run: demonstrations, collections, online RL and evaluation have disjoint parts of this range."""
RANGES = 214
"""Ranges of layout seeds that fit int32. Runs whose seeds differ by a multiple of it share theirs, no other draw."""


def layouts(seed: int, purpose: str, count: int) -> np.ndarray:
    """Returns reset seeds of a purpose: evaluate, online, demonstrations or ``"collect-<round>"``; all are disjoint.

    Those of a run with seed 214 are those of seed 0, and so on (``RANGES``).
    """
    # Disjoint for all rounds, so that evaluation stays held out whatever has been collected.
    if purpose in ("evaluate", "online"):
        # The last two millions of the run's range; collections count up from the second million.
        low = SPAN - 1_000_000 * (1 + (purpose == "online"))
    elif purpose == "demonstrations":
        low = 0
    else:
        low = 1_000_000 * (1 + int(purpose.removeprefix("collect-")))
    # int32, as the table's reset takes it: the seeds go into a compiled program.
    return seed % RANGES * SPAN + low + np.arange(count, dtype=np.int32)


def add_halves(manifests: Sequence[Mapping[str, Any]], hold: int = 1) -> dict[str, int]:
    """Returns the facts of demonstrations from the manifests of their two folders; ``hold`` as of an arena."""
    episodes, successes, steps = (sum(one[name] for one in manifests) for name in ("episodes", "successes", "steps"))
    return {"episodes": episodes, "successes": successes, "true_steps": steps * hold}


def call_program(name: str, *words: str) -> tuple[int, str]:
    """Runs a program of ours, which an arena has for what is not part of training.

    Args:
      name: of its file in ``launch/tools``. It reads from its standard input only that it is closed, which it is
        however this process ends; then the program ends too.
      words: its arguments.

    Returns:
      Its exit status, and what it printed; what it says on standard error is seen at once.
    """
    # In a clone it stands beside the package, of a wheel among the environment's shared files.
    tools = pathlib.Path(__file__).resolve().parents[2] / "launch" / "tools"
    tools = tools if tools.is_dir() else pathlib.Path(sysconfig.get_path("data"), "share/wovr_jax/launch/tools")
    # It computes on the host; an accelerator is this process's.
    how: dict[str, Any] = {"text": True, "stdin": subprocess.PIPE, "env": os.environ | {"JAX_PLATFORMS": "cpu"}}
    with subprocess.Popen([sys.executable, str(tools / name), *words], stdout=subprocess.PIPE, **how) as running:
        assert running.stdout is not None
        said = running.stdout.read().strip()
        return running.wait(), said


Course = tuple[np.ndarray, np.ndarray | None]
"""What actions that were chosen elsewhere did in truth: (K, S) bool, whether the goal holds after each of them, and
(K, S, H, W, C) uint8, what a camera sees then; None where nobody asked."""


class Acting(NamedTuple):
    """A policy as functions of its weights; every batch of equal shapes runs in one compiled program.

    Attributes:
      act: ``act(params, frame_BHWC, prompt_BL, key, seed_B, temperature) -> action_BTA``, for a simulator on the host.
        Frames are uint8; the draws of a row depend on ``key`` and its seed (uint32), not on the batch it is in.
      sample: ``sample(params, frame_BHWC, prompt_BL, key, seed_B) -> (token_BTA, logp_BTA, action_BTA)``, as ``act``
        at the temperature of training, for online RL on the host.
      roll: ``roll(params, seed_B, key, temperature) -> Imagined`` with video: policy and simulator in one program,
        where the simulator is a program too.
      axes: how the weights lie on a mesh.
    """

    act: Callable[[Params, Array, Array, Array, Array, float], Array]
    sample: Callable[[Params, Array, Array, Array, Array], tuple[Array, Array, Array]]
    roll: Callable[[Params, Array, Array, float], Imagined]
    axes: Axes


@dataclasses.dataclass(frozen=True)
class Actor:
    """A policy that is to act.

    Attributes:
      acting: its functions.
      load: gives the weights; called when somebody acts.
      key: of its draws.
      temperature: 0 takes the likeliest tokens.
      name: who is recorded as having acted.
    """

    acting: Acting
    # A function, since whoever resumes a finished stage does not act and should not read 7B parameters.
    load: Callable[[], Params]
    key: Array
    temperature: float
    name: str = "policy"

    @functools.cached_property
    def params(self) -> Params:
        """The weights."""
        return self.load()


class Measured(NamedTuple):
    """True success of a policy.

    Attributes:
      success_B: bool, start state by start state.
      subgoals: share of the episodes that reached each of them; empty where the environment knows none.
      steps: simulator steps that it took.
      kind_B: what kind of start state each was, where the environment has several; else empty.
      starts: where they began, where not every policy of the run begins alike; else None. Outcomes of two policies are
        paired where this is equal.
    """

    # Single outcomes and no rate, so that policies can be compared layout by layout.
    success_B: np.ndarray
    subgoals: dict[str, float]
    steps: int
    kind_B: Sequence[str] = ()
    starts: Any = None


def true_rollout(*, prompt_KL: np.ndarray, task_B: np.ndarray, success_BNT: np.ndarray, **columns: Any) -> Imagined:
    """Returns a rollout of an environment on the host; its judge is the truth."""
    columns |= {"prompt_BL": prompt_KL[task_B], "task_B": task_B}
    columns |= {"prob_BNT": success_BNT.astype(np.float32), "success_BNT": success_BNT, "truth_BNT": success_BNT}
    return Imagined(**columns)


class Groups(NamedTuple):
    """The rollouts of one iteration of online RL.

    Attributes:
      groups: start states.
      size: rollouts from each.
      chunks: of a rollout, at most.
    """

    groups: int
    size: int
    chunks: int


class Arena(Protocol):
    """A true environment and its tasks, as a training needs it; what an audit asks besides is ``sim.witness``.

    Attributes:
      name: of the tasks, for manifests and statistics.
      instructions: what the robot may be asked to do; a task index is an index into it.
      steps: of an episode, a multiple of the chunk. Scripted ones may be shorter.
      hold: control steps of the simulator in each of them.
      explore: ``explore(number, actor, groups)``: true rollouts for that iteration of online RL. None where the
        environment is a compiled program, and part of the one that imagines, or where nobody plays them.
      follow: ``follow(table, row_K, action_KSA)``, as of ``sim.witness.Witness``, for trainings that are watched. None
        where that takes more than a compiled program.
    """

    # Written out and no base class: arenas share no code, only what a stage may ask of them.
    name: str
    instructions: tuple[str, ...]
    steps: int
    hold: int

    @property
    def explore(self) -> Callable[[int, Actor, Groups], Imagined] | None:
        """See above; a method of the arena, or None."""
        ...

    @property
    def follow(self) -> Callable[..., Course] | None:
        """See above; a method of the arena, or None."""
        ...

    def demonstrate(self, folder: pathlib.Path, key: Array, count: int, validation: int) -> dict[str, Any]:
        """Writes ``folder/episodes`` and ``folder/validation``; facts as of ``collect``, of both."""
        ...

    def collect(self, folder: pathlib.Path, purpose: str, count: int, actor: Actor) -> dict[str, Any]:
        """Writes rollouts as episodes into ``folder``; facts: ``episodes``, ``successes``, ``true_steps``."""
        ...

    def measure(self, folder: pathlib.Path, count: int, actor: Actor) -> Measured:
        """Success from the first ``count`` start states of the evaluation; ``folder`` may keep what is done so far."""
        ...
