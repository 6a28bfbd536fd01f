"""What an audit adds to ``results.json``: imagination held against the truth, policy by policy and world by world."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wovr_jax.core import stats
from wovr_jax.report.results import Facts, Results, name_policy


def add_comparisons(results: Results, about: Mapping[str, Any], facts: Facts) -> Results:
    """Returns the results of a training with those of its audit.

    Args:
      results: as of ``results.summarize``.
      about: ``rounds``, ``pace`` and ``online`` of the run, as there.
      facts: of every finished stage.

    Returns:
      The results with ``comparison`` and ``closed_loop``, a row for each policy in each world that it met, and with
      what its own world model said of each policy, ``imagined_success``; None where nobody asked.
    """
    rounds = range(about["rounds"] + 1)
    pairs = [(k, world) for k in rounds for world in rounds]
    phases = []
    for phase, k in zip(results["phases"], (k for k in rounds if f"evaluate-{k}" in facts), strict=True):
        # Success in the dreams that taught it, which may flatter it; the newer world is in the comparisons.
        own = facts.get(_name("compare", k, training_world(k, about["pace"])), {})
        phases.append(phase | {"imagined_success": own.get("imagined_success")})
    return results | {
        "phases": phases,
        "comparison": [
            _summarize_comparison(*pair, facts, about) for pair in pairs if _name("compare", *pair) in facts
        ],
        "closed_loop": [
            _summarize_closed_loop(*pair, facts, about) for pair in pairs if _name("closed", *pair) in facts
        ],
    }


def training_world(round_: int, pace: bool) -> int:
    """Returns the round of the world model in which a round's policy learned; the first one for the base policy."""
    return max(round_ - 1, 0) if pace else 0


def _name(kind: str, round_: int, world: int) -> str:
    return f"{kind}-{round_}-in-world-{world}"


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
        "policy": name_policy(round_, about),
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
    return {"policy": name_policy(round_, about), "world": f"world model of round {world + 1}"} | kinds
