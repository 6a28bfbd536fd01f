"""How well numbers that rise with suspicion find lies: AUROC, a logistic mix of them, precision at a coverage.

A lie is an outcome that imagination got wrong. Everything is resampled by cluster, for chunks of one rollout and
rollouts of one episode are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy import optimize, stats

DRAWS = 1000
"""Resamples behind an interval."""
FOLDS = 5
PENALTY = 1.0
"""Of the squared weights of the mix, whose inputs have deviation 1; that of scikit-learn's default."""
FEWEST = 5
"""Lies, and truths, below which nothing is said."""


def measure_auroc(score_X: np.ndarray, lie_X: np.ndarray) -> float:
    """Returns the chance that a lie has a higher score than a truth, ties counted half; NaN without both kinds.

    That is the area under the curve of true against false positive rate (Mann and Whitney's U over the pairs).
    """
    lies, truths = int(lie_X.sum()), int((~lie_X).sum())
    if not lies or not truths:
        return float("nan")
    rank_X = stats.rankdata(score_X)
    return float((rank_X[lie_X].sum() - lies * (lies + 1) / 2) / (lies * truths))


def measure_precision(score_X: np.ndarray, lie_X: np.ndarray, coverage: float) -> float:
    """Returns the share of truths among the least suspicious, ``coverage`` of all; of equal scores the first go."""
    kept = max(round(coverage * len(score_X)), 1)
    return float(1.0 - lie_X[np.argsort(score_X, kind="stable")[:kept]].mean())


def with_interval(
    measure: Callable[[np.ndarray, np.ndarray], float], score_X: np.ndarray, lie_X: np.ndarray, cluster_X: np.ndarray
) -> dict[str, float | None]:
    """Returns ``value``, and ``low`` and ``high``, the 95 % of resampled clusters; None with too few lies or truths."""
    if min(lie_X.sum(), (~lie_X).sum()) < FEWEST:
        return {"value": None, "low": None, "high": None}
    rng, members = np.random.default_rng(0), list(_group(cluster_X).values())
    drawn = []
    for _ in range(DRAWS):
        rows = np.concatenate([members[c] for c in rng.integers(0, len(members), len(members))])
        drawn.append(measure(score_X[rows], lie_X[rows]))
    low, high = np.nanpercentile(drawn, (2.5, 97.5))
    return {"value": measure(score_X, lie_X), "low": float(low), "high": float(high)}


class Mix:
    """A logistic regression of lies on scores, fitted when made.

    Args:
      score_XC: a column for each of C signs.
      lie_X: what they are to find.
    """

    def __init__(self, score_XC: np.ndarray, lie_X: np.ndarray):
        self._mean_C, self._scale_C = score_XC.mean(axis=0), np.maximum(score_XC.std(axis=0), 1e-9)
        one_XD, sign_X = self._prepare(score_XC), np.where(lie_X, 1.0, -1.0)

        def cost(weight_D: np.ndarray) -> tuple[float, np.ndarray]:
            margin_X = sign_X * (one_XD @ weight_D)
            # The bias, last, is not penalised: it only says how frequent lies are.
            free_D = np.append(np.ones(len(weight_D) - 1), 0.0) * weight_D
            slope_X = -sign_X / (1.0 + np.exp(np.clip(margin_X, -60, 60)))
            loss = np.logaddexp(0.0, -margin_X).sum() + PENALTY / 2 * (free_D**2).sum()
            return float(loss), one_XD.T @ slope_X + PENALTY * free_D

        self._weight_D = optimize.minimize(cost, np.zeros(one_XD.shape[1]), jac=True, method="L-BFGS-B").x

    def __call__(self, score_XC: np.ndarray) -> np.ndarray:
        """Returns (X,) the logit that each is a lie."""
        return self._prepare(score_XC) @ self._weight_D

    @property
    def weights(self) -> list[float]:
        """Of each sign, in its deviations."""
        return self._weight_D[:-1].tolist()

    def _prepare(self, score_XC: np.ndarray) -> np.ndarray:
        # Beyond four deviations a sign is as suspicious as it gets: one wild chunk shall not outvote the others.
        return np.column_stack([np.clip((score_XC - self._mean_C) / self._scale_C, -4, 4), np.ones(len(score_XC))])


def mix_held_out(score_XC: np.ndarray, lie_X: np.ndarray, cluster_X: np.ndarray) -> np.ndarray:
    """Returns (X,) the logits of mixes none of which was fitted on the cluster that it judges."""
    clusters = np.unique(cluster_X)
    fold = dict(zip(clusters, np.random.default_rng(0).permutation(len(clusters)) % FOLDS, strict=True))
    fold_X, logit_X = np.array([fold[c] for c in cluster_X]), np.zeros(len(lie_X))
    for f in range(FOLDS):
        if (held_X := fold_X == f).any():
            logit_X[held_X] = Mix(score_XC[~held_X], lie_X[~held_X])(score_XC[held_X])
    return logit_X


def _group(cluster_X: np.ndarray) -> Mapping[Any, np.ndarray]:
    order = np.argsort(cluster_X, kind="stable")
    values, begin = np.unique(cluster_X[order], return_index=True)
    return dict(zip(values.tolist(), np.split(order, begin[1:]), strict=True))
