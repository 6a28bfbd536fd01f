"""A baseline without a judge: how much further along does each imagined chunk look, by a model of progress? (RISE.)

As in RISE (February 2026) imagination is one chunk long, and a chunk is worth how far the value of what it shows lies
above that of where it began::

    A = 1/T sum_k V(o_{t+k}) - V(o_t)

V is trained on the true episodes alone, half by progress, the share of a successful episode that is over, and half by
temporal differences, which failures take part in: a frame is worth ``GAMMA`` times the next one, a success 1, the end
of a failure 0. What is not RISE's: in the middle of an episode a chunk begins only if that episode failed; the policy
is improved by the clipped loss of GRPO and not by regression on binned advantages; the world model is this package's,
and V a network as small as the judge's.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from wovr_jax.core import checkpoint, keys, sharding
from wovr_jax.core.config import ConfigError
from wovr_jax.core.pixels import to_float
from wovr_jax.data import batches
from wovr_jax.data import episodes as disk
from wovr_jax.reward import classifier
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.reward.train import RewardObjective
from wovr_jax.run.bind import Products
from wovr_jax.run.folder import Run
from wovr_jax.run.recipe import Recipe
from wovr_jax.run.stages.episodes import join_rounds
from wovr_jax.run.stages.improve import Gate
from wovr_jax.train import loop
from wovr_jax.train import step as train_step
from wovr_jax.types import Array, Episode, Imagined, Params, Start

GAMMA = 0.98
"""Discount of a step."""


@struct.dataclass
class Frames:
    """Frames of true episodes up to their first success, one episode after another, on the devices.

    Attributes:
      frame_XHWC: uint8.
      task_X: int32.
      next_X: int32, the frame after each one; of an episode's last frame itself.
      end_X: float32, what an episode's last frame is worth, 1 or 0; NaN elsewhere.
      progress_X: float32, the share of a successful episode that is over; NaN in failures.
    """

    frame_XHWC: Array
    task_X: Array
    next_X: Array
    end_X: Array
    progress_X: Array


def collect_frames(episodes: Sequence[Episode]) -> Frames:
    """Puts the frames of episodes, but for the held-out ones, on the devices."""
    kept = [one for one, held in zip(episodes, batches.split(episodes), strict=True) if not held]
    columns: list[tuple[np.ndarray, ...]] = []
    begin = 0
    for episode in kept:
        won = bool(episode.success_S.any())
        length = int(episode.success_S.argmax()) + 1 if won else len(episode.success_S)
        place_S = np.arange(length)
        end_S = np.full(length, np.nan, np.float32)
        end_S[-1] = won
        progress_S = (place_S / max(length - 1, 1) if won else np.full(length, np.nan)).astype(np.float32)
        following_S = begin + np.minimum(place_S + 1, length - 1)
        columns.append((episode.frame_SHWC[:length], np.full(length, episode.task), following_S, end_S, progress_S))
        begin += length
    frame_XHWC, task_X, next_X, end_X, progress_X = map(np.concatenate, zip(*columns, strict=True))
    parts = (frame_XHWC, task_X.astype(np.int32), next_X.astype(np.int32), end_X, progress_X)
    return sharding.whole(Frames(*map(jnp.asarray, parts)))


@dataclasses.dataclass(frozen=True)
class ProgressObjective(RewardObjective):
    """Progress and temporal differences; optimizer and running statistics as the judge's."""

    def draw(self, key: Array, data: Frames) -> tuple[Any, Array]:
        """Frames drawn uniformly, each with the one that follows it."""
        k_draw, k_dropout = jax.random.split(key)
        row_B = jax.random.randint(k_draw, (self.train.batch,), 0, len(data.task_X))
        frames = (to_float(data.frame_XHWC[row_B]), to_float(data.frame_XHWC[data.next_X[row_B]]))
        return sharding.batch((*frames, data.task_X[row_B], data.end_X[row_B], data.progress_X[row_B])), k_dropout

    def loss(self, params: Params, fixed: None, batch: Any, key: Array) -> tuple[Array, dict[str, Array], Params]:
        """The mean of both squared differences."""
        del fixed
        frame_BHWC, next_BHWC, task_B, end_B, progress_B = batch
        net = classifier.network(self.cfg)
        # The next frame's value is a target, and nothing is learned through it.
        next_B = jax.lax.stop_gradient(jax.nn.sigmoid(net(params, next_BHWC, task_B)))
        logit_B, seen = net.mutate(params, frame_BHWC, task_B, train=True, key=key)
        value_B = jax.nn.sigmoid(logit_B)
        target_B = jnp.where(jnp.isnan(end_B), GAMMA * next_B, end_B)
        succeeds_B = ~jnp.isnan(progress_B)
        progress = jnp.square(value_B - jnp.where(succeeds_B, progress_B, value_B)).mean()
        return progress + jnp.square(value_B - target_B).mean(), {"progress": progress}, seen


def prepare(recipe: Recipe, run: Run) -> Callable[[Products], Gate]:
    """Returns what gives the advantages of the newest world's rollouts; the model of progress is a stage of the run.

    Raises:
      ConfigError: a judge that is not trained, whose settings the model of progress has.
    """
    if not recipe.reward_train.steps:
        raise ConfigError("config.reward_train.steps: expected at least 1, by which progress is learned, got 0.")
    cfg, training, key = recipe.reward, recipe.reward_train, functools.partial(keys.key, recipe.seed)

    def open_gate(made: Products) -> Gate:
        name = f"progress-{len(made.worlds) - 1}"

        def make(folder: pathlib.Path) -> dict[str, Any]:
            data = collect_frames(disk.join([made.demonstrations.value.train, join_rounds(made.rollouts)]))
            first = classifier.network(cfg).init(key(name, "weights"))
            given = (ProgressObjective(cfg, training), first, train_step.resident(data), key(name))
            state, step = train_step.make(*given)
            state = loop.fit(name, state, step, training.steps, log=run.log, folder=folder)
            checkpoint.save(folder / "progress", state.params)
            return {"frames_read": len(data.task_X)}

        params = run.stage(name, make, lambda folder: sharding.whole(checkpoint.load(folder / "progress"))).value

        def gate(parts: Mapping[str, Any], start: Start, imagined: Imagined, key: Array) -> Imagined:
            del parts, start, key
            return value_chunks(cfg, params, imagined)

        return gate

    return open_gate


@functools.partial(jax.jit, static_argnums=0)
def value_chunks(cfg: RewardConfig, params: Params, imagined: Imagined) -> Imagined:
    """Returns rollouts whose chunks are worth the progress that they show, in deviations of all of them."""
    assert imagined.video_BNTHWC is not None
    value = classifier.score(cfg, params)
    batch, chunks = imagined.frame_BNHWC.shape[:2]
    film_BSHWC = imagined.video_BNTHWC.reshape(batch, -1, *imagined.video_BNTHWC.shape[3:])
    before_BN = value(imagined.frame_BNHWC, imagined.task_B, None)
    after_BN = value(film_BSHWC, imagined.task_B, None).reshape(batch, chunks, -1).mean(axis=2)
    gain_BN = after_BN - before_BN
    advantage_BN = (gain_BN - gain_BN.mean()) / (gain_BN.std() + 1e-6)
    return dataclasses.replace(imagined, advantage_BN=advantage_BN, video_BNTHWC=None)
