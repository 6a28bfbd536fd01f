"""Training of the world model's transformer on latents; the VAE stays frozen.

A step draws windows (``latents``), noises the two future latents at one level, adds a little
noise to the memory latent and regresses the velocity of the future latents only, weighted by the
schedule (WoVR, section 4.1; RLinf's DiffSynth-Studio fork, diffsynth/pipelines/wan_video_new.py
``training_loss`` and trainers/utils.py). A refresh (PACE) is the same training, started from
the old weights, with part of each batch drawn from the old episodes. With ``lora`` only
adapters are trained, and the layers that read actions: state, gradient and checkpoint hold nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax.core import sharding
from wovr_jax.core.config import Count, Faults, Natural, Share, checked
from wovr_jax.data.batches import sample_rows
from wovr_jax.data.stream import StreamConfig
from wovr_jax.nn import lora
from wovr_jax.nn.functional import Pure
from wovr_jax.train import optimizers
from wovr_jax.train import step as train_step
from wovr_jax.train.step import Objective, ReplayableStep, TrainState
from wovr_jax.types import Array, Params
from wovr_jax.world import flow, latents
from wovr_jax.world.dit import AXES, DiT, DiTLoRA
from wovr_jax.world.latents import Batch, Data, HostBatch, Resident, Source
from wovr_jax.world.model import WorldConfig, networks, sample


@checked
@dataclasses.dataclass(frozen=True)
class WorldTrainConfig(optimizers.TrainingConfig):
    """How the transformer is trained; a sample is a window.

    Attributes:
      start_share: share of windows that begin an episode.
      static_share: share of windows replaced by a clip of the unmoving first frame.
      context_sigma: noise level of the memory latent; its declared time stays 0.
      weighting: "bump" by ``flow.weight``, or "uniform".
      replay_share: share of a batch drawn from the old episodes in a refresh.
      stride: steps between the starts of windows; neighbours overlap in all frames but one.
      start_cap: windows begin below this frame; 0 for anywhere. The reference never looks beyond frame 250.
      shift: largest number of pixels by which windows are moved along height and width: an augmentation, no part of
        the reference; see ``data.batches.Layout``.
      latents: "memory" encodes every window before the first step; "disk" also keeps them for the next run
        on the same episodes; "fly" encodes each batch anew, where all latents would not fit; "stream" also
        reads its frames from disk, where they would not fit.
      stream: how it reads.
      lora: trains these adapters, beside weights that stay as they are, and the layers that read actions; None trains
        everything.
      own_memory: steps of each round that follows, in which windows have a memory that the model imagined itself.
        At use every memory but the first is imagined, faults and all, and in the training proper none is: errors feed
        on themselves. So before each round the model imagines all episodes under their actions, and from what it then
        remembers it learns the true frames that follow. ``replay_share`` of a batch remembers the truth. No part of
        WoVR; known as scheduled sampling (Bengio et al., 2015) and DAgger (Ross et al., 2011).
      validate_every: steps between two measurements on held-out episodes, each with a film of some, true
        beside imagined; 0 for one measurement at the end.
    """

    start_share: Share = 0.05
    static_share: Share = 0.05
    context_sigma: Share = 5 / 24
    weighting: Literal["bump", "uniform"] = "bump"
    replay_share: Share = 0.5
    stride: Count = 1
    start_cap: Natural = 0
    shift: Natural = 0
    latents: Literal["memory", "disk", "fly", "stream"] = "memory"
    stream: StreamConfig = StreamConfig()
    lora: DiTLoRA | None = None
    own_memory: tuple[Count, ...] = ()
    validate_every: Natural = 0

    def faults(self) -> Faults:
        """Yields episodes that are to be imagined whole and are never in memory."""
        if self.own_memory and self.latents == "stream":
            yield "own_memory", f"expected none with latents='stream', which reads windows only, got {self.own_memory}"

    @classmethod
    def rlinf(cls, **changes) -> WorldTrainConfig:
        """The published recipe of the 5B model: eight windows a step, constant rate."""
        sizes: dict[str, Any] = {"steps": 400_000, "batch": 8, "lr": 1e-5, "warmup": 5, "schedule": "constant"}
        sizes |= {"start_cap": 250}
        return cls(**sizes | changes)


@dataclasses.dataclass(frozen=True)
class WorldObjective(Objective):
    """The transformer, or its adapters, on windows.

    Attributes:
      cfg: the world model.
      train: how to train it.
      sizes: windows of a batch from each set that it is drawn from.
    """

    cfg: WorldConfig
    train: WorldTrainConfig
    sizes: tuple[int, ...]

    axes = AXES

    def draw(self, key: Array, data: tuple[Source, ...]) -> tuple[Batch, Array]:
        """Draws ``sizes`` windows from the sets, one after the other; the loss draws levels and noise."""
        k_loss, *k_draw = jax.random.split(key, 1 + len(data))
        # A key for each set, also for one of which no window is taken: the others draw the same either way.
        parts = [draw(k, one, size, self.train) for k, one, size in zip(k_draw, data, self.sizes, strict=True) if size]
        return sharding.batch(jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)), k_loss

    def loss(self, params: Params, fixed: Params | None, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
        """See :func:`loss`; ``fixed`` are the weights beside which adapters are trained."""
        # The gradient goes to what is trained only; the fixed weights are constants of the loss.
        joined = params if fixed is None else lora.join(fixed, params)
        return loss(self.cfg, self.train, joined, batch, key)


def draw(key: Array, data: Source, size: int, train: WorldTrainConfig) -> Batch:
    """Draws a batch of windows; some begin an episode, some are replaced by a static clip."""
    # A clip in which nothing moves under the null action teaches that standing still keeps the picture.
    k_row, k_static = jax.random.split(key)
    static_B = jax.random.bernoulli(k_static, train.static_share, (size,))
    if isinstance(data, HostBatch):  # the host has drawn already
        return data.take_all(static_B)
    return data.take(sample_rows(k_row, size, data.starts, data.count, train.start_share), static_B)


def network(cfg: WorldConfig, adapters: DiTLoRA | None) -> Pure:
    """The transformer as training runs it: with ``adapters`` beside its layers, if any."""
    return networks(cfg)[0] if adapters is None else _adapted(cfg, adapters)


@functools.cache
def _adapted(cfg: WorldConfig, adapters: DiTLoRA) -> Pure:
    return Pure(lambda rngs: lora.adapt(DiT(cfg.dit, rngs=rngs), adapters))


def loss(
    cfg: WorldConfig, train: WorldTrainConfig, dit_params: Params, batch: Batch, key: Array
) -> tuple[Array, dict[str, Array]]:
    """Returns the weighted squared error of the velocity of the future latents, and metrics.

    The anchor latent is clean and the memory latent at ``context_sigma`` (with
    ``cfg.noisy_context``), both at time 0; the future latents share one random level.
    """
    dit = network(cfg, train.lora)
    k_level, k_noise = jax.random.split(key)
    known, size = cfg.context_latents, len(batch.latent_Bfhwc)
    # Both future latents share a level, as they are sampled together at use.
    sigma_B = flow.draw_levels(k_level, size, cfg.flow)
    time_B = flow.times(sigma_B, cfg.flow)

    # One noise for the whole window, as in the reference; only its level differs by frame.
    noise_Bfhwc = jax.random.normal(k_noise, batch.latent_Bfhwc.shape)
    # The memory is noised but declared clean: at use it is the model's own output, and nobody declares its faults.
    context_level = [0.0] + [train.context_sigma if cfg.noisy_context else 0.0] * (known - 1)
    # (B, f) -> (B, f, 1, 1, 1) below: one level for all numbers of a latent frame.
    level_Bf = _per_frame(context_level, sigma_B, cfg)
    noisy_Bfhwc = flow.add_noise(batch.latent_Bfhwc, noise_Bfhwc, level_Bf[:, :, None, None, None])
    velocity_Bfhwc = dit(dit_params, noisy_Bfhwc, _per_frame([0.0] * known, time_B, cfg), batch.action_BFA)

    # The velocity of the straight path from latent (level 0) to noise (level 1) is their difference.
    error_Bfhwc = velocity_Bfhwc - (noise_Bfhwc - batch.latent_Bfhwc)
    # (B, f, h, w, c) -> (B,): only what is to be imagined is scored, and each window is weighted by its level.
    error_B = jnp.square(error_Bfhwc[:, known:]).mean(axis=(1, 2, 3, 4))
    weight_B = flow.weight(flow.TIME_SCALE * sigma_B, cfg.flow) if train.weighting == "bump" else jnp.ones_like(time_B)
    total = (weight_B * error_B).mean()
    return total, {"velocity_mse": error_B.mean()}


def _per_frame(context: list[float], future_B: Array, cfg: WorldConfig) -> Array:
    """Returns (B, f): ``context`` in the context frames of every window, its own number in its future frames."""
    context_Bf = jnp.broadcast_to(jnp.array(context), (len(future_B), len(context)))
    return jnp.concatenate([context_Bf, jnp.repeat(future_B[:, None], cfg.latents - len(context), axis=1)], axis=1)


def make(
    cfg: WorldConfig, train: WorldTrainConfig, dit_params: Params, data: Data, key: Array, *, replay: Data | None = None
) -> tuple[TrainState, ReplayableStep]:
    """Returns the first state and the step, see ``train.step.make``.

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
    # A fixed number of old windows in each batch, not a chance: what was learned from them is not forgotten by luck.
    sets = (data,) if replay is None else (data, replay)
    if not all(one.count for one in sets):
        raise ValueError("world training: a set of windows is empty; the episodes may be shorter than a chunk")
    old = round(train.batch * train.replay_share)
    sizes = (train.batch,) if replay is None else (train.batch - old, old)
    # Streams read ahead of the steps, so they have to know how many there are.
    feed = latents.feed(sets, sizes, key, train.steps)
    fixed = None if train.lora is None else dit_params
    params = pick_trained(train, dit_params, key)
    return train_step.make(WorldObjective(cfg, train, sizes), params, feed, key, fixed=fixed)


def pick_trained(train: WorldTrainConfig, dit_params: Params, key: Array) -> Params:
    """Returns what is trained, before the first step: ``dit_params``, or adapters that change nothing yet.

    Beside adapters the layers that read the actions, 1 % of a 5B transformer, are trained whole.
    """
    if train.lora is None:
        return dit_params
    # Steps fold in 0 .. steps - 1, so this key is not a batch's.
    adapters = lora.init(jax.random.fold_in(key, train.steps), dit_params, train.lora)
    # In a video model that was never shown an action they begin at random, and no adapter mends that.
    reads_actions = [name for name in dit_params if name.startswith("action_")]
    whole = optimizers.split_frozen(dit_params, optimizers.find_frozen(dit_params, *reads_actions))[1]
    return optimizers.merge_frozen(adapters, whole)


def merge_weights(train: WorldTrainConfig, trained: Params, dit_params: Params) -> Params:
    """Returns the plain network's weights after a training from ``dit_params``; adapters are folded in, in float32.

    Args:
      train: how it was trained.
      trained: its ``TrainState.result``.
      dit_params: where it began.
    """
    return trained if train.lora is None else lora.merge(dit_params, trained, train.lora)


def validation(
    cfg: WorldConfig, train: WorldTrainConfig, data: Resident, key: Array, *, windows: int = 128
) -> Callable[[Params], dict[str, Array]]:
    """Returns a jitted ``measure(dit_params) -> metrics`` on held-out windows with noise fixed by ``key``.

    Metrics: ``val_loss``, the training loss; ``val_sample_mse``, the error of sampled future
    latents, and ``val_copy_mse``, that of repeating the memory latent: a model that has learned
    something is below it. ``dit_params`` are those of the plain network, adapters folded in.

    Raises:
      ValueError: when there is no held-out window.
    """
    if not data.count:
        raise ValueError("world training: no held-out window to validate on; hold out at least one episode")
    # Spread evenly over the rows, they come from many episodes.
    row_B = np.unique(np.linspace(0, data.count - 1, min(windows, data.count)).astype(np.int32))
    # Adapters are folded in before, so the loss is that of the plain network.
    known, plain = cfg.context_latents, dataclasses.replace(train, lora=None)

    def measure(dit_params: Params, data: Resident, key: Array) -> dict[str, Array]:
        # No static clips: a picture that stays as it is would flatter the copy.
        batch = data.take(jnp.asarray(row_B), jnp.zeros(len(row_B), bool))
        k_loss, k_noise = jax.random.split(key)
        context_Bfhwc, future_Bfhwc = jnp.split(batch.latent_Bfhwc, [known], axis=1)
        noise_Bfhwc = jax.random.normal(k_noise, future_Bfhwc.shape)
        # The loss sees one level of noise; what the model is used for is the way from noise to frames.
        sampled_Bfhwc = sample(cfg, dit_params, context_Bfhwc, batch.action_BFA, noise_Bfhwc)
        return {
            "val_loss": loss(cfg, plain, dit_params, batch, k_loss)[0],
            "val_sample_mse": jnp.square(sampled_Bfhwc - future_Bfhwc).mean(),
            "val_copy_mse": jnp.square(context_Bfhwc[:, -1:] - future_Bfhwc).mean(),
        }

    jitted = jax.jit(measure)
    return lambda dit_params: jitted(dit_params, data, key)
