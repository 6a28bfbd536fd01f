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
"""By stage, what it wrote when it was finished."""

STAGES = (
    *("pretrained", "demonstrations", "sft", "grpo", "evaluate"),
    *("collect", "world", "reward", "starts", "compare", "closed"),
)
"""The kinds of stages in the order in which a round meets them."""


def describe_run(about: Mapping[str, Any]) -> Results:
    """Returns the head of ``results.json``: which run this is, on which machine and with which versions.

    Args:
      about: ``name``, ``job`` and ``seed`` of the run.
    """
    head = {key: about[key] for key in ("name", "job", "seed")}
    return head | {"versions": machine.versions(), "device": machine.device_name()}


def summarize(
    about: Mapping[str, Any], facts: Facts, ledger: Mapping[str, Mapping[str, Any]], seconds: float
) -> Results:
    """Returns what ``results.json`` holds: phases, comparisons, classifiers, keyframes, remarks and costs.

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
    pairs = [(k, world) for k in rounds for world in rounds]
    return describe_run(about) | {
        "seconds": sum((account["seconds"] for account in ledger.values()), 0.0),
        "seconds_now": seconds,
        "peak_rss_gb": machine.peak_rss_gb(),
        "phases": [_summarize_policy(k, facts, about) for k in rounds if f"evaluate-{k}" in facts],
        "comparison": [
            _summarize_comparison(*pair, facts, about) for pair in pairs if _name("compare", *pair) in facts
        ],
        "closed_loop": [
            _summarize_closed_loop(*pair, facts, about) for pair in pairs if _name("closed", *pair) in facts
        ],
        "reward": {name: fact for name, fact in facts.items() if name.startswith("reward-")},
        "keyframes": {name: fact for name, fact in facts.items() if name.startswith("starts-") and fact["steps"]},
        "remarks": [f"{name}: {fact['said']}" for name, fact in facts.items() if fact.get("said")],
        "pretrained": facts.get("pretrained", {}).get("parts", {}),
        "ledger": {name: ledger[name] for name in facts if name in ledger},
    }


def training_world(round_: int, pace: bool) -> int:
    """Returns the round of the world model in which a round's policy learned; the first one for the base policy."""
    return max(round_ - 1, 0) if pace else 0


def _sort_key(stage: str) -> tuple[int, int, str]:
    """Sorts stages by round, then by their place in the loop; ``compare-1-in-world-0`` belongs to round 1."""
    kind, round_ = stage.split("-")[0], re.search(r"\d+", stage)
    return int(round_[0]) if round_ else 0, STAGES.index(kind) if kind in STAGES else len(STAGES), stage


def _name(kind: str, round_: int, world: int) -> str:
    return f"{kind}-{round_}-in-world-{world}"


def _name_policy(round_: int, about: Mapping[str, Any]) -> str:
    """Returns what a reader calls the policy of a round."""
    if round_ == 0:
        return "base"
    if round_ == 1:
        return "after online GRPO" if about["online"] else "after imagined GRPO"
    # Without a refresh the policy goes on in the first world, which is what an ablation calls it.
    name = "PACE" if about["pace"] else "imagined GRPO without a refresh"
    return f"after {name}" if about["rounds"] == 2 else f"after {name}, round {round_}"


def _summarize_policy(round_: int, facts: Facts, about: Mapping[str, Any]) -> Results:
    """Returns the true success of a round's policy, its gain over the base, and what its own world model said of it."""
    evaluation = facts[f"evaluate-{round_}"]
    # Success in the dreams that taught it, which may flatter it; the newer world is in the comparisons.
    comparison = facts.get(_name("compare", round_, training_world(round_, about["pace"])), {})
    phase = {"name": _name_policy(round_, about), "imagined_success": comparison.get("imagined_success")}
    phase |= {key: evaluation[key] for key in ("true_success", "greedy", "subgoals", "outcomes")}
    # Official and drawn start states of LIBERO; other environments have one kind.
    phase["kinds"] = evaluation.get("kinds", {})
    # Runs of earlier versions measured two temperatures, and kept the outcomes of one.
    levels = phase["temperatures"] = evaluation.get("temperatures") or []
    # The base has nothing to gain over itself.
    if round_:
        base = facts["evaluate-0"]
        phase["gain"] = stats.gain(evaluation["outcomes"], base["outcomes"])
        if levels and (its := base.get("temperatures")):
            phase["greedy_gain"] = stats.gain(levels[-1]["outcomes"], its[-1]["outcomes"])
            phase["best_gain"] = stats.gain(best_level(levels)["outcomes"], best_level(its)["outcomes"])
    return phase


def best_level(levels: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Returns the temperature of the largest success rate, the highest of those that have it."""
    # In descending order, and max takes the first.
    return max(levels, key=lambda level: level["rate"])


def _summarize_comparison(round_: int, world: int, facts: Facts, about: Mapping[str, Any]) -> Results:
    """Returns counts, bias, fidelity and films of a comparison of the two worlds on the same actions."""
    name = _name("compare", round_, world)
    comparison, true = facts[name], facts[f"evaluate-{round_}"]["outcomes"]
    imagined = comparison.get("imagined_outcomes", [None] * len(comparison["videos"]))
    # A paired interval depends on the four counts alone, so any list of episodes that has them will do.
    tp, fp, fn, tn = (comparison["verdicts"][count] for count in ("tp", "fp", "fn", "tn"))
    believed = [True] * (tp + fp) + [False] * (fn + tn)
    happened = [True] * tp + [False] * fp + [True] * fn + [False] * tn
    # The comparison plays the first episodes of the evaluation again, so their true outcomes are known.
    films = zip(comparison["videos"], true, imagined, strict=False)
    return comparison["verdicts"] | {
        "policy": _name_policy(round_, about),
        "world": f"world model of round {world + 1}",
        "bias": stats.gain(believed, happened),
        "psnr": comparison["psnr"],
        # Runs of earlier versions did not ask what imagination says of other fingers.
        **{how: comparison.get(how) for how in ("open_fingers", "dropped")},
        "videos": [{"path": f"stages/{name}/{film}", "true": was, "imagined": seen} for film, was, seen in films],
    }


def _summarize_closed_loop(round_: int, world: int, facts: Facts, about: Mapping[str, Any]) -> Results:
    """Returns, by kind of start, what a policy was paid for in a learned world and what of it was true."""
    kinds = {kind: facts[_name("closed", round_, world)][kind] for kind in ("all", "episode_start", "keyframe")}
    return {"policy": _name_policy(round_, about), "world": f"world model of round {world + 1}"} | kinds
