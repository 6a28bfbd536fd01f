"""Scenes and windows of the embedded table that the shipped parts are pretrained on."""

from __future__ import annotations

import jax
import numpy as np

from wovr_jax.policy.towers_train import Scenes
from wovr_jax.sim.tabletop.scenes import draw_scenes, draw_windows
from wovr_jax.sim.tabletop.table import TabletopConfig

SIM = TabletopConfig(size=16, horizon=16)


def test_windows_are_an_anchor_a_memory_and_what_follows() -> None:
    draw = jax.jit(draw_windows, static_argnums=(1, 2))
    window_BFHWC = np.asarray(draw(jax.random.key(0), 16, SIM))
    assert window_BFHWC.shape == (16, 13, 16, 16, 3)
    np.testing.assert_array_equal(window_BFHWC, draw(jax.random.key(0), 16, SIM))
    # Of those that begin at the episode's start the memory is copies of the anchor, of the others it moves.
    at_start_B = (window_BFHWC[:, 1:5] == window_BFHWC[:, :1]).all((1, 2, 3, 4))
    assert at_start_B.any() and not at_start_B.all()
    assert (window_BFHWC[:, 5:] != window_BFHWC[:, :1]).any((1, 2, 3, 4)).mean() > 0.5


def test_scenes_are_pictures_of_eight_bits_and_say_what_is_where() -> None:
    scenes = Scenes(**jax.jit(draw_scenes, static_argnums=(1, 2))(jax.random.key(1), 64, SIM))
    frame_BHWC = np.asarray(scenes.frame_BHWC)
    assert frame_BHWC.shape == (64, 16, 16, 3)
    np.testing.assert_allclose((frame_BHWC + 1) * 127.5, np.round((frame_BHWC + 1) * 127.5), atol=1e-3)
    assert scenes.position_BO2.shape == (64, 5, 2) and scenes.attribute_BE.shape == (64, 7)
    position_BO2, present_BO, attribute_BE = map(
        np.asarray, (scenes.position_BO2, scenes.present_BO, scenes.attribute_BE)
    )
    # Gripper and plate are in every scene, each colour in some; attributes 1 to 3 say the same of the colours.
    assert present_BO[:, [0, 4]].all() and 0 < present_BO[:, 1:4].mean() < 1
    np.testing.assert_array_equal(attribute_BE[:, 1:4], present_BO[:, 1:4])
    # A block that is held is where the gripper is, and the jaws are closed on it.
    held_BP = attribute_BE[:, 4:7]
    assert held_BP.any() and held_BP.sum(1).max() == 1 and attribute_BE[held_BP.any(1), 0].all()
    rows, colours = np.nonzero(held_BP)
    np.testing.assert_array_equal(position_BO2[rows, 1 + colours], position_BO2[rows, 0])
