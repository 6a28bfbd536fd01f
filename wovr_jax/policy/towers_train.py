"""Pretraining of the two small vision towers on scene parsing, so that a policy can start from towers that see.

OpenVLA's towers come pretrained on pictures of the world; the embedded table is a world of its own, so
its towers are pretrained on random scenes of it. Nothing here knows actions or tasks: the objective is
*what is where*. DINOv2 learns absolute positions of every object, SigLIP relations (position of every
object relative to the first one), and both learn the scene's yes/no attributes. Positions are classified
into fine bins with a linear head over the mean patch feature, which leaves them in a form that the
layers behind can threshold. Each patch also predicts which objects cover it.

The heads are thrown away; the features are those that the policy uses (second-to-last block).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

from wovr_jax.core.config import Count, Natural, NonNegative, Positive, Seed, checked
from wovr_jax.nn.functional import Pure
from wovr_jax.policy.backbones import Tower, TowerConfig
from wovr_jax.train import optimizers
from wovr_jax.train import step as train_step
from wovr_jax.train.step import Objective, ReplayableStep, TrainState
from wovr_jax.types import Array, Params


@struct.dataclass
class Scenes:
    """A batch of labelled pictures; O objects, E yes/no attributes.

    Attributes:
      frame_BHWC: float32 in [-1, 1].
      position_BO2: float32 in [0, 1], x right and y down.
      present_BO: bool, whether the object is in the picture.
      attribute_BE: bool.
      radius_O: float32, half-width of each object in picture widths.
    """

    frame_BHWC: Array
    position_BO2: Array
    present_BO: Array
    attribute_BE: Array
    radius_O: Array


@checked
@dataclasses.dataclass(frozen=True)
class TowerTraining:
    """How a tower is pretrained.

    Attributes:
      objective: ``"where"`` or ``"relation"``.
      objects, attributes: numbers O and E of the scenes.
      bins: position classes on each axis.
      blur: standard deviation of the soft position target, in bins.
      local: weight of the coverage loss of single patches.
      steps, batch, lr, weight_decay, clip: of AdamW with a warm-up and a cosine to zero.
      seed: of parameters and scenes.
    """

    objective: Literal["where", "relation"]
    objects: Count = 5
    attributes: Count = 7
    bins: Count = 64
    blur: Positive = 1.0
    local: NonNegative = 0.5
    steps: Natural = 3000
    batch: Count = 64
    lr: Positive = 2e-3
    weight_decay: NonNegative = 0.02
    clip: Positive = 1.0
    seed: Seed = 0

    @classmethod
    def dinov2(cls) -> TowerTraining:
        """Of the shipped DINOv2 tower."""
        return cls("where")

    @classmethod
    def siglip(cls) -> TowerTraining:
        """Of the shipped SigLIP tower."""
        return cls("relation")


class Parser(nnx.Module):
    """A tower and its throw-away linear heads."""

    def __init__(self, tower: TowerConfig, cfg: TowerTraining, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.tower = Tower(tower, rngs=rngs)
        self.position = nnx.Linear(tower.width, cfg.objects * 2 * cfg.bins, rngs=rngs)
        self.attribute = nnx.Linear(tower.width, cfg.attributes, rngs=rngs)
        self.cover = nnx.Linear(tower.width, cfg.objects, rngs=rngs)

    def __call__(self, frame_BHWC: Array) -> tuple[Array, Array, Array]:
        """Logits: position (B, O, 2, bins), attributes (B, E), coverage (B, patches, O)."""
        token_BPD = self.tower(frame_BHWC)
        # (B, P, D) -> (B, D): a mean and a linear head leave positions in a form that layers behind can threshold.
        mean_BD = token_BPD.mean(axis=1)
        # (B, O * 2 * bins) -> (B, O, 2, bins)
        position = self.position(mean_BD).reshape(-1, self.cfg.objects, 2, self.cfg.bins)
        return position, self.attribute(mean_BD), self.cover(token_BPD)


def network(tower: TowerConfig, cfg: TowerTraining) -> Pure:
    """The tower and its heads, without weights."""
    return Pure(lambda rngs: Parser(tower, cfg, rngs=rngs))


def loss(net: Pure, params: Params, cfg: TowerTraining, scenes: Scenes) -> tuple[Array, dict[str, Array]]:
    """Returns the cross-entropies of position, attributes and coverage together, and metrics; ``miss`` is how far off
    the expected position is, in picture widths."""
    position, attribute, cover = net(params, scenes.frame_BHWC)
    goal_BO2, counts_BO = _goal(cfg, scenes)
    # Bins are named by their middle: the edges would shift every guess by half a bin.
    centre_K = (jnp.arange(cfg.bins) + 0.5) / cfg.bins
    # (B, O, 2, bins): a bell around the goal. Neighbouring bins are nearly right, and say so to the gradient.
    target = jax.nn.softmax(
        -0.5 * jnp.square((goal_BO2[..., None] - centre_K.reshape(1, 1, 1, -1)) * cfg.bins / cfg.blur)
    )
    where = jnp.broadcast_to(counts_BO[..., None], goal_BO2.shape)
    position_loss = jnp.mean(optax.losses.softmax_cross_entropy(position, target), where=where)
    attribute_loss = optax.losses.sigmoid_binary_cross_entropy(attribute, scenes.attribute_BE).mean()
    cover_loss = optax.losses.sigmoid_binary_cross_entropy(cover, _coverage(scenes, cover.shape[1])).mean()
    # Relative positions were halved to fit into [0, 1]; their error is doubled back.
    guess = (jax.nn.softmax(position) * centre_K.reshape(1, 1, 1, -1)).sum(-1)
    miss = jnp.mean(jnp.abs(guess - goal_BO2), where=where) * (2.0 if cfg.objective == "relation" else 1.0)
    total = position_loss + attribute_loss + cfg.local * cover_loss
    # A logit above 0 is a probability above a half.
    right = ((attribute > 0.0) == scenes.attribute_BE).mean()
    return total, {"position": position_loss, "miss": miss, "attribute": right, "cover": cover_loss}


@dataclasses.dataclass(frozen=True)
class TowerObjective(Objective):
    """Scenes, parsed by a tower and its throw-away heads.

    Attributes:
      tower: the tower.
      train: how to train it.
      draw_scenes: ``draw_scenes(key, batch) -> Scenes``, traceable.
    """

    tower: TowerConfig
    train: TowerTraining
    draw_scenes: Callable[[Array, int], Scenes]

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW with warm-up and a cosine to zero."""
        how = self.train
        # A tenth of a short training is its warm-up, and never more than a hundred steps.
        rate = optimizers.warmup_cosine(how.lr, min(100, how.steps // 10 + 1), how.steps)
        return optimizers.build("adamw", rate, clip=how.clip, decay=how.weight_decay)

    def draw(self, key: Array, data: tuple[()]) -> tuple[Scenes, Array]:
        """Draws fresh scenes; the loss draws nothing."""
        del data
        # Not cut over devices: a batch holds the objects' sizes too, which have no axis of scenes.
        return self.draw_scenes(key, self.train.batch), key

    def loss(self, params: Params, fixed: None, batch: Scenes, key: Array) -> tuple[Array, dict[str, Array]]:
        """See :func:`loss`."""
        del key
        return loss(network(self.tower, self.train), params, self.train, batch)


def make(
    tower: TowerConfig, cfg: TowerTraining, draw: Callable[[Array, int], Scenes], key: Array
) -> tuple[TrainState, ReplayableStep]:
    """Returns the first state and the step, see ``train.step.make``.

    Args:
      tower: the tower; it begins at random.
      cfg: its training.
      draw: ``draw(key, batch) -> Scenes``, traced into the step: every batch is fresh.
      key: for parameters and scenes.
    """
    # Parameters and scenes from keys of their own: a larger tower is shown the same scenes.
    k_init, k_data = jax.random.split(key)
    params = network(tower, cfg).init(k_init)
    return train_step.make(TowerObjective(tower, cfg, draw), params, train_step.resident(()), k_data)


def scores(tower: TowerConfig, cfg: TowerTraining, params: Params, scenes: Sequence[Scenes]) -> dict[str, float]:
    """Means over unseen scenes: ``miss`` in picture widths, ``attribute`` the share of right ones."""
    net = network(tower, cfg)
    measure = jax.jit(lambda params, batch: loss(net, params, cfg, batch)[1])
    measured = [measure(params, batch) for batch in scenes]

    def mean(name: str) -> float:
        return round(float(sum(metrics[name] for metrics in measured)) / len(measured), 5)

    return {name: mean(name) for name in ("miss", "attribute", "cover")}


def _goal(cfg: TowerTraining, scenes: Scenes) -> tuple[Array, Array]:
    """Returns what the position head should say, (B, O, 2) in [0, 1], and where it counts, (B, O)."""
    if cfg.objective == "where":
        return scenes.position_BO2, scenes.present_BO
    # From [-1, 1] into the bins' [0, 1]: a half is the first object's own place.
    relative = scenes.position_BO2 - scenes.position_BO2[:, :1]
    # Both objects have to be in the picture, and the first one is always where it is.
    counts = scenes.present_BO & scenes.present_BO[:, :1]
    return 0.5 * (relative + 1.0), counts.at[:, 0].set(False)


def _coverage(scenes: Scenes, patches: int) -> Array:
    """Returns bool (B, patches, O): the patch's square overlaps the object's square."""
    side = round(patches**0.5)
    centre = (jnp.arange(side) + 0.5) / side
    # Rows of patches run down the picture, as the tower flattens them: y changes slowest.
    y, x = jnp.meshgrid(centre, centre, indexing="ij")
    patch_P2 = jnp.stack([x.ravel(), y.ravel()], axis=-1)
    # (1, P, 1, 2) - (B, 1, O, 2) -> (B, P, O): squares overlap when the larger of both offsets is below half their sum.
    distance = jnp.abs(patch_P2[None, :, None, :] - scenes.position_BO2[:, None, :, :]).max(-1)
    return (distance < scenes.radius_O[None, None, :] + 0.5 / side) & scenes.present_BO[:, None, :]
