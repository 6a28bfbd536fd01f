"""A ladder of policies to be ranked: imitation on more and more of a run's demonstrations, all else equal.

The policies of one run are few and alike. A world model that is to rank policies has to meet some that are known to
differ, and nothing makes a policy worse more gently than fewer demonstrations (the protocol of WorldArena's second
track: 10, 20, 30, 50 and 100 %).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from wovr_jax.core.config import ConfigError
from wovr_jax.run.folder import Product
from wovr_jax.run.recipe import Recipe
from wovr_jax.run.stages.episodes import Demonstrations
from wovr_jax.types import Params


class Rung(NamedTuple):
    """A policy of the ladder.

    Attributes:
      share: of the demonstrations.
      count: demonstrations that it imitates.
      policy: its weights.
    """

    share: float
    count: int
    policy: Product[Params]


def climb(
    recipe: Recipe,
    fine_tune: Callable[..., Product[Params]],
    demonstrations: Product[Demonstrations],
    shares: Sequence[float],
) -> list[Rung]:
    """Fine-tunes a policy on each share of the demonstrations, a stage ``ladder-<percent>`` each.

    The shares are nested: each takes the first of the demonstrations, in the order of their layouts. What is held out,
    settings, start weights and the codec of the actions are those of the run's base policy; the draws are not, so that
    the policy of the whole is a second base and not the same one.

    Args:
      recipe: of the run.
      fine_tune: ``fine_tune(demonstrations, name=...)``: the stage, in the folder that the ladder is kept in.
      demonstrations: of the run.
      shares: in ascending order; those that come to as many demonstrations as the one before are left out.

    Raises:
      ConfigError: a run whose base policy imitated nothing.
    """
    total = recipe.collect.demonstrations
    if not (recipe.sft.steps and total):
        raise ConfigError(
            f"a ladder imitates the demonstrations of the run again, and this run has {total} of them and "
            f"{recipe.sft.steps} steps of imitation; rank the policies that it has: --rank"
        )
    rungs: list[Rung] = []
    for share, count in choose_counts(total, shares):
        part = Product(lambda count=count: _take(demonstrations.value, count))
        rungs.append(Rung(share, count, fine_tune(part, name=f"ladder-{100 * share:g}")))
    return rungs


def choose_counts(total: int, shares: Sequence[float]) -> list[tuple[float, int]]:
    """Returns the shares and how many of ``total`` demonstrations each is, at least one, none twice."""
    counts: dict[int, float] = {}
    for share in shares:
        counts.setdefault(max(round(share * total), 1), share)
    return [(share, count) for count, share in counts.items()]


def _take(demonstrations: Demonstrations, count: int) -> Demonstrations:
    return Demonstrations(demonstrations.train[:count], demonstrations.held_out)
