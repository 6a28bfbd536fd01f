"""Action tokens: 256 bins, statistics, the gripper's two conventions, and the categorical policy.

Token ids live in *slice coordinates* ``j`` in [0, 256): ``j = id - action_begin``. The order is
OpenVLA's: ``j = 0`` is the **largest** action and 0 and 1 decode to the same value, because 256 bin
edges have 255 centres (openvla-oft: prismatic/vla/action_tokenizer.py).

One forward pass gives every slot's distribution and slots are sampled independently, so a chunk's
log-probability is the sum over its slots; all functions below keep the slots apart. Everything here
is float32, whatever the network computes in.
"""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax.types import ACTION_DIM, Array

BINS = 256
"""Number of action ids K; fixed by the release format."""


@dataclasses.dataclass(frozen=True)
class Codec:
    """Between environment actions and tokens.

    Attributes:
      q01, q99: the 1 % and 99 % quantiles of each action dimension; they map to -1 and 1.
      mask: False for a dimension that is not normalised (the gripper).
      gripper: index of the gripper dimension, or -1 when there is none. The network sees
        1 = open, 0 = closed; the environment -1 = open, +1 = closed.
    """

    q01: tuple[float, ...] = (-1.0,) * ACTION_DIM
    q99: tuple[float, ...] = (1.0,) * ACTION_DIM
    mask: tuple[bool, ...] = (True,) * (ACTION_DIM - 1) + (False,)
    gripper: int = ACTION_DIM - 1

    def __post_init__(self) -> None:
        lengths = (len(self.q01), len(self.q99), len(self.mask))
        if len(set(lengths)) != 1:
            raise ValueError(f"action codec: q01, q99 and mask must have one length, got {lengths}")

    @classmethod
    def from_statistics(cls, statistics: dict) -> Codec:
        """Reads the ``action`` entry of a ``dataset_statistics.json``; a missing mask means all True."""
        q01, q99 = tuple(map(float, statistics["q01"])), tuple(map(float, statistics["q99"]))
        return cls(q01, q99, tuple(map(bool, statistics.get("mask", (True,) * len(q01)))), len(q01) - 1)

    def encode(self, action_BTA: Array) -> Array:
        """Returns tokens (int32, same shape) of environment actions (..., A); out of range is clipped."""
        self._check(action_BTA)
        x = jnp.clip(self.normalise(action_BTA), -1.0, 1.0)
        # digitize counts the edges at or below x, 1 to 256, and OpenVLA takes that from the end of its vocabulary: the
        # largest action has the smallest id. In slice coordinates that is 256 - count.
        return BINS - jnp.digitize(x, jnp.linspace(-1.0, 1.0, BINS)).astype(jnp.int32)

    def decode(self, token_BTA: Array) -> Array:
        """Returns environment actions (float32, same shape) of tokens (..., A) in [0, 256)."""
        self._check(token_BTA)
        # The way back, to one of 255 centres: the count 256, of x = 1 exactly, shares the last bin with 255.
        centre_index = jnp.clip(BINS - 1 - token_BTA, 0, BINS - 2)
        return self.unnormalise(centres()[centre_index])

    def normalise(self, action_BTA: Array) -> Array:
        """Turns environment actions into what the bins cover, [-1, 1]; gripper 1 open, 0 closed."""
        # q01 -> -1, q99 -> 1. The 1e-8 is upstream's, against a dimension that never moves.
        low, high, mask = self._arrays()
        x = jnp.where(mask, 2.0 * (action_BTA - low) / (high - low + 1e-8) - 1.0, action_BTA)
        return jnp.where(self._is_gripper(), (action_BTA < 0.0).astype(jnp.float32), x)

    def unnormalise(self, x_BTA: Array) -> Array:
        """Turns bin values into environment actions; the gripper becomes exactly -1 or +1."""
        low, high, mask = self._arrays()
        action = jnp.where(mask, 0.5 * (x_BTA + 1.0) * (high - low + 1e-8) + low, x_BTA)
        # No centre is 0.5, so the sign is never 0: open above it (environment -1), closed below it (+1).
        return jnp.where(self._is_gripper(), -jnp.sign(2.0 * x_BTA - 1.0), action)

    def _arrays(self) -> tuple[Array, Array, Array]:
        return jnp.asarray(self.q01, jnp.float32), jnp.asarray(self.q99, jnp.float32), jnp.asarray(self.mask)

    def _is_gripper(self) -> Array:
        return jnp.arange(len(self.q01)) == self.gripper

    def _check(self, array: Array) -> None:
        chex.assert_axis_dimension(array, -1, len(self.q01), custom_message="actions: dimensions of the statistics")


def centres() -> Array:
    """Returns (255,) float32: the midpoints of the 256 bin edges in [-1, 1], ascending."""
    # In float64, as upstream: made in float32 they would differ from the released actions by a last place.
    edges = np.linspace(-1.0, 1.0, BINS)
    return jnp.asarray((edges[:-1] + edges[1:]) / 2.0, jnp.float32)


def sample(logits_BTAK: Array, key_B: Array, temperature: float = 1.0) -> Array:
    """Draws int32 tokens (B, T, A), each slot on its own; one key a trajectory, so rows do not depend on the batch."""
    draw = jax.vmap(lambda key, logits: jax.random.categorical(key, logits, axis=-1))
    return draw(key_B, _divide(logits_BTAK, temperature)).astype(jnp.int32)


def greedy(logits_BTAK: Array) -> Array:
    """Returns int32 tokens (B, T, A): the likeliest of the 256."""
    return jnp.argmax(logits_BTAK, axis=-1).astype(jnp.int32)


def log_prob(logits_BTAK: Array, token_BTA: Array, temperature: float = 1.0) -> Array:
    """Returns (B, T, A) log-probabilities of ``token_BTA`` under the logits over the temperature."""
    # The softmax is over the 256 action ids alone, as sampling is: no mass lies on words.
    logp_BTAK = jax.nn.log_softmax(_divide(logits_BTAK, temperature), axis=-1)
    # (B, T, A, K) at (B, T, A, 1) -> (B, T, A)
    return jnp.take_along_axis(logp_BTAK, token_BTA[..., None], axis=-1)[..., 0]


def entropy(logits_BTAK: Array, temperature: float = 1.0) -> Array:
    """Returns the (B, T, A) entropy in nats of each slot's distribution at the temperature."""
    logp_BTAK = jax.nn.log_softmax(_divide(logits_BTAK, temperature), axis=-1)
    return -jnp.sum(jnp.exp(logp_BTAK) * logp_BTAK, axis=-1)


def _divide(logits_BTAK: Array, temperature: float) -> Array:
    chex.assert_axis_dimension(logits_BTAK, -1, BINS, custom_message="action logits: the action ids alone")
    # In float32: PPO's ratio is the exponential of a difference of log-probabilities, which lie around -log 256, where
    # bfloat16 has steps of 1/32.
    return logits_BTAK.astype(jnp.float32) / temperature
