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
import itertools
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from wovr_jax.core import config, stats
from wovr_jax.pace import Job, pace
from wovr_jax.run.folder import MARK, Run
from wovr_jax.run.recipe import Recipe

Settings = dict[str, Any]
Ends = Sequence[tuple[list[int], list[int]]]
"""For each seed the outcomes of the base policy and of the last one, layout by layout."""
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
    """Returns the variants of a study, with the numbers of updates that depend on the recipe filled in."""
    updates, rollouts = sum(recipe.dream.updates), recipe.dream.groups * recipe.learner.grpo.group
    # Online RL gets as many true rollouts as the loop collects, or the comparison would be one of budgets.
    budget = recipe.collect.first + (recipe.rounds - 1) * recipe.collect.again
    counts = {"a": 2 * updates, "online": max(budget // rollouts, 1)}
    return [_set_updates(one, counts.get(one.name)) for one in choose_variants(STUDIES[name], recipe.variants)]


def choose_variants(variants: Sequence[Variant], names: Sequence[str]) -> list[Variant]:
    """Returns the reference, against which the others are held, and those named; all where none is.

    Raises:
      ConfigError: when a name is not there.
    """
    known = [variant.name for variant in variants]
    if unknown := set(names) - set(known):
        raise config.ConfigError(
            f"config.variants: expected names out of {', '.join(known)}; got {', '.join(sorted(unknown))}"
        )
    return [variant for variant in variants if not names or variant.name in (REFERENCE, *names)]


def _set_updates(variant: Variant, updates: int | None) -> Variant:
    if updates is None:
        return variant
    return dataclasses.replace(
        variant, change=merge_settings({"dream": {}} | dict(variant.change), {"dream": {"updates": [updates]}})
    )


def merge_settings(settings: Mapping[str, Any], change: Mapping[str, Any]) -> Settings:
    """Returns ``settings`` with ``change`` laid over it, group by group."""
    # A copy: several variants are made from one reference.
    out = copy.deepcopy(dict(settings))
    for name, value in change.items():
        out[name] = merge_settings(out.get(name, {}), value) if isinstance(value, Mapping) else value
    return out


def link_stages(variant: Variant, reference: pathlib.Path, folder: pathlib.Path) -> None:
    """Links the finished shared stages of ``reference`` into the run ``folder``."""
    for name in variant.share:
        # Only what is finished: two runs would make a stage in one folder.
        source, target = reference / "stages" / name, folder / "stages" / name
        if (source / MARK).exists() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            # Relative, so that the folder of a study can be moved.
            target.symlink_to(os.path.relpath(source, target.parent), target_is_directory=True)


def study(
    name: str, recipe: Recipe, folder: pathlib.Path, keep: Callable[[list[Settings]], None] = lambda rows: None
) -> list[Settings]:
    """Runs every variant of ``name`` on every seed of the recipe; returns the table's rows, seeds pooled.

    ``keep`` is given the rows so far after every run: a study takes hours, and its table grows meanwhile.
    The folder of a run knows nothing of the other seeds, so seeds that ran apart (on two machines, say) can be
    moved into one study, which then only has to count.
    """
    rows, settings = variants(name, recipe), config.to_dict(recipe)
    outcomes: dict[str, list[tuple[list[int], list[int]]]] = {variant.name: [] for variant in rows}
    for variant in rows:  # what cannot be is said before anything runs
        config.from_dict(Recipe, merge_settings(settings, variant.change))
    # The reference first: the others link its stages.
    order = sorted(rows, key=lambda variant: variant.name != REFERENCE)
    for count, (seed, variant) in enumerate(itertools.product(recipe.seeds, order), 1):
        print(
            f"== {variant.name}, seed {seed}: {count} of {len(recipe.seeds) * len(order)}", file=sys.stderr, flush=True
        )
        # Settings as a run of its own would have them: so it can be taken up, or made on another machine.
        alone = {"job": "pace", "seed": seed, "seeds": [seed], "variants": [], "name": variant.name}
        variant_settings = merge_settings(settings, variant.change) | alone
        where = folder / f"{variant.name}-seed{seed}"
        run = Run(where, variant_settings)
        link_stages(variant, folder / f"{REFERENCE}-seed{seed}", where)
        variant_recipe = config.from_dict(Recipe, variant_settings)
        rounds = (0, variant_recipe.rounds)
        # A study asks for success before and after; what lies between, and how honest the world is, costs true steps.
        pace(variant_recipe, run, Job(measured=rounds, compares=False))
        ends = [run.facts[f"evaluate-{round_}"]["outcomes"] for round_ in rounds]
        outcomes[variant.name].append((ends[0], ends[1]))
        run.log.close()
        keep(table(rows, outcomes))
    return table(rows, outcomes)


def table(rows: Sequence[Variant], outcomes: Mapping[str, Ends]) -> list[Settings]:
    """Returns a row for every variant that has run; ``against`` compares it with the reference on the seeds of both."""
    reference = outcomes[REFERENCE]
    lines = [_row(variant, outcomes[variant.name]) for variant in rows if outcomes[variant.name]]
    for row in lines:
        # Seeds run in the same order everywhere, and zip ends with the shorter of the two: both have had what is left.
        ours, theirs = ([after for _, after in ends] for ends in zip(*zip(outcomes[row["variant"]], reference)))
        row["against"] = None if row["variant"] == REFERENCE else _paired(ours, theirs)
    return lines


def _row(variant: Variant, ends: Ends) -> Settings:
    """Returns success before and after, and the paired difference with its interval, over all seeds."""
    # [(before, after) of each seed] -> all outcomes before, and all after, in the same order.
    before, after = ([outcome for seed in side for outcome in seed] for side in zip(*ends))
    return {
        "variant": variant.name,
        "says": variant.says,
        "n": len(before),
        "base": sum(before) / len(before),
        "final": sum(after) / len(after),
        "seeds": [[sum(part) / len(part) for part in pair] for pair in ends],
    } | _paired([after], [before])


def _paired(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> dict[str, float]:
    """Returns the difference of two success rates over the same layouts, seeds pooled, with its 95 % interval."""
    # Paired by layout: what makes a layout hard is the same on both sides and cancels.
    return stats.gain(*(np.concatenate([np.asarray(seed, bool) for seed in side]) for side in (ours, theirs)))
