"""``results.json``: what the stages of a run found out, put together for a reader.

Only plain data comes in: the facts that each stage left in its folder, the ledger, and a few words about the run. So
the results of an old run folder can be put together again without building anything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from wovr_jax.core import machine, stats

Results = dict[str, Any]
Facts = Mapping[str, Mapping[str, Any]]
"""By stage, what it wrote when it was finished, or what the ledger says of it."""

STAGES = (
    *("pretrained", "demonstrations", "sft", "grpo", "imitate", "evaluate"),
    *("collect", "vae", "world", "reward", "starts", "compare", "closed"),
)
"""The kinds of stages in the order in which a round meets them."""


def describe_run(about: Mapping[str, Any]) -> Results:
    """Returns the head of ``results.json``: which run this is, on which machine and with which versions.

    Args:
      about: ``name``, ``job`` and ``seed`` of the run.
    """
    head = {key: about[key] for key in ("name", "job", "seed")}
    return head | {"versions": machine.versions(), "device": machine.device_name()}


def summarize(about: Mapping[str, Any], facts: Facts, ledger: Facts, seconds: float) -> Results:
    """Returns what ``results.json`` holds after a training: phases, classifiers, keyframes, remarks and costs.

    Args:
      about: ``name``, ``job`` and ``seed``; ``rounds``; ``pace``, whether the world model is trained again after each
        round; ``online``, whether the policy learns in the true environment.
      facts: of every finished stage. Stages that did not run are left out of the results.
      ledger: of every finished stage what it consumed, see ``run.folder.Run.ledger``.
      seconds: how long this call of the program has run; a resumed run took longer than that in all.
    """
    # A run that was resumed has met its stages in another order than one that went through.
    facts = {name: facts[name] for name in sorted(facts, key=_sort_key)}
    rounds = range(about["rounds"] + 1)
    return describe_run(about) | {
        "seconds": sum((account["seconds"] for account in ledger.values()), 0.0),
        "seconds_now": seconds,
        "peak_rss_gb": machine.peak_rss_gb(),
        "phases": [_summarize_policy(k, facts, about) for k in rounds if f"evaluate-{k}" in facts],
        "reward": {name: fact for name, fact in facts.items() if name.startswith("reward-")},
        "keyframes": {name: fact for name, fact in facts.items() if name.startswith("starts-") and fact["steps"]},
        "remarks": [f"{name}: {fact['said']}" for name, fact in facts.items() if fact.get("said")],
        "pretrained": facts.get("pretrained", {}).get("parts", {}),
        "ledger": {name: ledger[name] for name in facts if name in ledger},
    }


def _sort_key(stage: str) -> tuple[int, int, str]:
    """Sorts stages by round, then by their place in the loop; ``compare-1-in-world-0`` belongs to round 1."""
    kind, round_ = stage.split("-")[0], re.search(r"\d+", stage)
    return int(round_[0]) if round_ else 0, STAGES.index(kind) if kind in STAGES else len(STAGES), stage


def name_policy(round_: int, about: Mapping[str, Any]) -> str:
    """Returns what a reader calls the policy of a round."""
    if round_ == 0:
        return "base"
    if round_ == 1:
        return "after online GRPO" if about["online"] else "after imagined GRPO"
    # Without a refresh the policy goes on in the first world, which is what an ablation calls it.
    name = "PACE" if about["pace"] else "imagined GRPO without a refresh"
    return f"after {name}" if about["rounds"] == 2 else f"after {name}, round {round_}"


def _summarize_policy(round_: int, facts: Facts, about: Mapping[str, Any]) -> Results:
    """Returns the true success of a round's policy, and its gain over the base."""
    evaluation = facts[f"evaluate-{round_}"]
    phase = {"name": name_policy(round_, about), "imagined_success": None}  # see ``comparisons``
    phase |= {key: evaluation[key] for key in ("true_success", "greedy", "subgoals", "outcomes")}
    # Official and drawn start states of LIBERO; other environments have one kind.
    phase["kinds"] = evaluation.get("kinds", {})
    # Runs of earlier versions measured two temperatures, and kept the outcomes of one.
    levels = phase["temperatures"] = evaluation.get("temperatures") or []
    # The base has nothing to gain over itself.
    if round_:
        base = facts["evaluate-0"]
        # Recorded episodes began where somebody put the things, which may have been elsewhere for every policy.
        paired = phase["paired"] = evaluation.get("starts") == base.get("starts")
        phase["gain"] = stats.gain(evaluation["outcomes"], base["outcomes"], paired=paired)
        if levels and (its := base.get("temperatures")):
            phase["greedy_gain"] = stats.gain(levels[-1]["outcomes"], its[-1]["outcomes"], paired=paired)
            phase["best_gain"] = stats.gain(best_level(levels)["outcomes"], best_level(its)["outcomes"], paired=paired)
    return phase


def best_level(levels: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Returns the temperature of the largest success rate, the highest of those that have it."""
    # In descending order, and max takes the first.
    return max(levels, key=lambda level: level["rate"])
