"""Pretraining of the towers: what the heads should say, by hand. That it trains is in tests/train/test_step.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax.policy import towers_train
from wovr_jax.policy.towers_train import Scenes, TowerTraining

PLACES = [[0.25, 0.25], [0.75, 0.25], [0.5, 1.0]]


def scene(present: tuple[bool, ...] = (True, True, True)) -> Scenes:
    """One picture with three objects."""
    return Scenes(
        frame_BHWC=jnp.zeros((1, 4, 4, 3)),
        position_BO2=jnp.array([PLACES]),
        present_BO=jnp.array([present]),
        attribute_BE=jnp.array([[True, False]]),
        radius_O=jnp.array([0.1, 0.1, 0.3]),
    )


class Says:
    """Stands for the network: position logits of a test, no opinion on the rest."""

    def __init__(self, position: jax.Array):
        self.position = position

    def __call__(self, params: dict, frame: jax.Array) -> tuple:
        return self.position, jnp.zeros((1, 2)), jnp.zeros((1, 4, 3))


def test_where_is_the_position_and_counts_what_is_in_the_picture() -> None:
    goal, counts = towers_train._goal(TowerTraining("where", objects=3), scene((True, False, True)))
    np.testing.assert_allclose(goal[0], PLACES)
    assert counts[0].tolist() == [True, False, True]


def test_relation_is_halved_around_the_first_object() -> None:
    cfg = TowerTraining("relation", objects=3)
    goal, counts = towers_train._goal(cfg, scene((True, True, False)))
    # (0.5, 0) to the right of the first object, and (0.25, 0.75) below it; [-1, 1] becomes [0, 1].
    np.testing.assert_allclose(goal[0, 1:], [[0.75, 0.5], [0.625, 0.875]])
    assert counts[0].tolist() == [False, True, False]  # never the first itself, nor what is not there
    assert not towers_train._goal(cfg, scene((False, True, True)))[1].any()


def test_patches_that_an_object_covers() -> None:
    covered = towers_train._coverage(scene((True, False, True)), 4)[0]
    # Patches of side 1/2, centres 1/4 and 3/4: the first object is in the upper left one, the third in both lower.
    assert covered.T.tolist() == [[True, False, False, False], [False] * 4, [False, False, True, True]]


def test_a_miss_is_measured_in_picture_widths() -> None:
    for objective, widths in (("where", 1.0), ("relation", 2.0)):
        cfg = TowerTraining(objective, objects=3, attributes=2, bins=10)
        goal, counts = towers_train._goal(cfg, scene())
        # All weight on one bin near the goal; the error is that of its middle.
        bins = jnp.clip(jnp.floor(goal * 10 + 1), 0, 9).astype(int)
        error = jnp.abs((bins + 0.5) / 10 - goal)[0][counts[0]].mean()
        metrics = towers_train.loss(Says(1e4 * jax.nn.one_hot(bins, 10)), {}, cfg, scene())[1]
        np.testing.assert_allclose(metrics["miss"], widths * error, rtol=1e-3)
