"""The smallest settings of trainings, and fresh weights, that several tests begin with."""

from __future__ import annotations

from typing import Any

import jax

from wovr_jax.policy.train import SFTConfig
from wovr_jax.types import Array, Params
from wovr_jax.world.model import WorldConfig, networks
from wovr_jax.world.train import WorldTrainConfig


def fake_sft() -> SFTConfig:
    """A few steps of a few chunks."""
    return SFTConfig(steps=4, batch=2, warmup=1)


def fake_world_train(**changes: Any) -> WorldTrainConfig:
    """A few steps of a few windows."""
    return WorldTrainConfig(**{"steps": 4, "batch": 3, "warmup": 1} | changes)


def draw_world(cfg: WorldConfig, key: Array) -> Params:
    """Draws fresh parameters ``{"dit": ..., "vae": ...}``."""
    transformer, vae = networks(cfg)
    return {"dit": transformer.init(jax.random.fold_in(key, 0)), "vae": vae.init(jax.random.fold_in(key, 1))}
