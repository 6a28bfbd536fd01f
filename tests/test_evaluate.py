"""Success rates, and what a watched training was paid for."""

from __future__ import annotations

import numpy as np
import pytest

from tests.audit.rollouts import rollout
from wovr_jax import evaluate


def test_a_rate_comes_with_its_interval_and_not_from_nothing() -> None:
    made = evaluate.summarize_outcomes([True, False, True, True])
    assert (made["n"], made["successes"], made["rate"]) == (4, 3, 0.75) and made["low"] < 0.75 < made["high"]
    with pytest.raises(ValueError, match="got none"):
        evaluate.summarize_outcomes([])


def watched(paid: list[int], true: list[int], keyframe: list[int], live: list[int] | None = None) -> dict[str, float]:
    """Shares of rollouts of a single step."""
    paid_B11, true_B11 = (np.array(flags, bool).reshape(-1, 1, 1) for flags in (paid, true))
    rolled = rollout([0.0] * len(paid), [False] * len(paid)).replace(success_BNT=paid_B11, truth_BNT=true_B11)
    live_B11 = None if live is None else np.array(live, bool).reshape(-1, 1, 1)
    rolled = rolled.replace(keyframe_B=np.array(keyframe, bool), live_BNT=live_B11)
    return {name: float(value) for name, value in evaluate.watch_rewards(rolled).items()}


def test_shares_of_an_iteration_are_split_by_start_and_undefined_without_a_case() -> None:
    made = watched([1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 1])
    assert set(made) == set(evaluate.WATCHED)
    assert made["true_success"] == 0.25 and made["true_success_keyframe"] == 0.0
    assert made["false_success"] == pytest.approx(2 / 3) and made["false_success_keyframe"] == 1.0
    assert made["precision"] == pytest.approx(1 / 3) and made["precision_keyframe"] == 0.0
    assert np.isnan(watched([1], [1], [0])["false_success"]) and np.isnan(watched([0], [0], [0])["precision"])


def test_a_true_success_after_the_deadline_is_none() -> None:
    made = watched([1, 1], [1, 1], [0, 1], live=[1, 0])
    assert made["true_success"] == 0.5 and made["false_success"] == 0.0, "what is paid after it counts as little"
