"""Fingers that do something else than the policy says, in some of the rollouts that a world model learns from.

In a policy's own rollouts the arm gives away what the fingers do: where a thing has slipped it halts or turns back. A
world model can then foretell the picture without looking at the fingers; it imagines that things are carried which
nothing holds, and a policy that is trained in it forgets its fingers. An intervention leaves the arm to the policy and
takes the gripper, so that the same motion is seen with other fingers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from wovr_jax.sim.libero.evaluate import draw_seed
from wovr_jax.sim.libero.expert import CLOSE, OPEN
from wovr_jax.sim.libero.rollout import Act, View
from wovr_jax.sim.libero.tasks import Trial

BEGINS, HOLDS, ENDS = (0.25, 0.65), (0.25, 0.42), (0.6, 0.7)
"""Of the episode: where an intervention begins; where one that holds on does, and where it ends."""
KINDS = {"never closes": 0.2, "lets go": 0.35, "twitches": 0.15, "holds on": 0.3}
"""Which intervention how often: open all the time, open from some step on, open for one to three steps, or closed
whatever the policy says."""


def drawn(trial: Trial, share: float, steps: int) -> tuple[float, int, int] | None:
    """The intervention of a trial, which decides it alone: command of the gripper, first step, last but one.

    Args:
      trial: whose.
      share: of trials that have one; None for the others.
      steps: of an episode.
    """
    rng = np.random.default_rng([draw_seed(trial, 0), 1])
    if rng.random() >= share:
        return None
    kind = rng.choice(list(KINDS), p=list(KINDS.values()))
    begin, hold, end = (int(rng.uniform(*at) * steps) for at in (BEGINS, HOLDS, ENDS))
    if kind == "never closes":
        return OPEN, 0, steps
    if kind == "lets go":
        return OPEN, begin, steps
    if kind == "twitches":
        return OPEN, begin, begin + int(rng.integers(1, 4))
    return CLOSE, hold, end


def intervened(act: Act, share: float, steps: int) -> Act:
    """``act`` with an intervention in ``share`` of the trials. What is recorded is what was done."""

    def done(views: Sequence[View]) -> np.ndarray:
        action_BTA = np.array(act(views))
        for view, action_TA in zip(views, action_BTA, strict=True):
            if found := drawn(view.trial, share, steps):
                gripper, first, end = found
                step_T = view.chunk * len(action_TA) + np.arange(len(action_TA))
                action_TA[(step_T >= first) & (step_T < end), -1] = gripper
        return action_BTA

    return done
