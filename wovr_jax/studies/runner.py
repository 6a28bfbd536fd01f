"""Runs a study, or probes a world model that a run has trained: what launch/study.py asks for.

A study is many trainings that differ in one thing, and ends in one table (``variants``, ``world_parts``). The training
entry knows nothing of studies: it stays small, and a study calls what it needs.
"""

from __future__ import annotations

import json
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from wovr_jax.core import config, history, keys, machine, pixels, processes, sharding
from wovr_jax.core.disk import write_json
from wovr_jax.pace import Job, pace
from wovr_jax.report import page
from wovr_jax.report import results as results_file
from wovr_jax.run.folder import MARK, Run, RunError
from wovr_jax.run.reader import read_recipe
from wovr_jax.run.recipe import Recipe
from wovr_jax.sim.arena import layouts
from wovr_jax.studies import probe as probing
from wovr_jax.studies import senses, variants, world_parts
from wovr_jax.types import Params
from wovr_jax.world.model import WorldConfig

Results = dict[str, Any]

WORLDS = {world_parts.JOB: world_parts.study, senses.JOB: senses.study}
"""The studies of a world model alone."""
JOBS = (*variants.STUDIES, *WORLDS)


def run(job: str, settings: Mapping[str, Any], folder: str | os.PathLike, *, allow_change: bool = False) -> Results:
    """Runs a study in a run folder and returns ``results.json``; the same settings continue what is there.

    Args:
      job: one of ``JOBS``.
      settings: a plain dictionary, see ``run.recipe.Recipe``.
      folder: the run folder. Each variant has a run of its own inside it.
      allow_change: whether other settings may go on in it, see ``run.folder.Run``.

    Raises:
      ConfigError: settings that do not fit, an unknown study, or several processes.
      RunError: a folder that holds something else.
    """
    if job not in JOBS:
        raise config.ConfigError(f"config.job: expected one of {', '.join(JOBS)}, got {job!r}.")
    recipe = config.from_dict(Recipe, settings)
    # Its runs are many small ones: several machines share them better than they share one of them.
    if processes.count() > 1:
        raise config.ConfigError(f"config.job: a study ({job}) runs in one process; several can share one of its runs.")
    begin = time.perf_counter()
    with sharding.use(recipe.mesh), history.use(recipe.checkpoints):
        opened = Run(folder, config.to_dict(recipe), allow_change=allow_change)
        machine.enable_compile_cache(opened.folder.parent / ".jax_cache")
        # A study has many seeds; the results name the first, and the tables count them all.
        about = {"name": recipe.name, "job": job, "seed": recipe.seeds[0]}
        facts = results_file.describe_run(about) | {"phases": []}

        def complete(tables: Results) -> Results:
            return facts | {"peak_rss_gb": machine.peak_rss_gb(), **tables}

        def keep(tables: Results) -> None:
            # A study takes hours; what has run so far can be read meanwhile.
            write_json(opened.folder / "results.json", complete(tables))
            page.write(opened.folder)

        if job in WORLDS:
            tables = WORLDS[job](recipe, opened, keep)
        else:
            tables = variants.study(job, recipe, opened.folder, keep)
        results = complete(tables) | {"seconds": time.perf_counter() - begin}
    write_json(opened.folder / "results.json", results)
    page.write(opened.folder)
    opened.close()
    return results


def probe(folder: pathlib.Path, stage: str | None, starts: int) -> tuple[str, Results, pathlib.Path]:
    """Asks a world model of a run whether it obeys; writes numbers and a picture to ``<folder>/probe``.

    Args:
      folder: the run folder.
      stage: which of its world models; None for the one that finished last.
      starts: start frames to average over; no stage trains on them.

    Returns:
      The stage, the numbers of ``probe.probe``, and the path of the picture.

    Raises:
      RunError: no run folder, a run on LIBERO or relay, or no such world model in it.
    """
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(
            f"{folder} is not a run folder: there is no config.json in it. Runs are made by launch/train.py."
        ) from error
    recipe = read_recipe(settings)
    if recipe.outside or recipe.relay:
        where = "LIBERO" if recipe.libero else "a robot" if recipe.recorded else "relay"
        raise RunError(f"{folder} is a run on {where}; only the embedded table can be asked where its gripper is.")
    # Before anything is compiled: a misspelt stage is answered at once.
    stage = _choose_model(folder, recipe.job, stage)
    machine.enable_compile_cache(folder.parent / ".jax_cache")
    recipe, cfg, params = _load_model(recipe, _LookedAt(folder, config.to_dict(recipe)), stage)
    # Layouts of the evaluation, which no stage trains on, whatever model is asked.
    key, seeds = keys.key(recipe.seed, "probe"), layouts(recipe.seed, "evaluate", starts)
    numbers = probing.probe(cfg, params, recipe.sim, seeds, key)
    sheet = probing.sheet(cfg, params, recipe.sim, seeds[0], key)
    # The numbers go beside the picture, so that several stages can be held against each other later.
    picture = pixels.image(folder / "probe" / f"{stage}.png", sheet)
    write_json(picture.with_suffix(".json"), {"stage": stage, "starts": starts, **numbers})
    return stage, numbers, picture


class _LookedAt(Run):
    """A run of which nothing is made, so that it may be another process's at the same time."""

    def _claim(self, allow_change: bool) -> None:
        del allow_change


def _choose_model(folder: pathlib.Path, job: str, stage: str | None) -> str:
    """Returns the name of a finished stage that holds a world model: ``stage``, or the one that finished last."""
    pattern = "*-seed*" if job == world_parts.JOB else "world-*"
    # A world model is whole weights, or adapters beside those that it began with.
    products = [*folder.glob(f"stages/{pattern}/dit"), *folder.glob(f"stages/{pattern}/adapters")]
    # Without its mark a stage is still in the making, and its weights are those of an earlier step or half written.
    done = [path.parent for path in products if (path.parent / MARK).is_file()]
    names = [path.name for path in sorted(done, key=lambda path: (path / MARK).stat().st_mtime)]
    if not names:
        raise RunError(f"{folder} holds no finished world model yet; let the run go on.")
    if stage and stage not in names:
        raise RunError(f"{folder} has no finished world model {stage}; it has {', '.join(names)}.")
    return stage or names[-1]


def _load_model(recipe: Recipe, opened: Run, stage: str) -> tuple[Recipe, WorldConfig, Params]:
    """Returns the recipe, with the seed of the stage, and settings and weights of the stage's world model."""
    if recipe.job == world_parts.JOB:
        return world_parts.load(recipe, opened, *stage.rsplit("-seed", 1))
    # Passes the finished stages on the way to this one and loads none of them: nothing is trained.
    made = pace(recipe, opened, Job(until=stage, measured=()))
    assert made.vae is not None
    return recipe, made.vae.value[0], made.worlds[-1].value
