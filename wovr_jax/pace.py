"""PACE: the policy and the world model co-evolve (WoVR, Algorithm 1 and section 4.3).

::

    demonstrations -> base policy
    each round:  collect true episodes -> world model -> success classifier -> start states
                 -> improve the policy in imagination -> ask the truth

:func:`pace` is the algorithm, in the order in which it happens. Each call is a stage of ``run/stages/``: made once,
kept in the run folder, and passed over when the same command goes on. A product is loaded when it is first used, so
a run that is resumed does not read what it does not need.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from typing import Any

from wovr_jax.core import config, history, machine, sharding
from wovr_jax.core.disk import write_json
from wovr_jax.report.results import Results, summarize
from wovr_jax.run.bind import OpenGate, Products, bind_stages
from wovr_jax.run.folder import Run, RunError
from wovr_jax.run.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Job:
    """How far a run goes, and what it measures on the way.

    Attributes:
      until: the last stage; empty for all of them.
      measured: policies whose true success is measured, by their round; None for every one.
    """

    until: str = ""
    measured: tuple[int, ...] | None = None


JOBS = {
    "pace": Job(),
    "sft": Job("evaluate-0"),
    "collect": Job("collect-0", ()),
    "world_model": Job("world-0", ()),
    "reward": Job("reward-0", ()),
    "grpo": Job("evaluate-1"),
    "online_grpo": Job("evaluate-1"),
}


def pace(recipe: Recipe, run: Run, job: Job = JOBS["pace"], gate: OpenGate = None) -> Products:
    """Runs Algorithm 1 and returns what it made.

    Args:
      recipe: the settings of all stages.
      run: the open run folder.
      job: how far to go, and what to measure on the way.
      gate: of imagined rollouts, see ``audit.gates``.

    Raises:
      ConfigError: weights that are not there, or of another network.
      RunError: a job whose last stage these settings do not have.
    """
    made = Products()
    run.before_stage = made.release
    do = bind_stages(recipe, run, made, gate)
    # Online RL needs no learned world, unless the job is to make one; without keyframes it needs layouts only, and its
    # whole budget is for the learner.
    online = recipe.dream.world == "true" and not recipe.starts.share
    asked = job.until.partition("-")[0]
    judges = recipe.dream.reward == "learned" or asked == "reward"
    imagines = judges or recipe.dream.world != "true" or asked == "world"
    judged, imagined = judges and recipe.reward_train.steps, imagines and recipe.world_train.steps
    # True episodes are for whoever learns from them; where all of imagination is given, nobody does.
    collects = asked == "collect" or bool(imagined or judged or not (online or recipe.start_states))
    # What is given has no stage, and a run that waits for its end would do everything else first.
    if not {"world": imagined, "reward": judged, "evaluate": recipe.evaluate.episodes}.get(asked, True):
        raise RunError(f"{run.folder}: with these settings no stage is called {job.until!r}, which should be last.")

    with run.stop_after(job.until):
        # What comes from outside was paid for as well.
        do.count_pretraining()
        made.demonstrations = do.demonstrate()
        made.policies += [do.fine_tune(made.demonstrations)]
        # What the base policy can do is what every gain is held against.
        if job.measured is None or 0 in job.measured:
            do.measure(0)

        for round_ in range(recipe.rounds):
            # The policy shows where it is now, and what imagination is made of catches up with it.
            if round_ == 0 or recipe.pace:
                if collects:
                    made.rollouts += [do.collect(round_, do.act(round_, f"collect-{round_}"))]
                if imagines:
                    made.vae = made.vae or do.open_vae(made.demonstrations)
                    made.worlds += [do.fit_world(round_, made.vae, made.worlds, made.rollouts, made.demonstrations)]
                if judges:
                    learned = (made.vae, made.worlds[-1])
                    made.rewards += [do.fit_reward(round_, *learned, made.rollouts, made.demonstrations)]
                # An arena that explores begins its own episodes.
                if do.explore is None:
                    made.starts += [do.choose_starts(round_, [do.begin()] if online else made.rollouts)]

            # Imagine from the newest start states in the newest world, update the policy, and again.
            made.policies += [do.improve(round_)]

            # Ask the truth how good it is now; ``audit`` asks whether what it was paid for in imagination is true.
            if job.measured is None or round_ + 1 in job.measured:
                do.measure(round_ + 1)
    return made


def run(job: str, settings: Mapping[str, Any], folder: str | os.PathLike, *, allow_change: bool = False) -> Results:
    """Runs a job in a run folder and returns ``results.json``.

    Args:
      job: a name in ``JOBS``.
      settings: a plain dictionary, see ``run.recipe.Recipe``.
      folder: the run folder; the same settings continue what is there.
      allow_change: whether other settings may go on in it, see ``run.folder.Run``.

    Raises:
      ConfigError: settings that do not fit, an unknown job.
      RunError: a folder that holds something else.
      ShardingError: a mesh that the devices cannot form, or on which a network cannot lie.
    """
    if job not in JOBS:
        raise config.ConfigError(f"config.job: expected one of {', '.join(JOBS)}, got {job!r}.")
    recipe, begin = config.from_dict(Recipe, settings), time.perf_counter()
    # Every array of the run lies on this mesh, so it comes before the first of them.
    with sharding.use(recipe.mesh), history.use(recipe.checkpoints):
        opened = Run(folder, config.to_dict(recipe), allow_change=allow_change)
        # Beside the run and not in it: runs of one folder share their programs.
        machine.enable_compile_cache(opened.folder.parent / ".jax_cache")
        pace(recipe, opened, JOBS[job])
        results = summarize_run(recipe, opened, time.perf_counter() - begin)
    write_json(opened.folder / "results.json", results)
    opened.close()
    return results


def summarize_run(recipe: Recipe, run: Run, seconds: float) -> Results:
    """``results.json``: phases in order, verdicts, rewards, keyframes, ledger, machine."""
    about = {name: getattr(recipe, name) for name in ("name", "job", "seed", "rounds", "pace")}
    return summarize(about | {"online": recipe.dream.world == "true"}, run.facts, run.ledger(), seconds)
