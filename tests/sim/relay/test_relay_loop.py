"""The loop on the second embedded simulator: its preset, its words, every stage, and a world that is the truth."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from configs import pace as presets
from tests.small_run import save_parts, small_settings
from wovr_jax import pace
from wovr_jax.core.config import ConfigError, from_dict, to_dict
from wovr_jax.export import source
from wovr_jax.policy.tokenizer import Tokenizer
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.run.bind import open_environment
from wovr_jax.run.folder import Run, RunError
from wovr_jax.run.recipe import DreamConfig, Recipe
from wovr_jax.sim.libero.tasks import LiberoConfig
from wovr_jax.sim.relay.table import RelayConfig
from wovr_jax.sim.tabletop.expert import ExpertConfig
from wovr_jax.studies import runner, world_parts


def _recipe(folder: pathlib.Path, **changes: Any) -> Recipe:
    """The smallest run of relay: the fake policy with its words."""
    words = Tokenizer.relay()
    policy = dataclasses.replace(VLAConfig.fake(), vocab_size=words.vocab_size, pad=words.pad)
    settings = {"relay": RelayConfig.fake(), "policy": policy, "expert": ExpertConfig(flaw="none")}
    return from_dict(Recipe, small_settings(save_parts(folder), **settings | changes))


def test_the_preset_is_of_twelve_chunks_and_has_the_words() -> None:
    recipe = from_dict(Recipe, json.loads(presets.get_config("relay").to_json()))
    assert recipe.embedded == RelayConfig() and recipe.embedded.horizon == recipe.dream.chunks * recipe.policy.chunk
    environment = open_environment(recipe)
    assert environment.arena.name == "relay" and environment.arena.steps == 96
    assert "press the button" in environment.arena.instructions[0] and environment.prompt_KL.shape == (3, 26)


def test_what_does_not_fit_is_refused(tmp_path: pathlib.Path) -> None:
    recipe = _recipe(tmp_path)
    with pytest.raises(ConfigError, match=r"use size='relay'"):
        open_environment(dataclasses.replace(recipe, policy=VLAConfig.fake()))
    for name, changes in {
        "relay.horizon: expected a multiple of the policy's chunk, 8, got 20": {"relay": RelayConfig(16, horizon=20)},
        "expert.flawed_share: expected 0": {"expert": ExpertConfig(flawed_share=0.1)},
        "relay: expected one true environment": {"libero": LiberoConfig()},
    }.items():
        with pytest.raises(ConfigError, match=name):
            dataclasses.replace(recipe, **changes)


def test_studies_of_the_table_refuse_it(tmp_path: pathlib.Path) -> None:
    recipe = _recipe(tmp_path)
    run = Run(tmp_path / "run", to_dict(recipe))
    with pytest.raises(ConfigError, match=r"config\.relay: this study plays episodes of the embedded table only"):
        world_parts.study(recipe, run)
    with pytest.raises(RunError, match="is a run on relay; only the embedded table"):
        runner.probe(tmp_path / "run", None, 2)


@pytest.mark.slow
def test_every_stage_runs_and_the_policy_can_be_exported(tmp_path: pathlib.Path) -> None:
    run = tmp_path / "run"
    results = pace.run("pace", to_dict(_recipe(tmp_path)), run)
    assert [phase["name"] for phase in results["phases"]] == ["base", "after imagined GRPO", "after PACE"]
    assert list(results["phases"][0]["subgoals"]) == ["free", "grasped", "placed", "pressed"]
    assert results["ledger"]["collect-0"]["true_steps"] == 8 * 24
    assert source.from_run(run).key == "relay"


@pytest.mark.slow
def test_the_truth_is_a_world_too(tmp_path: pathlib.Path) -> None:
    """Keyframes begin in the middle of an episode, so the simulator's states are made again from the actions."""
    dream = DreamConfig(groups=4, chunks=2, updates=(1,), world="shadow", reward="true")
    results = pace.run("pace", to_dict(_recipe(tmp_path, dream=dream)), tmp_path / "run")
    assert len(results["phases"]) == 2
