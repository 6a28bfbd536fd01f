"""Supervised fine-tuning: token cross-entropy on demonstrated chunks.

All slots of a chunk are predicted at once from one frame and the prompt, so a sample is (frame, prompt,
T x A tokens) and the loss is the mean cross-entropy over the 256 action ids of every slot (OFT's discrete
recipe, openvla-oft: vla-scripts/finetune.py; the loss is restricted to the action ids, as sampling is).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from wovr_jax.nn import optimizers
from wovr_jax.nn.functional import Params, Pure
from wovr_jax.policy.actions import BINS, Codec, entropy
from wovr_jax.policy.vla import VLAConfig, network
from wovr_jax.types import Array


@struct.dataclass
class Demonstrations:
    """Chunks to imitate, resident on the device; here B counts chunks of the data set.

    Attributes:
      frame_BHWC: uint8.
      token_BTA: int32 in [0, 256), slice coordinates.
      prompt_BL: int32.
    """

    frame_BHWC: Array
    token_BTA: Array
    prompt_BL: Array


@struct.dataclass
class SFTState:
    """All parameters, and the optimiser's state of the trained ones."""

    params: Params
    opt: Any


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning.

    Attributes:
      steps, batch: optimiser steps and chunks in each.
      lr, warmup: peak of the cosine schedule and steps to reach it.
      optimizer, weight_decay, b2, clip: see ``nn.optimizers``.
      blur: standard deviation in bins of a Gaussian that spreads each target over neighbouring bins; 0 is off.
      early: how often samples of the first half chunk are repeated (``data.batches.sft_chunks``).
      frozen: top-level parts of the network that stay as they are.
    """

    steps: int = 1000
    batch: int = 64
    lr: float = 2e-3
    warmup: int = 50
    optimizer: optimizers.Name = "adamw"
    weight_decay: float = 0.01
    b2: float = 0.98
    clip: float = 1.0
    blur: float = 0.0
    early: int = 1
    frozen: tuple[str, ...] = ("dino", "siglip")

    @classmethod
    def fake(cls) -> SFTConfig:
        """For tests: a few steps of a few chunks."""
        return cls(steps=4, batch=2, warmup=1)


def demonstrations(chunks: Mapping[str, Any], codec: Codec, prompt_KL: Any) -> Demonstrations:
    """On the device: chunks with ``frame_BHWC`` uint8, ``label_BTA`` environment actions and ``task_B``.

    Raises:
      ValueError: when there is no chunk, or frames are not uint8.
    """
    frame = chunks["frame_BHWC"]
    if len(frame) == 0:
        raise ValueError("supervised fine-tuning: expected at least one demonstrated chunk, got none")
    if frame.dtype != jnp.uint8:
        raise ValueError(f"supervised fine-tuning: expected uint8 frames (as on disk), got {frame.dtype}")
    tokens = jax.jit(codec.encode)(jnp.asarray(chunks["label_BTA"], jnp.float32))
    return Demonstrations(jnp.asarray(frame), tokens, jnp.asarray(prompt_KL)[jnp.asarray(chunks["task_B"])])


def loss(net: Pure, params: Params, batch: Demonstrations, blur: float = 0.0) -> tuple[Array, dict[str, Array]]:
    """Mean cross-entropy of a batch, and its metrics (all float32 scalars)."""
    logits = net(params, to_float(batch.frame_BHWC), batch.prompt_BL)
    if blur > 0.0:
        cross = optax.losses.softmax_cross_entropy(logits, blurred_targets(blur)[batch.token_BTA])
    else:
        cross = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch.token_BTA)
    hit = (logits.argmax(-1) == batch.token_BTA).astype(jnp.float32)
    total = cross.mean()
    return total, {"loss": total, "accuracy": hit.mean(), "entropy": entropy(logits).mean()}


def make(
    cfg: VLAConfig, train: SFTConfig, params: Params, data: Demonstrations, key: Array
) -> tuple[SFTState, Callable[[SFTState, Array], tuple[SFTState, dict[str, Array]]]]:
    """First state and ``step(state, i) -> (state, metrics)``, jitted, donated.

    Args:
      cfg: the network.
      train: how to train it.
      params: where to start; copied, because the state is donated.
      data: chunks on the device; an argument of the compiled step, not a constant in it.
      key: batches are drawn from ``fold_in(key, i)``, so a resumed run is the uninterrupted one.

    Raises:
      ValueError: when ``train.frozen`` names a part that the network does not have.
    """
    net, optimiser = network(cfg), optimizer(train)
    unknown = sorted(set(train.frozen) - set(params))
    if unknown:
        raise ValueError(f"SFTConfig.frozen: expected parts of the policy {sorted(params)}, got unknown {unknown}")

    def step(state: SFTState, i: Array, data: Demonstrations) -> tuple[SFTState, dict[str, Array]]:
        row_B = jax.random.randint(jax.random.fold_in(key, i), (train.batch,), 0, data.frame_BHWC.shape[0])
        batch = jax.tree.map(lambda leaf: leaf[row_B], data)
        fixed, free = split(state.params, train.frozen)
        objective = lambda free: loss(net, fixed | free, batch, train.blur)  # noqa: E731
        gradient, metrics = jax.grad(objective, has_aux=True)(free)
        update, opt = optimiser.update(gradient, state.opt, free)
        metrics["gradient"] = optax.tree.norm(gradient)
        moved: Any = optax.apply_updates(free, update)
        return SFTState(fixed | moved, opt), metrics

    jitted = jax.jit(step, donate_argnums=0)
    first = SFTState(jax.tree.map(jnp.copy, params), optimiser.init(split(params, train.frozen)[1]))
    return first, lambda state, i: jitted(state, i, data)


def optimizer(train: SFTConfig) -> optax.GradientTransformation:
    """Of ``train.optimizer``, with warm-up and a cosine to zero."""
    rate = optimizers.warmup_cosine(train.lr, train.warmup, train.steps)
    return optimizers.clipped(train.optimizer, rate, clip=train.clip, b2=train.b2, decay=train.weight_decay)


def split(params: Params, frozen: tuple[str, ...]) -> tuple[Params, Params]:
    """(frozen, free) parts of the parameters by their top-level names."""
    return {k: v for k, v in params.items() if k in frozen}, {k: v for k, v in params.items() if k not in frozen}


def to_float(frame: Array) -> Array:
    """uint8 pixels -> float32 in [-1, 1]."""
    return frame.astype(jnp.float32) / 127.5 - 1.0


def blurred_targets(blur: float) -> Array:
    """(256, 256): row j is a Gaussian over bins around bin j, standard deviation ``blur`` bins."""
    j = jnp.arange(BINS, dtype=jnp.float32)
    return jax.nn.softmax(-0.5 * jnp.square((j[:, None] - j[None, :]) / blur), axis=-1)
