"""A baseline without a world: the policy imitates what it did itself when it succeeded.

True episodes of the base policy, as many as the whole loop collects; those that succeeded join the demonstrations, and
the base policy is fine-tuned on all of them as it was on the demonstrations alone. No world model, no reward and no
start states: what is left is the value of the true episodes themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from wovr_jax.core.config import ConfigError
from wovr_jax.data.starts import is_intervened
from wovr_jax.run.bind import Products, bind_stages
from wovr_jax.run.folder import Product, Run
from wovr_jax.run.recipe import Recipe
from wovr_jax.run.stages.episodes import Demonstrations
from wovr_jax.types import Episode


def imitate(recipe: Recipe, run: Run) -> None:
    """Runs the baseline in an open run folder; the stage ``evaluate-1`` is of its last policy.

    Raises:
      ConfigError: settings of fine-tuning without a step.
    """
    if not recipe.sft.steps:
        raise ConfigError("config.sft.steps: expected at least 1, by which the base policy imitates, got 0.")
    made = Products()
    do = bind_stages(recipe, run, made)
    made.demonstrations = do.demonstrate()
    made.policies += [do.fine_tune(made.demonstrations)]
    do.measure(0)
    made.rollouts += [do.collect(0, do.act(0, "collect-0"))]
    # From the base policy, and with the settings that made it.
    base = run.folder / "stages" / made.policies[0].name / "policy"
    again = bind_stages(dataclasses.replace(recipe, policy_weights=str(base)), run, made)
    chosen = Product(lambda: add_successes(made.demonstrations.value, made.rollouts[0].value))
    made.policies += [again.fine_tune(chosen, name="imitate-1")]
    do.measure(1)


def add_successes(demonstrations: Demonstrations, rollouts: Sequence[Episode]) -> Demonstrations:
    """Returns the demonstrations and, behind them, what the policy alone succeeded in; what is held out stays."""
    done = [episode for episode in rollouts if episode.success_S.any() and not is_intervened(episode)]
    return Demonstrations([*demonstrations.train, *done], demonstrations.held_out)
