"""Error rates, reliability and thresholds, on numbers small enough to see."""

from __future__ import annotations

import numpy as np
import pytest

from wovr_jax.reward import calibrate

PROB = np.array([0.1, 0.2, 0.4, 0.6, 0.7, 0.9], np.float32)
LABEL = np.array([0, 0, 1, 0, 1, 1], bool)


def test_rates_by_hand():
    at_half = calibrate.rates(PROB, LABEL, 0.5)
    # called: 0.6 0.7 0.9, of which 0.7 and 0.9 are true: tpr 2/3, fpr 1/3, precision 2/3, F1 2/3
    np.testing.assert_allclose([at_half.tpr, at_half.fpr, at_half.precision, at_half.f1], [2 / 3, 1 / 3, 2 / 3, 2 / 3])
    assert (at_half.positives, at_half.negatives) == (3, 3)
    # strictly above, as in the rollouts: a frame at 0.6 is not a success at threshold 0.6
    assert calibrate.rates(PROB, LABEL, 0.6).fpr == 0.0


def test_episodes_take_their_best_frame():
    episode = np.array([7, 7, 3, 3, 3, 9])
    prob, label = calibrate.by_episode(PROB, LABEL, episode)
    # in the order 3, 7, 9; a mean over frames would give 0.567 for episode 3
    np.testing.assert_allclose(prob, [0.7, 0.2, 0.9], rtol=1e-6)
    np.testing.assert_array_equal(label, [True, False, True])


def test_reliability_by_hand():
    result = calibrate.reliability(np.array([0.1, 0.3, 0.4, 1.0]), np.array([0, 0, 1, 1]), bins=2)
    # below 0.5: mean 0.8 / 3, observed 1/3; above: 1.0 (which must not fall off the end) and 1
    assert result["count"] == [3, 1] and result["edges"] == [0.0, 0.5, 1.0]
    np.testing.assert_allclose(result["predicted"], [0.8 / 3, 1.0])
    np.testing.assert_allclose(result["observed"], [1 / 3, 1.0])
    np.testing.assert_allclose(result["error"], (3 * (1 / 3 - 0.8 / 3) + 0) / 4)
    assert calibrate.reliability(np.array([0.9]), np.array([1]))["count"][-1] == 1


def test_rules_by_hand():
    # thresholds between neighbours: 0.15 0.3 0.5 0.65 0.8
    #   tpr       1    1   2/3  2/3  1/3
    #   fpr      2/3  1/3  1/3   0    0
    #   F1       6/8  6/7  4/6  4/5  2/4
    # Youden: 2/3 at both 0.3 and 0.65: the wider gap wins. F1: 6/7 at 0.3.
    np.testing.assert_allclose(calibrate.choose(PROB, LABEL, "youden").threshold, 0.3, rtol=1e-6)
    np.testing.assert_allclose(calibrate.choose(PROB, LABEL, "f1").threshold, 0.3, rtol=1e-6)
    np.testing.assert_allclose(calibrate.choose(PROB, LABEL, "max_fpr", max_fpr=0.0).threshold, 0.65, rtol=1e-6)
    best = calibrate.choose(PROB, LABEL, "max_fpr", max_fpr=0.4)
    np.testing.assert_allclose([best.threshold, best.real.tpr, best.real.fpr], [0.3, 1.0, 1 / 3], rtol=1e-6)


def test_rate_calls_as_many_successes_as_there_are():
    prob = np.array([0.1, 0.3, 0.5, 0.7, 0.8, 0.9], np.float32)
    label = np.array([0, 1, 0, 1, 0, 0], bool)
    # two successes: 0.8 and 0.9 are called, between 0.7 and 0.8, although both are wrong; Youden would say 0.2
    np.testing.assert_allclose(calibrate.choose(prob, label, "rate").threshold, 0.75, rtol=1e-6)
    # With imagined ones, only these count: three of them are called, so 0.35 and not 0.75.
    imagined = (np.array([0.2, 0.3, 0.4, 0.5, 0.6], np.float32), np.array([1, 1, 0, 0, 1], bool))
    choice = calibrate.choose(prob, label, "rate", imagined=imagined)
    np.testing.assert_allclose(choice.threshold, 0.35, rtol=1e-6)


def test_the_widest_gap_comes_before_fewer_false_alarms():
    """A threshold just below the weakest of eight successes leaves the ninth unpaid."""
    real = np.array([0.2, 0.6, 0.99, 0.999], np.float32), np.array([0, 0, 0, 1], bool)
    imagined = np.repeat(np.float32([0.05, 0.996, 0.999]), (13, 1, 7)), np.arange(21) >= 13
    choice = calibrate.choose(*real, "rate", imagined=imagined)
    # Eight are called from 0.05 to 0.996, wherever the threshold stands; among them 0.2 to 0.6 is the widest gap.
    np.testing.assert_allclose(choice.threshold, 0.4, rtol=1e-6)
    assert (choice.imagined.tpr, choice.imagined.fpr) == (1.0, 0.0)
    # Of two gaps of one width the one with fewer false alarms.
    prob, label = np.float32([0.25, 0.5, 0.75]), np.array([1, 0, 1], bool)
    np.testing.assert_allclose(calibrate.choose(prob, label, "youden").threshold, 0.625, rtol=1e-6)


def test_a_fixed_threshold_asks_nothing_of_the_data():
    choice = calibrate.choose(PROB, LABEL, "fixed")
    assert (choice.threshold, choice.rule) == (0.5, "fixed") and choice.real == calibrate.rates(PROB, LABEL, 0.5)
    failures = np.float32([0.1, 0.7]), np.zeros(2, bool)
    choice = calibrate.choose(*failures, "fixed", fixed=0.6, imagined=(PROB, LABEL))
    assert choice.threshold == 0.6 and np.isnan(choice.real.tpr) and choice.real.fpr == 0.5
    assert choice.imagined == calibrate.rates(PROB, LABEL, 0.6)
    nothing = calibrate.choose(np.zeros(0, np.float32), np.zeros(0, bool), "fixed")
    assert np.isnan([nothing.real.tpr, nothing.real.fpr]).all()


def test_separable_data_gets_the_middle_of_the_gap():
    prob, label = np.array([0.01, 0.02, 0.92, 0.99]), np.array([0, 0, 1, 1])
    for rule in set(calibrate.RULES) - {"fixed"}:
        np.testing.assert_allclose(calibrate.choose(prob, label, rule).threshold, 0.47, rtol=1e-6)


def test_imagined_frames_weigh_as_much_as_true_ones():
    many = np.repeat(PROB, 50), np.repeat(LABEL, 50)
    # a world model blurs: its successes score lower and its failures higher
    imagined = np.array([0.3, 0.35, 0.45, 0.55]), np.array([0, 1, 0, 1])
    alone, both = calibrate.choose(*many), calibrate.choose(*many, imagined=imagined)
    # 0.5: tpr (2/3 + 1/2) / 2, fpr (1/3 + 0) / 2 -> 0.417; 0.65: tpr (2/3 + 0) / 2, fpr 0 -> 0.333;
    # 0.325: tpr 1, fpr (1/3 + 1/2) / 2 -> 0.583, the best. Pooled by frame the 300 true ones would decide.
    np.testing.assert_allclose(alone.threshold, 0.3, rtol=1e-6)  # as good as 0.65, in a wider gap
    np.testing.assert_allclose(both.threshold, 0.325, rtol=1e-6)
    assert alone.imagined is None and (both.imagined.tpr, both.imagined.fpr) == (1.0, 0.5)
    # and the bound on fpr must hold in both
    strict = calibrate.choose(*many, "max_fpr", max_fpr=0.0, imagined=imagined)
    assert strict.real.fpr == 0.0 and strict.imagined.fpr == 0.0


def test_thresholds_between_neighbouring_floats():
    low = np.float32(0.75)
    high = np.nextafter(low, np.float32(1))
    for pair in (
        (low, high),
        (np.nextafter(high, np.float32(1)), np.float32(1.0)),
        (high, np.nextafter(high, np.float32(1))),
    ):
        choice = calibrate.choose(np.array(pair, np.float32), np.array([0, 1]))
        assert (choice.real.tpr, choice.real.fpr) == (1.0, 0.0)
    # a failure at exactly 1 can still be refused, at the price of every success
    choice = calibrate.choose(np.array([0.5, 1.0], np.float32), np.array([1, 0]), "max_fpr", max_fpr=0.0)
    assert (choice.real.tpr, choice.real.fpr) == (0.0, 0.0)


def test_choice_against_trying_every_threshold():
    rng = np.random.default_rng(0)
    label = rng.random(200) < 0.3
    prob = np.clip(rng.normal(0.35 + 0.3 * label, 0.2), 0, 1).astype(np.float32)
    every = [calibrate.rates(prob, label, t) for t in np.linspace(0, 1, 5001)]
    youden, f1 = calibrate.choose(prob, label), calibrate.choose(prob, label, "f1")
    np.testing.assert_allclose(youden.real.tpr - youden.real.fpr, max(r.tpr - r.fpr for r in every), atol=1e-6)
    np.testing.assert_allclose(f1.real.f1, max(r.f1 for r in every), atol=1e-6)
    bounded = calibrate.choose(prob, label, "max_fpr", max_fpr=0.1).real
    assert bounded.fpr <= 0.1
    np.testing.assert_allclose(bounded.tpr, max(r.tpr for r in every if r.fpr <= 0.1), atol=1e-6)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="0 of 6 real frames are successes"):
        calibrate.choose(PROB, np.zeros(6, bool))
    with pytest.raises(ValueError, match="2 of 2 imagined frames are successes"):
        calibrate.choose(PROB, LABEL, imagined=(PROB[:2], np.ones(2, bool)))
    with pytest.raises(ValueError, match="expected one of the rules .*, got 'best'"):
        calibrate.choose(PROB, LABEL, "best")
