"""Ranking policies: each number against an independent count, and by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from wovr_jax.audit import ranking
from wovr_jax.audit.ranking import Count


def counts(rates: list[float], n: int = 1000) -> list[Count]:
    return [Count(round(rate * n), n) for rate in rates]


def mmrv(imagined: np.ndarray, true: np.ndarray) -> float:
    """As SIMPLER writes it down, pair by pair."""
    worst = [
        max(
            [abs(true[i] - true[j]) for j in range(len(true)) if (imagined[i] > imagined[j]) != (true[i] > true[j])],
            default=0.0,
        )
        for i in range(len(true))
    ]
    return sum(worst) / len(worst)


@pytest.mark.parametrize("policies", [3, 8, 13])
def test_every_number_is_that_of_an_independent_count(policies: int) -> None:
    rng = np.random.default_rng(policies)
    # Of few episodes, so that some of the rates are equal.
    true, imagined = (rng.integers(0, 11, (40, policies)) / 10 for _ in range(2))
    drawn = {name: measure(true, imagined) for name, measure in ranking.MEASURES.items()}
    for d in range(40):
        a, b = true[d], imagined[d]
        inverted = sum((a[i] - a[j]) * (b[i] - b[j]) < 0 for i, j in itertools.combinations(range(policies), 2))
        want = {
            "pearson": stats.pearsonr(a, b).statistic,
            "spearman": stats.spearmanr(a, b).statistic,
            "mmrv": mmrv(b, a),
            "gap": sum(abs(x - y) for x, y in zip(a, b)) / policies,
            "inverted": inverted / (policies * (policies - 1) / 2),
        }
        for name, value in want.items():
            np.testing.assert_allclose(drawn[name][d], value, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("true", "imagined", "value"),
    [
        ([0.2, 0.5, 0.9], [0.1, 0.2, 0.3], 0.0),  # right, however wrong the rates are
        ([0.2, 0.5, 0.9], [0.2, 0.9, 0.5], (0.0 + 0.4 + 0.4) / 3),  # the two better ones have changed places
        ([0.2, 0.5, 0.9], [0.9, 0.5, 0.2], (0.7 + 0.4 + 0.7) / 3),  # upside down
        ([0.2, 0.5, 0.9], [0.5, 0.5, 0.5], (0.0 + 0.3 + 0.7) / 3),  # a tie is charged to the better one
        ([0.5, 0.5, 0.9], [0.1, 0.2, 0.3], 0.0),  # a tie in truth weighs nothing
    ],
)
def test_mmrv_by_hand(true: list[float], imagined: list[float], value: float) -> None:
    made = ranking.rank_policies(counts(true), counts(imagined), draws=10)
    np.testing.assert_allclose(made["mmrv"]["value"], value, atol=1e-12)


def test_ties_are_counted_and_are_no_inversions() -> None:
    # Of six pairs (0, 1) is tied in truth, (2, 3) in imagination, and (1, 2) is the wrong way round.
    made = ranking.rank_policies(counts([0.3, 0.3, 0.5, 0.8]), counts([0.2, 0.7, 0.6, 0.6]), draws=10)
    assert (made["pairs"], made["tied"]) == (6, 2)
    # Policy 1 is imagined above 2 and 3, which are better than it; 0 stands where it should.
    assert made["inverted"]["value"] == pytest.approx(2 / 6)


def test_intervals_hold_the_value_narrow_with_episodes_and_repeat() -> None:
    true, imagined = [0.1, 0.3, 0.4, 0.6, 0.7, 0.9], [0.2, 0.3, 0.5, 0.55, 0.8, 0.85]
    few, many = (ranking.rank_policies(counts(true, n), counts(imagined, n)) for n in (20, 2000))
    for name in ranking.MEASURES:
        assert few[name]["low"] <= few[name]["high"], name
        assert many[name]["low"] - 1e-9 <= many[name]["value"] <= many[name]["high"] + 1e-9, name
        assert many[name]["high"] - many[name]["low"] < few[name]["high"] - few[name]["low"], name
    assert many["dropped"] < 5  # all six draws the same policy, once in 7,776
    assert many == ranking.rank_policies(counts(true, 2000), counts(imagined, 2000))


def test_an_interval_covers_what_further_policies_and_layouts_give() -> None:
    """Policies are drawn from one kind again and again: about 95 % of the intervals hold what is true of that kind."""
    rng, covered, kinds = np.random.default_rng(0), 0, 60
    # Of this kind imagination is 0.1 too high throughout: the gap of a policy with endless episodes is 0.1.
    for kind in range(kinds):
        rate_N = rng.uniform(0.2, 0.7, 10)
        drawn = [[Count(int(rng.binomial(4000, r)), 4000) for r in side] for side in (rate_N, rate_N + 0.1)]
        gap = ranking.rank_policies(*drawn, seed=kind, draws=400)["gap"]
        covered += gap["low"] <= 0.1 <= gap["high"]
    assert covered >= 0.85 * kinds


def test_policies_that_are_all_alike_have_no_correlation() -> None:
    made = ranking.rank_policies(counts([0.0, 0.0, 0.0]), counts([0.2, 0.4, 0.6]), draws=50)
    assert made["pearson"] == made["spearman"] == {"value": None, "low": None, "high": None}
    assert made["dropped"] == 50 and made["mmrv"]["value"] == 0.0
    # A single success among them gives a value, and hardly a resample that has one.
    lone = [Count(0, 3), Count(0, 3), Count(1, 3)]
    made = ranking.rank_policies(lone, counts([0.2, 0.4, 0.6]), draws=200)
    assert made["pearson"]["value"] > 0 and made["dropped"] > 0


def test_what_cannot_be_ranked_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 3 policies to rank, got 2"):
        ranking.rank_policies(counts([0.1, 0.2]), counts([0.1, 0.2]))
    with pytest.raises(ValueError, match="as many policies in either world, got 3 and 4"):
        ranking.rank_policies(counts([0.1] * 3), counts([0.1] * 4))
    with pytest.raises(ValueError, match="got 3 of 2"):
        ranking.rank_policies(counts([0.1] * 3), [Count(3, 2)] * 3)
    with pytest.raises(ValueError, match="got 0 of 0"):
        ranking.rank_policies(counts([0.1] * 3), [Count(0, 0)] * 3)
