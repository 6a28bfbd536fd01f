"""Frames -> does this picture show success? A residual network over single frames.

The layout is ResNet-18's with two departures of the reference: every convolution has a
bias, and the 1x1 convolutions of the shortcuts have no normalisation
(DiffSynth-Studio-RLinf:diffsynth/models/reward_model.py). Two heads: ``"plain"`` reads the
pooled features, ``"task"`` joins them with an embedding of the instruction's index, so that
one network judges several tasks.

    conv stem - norm - relu - (max pool) - stages of residual blocks - mean over pixels - head

The defaults of ``RewardConfig`` are the reference for LIBERO Spatial and Object: 256 pixels, 11.18 M parameters. The
stem is a setting: 7x7 at stride 2 with a max pool suits 256 pixels and would leave one pixel of a 32-pixel frame to the
last stage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from wovr_jax.core.config import Count, Decay, DType, Faults, Share, checked
from wovr_jax.nn.functional import Pure
from wovr_jax.types import Array, Params

EPSILON = 1e-5
"""Of batch normalisation, torch's default."""


@checked
@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Sizes of the classifier.

    Attributes:
      widths: channels of the stages; each stage after the first halves the picture.
      blocks: residual blocks of a stage.
      stem_kernel, stem_stride, stem_pool: first convolution, and whether a 3x3 max pool at
        stride 2 follows it.
      head: ``"plain"`` ignores the task, ``"task"`` embeds it.
      tasks, embed, hidden, dropout: of the task head.
      momentum: share of the new batch in the running statistics, torch's convention (0.1).
      dtype: of the convolutions; normalisation and head stay in float32.
    """

    widths: tuple[Count, ...] = (64, 128, 256, 512)
    blocks: Count = 2
    stem_kernel: Count = 7
    stem_stride: Count = 2
    stem_pool: bool = True
    head: Literal["plain", "task"] = "plain"
    tasks: Count = 10
    embed: Count = 64
    hidden: Count = 256
    dropout: Decay = 0.1
    momentum: Share = 0.1
    dtype: DType = "float32"

    @classmethod
    def resnet18_task(cls, **changes: Any) -> RewardConfig:
        """The reference for LIBERO Goal: ten instructions, 11.33 M parameters."""
        return dataclasses.replace(cls(head="task"), **changes)

    @classmethod
    def tabletop(cls, **changes: Any) -> RewardConfig:
        """32 pixels, three instructions; the stages see 16, 8 and 4 pixels.

        Widths 8, 16, 32, 64 from 32 pixels on cost three times as much on a CPU, where narrow
        convolutions are slow, and told success no better on held-out episodes.
        """
        sizes: dict[str, Any] = {"widths": (16, 32, 64), "stem_kernel": 3, "stem_stride": 2, "stem_pool": False}
        sizes |= {"head": "task", "tasks": 3, "embed": 16, "hidden": 64}
        return cls(**sizes | changes)

    @classmethod
    def libero_small(cls, **changes: Any) -> RewardConfig:
        """64 pixels, the ten instructions of a suite; the stages see 32, 16, 8 and 4 pixels."""
        return cls.tabletop(**{"widths": (16, 32, 64, 64), "tasks": 10} | changes)

    @classmethod
    def fake(cls, **changes: Any) -> RewardConfig:
        """The smallest that has every part, for tests."""
        return cls.tabletop(**{"widths": (4, 6), "stem_stride": 1, "embed": 4, "hidden": 8} | changes)

    def faults(self) -> Faults:
        """Yields a network without a stage."""
        if not self.widths:
            yield "widths", "expected the width of at least one stage, got none"


class Residual(nnx.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, cfg: RewardConfig, width_in: int, width: int, stride: int, *, rngs: nnx.Rngs):
        self.conv1 = _conv(cfg, width_in, width, 3, stride, rngs)
        self.norm1 = _norm(cfg, width, rngs)
        self.conv2 = _conv(cfg, width, width, 3, 1, rngs)
        self.norm2 = _norm(cfg, width, rngs)
        # Where the shape stays the shortcut is the input itself.
        changes = stride != 1 or width_in != width
        self.shortcut = _conv(cfg, width_in, width, 1, stride, rngs) if changes else None

    def __call__(self, x_BHWC: Array, train: bool) -> Array:
        """Runs one block; in training it normalises with the batch and updates the running statistics."""
        y_BHWC = nnx.relu(self.norm1(self.conv1(x_BHWC), use_running_average=not train))
        y_BHWC = self.norm2(self.conv2(y_BHWC), use_running_average=not train)
        # The sum is taken in float32, in which normalisation left the branch.
        return nnx.relu(y_BHWC + (self.shortcut(x_BHWC) if self.shortcut else x_BHWC).astype(y_BHWC.dtype))


class Classifier(nnx.Module):
    """A frame, and for the task head the index of its instruction, to the logit of success."""

    def __init__(self, cfg: RewardConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        # Names are paths of parameters, and rows of the released files' table (``reward.weights``).
        self.stem = _conv(cfg, 3, cfg.widths[0], cfg.stem_kernel, cfg.stem_stride, rngs)
        self.stem_norm = _norm(cfg, cfg.widths[0], rngs)
        self.blocks = nnx.Dict()
        width = cfg.widths[0]
        for name, wider, stride in _blocks(cfg):
            self.blocks[name] = Residual(cfg, width, wider, stride, rngs=rngs)
            width = wider
        if cfg.head == "task":
            self.task = nnx.Embed(cfg.tasks, cfg.embed, embedding_init=nnx.initializers.normal(1.0), rngs=rngs)
            self.hidden = nnx.Linear(width + cfg.embed, cfg.hidden, rngs=rngs)
            width = cfg.hidden
        self.out = nnx.Linear(width, 1, rngs=rngs)

    def __call__(
        self, frame_BHWC: Array, task_B: Array | None = None, *, train: bool = False, key: Array | None = None
    ) -> Array:
        """Computes the logit that each frame shows success.

        Args:
          frame_BHWC: in [-1, 1], clamped, as generated frames overshoot.
          task_B: int32 in [0, tasks); the plain head ignores it.
          train: normalise with this batch and update the running statistics.
          key: for dropout, wanted when ``train`` with the task head.

        Returns:
          logit_B, float32.

        Raises:
          ValueError: the task head without tasks.
          AssertionError: frames or tasks of another rank, width or dtype.
        """
        chex.assert_rank(frame_BHWC, 4, custom_message="reward classifier: frame_BHWC")
        chex.assert_axis_dimension(frame_BHWC, -1, 3, custom_message="reward classifier: colours of frame_BHWC")
        # Bytes would be clipped to white without an error.
        chex.assert_type(frame_BHWC, float, custom_message="reward classifier: frame_BHWC, in [-1, 1]")
        with jax.named_scope("stem"):
            x_BHWC = self.stem(jnp.clip(frame_BHWC, -1.0, 1.0))
            x_BHWC = nnx.relu(self.stem_norm(x_BHWC, use_running_average=not train))
            if self.cfg.stem_pool:
                # Padded with minus infinity, as torch does, so that no pixel beyond the edge ever wins.
                x_BHWC = nnx.max_pool(x_BHWC, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))  # pyright: ignore
        for name, _, _ in _blocks(self.cfg):
            with jax.named_scope(name):
                x_BHWC = self.blocks[name](x_BHWC, train)
        with jax.named_scope("head"):
            feature_BD = jnp.mean(x_BHWC, axis=(1, 2))  # (B, H, W, D) -> (B, D): where in the picture does not matter
            if self.cfg.head == "task":
                if task_B is None:
                    raise ValueError("reward classifier: RewardConfig.head is 'task', so task_B is needed")
                chex.assert_shape(task_B, frame_BHWC.shape[:1], custom_message="reward classifier: task_B")
                chex.assert_type(task_B, int, custom_message="reward classifier: task_B")
                # (B, D) and (B, embed) -> (B, D + embed): the same picture is success of one task and not of another.
                feature_BD = jnp.concatenate([feature_BD, self.task(task_B)], axis=-1)
                feature_BD = nnx.relu(self.hidden(feature_BD))
                feature_BD = nnx.Dropout(self.cfg.dropout)(feature_BD, deterministic=not train, rngs=key)
            return self.out(feature_BD)[:, 0]


def network(cfg: RewardConfig) -> Pure:
    """Returns the classifier without its weights."""
    return Pure(lambda rngs: Classifier(cfg, rngs=rngs))


def is_statistic(path: tuple[Any, ...]) -> bool:
    """Whether a parameter path (of ``jax.tree_util``) is a running mean or variance, which no optimizer touches."""
    return getattr(path[-1], "key", None) in ("mean", "var")


def score(cfg: RewardConfig, params: Params) -> Callable[[Array, Array, Array | None], Array]:
    """Returns a rollout's scorer, ``(frame_BTHWC, task_B, truth_BT) -> prob_BT``; the truth is not looked at."""
    pure = network(cfg)

    def scorer(frame_BTHWC: Array, task_B: Array, truth_BT: Array | None = None) -> Array:
        del truth_BT
        chex.assert_rank(frame_BTHWC, 5, custom_message="reward classifier: frame_BTHWC")
        batch, steps = frame_BTHWC.shape[:2]
        # (B, T, H, W, 3) -> (B * T, H, W, 3): frames are judged one by one, each with the task of its row.
        logit_X = pure(params, frame_BTHWC.reshape(batch * steps, *frame_BTHWC.shape[2:]), jnp.repeat(task_B, steps))
        # (B * T,) -> (B, T); a probability, for thresholds are chosen on it and a dense reward may use it.
        return jax.nn.sigmoid(logit_X).reshape(batch, steps)

    return scorer


def _blocks(cfg: RewardConfig) -> list[tuple[str, int, int]]:
    """Returns name, width and stride of each residual block, first to last."""
    # The first block of every stage but the first halves the picture.
    return [
        (f"stage{stage}_block{block}", width, 2 if stage and not block else 1)
        for stage, width in enumerate(cfg.widths)
        for block in range(cfg.blocks)
    ]


def _conv(cfg: RewardConfig, width_in: int, width: int, kernel: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    # Explicit padding: "SAME" at stride 2 pads an even picture on one side only, a shift by a pixel against torch.
    pad = kernel // 2
    return nnx.Conv(
        width_in,
        width,
        (kernel, kernel),
        strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        kernel_init=nnx.initializers.he_normal(),
        dtype=jnp.dtype(cfg.dtype),
        rngs=rngs,
    )


def _norm(cfg: RewardConfig, width: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    # float32 whatever the convolutions are: a variance in bfloat16 has two digits. Momentum is the old share in flax,
    # the new one in torch. The running variance here is over n, torch's over n - 1: a difference in training only.
    return nnx.BatchNorm(
        width, momentum=1.0 - cfg.momentum, epsilon=EPSILON, dtype=jnp.float32, use_fast_variance=False, rngs=rngs
    )
