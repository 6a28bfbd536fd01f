"""Inverse dynamics: which action led from one frame to the next? Trained on true episodes, asked of imagined ones.

A world model that shows something else than what was commanded betrays itself here: the action that its frames look
like is not the one that it was given (SC3-Eval ends a rollout where the two part).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from wovr_jax.core import sharding
from wovr_jax.core.config import Count, Natural, checked
from wovr_jax.core.pixels import to_float
from wovr_jax.data import batches
from wovr_jax.nn.functional import Pure
from wovr_jax.train.optimizers import TrainingConfig
from wovr_jax.train.step import Objective
from wovr_jax.types import Array, Episode, Params

SMALLEST = 4
"""Pixels on a side, at which the pictures are no longer halved: where something moved is what the head reads."""
STILL = 1e-3
"""A dimension of the actions that deviates less than this in all episodes says nothing."""


@checked
@dataclasses.dataclass(frozen=True)
class InverseConfig:
    """Sizes of the network.

    Attributes:
      size: pixels of the frames' height.
      columns: of their width; 0 for as many.
      actions: A, dimensions of an action.
      width: channels of the first convolution; each further one doubles them, up to eight times.
      hidden: width of the head.
    """

    size: Count = 32
    columns: Natural = 0
    actions: Count = 7
    width: Count = 32
    hidden: Count = 128

    @property
    def stages(self) -> int:
        """Convolutions, each of which halves the picture."""
        return max(int(np.log2(self.size / SMALLEST)), 1)


class Inverse(nnx.Module):
    """Two frames, one upon the other, to the action between them."""

    def __init__(self, cfg: InverseConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.layers = nnx.Dict()
        width, height, columns = 6, cfg.size, cfg.columns or cfg.size
        for stage in range(cfg.stages):
            wider = cfg.width * min(2**stage, 8)
            self.layers[f"conv{stage}"] = nnx.Conv(width, wider, (3, 3), strides=(2, 2), rngs=rngs)
            width, height, columns = wider, -(-height // 2), -(-columns // 2)
        self.hidden = nnx.Linear(width * height * columns, cfg.hidden, rngs=rngs)
        self.out = nnx.Linear(cfg.hidden, cfg.actions, rngs=rngs)

    def __call__(self, before_BHWC: Array, after_BHWC: Array) -> Array:
        """Returns (B, A), the action in deviations of the training's actions."""
        x_BHWC = jnp.concatenate([before_BHWC, after_BHWC - before_BHWC], axis=-1)
        for stage in range(self.cfg.stages):
            x_BHWC = nnx.relu(self.layers[f"conv{stage}"](x_BHWC))
        return self.out(nnx.relu(self.hidden(x_BHWC.reshape(len(x_BHWC), -1))))


def network(cfg: InverseConfig) -> Pure:
    """Returns the network without its weights."""
    return Pure(lambda rngs: Inverse(cfg, rngs=rngs))


@struct.dataclass
class Steps:
    """Steps of true episodes on the devices.

    Attributes:
      frame_XHWC: uint8, the frames of all episodes one after another.
      action_XA: float32, the action after each frame; of an episode's last frame there is none.
      step_I: int32, the frames that an action follows.
      scale_A: deviation of the actions, infinite where they do not differ: such a dimension counts nowhere.
    """

    frame_XHWC: Array
    action_XA: Array
    step_I: Array
    scale_A: Array


def collect_steps(episodes: Sequence[Episode]) -> Steps:
    """Puts the steps of episodes, but for the held-out ones, on the devices."""
    kept = [one for one, held in zip(episodes, batches.split(episodes), strict=True) if not held]
    action_XA = np.concatenate([np.concatenate([one.action_SA, one.action_SA[-1:] * 0]) for one in kept])
    ends = np.cumsum([len(one.frame_SHWC) for one in kept]) - 1
    step_I = np.setdiff1d(np.arange(len(action_XA)), ends).astype(np.int32)
    deviation_A = action_XA[step_I].std(axis=0)
    scale_A = np.where(deviation_A < STILL, np.inf, deviation_A).astype(np.float32)
    frames = np.concatenate([one.frame_SHWC for one in kept])
    return sharding.whole(Steps(*map(jnp.asarray, (frames, action_XA, step_I, scale_A))))


@dataclasses.dataclass(frozen=True)
class InverseObjective(Objective):
    """The squared difference of the actions, in their deviations.

    Attributes:
      cfg: the network.
      train: how to train it.
    """

    cfg: InverseConfig
    train: TrainingConfig

    def draw(self, key: Array, data: Steps) -> tuple[tuple[Array, Array, Array], Array]:
        """Steps drawn uniformly."""
        step_B = data.step_I[jax.random.randint(key, (self.train.batch,), 0, len(data.step_I))]
        frames = (to_float(data.frame_XHWC[step_B]), to_float(data.frame_XHWC[step_B + 1]))
        return sharding.batch((*frames, data.action_XA[step_B] / data.scale_A)), key

    def loss(
        self, params: Params, fixed: None, batch: tuple[Array, Array, Array], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """See the class."""
        del fixed, key
        before_BHWC, after_BHWC, action_BA = batch
        return jnp.square(network(self.cfg)(params, before_BHWC, after_BHWC) - action_BA).mean(), {}


def disagree(cfg: InverseConfig, params: Params, frame_BTHWC: Array, action_BTA: Array, scale_A: Array) -> Array:
    """Returns (B,) how far the actions that frames look like are from those commanded, in deviations.

    Args:
      cfg, params: the network.
      frame_BTHWC: T + 1 frames.
      action_BTA: the T actions between them.
      scale_A: of the training.
    """
    batch, steps = action_BTA.shape[:2]
    pairs = (x.reshape(batch * steps, *x.shape[2:]) for x in (frame_BTHWC[:, :-1], frame_BTHWC[:, 1:]))
    seen_BTA = network(cfg)(params, *pairs).reshape(batch, steps, -1)
    # A dimension of infinite scale has the command zero; what the network makes of it is no disagreement.
    error_BTA = jnp.where(jnp.isinf(scale_A), 0.0, seen_BTA - action_BTA / scale_A)
    return jnp.sqrt(jnp.square(error_BTA).mean(axis=(1, 2)))
