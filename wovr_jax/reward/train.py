"""Labelled frames -> a trained success classifier: batches drawn on the device, cross-entropy, AdamW.

Successes are rare in the rollouts, so a batch is put together from pools in fixed shares:
successes, failures, an extra pool (near misses, frames that a world model made) with
whatever labels it has, and successes shown under another instruction, which are failures.
Labels are of frames, not of episodes. The official training code of this classifier is not
public; defaults follow the reimplementation that trains it with AdamW at 1e-4.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from wovr_jax.core import pixels, sharding
from wovr_jax.core.config import Count, Faults, Natural, NonNegative, Positive, Share, checked
from wovr_jax.reward import classifier
from wovr_jax.reward.calibrate import Rule
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.train import optimizers
from wovr_jax.train import step as train_step
from wovr_jax.train.step import Objective, ReplayableStep, TrainState
from wovr_jax.types import Array, Params


@checked
@dataclasses.dataclass(frozen=True)
class RewardTrainConfig:
    """How the classifier is trained.

    Attributes:
      lr: peak learning rate.
      warmup: steps of its linear rise.
      steps: steps after which a cosine has brought it to 0; 0 keeps it constant. A run takes so many, and with 0 it
        uses its ``reward_weights`` as they are.
      weight_decay, clip_norm: of AdamW.
      batch: frames of a batch.
      positive: share of successes in a batch.
      extra: share of the extra pool.
      swap: share of successes under another instruction, labelled failures. The rest are failures.
      pos_weight: weight of successes in the loss (torch's ``pos_weight``).
      stride: only every so many frames of an episode are used, the first one included.
      rule, max_fpr: how the threshold is chosen (``calibrate.choose``).
      threshold: under the rule ``fixed``.
    """

    lr: Positive = 1e-4
    warmup: Natural = 0
    steps: Natural = 1000
    weight_decay: NonNegative = 1e-4
    clip_norm: Positive = 1.0
    batch: Count = 64
    positive: Share = 0.5
    extra: Share = 0.0
    swap: Share = 0.0
    pos_weight: Positive = 1.0
    stride: Count = 1
    rule: Rule = "rate"
    max_fpr: Share = 0.05
    threshold: Share = 0.5

    def faults(self) -> Faults:
        """Yields shares that fill more than a batch."""
        if min(self.counts) < 0:
            shares = f"positive={self.positive}, extra={self.extra}, swap={self.swap}"
            yield "positive", f"expected shares of at most 1 together, got {shares}"

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Frames of a batch that are successes, swapped successes, extras, failures."""
        positive, swap, extra = (round(self.batch * share) for share in (self.positive, self.swap, self.extra))
        return positive, swap, extra, self.batch - positive - swap - extra


@struct.dataclass
class RewardData:
    """Frames on the device and the pools that batches are drawn from (see ``dataset``).

    Attributes:
      frame_XHWC: uint8.
      label_X: bool, success.
      task_X: int32.
      positive_P, negative_Q, extra_E: int32 indices into the frames.
      task_K: int32, the tasks that occur, ascending.
    """

    frame_XHWC: Array
    label_X: Array
    task_X: Array
    positive_P: Array
    negative_Q: Array
    extra_E: Array
    task_K: Array


def dataset(
    frame_XHWC: np.ndarray, label_X: np.ndarray, task_X: np.ndarray, extra_X: np.ndarray | None = None
) -> RewardData:
    """Sorts frames into pools and puts them on the devices.

    Args:
      frame_XHWC: uint8.
      label_X: bool, whether the frame shows success of its own task.
      task_X: task indices.
      extra_X: bool, frames of the extra pool; they are left out of the other two.

    Raises:
      ValueError: for floating frames, lengths that differ, no success, or no failure.
    """
    label_X, task_X = np.asarray(label_X, bool), np.asarray(task_X, np.int32)
    extra_X = np.zeros(len(label_X), bool) if extra_X is None else np.asarray(extra_X, bool)
    # A quarter of the memory of floats, and they are converted batch by batch.
    if frame_XHWC.dtype != np.uint8:
        raise ValueError(f"reward data: expected uint8 frames, as on disk, got {frame_XHWC.dtype}")
    lengths = {"frame": len(frame_XHWC), "label": len(label_X), "task": len(task_X), "extra": len(extra_X)}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"reward data: one entry a frame expected, got {lengths}")
    # Extra frames are drawn from their own pool alone, or their share of a batch would depend on how many there are.
    pools = [np.flatnonzero(pool).astype(np.int32) for pool in (label_X & ~extra_X, ~label_X & ~extra_X, extra_X)]
    for name, pool in zip(("success", "failure"), pools, strict=False):  # the extra pool may be empty
        if not len(pool):
            raise ValueError(
                f"reward data: none of {len(label_X)} frames is a {name}, so the classifier cannot learn to tell; "
                "collect more episodes, or add demonstrations (which succeed) and base rollouts (which fail)"
            )
    return sharding.whole(RewardData(*map(jnp.asarray, (frame_XHWC, label_X, task_X, *pools, np.unique(task_X)))))


@dataclasses.dataclass(frozen=True)
class RewardObjective(Objective):
    """Labelled frames, told apart by the classifier.

    Attributes:
      cfg: the classifier.
      train: how to train it.
    """

    cfg: RewardConfig
    train: RewardTrainConfig

    def optimizer(self) -> optax.GradientTransformation:
        """Clipped AdamW on everything but the running statistics."""
        rate = optimizers.ramp_cosine(self.train.lr, self.train.warmup, self.train.steps)
        clip, decay = self.train.clip_norm, self.train.weight_decay
        return optimizers.build("adamw", rate, clip=clip, decay=decay, moves=lambda path: not self.is_statistic(path))

    def draw(self, key: Array, data: RewardData) -> tuple[tuple[Array, Array, Array], Array]:
        """See :func:`draw`; the loss draws what dropout leaves out."""
        k_draw, k_dropout = jax.random.split(key)
        return sharding.batch(draw(self.train, data, k_draw)), k_dropout

    def loss(
        self, params: Params, fixed: None, batch: tuple[Array, Array, Array], key: Array
    ) -> tuple[Array, dict[str, Array], Params]:
        """Cross-entropy; batch normalisation leaves new running statistics behind."""
        del fixed
        frame_BHWC, label_B, task_B = batch
        # In training batch normalisation takes the batch's own mean and variance, and averages them for use.
        logit_B, seen = classifier.network(self.cfg).mutate(params, frame_BHWC, task_B, train=True, key=key)
        # A logit above 0 is a probability above a half; the threshold of use is chosen after training.
        accuracy = jnp.mean((logit_B > 0) == label_B, dtype=jnp.float32)
        return cross_entropy(logit_B, label_B, self.train.pos_weight), {"accuracy": accuracy}, seen

    def is_statistic(self, path: tuple[Any, ...]) -> bool:
        """See ``classifier.is_statistic``."""
        return classifier.is_statistic(path)


def make(
    cfg: RewardConfig, training: RewardTrainConfig, params: Params, data: RewardData, key: Array
) -> tuple[TrainState, ReplayableStep]:
    """Returns the first state and the step, see ``train.step.make``.

    Args:
      cfg: the classifier.
      training: how to train it.
      params: where to start; never changed.
      data: frames and their pools, see :func:`dataset`.
      key: of batches and dropout.

    Raises:
      ValueError: for shares that the data or the network cannot serve.
    """
    if training.extra and not data.extra_E.size:
        raise ValueError(f"RewardTrainConfig.extra is {training.extra}, but dataset(extra_X=...) marked no frames")
    # Without a task head the classifier cannot see which instruction a success is shown under.
    if training.swap and (cfg.head != "task" or data.task_K.size < 2):
        raise ValueError(
            f"RewardTrainConfig.swap is {training.swap}: it needs the task head (this one is {cfg.head!r}) and at "
            f"least two tasks (the data has {data.task_K.size})"
        )
    # On a device an index beyond the embedding's table raises nothing.
    largest = int(data.task_K[-1])
    if cfg.head == "task" and largest >= cfg.tasks:
        raise ValueError(f"RewardConfig.tasks is {cfg.tasks}, but the data has task {largest}")
    return train_step.make(RewardObjective(cfg, training), params, train_step.resident(data), key)


def draw(training: RewardTrainConfig, data: RewardData, key: Array) -> tuple[Array, Array, Array]:
    """Draws a batch: frame_BHWC float32 in [-1, 1], label_B bool, task_B int32; pools one after the other.

    Draws are uniform with replacement inside each pool.
    """
    k_positive, k_swap, k_extra, k_negative, k_task = jax.random.split(key, 5)
    # Shares are counts, not chances: every batch has the same shapes, and none is without a success.
    positive, swap, extra, negative = training.counts
    index_B = jnp.concatenate(
        [
            _choose(k_positive, data.positive_P, positive),
            _choose(k_swap, data.positive_P, swap),
            _choose(k_extra, data.extra_E, extra),
            _choose(k_negative, data.negative_Q, negative),
        ]
    )
    # The second pool: true successes, shown under an instruction that they do not fulfil.
    slot_B = jnp.arange(training.batch)
    swapped_B = (slot_B >= positive) & (slot_B < positive + swap)
    task_B = jnp.where(swapped_B, _another(k_task, data.task_X[index_B], data.task_K), data.task_X[index_B])
    return pixels.to_float(data.frame_XHWC[index_B]), data.label_X[index_B] & ~swapped_B, task_B


def cross_entropy(logit_B: Array, label_B: Array, pos_weight: float = 1.0) -> Array:
    """Returns the mean binary cross-entropy, successes weighted (torch's ``BCEWithLogitsLoss(pos_weight=...)``)."""
    # log(sigmoid(x)) computed as it stands is log(0) for very negative x.
    success_B, failure_B = jax.nn.log_sigmoid(logit_B), jax.nn.log_sigmoid(-logit_B)
    # The mean over all frames, as torch takes it, and not over their weights.
    return -jnp.mean(jnp.where(label_B, pos_weight * success_B, failure_B))


def predict(
    cfg: RewardConfig, params: Params, frame_XHWC: np.ndarray, task_X: np.ndarray, batch: int = 256
) -> np.ndarray:
    """Returns the success probabilities of uint8 frames on the host, computed in batches of one shape."""
    total, task_X = len(frame_XHWC), np.asarray(task_X, np.int32)
    probabilities = []
    for begin in range(0, total, batch):
        # The last batch is filled with its last frame: another shape would compile anew.
        index = np.minimum(np.arange(begin, begin + batch), total - 1)
        probabilities.append(sharding.host(_predict_batch(cfg)(params, frame_XHWC[index], task_X[index])))
    return np.concatenate(probabilities)[:total] if probabilities else np.zeros(0, np.float32)


@functools.cache
def _predict_batch(cfg: RewardConfig) -> Callable:
    pure = classifier.network(cfg)
    return jax.jit(lambda params, frame_BHWC, task_B: jax.nn.sigmoid(pure(params, pixels.to_float(frame_BHWC), task_B)))


def _choose(key: Array, pool_P: Array, count: int) -> Array:
    if not count:  # the pool may be empty then, and nothing can be drawn below 0
        return jnp.zeros((0,), pool_P.dtype)
    return pool_P[jax.random.randint(key, (count,), 0, pool_P.shape[0])]


def _another(key: Array, task_B: Array, task_K: Array) -> Array:
    """Draws a task of the data, uniformly among those that are not ``task_B``."""
    # A shift by 1 .. K - 1 places around the sorted tasks reaches each of the others once and never the task itself.
    others = max(task_K.shape[0] - 1, 1)
    shift_B = 1 + jax.random.randint(key, task_B.shape, 0, others)
    return task_K[(jnp.searchsorted(task_K, task_B) + shift_B) % task_K.shape[0]]
