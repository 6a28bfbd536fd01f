"""Scenes and windows of the second embedded simulator, that its own parts are pretrained on."""

from __future__ import annotations

import jax
import numpy as np

from wovr_jax.policy.towers_train import Scenes
from wovr_jax.sim.relay.scenes import ATTRIBUTES, OBJECTS, draw_scenes
from wovr_jax.sim.relay.table import RelayConfig
from wovr_jax.sim.tabletop.scenes import draw_windows

SIM = RelayConfig(size=16)


def test_windows_are_an_anchor_a_memory_and_what_follows() -> None:
    draw = jax.jit(draw_windows, static_argnums=(1, 2))
    window_BFHWC = np.asarray(draw(jax.random.key(0), 16, SIM))
    assert window_BFHWC.shape == (16, 13, 16, 16, 3)
    at_start_B = (window_BFHWC[:, 1:5] == window_BFHWC[:, :1]).all((1, 2, 3, 4))
    assert at_start_B.any() and not at_start_B.all()


def test_scenes_say_what_is_where_and_not_what_is_hidden() -> None:
    scenes = Scenes(**jax.jit(draw_scenes, static_argnums=(1, 2))(jax.random.key(1), 256, SIM))
    frame_BHWC, present_BO, attribute_BE = map(np.asarray, (scenes.frame_BHWC, scenes.present_BO, scenes.attribute_BE))
    assert scenes.position_BO2.shape == (256, OBJECTS, 2) and attribute_BE.shape == (256, ATTRIBUTES)
    assert scenes.radius_O.shape == (OBJECTS,)
    np.testing.assert_allclose((frame_BHWC + 1) * 127.5, np.round((frame_BHWC + 1) * 127.5), atol=1e-3)
    # Gripper, plate, lid and button are in every scene, two colours in most, one where the lid hides the other.
    assert present_BO[:, [0, 4, 5, 6]].all()
    colours_B = present_BO[:, 1:4].sum(1)
    assert set(colours_B) == {1, 2} and (colours_B == 1).mean() > 0.1
    np.testing.assert_array_equal(attribute_BE[:, 1:4], present_BO[:, 1:4])
    # Whatever is held is where the gripper is; every attribute is there in some scenes and not in others.
    held_BP = attribute_BE[:, [4, 5, 6, 7]]
    assert held_BP.sum(1).max() == 1 and attribute_BE[held_BP.any(1), 0].all()
    rows, things = np.nonzero(held_BP)
    places = np.array([1, 2, 3, 5])[things]
    np.testing.assert_array_equal(scenes.position_BO2[rows, places], scenes.position_BO2[rows, 0])
    shares = attribute_BE.mean(0)
    assert (shares > 0.02).all() and (shares < 0.98).all()
    assert not (attribute_BE[:, 8] & held_BP.any(1)).any()  # full jaws do not press
