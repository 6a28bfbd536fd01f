"""From episodes to a judged classifier, on pictures where success is simply brightness."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from wovr_jax.data.batches import NoDataError
from wovr_jax.reward import classifier
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.reward.train import RewardTrainConfig
from wovr_jax.run.stages.reward import fit
from wovr_jax.types import Episode


def _episode(seed: int, wins: bool) -> Episode:
    rng = np.random.default_rng(seed)
    success = np.arange(5) >= (3 if wins else 9)
    frame = rng.integers(0, 60, (5, 8, 8, 3)) + 180 * success[:, None, None, None]
    action = np.zeros((4, 7), np.float32)
    return Episode(frame.astype(np.uint8), action, success, "make it bright", seed % 2, seed, "test", action)


EPISODES = [_episode(seed, wins=seed % 2 == 0) for seed in range(24)]
CFG = RewardConfig.fake()
PARAMS = classifier.network(CFG).init(jax.random.key(0))


def test_learns_brightness_and_judges_on_held_out_episodes_of_both_kinds() -> None:
    dimmer = [dataclasses.replace(one, frame_SHWC=(one.frame_SHWC * 0.8).astype(np.uint8)) for one in EPISODES]
    train = RewardTrainConfig.fake(steps=40, extra=0.3, rule="max_fpr", max_fpr=0.05)
    _, facts = fit(CFG, train, PARAMS, EPISODES, dimmer, jax.random.key(1))
    assert facts["chosen_on_imagined_too"]
    assert facts["real"]["episode"]["tpr"] == 1.0
    assert facts["real"]["episode"]["fpr"] == 0.0
    held = facts["real"]["episode"]["positives"] + facts["real"]["episode"]["negatives"]
    assert 2 <= held < len(EPISODES)


def test_works_without_imagined_frames_and_says_so() -> None:
    _, facts = fit(CFG, RewardTrainConfig.fake(steps=2, extra=0.3), PARAMS, EPISODES, [], jax.random.key(1))
    assert not facts["chosen_on_imagined_too"]
    assert "imagined" not in facts


@pytest.mark.parametrize(("wins", "said"), [(False, "succeeds"), (True, "fails")])
def test_one_sided_data_is_refused(wins: bool, said: str) -> None:
    episodes = [_episode(seed, wins) for seed in range(6)]
    with pytest.raises(NoDataError, match=f"none of 6 episodes {said}"):
        fit(CFG, RewardTrainConfig.fake(steps=1), PARAMS, episodes, [], jax.random.key(1))
