"""The settings of LIBERO in a run: tasks, protocol, cameras, expert. Numbers only, so that a recipe can hold them.

Nothing here needs the simulator; ``arena.libero`` does with them what they say.
"""

from __future__ import annotations

import dataclasses

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
DRAWINGS = ("libero", "fast")
FLAWS = ("none", "early_release", "wrong_object", "missed_grasp")


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

    size: int = 256
    wrist: bool = True
    drawing: str = "libero"
    hard_reset: bool = True
    hold: int = 1

    def __post_init__(self) -> None:
        if self.drawing not in DRAWINGS:
            raise ValueError(f"drawing: expected one of {', '.join(DRAWINGS)}, got {self.drawing!r}")
        if self.size < 0:
            raise ValueError(f"size: expected pixels, 0 for no frames, got {self.size}")
        if self.hold < 1:
            raise ValueError(f"hold: expected at least one control step for an action, got {self.hold}")


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

    noise: float = 0.0
    flaw: str = "none"
    flawed_share: float = 1.0
    release_low: float = 0.1
    release_high: float = 0.6
    linger: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.flaw not in FLAWS:
            raise ValueError(f"expert flaw: expected one of {FLAWS}, got {self.flaw!r}")


@dataclasses.dataclass(frozen=True)
class LiberoConfig:
    """LIBERO as the true environment of a run.

    Attributes:
      suite: one of ``SUITES``.
      tasks: indices in the suite; all without.
      protocol: how episodes begin: ``"openvla"`` (10 no-op steps) or ``"rlinf"`` (15). How long they are says
        ``steps``; success in any step counts.
      steps: of an episode, a multiple of the policy's chunk. RLinf's evaluation has 512.
      inits: official initial states that evaluation uses, first and last but one.
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

    suite: str = "libero_spatial"
    tasks: tuple[int, ...] = ()
    protocol: str = "rlinf"
    steps: int = 512
    inits: tuple[int, int] = (0, 50)
    train_inits: tuple[int, ...] = ()
    overlap: bool = False
    scene: SceneConfig = SceneConfig(wrist=False)
    expert: LiberoExpertConfig = LiberoExpertConfig(linger=8)
    demonstrations: str = ""
    release: str = ""
    intervened_share: float = 0.0
    workers: int = 2

    def __post_init__(self) -> None:
        if self.suite not in SUITES:
            raise ValueError(f"suite: expected one of {', '.join(SUITES)}, got {self.suite!r}")
        if self.demonstrations and self.scene.hold != 1:
            raise ValueError(
                f"demonstrations of a folder have one action every 1/20 s, and scene.hold={self.scene.hold} holds each "
                "longer; use hold=1, or the expert"
            )
        if not 0.0 <= self.intervened_share <= 1.0:
            raise ValueError(f"intervened_share: expected a share from 0 to 1, got {self.intervened_share}")
        if self.train_inits and len(self.train_inits) != 2:
            raise ValueError(f"train_inits: expected first and last but one, or nothing, got {self.train_inits}")
        shared = set(range(*self.train_inits)) & set(range(*self.inits)) if self.train_inits else set()
        if shared and not self.overlap:
            raise ValueError(
                f"initial states {min(shared)} to {max(shared)} are both trained on and measured on; choose others for "
                "train_inits or inits, or ask for it with overlap=True"
            )
