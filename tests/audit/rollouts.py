"""Rollouts by hand, two chunks of two frames each, for tests that count verdicts."""

from __future__ import annotations

import numpy as np

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
