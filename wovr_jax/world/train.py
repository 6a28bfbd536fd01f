"""Training of the world model's transformer on cached latents; the VAE stays frozen.

``encode_windows`` passes every window of a set of episodes through the VAE once. A step
then draws windows, noises the two future latents at one level, adds a little noise to the
memory latent and regresses the velocity of the future latents only, weighted by the
schedule (WoVR, section 4.1; RLinf's DiffSynth-Studio fork, diffsynth/pipelines/wan_video_new.py
``training_loss`` and trainers/utils.py). A refresh (PACE) is the same training, started from
the old weights, with part of each batch drawn from the old episodes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from wovr_jax.data.batches import Windows, gather_windows, sample_rows
from wovr_jax.data.episodes import to_float
from wovr_jax.nn import optimizers
from wovr_jax.nn.functional import Params
from wovr_jax.types import NULL_ACTION, Array
from wovr_jax.world import flow
from wovr_jax.world.model import WorldConfig, arrange_actions, arrange_frames, networks, sample

SCHEDULES = ("cosine", "constant")
WEIGHTINGS = ("bump", "uniform")


@dataclasses.dataclass(frozen=True)
class WorldTrainConfig:
    """How the transformer is trained.

    Attributes:
      steps, batch: optimiser steps and windows in each.
      lr, warmup, schedule: peak learning rate, steps to reach it, then "cosine" to zero or "constant".
      optimizer, weight_decay, b1, b2, clip: see ``nn.optimizers``.
      ema: decay of the averaged weights that are used in the end; 0 for none.
      start_share: share of windows that begin an episode.
      static_share: share of windows replaced by a clip of the unmoving first frame.
      context_sigma: noise level of the memory latent; its declared time stays 0.
      weighting: "bump" by ``flow.weight``, or "uniform".
      replay_share: share of a batch drawn from the old episodes in a refresh.
    """

    steps: int = 1000
    batch: int = 32
    lr: float = 1e-3
    warmup: int = 50
    schedule: str = "cosine"
    optimizer: optimizers.Name = "adamw"
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.999
    clip: float = 1.0
    ema: float = 0.0
    start_share: float = 0.05
    static_share: float = 0.05
    context_sigma: float = 5 / 24
    weighting: str = "bump"
    replay_share: float = 0.5

    def __post_init__(self) -> None:
        for name, options in (("schedule", SCHEDULES), ("weighting", WEIGHTINGS)):
            if getattr(self, name) not in options:
                raise ValueError(f"world training: expected {name} in {options}, got {getattr(self, name)!r}")

    @classmethod
    def rlinf(cls, **changes) -> WorldTrainConfig:
        """The published recipe of the 5B model: eight windows a step, constant rate."""
        sizes: dict[str, Any] = {"steps": 400_000, "batch": 8, "lr": 1e-5, "warmup": 5, "schedule": "constant"}
        return cls(**sizes | changes)

    @classmethod
    def tabletop(cls, **changes) -> WorldTrainConfig:
        """The embedded run. A third of its chunks are first chunks, and so are its windows."""
        sizes: dict[str, Any] = {"steps": 1500, "start_share": 0.25, "b2": 0.98}
        return cls(**sizes | changes)

    @classmethod
    def refresh(cls, **changes) -> WorldTrainConfig:
        """The embedded run's second training, on new and old episodes."""
        return cls.tabletop(**{"steps": 400, "lr": 5e-4} | changes)

    @classmethod
    def fake(cls, **changes) -> WorldTrainConfig:
        """For tests."""
        sizes: dict[str, Any] = {"steps": 4, "batch": 3, "warmup": 1}
        return cls(**sizes | changes)


@struct.dataclass
class Latents:
    """Encoded windows on the device; I counts windows, E episodes.

    Attributes:
      latent_Ifhwc: normalised latents; the first ``starts`` windows begin an episode.
      action_IFA: their actions, arranged as the frames were.
      episode_I: int32 episode of each window.
      static_Efhwc: for each episode the latents of its first frame held for a whole window.
      starts: see above.
    """

    latent_Ifhwc: Array
    action_IFA: Array
    episode_I: Array
    static_Efhwc: Array
    starts: int = struct.field(pytree_node=False)

    @property
    def count(self) -> int:
        """Windows."""
        return self.latent_Ifhwc.shape[0]


@struct.dataclass
class WorldTrainState:
    """Parameters of the transformer, their average (None without), the optimiser's state."""

    params: Params
    ema: Params | None
    opt: Any


@struct.dataclass
class Batch:
    """Windows to train on: latents (B, f, h, w, c) and actions (B, F, A)."""

    latent_Bfhwc: Array
    action_BFA: Array


def encode_windows(
    cfg: WorldConfig, vae_params: Params, windows: Windows, *, batch: int = 32
) -> tuple[Latents, Latents]:
    """All windows as latents: the training side and the held-out side.

    Args:
      cfg: decides the window's layout (anchor, memory).
      vae_params: weights of the frozen VAE.
      windows: episodes and their windows, (episode, start) rows.
      batch: windows encoded at once.

    Raises:
      ValueError: when the windows were cut for another chunk or memory length.
    """
    if (windows.memory, windows.new) != (cfg.slots, cfg.chunk):
        raise ValueError(
            f"world training: the windows have {windows.memory} + {windows.new} frames after the anchor, "
            f"the world model {cfg.slots} + {cfg.chunk}; cut them with memory={cfg.slots}, new={cfg.chunk}"
        )
    _, vae = networks(cfg)

    @jax.jit
    def encode(params: Params, data: Windows, row_B2: Array) -> Batch:
        frame_BFHWC, action_BFA = gather_windows(data, row_B2)
        latent_Bfhwc = vae(params, arrange_frames(frame_BFHWC, cfg), method="encode")
        return Batch(latent_Bfhwc, arrange_actions(action_BFA, cfg))

    @jax.jit
    def encode_static(params: Params, data: Windows, episode_B: Array) -> Array:
        frame_BHWC = to_float(jnp.asarray(data.frame_ESHWC)[episode_B, 0])
        return vae(params, jnp.repeat(frame_BHWC[:, None], cfg.frames, axis=1), method="encode")

    data = jax.device_put(windows)
    episode_E = np.arange(len(windows.frame_ESHWC), dtype=np.int32)
    static_Efhwc = _in_batches(lambda rows: encode_static(vae_params, data, rows), episode_E, batch)

    def side(index: Any, starts: int) -> Latents:
        row_I2 = np.asarray(index)
        done = _in_batches(lambda rows: encode(vae_params, data, rows), row_I2, batch)
        return Latents(done.latent_Bfhwc, done.action_BFA, jnp.asarray(row_I2[:, 0]), static_Efhwc, starts)

    return side(windows.train_I2, windows.train_starts), side(windows.val_I2, windows.val_starts)


def _in_batches(function: Callable[[np.ndarray], Any], rows: np.ndarray, batch: int) -> Any:
    """``function`` over all rows in batches of one size, the last filled up with zeros: one compilation."""
    missing = -len(rows) % batch if len(rows) else batch
    full = np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), rows.dtype)])
    parts = [function(full[i : i + batch]) for i in range(0, len(full), batch)]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[: len(rows)], *parts)


def draw(key: Array, data: Latents, size: int, train: WorldTrainConfig) -> Batch:
    """A batch of windows; some begin an episode, some are replaced by a static clip."""
    k_row, k_static = jax.random.split(key)
    row_B = sample_rows(k_row, size, data.starts, data.count, train.start_share)
    static_B = jax.random.bernoulli(k_static, train.static_share, (size,))
    still_Bfhwc = data.static_Efhwc[data.episode_I[row_B]]
    latent_Bfhwc = jnp.where(static_B[:, None, None, None, None], still_Bfhwc, data.latent_Ifhwc[row_B])
    null_11A = jnp.asarray(NULL_ACTION)[None, None]
    return Batch(latent_Bfhwc, jnp.where(static_B[:, None, None], null_11A, data.action_IFA[row_B]))


def loss(
    cfg: WorldConfig, train: WorldTrainConfig, dit_params: Params, batch: Batch, key: Array
) -> tuple[Array, dict[str, Array]]:
    """Weighted squared error of the velocity of the future latents, and its metrics.

    The anchor latent is clean and the memory latent at ``context_sigma`` (with
    ``cfg.noisy_context``), both at time 0; the future latents share one random level.
    """
    dit, _ = networks(cfg)
    k_level, k_noise = jax.random.split(key)
    known, size = cfg.context_latents, len(batch.latent_Bfhwc)
    sigma_B = flow.draw_levels(k_level, size, cfg.flow)
    time_B = flow.times(sigma_B, cfg.flow)

    # One noise for the whole window, as in the reference; only its level differs by frame.
    noise_Bfhwc = jax.random.normal(k_noise, batch.latent_Bfhwc.shape)
    context_level = [0.0] + [train.context_sigma if cfg.noisy_context else 0.0] * (known - 1)
    level_Bf = _per_frame(context_level, sigma_B, cfg)
    noisy_Bfhwc = flow.noised(batch.latent_Bfhwc, noise_Bfhwc, level_Bf[:, :, None, None, None])
    velocity_Bfhwc = dit(dit_params, noisy_Bfhwc, _per_frame([0.0] * known, time_B, cfg), batch.action_BFA)

    error_Bfhwc = velocity_Bfhwc - (noise_Bfhwc - batch.latent_Bfhwc)
    error_B = jnp.square(error_Bfhwc[:, known:]).mean(axis=(1, 2, 3, 4))
    weight_B = flow.weight(flow.TIME_SCALE * sigma_B, cfg.flow) if train.weighting == "bump" else jnp.ones_like(time_B)
    total = (weight_B * error_B).mean()
    return total, {"loss": total, "velocity_mse": error_B.mean()}


def _per_frame(context: list[float], future_B: Array, cfg: WorldConfig) -> Array:
    """(B, f): given numbers for the context frames, one number a window for the future ones."""
    context_Bf = jnp.broadcast_to(jnp.array(context), (len(future_B), len(context)))
    return jnp.concatenate([context_Bf, jnp.repeat(future_B[:, None], cfg.latents - len(context), axis=1)], axis=1)


def make(
    cfg: WorldConfig,
    train: WorldTrainConfig,
    dit_params: Params,
    data: Latents,
    key: Array,
    *,
    replay: Latents | None = None,
) -> tuple[WorldTrainState, Callable[[WorldTrainState, Array], tuple[WorldTrainState, dict[str, Array]]]]:
    """First state and ``step(state, i) -> (state, metrics)``, jitted, donated.

    Args:
      cfg: the world model.
      train: how to train it.
      dit_params: where to start: fresh weights, or the old ones for a refresh. Copied.
      data: encoded windows; in a refresh those of the new episodes.
      key: a batch depends on ``fold_in(key, i)`` only, so a resumed run is the uninterrupted one.
      replay: encoded windows of the old episodes, ``train.replay_share`` of each batch.

    Raises:
      ValueError: when a set of windows is empty.
    """
    sets = (data,) if replay is None else (data, replay)
    if not all(one.count for one in sets):
        raise ValueError("world training: a set of windows is empty; the episodes may be shorter than a chunk")
    old = round(train.batch * train.replay_share) if replay is not None else 0
    sizes, optimiser = (train.batch - old, old), optimizer(train)

    def step(state: WorldTrainState, i: Array, sets: tuple[Latents, ...]) -> tuple[WorldTrainState, dict[str, Array]]:
        k_loss, *k_draw = jax.random.split(jax.random.fold_in(key, i), 1 + len(sets))
        parts = [draw(k, one, size, train) for k, one, size in zip(k_draw, sets, sizes, strict=False) if size]
        batch = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
        objective = lambda params: loss(cfg, train, params, batch, k_loss)  # noqa: E731
        gradient, metrics = jax.grad(objective, has_aux=True)(state.params)
        update, opt = optimiser.update(gradient, state.opt, state.params)
        params: Any = optax.apply_updates(state.params, update)
        metrics["gradient"] = optax.tree.norm(gradient)
        return WorldTrainState(params, _average(state.ema, params, train.ema, i), opt), metrics

    jitted = jax.jit(step, donate_argnums=0)
    params = jax.tree.map(jnp.copy, dit_params)
    ema = jax.tree.map(jnp.copy, dit_params) if train.ema else None
    return WorldTrainState(params, ema, optimiser.init(params)), lambda state, i: jitted(state, i, sets)


def weights(state: WorldTrainState) -> Params:
    """The weights to use: the average where there is one."""
    return state.params if state.ema is None else state.ema


def optimizer(train: WorldTrainConfig) -> optax.GradientTransformation:
    """Of ``train.optimizer``, with its schedule."""
    if train.schedule == "cosine":
        rate = optimizers.warmup_cosine(train.lr, train.warmup, train.steps)
    else:
        rate = optax.linear_schedule(train.lr / max(train.warmup, 1), train.lr, max(train.warmup - 1, 1))
    return optimizers.clipped(
        train.optimizer, rate, clip=train.clip, b1=train.b1, b2=train.b2, decay=train.weight_decay
    )


def validation(
    cfg: WorldConfig, train: WorldTrainConfig, data: Latents, key: Array, *, windows: int = 128
) -> Callable[[Params], dict[str, Array]]:
    """A jitted ``measure(dit_params) -> metrics`` on held-out windows with noise fixed by ``key``.

    Metrics: ``val_loss``, the training loss; ``val_sample_mse``, the error of sampled future
    latents, and ``val_copy_mse``, that of repeating the memory latent: a model that has learned
    something is below it.

    Raises:
      ValueError: when there is no held-out window.
    """
    if not data.count:
        raise ValueError("world training: no held-out window to validate on; hold out at least one episode")
    row_B = np.unique(np.linspace(0, data.count - 1, min(windows, data.count)).astype(np.int32))
    known = cfg.context_latents

    def measure(dit_params: Params, data: Latents) -> dict[str, Array]:
        batch = Batch(data.latent_Ifhwc[row_B], data.action_IFA[row_B])
        k_loss, k_noise = jax.random.split(key)
        context_Bfhwc, future_Bfhwc = jnp.split(batch.latent_Bfhwc, [known], axis=1)
        noise_Bfhwc = jax.random.normal(k_noise, future_Bfhwc.shape)
        sampled_Bfhwc = sample(cfg, dit_params, context_Bfhwc, batch.action_BFA, noise_Bfhwc)
        return {
            "val_loss": loss(cfg, train, dit_params, batch, k_loss)[0],
            "val_sample_mse": jnp.square(sampled_Bfhwc - future_Bfhwc).mean(),
            "val_copy_mse": jnp.square(context_Bfhwc[:, -1:] - future_Bfhwc).mean(),
        }

    jitted = jax.jit(measure)
    return lambda dit_params: jitted(dit_params, data)


def _average(ema: Params | None, params: Params, decay: float, i: Array) -> Params | None:
    if ema is None:
        return None
    keep = jnp.minimum(decay, (1.0 + i) / (10.0 + i))  # early weights are forgotten quickly
    return jax.tree.map(lambda old, new: keep * old + (1.0 - keep) * new, ema, params)
