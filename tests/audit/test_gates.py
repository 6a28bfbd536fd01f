"""What a gate withholds, against a plain loop; what it leaves as it was."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from wovr_jax.audit.gates import GateConfig, drop, keep_least
from wovr_jax.core.config import ConfigError
from wovr_jax.grpo import GRPOConfig, advantages, signal
from wovr_jax.types import Imagined


@pytest.mark.parametrize("coverage", [0.0, 0.25, 0.5, 1.0])
def test_the_least_suspicious_of_the_paid_stay_paid(coverage: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        sign_CB, paid_B = rng.normal(size=(3, 40)).astype(np.float32), rng.random(40) < 0.6
        kept_B = np.asarray(keep_least(sign_CB, paid_B, coverage))
        assert kept_B.sum() == np.round(coverage * paid_B.sum()) and not kept_B[~paid_B].any()
        mean_P = np.mean([stats.rankdata(sign_B[paid_B]) for sign_B in sign_CB], axis=0)
        kept_P = kept_B[paid_B]
        if 0 < kept_P.sum() < len(kept_P):
            assert mean_P[kept_P].max() <= mean_P[~kept_P].min()


def test_what_is_not_paid_changes_nothing() -> None:
    paid_B = np.array([True, False, True, True])
    for wild in (np.inf, -np.inf, 0.0):
        sign_1B = np.array([[0.3, wild, 0.1, 0.2]], np.float32)
        assert np.asarray(keep_least(sign_1B, paid_B, 2 / 3)).tolist() == [False, False, True, True]
    assert not np.asarray(keep_least(np.zeros((1, 4), np.float32), np.zeros(4, bool), 0.5)).any()


def test_a_sign_that_there_is_none_of_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"distance.*got nearness"):
        GateConfig(signs=("nearness",))


@pytest.mark.parametrize("normalise", ["mean", "mean_std"])
def test_what_is_dropped_is_no_part_of_its_group(normalise: str) -> None:
    cfg = GRPOConfig(group=4, normalise=normalise)
    flags_BNT = np.zeros((12, 2, 3), bool)
    flags_BNT[[0, 1, 4, 5, 6, 8], 1, 0] = True
    dropped_B = np.zeros(12, bool)
    # One success of the first group; both failures, so that the rest agree; all but one of the third.
    dropped_B[[0, 7, 9, 10, 11]] = True
    some: dict = dict.fromkeys(Imagined.__dataclass_fields__)
    told = drop(Imagined(**some | {"success_BNT": jnp.asarray(flags_BNT)}), jnp.asarray(dropped_B), cfg)
    advantage_BN, live_BNT = np.asarray(told.advantage_BN), np.asarray(told.live_BNT)
    assert (advantage_BN[:, 0] == advantage_BN[:, 1]).all() and (live_BNT.any(axis=(1, 2)) == ~dropped_B).all()
    # What GRPO itself makes of the three that are left of the first group.
    alone = advantages(jnp.array([1.0, 0.0, 0.0]), 3, normalise)
    np.testing.assert_allclose(advantage_BN[1:4, 0], alone, rtol=1e-5)
    assert not advantage_BN[[0, *range(4, 12)]].any()


def test_without_anything_dropped_the_advantage_is_grpos() -> None:
    rng = np.random.default_rng(0)
    flags_BNT, cfg = jnp.asarray(rng.random((16, 2, 3)) < 0.2), GRPOConfig(group=8, gamma=0.9, normalise="mean_std")
    some: dict = dict.fromkeys(Imagined.__dataclass_fields__)
    told = drop(Imagined(**some | {"success_BNT": flags_BNT}), jnp.zeros(16, bool), cfg)
    its = signal(flags_BNT, cfg)
    np.testing.assert_allclose(np.asarray(told.advantage_BN)[:, 0], its.advantage_B, rtol=1e-5)
