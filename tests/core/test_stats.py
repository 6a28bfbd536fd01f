"""Masked reductions against numpy on what is left, and intervals and ratios with known answers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.core import stats

X = jnp.array([[1.0, 2.0, 3.0, 100.0], [4.0, 8.0, jnp.nan, -1.0]])
WHERE = jnp.array([[True, True, True, False], [True, True, False, False]])


def test_masked_mean_by_hand():
    # row 0 keeps 1 2 3, row 1 keeps 4 8; forgetting the mask gives 26.5 and NaN
    np.testing.assert_allclose(stats.masked_mean(X, WHERE, axis=1), [2.0, 6.0])
    # all five: mean 18 / 5 = 3.6, dividing by the 8 places would give 2.25
    np.testing.assert_allclose(stats.masked_mean(X, WHERE), 3.6, rtol=1e-6)


def test_masked_values_equal_numpy_on_what_is_chosen():
    rng = np.random.default_rng(0)
    x, where = rng.normal(size=(5, 7)).astype(np.float32), rng.random((5, 7)) < 0.6
    np.testing.assert_allclose(stats.masked_mean(jnp.asarray(x), jnp.asarray(where)), x[where].mean(), rtol=1e-5)


def test_where_nothing_is_chosen_the_mean_is_zero():
    nothing = jnp.zeros((2, 4), bool)
    np.testing.assert_array_equal(stats.masked_mean(X, nothing, axis=1), [0.0, 0.0])


def test_mask_broadcasts_and_keeps_dimensions():
    column = jnp.array([[True], [False]])
    np.testing.assert_allclose(stats.masked_mean(X, column), 26.5)
    assert stats.masked_mean(X, WHERE, axis=1, keepdims=True).shape == (2, 1)
    assert stats.masked_mean(X, WHERE, axis=(0, 1), keepdims=True).shape == (1, 1)


def test_gradient_ignores_what_is_masked():
    gradient = jax.grad(lambda x: stats.masked_mean(x, WHERE))(X)
    np.testing.assert_allclose(gradient, np.where(np.asarray(WHERE), 0.2, 0.0), rtol=1e-6)


# ---------------------------------------------------------------- success rates


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_published_values(successes, n, low, high):
    assert stats.wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_edges():
    assert stats.wilson(0, 0) == (0.0, 1.0)
    assert stats.wilson(5, 5)[1] == 1.0
    with pytest.raises(ValueError, match="must not be greater than"):
        stats.wilson(6, 5)


def difference(successes: int, n: int, base_successes: int, base_n: int) -> tuple[float, float, float]:
    """The interval for two independent samples, which the paired one becomes when nothing correlates."""
    rate, base_rate = successes / n, base_successes / base_n
    low, high = stats.wilson(successes, n)
    base_low, base_high = stats.wilson(base_successes, base_n)
    gain = rate - base_rate
    down, up = np.hypot(rate - low, base_high - base_rate), np.hypot(high - rate, base_rate - base_low)
    return gain, gain - down, gain + up


def test_independent_outcomes_give_the_published_interval():
    # Newcombe 1998, Statistics in Medicine 17:873, table II: 56/70 against 48/80, method 10.
    assert difference(56, 70, 48, 80) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    # 20 both, 30 gained, 20 lost, 30 neither: 20 * 30 = 30 * 20, so the outcomes do not correlate.
    ours, base = [True] * 50 + [False] * 50, [True] * 20 + [False] * 30 + [True] * 20 + [False] * 30
    assert stats.paired_difference(ours, base) == pytest.approx(difference(50, 100, 40, 100))


def test_pairing_narrows_and_covers():
    rng = np.random.default_rng(0)
    covered, narrower = 0, 0
    for _ in range(400):
        hardness = rng.uniform(size=60)
        base, ours = hardness < 0.4, (hardness < 0.5) ^ (rng.uniform(size=60) < 0.1)
        gain, low, high = stats.paired_difference(ours, base)
        assert low <= gain <= high and gain == pytest.approx(ours.mean() - base.mean())
        _, wide_low, wide_high = difference(int(ours.sum()), 60, int(base.sum()), 60)
        narrower += high - low < wide_high - wide_low
        covered += low <= 0.1 <= high  # 0.5 + 0.1 (1 - 2 * 0.5) - 0.4
    assert narrower == 400
    assert 0.92 < covered / 400 <= 1.0


def test_without_pairs_the_interval_is_that_of_two_independent_rates():
    won, base = ([True] * n + [False] * (70 - n) for n in (56, 48))
    independent = pytest.approx(difference(56, 70, 48, 70))
    # Whoever stands beside whom.
    assert stats.paired_difference(won, base, paired=False) == independent
    assert stats.paired_difference(won, base[::-1], paired=False) == independent
    assert stats.paired_difference(won, base)[1] > difference(56, 70, 48, 70)[1]


def test_paired_difference_edges():
    assert stats.paired_difference([], []) == (0.0, -1.0, 1.0)
    gain, low, high = stats.paired_difference([True] * 20, [False] * 20)
    assert gain == 1.0 and 0.6 < low < 1.0 and high == 1.0
    with pytest.raises(ValueError, match="two equal lists"):
        stats.paired_difference([True], [True, False])


# ---------------------------------------------------------------- pictures


def test_psnr_by_hand():
    # 0.04 against a square of the span of 4: 10 log10(100) = 20 dB; equal pictures give 10 log10(4e10), not infinity.
    for array in (np.array([0.04, 0.0]), jnp.array([0.04, 0.0])):
        np.testing.assert_allclose(stats.psnr(array), [20.0, 106.0206], rtol=1e-5)
    assert isinstance(stats.psnr(np.float64(0.04)), np.float64) and isinstance(stats.psnr(jnp.float32(1)), jax.Array)
