"""Imagination held against the truth."""

from __future__ import annotations

import numpy as np
import pytest

from wovr_jax import evaluate
from wovr_jax.core import stats
from wovr_jax.types import Imagined


def rollout(prob_B: list[float], true_B: list[bool]) -> Imagined:
    """Two chunks of two frames of a pixel; probability and truth hold in the last frame."""
    shape = (len(prob_B), 2, 2)
    prob_BNT, truth_BNT = np.zeros(shape, np.float32), np.zeros(shape, bool)
    prob_BNT[:, -1, -1], truth_BNT[:, -1, -1] = prob_B, true_B
    blank = np.zeros((len(prob_B), 2, 1, 1, 3), np.float32)
    action_BNTA = np.zeros((*shape, 7), np.float32)
    return Imagined(
        frame_BNHWC=blank,
        prompt_BL=np.zeros((len(prob_B), 1), np.int32),
        task_B=np.zeros(len(prob_B), np.int32),
        token_BNTA=action_BNTA.astype(np.int32),
        logp_BNTA=action_BNTA,
        action_BNTA=action_BNTA,
        prob_BNT=prob_BNT,
        success_BNT=truth_BNT,
        truth_BNT=truth_BNT,
        video_BNTHWC=np.zeros((*shape, 1, 1, 3), np.float32),
    )


def test_a_comparison_counts_verdicts_and_what_open_fingers_win() -> None:
    true = rollout([0, 0, 0, 0], [True, True, False, False])
    dream = rollout([0.9, 0.4, 0.7, 0.1], [False] * 4)
    open_BNT = rollout([0.9, 0.1, 0.1, 0.1], [False] * 4).prob_BNT
    found = evaluate.compare_verdicts(true, dream, {"open_fingers": np.asarray(open_BNT)}, 0.5)
    assert {name: found["verdicts"][name] for name in ("tp", "fp", "fn", "tn")} == {"tp": 1, "fp": 1, "fn": 1, "tn": 1}
    assert found["imagined_success"] == 0.5 and found["imagined_outcomes"] == [1, 0, 1, 0]
    assert found["open_fingers"] == 0.25 and found["psnr"] == [100 + 10 * np.log10(4.0)] * 2


def test_loosened_actions_keep_the_arm_and_let_go_half_way() -> None:
    """Row 0 closes at step 0 and succeeds at 3, row 1 closes at 1 and never does, row 2 never closes."""
    true = rollout([0, 0, 0], [True, False, False])
    action_BNTA = np.random.default_rng(0).uniform(-1, 1, (3, 2, 2, 7)).astype(np.float32)
    action_BNTA[..., -1] = np.array([[1, 1, -1, 1], [-1, 1, 1, 1], [-1, -1, -1, -1]]).reshape(3, 2, 2)
    found = evaluate.loosen_gripper(true.replace(action_BNTA=action_BNTA))
    assert all(np.array_equal(other[..., :-1], action_BNTA[..., :-1]) for other in found.values())
    assert (np.asarray(found["open_fingers"])[..., -1] == -1).all()
    dropped = np.asarray(found["dropped"])[..., -1].reshape(3, 4)
    assert dropped.tolist() == [[1, -1, -1, -1], [-1, 1, -1, -1], [-1, -1, -1, -1]]


def test_a_rate_comes_with_its_interval_and_not_from_nothing() -> None:
    made = evaluate.summarize_outcomes([True, False, True, True])
    assert (made["n"], made["successes"], made["rate"]) == (4, 3, 0.75) and made["low"] < 0.75 < made["high"]
    with pytest.raises(ValueError, match="got none"):
        evaluate.summarize_outcomes([])


def test_a_closed_loop_says_what_was_paid_by_kind_of_start() -> None:
    imagined, true = [1, 1, 1, 0, 1, 1, 0, 0], [1, 1, 0, 1, 0, 0, 0, 0]
    made = evaluate.summarize_closed_loop(imagined, true, np.arange(8) >= 4)
    counts = {kind: [made[kind][count] for count in ("tp", "fp", "fn", "tn")] for kind in made}
    assert counts == {"all": [2, 3, 1, 2], "episode_start": [2, 1, 1, 0], "keyframe": [0, 2, 0, 2]}
    false, precision = made["all"]["false_success"], made["all"]["precision"]
    assert (false["n"], false["rate"], precision["n"], precision["rate"]) == (5, 0.6, 5, 0.4)
    assert (false["low"], false["high"]) == stats.wilson(3, 5)
    assert made["keyframe"]["true"]["rate"] == 0.0 and made["keyframe"]["imagined"]["rate"] == 0.5
    # Nothing fails, nothing is paid, nothing begins at a keyframe: no number is made up.
    won = evaluate.summarize_closed_loop([1, 0], [1, 1], np.zeros(2, bool))
    assert won["all"]["false_success"] is None and won["keyframe"] is None
    assert evaluate.summarize_closed_loop([0], [0], np.zeros(1, bool))["all"]["precision"] is None


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


def test_verdicts_on_other_episodes_are_refused() -> None:
    assert evaluate.count_verdicts(np.zeros(3), np.zeros(3))["tpr"] is None, "no success to be found"
    with pytest.raises(AssertionError, match="shape"):
        evaluate.count_verdicts(np.zeros(3), np.zeros(1))


def test_fidelity_is_of_each_chunk_and_needs_frames() -> None:
    true = rollout([0, 0], [True, False])
    dream = true.replace(video_BNTHWC=true.video_BNTHWC + np.array([0.2, 0.4], np.float32).reshape(2, 1, 1, 1, 1))
    # The chunks are off by 0.2 and 0.4: 0.04 against 4 is 20 dB, 0.16 is six less.
    np.testing.assert_allclose(evaluate.measure_fidelity(dream, true), [20.0, 20.0 - 20 * np.log10(2.0)], rtol=1e-5)
    with pytest.raises(ValueError, match="video=True"):
        evaluate.measure_fidelity(dream, true.replace(video_BNTHWC=None))
    with pytest.raises(AssertionError, match="shape"):
        evaluate.measure_fidelity(dream.replace(video_BNTHWC=dream.video_BNTHWC[:1]), true)


def test_a_film_begins_with_the_first_frame_and_shows_the_truth_on_the_left() -> None:
    true = rollout([0, 0], [True, False])
    dream = true.replace(video_BNTHWC=np.ones_like(true.video_BNTHWC))
    film = evaluate.draw_film(true, dream, 1)
    assert film.shape == (5, 1, 3, 3) and film.dtype == np.uint8
    assert film[:, 0, :, 0].tolist() == [[128, 255, 128], *[[128, 255, 255]] * 4]
    with pytest.raises(ValueError, match="video=True"):
        evaluate.draw_film(true, dream.replace(video_BNTHWC=None), 0)
