"""Finding lies by numbers: areas against Mann and Whitney's U, a mix whose optimum is checked, held-out folds."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from wovr_jax.audit import detection


def draw(rng: np.random.Generator, count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Scores of which the first is higher for lies, the second says nothing, the third is lower."""
    lie_X = rng.random(count) < 0.3
    return rng.normal(size=(count, 3)) + np.array([1.0, 0.0, -0.7]) * lie_X[:, None], lie_X


def test_the_area_is_the_chance_that_a_lie_looks_worse() -> None:
    rng = np.random.default_rng(0)
    score_X, lie_X = rng.integers(0, 6, 200).astype(float), rng.random(200) < 0.4  # with ties
    u = stats.mannwhitneyu(score_X[lie_X], score_X[~lie_X]).statistic / (lie_X.sum() * (~lie_X).sum())
    assert detection.measure_auroc(score_X, lie_X) == pytest.approx(u)
    assert detection.measure_auroc(lie_X.astype(float), lie_X) == 1.0
    assert detection.measure_auroc(np.zeros(200), lie_X) == 0.5
    assert np.isnan(detection.measure_auroc(score_X, np.ones(200, bool)))


def test_precision_is_of_the_least_suspicious() -> None:
    lie_X = np.array([True, False, False, False, True, True, False, True])
    score_X = np.array([8.0, 1, 2, 3, 4, 7, 5, 6])
    shares = {0.25: 1.0, 0.5: 0.75, 1.0: 0.5}
    assert {c: detection.measure_precision(score_X, lie_X, c) for c in shares} == shares


def test_intervals_resample_clusters_and_nothing_is_said_of_a_few() -> None:
    rng = np.random.default_rng(1)
    score_XC, lie_X = draw(rng, 60)
    alone = detection.with_interval(detection.measure_auroc, score_XC[:, 0], lie_X, np.arange(60))
    # The same sixty five times over say no more than once, if it is known that they are the same.
    many = [np.tile(x, 5) for x in (score_XC[:, 0], lie_X, np.arange(60))]
    told, untold = (
        detection.with_interval(detection.measure_auroc, *many[:2], cluster) for cluster in (many[2], np.arange(300))
    )

    def width(made: dict) -> float:
        return made["high"] - made["low"]

    assert alone["value"] == pytest.approx(told["value"]) and alone["low"] < alone["value"] < alone["high"]
    assert width(told) == pytest.approx(width(alone), rel=0.15) and width(untold) < 0.6 * width(alone)
    few = detection.with_interval(detection.measure_auroc, np.arange(60.0), np.arange(60) < 4, np.arange(60))
    assert few == {"value": None, "low": None, "high": None}


def test_the_mix_is_the_penalised_optimum_and_finds_what_tells() -> None:
    score_XC, lie_X = draw(np.random.default_rng(2))
    mix = detection.Mix(score_XC, lie_X)
    # At the optimum the slope of the likelihood equals that of the penalty, sign by sign, and the bias has none.
    scaled = np.clip((score_XC - score_XC.mean(0)) / score_XC.std(0), -4, 4)
    residual = lie_X - 1 / (1 + np.exp(-mix(score_XC)))
    np.testing.assert_allclose(scaled.T @ residual, detection.PENALTY * np.array(mix.weights), atol=2e-3)
    assert abs(residual.sum()) < 2e-3
    up, nothing, down = mix.weights
    assert up > 0.5 and down < -0.3 and abs(nothing) < 0.3
    # A wild value counts as four deviations.
    assert mix(np.array([[1e6, 0, 0]])) == mix(np.array([[1e5, 0, 0]]))


def test_no_mix_judges_what_it_was_fitted_on() -> None:
    rng = np.random.default_rng(3)
    cluster_X = np.repeat(np.arange(60), 5)
    # Noise that is the same within a cluster: who has seen the cluster knows its label.
    lie_X = np.repeat(rng.random(60) < 0.5, 5)
    score_XC = np.repeat(rng.normal(size=(60, 30)), 5, axis=0)
    inside = detection.measure_auroc(detection.Mix(score_XC, lie_X)(score_XC), lie_X)
    outside = detection.measure_auroc(detection.mix_held_out(score_XC, lie_X, cluster_X), lie_X)
    assert inside > 0.9 and outside < 0.7
    score_XC, lie_X = draw(rng, 300)
    assert detection.measure_auroc(detection.mix_held_out(score_XC, lie_X, cluster_X), lie_X) > 0.7
