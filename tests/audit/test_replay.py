"""Recorded actions replayed: verdicts, fidelity, other fingers and films of the same pairs."""

from __future__ import annotations

import numpy as np
import pytest

from tests.audit.rollouts import rollout
from wovr_jax.audit import replay
from wovr_jax.audit.verdicts import count_verdicts


def test_a_comparison_counts_verdicts_and_what_open_fingers_win() -> None:
    true = rollout([0, 0, 0, 0], [True, True, False, False])
    dream = rollout([0.9, 0.4, 0.7, 0.1], [False] * 4)
    open_BNT = rollout([0.9, 0.1, 0.1, 0.1], [False] * 4).prob_BNT
    found = replay.compare_verdicts(true, dream, {"open_fingers": np.asarray(open_BNT)}, 0.5)
    assert {name: found["verdicts"][name] for name in ("tp", "fp", "fn", "tn")} == {"tp": 1, "fp": 1, "fn": 1, "tn": 1}
    assert found["imagined_success"] == 0.5 and found["imagined_outcomes"] == [1, 0, 1, 0]
    assert found["open_fingers"] == 0.25 and found["psnr"] == [100 + 10 * np.log10(4.0)] * 2


def test_loosened_actions_keep_the_arm_and_let_go_half_way() -> None:
    """Row 0 closes at step 0 and succeeds at 3, row 1 closes at 1 and never does, row 2 never closes."""
    true = rollout([0, 0, 0], [True, False, False])
    action_BNTA = np.random.default_rng(0).uniform(-1, 1, (3, 2, 2, 7)).astype(np.float32)
    action_BNTA[..., -1] = np.array([[1, 1, -1, 1], [-1, 1, 1, 1], [-1, -1, -1, -1]]).reshape(3, 2, 2)
    found = replay.loosen_gripper(true.replace(action_BNTA=action_BNTA))
    assert all(np.array_equal(other[..., :-1], action_BNTA[..., :-1]) for other in found.values())
    assert (np.asarray(found["open_fingers"])[..., -1] == -1).all()
    dropped = np.asarray(found["dropped"])[..., -1].reshape(3, 4)
    assert dropped.tolist() == [[1, -1, -1, -1], [-1, 1, -1, -1], [-1, -1, -1, -1]]


def test_verdicts_on_other_episodes_are_refused() -> None:
    assert count_verdicts(np.zeros(3), np.zeros(3))["tpr"] is None, "no success to be found"
    with pytest.raises(AssertionError, match="shape"):
        count_verdicts(np.zeros(3), np.zeros(1))


def test_fidelity_is_of_each_chunk_and_needs_frames() -> None:
    true = rollout([0, 0], [True, False])
    dream = true.replace(video_BNTHWC=true.video_BNTHWC + np.array([0.2, 0.4], np.float32).reshape(2, 1, 1, 1, 1))
    # The chunks are off by 0.2 and 0.4: 0.04 against 4 is 20 dB, 0.16 is six less.
    np.testing.assert_allclose(replay.measure_fidelity(dream, true), [20.0, 20.0 - 20 * np.log10(2.0)], rtol=1e-5)
    with pytest.raises(ValueError, match="video=True"):
        replay.measure_fidelity(dream, true.replace(video_BNTHWC=None))
    with pytest.raises(AssertionError, match="shape"):
        replay.measure_fidelity(dream.replace(video_BNTHWC=dream.video_BNTHWC[:1]), true)


def test_a_film_begins_with_the_first_frame_and_shows_the_truth_on_the_left() -> None:
    true = rollout([0, 0], [True, False])
    dream = true.replace(video_BNTHWC=np.ones_like(true.video_BNTHWC))
    film = replay.draw_film(true, dream, 1)
    assert film.shape == (5, 1, 3, 3) and film.dtype == np.uint8
    assert film[:, 0, :, 0].tolist() == [[128, 255, 128], *[[128, 255, 255]] * 4]
    with pytest.raises(ValueError, match="video=True"):
        replay.draw_film(true, dream.replace(video_BNTHWC=None), 0)
