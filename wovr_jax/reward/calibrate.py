"""Probabilities of held-out frames -> error rates, a reliability diagram's numbers, a threshold.

Host arithmetic in numpy. Everything takes (probability, label) pairs; ``by_episode`` turns
frames into episodes, so the same functions judge both. A frame or episode counts as success
when its probability is above the threshold, strictly, as in the imagined rollouts.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Literal

import numpy as np

Rule = Literal["rate", "youden", "f1", "max_fpr", "fixed"]
RULES = typing.get_args(Rule)


@dataclasses.dataclass(frozen=True)
class Rates:
    """Errors at one threshold.

    Attributes:
      tpr: share of true successes that are called successes; NaN without successes.
      fpr: share of true failures that are called successes; NaN without failures.
      precision: share of called successes that are true; 1 when none is called.
      f1: harmonic mean of precision and tpr.
      positives, negatives: how many successes and failures there were.
    """

    tpr: float
    fpr: float
    precision: float
    f1: float
    positives: int
    negatives: int


@dataclasses.dataclass(frozen=True)
class Choice:
    """A threshold, the rule that chose it, and what it does on each set it was chosen on."""

    threshold: float
    rule: str
    real: Rates
    imagined: Rates | None = None


def rates(prob_X: np.ndarray, label_X: np.ndarray, threshold: float) -> Rates:
    """Returns the error rates of ``prob > threshold``, of frames or of episodes."""
    # Compared in float32, as the rollout does: a threshold between two floats falls on the same side here and there.
    called, label = np.asarray(prob_X) > np.float32(threshold), np.asarray(label_X, bool)
    hits, false_alarms = int((called & label).sum()), int((called & ~label).sum())
    positives, negatives = int(label.sum()), int((~label).sum())
    return Rates(
        tpr=hits / positives if positives else float("nan"),
        fpr=false_alarms / negatives if negatives else float("nan"),
        precision=hits / called.sum() if called.any() else 1.0,
        f1=2 * hits / (positives + hits + false_alarms) if positives + hits + false_alarms else 0.0,
        positives=positives,
        negatives=negatives,
    )


def by_episode(prob_X: np.ndarray, label_X: np.ndarray, episode_X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (prob_E, label_E): an episode is called by its likeliest frame, and succeeds if any frame does.

    Args:
      episode_X: which episode a frame is of, any integers; the result is in ascending order of them.
    """
    # An imagined rollout counts from its first frame above the threshold, so the highest probability decides.
    _, index_X = np.unique(episode_X, return_inverse=True)
    episodes = int(index_X.max()) + 1 if len(index_X) else 0
    prob_E, label_E = np.zeros(episodes, np.float32), np.zeros(episodes, bool)
    np.maximum.at(prob_E, index_X, np.asarray(prob_X, np.float32))
    np.logical_or.at(label_E, index_X, np.asarray(label_X, bool))
    return prob_E, label_E


def reliability(prob_X: np.ndarray, label_X: np.ndarray, bins: int = 10) -> dict[str, Any]:
    """Counts how often frames of a given probability are successes, in ``bins`` equal bins.

    Returns:
      plain numbers: ``edges`` of the bins, one more than bins; for each bin ``count``, its frames, ``predicted``, their
      mean probability, and ``observed``, their share of true successes, both 0 where it is empty; ``error``, the
      expected calibration error, ``|predicted - observed|`` weighted by count.
    """
    prob_X, label_X = np.asarray(prob_X, np.float64), np.asarray(label_X, np.float64)
    edges = np.linspace(0.0, 1.0, bins + 1)
    count = np.histogram(prob_X, edges)[0]
    # Empty bins give 0, not 0 / 0; they weigh nothing in the error.
    predicted, observed = (np.histogram(prob_X, edges, weights=x)[0] / np.maximum(count, 1) for x in (prob_X, label_X))
    # ECE: how far prediction and truth lie apart in a bin, over the frames. It says whether 0.7 means seven of ten.
    error = float((count * np.abs(predicted - observed)).sum() / max(count.sum(), 1))
    columns = {"edges": edges, "count": count, "predicted": predicted, "observed": observed}
    return {name: column.tolist() for name, column in columns.items()} | {"error": error}


def choose(
    prob_X: np.ndarray,
    label_X: np.ndarray,
    rule: Rule = "youden",
    *,
    max_fpr: float = 0.05,
    fixed: float = 0.5,
    imagined: tuple[np.ndarray, np.ndarray] | None = None,
) -> Choice:
    """Chooses the best threshold on held-out data; of equally good ones, the middle of the widest gap.

    Args:
      prob_X, label_X: of true frames (or episodes).
      rule: ``"rate"`` calls as many successes as there are, so that neither kind of error wins;
        ``"youden"`` maximises tpr - fpr, ``"f1"`` maximises F1, ``"max_fpr"`` maximises tpr among
        thresholds whose fpr is at most ``max_fpr`` (it may find only tpr 0: look at the result).
        ``"fixed"`` looks at nothing and takes the threshold ``fixed``; 0.5 is WoVR's.
      imagined: (prob, label) of model-made frames. ``"rate"`` then looks at these alone, since they are
        what is judged in imagination. For the other rules scores are the mean over both sets, each
        weighing the same however many frames it has, and ``max_fpr`` must hold in both.

    Raises:
      ValueError: an unknown rule, or a set without successes or without failures to choose on.
    """
    if rule not in RULES:
        raise ValueError(f"choose: expected one of the rules {RULES}, got {rule!r}")
    sets = {"real": (prob_X, label_X)} | ({} if imagined is None else {"imagined": imagined})
    if rule == "fixed":
        return Choice(fixed, rule, *(rates(prob, label, fixed) for prob, label in sets.values()))
    for name, (_, label) in sets.items():
        if not 0 < np.sum(label) < np.size(label):
            raise ValueError(
                f"choose: a threshold needs successes and failures, but {np.sum(label)} of {np.size(label)} {name} "
                "frames are successes; hold out more episodes"
            )
    # C counts candidates: between two neighbouring probabilities all thresholds call the same frames.
    threshold_C, gap_C = _candidates(np.concatenate([prob for prob, _ in sets.values()]))
    curves = [_curve(prob, label, threshold_C) for prob, label in sets.values()]
    tpr_C, fpr_C, f1_C = (np.mean(parts, axis=0) for parts in zip(*curves, strict=True))
    # "rate" looks at the last set: the imagined one, where there is one. As many called as there are: then there are as
    # many false alarms as misses, and the rewards of a rollout are right on average.
    prob, label = list(sets.values())[-1]
    excess_C = _above(prob, threshold_C) - np.sum(label)
    score_C = {"rate": -np.abs(excess_C), "youden": tpr_C - fpr_C, "f1": f1_C, "max_fpr": tpr_C}[rule]
    if rule == "max_fpr":  # the worse of the sets counts; -1 is below every tpr
        score_C = np.where(np.max([fpr for _, fpr, _ in curves], axis=0) <= max_fpr, score_C, -1.0)
    # By score (rounded: sums of the same counts may differ in a last place), then by the gap: the middle of a wide one
    # stands far from every frame seen. Fewer false alarms come last: a threshold that hugs the weakest success to
    # avoid one among the few held-out episodes leaves the next success unpaid.
    best = np.lexsort((-fpr_C, gap_C, np.round(score_C, 9)))[-1]
    threshold = float(threshold_C[best])
    return Choice(threshold, rule, *(rates(prob, label, threshold) for prob, label in sets.values()))


def _candidates(prob_X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns thresholds between neighbouring probabilities, and the widths of the gaps they stand in."""
    value = np.unique(np.concatenate([np.asarray(prob_X, np.float32), np.asarray([0.0, 1.0], np.float32)]))
    below, above = value[:-1], value[1:]
    middle = (below + above) / np.float32(2)
    # Between neighbouring floats the middle may round up, and "above the threshold" would lose the upper one.
    middle = np.where(middle >= above, below, middle)
    # The last candidate calls nothing a success, even when a probability is exactly 1.
    return np.append(middle, np.float32(1.0)), np.append(above - below, np.float32(0.0))


def _curve(prob_X: np.ndarray, label_X: np.ndarray, threshold_C: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns tpr, fpr and F1 at each threshold."""
    prob_X, label_X = np.asarray(prob_X, np.float32), np.asarray(label_X, bool)
    hits_C, false_alarms_C = _above(prob_X[label_X], threshold_C), _above(prob_X[~label_X], threshold_C)
    positives, negatives = label_X.sum(), (~label_X).sum()
    return hits_C / positives, false_alarms_C / negatives, 2 * hits_C / (positives + hits_C + false_alarms_C)


def _above(prob_X: np.ndarray, threshold_C: np.ndarray) -> np.ndarray:
    """Counts the probabilities above each threshold."""
    return len(prob_X) - np.searchsorted(np.sort(np.asarray(prob_X, np.float32)), threshold_C, side="right")
