"""PPO by hand: what milestones pay, what advantages are, that a critic learns and only judges what it has not seen."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.small_run import save_parts, small_settings
from wovr_jax.core.config import ConfigError, from_dict
from wovr_jax.reward import classifier
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.run.folder import Run
from wovr_jax.run.recipe import Recipe
from wovr_jax.sim import embedded
from wovr_jax.sim.tabletop.expert import ExpertConfig
from wovr_jax.sim.tabletop.table import TabletopConfig
from wovr_jax.studies import ppo
from wovr_jax.types import Imagined, Start

SOME: dict = dict.fromkeys(Imagined.__dataclass_fields__)


def test_advantages_by_hand() -> None:
    reward_BN = np.array([[0.0, 0.5, 1.0], [0.0, 1.0, 0.0]], np.float32)
    value_BN = np.array([[0.2, 0.4, 0.6], [0.1, 0.3, 9.0]], np.float32)
    counts_BN = np.array([[True, True, True], [True, True, False]])
    lam = ppo.LAMBDA
    delta = [[0.4 - 0.2, 0.5 + 0.6 - 0.4, 1 - 0.6], [0.3 - 0.1, 1 - 0.3]]
    first = [delta[0][0] + lam * (delta[0][1] + lam * delta[0][2]), delta[0][1] + lam * delta[0][2], delta[0][2]]
    second = [delta[1][0] + lam * delta[1][1], delta[1][1]]
    raw = np.array([*first, *second])
    told_BN = ppo.estimate_advantages(reward_BN, value_BN, counts_BN)
    np.testing.assert_allclose(told_BN[counts_BN], (raw - raw.mean()) / raw.std(), rtol=1e-4)
    assert told_BN[1, 2] == 0, "what comes after a success is worth nothing"
    np.testing.assert_allclose(ppo.sum_returns(reward_BN, counts_BN), [[1.5, 1.5, 1.0], [1.0, 1.0, 0.0]])


def test_the_expert_earns_a_milestone_after_the_other() -> None:
    sim = TabletopConfig()
    shown = list(embedded.play_demonstrations(np.arange(6), jax.random.key(0), ExpertConfig(flawed_share=0.0), sim))
    action_BNTA = jnp.asarray(np.stack([one.action_SA for one in shown]).reshape(6, 3, 8, 7))
    success_BNT = jnp.asarray(np.stack([one.success_S[1:] for one in shown]).reshape(6, 3, 8))
    state = embedded.reset_batch(jnp.arange(6), sim)
    start = Start(**dict.fromkeys(Start.__dataclass_fields__) | {"sim": state})  # pyright: ignore
    imagined = Imagined(**SOME | {"action_BNTA": action_BNTA, "success_BNT": success_BNT})
    reward_BN, counts_BN = ppo.pay_milestones(sim, start, imagined)
    assert success_BNT.any(axis=(1, 2)).all()
    # Grasped, carried and placed are worth 1 together, and the success another one.
    np.testing.assert_allclose(reward_BN.sum(axis=1), 2.0, rtol=1e-5)
    assert (reward_BN[:, 0] < 1.0).all() and not reward_BN[~counts_BN].any()
    still = Imagined(**SOME | {"action_BNTA": jnp.zeros_like(action_BNTA), "success_BNT": success_BNT & False})
    reward_BN, counts_BN = ppo.pay_milestones(sim, start, still)
    assert counts_BN.all() and not reward_BN.any()


def test_a_critic_tells_bright_from_dark() -> None:
    cfg = RewardConfig.fake(dropout=0.0)
    rng = np.random.default_rng(0)
    bright_BN = rng.random((40, 2)) < 0.5
    frame = np.broadcast_to(np.where(bright_BN, 0.8, -0.8)[..., None, None, None], (40, 2, 8, 8, 3))
    imagined = Imagined(**SOME | {"frame_BNHWC": jnp.float32(frame), "task_B": jnp.zeros(40, jnp.int32)})
    first = classifier.network(cfg).init(jax.random.key(0))
    rows_BN = np.broadcast_to((np.arange(40) < 20)[:, None], (40, 2))
    params = ppo.fit_critic(cfg, first, imagined, np.float32(2 * bright_BN), rows_BN, jax.random.key(1))
    value_BN = ppo._value(cfg, params, imagined)
    assert np.abs(value_BN - 2 * bright_BN)[20:].max() < 0.7, "of rollouts that it was not fitted on"


def test_ppo_is_refused_where_there_is_no_simulator_to_pay(tmp_path) -> None:
    recipe = from_dict(Recipe, small_settings(save_parts(tmp_path / "assets")))
    with pytest.raises(ConfigError, match="expected 'true', with an embedded simulator"):
        ppo.prepare(recipe, Run(tmp_path / "run", {}))
    true = dataclasses.replace(recipe.dream, world="true", reward="true")
    assert ppo.prepare(dataclasses.replace(recipe, dream=true), Run(tmp_path / "true", {}))
