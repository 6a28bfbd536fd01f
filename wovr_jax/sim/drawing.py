"""What the pictures of all embedded simulators are made of, seen from above.

Every edge is a sigmoid about a pixel wide and nothing is thinner than four pixels at 32: the pictures are band-limited,
so a small video model can carry them. Lengths are in picture widths, x to the right and y down.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from wovr_jax.types import Array

# RGB from 0 to 1. Open and closed jaws are far from each other and from everything else, so that a blurred gripper is
# still told apart.
BLOCKS = jnp.array([[0.86, 0.20, 0.18], [0.20, 0.66, 0.30], [0.20, 0.36, 0.85]])
OPEN = jnp.array([0.12, 0.12, 0.14])
CLOSED = jnp.array([0.98, 0.80, 0.16])
_TABLE = jnp.array([0.62, 0.54, 0.45])
PLATE = jnp.array([0.96, 0.96, 0.94])

BLOCK, HELD = 0.085, 0.105
"""Half-width of a block; of one that is held, which is nearer to the camera."""
GRIPPER = 0.065
"""Radius of the gripper."""


class Canvas:
    """A picture that is painted from the back to the front; it begins as the empty table.

    Args:
      size: pixels of its side.
      centre: what it looks at.
      extent: how much of the table it shows, in table widths; all of it is 1.
    """

    def __init__(self, size: int, centre: Array | tuple[float, float] = (0.5, 0.5), extent: float = 1.0):
        axis = ((jnp.arange(size) + 0.5) / size - 0.5) * extent
        self.y_HW, self.x_HW = jnp.meshgrid(axis + centre[1], axis + centre[0], indexing="ij")
        self.sharp = 1.6 * size / extent  # of the sigmoids: from a tenth to nine tenths within 2.7 pixels
        # A little darker towards the viewer, and as dark as the floor beside the table.
        on_HW = jnp.maximum(jnp.abs(self.x_HW - 0.5), jnp.abs(self.y_HW - 0.5)) <= 0.5
        shade_HW = jnp.where(on_HW, 1.0 - 0.12 * self.y_HW, 0.5)
        self.image_HWC = _TABLE * shade_HW[..., None]

    def draw_disc(self, centre: Array, radius: float, colour: Array) -> None:
        """Paints a disc."""
        # 1e-8: the root has no derivative at 0.
        distance = jnp.sqrt((self.x_HW - centre[0]) ** 2 + (self.y_HW - centre[1]) ** 2 + 1e-8)
        self._paint(jax.nn.sigmoid((radius - distance) * self.sharp), colour)

    def draw_square(self, centre: Array, half: Array | float, colour: Array, shown: Array | bool = True) -> None:
        """Paints a square of that half-width where ``shown``."""
        distance = jnp.maximum(jnp.abs(self.x_HW - centre[0]), jnp.abs(self.y_HW - centre[1]))
        self._paint(jax.nn.sigmoid((half - distance) * self.sharp) * shown, colour)

    def draw_plate(self, centre: Array, radius: float) -> None:
        """Paints a plate with its rim."""
        self.draw_disc(centre, radius, PLATE)
        self.draw_disc(centre, 0.7 * radius, 0.93 * PLATE)

    def draw_gripper(self, centre: Array, closed: Array) -> None:
        """Paints the gripper in the colour of its jaws."""
        self.draw_disc(centre, GRIPPER, jnp.where(closed, CLOSED, OPEN))

    def picture(self) -> Array:
        """Returns what has been painted, (size, size, 3) float32 in [-1, 1]."""
        return 2.0 * self.image_HWC - 1.0

    def _paint(self, mask_HW: Array, colour: Array) -> None:
        self.image_HWC = self.image_HWC + mask_HW[..., None] * (colour - self.image_HWC)
