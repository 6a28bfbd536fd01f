"""The model of progress: what its frames are worth, what it learns from them, and what a chunk is worth by it."""

from __future__ import annotations

import pathlib
from types import SimpleNamespace
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.sizes import fake_reward_train
from wovr_jax.core.config import ConfigError
from wovr_jax.reward import classifier
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.run.folder import Run
from wovr_jax.run.recipe import Recipe
from wovr_jax.studies import progress
from wovr_jax.studies.progress import GAMMA, ProgressObjective
from wovr_jax.train import step as train_step
from wovr_jax.types import Episode, Imagined


def episode(seed: int, steps: int, first: int | None) -> Episode:
    """An episode whose frames get brighter step by step."""
    bright = np.linspace(0, 200, steps + 1).astype(np.uint8)
    frame_SHWC = np.broadcast_to(bright[:, None, None, None], (steps + 1, 8, 8, 3)).copy()
    success_S = np.arange(steps + 1) >= (steps + 1 if first is None else first)
    action_SA = np.zeros((steps, 7), np.float32)
    return Episode(frame_SHWC, action_SA, success_S, "", seed % 3, seed, "base", action_SA)


def test_what_frames_are_worth_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.batches, "split", lambda episodes: np.zeros(len(episodes), bool))
    data = progress.collect_frames([episode(0, 6, 4), episode(1, 3, None)])
    # Of the first the frames up to its success, 0 to 4; of the second all four.
    np.testing.assert_array_equal(data.task_X, [0] * 5 + [1] * 4)
    np.testing.assert_array_equal(data.next_X, [1, 2, 3, 4, 4, 6, 7, 8, 8])
    np.testing.assert_allclose(data.progress_X, [0, 0.25, 0.5, 0.75, 1] + [np.nan] * 4)
    np.testing.assert_array_equal(np.asarray(data.end_X)[[4, 8]], [1, 0])
    assert np.isnan(np.asarray(data.end_X)[[0, 1, 2, 3, 5, 6, 7]]).all()


def test_the_loss_by_hand() -> None:
    cfg = RewardConfig.fake()
    params = classifier.network(cfg).init(jax.random.key(0))
    objective = ProgressObjective(cfg, fake_reward_train(steps=1))
    rng = np.random.default_rng(0)
    frame_BHWC, next_BHWC = (jnp.asarray(rng.uniform(-1, 1, (4, 8, 8, 3)), jnp.float32) for _ in range(2))
    task_B = jnp.zeros(4, jnp.int32)
    end_B, progress_B = jnp.array([np.nan, 1.0, np.nan, 0.0]), jnp.array([0.5, 1.0, np.nan, np.nan])
    key = jax.random.key(1)
    loss, _, _ = objective.loss(params, None, (frame_BHWC, next_BHWC, task_B, end_B, progress_B), key)
    net = classifier.network(cfg)
    value_B = jax.nn.sigmoid(net.mutate(params, frame_BHWC, task_B, train=True, key=key)[0])
    next_B = jax.nn.sigmoid(net(params, next_BHWC, task_B))
    target_B = np.array([GAMMA * next_B[0], 1.0, GAMMA * next_B[2], 0.0])
    by_hand = ((value_B[0] - 0.5) ** 2 + (value_B[1] - 1.0) ** 2) / 4 + np.mean((np.asarray(value_B) - target_B) ** 2)
    np.testing.assert_allclose(loss, by_hand, rtol=1e-5)


def test_a_judge_that_is_not_trained_is_refused(tmp_path: pathlib.Path) -> None:
    made = SimpleNamespace(reward=RewardConfig.fake(), reward_train=fake_reward_train(steps=0), seed=0)
    with pytest.raises(ConfigError, match="by which progress is learned"):
        progress.prepare(cast(Recipe, made), Run(tmp_path / "run", {}))


def test_it_learns_that_brighter_is_further() -> None:
    cfg, key = RewardConfig.fake(dropout=0.0), jax.random.key(0)
    data = progress.collect_frames([episode(seed, 12, 12) for seed in range(9)])
    objective = ProgressObjective(cfg, fake_reward_train(steps=150, batch=32, lr=1e-2))
    first = classifier.network(cfg).init(key)
    state, step = train_step.make(objective, first, train_step.resident(data), key)
    for i in range(150):
        state, metrics = step(state, jnp.int32(i))
    assert metrics["progress"] < 0.02, "guessing one half would leave 0.1"
    # Three chunks of a film that brightens, stands still, and darkens.
    film_NT = np.array([[0.1, 0.4], [0.4, 0.4], [0.3, 0.0]])
    shape = (2, 3, 2, 8, 8, 3)
    video = np.broadcast_to(2 * film_NT[None, :, :, None, None, None] * 200 / 255 - 1, shape).astype(np.float32)
    frame = np.concatenate([np.full_like(video[:, :1, 0], -1.0), video[:, :-1, -1]], axis=1)
    some: dict = dict.fromkeys(Imagined.__dataclass_fields__) | {"task_B": jnp.zeros(2, jnp.int32)}
    imagined = Imagined(**some | {"frame_BNHWC": jnp.asarray(frame), "video_BNTHWC": jnp.asarray(video)})
    worth = progress.value_chunks(cfg, state.params, imagined)
    assert worth.video_BNTHWC is None
    advantage_N = np.asarray(worth.advantage_BN)[0]
    assert advantage_N[0] > 0 > advantage_N[2] and advantage_N[0] > advantage_N[1] > advantage_N[2]
