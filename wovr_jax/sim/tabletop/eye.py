"""Where the gripper is and whether its jaws are closed, read off a picture.

True and imagined frames are measured by the same eye, so what blur does to it cancels in a comparison.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from wovr_jax.sim import drawing
from wovr_jax.types import Array

REACH = 0.45
"""How far a pixel may be from the gripper's colour, in RGB from 0 to 1: no other thing on the table is nearer, and a
gripper that a model has blurred by half is still seen."""


class Sight(NamedTuple):
    """What is seen of the gripper in each frame.

    Attributes:
      xy: (..., 2) position in table widths, x right and y down.
      closed: share of the gripper's pixels that have the colour of closed jaws.
      area: of the gripper in table widths squared; near 0 where none is to be seen.
    """

    xy: Array
    closed: Array
    area: Array


def locate_gripper(frame_HWC: Array) -> Sight:
    """Measures the gripper in frames (..., H, W, 3) in [-1, 1]."""
    open_HW, closed_HW = (_match(frame_HWC, colour) for colour in (drawing.OPEN, drawing.CLOSED))
    xy, mass, area = _locate(open_HW + closed_HW)
    return Sight(xy, closed_HW.sum((-2, -1)) / mass, area)


def locate_plate(frame_HWC: Array) -> Array:
    """Returns (..., 2), the middle of what is seen of the plate in frames (..., H, W, 3), in widths of the picture."""
    return _locate(_match(frame_HWC, drawing.PLATE))[0]


def _locate(weight_HW: Array) -> tuple[Array, Array, Array]:
    """Returns the mean position of the weights, their sum, and its share of the picture."""
    height, width = weight_HW.shape[-2:]
    # Centres of the pixels, as the simulator renders them; the position is the mean over them, weighted by likeness.
    y_H1 = ((jnp.arange(height) + 0.5) / height)[:, None]
    x_1W = ((jnp.arange(width) + 0.5) / width)[None, :]
    # Where no gripper is seen at all the mean is 0 / 1e-6 and not NaN; ``area`` says that it means nothing.
    mass = jnp.maximum(weight_HW.sum((-2, -1)), 1e-6)
    xy = jnp.stack([(weight_HW * axis).sum((-2, -1)) / mass for axis in (x_1W, y_H1)], axis=-1)
    return xy, mass, mass / (height * width)


def _match(frame_HWC: Array, colour: Array) -> Array:
    # 1 at the colour itself, falling to 0 at the distance REACH.
    distance = jnp.linalg.norm((frame_HWC + 1.0) / 2.0 - colour, axis=-1)
    return jnp.maximum(1.0 - distance / REACH, 0.0)
