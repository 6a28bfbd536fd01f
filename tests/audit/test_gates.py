"""What a gate withholds, against a plain loop; what it leaves as it was."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from wovr_jax.audit.gates import GateConfig, keep_least
from wovr_jax.core.config import ConfigError


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
