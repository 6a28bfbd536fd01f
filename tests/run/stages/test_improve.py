"""The stage that improves the policy: what it keeps of the kinds of start, and what it says of them."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.sizes import fake_learner
from wovr_jax.core import keys
from wovr_jax.data import starts
from wovr_jax.data.starts import StartsConfig
from wovr_jax.policy import vla
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.run.bind import improvement
from wovr_jax.run.folder import Product, Run
from wovr_jax.run.recipe import DreamConfig, Recipe
from wovr_jax.run.stages import improve as stage
from wovr_jax.run.stages.starts import choose_starts
from wovr_jax.types import Episode, Imagined
from wovr_jax.world.model import WorldConfig

METRICS = {"success": 0.5, "success_start": 0.7, "mixed_start": 0.5, "success_keyframe": 0.3, "lost_keyframe": 0.9}


def episode(seed: int, **origin: Any) -> Episode:
    action = np.tile(np.float32([0, 0, 0, 0, 0, 0, -1]), (24, 1))
    frame, success = np.zeros((25, 2, 2, 3), np.uint8), np.zeros(25, bool)
    return Episode(frame, action, success, "x", 0, seed, "base", action, origin=origin)


def test_a_kind_of_start_that_no_group_has_is_not_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, failed = starts.initial([episode(0)]), starts.keyframes([episode(1)], StartsConfig(), steps=24)
    both, unseen = starts.join(begun, failed), Imagined(**dict.fromkeys(Imagined.__dataclass_fields__))

    def logged(table: starts.Starts, share: float) -> set[str]:
        recipe = Recipe(
            policy=VLAConfig.fake(),
            world=WorldConfig.fake(),
            reward=RewardConfig.fake(),
            starts=StartsConfig(share=share),
            dream=DreamConfig(groups=4),
            learner=fake_learner(),
        )
        monkeypatch.setattr(stage, "_dream", lambda cfg, given: lambda params, i, key: unseen)
        monkeypatch.setattr(stage.programs, "update", lambda *_: lambda state, *_: (state, METRICS))
        policy = Product(lambda: vla.network(recipe.policy).init(jax.random.key(0)))
        given: Any = stage.Imagination(*[None] * 4, starts=Product(lambda: table), vae=None, world=None, reward=None)  # type: ignore
        state, step = stage.begin(improvement(recipe), [policy], given, lambda *path: keys.key(0, *path), 0)
        return set(step(state, jnp.int32(0))[1])

    assert logged(both, 0.5) == set(METRICS)
    assert logged(both, 0.0) == logged(begun, 0.5) == {"success", "success_start", "mixed_start"}
    assert logged(both, 1.0) == logged(failed, 0.5) == {"success", "success_keyframe", "lost_keyframe"}


def test_the_start_states_of_a_round_leave_intervened_episodes_out(tmp_path: pathlib.Path) -> None:
    run, rollouts = Run(tmp_path / "run", {"name": "x"}), [episode(seed) for seed in range(4)]
    rollouts[2] = episode(2, intervened="hold")
    rounds = [Product(lambda: rollouts), Product(lambda: rollouts[1:])]
    cfg = StartsConfig(each=1, room=16)
    made = choose_starts(run, cfg, None, 4, 24, 0, ("x",), 1, rounds)  # type: ignore
    assert made.facts["initials"] == 5 and made.facts["intervened"] == 2
    assert made.facts["rules"] == {"last_chance": 2} and made.facts["steps"] == [8, 8]
    assert made.value.seed_K.tolist() == [0, 1, 3, 1, 3, 1, 3]
