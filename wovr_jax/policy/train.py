"""Supervised fine-tuning: token cross-entropy on demonstrated chunks.

All slots of a chunk are predicted at once from one frame and the prompt, so a sample is (frame, prompt,
T x A tokens) and the loss is the mean cross-entropy over the 256 action ids of every slot (OFT's discrete
recipe, openvla-oft: vla-scripts/finetune.py; the loss is restricted to the action ids, as sampling is).

Trained are whole parts of the network, or low-rank adapters (``nn.lora``) beside it. The state holds what is trained
and nothing else, and so does its checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from wovr_jax.core import sharding
from wovr_jax.core.config import Count, Decay, Natural, NonNegative, Positive, checked
from wovr_jax.nn import lora
from wovr_jax.nn.functional import Pure
from wovr_jax.nn.lora import LoRAConfig
from wovr_jax.policy import adapters
from wovr_jax.policy.actions import BINS, Codec, entropy, greedy, log_prob
from wovr_jax.policy.vla import AXES, VLAConfig, network
from wovr_jax.train import optimizers
from wovr_jax.train.loop import Shown
from wovr_jax.types import Array, Params

ADAPTERS = 2**32 - 1
"""Folded into the key that fresh adapters are drawn from; no step has this number."""


@struct.dataclass
class Demonstrations:
    """Chunks to imitate, resident on the device; here B counts chunks of the data set.

    Attributes:
      frame_BHWC: uint8; (B, V, H, W, 3) for a policy of several pictures.
      token_BTA: int32 in [0, 256), slice coordinates.
      prompt_BL: int32.
      state_BR: float32 in [-1, 1], for a policy that takes the robot's state.
    """

    frame_BHWC: Array
    token_BTA: Array
    prompt_BL: Array
    state_BR: Array | None = None


@struct.dataclass
class SFTState:
    """The trained parameters, parts of the network or adapters, and the optimiser's state of them."""

    trained: Params
    opt: Any


@checked
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
      lora: train adapters instead of the weights.
      validate_every: steps between measurements on held-out chunks; one is always made at the end, and with 0 only
        that one.
    """

    steps: Natural = 1000
    batch: Count = 64
    lr: Positive = 2e-3
    warmup: Natural = 50
    optimizer: optimizers.Name = "adamw"
    weight_decay: NonNegative = 0.01
    b2: Decay = 0.98
    clip: Positive = 1.0
    blur: NonNegative = 0.0
    early: Count = 1
    frozen: tuple[str, ...] = ("dino", "siglip")
    lora: LoRAConfig | None = None
    validate_every: Natural = 100

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
    logits = net(params, to_float(batch.frame_BHWC), batch.prompt_BL, batch.state_BR)
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
      params: where to start; never changed.
      data: chunks on the device; an argument of the compiled step, not a constant in it.
      key: batches are drawn from ``fold_in(key, i)``, so a resumed run is the uninterrupted one.

    Raises:
      ValueError: when ``train.frozen`` or ``train.lora`` names a part that the network does not have.
    """
    way, data = trainable(cfg, train), sharding.whole(data)
    optimiser = optimizer(train)
    fixed, first = way.begin(params, jax.random.fold_in(key, ADAPTERS))

    def drawn(i: Array, data: Demonstrations) -> Demonstrations:
        row_B = jax.random.randint(jax.random.fold_in(key, i), (train.batch,), 0, data.frame_BHWC.shape[0])
        return sharding.batch(jax.tree.map(lambda leaf: leaf[row_B], data))

    def step(
        state: SFTState, i: Array, fixed: Params, data: Demonstrations
    ) -> tuple[SFTState, dict[str, Array]]:  # fmt: skip
        batch = drawn(i, data)
        objective = lambda trained: loss(way.net, way.whole(fixed, trained), batch, train.blur)  # noqa: E731
        gradient, metrics = jax.grad(objective, has_aux=True)(state.trained)
        update, opt = optimiser.update(gradient, state.opt, state.trained)
        metrics["gradient"] = optax.tree.norm(gradient)
        moved: Any = optax.apply_updates(state.trained, update)
        return sharding.keep(SFTState(moved, opt), AXES), metrics

    jitted = jax.jit(step, donate_argnums=0)
    state, fixed = sharding.place((SFTState(first, optimiser.init(first)), fixed), AXES)
    batch = lambda _, i: jax.jit(drawn)(i, data)  # noqa: E731
    return state, Shown(lambda state, i: jitted(state, i, fixed, data), batch)


def validation(
    cfg: VLAConfig, train: SFTConfig, params: Params, codec: Codec, data: Demonstrations
) -> Callable[[SFTState], dict[str, Array]]:
    """``measure(state) -> metrics`` over all of ``data``, jitted, in batches of ``train.batch``.

    Metrics: ``val_loss``; ``val_accuracy``, the share of tokens that the likeliest one hits; ``val_l1``, the mean
    distance of the decoded environment actions, gripper included.
    """
    way = trainable(cfg, train)
    fixed, _ = way.begin(params, jax.random.key(0))
    count = data.frame_BHWC.shape[0]
    row_NB = np.resize(np.arange(count), (-(-count // train.batch), train.batch))
    weight_NB = (np.arange(row_NB.size) < count).reshape(row_NB.shape)  # the last batch is filled with rows again

    def measure(trained: Params, fixed: Params, data: Demonstrations) -> dict[str, Array]:
        whole = way.whole(fixed, trained)

        def one(rows: tuple[Array, Array]) -> dict[str, Array]:
            row_B, weight_B = rows
            batch = jax.tree.map(lambda leaf: leaf[row_B], data)
            logits = way.net(whole, to_float(batch.frame_BHWC), batch.prompt_BL, batch.state_BR)
            guess_BTA, token_BTA = greedy(logits), batch.token_BTA
            found = {
                "val_loss": -log_prob(logits, token_BTA),
                "val_accuracy": guess_BTA == token_BTA,
                "val_l1": jnp.abs(codec.decode(guess_BTA) - codec.decode(token_BTA)),
            }
            return {name: (x.mean((1, 2)) * weight_B).sum() for name, x in found.items()}

        sums = jax.lax.map(one, (jnp.asarray(row_NB), jnp.asarray(weight_NB)))
        return {name: x.sum() / count for name, x in sums.items()}

    jitted = jax.jit(measure)
    return lambda state: jitted(state.trained, fixed, data)


def weights(cfg: VLAConfig, train: SFTConfig, params: Params, state: SFTState) -> Params:
    """The plain network's parameters after a training that began at ``params``; adapters are merged in float32."""
    if train.lora is None:
        return params | state.trained
    return jax.jit(functools.partial(lora.merge, cfg=adapters.resolved(cfg, train.lora, train.frozen)))(
        params, state.trained
    )


@dataclasses.dataclass(frozen=True)
class PolicyAdapters:
    """What adapters belong to; it is kept beside them wherever they lie alone.

    Attributes:
      network: the policy.
      lora: which layers are adapted, by their paths, and how.
    """

    network: VLAConfig
    lora: LoRAConfig


class Trainable(NamedTuple):
    """What a fine-tuning trains, and how the network runs meanwhile.

    Attributes:
      net: the network in training.
      begin: ``begin(params, key) -> (fixed, trained)``; ``trained`` shares no memory with ``params``.
      whole: ``whole(fixed, trained)``, the parameters of ``net``.
    """

    net: Pure
    begin: Callable[[Params, Array], tuple[Params, Params]]
    whole: Callable[[Params, Params], Params]


def trainable(cfg: VLAConfig, train: SFTConfig) -> Trainable:
    """Parts of the network, or with ``train.lora`` adapters beside it."""
    unknown = sorted(set(train.frozen) - set(network(cfg).shapes()))
    if unknown:
        raise ValueError(
            f"SFTConfig.frozen: expected parts of the policy {sorted(network(cfg).shapes())}, got unknown {unknown}"
        )
    if train.lora is None:
        parts = lambda params: split(params, train.frozen)  # noqa: E731
        begin = lambda params, key: (parts(params)[0], jax.tree.map(jnp.copy, parts(params)[1]))  # noqa: E731
        return Trainable(network(cfg), begin, lambda fixed, trained: fixed | trained)
    own = adapters.resolved(cfg, train.lora, train.frozen)
    return Trainable(adapters.adapted(cfg, own), lambda params, key: (params, lora.init(key, params, own)), lora.join)


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
