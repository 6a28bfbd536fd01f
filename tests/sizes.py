"""The smallest settings of trainings, and fresh weights, that several tests begin with."""

from __future__ import annotations

from typing import Any

import jax

from wovr_jax.grpo import GRPOConfig
from wovr_jax.learner import LearnerConfig
from wovr_jax.policy.train import SFTConfig
from wovr_jax.reward.train import RewardTrainConfig
from wovr_jax.types import Array, Params
from wovr_jax.world.model import WorldConfig, networks
from wovr_jax.world.train import WorldTrainConfig


def fake_sft() -> SFTConfig:
    """A few steps of a few chunks."""
    return SFTConfig(steps=4, batch=2, warmup=1)


def fake_world_train(**changes: Any) -> WorldTrainConfig:
    """A few steps of a few windows."""
    return WorldTrainConfig(**{"steps": 4, "batch": 3, "warmup": 1} | changes)


def fake_reward_train(**changes: Any) -> RewardTrainConfig:
    """Small and fast."""
    return RewardTrainConfig(**{"lr": 1e-2, "batch": 16, "steps": 0} | changes)


def fake_learner(**changes: Any) -> LearnerConfig:
    """One plain, large step."""
    small = {"lr": 0.1, "weight_decay": 0.0, "minibatches": 1, "microbatch": 4, "grpo": GRPOConfig.fake()}
    return LearnerConfig(**small | changes)


def draw_world(cfg: WorldConfig, key: Array) -> Params:
    """Draws fresh parameters ``{"dit": ..., "vae": ...}``."""
    transformer, vae = networks(cfg)
    return {"dit": transformer.init(jax.random.fold_in(key, 0)), "vae": vae.init(jax.random.fold_in(key, 1))}
