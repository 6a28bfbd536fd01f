"""What a JPEG file does to a picture, without the file: the round trip of baseline JPEG in JAX.

The entropy coding loses nothing and is left out. What remains is libjpeg's default path: YCbCr in bytes, colour at half
the resolution, 8 x 8 cosine transforms rounded to a table of steps, and the colour interpolated back ("fancy
upsampling"). Whole numbers stand where libjpeg has them, between the two passes of a transform too; its fixed point has
13 binary digits after it, so that a few pixels in a thousand still differ.

Source: ITU-T T.81, Annex K; libjpeg-turbo: jcsample.c, jcdctmgr.c, jdsample.c, jdcolor.c.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax.types import Array

BLOCK = 8
"""Side of a transform."""

# The example tables of the standard (Annex K.1), in rows of vertical and columns of horizontal frequency; nearly every
# encoder scales these. A step is the coarseness with which a frequency is kept: large for fine detail and for colour.
# fmt: off
LUMA = np.array([
    [16, 11, 10, 16,  24,  40,  51,  61], [12, 12, 14, 19,  26,  58,  60,  55],
    [14, 13, 16, 24,  40,  57,  69,  56], [14, 17, 22, 29,  51,  87,  80,  62],
    [18, 22, 37, 56,  68, 109, 103,  77], [24, 35, 55, 64,  81, 104, 113,  92],
    [49, 64, 78, 87, 103, 121, 120, 101], [72, 92, 95, 98, 112, 100, 103,  99],
])
CHROMA = np.array([
    [17, 18, 24, 47, 99, 99, 99, 99], [18, 21, 26, 66, 99, 99, 99, 99],
    [24, 26, 56, 99, 99, 99, 99, 99], [47, 66, 99, 99, 99, 99, 99, 99],
    *[[99] * 8] * 4,
])
# fmt: on
"""Steps at quality 50."""


def round_trip(frame_BHWC: Array, quality: int) -> Array:
    """Returns pixels as they come back from a file of ``quality`` 1 to 100.

    Args:
      frame_BHWC: (B, H, W, 3), whole numbers 0 to 255 in float32; the result is of the same kind.
    """
    # RGB -> YCbCr, rounded to bytes. Chrominance is signed and stored around 128.
    red, green, blue = (frame_BHWC[..., i] for i in range(3))
    luma_BHW = _byte(0.299 * red + 0.587 * green + 0.114 * blue)
    cb_BHW = _byte(-0.168735892 * red - 0.331264108 * green + 0.5 * blue + 128.0)
    cr_BHW = _byte(0.5 * red - 0.418687589 * green - 0.081312411 * blue + 128.0)
    luma_BHW = _quantise(luma_BHW, steps(LUMA, quality))
    # Colour at half the resolution: halved, quantised, doubled, and cut where an odd side was filled up.
    cb_BHW, cr_BHW = (
        _double(_quantise(_halve(x), steps(CHROMA, quality)))[:, : x.shape[1], : x.shape[2]] - 128.0
        for x in (cb_BHW, cr_BHW)
    )
    red = luma_BHW + _whole(1.402 * cr_BHW)
    green = luma_BHW + _whole(-0.344136286 * cb_BHW - 0.714136286 * cr_BHW)
    blue = luma_BHW + _whole(1.772 * cb_BHW)
    return jnp.clip(jnp.stack([red, green, blue], axis=-1), 0.0, 255.0)


def steps(table: np.ndarray, quality: int) -> np.ndarray:
    """Returns the table of steps at a quality, as libjpeg scales it."""
    # In per cent of the table: 100 at quality 50, 0 at 100, where every step is 1; rounded as whole numbers.
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return np.clip((table * scale + 50) // 100, 1, 255).astype(np.float32)


def _byte(x: Array) -> Array:
    return jnp.clip(_whole(x), 0.0, 255.0)


def _quantise(x_BHW: Array, step_88: np.ndarray) -> Array:
    """Transforms every block to cosines, rounds to the steps, and back; whole numbers where libjpeg has them."""
    _, height, width = x_BHW.shape
    # (B, rows of blocks h, row y, columns of blocks w, column x); u and v are vertical and horizontal frequencies.
    block_bhywx = _blocks(x_BHW - 128.0)
    # libjpeg keeps two binary digits between the passes and leaves its result eight times as large as the standard's.
    rows = _whole(4.0 * _along("bhywx,vx->bhywv", block_bhywx))  # quarters
    eighths = _whole(_along("bhywv,uy->bhuwv", rows) / 4.0)
    # The one loss of JPEG: the nearest multiple of the step, halves away from zero. What is stored is the multiple.
    step_18181 = (8.0 * step_88).reshape(1, 1, BLOCK, 1, BLOCK)
    level = jnp.sign(eighths) * jnp.floor((jnp.abs(eighths) + 0.5 * step_18181) / step_18181)
    # The way back, vertical frequencies first; again two digits are kept between the passes.
    columns = _whole(4.0 * _along("bhuwv,uy->bhywv", level * step_18181 / 8.0))
    back_bhywx = _byte(_along("bhywv,vx->bhywx", columns) / 32.0 + 128.0)
    return back_bhywx.reshape(x_BHW.shape[0], height + -height % BLOCK, width + -width % BLOCK)[:, :height, :width]


def _blocks(x_BHW: Array) -> Array:
    """Returns (B, rows of blocks, 8, columns of blocks, 8); the last row and column are repeated to whole blocks."""
    batch, height, width = x_BHW.shape
    x_BHW = jnp.pad(x_BHW, ((0, 0), (0, -height % BLOCK), (0, -width % BLOCK)), mode="edge")
    return x_BHW.reshape(batch, x_BHW.shape[1] // BLOCK, BLOCK, x_BHW.shape[2] // BLOCK, BLOCK)


def _along(axes: str, x: Array) -> Array:
    # At full precision: an accelerator's default would round the products to bfloat16.
    return jnp.einsum(axes, x, _cosines(), precision=jax.lax.Precision.HIGHEST)


def _cosines() -> np.ndarray:
    """Returns (8, 8), frequency by place; times its transpose it is eight times the identity."""
    frequency, place = np.meshgrid(np.arange(BLOCK), np.arange(BLOCK), indexing="ij")
    table = np.sqrt(2.0) * np.cos((2 * place + 1) * frequency * np.pi / (2 * BLOCK))
    table[0] = 1.0
    return table.astype(np.float32)


def _whole(x: Array) -> Array:
    return jnp.floor(x + 0.5)  # halves go up, as in libjpeg's shifts; jnp.round would take them to even numbers


def _halve(x_BHW: Array) -> Array:
    """Returns the means of 2 x 2 pixels; a half is rounded down in even columns and up in odd ones."""
    x_BHW = jnp.pad(x_BHW, ((0, 0), (0, x_BHW.shape[1] % 2), (0, x_BHW.shape[2] % 2)), mode="edge")
    batch, height, width = x_BHW.shape
    total = x_BHW.reshape(batch, height // 2, 2, width // 2, 2).sum(axis=(2, 4))
    # libjpeg adds 1 and 2 by turns before it divides by 4, so that rounding does not brighten the whole picture.
    return jnp.floor((total + 1.0 + jnp.arange(width // 2) % 2) / 4.0)


def _double(x_BHW: Array) -> Array:
    """Returns twice the resolution, three parts of the nearer sample to one of the farther, on both axes."""
    down = _between(x_BHW, 1)
    # Whole numbers of sixteenths, rounded in a pattern along the row.
    return jnp.floor((_between(down, 2) + jnp.where(jnp.arange(2 * x_BHW.shape[2]) % 2, 7.0, 8.0)) / 16.0)


def _between(x_BHW: Array, axis: int) -> Array:
    """Returns both new samples of every old one, four times as large, interleaved along ``axis``."""
    length = x_BHW.shape[axis]
    place = jnp.arange(length)
    before, after = (jnp.take(x_BHW, jnp.clip(place + i, 0, length - 1), axis=axis) for i in (-1, 1))
    # (..., n, ...) -> (..., n, 2, ...) -> (..., 2n, ...): the first new sample leans to the left, the second right.
    pair = jnp.stack([3.0 * x_BHW + before, 3.0 * x_BHW + after], axis=axis + 1)
    return pair.reshape(*x_BHW.shape[:axis], 2 * length, *x_BHW.shape[axis + 1 :])
