"""From camera to network: the resizes, crops and roundings of the stacks that train OpenVLA-OFT, on the device.

A policy sees well only what it was trained on, and the stacks prepare the same picture differently::

    rlinf   bicubic to 224                                                                     RLinf, WoVR
    oft     JPEG, Lanczos-3 to 224, the middle 0.9 of the area back to 224     OFT, SimpleVLA-RL, WMPO

Every step ends on the 8-bit grid, as it does there. The two normalisations and the stack of six channels are the
network's own first step (``backbones.normalise``). Cameras that stand on their head are turned before: LIBERO's
``frame[::-1, ::-1]`` belongs to the simulator.

Sources: openvla-oft:experiments/robot/openvla_utils.py; RLinf:rlinf/models/embodiment/openvla_oft.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from wovr_jax.policy import jpeg
from wovr_jax.types import Array

KERNELS = ("cubic", "lanczos3")


@dataclasses.dataclass(frozen=True)
class Processing:
    """What is done to a picture before the network.

    Attributes:
      size: height and width that the network takes; other shapes are squeezed into it.
      kernel: of the antialiased resize: "cubic" or "lanczos3".
      jpeg: quality of the JPEG round trip before the resize, 0 for none.
      crop: share of the area that the centre crop keeps, 1 for none.
    """

    size: int = 224
    kernel: str = "cubic"
    jpeg: int = 0
    crop: float = 1.0

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise ValueError(f"image processing: expected a kernel in {KERNELS}, got {self.kernel!r}")
        if self.size < 1 or not 0 <= self.jpeg <= 100 or not 0.0 < self.crop <= 1.0:
            raise ValueError(
                f"image processing: expected size >= 1, jpeg in [0, 100] and crop in (0, 1], got size={self.size}, "
                f"jpeg={self.jpeg}, crop={self.crop}"
            )

    @classmethod
    def rlinf(cls, size: int = 224) -> Processing:
        """RLinf on LIBERO and in the world model: one bicubic resize."""
        return cls(size)

    @classmethod
    def oft(cls, size: int = 224) -> Processing:
        """OFT's evaluation, SimpleVLA-RL, WMPO."""
        return cls(size, kernel="lanczos3", jpeg=95, crop=0.9)


def of_recipe(recipe: str, size: int = 224) -> Processing:
    """Returns the processing that goes with a policy's recipe, "oft" or "rlinf" (``vla.Form``).

    Raises:
      ValueError: another name.
    """
    known = {"oft": Processing.oft, "rlinf": Processing.rlinf}
    if recipe not in known:
        raise ValueError(f"image processing: expected one of {tuple(known)}, got {recipe!r}")
    return known[recipe](size)


def frames(recipe: Processing, camera: Array) -> Array:
    """Turns pictures of a camera into what the network takes.

    Args:
      recipe: how.
      camera: (..., H, W, 3) uint8, upright; any leading axes, such as batch and views.

    Returns:
      (..., size, size, 3) float32 in [-1, 1], every value one of the 256 that a byte can stand for.

    Raises:
      ValueError: another dtype or shape.
    """
    if camera.dtype != jnp.uint8 or camera.ndim < 3 or camera.shape[-1] != 3 or 0 in camera.shape:
        raise ValueError(
            f"camera frame: expected uint8 of shape (..., height, width, 3), got {camera.dtype} of shape "
            f"{tuple(camera.shape)}; send pixels 0 to 255 in the order red, green, blue"
        )
    # (..., H, W, 3) -> (B, H, W, 3), and pixels as whole numbers in float32 until the last line.
    x_BHWC = jnp.asarray(camera).reshape(-1, *camera.shape[-3:]).astype(jnp.float32)
    if recipe.jpeg:  # training read its pictures from JPEG files, so the stack codes the camera's too
        x_BHWC = jpeg.round_trip(x_BHWC, recipe.jpeg)
    x_BHWC = resize(x_BHWC, recipe.size, recipe.kernel)
    if recipe.crop < 1.0:
        x_BHWC = crop_middle(x_BHWC, recipe.crop)
    return (x_BHWC / 127.5 - 1.0).reshape(*camera.shape[:-3], recipe.size, recipe.size, 3)


def resize(x_BHWC: Array, size: int, kernel: str) -> Array:
    """Resizes pixels 0 to 255, antialiased, clipped and rounded; pictures of that size stay as they are."""
    batch, height, width, channels = x_BHWC.shape
    if (height, width) == (size, size):
        return x_BHWC
    out = jax.image.resize(x_BHWC, (batch, size, size, channels), kernel, antialias=True)
    # Back on the grid of bytes, where the stacks hold a picture between two steps; both kernels overshoot at edges.
    return jnp.clip(jnp.round(out), 0.0, 255.0)


def crop_middle(x_BHWC: Array, share: float) -> Array:
    """Stretches the middle ``share`` of the area to the whole by bilinear sampling.

    As TensorFlow's ``crop_and_resize`` samples it, corners on corners, and as its conversion to bytes rounds:
    down, from a scale of 255.5.
    """
    side = math.sqrt(share)  # of the length: a share of the area is its square
    rows_H, cols_W = (_places(side, length) for length in x_BHWC.shape[1:3])
    # Columns, then rows: bilinear sampling separates, and in this order it rounds as the original does.
    x_BHWC = _interpolate(_interpolate(x_BHWC / 255.0, cols_W, 2), rows_H, 1)
    return jnp.floor(jnp.clip(x_BHWC, 0.0, 1.0) * 255.5)


def _places(side: float, length: int) -> Array:
    """Returns where ``length`` samples of the middle ``side`` of an axis lie, in pixels."""
    # Corner on corner: the first and the last sample lie on the edges of the crop, not half a pixel inside.
    return 0.5 * (1.0 - side) * (length - 1) + side * jnp.arange(length)


def _interpolate(x_BHWC: Array, place: Array, axis: int) -> Array:
    low = jnp.floor(place).astype(jnp.int32)
    part = (place - low).reshape([-1 if i == axis else 1 for i in range(4)])  # along its axis, of length 1 elsewhere
    below, above = (jnp.take(x_BHWC, low + i, axis=axis, mode="clip") for i in (0, 1))
    return below + (above - below) * part
