"""Up to which chunk imagination stays with the truth: curves and divergence by hand."""

from __future__ import annotations

import numpy as np
import pytest

from wovr_jax.audit import horizon
from wovr_jax.core import stats

STILL = 0.04


def summarize(error_BS: np.ndarray, length_B: list[int], chunk: int = 2) -> dict:
    still_BS, ssim_BS = np.full_like(error_BS, STILL), 1.0 - error_BS
    return horizon.summarize_horizon(error_BS, still_BS, ssim_BS, np.array(length_B), chunk)


def test_curves_count_what_there_is_and_divergence_the_first_time() -> None:
    error = np.array(
        [
            [0.00, 0.00, 0.00, 0.00, 0.00, 0.00],
            [0.00, 0.00, 0.03, 0.03, 0.00, 0.00],  # astray in the second chunk, and back in the third
            [0.00, 0.00, 0.00, 0.00, 0.03, 9.00],  # ends after five steps: what stands behind does not count
            [0.00, 0.00, 9.00, 9.00, 9.00, 9.00],  # ends after two
        ]
    )
    made = summarize(error, [6, 6, 5, 2])
    assert (made["n"], made["first"], made["never"]) == ([4, 3, 3], [0, 1, 1], 2)
    assert [alive["rate"] for alive in made["with_truth"]] == pytest.approx([1.0, 2 / 3, 1 / 3])
    assert (made["with_truth"][1]["low"], made["with_truth"][1]["high"]) == stats.wilson(2, 3)
    assert made["horizon"] == 1
    # Of the three that reach the second chunk one is off by 0.03, and of the third one by its only live step.
    assert made["psnr"][1:] == pytest.approx([10 * np.log10(4 / 0.01)] * 2)
    assert made["psnr_still"] == pytest.approx([20.0] * 3) and made["ssim"] == pytest.approx([1.0, 0.99, 0.99])


@pytest.mark.parametrize(
    ("error", "still", "astray"),
    [
        (0.019, 0.04, False),  # skill 0.525
        (0.021, 0.04, True),  # skill 0.475
        (0.0003, 0.0, False),  # nothing moves, and it is nearer than 40 dB: 4 / 0.0003 is 41
        (0.0005, 0.0, True),
    ],
)
def test_a_chunk_has_diverged_below_half_the_skill_unless_it_is_as_good_as_equal(
    error: float, still: float, astray: bool
) -> None:
    first_B = horizon.find_divergence(np.full((1, 2), error), np.full((1, 2), still), np.array([[False, True]]))
    assert first_B.tolist() == [1 if astray else 2]


def test_nothing_diverges_and_the_horizon_is_the_end() -> None:
    made = summarize(np.zeros((10, 7)), [7] * 10)
    assert made["horizon"] == 4 and made["never"] == 10 and made["n"] == [10] * 4


@pytest.mark.parametrize(("lost", "reach"), [(1, 3), (2, 1)])
def test_the_horizon_ends_before_the_chunk_that_a_tenth_does_not_survive(lost: int, reach: int) -> None:
    error = np.zeros((10, 6))
    error[:lost, 2:4] = 1.0
    assert summarize(error, [6] * 10)["horizon"] == reach
