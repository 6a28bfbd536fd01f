"""A whole run at the smallest size: its settings, and random stand-ins of the pretrained parts."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax

from tests.sizes import fake_learner, fake_reward_train, fake_sft, fake_world_train
from wovr_jax import pace
from wovr_jax.audit.runner import audit
from wovr_jax.core.config import to_dict
from wovr_jax.core.disk import read_json
from wovr_jax.grpo import GRPOConfig
from wovr_jax.policy import vla
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.run.recipe import CollectConfig, DreamConfig, EvaluateConfig, Recipe, RefreshConfig, StartsConfig
from wovr_jax.sim.tabletop.expert import ExpertConfig
from wovr_jax.sim.tabletop.table import TabletopConfig
from wovr_jax.weights import native
from wovr_jax.world.model import WorldConfig, networks


def save_parts(folder: pathlib.Path) -> pathlib.Path:
    """Writes a VAE and two towers of the fake sizes into ``folder``."""
    world, policy = WorldConfig.fake(), VLAConfig.fake()
    weights = vla.network(policy).init(jax.random.key(0))
    vae = networks(world)[1].init(jax.random.key(1))
    for name, cfg, params in (
        ("vae", world.vae, vae),
        ("dino", policy.dino, weights["dino"]),
        ("siglip", policy.siglip, weights["siglip"]),
    ):
        native.save_asset(name, cfg, params, training={}, scores={}, folder=folder)
    return folder


def small_settings(parts: pathlib.Path, **changes: Any) -> dict[str, Any]:
    """Settings of a run whose pretrained parts lie in ``parts``."""
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
        collect=CollectConfig(demonstrations=32, validation=4, first=8, again=8, batch=8),
        sft=fake_sft(),
        world_train=fake_world_train(),
        refresh=RefreshConfig(steps=2),
        reward_train=fake_reward_train(steps=4, extra=0.25),
        starts=StartsConfig(share=0.5),
        dream=DreamConfig(groups=4, chunks=2, updates=(2, 1)),
        # At this size all rollouts of a group end alike; the entropy bonus moves the policy all the same.
        learner=fake_learner(grpo=GRPOConfig.fake(group=4, entropy=0.1)),
        evaluate=EvaluateConfig(episodes=8, compare=8, videos=1, closed=4),
    )
    return to_dict(dataclasses.replace(recipe, **changes))


def run_whole(settings: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    """Runs the loop and audits it, as launch/train.py does; returns what results.json holds then."""
    pace.run("pace", settings, folder)
    audit(folder)
    return read_json(folder / "results.json")
