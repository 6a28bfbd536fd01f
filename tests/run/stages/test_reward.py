"""From episodes to a judged classifier, on pictures where success is simply brightness."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from tests.sizes import fake_reward_train, fake_world_train
from wovr_jax.core import checkpoint, keys
from wovr_jax.core.config import ConfigError
from wovr_jax.data.batches import NoDataError
from wovr_jax.reward import classifier
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.reward.train import RewardTrainConfig
from wovr_jax.run.stages import reward as reward_stage
from wovr_jax.run.stages import world as world_stage
from wovr_jax.run.stages.reward import fit
from wovr_jax.train import loop
from wovr_jax.types import Episode
from wovr_jax.weights import native, writer
from wovr_jax.weights.safetensors import Fact
from wovr_jax.world.model import WorldConfig


def _episode(seed: int, wins: bool, steps: int = 4, actor: str = "test") -> Episode:
    rng = np.random.default_rng(seed)
    success = np.arange(steps + 1) >= (3 if wins else 9)
    frame = rng.integers(0, 60, (steps + 1, 8, 8, 3)) + 180 * success[:, None, None, None]
    action = np.zeros((steps, 7), np.float32)
    return Episode(frame.astype(np.uint8), action, success, "make it bright", seed % 2, seed, actor, action)


EPISODES = [_episode(seed, wins=seed % 2 == 0) for seed in range(24)]
CFG = RewardConfig.fake()
PARAMS = classifier.network(CFG).init(jax.random.key(0))


def test_learns_brightness_and_judges_on_held_out_episodes_of_both_kinds() -> None:
    dimmer = [dataclasses.replace(one, frame_SHWC=(one.frame_SHWC * 0.8).astype(np.uint8)) for one in EPISODES]
    train = fake_reward_train(steps=40, extra=0.3, rule="max_fpr", max_fpr=0.05)
    _, facts = fit(CFG, train, PARAMS, EPISODES, dict(enumerate(dimmer)), jax.random.key(1))
    assert facts["chosen_on_imagined_too"]
    assert facts["real"]["episode"]["tpr"] == 1.0
    assert facts["real"]["episode"]["fpr"] == 0.0
    held = facts["real"]["episode"]["positives"] + facts["real"]["episode"]["negatives"]
    assert 2 <= held < len(EPISODES)


def test_no_episode_that_judges_trained_a_world_model() -> None:
    """Of any collections, however small, whichever of their episodes succeed."""
    rng, judged = np.random.default_rng(0), 0
    world, train = WorldConfig.fake(), fake_world_train(latents="fly")
    for _ in range(40):
        seeds, sizes = rng.choice(1000, 36, replace=False).tolist(), {"expert": 16, "base": 12, "grpo-1": 8}
        actors, often = np.repeat(list(sizes), list(sizes.values())).tolist(), rng.choice([0.1, 0.5, 0.9])
        made = [_episode(s, rng.random() < often, 8, actor) for s, actor in zip(seeds, actors, strict=True)]
        demos, first, again = made[:16], made[16:28], made[28:]
        trained: set[int] = set()
        # As the stage asks: new ones with the demonstrations, then those of a refresh, and the older ones again.
        for episodes in (first + demos, again, first):
            data, validate = world_stage.windows(world, train, {}, episodes)
            trained |= {episodes[e].seed for e in np.asarray(data.row_I2)[:, 0]}
            assert validate.count
        columns = _held_columns(first + again + demos)
        assert not columns & trained
        judged += len(columns)
    assert judged > 100


def _held_columns(episodes: list[Episode]) -> set[int]:
    """Seeds of the episodes on which ``fit`` judges, read off its data."""
    judges: set[int] = set()

    def judge(cfg: RewardConfig, train: RewardTrainConfig, params: Any, held: Any) -> dict[str, Any]:
        judges.update(episodes[e].seed for e in np.unique(held["real"]["episode"]))
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward_stage, "_judge", judge)
        patch.setattr(loop, "fit", lambda name, state, *_, **__: state)
        with contextlib.suppress(NoDataError):  # none fails, or none succeeds
            fit(CFG, fake_reward_train(steps=1, rule="fixed"), PARAMS, episodes, {}, jax.random.key(1))
    return judges


def test_a_threshold_needs_both_kinds_among_those_that_judge_unless_it_is_fixed() -> None:
    lucky = [episode for episode in EPISODES if episode.seed % 2 or episode.seed == 0]  # one success, to learn from
    twins = dict(enumerate(lucky))
    with pytest.raises(NoDataError, match=r"none of \d held-out episodes succeeds: .*reward_train\.rule='fixed'"):
        fit(CFG, fake_reward_train(steps=1, extra=0.3), PARAMS, lucky, twins, jax.random.key(1))
    train = fake_reward_train(steps=1, rule="fixed", threshold=0.7, extra=0.3)
    _, facts = fit(CFG, train, PARAMS, lucky, twins, jax.random.key(1))
    assert facts["threshold"] == 0.7 and not facts["chosen_on_imagined_too"]
    assert facts["real"]["episode"]["positives"] == 0 and facts["imagined"]["episode"]["negatives"] > 0
    assert 0 <= facts["real"]["episode"]["fpr"] <= 1


def test_a_released_classifier_numbers_its_tasks_by_alphabet(tmp_path: pathlib.Path) -> None:
    network = classifier.network(CFG)
    leaves = {name: np.asarray(leaf) for name, leaf in native.flatten(PARAMS).items()}
    facts = {path: Fact(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    card = writer.write_native(tmp_path, "reward", CFG, facts, leaves.items(), {})
    # Theirs: apple, bread, milk. Here milk is task 0, apple 1, bread 2.
    start = reward_stage.start_reward(CFG, str(card), ("milk", "apple", "bread"), keys.key)
    found, frame = start["task"]["embedding"], np.full((3, 8, 8, 3), 0.5, np.float32)
    np.testing.assert_array_equal(found, np.asarray(PARAMS["task"]["embedding"])[[2, 0, 1]])
    theirs = network(PARAMS, frame, np.array([2, 0, 1]))
    np.testing.assert_allclose(network(start, frame, np.arange(3)), theirs, rtol=1e-6)
    with pytest.raises(ConfigError, match="knows 3 tasks, the environment has 2"):
        reward_stage.start_reward(CFG, str(card), ("milk", "apple"), keys.key)
    # A run's own are numbered as its environment is.
    checkpoint.save(tmp_path / "own", PARAMS)
    own = reward_stage.start_reward(CFG, str(tmp_path / "own"), ("milk", "apple", "bread"), keys.key)
    np.testing.assert_array_equal(own["task"]["embedding"], PARAMS["task"]["embedding"])


def test_works_without_imagined_frames_and_says_so() -> None:
    _, facts = fit(CFG, fake_reward_train(steps=2, extra=0.3), PARAMS, EPISODES, {}, jax.random.key(1))
    assert not facts["chosen_on_imagined_too"]
    assert "imagined" not in facts


@pytest.mark.parametrize(("wins", "said"), [(False, "succeeds"), (True, "fails")])
def test_one_sided_data_is_refused(wins: bool, said: str) -> None:
    episodes = [_episode(seed, wins) for seed in range(6)]
    with pytest.raises(NoDataError, match=f"none of 6 episodes {said}"):
        fit(CFG, fake_reward_train(steps=1), PARAMS, episodes, {}, jax.random.key(1))
