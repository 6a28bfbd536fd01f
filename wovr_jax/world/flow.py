"""Rectified flow with a shifted schedule: training levels, loss weight, Euler sampler.

A latent at noise level sigma is (1 - sigma) x0 + sigma noise, the network predicts the
velocity noise - x0, and it is told time = 1000 sigma. (The paper writes the opposite
orientation; this is the one of the released weights.)
Source: RLinf's DiffSynth-Studio fork, diffsynth/schedulers/flow_match.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax.core.config import Between, Count, Positive, checked
from wovr_jax.types import Array

TIME_SCALE = 1000.0


@checked
@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """The schedule; by default the paper's, with exact times.

    Attributes:
      steps: Euler steps of the sampler.
      shift: how strongly levels crowd towards pure noise; 1 is uniform.
      levels: size of the table from which training draws uniformly.
      round_time: whether the time told to the network is rounded to bfloat16, in training
        and sampling, as the reference does (952.38 becomes 952, 882.35 becomes 884). The
        sampler's levels stay exact; a level of training is looked up again by its rounded time.
    """

    steps: Count = 5
    shift: Positive = 5.0
    levels: Annotated[int, Between(2)] = 1000
    round_time: bool = False

    @classmethod
    def rlinf(cls, **changes) -> FlowConfig:
        """Times as the released weights were trained and run with."""
        return cls(**{"round_time": True} | changes)


def shift_levels(uniform: np.ndarray, shift: float) -> np.ndarray:
    """Returns shift u / (1 + (shift - 1) u)."""
    # Both ends stay, and the odds sigma / (1 - sigma) are multiplied by ``shift``: a large picture, whose neighbouring
    # pixels agree, needs more noise to be hidden as well as a small one.
    return shift * uniform / (1.0 + (shift - 1.0) * uniform)


def sigmas(steps: int, shift: float) -> np.ndarray:
    """Returns the (steps + 1,) levels of the sampler, from 1 down to 0, shifted once.

    5 steps at shift 5: 1, 0.9524, 0.8824, 0.7692, 0.5556, 0.
    """
    # The last level, 0, is joined and not shifted there: a table of ``steps`` levels ends above it.
    return np.append(shift_levels(1.0 - np.arange(steps) / steps, shift), 0.0).astype(np.float32)


def training_levels(cfg: FlowConfig) -> np.ndarray:
    """Returns the (levels,) table of sigmas, from 1 down; training draws its rows uniformly."""
    return shift_levels(1.0 - np.arange(cfg.levels) / cfg.levels, cfg.shift).astype(np.float32)


def draw_levels(key: Array, batch: int, cfg: FlowConfig) -> Array:
    """Draws (B,) sigmas for training."""
    table = training_levels(cfg)
    if cfg.round_time:
        # The reference rounds the time and looks its sigma up again, so neighbouring rows may give one level: noise is
        # added at that level, not at the one drawn. Reproduced, since the released weights were trained so.
        rounded = (TIME_SCALE * table).astype(jnp.bfloat16).astype(np.float32)
        table = table[np.abs(TIME_SCALE * table[None] - rounded[:, None]).argmin(axis=1)]
    row_B = jax.random.randint(key, (batch,), 0, cfg.levels)
    return jnp.asarray(table)[row_B]


def weight(time: Array, cfg: FlowConfig) -> Array:
    """Returns the loss weight of a time: a bump around 500 that is 0 at 1000 and has mean 1 over the table."""
    # exp(-2 ((t - 500) / 1000)^2) less its least value, which it has at pure noise: the middle levels count most, where
    # data and noise are both to be told apart. Divided by the mean, it leaves the scale of the loss as it was.
    table = np.exp(-2.0 * ((TIME_SCALE * training_levels(cfg).astype(np.float64) - 500.0) / 1000.0) ** 2)
    floor, mean = float(table.min()), float(table.mean() - table.min())
    return (jnp.exp(-2.0 * ((time - 500.0) / 1000.0) ** 2) - floor) / mean


def times(sigma: Array, cfg: FlowConfig) -> Array:
    """Returns what the network is told of a level, in [0, 1000], float32."""
    time = TIME_SCALE * sigma.astype(jnp.float32)
    # Not a cast there and back, which a compiler may take away: the eight and seven bits of bfloat16.
    return jax.lax.reduce_precision(time, 8, 7) if cfg.round_time else time


def add_noise(clean: Array, noise: Array, sigma: Array) -> Array:
    """Returns (1 - sigma) clean + sigma noise; ``sigma`` has the rank of the latents."""
    # A straight line from data to noise, so its velocity, noise - clean, is the same at every level.
    return (1.0 - sigma) * clean + sigma * noise


def euler(
    velocity: Callable[[Array, Array], Array], context_Bfhwc: Array, noise_Bfhwc: Array, cfg: FlowConfig
) -> Array:
    """Integrates the flow from noise to the new latent frames behind a clean context.

    The context is written anew before every step: what the network predicts for its frames
    never enters, and its time is 0.

    Args:
      velocity: ``velocity(latent_Bfhwc, time_Bf) -> velocity_Bfhwc`` over the whole window.
      context_Bfhwc: clean latents of the first frames.
      noise_Bfhwc: noise in place of the frames to sample.
      cfg: steps and shift.

    Returns:
      The sampled frames, of the shape of the noise.
    """
    batch, known, new = context_Bfhwc.shape[0], context_Bfhwc.shape[1], noise_Bfhwc.shape[1]
    # The levels are a constant of the program; one scan, so that the network is compiled once for all steps.
    level = jnp.asarray(sigmas(cfg.steps, cfg.shift))

    @jax.named_scope("euler_step")
    def step(latent_Bfhwc: Array, now_next: tuple[Array, Array]) -> tuple[Array, None]:
        now, after = now_next
        # (B, known + new, h, w, c): clean frames at time 0 beside noisy ones at the time of this step.
        window_Bfhwc = jnp.concatenate([context_Bfhwc, latent_Bfhwc], axis=1)
        time_Bf = jnp.concatenate([jnp.zeros((batch, known)), jnp.full((batch, new), times(now, cfg))], axis=1)
        velocity_Bfhwc = velocity(window_Bfhwc, time_Bf)[:, known:]
        # d latent / d sigma is the velocity, and sigma falls: a step of after - now, below zero.
        return latent_Bfhwc + (after - now) * velocity_Bfhwc, None

    return jax.lax.scan(step, noise_Bfhwc, (level[:-1], level[1:]))[0]
