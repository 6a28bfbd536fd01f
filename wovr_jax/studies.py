"""Several runs that differ in one thing, and the one table that they end in.

A study is a list of variants times a list of seeds. Each variant is a run of its own in
``<study>/<variant>-seed<n>``; stages that its change cannot touch are shared with the
reference variant of the same seed by a link, so they are made once and are the same.

* the ladder: which part of the loop fails? true world and true reward, then one learned
  part more on each rung;
* the ablations: what does each part of WoVR contribute?
"""

from __future__ import annotations

import copy
import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wovr_jax import config, metrics
from wovr_jax.recipe import Recipe
from wovr_jax.run import MARK, Run
from wovr_jax.stages import Stages

Settings = dict[str, Any]
REFERENCE = "full"

BASE = ("demonstrations", "sft", "evaluate-0")
"""Stages before anything that a study changes."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of a study.

    Attributes:
      name: folder and row.
      says: one line for the table.
      change: settings laid over the reference's, nested.
      share: stages that are linked from the reference.
    """

    name: str
    says: str
    change: Mapping[str, Any]
    share: tuple[str, ...] = BASE


COLLECTED = (*BASE, "collect-0")
MODELLED = (*COLLECTED, "world-0", "reward-0")

STARTED = (*MODELLED, "starts-0")

LADDER = (
    Variant(
        "a", "(a) true world, true reward, twice the updates", {"dream": {"world": "true", "reward": "true"}}, STARTED
    ),
    Variant(
        "b", "(b) true world, true reward, imagined budget", {"dream": {"world": "true", "reward": "true"}}, STARTED
    ),
    Variant("c", "(c) learned world, true reward", {"dream": {"world": "shadow", "reward": "true"}}, STARTED),
    Variant("d", "(d) true world, learned reward", {"dream": {"world": "true"}}, STARTED),
    Variant(REFERENCE, "(e) all learned", {}),
)

ABLATIONS = (
    Variant(REFERENCE, "all of WoVR", {}),
    Variant("no_anchor", "no first-frame anchor", {"world": {"anchor": False}}, (*COLLECTED, "starts-0")),
    Variant("memory_1", "one memory frame", {"world": {"memory": 1}}, (*COLLECTED, "starts-0")),
    Variant("clean_context", "no noisy context", {"world": {"noisy_context": False}}, (*COLLECTED, "starts-0")),
    Variant("no_kir", "no keyframe starts", {"starts": {"share": 0.0}}, MODELLED),
    Variant("no_mask", "no success mask", {"learner": {"grpo": {"granularity": "none"}}}, STARTED),
    Variant("no_pace", "no refresh, as many updates", {"pace": False}, (*STARTED, "grpo-1", "evaluate-1")),
    Variant(
        "online",
        "online GRPO, same true budget",
        {"dream": {"world": "true", "reward": "true"}, "starts": {"share": 0.0}},
    ),
)

STUDIES = {"ladder": LADDER, "ablations": ABLATIONS}


def variants(name: str, recipe: Recipe) -> list[Variant]:
    """The variants of a study, with the numbers of updates that depend on the recipe filled in."""
    updates, rollouts = sum(recipe.dream.updates), recipe.dream.groups * recipe.learner.grpo.group
    budget = recipe.collect.first + (recipe.rounds - 1) * recipe.collect.again
    counts = {"a": 2 * updates, "online": max(budget // rollouts, 1)}
    return [_with_updates(one, counts.get(one.name)) for one in STUDIES[name]]


def _with_updates(variant: Variant, updates: int | None) -> Variant:
    if updates is None:
        return variant
    return dataclasses.replace(
        variant, change=merged({"dream": {}} | dict(variant.change), {"dream": {"updates": [updates]}})
    )


def merged(settings: Mapping[str, Any], change: Mapping[str, Any]) -> Settings:
    """``settings`` with ``change`` laid over it, group by group."""
    out = copy.deepcopy(dict(settings))
    for name, value in change.items():
        out[name] = merged(out.get(name, {}), value) if isinstance(value, Mapping) else value
    return out


def link(variant: Variant, reference: pathlib.Path, folder: pathlib.Path) -> None:
    """Links the finished shared stages of ``reference`` into the run ``folder``."""
    for name in variant.share:
        source, target = reference / "stages" / name, folder / "stages" / name
        if (source / MARK).exists() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(os.path.relpath(source, target.parent), target_is_directory=True)


def study(name: str, recipe: Recipe, folder: pathlib.Path) -> list[Settings]:
    """Runs every variant of ``name`` on every seed of the recipe; returns the table's rows, seeds pooled."""
    rows, settings, seeds = variants(name, recipe), config.to_dict(recipe), recipe.seeds
    outcomes: dict[str, list[tuple[list[int], list[int]]]] = {variant.name: [] for variant in rows}
    # The reference first: the others link its stages.
    order = sorted(rows, key=lambda variant: variant.name != REFERENCE)
    for seed in seeds:
        for variant in order:
            one = merged(settings, variant.change) | {"job": "pace", "seed": seed, "name": variant.name}
            where = folder / f"{variant.name}-seed{seed}"
            run = Run(where, one)
            link(variant, folder / f"{REFERENCE}-seed{seed}", where)
            stages = Stages(config.from_dict(Recipe, one), run)
            ends = [stages.evaluated(round_)["outcomes"] for round_ in (0, stages.recipe.rounds)]
            outcomes[variant.name].append((ends[0], ends[1]))
            run.log.close()
    return [_row(variant, outcomes[variant.name]) for variant in rows]


def _row(variant: Variant, outcomes: Sequence[tuple[list[int], list[int]]]) -> Settings:
    """Success before and after, and the paired difference with its interval, over all seeds."""
    base = [flag for before, _ in outcomes for flag in before]
    final = [flag for _, after in outcomes for flag in after]
    gain, low, high = metrics.paired_difference(np.asarray(final, bool), np.asarray(base, bool))
    per_seed = [[sum(part) / len(part) for part in pair] for pair in outcomes]
    return {
        "variant": variant.name,
        "says": variant.says,
        "n": len(base),
        "base": sum(base) / len(base),
        "final": sum(final) / len(final),
        "gain": gain,
        "low": low,
        "high": high,
        "seeds": per_seed,
    }
