"""PACE: the policy and the world model co-evolve, stage by stage, in a resumable run.

    base policy -> collect -> world model, reward, starts -> imagined GRPO -> evaluate
                 ^                                                              |
                 +---------- collect with the evolved policy (refresh) <--------+

WoVR, section 4.3. The order of the stages follows from what each product needs (``stages``);
this file only asks for the products of a job and writes down what came out.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from wovr_jax.core import config, history, machine, processes, sharding, stats
from wovr_jax.core.disk import write_json
from wovr_jax.report import page as report
from wovr_jax.run.folder import Run
from wovr_jax.run.recipe import Recipe
from wovr_jax.run.stages import Stages

Results = dict[str, Any]


def run(job: str, settings: Mapping[str, Any], folder: str | os.PathLike, *, allow_change: bool = False) -> Results:
    """Runs a job in a run folder and returns ``results.json``.

    Args:
      job: a name in ``JOBS``.
      settings: a plain dictionary, see ``recipe.Recipe``.
      folder: the run folder; the same settings continue what is there.
      allow_change: whether other settings may go on in it, see ``run.Run``.

    Raises:
      ConfigError: settings that do not fit, an unknown job.
      RunError: a folder that holds something else.
      ShardingError: a mesh that the devices cannot form, or on which a network cannot lie.
    """
    if job not in JOBS:
        raise config.ConfigError(f"config.job: expected one of {', '.join(JOBS)}, got {job!r}.")
    recipe = config.from_dict(Recipe, settings)
    with sharding.use(recipe.mesh), history.use(recipe.checkpoints):
        opened = Run(folder, config.to_dict(recipe), allow_change=allow_change)
        machine.enable_compile_cache(opened.folder.parent / ".jax_cache")
        results = _results(job, recipe, opened)
    opened.log.close()
    write_json(opened.folder / "results.json", results)
    if processes.first():
        report.write(opened.folder)
    return results


def _results(job: str, recipe: Recipe, opened: Run) -> Results:
    begin = time.perf_counter()
    stages = Stages(recipe, opened)
    JOBS[job](stages)
    return summary(stages, time.perf_counter() - begin)


def pace(stages: Stages) -> None:
    """The whole loop: evaluate the base policy and the policy after each round."""
    for round_ in range(stages.recipe.rounds + 1):
        stages.evaluated(round_)
        for world_round in _worlds(round_, stages.recipe):
            stages.compared(round_, world_round)


def _worlds(round_: int, recipe: Recipe) -> list[int]:
    """Worlds to hold a policy against: the one that trained it, and its refresh when there is one."""
    refreshed = recipe.pace and 0 < round_ < recipe.rounds
    return [_home(round_, recipe), *([round_] if refreshed else [])]


def _home(round_: int, recipe: Recipe) -> int:
    """The world in which the policy of a round learned; the first one for the base policy."""
    return max(round_ - 1, 0) if recipe.pace else 0


JOBS: dict[str, Callable[[Stages], Any]] = {
    "pace": pace,
    "sft": lambda stages: stages.evaluated(0),
    "collect": lambda stages: stages.collected(0),
    "world_model": lambda stages: stages.world(0),
    "reward": lambda stages: stages.reward(0),
    "grpo": lambda stages: (stages.evaluated(0), stages.evaluated(1)),
    "online_grpo": lambda stages: (stages.evaluated(0), stages.evaluated(1)),
}


def summary(stages: Stages, seconds: float) -> Results:
    """``results.json``: phases in order, verdicts, rewards, keyframes, ledger, machine."""
    recipe, facts = stages.recipe, {name: stages.run.facts[name] for name in sorted(stages.run.facts, key=_place)}
    ledger, rounds = stages.run.ledger(), range(recipe.rounds + 1)
    pairs = [(k, world) for k in rounds for world in rounds if f"compare-{k}-in-world-{world}" in facts]
    return {
        "name": recipe.name,
        "job": recipe.job,
        "seed": recipe.seed,
        "versions": machine.versions(),
        "device": machine.device_name(),
        "seconds": ledger.total().seconds,
        "seconds_now": seconds,
        "peak_rss_gb": machine.peak_rss_gb(),
        "phases": [_phase(k, facts, recipe) for k in rounds if f"evaluate-{k}" in facts],
        "comparison": [_comparison(*pair, facts, recipe) for pair in pairs],
        "reward": {name: one for name, one in facts.items() if name.startswith("reward-")},
        "keyframes": {name: one for name, one in facts.items() if name.startswith("starts-") and one["steps"]},
        "remarks": [f"{name}: {one['said']}" for name, one in facts.items() if one.get("said")],
        "ledger": {name: account for name in facts if (account := ledger.to_dict().get(name))},
    }


ORDER = ("demonstrations", "sft", "grpo", "evaluate", "collect", "world", "reward", "starts", "compare")


def _place(stage: str) -> tuple[int, int, str]:
    """Where a stage stands in the loop: a run that was resumed met its stages in another order."""
    kind, round_ = stage.split("-")[0], re.search(r"\d+", stage)
    return int(round_[0]) if round_ else 0, ORDER.index(kind) if kind in ORDER else len(ORDER), stage


def _policy(round_: int, recipe: Recipe) -> str:
    """What a reader calls the policy of a round."""
    if round_ == 0:
        return "base"
    if round_ == 1:
        return "after online GRPO" if recipe.dream.world == "true" else "after imagined GRPO"
    name = "PACE" if recipe.pace else "imagined GRPO without a refresh"
    return f"after {name}" if recipe.rounds == 2 else f"after {name}, round {round_}"


def _phase(round_: int, facts: Mapping[str, Any], recipe: Recipe) -> Results:
    one = facts[f"evaluate-{round_}"]
    imagined = facts.get(f"compare-{round_}-in-world-{_home(round_, recipe)}", {}).get("imagined_success")
    phase = {"name": _policy(round_, recipe), "imagined_success": imagined}
    phase |= {key: one[key] for key in ("true_success", "greedy", "subgoals")}
    return phase | ({"gain": stats.gain(one["outcomes"], facts["evaluate-0"]["outcomes"])} if round_ else {})


def _comparison(round_: int, world: int, facts: Mapping[str, Any], recipe: Recipe) -> Results:
    """Counts, their bias, fidelity and films of a comparison: it replays the first episodes of the evaluation."""
    name = f"compare-{round_}-in-world-{world}"
    one, true = facts[name], facts[f"evaluate-{round_}"]["outcomes"]
    imagined = one.get("imagined_outcomes", [None] * len(one["videos"]))
    tp, fp, fn, tn = (one["verdicts"][count] for count in ("tp", "fp", "fn", "tn"))
    believed = [True] * (tp + fp) + [False] * (fn + tn)
    bias = stats.gain(believed, [True] * tp + [False] * fp + [True] * fn + [False] * tn)
    films = zip(one["videos"], true, imagined, strict=False)
    return one["verdicts"] | {
        "policy": _policy(round_, recipe),
        "world": f"world model of round {world + 1}",
        "bias": bias,
        "psnr": one["psnr"],
        **{how: one.get(how) for how in ("open_fingers", "dropped")},
        "videos": [{"path": f"stages/{name}/{film}", "true": was, "imagined": seen} for film, was, seen in films],
    }
