"""Stages that ask the true environment: for demonstrations, for rollouts of a policy, and how good the policy is."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from wovr_jax import evaluate
from wovr_jax.core import processes
from wovr_jax.data import episodes as disk
from wovr_jax.run.folder import Product, Run
from wovr_jax.run.recipe import CollectConfig, EvaluateConfig
from wovr_jax.sim.arena import Actor, Arena, Measured
from wovr_jax.types import Array, Episode

Keys = Callable[..., Array]
"""``key("collect", 1)``: the random key of a run that goes by these names."""


class Demonstrations(NamedTuple):
    """Scripted episodes, a share of them flawed.

    Attributes:
      train: to learn from.
      held_out: to judge imitation on.
    """

    train: Sequence[Episode]
    held_out: Sequence[Episode]


def no_demonstrations() -> Product[Demonstrations]:
    """The product of a run that has none."""
    return Product(lambda: Demonstrations([], []))


def demonstrate(run: Run, arena: Arena, cfg: CollectConfig, key: Keys, *, lazily: bool) -> Product[Demonstrations]:
    """Scripted episodes, or none where the base policy comes from elsewhere.

    Args:
      run: the run.
      arena: the true environment.
      cfg: how many.
      key: of the run, by name.
      lazily: whether the episodes stay on disk.
    """
    if not cfg.demonstrations:
        return no_demonstrations()

    def make(folder: pathlib.Path) -> dict[str, Any]:
        return arena.demonstrate(folder, key("demonstrations"), cfg.demonstrations, cfg.validation)

    def load(folder: pathlib.Path) -> Demonstrations:
        # Two folders, so that no later stage can train on what imitation is judged by.
        return Demonstrations(*(read_in_turn(folder / part, lazily=lazily) for part in ("episodes", "validation")))

    return run.stage("demonstrations", make, load)


def collect(
    run: Run, arena: Arena, cfg: CollectConfig, round_: int, actor: Actor, *, lazily: bool
) -> Product[Sequence[Episode]]:
    """True rollouts of the policy of a round: the only true steps that training consumes."""
    # The first world model begins from nothing and needs more than a refresh (1,500 and 1,000 in the paper).
    name, count = f"collect-{round_}", cfg.again if round_ else cfg.first

    def make(folder: pathlib.Path) -> dict[str, Any]:
        return arena.collect(folder / "episodes", name, count, actor)

    return run.stage(name, make, lambda folder: read_in_turn(folder / "episodes", lazily=lazily))


def measure(
    run: Run, arena: Arena, cfg: EvaluateConfig, temperature: float, act: Callable[..., Actor], round_: int
) -> None:
    """True success of the policy of a round on start states that no stage trains on, temperature by temperature.

    Args:
      run: the run.
      arena: the true environment.
      cfg: how many episodes, and at which temperatures besides that of training and 0.
      temperature: of training.
      act: ``act(round_, purpose, temperature)`` gives the policy.
      round_: the round.
    """
    if not cfg.episodes:  # nothing is measured, and nothing claimed
        return

    def make(folder: pathlib.Path) -> dict[str, Any]:
        # As it was trained, which is what RL improves, and greedy, as a robot would run it; and between the two, for
        # sampling hides what the policy knows.
        names = {temperature: "sampled", 0.0: "greedy"}
        levels = sorted({*names, *cfg.temperatures}, reverse=True)
        names = {t: names.get(t, f"at-{t:g}") for t in levels}
        found = {t: arena.measure(folder / names[t], cfg.episodes, act(round_, "evaluate", t)) for t in levels}
        rates = {t: evaluate.summarize_outcomes(measured.success_B) for t, measured in found.items()}
        outcomes = {t: measured.success_B.astype(int).tolist() for t, measured in found.items()}
        processes.say(", ".join(f"true success {names[t]} {rates[t]['rate']:.1%}" for t in sorted({temperature, 0.0})))
        return {
            "true_success": rates[temperature],
            "greedy": rates[0.0],
            "subgoals": found[temperature].subgoals,
            "outcomes": outcomes[temperature],
            "temperatures": [{"temperature": t, **rates[t], "outcomes": outcomes[t]} for t in levels],
            "episodes": cfg.episodes * len(levels),
            "true_steps": sum(measured.steps for measured in found.values()),
            "starts": found[temperature].starts,
            "kinds": summarize_kinds({names[t]: measured for t, measured in found.items()}),
        }

    run.stage(f"evaluate-{round_}", make, lambda folder: None)


def summarize_kinds(found: Mapping[str, Measured]) -> dict[str, dict[str, Any]]:
    """Returns by kind of start state, and by the entries of ``found``, the success rates; nothing without kinds."""
    kinds = np.array(next(iter(found.values())).kind_B)
    return {
        str(kind): {how: evaluate.summarize_outcomes(one.success_B[kinds == kind]) for how, one in found.items()}
        for kind in dict.fromkeys(kinds)
    }


def join_rounds(rollouts: Sequence[Product[Sequence[Episode]]]) -> Sequence[Episode]:
    """All true rollouts of some rounds, the oldest first."""
    # The oldest first: whoever wants the newest takes them from the end.
    return disk.join(product.value for product in rollouts)


def read_in_turn(folder: pathlib.Path, *, lazily: bool = False) -> Sequence[Episode]:
    """The episodes of a folder in the order of their layouts, in which tasks take turns; it may hold them task by task.

    Who takes the first or the last of them, as the training of the reward does, then has some of every task. Read
    ``lazily`` they stay on disk.
    """
    if not lazily:
        return sorted(disk.read(folder), key=lambda episode: episode.seed)
    # Heads only: sorting must not decode what is to stay on the disk.
    source = disk.EpisodeSource(folder)
    return disk.Lazy([(source, e) for e in sorted(range(len(source)), key=lambda e: source.head(e).seed)])
