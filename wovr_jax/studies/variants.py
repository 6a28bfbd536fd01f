"""Several runs that differ in one thing, and the tables that they end in.

A study is a list of variants times a list of seeds. Each variant is a run of its own in
``<study>/<variant>-seed<n>``; stages that its change cannot touch are shared with the
reference variant of the same seed by a link, so they are made once and are the same.

* the ladder: which part of the loop fails? true world and true reward, then one learned
  part more on each rung;
* the ablations: what does each part of WoVR contribute?
* the baselines: is there a cheaper way to the same success, or a better use of the same true episodes?
* the refreshes: how often is the world model best trained again, at the same true budget, steps and updates?
* the budget: from how many true episodes on is imagination no longer ahead of online RL?
* the gates: does a policy learn better if payments that look like a lie are withheld?
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wovr_jax.audit import gates
from wovr_jax.audit.gates import GateConfig
from wovr_jax.core import config
from wovr_jax.pace import Job, pace
from wovr_jax.run.bind import OpenGate
from wovr_jax.run.folder import MARK, Run
from wovr_jax.run.recipe import Recipe
from wovr_jax.studies import outcomes, ppo, progress, seeds
from wovr_jax.studies.imitation import imitate
from wovr_jax.studies.seeds import Ends

Settings = dict[str, Any]
REFERENCE = "full"

BASE = ("pretrained", "demonstrations", "sft", "evaluate-0")
"""Stages before anything that a study changes."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of a study.

    Attributes:
      name: folder and row.
      says: one line for the table.
      change: settings laid over the reference's, nested.
      share: stages that are linked from the reference.
      after: the round after which its policy is measured; None for the last.
      of: the variant whose run this is a round of; empty for a run of its own.
      curve: the line of the picture that it is a point of, if it is of one.
      imitates: whether its policy imitates its own successes (``imitation``) instead of learning by RL.
      gate: ``gate(recipe, run)`` gives what looks at imagined rollouts before they are paid; None: nothing does.
    """

    name: str
    says: str
    change: Mapping[str, Any]
    share: tuple[str, ...] = BASE
    after: int | None = None
    of: str = ""
    curve: str = ""
    imitates: bool = False
    gate: Callable[[Recipe, Run], OpenGate] | None = None


COLLECTED = (*BASE, "collect-0")
MODELLED = (*COLLECTED, "world-0", "reward-0")

STARTED = (*MODELLED, "starts-0")

# A true reward pays no failure, so there is nothing to select by.
TRUE = {"world": "true", "reward": "true", "select": "last"}

LADDER = (
    Variant("a", "(a) true world, true reward, twice the updates", {"dream": TRUE}, STARTED),
    Variant("b", "(b) true world, true reward, imagined budget", {"dream": TRUE}, STARTED),
    Variant("c", "(c) learned world, true reward", {"dream": TRUE | {"world": "shadow"}}, STARTED),
    Variant("d", "(d) true world, learned reward", {"dream": {"world": "true"}}, STARTED),
    Variant(REFERENCE, "(e) all learned", {}),
)

ONLINE = {"dream": TRUE, "starts": {"share": 0.0}}
NO_KIR = Variant("no_kir", "no keyframe starts", {"starts": {"share": 0.0}}, MODELLED)
NO_PACE = Variant("no_pace", "no refresh, as many updates", {"pace": False}, (*STARTED, "grpo-1", "evaluate-1"))
# What a refresh costs is also true episodes that the first world could have had.
AT_ONCE = Variant("at_once", "no refresh, the whole budget collected first", {})
SAME_BUDGET = Variant("online", "online GRPO, same true budget", ONLINE)

ABLATIONS = (
    Variant(REFERENCE, "all of WoVR", {}),
    Variant("no_anchor", "no first-frame anchor", {"world": {"anchor": False}}, (*COLLECTED, "starts-0")),
    Variant("memory_1", "one memory frame", {"world": {"memory": 1}}, (*COLLECTED, "starts-0")),
    Variant("clean_context", "no noisy context", {"world": {"noisy_context": False}}, (*COLLECTED, "starts-0")),
    NO_KIR,
    Variant("no_mask", "no success mask", {"learner": {"grpo": {"granularity": "none"}}}, STARTED),
    NO_PACE,
    SAME_BUDGET,
)

# As far as its choices are settings of this loop: WMPO:README and paper, its VideoMAE judge and world model are not.
WMPO = Variant(
    "wmpo",
    "as WMPO: no anchor, keyframes, mask or refresh; groups that agree left out",
    {
        "world": {"anchor": False},
        "starts": {"share": 0.0},
        "learner": {"grpo": {"granularity": "none", "normalise": "mean_std", "filter": True}},
    },
)
RISE = Variant(
    "rise",
    "as RISE: one chunk, also out of failures, progress instead of a judge, no refresh",
    {"dream": {"chunks": 1}, "starts": {"share": 0.75, "rule": "uniform"}},
    gate=progress.prepare,
)

VLA_RL = Variant(
    "vla_rl",
    "as VLA-RL: PPO with a critic, sub-goals pay too, same true budget",
    ONLINE | {"learner": {"grpo": {"group": 1}}},
    gate=ppo.prepare,
)

BASELINES = (
    Variant(REFERENCE, "PACE", {}),
    Variant("sft_more", "the base, trained twice as long", {}, ("pretrained", "demonstrations"), after=0),
    Variant("imitation", "imitation of its own successes", {}, after=1, imitates=True),
    Variant("imagined", "imagined GRPO, first round", {}, after=1, of=REFERENCE),
    NO_PACE,
    AT_ONCE,
    WMPO,
    RISE,
    NO_KIR,
    SAME_BUDGET,
    VLA_RL,
    # Runs of their own and no later rounds of one: a round begins with a fresh optimizer and warms up again.
    Variant("online_2", "online GRPO, twice the true budget", ONLINE),
    Variant("online_4", "online GRPO, four times the true budget", ONLINE),
)


def _gate(**changes: Any) -> Callable[[Recipe, Run], OpenGate]:
    return functools.partial(gates.prepare, cfg=GateConfig(**changes))


GATES = (
    Variant(REFERENCE, "every payment of the judge", {}),
    Variant("familiar", "the less suspicious half of them", {}, STARTED, gate=gates.prepare),
    Variant("dropped", "that half; the others are left out of their groups", {}, STARTED, gate=_gate(drop=True)),
    Variant("random", "half of them, drawn at random", {}, STARTED, gate=_gate(signs=())),
    # What no gate can beat by what it withholds: the frames are imagined, the payments true.
    Variant(
        "true", "those that the true simulator would pay", {"dream": {"world": "shadow", "reward": "true"}}, STARTED
    ),
)

STUDIES: dict[str, tuple[Variant, ...] | None] = {
    "ladder": LADDER,
    "ablations": ABLATIONS,
    "baselines": BASELINES,
    "refreshes": None,
    "budget": None,
    "gates": GATES,
}
"""Variants by the name of their study; those of None depend on the recipe."""


def variants(name: str, recipe: Recipe) -> list[Variant]:
    """Returns the variants of a study, with the numbers that depend on the recipe filled in."""
    if name == "baselines" and not recipe.sft.steps:
        raise config.ConfigError("config.sft.steps: expected at least 1, by which the baselines imitate, got 0.")
    if name == "refreshes":
        return choose_variants(_list_refreshes(recipe), recipe.variants)
    updates, group = sum(recipe.dream.updates), recipe.learner.grpo.group
    # Imagination is free to roll more at a time; for online RL an iteration that large would leave hardly any of them.
    online_groups = recipe.online_groups or recipe.dream.groups
    # Online RL gets as many true rollouts as the loop collects, or the comparison would be one of budgets.
    budget = recipe.collect.first + (recipe.rounds - 1) * recipe.collect.again * recipe.pace
    if recipe.dream.select != "last":
        rollouts = recipe.dream.groups * group
        budget += (updates + recipe.rounds) * len(range(0, rollouts, recipe.dream.watch_every(rollouts)))
    online = {"online": 1, "online_2": 2, "online_4": 4}
    fill: dict[str, Settings] = {"a": {"dream": {"updates": [2 * updates]}}}
    for each, times in online.items():
        count = max(times * budget // (online_groups * group), 1)
        fill[each] = {"dream": {"updates": [count], "groups": online_groups}}
    # A critic needs no groups: as many rollouts, each from a layout of its own.
    fill["vla_rl"] = {"dream": fill["online"]["dream"] | {"groups": online_groups * group}}
    fill["sft_more"] = {"sft": {"steps": 2 * recipe.sft.steps, "patience": 0}}
    # All of them from the base: what it succeeds in is what it imitates.
    fill["imitation"] = {"collect": {"first": budget}}
    for each in ("at_once", "wmpo", "rise"):
        fill[each] = _train_world_once(recipe, budget)
    # As many imagined frames: shorter rollouts, and more of them.
    fill["rise"] |= {"dream": {"groups": recipe.dream.groups * recipe.dream.chunks}}
    return [
        dataclasses.replace(one, change=merge_settings(one.change, fill.get(one.name, {})))
        for one in choose_variants(STUDIES[name] or _list_budgets(recipe), recipe.variants)
    ]


def _train_world_once(recipe: Recipe, episodes: int) -> Settings:
    """Returns the settings of a run that collects all its true episodes first and trains one world model on them."""
    # The steps of the refreshes too, or it would be a comparison of world models that are trained longer or shorter.
    steps = recipe.world_train.steps + (recipe.rounds - 1) * recipe.refresh.steps
    return {"pace": False, "collect": {"first": episodes}, "world_train": {"steps": steps}}


def _list_refreshes(recipe: Recipe) -> list[Variant]:
    """Returns a variant without a refresh, one each for one to three of them, and one that asks for them by itself.

    All of them collect as many true episodes, train the world model for as many steps, and make as many updates.

    Raises:
      ConfigError: when the recipe does not refresh.
    """
    if not (recipe.pace and recipe.rounds > 1):
        raise config.ConfigError("config.dream.updates: expected two rounds at least, between which is a refresh.")
    episodes = recipe.collect.first + (recipe.rounds - 1) * recipe.collect.again
    steps, updates = (recipe.rounds - 1) * recipe.refresh.steps, sum(recipe.dream.updates)
    rows = [dataclasses.replace(AT_ONCE, change=_train_world_once(recipe, episodes))]
    for count in (1, 2, 3):
        rounds = count + 1
        change = {
            "collect": {"first": episodes // rounds, "again": episodes // rounds},
            "refresh": {"steps": steps // count},
            "dream": {"updates": [updates * (k + 1) // rounds - updates * k // rounds for k in range(rounds)]},
        }
        # The recipe itself is the reference, as it stands.
        ours = rounds == recipe.rounds
        says = "one refresh" if count == 1 else f"{count} refreshes"
        rows.append(Variant(REFERENCE if ours else f"refresh_{count}", says, {} if ours else change))
    if all(row.name != REFERENCE for row in rows):
        rows.append(Variant(REFERENCE, f"{recipe.rounds - 1} refreshes", {}))
    watched = "refreshed when the closed loop asks for it; what it watches are true steps too"
    return [*rows, Variant("triggered", watched, {"dream": {"select": "triggered"}}, STARTED)]


def _list_budgets(recipe: Recipe) -> list[Variant]:
    """Returns a variant of imagined and one of online GRPO for each budget of true episodes.

    Raises:
      ConfigError: when there is none.
    """
    if not recipe.budgets:
        raise config.ConfigError("config.budgets: expected at least one number of true episodes, got none.")
    budgets, curves = recipe.budgets, ("imagined GRPO", "online GRPO")
    groups = recipe.online_groups or recipe.dream.groups
    rollouts = groups * recipe.learner.grpo.group
    imagined = [
        # The largest is the reference, against which the others are held.
        Variant(
            REFERENCE if budget == max(budgets) else f"imagined_{budget}",
            f"{curves[0]}, {budget:,} true episodes",
            {"collect": {"first": budget}},
            curve=curves[0],
        )
        for budget in budgets
    ]
    online = [
        Variant(
            f"online_{budget}",
            f"{curves[1]}, {budget:,} true episodes",
            merge_settings(ONLINE, {"dream": {"updates": [budget // rollouts], "groups": groups}}),
            curve=curves[1],
        )
        # An iteration of online RL rolls a number of episodes, and half an iteration would be another learner.
        for budget in budgets
        if budget % rollouts == 0
    ]
    return [*imagined, *online]


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


def merge_settings(settings: Mapping[str, Any], change: Mapping[str, Any]) -> Settings:
    """Returns ``settings`` with ``change`` laid over it, group by group."""
    # A copy: several variants are made from one reference.
    out = copy.deepcopy(dict(settings))
    for name, value in change.items():
        out[name] = merge_settings(out.get(name) or {}, value) if isinstance(value, Mapping) else value
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
    name: str, recipe: Recipe, folder: pathlib.Path, keep: Callable[[Settings], None] = lambda results: None
) -> Settings:
    """Runs every variant of ``name`` on every seed of the recipe; returns rows, tables and sentences for the results.

    ``keep`` is given the same of what is there after every run: a study takes hours, and its tables grow meanwhile.
    Seeds that ran apart (on two machines, say) are joined by their ``outcomes.json``, which ``recipe.outcomes`` names.
    """
    rows, settings = variants(name, recipe), config.to_dict(recipe)
    elsewhere = outcomes.read(recipe.outcomes, name, settings)
    # A seed that is measured here is not counted twice.
    ends: dict[str, list[Ends]] = {
        variant.name: [end for end in elsewhere.get(variant.name, ()) if end.seed not in recipe.seeds]
        for variant in rows
    }
    for variant in rows:  # what cannot be is said before anything runs
        asked = config.from_dict(Recipe, merge_settings(settings, variant.change))
        if variant.gate is ppo.prepare and asked.outside:
            others = ",".join(row.name for row in rows if row not in (variant, rows[0]))
            raise config.ConfigError(
                f"config.variants: {variant.name} is paid by the sub-goals of an embedded simulator, and this one is "
                f"outside; name the others: --config.variants={others}"
            )
    # The reference first: the others link its stages, and its base policy is what all of them began with.
    order = sorted(rows, key=lambda variant: variant.name != REFERENCE)
    for count, (seed, variant) in enumerate(itertools.product(recipe.seeds, order), 1):
        print(
            f"== {variant.name}, seed {seed}: {count} of {len(recipe.seeds) * len(order)}", file=sys.stderr, flush=True
        )
        owner = variant.of or variant.name
        # Settings as a run of its own would have them: so it can be taken up, or made on another machine.
        alone = {"job": "pace", "seed": seed, "seeds": [seed], "variants": [], "outcomes": [], "name": owner}
        variant_settings = merge_settings(settings, variant.change) | alone
        where = folder / f"{owner}-seed{seed}"
        run = Run(where, variant_settings)
        link_stages(variant, folder / f"{REFERENCE}-seed{seed}", where)
        variant_recipe = config.from_dict(Recipe, variant_settings)
        last = variant_recipe.rounds if variant.after is None else variant.after
        if variant.imitates:
            imitate(variant_recipe, run)
        else:
            # Success before and after is asked for; what lies between costs true steps.
            gate = variant.gate and variant.gate(variant_recipe, run)
            pace(variant_recipe, run, Job(f"evaluate-{last}", measured=(0, last)), gate)
        final = seeds.read_outcomes(run.facts[f"evaluate-{last}"])
        # A base that trains longer is held against the one that the reference began with.
        own = variant.name == REFERENCE
        base = seeds.read_outcomes(run.facts["evaluate-0"]) if own else ends[REFERENCE][-1].base
        ends[variant.name].append(Ends(seed, count_episodes(run.facts, last), base, final))
        run.close()
        outcomes.write(folder, name, settings, ends)
        results = summarize(rows, ends)
        keep(results)
    return results


def count_episodes(facts: Mapping[str, Any], last: int) -> int:
    """Returns the true episodes that training took until a round's policy: collected ones, and the learner's."""
    # An improvement took true episodes where its world is the truth, or where the truth chose its policy.
    stages = [name for k in range(last) for name in (f"collect-{k}", f"grpo-{k + 1}") if name in facts]
    return sum(facts[name].get("episodes", 0) for name in stages)


def summarize(variants: Sequence[Variant], ends: Mapping[str, Sequence[Ends]]) -> Settings:
    """Returns what the results say of the variants that have run so far."""
    reference = ends[REFERENCE]
    rows = [
        seeds.summarize(one.name, one.says, ends[one.name], None if one.name == REFERENCE else reference)
        for one in variants
        if ends[one.name]
    ]
    curves = seeds.curves(rows, {one.name: one.curve for one in variants if one.curve})
    return {"study": rows, "tables": [*curves, *seeds.tables(rows)], "remarks": seeds.state(rows)}
