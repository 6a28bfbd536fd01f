"""Training of the policy: supervised fine-tuning, and the adapters that fine-tuning and RL train alike.

All slots of a chunk are predicted at once from one frame and the prompt, so a sample is (frame, prompt,
T x A tokens) and the loss is the mean cross-entropy over the 256 action ids of every slot (OFT's discrete
recipe, openvla-oft: vla-scripts/finetune.py; the loss is restricted to the action ids, as sampling is).

Trained are whole parts of the network, or low-rank adapters (``nn.lora``) beside it. The state holds what is trained
and nothing else, and so does its checkpoint. RL itself is in ``learner``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from wovr_jax.core import pixels, sharding
from wovr_jax.core.config import Count, Decay, Faults, Natural, Positive, checked
from wovr_jax.nn import lora
from wovr_jax.nn.functional import Pure
from wovr_jax.policy.actions import Codec, entropy, greedy, log_prob
from wovr_jax.policy.vla import AXES, VLA, PolicyLoRA, VLAConfig, for_use, network
from wovr_jax.train import step as train_step
from wovr_jax.train.optimizers import TrainingConfig
from wovr_jax.train.step import Objective, ReplayableStep, TrainState
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


@checked
@dataclasses.dataclass(frozen=True)
class SFTConfig(TrainingConfig):
    """Supervised fine-tuning; a sample is a chunk.

    Attributes:
      early: how often samples of the first half chunk are repeated (``data.batches.sft_chunks``).
      frozen: top-level parts of the network that stay as they are.
      lora: train adapters instead of the weights.
      validate_every: steps between measurements on held-out chunks; one is always made at the end, and with 0 only
        that one.
      patience: the training stops when ``val_loss`` has not improved for so many measurements, and the policy is that
        of the best of them; 0 takes all steps and the policy of the last.
    """

    batch: Count = 64
    lr: Positive = 2e-3
    b2: Decay = 0.98
    early: Count = 1
    frozen: tuple[str, ...] = ("dino", "siglip")
    lora: PolicyLoRA | None = None
    validate_every: Natural = 100
    patience: Natural = 0

    def faults(self) -> Faults:
        """Yields a patience that nothing tries, or that would cut a cosine off at a rate which was to fall."""
        if self.patience and not (self.validate_every and self.schedule == "constant"):
            yield "patience", f"expected 0 without validate_every and schedule='constant', got {self.patience}"


def demonstrations(chunks: Mapping[str, Any], codec: Codec, prompt_KL: Any) -> Demonstrations:
    """Puts chunks on the device: ``frame_BHWC`` uint8, ``label_BTA`` environment actions and ``task_B``.

    Raises:
      ValueError: when there is no chunk, or frames are not uint8.
    """
    frame = chunks["frame_BHWC"]
    if len(frame) == 0:
        raise ValueError("supervised fine-tuning: expected at least one demonstrated chunk, got none")
    if frame.dtype != jnp.uint8:
        raise ValueError(f"supervised fine-tuning: expected uint8 frames (as on disk), got {frame.dtype}")
    # Tokens once for all: the codec is the same for every epoch.
    tokens = jax.jit(codec.encode)(jnp.asarray(chunks["label_BTA"], jnp.float32))
    return Demonstrations(jnp.asarray(frame), tokens, jnp.asarray(prompt_KL)[jnp.asarray(chunks["task_B"])])


@dataclasses.dataclass(frozen=True)
class SFTObjective(Objective):
    """Demonstrated chunks, imitated by parts of the policy or by adapters beside it.

    Attributes:
      cfg: the policy.
      train: how to train it.
    """

    cfg: VLAConfig
    train: SFTConfig

    axes = AXES

    def draw(self, key: Array, data: Demonstrations) -> tuple[Demonstrations, Array]:
        """Draws chunks uniformly with replacement; the loss draws nothing."""
        # With replacement: without it an epoch's order would be state that a resumption has to know.
        row_B = jax.random.randint(key, (self.train.batch,), 0, data.frame_BHWC.shape[0])
        return sharding.batch(jax.tree.map(lambda leaf: leaf[row_B], data)), key

    def loss(self, params: Params, fixed: Params, batch: Demonstrations, key: Array) -> tuple[Array, dict[str, Array]]:
        """See :func:`loss`."""
        del key
        return loss(self.net, self.join(fixed, params), batch)

    @property
    def net(self) -> Pure:
        """The network in training, of the parameters that ``join`` makes."""
        # Both are kept by their settings, so that asking again inside a trace builds nothing.
        return network(self.cfg) if self.train.lora is None else adapted_network(self.cfg, self.adapters)

    @property
    def adapters(self) -> PolicyLoRA:
        """The adapters, resolved to the layers that they belong to."""
        assert self.train.lora is not None
        return resolve_targets(self.cfg, self.train.lora, self.train.frozen)

    def split(self, params: Params, key: Array) -> tuple[Params, Params]:
        """Returns what stays as it is and what is trained, fresh adapters from ``key`` among it."""
        if self.train.lora is not None:
            return params, lora.init(key, params, self.adapters)
        # Whole parts, by their names at the top: no gradient and no moments are made for what is fixed.
        fixed = {name: part for name, part in params.items() if name in self.train.frozen}
        return fixed, {name: part for name, part in params.items() if name not in fixed}

    def join(self, fixed: Params, trained: Params) -> Params:
        """Returns the parameters of ``net``."""
        return fixed | trained if self.train.lora is None else lora.join(fixed, trained)


def loss(net: Pure, params: Params, batch: Demonstrations) -> tuple[Array, dict[str, Array]]:
    """Returns the mean cross-entropy of a batch, and metrics (all float32 scalars)."""
    logits = net(params, pixels.to_float(batch.frame_BHWC), batch.prompt_BL, batch.state_BR)
    cross = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch.token_BTA)
    # Every slot of every chunk counts alike, (B, T, A): they are predicted at once, none from another.
    hit = (logits.argmax(-1) == batch.token_BTA).astype(jnp.float32)
    return cross.mean(), {"accuracy": hit.mean(), "entropy": entropy(logits).mean()}


def make(
    cfg: VLAConfig, train: SFTConfig, params: Params, data: Demonstrations, key: Array
) -> tuple[TrainState, ReplayableStep]:
    """Returns the first state and the step, see ``train.step.make``.

    Args:
      cfg: the network.
      train: how to train it.
      params: where to start; never changed.
      data: chunks on the device.
      key: of batches and fresh adapters.

    Raises:
      ValueError: when ``train.frozen`` or ``train.lora`` names a part that the network does not have.
    """
    parts = network(cfg).shapes()
    if unknown := sorted(set(train.frozen) - set(parts)):
        raise ValueError(f"SFTConfig.frozen: expected parts of the policy {sorted(parts)}, got unknown {unknown}")
    objective = SFTObjective(cfg, train)
    # Fresh adapters come from a key that no step folds in.
    fixed, trained = objective.split(params, jax.random.fold_in(key, ADAPTERS))
    return train_step.make(objective, trained, train_step.resident(data), key, fixed=fixed)


def validation(
    cfg: VLAConfig, train: SFTConfig, params: Params, codec: Codec, data: Demonstrations
) -> Callable[[TrainState], dict[str, Array]]:
    """Returns ``measure(state) -> metrics`` over all of ``data``, jitted, in batches of ``train.batch``.

    Metrics: ``val_loss``; ``val_accuracy``, the share of tokens that the likeliest one hits; ``val_l1``, the mean
    distance of the decoded environment actions, gripper included.
    """
    objective = SFTObjective(cfg, train)
    # Only what is fixed is wanted here; the adapters that come with it are thrown away.
    fixed, _ = objective.split(params, jax.random.key(0))
    count = data.frame_BHWC.shape[0]
    # (N, B): the last batch is filled with rows again, which weigh nothing, so that all batches have one shape.
    row_NB = np.resize(np.arange(count), (-(-count // train.batch), train.batch))
    weight_NB = (np.arange(row_NB.size) < count).reshape(row_NB.shape)

    def measure(trained: Params, fixed: Params, data: Demonstrations) -> dict[str, Array]:
        joined = objective.join(fixed, trained)

        def measure_batch(rows: tuple[Array, Array]) -> dict[str, Array]:
            row_B, weight_B = rows
            batch = jax.tree.map(lambda leaf: leaf[row_B], data)
            logits = objective.net(joined, pixels.to_float(batch.frame_BHWC), batch.prompt_BL, batch.state_BR)
            guess_BTA, token_BTA = greedy(logits), batch.token_BTA
            metrics = {
                "val_loss": -log_prob(logits, token_BTA),
                "val_accuracy": guess_BTA == token_BTA,
                "val_l1": jnp.abs(codec.decode(guess_BTA) - codec.decode(token_BTA)),
            }
            # (B, T, A) -> (B,) -> a sum over the rows that count.
            return {name: (x.mean((1, 2)) * weight_B).sum() for name, x in metrics.items()}

        # Batch after batch: all logits at once, (count, T, A, 256), would not fit beside the network.
        sums = jax.lax.map(measure_batch, (jnp.asarray(row_NB), jnp.asarray(weight_NB)))
        return {name: x.sum() / count for name, x in sums.items()}

    jitted = jax.jit(measure)
    return lambda state: jitted(state.params, fixed, data)


def merge_weights(cfg: VLAConfig, train: SFTConfig, params: Params, state: TrainState) -> Params:
    """Returns the plain network's parameters after a training from ``params``; adapters are merged in float32."""
    if train.lora is None:
        return params | state.params
    merge = functools.partial(lora.merge, cfg=SFTObjective(cfg, train).adapters)
    return jax.jit(merge)(params, state.params)


# --- adapters -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PolicyAdapters:
    """What adapters belong to; it is kept beside them wherever they lie alone.

    Attributes:
      network: the policy.
      lora: which layers are adapted, by their paths, and how.
    """

    network: VLAConfig
    lora: PolicyLoRA


def resolve_targets(cfg: VLAConfig, adapters: PolicyLoRA, frozen: Sequence[str] = ()) -> PolicyLoRA:
    """Returns ``adapters`` with the paths of the layers that they adapt; ``frozen`` parts of the policy have none.

    Raises:
      ValueError: when no layer is left, or a target is no layer.
    """
    # Paths instead of patterns: what lies in a file then says which layers it belongs to.
    paths = lora.targets(network(cfg).shapes(), adapters)
    return dataclasses.replace(adapters, targets=tuple(path for path in paths if path.split("/")[0] not in frozen))


@functools.cache
def adapted_network(cfg: VLAConfig, adapters: PolicyLoRA) -> Pure:
    """The policy with adapters, as a pure function of what ``lora.join`` makes."""
    return Pure(lambda rngs: lora.adapt(VLA(cfg, rngs=rngs), adapters))


class RLPolicy(NamedTuple):
    """A policy as RL runs it: by itself, or with adapters beside it.

    Attributes:
      net: the network, for actor and learner alike; rounded otherwise in one of them, the ratios would not begin at 1.
      begin: ``begin(params, key)``: the plain network's parameters -> those of ``net``, which does the same with them.
        Beside adapters they are no longer trained, and are held as the policy is for use.
      plain: ``plain(params, base)``: the way back; adapters are folded in, in float32, into what ``base()`` gives, the
        plain parameters that ``begin`` was given, in arrays that nobody needs afterwards.
    """

    net: Pure
    begin: Callable[[Params, Array], Params]
    plain: Callable[[Params, Callable[[], Params]], Params]


def make_rl_policy(cfg: VLAConfig, adapters: PolicyLoRA | None, frozen: Sequence[str] = ()) -> RLPolicy:
    """Returns the policy with ``adapters``, if any, except in its ``frozen`` parts.

    Raises:
      ValueError: as :func:`resolve_targets`.
    """
    if adapters is None:  # the very functions and arrays, so that nothing compiles or is copied for its sake
        return RLPolicy(network(cfg), lambda params, key: params, lambda params, base: params)
    resolved = resolve_targets(cfg, adapters, frozen)

    # Adapters start at a product of zero, so the first rollouts are the plain policy's.
    def begin(params: Params, key: Array) -> Params:
        # A convolution adds its adapters' product to the kernel before it rounds the sum.
        return lora.join(for_use(cfg, ("*norm*", "patch_embed/kernel"))(params), lora.init(key, params, resolved))

    # What ``base()`` gives was read for this, and is given up: of a 7B policy there would be 30 GB more.
    merge = jax.jit(lambda base, adapters: lora.merge(base, adapters, resolved), donate_argnums=0)
    return RLPolicy(adapted_network(cfg, resolved), begin, lambda joined, base: merge(base(), lora.separate(joined)[1]))
