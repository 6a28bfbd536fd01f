"""PACE: the policy and the world model co-evolve, stage by stage, in a resumable run.

    base policy -> collect -> world model, reward, starts -> imagined GRPO -> evaluate
                 ^                                                              |
                 +---------- collect with the evolved policy (refresh) <--------+

WoVR, section 4.3. The order of the stages follows from what each product needs (``stages``);
this file only asks for the products of a job and writes down what came out.
"""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from wovr_jax import config, report, runtime, studies
from wovr_jax.recipe import Recipe
from wovr_jax.run import Run, write_json
from wovr_jax.stages import Stages

Results = dict[str, Any]


def run(job: str, settings: Mapping[str, Any], folder: str | os.PathLike) -> Results:
    """Runs a job in a run folder and returns ``results.json``.

    Args:
      job: a name in ``JOBS``.
      settings: a plain dictionary, see ``recipe.Recipe``.
      folder: the run folder; the same settings continue what is there.

    Raises:
      ConfigError: settings that do not fit, an unknown job.
      RunError: a folder that holds something else.
    """
    if job not in JOBS and job not in studies.STUDIES:
        raise config.ConfigError(f"config.job: expected one of {', '.join((*JOBS, *studies.STUDIES))}, got {job!r}.")
    recipe = config.from_dict(Recipe, settings)
    opened = Run(folder, config.to_dict(recipe))
    runtime.enable_compile_cache(opened.folder.parent / ".jax_cache")
    begin = time.perf_counter()
    if job in studies.STUDIES:
        results = _studied(job, recipe, opened.folder) | {"seconds": time.perf_counter() - begin}
    else:
        stages = Stages(recipe, opened)
        JOBS[job](stages)
        results = summary(stages, time.perf_counter() - begin)
    opened.log.close()
    write_json(opened.folder / "results.json", results)
    report.write(opened.folder)
    return results


def pace(stages: Stages) -> None:
    """The whole loop: evaluate the base policy and the policy after each round."""
    for round_ in range(stages.recipe.rounds + 1):
        stages.evaluated(round_)
        for world_round in _worlds(round_, stages.recipe.rounds):
            stages.compared(round_, world_round)


def _worlds(round_: int, rounds: int) -> list[int]:
    """Worlds to hold a policy against: the one that trained it, and its refresh when there is one."""
    return [world for world in (round_ - 1, round_) if 0 <= world < rounds]


JOBS: dict[str, Callable[[Stages], Any]] = {
    "pace": pace,
    "sft": lambda stages: stages.evaluated(0),
    "collect": lambda stages: stages.collected(0),
    "world_model": lambda stages: stages.world(0),
    "reward": lambda stages: stages.reward(0),
    "grpo": lambda stages: (stages.evaluated(0), stages.evaluated(1)),
    "online_grpo": lambda stages: (stages.evaluated(0), stages.evaluated(1)),
}


def _studied(job: str, recipe: Recipe, folder: pathlib.Path) -> Results:
    """The results of a study: its table in the place of phases."""
    table = studies.study(job, recipe, folder)
    facts = {"name": recipe.name, "job": job, "seed": recipe.seeds[0], "versions": runtime.versions()}
    return facts | {"device": runtime.device_name(), "peak_rss_gb": runtime.peak_rss_gb(), "phases": [], "study": table}


def summary(stages: Stages, seconds: float) -> Results:
    """``results.json``: phases in order, verdicts, reward, keyframes, ledger, machine."""
    recipe, facts = stages.recipe, stages.run.facts
    ledger = stages.run.ledger()
    rewards = [name for name in facts if name.startswith("reward-")]
    starts = [name for name in facts if name.startswith("starts-")]
    return {
        "name": recipe.name,
        "job": recipe.job,
        "seed": recipe.seed,
        "versions": runtime.versions(),
        "device": runtime.device_name(),
        "seconds": ledger.total().seconds,
        "seconds_now": seconds,
        "peak_rss_gb": runtime.peak_rss_gb(),
        "phases": [_phase(k, facts, recipe) for k in range(recipe.rounds + 1) if f"evaluate-{k}" in facts],
        "comparison": [_comparison(name, one) for name, one in facts.items() if name.startswith("compare-")],
        "reward": _reward(facts[rewards[-1]]) if rewards else None,
        "keyframes": {key: facts[starts[-1]][key] for key in ("steps", "rules")} if starts else None,
        "ledger": ledger.to_dict(),
        "videos": [
            {"title": f"{name}, {video}", "path": str(pathlib.Path("stages") / name / video)}
            for name, one in facts.items()
            for video in one.get("videos", [])
        ],
    }


def _phase(round_: int, facts: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    names = ["base", "after imagined GRPO"] + [f"after PACE round {k}" for k in range(1, recipe.rounds)]
    imagined = facts.get(f"compare-{round_}-in-world-{max(round_ - 1, 0)}", {}).get("imagined_success")
    one = facts[f"evaluate-{round_}"]
    return {"name": names[round_], "imagined_success": imagined} | {
        key: one[key] for key in ("true_success", "greedy", "subgoals")
    }


def _comparison(name: str, one: Mapping[str, Any]) -> dict[str, Any]:
    return {"phase": name.removeprefix("compare-"), "psnr": one["psnr"]} | one["verdicts"]


def _reward(one: Mapping[str, Any]) -> dict[str, Any]:
    table = one.get("imagined", one["real"])["reliability"]
    edges = table["edges"]
    bins = [
        {"low": low, "high": high, "mean_prob": prob, "frequency": seen, "count": count}
        for low, high, prob, seen, count in zip(
            edges, edges[1:], table["predicted"], table["observed"], table["count"], strict=False
        )
    ]
    frame = one["real"]["frame"]
    return {"bins": bins, "threshold": one["threshold"], "frame_tpr": frame["tpr"], "frame_fpr": frame["fpr"]}
