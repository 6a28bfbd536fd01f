"""Pretraining of the VAE on windows of frames: what the paper takes ready-made from Wan2.2.

The windows are those of the world model, not plain clips: the first frame of an episode,
then consecutive frames from somewhere later. The VAE sees that jump at every use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax.core import sharding
from wovr_jax.core.config import Count, Decay, Natural, NonNegative, Positive, Seed, checked
from wovr_jax.core.stats import psnr
from wovr_jax.nn.functional import Pure
from wovr_jax.train import step as train_step
from wovr_jax.train.optimizers import Name, TrainingConfig
from wovr_jax.train.step import Objective, ReplayableStep, TrainState
from wovr_jax.types import Array, Params
from wovr_jax.world.vae.net import VAE, VAEConfig

Draw = Callable[..., Array]
"""``draw(key, batch, *data) -> frame_BFHWC``, traceable, float32 in [-1, 1]."""


@checked
@dataclasses.dataclass(frozen=True)
class VAETraining(TrainingConfig):
    """How the VAE is pretrained; a sample is a window of frames.

    Attributes:
      knee: pixel error up to which the absolute error is rounded into a square; below it the
        gradient fades, so that the still background does not drown what moves. 0: not rounded.
      edge: weight of the error of differences between neighbouring pixels.
      focus: extra weight of the pixels that change inside a window; they are few, and all that matters.
      kl: weight of the mean divergence per latent number.
      seed: of parameters and windows.
    """

    steps: Natural = 2000
    batch: Count = 8
    lr: Positive = 3e-3
    optimizer: Name = "muon"
    weight_decay: NonNegative = 0.0
    b2: Decay = 0.99
    knee: NonNegative = 0.1
    edge: NonNegative = 0.5
    focus: NonNegative = 8.0
    kl: NonNegative = 1e-5
    seed: Seed = 0


def network(cfg: VAEConfig) -> Pure:
    """The VAE without weights."""
    return Pure(lambda rngs: VAE(cfg, rngs=rngs))


def loss(vae: Pure, params: Params, cfg: VAETraining, frame_BFHWC: Array, key: Array) -> tuple[Array, dict[str, Array]]:
    """Returns absolute, squared and edge errors of the reconstruction from a sampled latent plus its divergence from
    the standard normal, and metrics."""
    mean, logvar = vae(params, frame_BFHWC, method="moments")
    logvar = jnp.clip(logvar, -30.0, 20.0)
    # Reparametrised, so that the gradient passes through the sample to mean and logvar (Kingma & Welling 2014).
    z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
    error_BFHWC = vae(params, z, method="decode_raw") - frame_BFHWC
    # Weights of mean 1: the focus moves attention to what moves, and leaves loss and learning rate at their scale.
    weight = 1.0 + cfg.focus * moving(frame_BFHWC)
    weight = weight / weight.mean()

    def size(error: Array) -> Array:
        # The square root has no gradient at 0 without a knee.
        return jnp.sqrt(jnp.square(error) + cfg.knee**2) - cfg.knee if cfg.knee else jnp.abs(error)

    # The absolute error keeps edges sharp; the square punishes the few pixels that are far off.
    pixel = (weight * (size(error_BFHWC) + jnp.square(error_BFHWC))).mean()
    # Differences between neighbours along height and width: a blurred edge is wrong in them before it is in the pixels.
    edge = size(jnp.diff(error_BFHWC, axis=2)).mean() + size(jnp.diff(error_BFHWC, axis=3)).mean()
    # Of N(mean, exp(logvar)) from N(0, 1), the mean over latent numbers and not their sum.
    divergence = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar).mean()
    total = pixel + cfg.edge * edge + cfg.kl * divergence
    return total, {"psnr": psnr(jnp.square(error_BFHWC).mean()), "edge": edge, "kl": divergence}


def moving(frame_BFHWC: Array, threshold: float = 0.1) -> Array:
    """Returns (B, 1, H, W, 1) float32: 1 where a pixel's colour changes over the window by more than ``threshold``."""
    span_BHWC = frame_BFHWC.max(axis=1) - frame_BFHWC.min(axis=1)
    return (span_BHWC.max(axis=-1, keepdims=True) > threshold).astype(jnp.float32)[:, None]


@dataclasses.dataclass(frozen=True)
class VAEObjective(Objective):
    """Windows of frames, put back together from their latents.

    Attributes:
      cfg: the VAE.
      train: how to train it.
      draw_frames: see ``Draw``.
    """

    cfg: VAEConfig
    train: VAETraining
    draw_frames: Draw

    def draw(self, key: Array, data: tuple[Any, ...]) -> tuple[Array, Array]:
        """Draws every batch afresh; the loss draws the noise of the latents."""
        k_draw, k_noise = jax.random.split(key)
        return sharding.batch(self.draw_frames(k_draw, self.train.batch, *data)), k_noise

    def loss(self, params: Params, fixed: None, batch: Array, key: Array) -> tuple[Array, dict[str, Array]]:
        """See :func:`loss`."""
        return loss(network(self.cfg), params, self.train, batch, key)


def make(cfg: VAEConfig, training: VAETraining, draw: Draw, *data: Any) -> tuple[TrainState, ReplayableStep]:
    """Returns the first state and the step, see ``train.step.make``.

    Args:
      cfg: the VAE; its parameters begin at random.
      training: how to train it, and the seed of parameters and batches.
      draw: traced into the step.
      *data: what ``draw`` draws from: an argument of the compiled program, where a closure would make it a constant.
    """
    # Parameters and batches from keys of their own: a larger network is shown the same windows.
    k_init, k_data = jax.random.split(jax.random.key(training.seed))
    params = network(cfg).init(k_init)
    return train_step.make(VAEObjective(cfg, training, draw), params, train_step.resident(data), k_data)


def with_latent_statistics(cfg: VAEConfig, params: Params, windows: Iterable[Array]) -> VAEConfig:
    """Returns ``cfg`` with the mean and standard deviation of each latent channel over ``windows``."""
    moments = jax.jit(lambda p, x: network(cfg)(p, x, method="moments")[0])
    # (B, f, h, w, c) -> (N, c): every latent of every window counts alike.
    z_NC = np.concatenate([sharding.host(moments(params, x)).reshape(-1, cfg.z_dim) for x in windows])
    # A channel that never varies would be divided by zero.
    mean, std = z_NC.mean(0), np.maximum(z_NC.std(0), 1e-3)
    return dataclasses.replace(
        cfg, latent_mean=tuple(round(float(v), 5) for v in mean), latent_std=tuple(round(float(v), 5) for v in std)
    )


def scores(cfg: VAEConfig, params: Params, windows: Iterable[Array]) -> dict[str, float]:
    """Measures the reconstruction from the posterior mean, clamped.

    Returns:
      ``psnr`` in dB over all pixels, ``psnr_moving`` over the pixels that change inside their
      window, ``psnr_worst`` of the worst frame.
    """
    vae = network(cfg)

    @jax.jit
    def errors(params: Params, frame_BFHWC: Array) -> tuple[Array, Array, Array]:
        back = vae(params, vae(params, frame_BFHWC, method="encode"), method="decode")
        square = jnp.square(jnp.clip(back, -1.0, 1.0) - frame_BFHWC).mean(-1)
        # (B, 1, H, W, 1) -> (B, F, H, W): a pixel that moves at some time counts in every frame of its window.
        mask = jnp.broadcast_to(moving(frame_BFHWC)[..., 0], square.shape)
        return square.mean((2, 3)), (square * mask).sum(), mask.sum()

    frame_error, moving_error, moving_pixels = zip(*(errors(params, x) for x in windows), strict=True)
    frame_error = np.concatenate([sharding.host(e).ravel() for e in frame_error])
    # One mean over all moving pixels: a mean of windows would count those with few of them as much.
    in_motion = float(sum(moving_error)) / float(sum(moving_pixels))
    errors_by_name = {"psnr": frame_error.mean(), "psnr_moving": in_motion, "psnr_worst": frame_error.max()}
    return {name: round(float(psnr(error)), 2) for name, error in errors_by_name.items()}
