"""Can a world model rank policies? True against imagined success of N policies, in the numbers that others publish.

R_i is the true success rate of policy i, S_i its imagined one. Every function takes arrays whose last axis counts the
policies; axes before it are resamples, so that an interval is one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

DRAWS = 2000
"""Resamples behind an interval."""
FEWEST = 3
"""Policies, below which nothing is said: two points lie on a line whatever they are."""


class Count(NamedTuple):
    """Successes of a policy in one world.

    Attributes:
      successes, n: how many of how many episodes.
    """

    successes: int
    n: int


def correlate(true_N: np.ndarray, imagined_N: np.ndarray) -> np.ndarray:
    """Returns Pearson's r over the last axis; NaN where either side has one value only."""
    a_N, b_N = (x - x.mean(axis=-1, keepdims=True) for x in (np.asarray(true_N, float), np.asarray(imagined_N, float)))
    scale = np.sqrt((a_N**2).sum(axis=-1) * (b_N**2).sum(axis=-1))
    # The deviations of equal numbers are a few roundings and not zero; rates are counts, which differ by more.
    flat = scale < 1e-12
    return np.where(flat, np.nan, (a_N * b_N).sum(axis=-1) / np.where(flat, 1.0, scale))


def correlate_ranks(true_N: np.ndarray, imagined_N: np.ndarray) -> np.ndarray:
    """Returns Spearman's rho: Pearson's r of the ranks, ties sharing the mean of theirs."""
    return correlate(stats.rankdata(true_N, axis=-1), stats.rankdata(imagined_N, axis=-1))


def violate_ranks(true_N: np.ndarray, imagined_N: np.ndarray) -> np.ndarray:
    """Returns the mean maximum rank violation (MMRV) of SIMPLER, a difference of true rates; 0 is best.

    (1 / N) sum_i max_j |R_i - R_j| [(S_i > S_j) != (R_i > R_j)], as ``mean_maximum_rank_violation`` of
    simpler_env/utils/metrics.py counts it: each policy answers for the worst pair that it is misplaced in, weighed by
    what that costs in truth. Both comparisons are strict, so a tie in imagination of what differs in truth is charged
    to the one that is better in truth, and a tie in truth weighs nothing.
    """
    true_NN, imagined_NN = (_subtract_pairs(x) for x in (true_N, imagined_N))
    wrong_NN = (imagined_NN > 0) != (true_NN > 0)
    return np.where(wrong_NN, np.abs(true_NN), 0.0).max(axis=-1).mean(axis=-1)


def measure_gap(true_N: np.ndarray, imagined_N: np.ndarray) -> np.ndarray:
    """Returns the mean absolute difference of the two success rates."""
    return np.abs(np.asarray(true_N, float) - np.asarray(imagined_N, float)).mean(axis=-1)


def count_inverted(true_N: np.ndarray, imagined_N: np.ndarray) -> np.ndarray:
    """Returns the share of all pairs of policies of which the one that is better in truth is worse in imagination.

    A pair that is tied in either world is not inverted, and counts as a pair: MMRV is what charges for ties.
    """
    sign_NN = np.sign(_subtract_pairs(true_N)) * np.sign(_subtract_pairs(imagined_N))
    count = sign_NN.shape[-1]
    # Each pair stands twice in the square of all of them.
    return (sign_NN < 0).sum(axis=(-2, -1)) / (count * (count - 1))


MEASURES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "pearson": correlate,
    "spearman": correlate_ranks,
    "mmrv": violate_ranks,
    "gap": measure_gap,
    "inverted": count_inverted,
}


def rank_policies(true: Sequence[Count], imagined: Sequence[Count], *, seed: int = 0, draws: int = DRAWS) -> dict:
    """Returns how well imagined success ranks policies, ready for JSON.

    Intervals are a percentile bootstrap of 95 % over policies AND episodes: each resample draws N policies with
    replacement and, for each of them anew, the successes of its n episodes in either world (a binomial draw, which is
    what drawing the episodes with replacement comes to). So they hold for further policies of the same kind and further
    layouts; the two worlds are resampled apart, which is a little too wide where both played the same layouts. A
    resample in which all policies are equal has no correlation and is left out of the two correlations; how many are is
    returned. With few policies they are wide, and rightly so.

    Args:
      true, imagined: successes of every policy, in the same order.
      seed: of the resampling.
      draws: resamples.

    Returns:
      ``policies``, ``pairs``, ``tied`` (pairs that are tied in either world), ``dropped`` (resamples without a
      correlation), and of each of ``MEASURES`` a ``value`` with ``low`` and ``high``; ``value`` and its ends are None
      where there is none, ``low`` and ``high`` alone where fewer than half of the resamples have one.

    Raises:
      ValueError: fewer than ``FEWEST`` policies, lists of unequal length, or counts that are none.
    """
    if len(true) != len(imagined):
        raise ValueError(f"expected as many policies in either world, got {len(true)} and {len(imagined)}.")
    if len(true) < FEWEST:
        raise ValueError(f"expected at least {FEWEST} policies to rank, got {len(true)}.")
    for count in (*true, *imagined):
        if count.n < 1 or not 0 <= count.successes <= count.n:
            raise ValueError(f"expected 0 <= successes <= n and n >= 1, got {count.successes} of {count.n}.")
    rates = tuple(np.array([count.successes / count.n for count in counts]) for counts in (true, imagined))
    resampled = _resample(np.asarray(true), np.asarray(imagined), seed, draws)
    drawn = {name: measure(*resampled) for name, measure in MEASURES.items()}
    tied_NN = np.logical_or(*(_subtract_pairs(rate_N) == 0 for rate_N in rates))
    policies = len(true)
    return {
        "policies": policies,
        "pairs": policies * (policies - 1) // 2,
        "tied": int(tied_NN.sum() - policies) // 2,  # without the diagonal
        "dropped": int(np.isnan(drawn["pearson"]).sum()),
        **{name: _bound(float(measure(*rates)), drawn[name]) for name, measure in MEASURES.items()},
    }


def _resample(true_N2: np.ndarray, imagined_N2: np.ndarray, seed: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rates (draws, N) of resampled policies on resampled episodes; columns are successes and n."""
    rng = np.random.default_rng(seed)
    row_DN = rng.integers(len(true_N2), size=(draws, len(true_N2)))

    def redraw(count_N2: np.ndarray) -> np.ndarray:
        successes_DN, n_DN = np.moveaxis(count_N2[row_DN], -1, 0)
        return rng.binomial(n_DN, successes_DN / n_DN) / n_DN

    return redraw(true_N2), redraw(imagined_N2)


def _bound(value: float, drawn_D: np.ndarray) -> dict[str, Any]:
    """Returns a value and the ends of its interval, None for what is not a number."""
    known_D = drawn_D[~np.isnan(drawn_D)]
    if np.isnan(value):
        return {"value": None, "low": None, "high": None}
    # Where most resamples have no correlation, the others say what the policies would be like if they differed.
    ends = np.quantile(known_D, (0.025, 0.975)).tolist() if 2 * len(known_D) >= len(drawn_D) else (None, None)
    return {"value": value, "low": ends[0], "high": ends[1]}


def _subtract_pairs(rate_N: np.ndarray) -> np.ndarray:
    """Returns (..., N, N): how much the policy of the row is ahead of that of the column."""
    rate_N = np.asarray(rate_N, float)
    return rate_N[..., :, None] - rate_N[..., None, :]
