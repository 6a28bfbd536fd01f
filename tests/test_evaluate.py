"""Imagination held against the truth."""

from __future__ import annotations

import numpy as np

from wovr_jax import evaluate
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
    found = evaluate.compared(true, dream, {"open_fingers": np.asarray(open_BNT)}, 0.5)
    assert {name: found["verdicts"][name] for name in ("tp", "fp", "fn", "tn")} == {"tp": 1, "fp": 1, "fn": 1, "tn": 1}
    assert found["imagined_success"] == 0.5 and found["imagined_outcomes"] == [1, 0, 1, 0]
    assert found["open_fingers"] == 0.25 and found["psnr"] == [100 + 10 * np.log10(4.0)] * 2


def test_loosened_actions_keep_the_arm_and_let_go_half_way() -> None:
    """Row 0 closes at step 0 and succeeds at 3, row 1 closes at 1 and never does, row 2 never closes."""
    true = rollout([0, 0, 0], [True, False, False])
    action_BNTA = np.random.default_rng(0).uniform(-1, 1, (3, 2, 2, 7)).astype(np.float32)
    action_BNTA[..., -1] = np.array([[1, 1, -1, 1], [-1, 1, 1, 1], [-1, -1, -1, -1]]).reshape(3, 2, 2)
    found = evaluate.loosened(true.replace(action_BNTA=action_BNTA))
    assert all(np.array_equal(other[..., :-1], action_BNTA[..., :-1]) for other in found.values())
    assert (np.asarray(found["open_fingers"])[..., -1] == -1).all()
    dropped = np.asarray(found["dropped"])[..., -1].reshape(3, 4)
    assert dropped.tolist() == [[1, -1, -1, -1], [-1, 1, -1, -1], [-1, -1, -1, -1]]
