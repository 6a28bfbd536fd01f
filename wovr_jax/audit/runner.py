"""Audits a run: which policies meet which worlds, as stages of the run's own folder.

The run itself is over. :func:`audit` passes its finished stages as the loop does, computes none of them again, and adds
its own: each is made once and kept, and what it found stands in ``results.json`` beside what the training found.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from wovr_jax.audit import trust
from wovr_jax.audit.closed_loop import close_loop, find_starts
from wovr_jax.audit.replay import replay
from wovr_jax.audit.trust import TrustConfig
from wovr_jax.audit.witnesses import open_witness
from wovr_jax.core import config, history, keys, machine, processes, sharding
from wovr_jax.core.disk import read_json, write_json
from wovr_jax.core.sharding import MeshConfig
from wovr_jax.pace import JOBS, pace, summarize_run
from wovr_jax.report.comparisons import add_comparisons, training_world
from wovr_jax.run.bind import Products, bind_stages, improvement
from wovr_jax.run.folder import Run, RunError
from wovr_jax.run.reader import read_recipe
from wovr_jax.run.recipe import Recipe

STAGES = ("compare-", "closed-")
"""How the names of an audit's stages begin."""


def audit(
    folder: str | os.PathLike,
    mesh: Mapping[str, int] | None = None,
    asked: TrustConfig | None = None,
    *,
    ladder: bool = False,
    signs: bool = False,
    twins: bool = False,
) -> dict[str, dict[str, Any]]:
    """Holds the imagination of a finished run against the truth; what is there already is not made again.

    Args:
      folder: the run folder.
      mesh: devices along each axis, see ``core.sharding.MeshConfig``; by default as the run began.
      asked: whether the worlds can rank policies and how far they can be followed, see ``trust``; None: not asked.
      ladder, signs, twins: see ``trust.ask``.

    Returns:
      The facts of the audit's stages, by their names; none for a run without a learned world and its judge.

    Raises:
      RunError: no run folder, that of a study, or of a run that is not finished.
      ShardingError: a mesh that the devices cannot form.
    """
    folder, begin = pathlib.Path(folder), time.perf_counter()
    recipe = _read_recipe(folder)
    if mesh is not None:
        recipe = dataclasses.replace(recipe, mesh=config.from_dict(MeshConfig, mesh))
    # Nothing of the run is trained, but the policies of a ladder are, and keep their state as the run did.
    with sharding.use(recipe.mesh), history.use(recipe.checkpoints):
        run = _FinishedRun(folder, config.to_dict(recipe))
        machine.enable_compile_cache(run.folder.parent / ".jax_cache")
        made = _pass_stages(recipe, run)
        if made.worlds and made.rewards:
            audit_policies(recipe, run, made)
            if asked is not None:
                trust.ask(recipe, run, made, asked, ladder=ladder, signs=signs, twins=twins)
            about = {"rounds": recipe.rounds, "pace": recipe.pace, "online": recipe.dream.world == "true"}
            results = add_comparisons(summarize_run(recipe, run, time.perf_counter() - begin), about, run.facts)
            # The training may have needed more than the audit of it.
            if (path := run.folder / "results.json").exists():
                results["peak_rss_gb"] = max(results["peak_rss_gb"], read_json(path).get("peak_rss_gb", 0.0))
            # What was asked once stays in the results, whoever puts them together again.
            write_json(path, results | trust.read(run.folder))
        else:
            processes.say(f"{folder}: no learned world with a judge was made here, so there is nothing to audit.")
    run.close()
    return {name: facts for name, facts in run.facts.items() if name.startswith(STAGES)}


def audit_policies(recipe: Recipe, run: Run, made: Products) -> None:
    """Has every policy of a run, whose true success was measured, meet every world that it had to do with."""
    do, rl, key = bind_stages(recipe, run, made), improvement(recipe), functools.partial(keys.key, recipe.seed)
    witness, prompt_KL, asked = open_witness(recipe, do.env), do.env.prompt_KL, recipe.evaluate
    assert made.vae is not None
    unknown = [k for k in range(len(made.policies)) if f"evaluate-{k}" not in run.facts]
    if unknown:
        processes.say(f"Left out are the policies of rounds {unknown}: their true success was not measured.")
    for k, w in list_meetings(len(made.policies), len(made.worlds), recipe.pace):
        if k in unknown:
            continue
        learned = (made.vae, made.worlds[w], made.rewards[w])
        replay(run, k, w, witness, asked, do.act(k, "evaluate"), recipe.reward, *learned, key)
        if asked.closed:
            how = (witness, asked.closed, recipe.collect.batch, rl, do.codec, prompt_KL)
            close_loop(run, k, w, *how, made.policies[k], find_starts(w, recipe, made), *learned, key)


def list_meetings(policies: int, worlds: int, pace: bool) -> list[tuple[int, int]]:
    """Returns (policy, world) by their rounds: each in the world that taught it, and in the one refreshed for it."""
    return [(k, w) for k in range(policies) for w in sorted({training_world(k, pace), min(k, worlds - 1)})]


class _FinishedRun(Run):
    """A run of which nothing is made any more but its audit."""

    def _make(self, name: str, make: Callable[[pathlib.Path], Mapping[str, Any]], folder: pathlib.Path) -> None:
        # What pretraining has seen is only read off files; runs of earlier versions did not count it.
        if not name.startswith((*STAGES, "pretrained")):
            raise RunError(
                f"{self.folder}: {name} is not finished, and an audit trains nothing; go on with the command of "
                "launch/train.py that began this run."
            )
        super()._make(name, make, folder)


def _read_recipe(folder: pathlib.Path) -> Recipe:
    """Returns the settings of a run that ``pace`` made."""
    try:
        recipe = read_recipe(read_json(folder / "config.json"))
    except OSError as error:
        raise RunError(
            f"{folder} is not a run folder: there is no config.json in it. Runs are made by launch/train.py."
        ) from error
    if recipe.job not in JOBS:
        raise RunError(f"{folder}: expected a run of launch/train.py, got one of job {recipe.job!r}.")
    return recipe


def _pass_stages(recipe: Recipe, run: Run) -> Products:
    """Returns what a run made; each product is loaded when it is first used."""
    # A study measures some of its policies only.
    measured = tuple(k for k in range(recipe.rounds + 1) if f"evaluate-{k}" in run.facts)
    return pace(recipe, run, dataclasses.replace(JOBS[recipe.job], measured=measured))
