"""PACE: the policy and the world model co-evolve, stage by stage, in a resumable run.

    base policy -> collect -> world model, reward, starts -> imagined GRPO -> evaluate
                 ^                                                              |
                 +---------- collect with the evolved policy (refresh) <--------+

WoVR, section 4.3. The order of the stages follows from what each product needs (``stages``);
this file only asks for the products of a job and writes down what came out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from wovr_jax.core import config, history, machine, processes, sharding
from wovr_jax.core.disk import write_json
from wovr_jax.report import page as report
from wovr_jax.report import results as report_results
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
    return _summary(stages, time.perf_counter() - begin)


def pace(stages: Stages) -> None:
    """The whole loop: evaluate the base policy and the policy after each round."""
    for round_ in range(stages.recipe.rounds + 1):
        stages.evaluated(round_)
        for world_round in _worlds(round_, stages.recipe):
            stages.compared(round_, world_round)


def _worlds(round_: int, recipe: Recipe) -> list[int]:
    """Worlds to hold a policy against: the one that trained it, and its refresh when there is one."""
    refreshed = recipe.pace and 0 < round_ < recipe.rounds
    return [report_results.training_world(round_, recipe.pace), *([round_] if refreshed else [])]


JOBS: dict[str, Callable[[Stages], Any]] = {
    "pace": pace,
    "sft": lambda stages: stages.evaluated(0),
    "collect": lambda stages: stages.collected(0),
    "world_model": lambda stages: stages.world(0),
    "reward": lambda stages: stages.reward(0),
    "grpo": lambda stages: (stages.evaluated(0), stages.evaluated(1)),
    "online_grpo": lambda stages: (stages.evaluated(0), stages.evaluated(1)),
}


def _summary(stages: Stages, seconds: float) -> Results:
    """The results of a run, from what its stages left."""
    recipe, run = stages.recipe, stages.run
    about = {"name": recipe.name, "job": recipe.job, "seed": recipe.seed, "rounds": recipe.rounds}
    about |= {"pace": recipe.pace, "online": recipe.dream.world == "true"}
    return report_results.summarize(about, run.facts, run.ledger().to_dict(), seconds)
