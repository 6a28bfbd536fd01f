"""The settings of LIBERO in a run: tasks, protocol, cameras, expert. Numbers only, so that a recipe can hold them.

Nothing here needs the simulator; ``arena.libero`` does with them what they say.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Annotated, Literal

from wovr_jax.core.config import Between, Count, Faults, Natural, NonNegative, Seed, Share, checked

Suite = Literal["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"]
SUITES: tuple[Suite, ...] = typing.get_args(Suite)
Drawing = Literal["libero", "fast"]
Flaw = Literal["none", "early_release", "wrong_object", "missed_grasp"]
FLAWS: tuple[Flaw, ...] = typing.get_args(Flaw)
ProtocolName = Literal["openvla", "rlinf"]
Init = Annotated[int, Between(0, 50)]
"""A bound of a range of official initial states, of which every task has 50."""


@checked
@dataclasses.dataclass(frozen=True)
class SceneConfig:
    """How environments are built.

    Attributes:
      size: pixels of a square frame; 0 for none at all.
      wrist: whether the camera in the hand is drawn too.
      drawing: ``"libero"`` draws exactly as the benchmark does; ``"fast"`` leaves out smoothed edges and mirror
        images in shiny surfaces, at about a third of the cost.
      hard_reset: whether every reset builds the model anew, as the benchmark does. Without, a reset is ten times
        faster; fixtures then stand a little differently for the same seed.
      hold: control steps of 1/20 s that every action is held for. The benchmark has 1; with 2, a chunk of eight
        actions covers sixteen of its steps, and an episode needs half as many frames.
    """

    size: Natural = 256
    wrist: bool = True
    drawing: Drawing = "libero"
    hard_reset: bool = True
    hold: Count = 1


@checked
@dataclasses.dataclass(frozen=True)
class LiberoExpertConfig:
    """How demonstrations are made.

    Attributes:
      noise: standard deviation added to the six executed deltas (labels stay clean).
      flaw: one of ``FLAWS``. ``early_release`` lets go on the way and goes through the other motions, ``wrong_object``
        takes another thing, ``missed_grasp`` closes above the thing and goes through the motions; all then stop.
      flawed_share: share of the demonstrations that carry the flaw.
      release_low, release_high: share of the way at which ``early_release`` lets go.
      linger: steps after the first success, so that a recording also shows it.
      seed: of noise and flaws, together with the trial's task, initial state and seed.
    """

    noise: NonNegative = 0.0
    flaw: Flaw = "none"
    flawed_share: Share = 1.0
    release_low: Share = 0.1
    release_high: Share = 0.6
    linger: Natural = 0
    seed: Seed = 0

    def faults(self) -> Faults:
        """Yields an interval without numbers."""
        if self.release_low > self.release_high:
            yield "release_low", f"expected at most release_high={self.release_high}, got {self.release_low}"


@checked
@dataclasses.dataclass(frozen=True)
class LiberoConfig:
    """LIBERO as the true environment of a run.

    Attributes:
      suite: one of ``SUITES``.
      tasks: indices in the suite; all without.
      protocol: how episodes begin: ``"openvla"`` (10 no-op steps) or ``"rlinf"`` (15). How long they are says
        ``steps``; success in any step counts.
      steps: of an episode, a multiple of the policy's chunk. RLinf's evaluation has 512.
      inits: official initial states that evaluation uses: the first, and the one after the last.
      train_inits: those that demonstrations and collections begin from. Empty: none of them, but layouts that
        the task itself draws, a new one for each episode, as the official ones were drawn: things and arm.
      overlap: whether ``train_inits`` may share states with ``inits``.
      scene: how environments are built.
      expert: how demonstrations are made.
      demonstrations: an episode folder to take them from instead (``data_prep`` makes some); empty for the expert.
      release: folder with the tokenizer and the action statistics of a released policy, for a run that starts from its
        weights; empty for the package's own words and the statistics of the demonstrations.
      intervened_share: of the rollouts that world model and classifier learn from: those in which the gripper does
        something else than the policy says, see ``interventions``.
      workers: environments at a time, 1 to 1.5 GB each; of several processes each has so many.
    """

    suite: Suite = "libero_spatial"
    tasks: tuple[Natural, ...] = ()
    protocol: ProtocolName = "rlinf"
    steps: Count = 512
    inits: tuple[Init, Init] = (0, 50)
    train_inits: tuple[Init, ...] = ()
    overlap: bool = False
    scene: SceneConfig = SceneConfig(wrist=False)
    expert: LiberoExpertConfig = LiberoExpertConfig(linger=8)
    demonstrations: str = ""
    release: str = ""
    intervened_share: Share = 0.0
    workers: Count = 2

    @property
    def last_task(self) -> int:
        """The largest index of a task in use."""
        return max(self.tasks, default=89 if self.suite == "libero_90" else 9)

    def faults(self) -> Faults:
        """Yields demonstrations of another rate, and ranges of initial states that are empty or shared."""
        if self.demonstrations and self.scene.hold != 1:
            yield (
                "scene.hold",
                f"demonstrations of a folder have one action every 1/20 s, and scene.hold={self.scene.hold} holds each "
                "longer; use hold=1, or the expert",
            )
        ranges = {"inits": self.inits} | ({"train_inits": self.train_inits} if self.train_inits else {})
        empty = {name: ends for name, ends in ranges.items() if len(ends) != 2 or ends[0] >= ends[1]}
        for name, ends in empty.items():
            yield name, f"expected the first initial state and the one after the last, got {ends}"
        shared = set.intersection(*(set(range(*ends)) for ends in ranges.values())) if not empty else set()
        if shared and self.train_inits and not self.overlap:
            yield (
                "train_inits",
                f"initial states {min(shared)} to {max(shared)} are both trained on and measured on; choose others for "
                "train_inits or inits, or ask for it with overlap=True",
            )
