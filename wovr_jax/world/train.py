"""Training of the world model's transformer on latents; the VAE stays frozen.

A step draws windows (``latents``), noises the two future latents at one level, adds a little
noise to the memory latent and regresses the velocity of the future latents only, weighted by the
schedule (WoVR, section 4.1; RLinf's DiffSynth-Studio fork, diffsynth/pipelines/wan_video_new.py
``training_loss`` and trainers/utils.py). A refresh (PACE) is the same training, started from
the old weights, with part of each batch drawn from the old episodes. With ``lora`` only
adapters are trained: state, gradient and checkpoint hold nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from wovr_jax.core import sharding
from wovr_jax.core.config import Count, Decay, Natural, NonNegative, Positive, Share, checked
from wovr_jax.data.stream import StreamConfig
from wovr_jax.nn import lora
from wovr_jax.nn.functional import Pure
from wovr_jax.nn.lora import LoRAConfig
from wovr_jax.train import optimizers
from wovr_jax.train.loop import Shown
from wovr_jax.types import Array, Params
from wovr_jax.world import flow, latents
from wovr_jax.world.dit import AXES, DiT
from wovr_jax.world.latents import Batch, Data, Resident, Source
from wovr_jax.world.model import WorldConfig, networks, sample


@checked
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
      stride: steps between the starts of windows; neighbours overlap in all frames but one.
      start_cap: windows begin below this frame; 0 for anywhere. The reference never looks beyond frame 250.
      latents: "memory" encodes every window before the first step; "disk" also keeps them for the next run
        on the same episodes; "fly" encodes each batch anew, where all latents would not fit; "stream" also
        reads its frames from disk, where they would not fit.
      stream: how it reads.
      lora: trains these adapters only, beside weights that stay as they are; None trains everything.
      validate_every: steps between two measurements on held-out episodes, each with a film of some, true
        beside imagined; 0 for one measurement at the end.
    """

    steps: Natural = 1000
    batch: Count = 32
    lr: Positive = 1e-3
    warmup: Natural = 50
    schedule: Literal["cosine", "constant"] = "cosine"
    optimizer: optimizers.Name = "adamw"
    weight_decay: NonNegative = 0.01
    b1: Decay = 0.9
    b2: Decay = 0.999
    clip: Positive = 1.0
    ema: Decay = 0.0
    start_share: Share = 0.05
    static_share: Share = 0.05
    context_sigma: Share = 5 / 24
    weighting: Literal["bump", "uniform"] = "bump"
    replay_share: Share = 0.5
    stride: Count = 1
    start_cap: Natural = 0
    latents: Literal["memory", "disk", "fly", "stream"] = "memory"
    stream: StreamConfig = StreamConfig()
    lora: LoRAConfig | None = None
    validate_every: Natural = 0

    @classmethod
    def rlinf(cls, **changes) -> WorldTrainConfig:
        """The published recipe of the 5B model: eight windows a step, constant rate."""
        sizes: dict[str, Any] = {"steps": 400_000, "batch": 8, "lr": 1e-5, "warmup": 5, "schedule": "constant"}
        sizes |= {"start_cap": 250}
        return cls(**sizes | changes)

    @classmethod
    def fake(cls, **changes) -> WorldTrainConfig:
        """For tests."""
        sizes: dict[str, Any] = {"steps": 4, "batch": 3, "warmup": 1}
        return cls(**sizes | changes)


@struct.dataclass
class WorldTrainState:
    """What is trained, all parameters or the adapters; their average (None without), the optimiser's state."""

    params: Params
    ema: Params | None
    opt: Any


def draw(key: Array, data: Source, size: int, train: WorldTrainConfig) -> Batch:
    """A batch of windows; some begin an episode, some are replaced by a static clip."""
    k_row, k_static = jax.random.split(key)
    row_B = data.rows(k_row, size, train.start_share)
    return data.take(row_B, jax.random.bernoulli(k_static, train.static_share, (size,)))


def network(cfg: WorldConfig, adapters: LoRAConfig | None) -> Pure:
    """The transformer as training runs it: with ``adapters`` beside its layers, if any."""
    return networks(cfg)[0] if adapters is None else _adapted(cfg, adapters)


@functools.cache
def _adapted(cfg: WorldConfig, adapters: LoRAConfig) -> Pure:
    return Pure(lambda rngs: lora.adapt(DiT(cfg.dit, rngs=rngs), adapters))


def loss(
    cfg: WorldConfig, train: WorldTrainConfig, dit_params: Params, batch: Batch, key: Array
) -> tuple[Array, dict[str, Array]]:
    """Weighted squared error of the velocity of the future latents, and its metrics.

    The anchor latent is clean and the memory latent at ``context_sigma`` (with
    ``cfg.noisy_context``), both at time 0; the future latents share one random level.
    """
    dit = network(cfg, train.lora)
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
    data: Data,
    key: Array,
    *,
    replay: Data | None = None,
) -> tuple[WorldTrainState, Callable[[WorldTrainState, Array], tuple[WorldTrainState, dict[str, Array]]]]:
    """First state and ``step(state, i) -> (state, metrics)``, jitted, donated.

    Args:
      cfg: the world model.
      train: how to train it.
      dit_params: where to start: fresh weights, or the old ones for a refresh. Copied; with ``train.lora``
        left as they are, beside the adapters.
      data: windows; in a refresh those of the new episodes.
      key: a batch depends on ``fold_in(key, i)`` only, so a resumed run is the uninterrupted one.
      replay: windows of the old episodes, ``train.replay_share`` of each batch.

    Raises:
      ValueError: when a set of windows is empty, or the adapters have no layer.
    """
    sets = (data,) if replay is None else (data, replay)
    if not all(one.count for one in sets):
        raise ValueError("world training: a set of windows is empty; the episodes may be shorter than a chunk")
    old = round(train.batch * train.replay_share) if replay is not None else 0
    sizes = (train.batch - old, old)
    fed = latents.feed(sets, sizes, key, train.steps)

    def drawn(i: Array, sets: tuple[Source, ...], key: Array) -> tuple[Batch, Array]:
        k_loss, *k_draw = jax.random.split(jax.random.fold_in(key, i), 1 + len(sets))
        parts = [draw(k, one, size, train) for k, one, size in zip(k_draw, sets, sizes, strict=False) if size]
        return sharding.batch(jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)), k_loss

    def step(
        state: WorldTrainState, i: Array, sets: tuple[Source, ...], frozen: Params | None, key: Array
    ) -> tuple[WorldTrainState, dict[str, Array]]:
        return advance(cfg, train, state, *drawn(i, sets, key), i, frozen)

    # The key is an argument too: trainings that differ in their seed are one program.
    jitted = jax.jit(step, donate_argnums=0)
    frozen = None if train.lora is None else sharding.place(dit_params, AXES)
    state = sharding.place(create(train, first(train, dit_params, key)), AXES)

    def run(state: WorldTrainState, i: Array) -> tuple[WorldTrainState, dict[str, Array]]:
        sources, waited = fed(i)
        state, metrics = jitted(state, i, sources, frozen, key)
        return state, metrics | waited  # floats of the host beside what the device has yet to compute

    return state, Shown(run, lambda _, i: jax.jit(drawn)(i, fed(i)[0], key))


def create(train: WorldTrainConfig, params: Params) -> WorldTrainState:
    """The state before the first step; ``params`` are what is trained."""
    ema = jax.tree.map(jnp.copy, params) if train.ema else None
    return WorldTrainState(params, ema, optimizer(train).init(params))


def advance(
    cfg: WorldConfig,
    train: WorldTrainConfig,
    state: WorldTrainState,
    batch: Batch,
    key: Array,
    i: Array,
    frozen: Params | None = None,
) -> tuple[WorldTrainState, dict[str, Array]]:
    """One optimizer step on a batch; ``frozen`` are the weights beside which adapters are trained."""
    whole = lambda params: params if frozen is None else lora.join(frozen, params)  # noqa: E731
    objective = lambda params: loss(cfg, train, whole(params), batch, key)  # noqa: E731
    gradient, metrics = jax.grad(objective, has_aux=True)(state.params)
    update, opt = optimizer(train).update(gradient, state.opt, state.params)
    params: Any = optax.apply_updates(state.params, update)
    metrics["gradient"] = optax.tree.norm(gradient)
    return sharding.keep(WorldTrainState(params, _average(state.ema, params, train.ema, i), opt), AXES), metrics


def first(train: WorldTrainConfig, dit_params: Params, key: Array) -> Params:
    """What is trained, before the first step: a copy of ``dit_params``, or adapters that change nothing yet."""
    if train.lora is None:
        return jax.tree.map(jnp.copy, dit_params)
    return lora.init(jax.random.fold_in(key, train.steps), dit_params, train.lora)  # a number that no step folds in


def trained(state: WorldTrainState) -> Params:
    """What to keep of the state: parameters or adapters, the average where there is one."""
    return state.params if state.ema is None else state.ema


def weights(train: WorldTrainConfig, kept: Params, dit_params: Params) -> Params:
    """The weights to use, of what was ``trained`` from ``dit_params``: adapters are folded in, in float32."""
    return kept if train.lora is None else lora.merge(dit_params, kept, train.lora)


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
    cfg: WorldConfig, train: WorldTrainConfig, data: Resident, key: Array, *, windows: int = 128
) -> Callable[[Params], dict[str, Array]]:
    """A jitted ``measure(dit_params) -> metrics`` on held-out windows with noise fixed by ``key``.

    Metrics: ``val_loss``, the training loss; ``val_sample_mse``, the error of sampled future
    latents, and ``val_copy_mse``, that of repeating the memory latent: a model that has learned
    something is below it. ``dit_params`` are those of the plain network, adapters folded in.

    Raises:
      ValueError: when there is no held-out window.
    """
    if not data.count:
        raise ValueError("world training: no held-out window to validate on; hold out at least one episode")
    row_B = np.unique(np.linspace(0, data.count - 1, min(windows, data.count)).astype(np.int32))
    known, plain = cfg.context_latents, dataclasses.replace(train, lora=None)

    def measure(dit_params: Params, data: Resident, key: Array) -> dict[str, Array]:
        batch = data.take(jnp.asarray(row_B), jnp.zeros(len(row_B), bool))
        k_loss, k_noise = jax.random.split(key)
        context_Bfhwc, future_Bfhwc = jnp.split(batch.latent_Bfhwc, [known], axis=1)
        noise_Bfhwc = jax.random.normal(k_noise, future_Bfhwc.shape)
        sampled_Bfhwc = sample(cfg, dit_params, context_Bfhwc, batch.action_BFA, noise_Bfhwc)
        return {
            "val_loss": loss(cfg, plain, dit_params, batch, k_loss)[0],
            "val_sample_mse": jnp.square(sampled_Bfhwc - future_Bfhwc).mean(),
            "val_copy_mse": jnp.square(context_Bfhwc[:, -1:] - future_Bfhwc).mean(),
        }

    jitted = jax.jit(measure)
    return lambda dit_params: jitted(dit_params, data, key)


def _average(ema: Params | None, params: Params, decay: float, i: Array) -> Params | None:
    if ema is None:
        return None
    keep = jnp.minimum(decay, (1.0 + i) / (10.0 + i))  # early weights are forgotten quickly
    return jax.tree.map(lambda old, new: keep * old + (1.0 - keep) * new, ema, params)
