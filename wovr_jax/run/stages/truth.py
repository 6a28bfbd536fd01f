"""The stage that asks the true environment how good a policy is."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from wovr_jax import evaluate
from wovr_jax.run.folder import Product, Run
from wovr_jax.run.recipe import EvaluateConfig
from wovr_jax.sim.arena import Actor, Arena, Measured


def measure(
    run: Run, arena: Arena, cfg: EvaluateConfig, temperature: float, act: Callable[..., Actor], round_: int
) -> Product[None]:
    """True success of the policy of a round on start states that no stage trains on, temperature by temperature.

    Args:
      run: the run.
      arena: the true environment.
      cfg: how many episodes, and at which temperatures besides that of training and 0.
      temperature: of training.
      act: ``act(round_, purpose, temperature)`` gives the policy.
      round_: the round.
    """

    def make(folder: pathlib.Path) -> dict[str, Any]:
        # As it was trained, which is what RL improves, and greedy, as a robot would run it; and between the two, for
        # sampling hides what the policy knows.
        names = {temperature: "sampled", 0.0: "greedy"}
        levels = sorted({*names, *cfg.temperatures}, reverse=True)
        names = {t: names.get(t, f"at-{t:g}") for t in levels}
        found = {t: arena.measure(folder / names[t], cfg.episodes, act(round_, "evaluate", t)) for t in levels}
        rates = {t: evaluate.summarize_outcomes(measured.success_B) for t, measured in found.items()}
        outcomes = {t: measured.success_B.astype(int).tolist() for t, measured in found.items()}
        return {
            "true_success": rates[temperature],
            "greedy": rates[0.0],
            "subgoals": found[temperature].subgoals,
            "outcomes": outcomes[temperature],
            "temperatures": [{"temperature": t, **rates[t], "outcomes": outcomes[t]} for t in levels],
            "episodes": cfg.episodes * len(levels),
            "true_steps": sum(measured.steps for measured in found.values()),
            "kinds": summarize_kinds({names[t]: measured for t, measured in found.items()}),
        }

    return run.stage(f"evaluate-{round_}", make, lambda folder: None)


def summarize_kinds(found: Mapping[str, Measured]) -> dict[str, dict[str, Any]]:
    """Returns by kind of start state, and by the entries of ``found``, the success rates; nothing without kinds."""
    kinds = np.array(next(iter(found.values())).kind_B)
    return {
        str(kind): {how: evaluate.summarize_outcomes(one.success_B[kinds == kind]) for how, one in found.items()}
        for kind in dict.fromkeys(kinds)
    }
