"""The whole loop at the smallest size: every stage runs, resumes, and says what is wrong."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import pytest

from wovr_jax import assets, pace
from wovr_jax.config import ConfigError, from_dict, to_dict
from wovr_jax.data.batches import NoDataError
from wovr_jax.grpo import GRPOConfig
from wovr_jax.learner import LearnerConfig
from wovr_jax.policy import vla
from wovr_jax.policy.train import SFTConfig
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.recipe import CollectConfig, DreamConfig, EvaluateConfig, Recipe, RefreshConfig, StartsConfig
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.reward.train import RewardTrainConfig
from wovr_jax.run import RunError
from wovr_jax.sim.experts import ExpertConfig
from wovr_jax.sim.tabletop import TabletopConfig
from wovr_jax.world.model import WorldConfig, networks
from wovr_jax.world.train import WorldTrainConfig


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Random stand-ins of the pretrained parts at the fake sizes."""
    folder = tmp_path_factory.mktemp("assets")
    world, policy = WorldConfig.fake(), VLAConfig.fake()
    weights = vla.network(policy).init(jax.random.key(0))
    vae = networks(world)[1].init(jax.random.key(1))
    for name, cfg, params in (
        ("vae", world.vae, vae),
        ("dino", policy.dino, weights["dino"]),
        ("siglip", policy.siglip, weights["siglip"]),
    ):
        assets.save_asset(name, cfg, params, training={}, scores={}, folder=folder)
    return folder


def _recipe(parts: pathlib.Path, **changes: Any) -> dict[str, Any]:
    recipe = Recipe(
        policy=VLAConfig.fake(),
        world=WorldConfig.fake(),
        reward=RewardConfig.fake(),
        assets=str(parts),
        vae="vae",
        towers=("dino", "siglip"),
        temperature=1.0,
        sim=TabletopConfig.fake(),
        expert=ExpertConfig(flawed_share=0.5),
        collect=CollectConfig(demonstrations=32, first=8, again=8, batch=8),
        sft=SFTConfig.fake(),
        world_train=WorldTrainConfig.fake(),
        refresh=RefreshConfig(steps=2),
        reward_train=RewardTrainConfig.fake(steps=4, extra=0.25),
        starts=StartsConfig(share=0.5),
        dream=DreamConfig(groups=2, chunks=2, updates=(2, 1)),
        learner=LearnerConfig.fake(grpo=GRPOConfig.fake()),
        evaluate=EvaluateConfig(episodes=8, batch=8, compare=8, videos=1),
    )
    return to_dict(dataclasses.replace(recipe, **changes))


def test_the_whole_loop_runs_and_reports(parts: pathlib.Path, tmp_path: pathlib.Path) -> None:
    results = pace.run("pace", _recipe(parts), tmp_path / "run")
    assert [phase["name"] for phase in results["phases"]] == ["base", "after imagined GRPO", "after PACE"]
    learner = [account for name, account in results["ledger"].items() if name.startswith("grpo-")]
    assert [account["true_steps"] for account in learner] == [0, 0]
    assert all(account["imagined_frames"] > 0 for account in learner)
    assert (tmp_path / "run" / "report.html").is_file()
    assert json.loads((tmp_path / "run" / "results.json").read_text())["seed"] == 0


def test_another_seed_is_refused_in_the_same_folder(parts: pathlib.Path, tmp_path: pathlib.Path) -> None:
    pace.run("collect", _recipe(parts), tmp_path / "run")
    with pytest.raises(RunError, match="seed: 0 there, 1 asked"):
        pace.run("collect", _recipe(parts, seed=1), tmp_path / "run")


def test_demonstrations_without_success_stop_the_run_with_the_reason(
    parts: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    hopeless = _recipe(parts, expert=ExpertConfig(flawed_share=1.0, noise=0.0, flip=0.0))
    with pytest.raises(NoDataError, match="needs both"):
        pace.run("reward", hopeless, tmp_path / "run")


def test_unknown_job_is_named(parts: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="expected one of pace, sft"):
        pace.run("paec", _recipe(parts), tmp_path / "run")


def test_actor_and_learner_must_share_a_temperature(parts: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="actor and learner"):
        from_dict(Recipe, _recipe(parts) | {"temperature": 1.6})
