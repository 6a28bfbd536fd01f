"""Masked sum, mean and standard deviation, and nothing else.

Each takes an array and a boolean array ``where`` that broadcasts to its shape. Values that
are not chosen never enter the arithmetic, so a NaN among them does no harm, forwards or
backwards. Nothing chosen gives 0, not NaN.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array
Axis = int | tuple[int, ...] | None


def sum(x: Array, where: Array, axis: Axis = None, keepdims: bool = False) -> Array:
    """Sum of the chosen values."""
    chosen = jnp.broadcast_to(where, x.shape)
    return jnp.sum(jnp.where(chosen, x, jnp.zeros_like(x)), axis, keepdims=keepdims)


def mean(x: Array, where: Array, axis: Axis = None, keepdims: bool = False) -> Array:
    """Mean of the chosen values; 0 where none is chosen."""
    return sum(x, where, axis, keepdims) / jnp.maximum(_count(x, where, axis, keepdims), 1)


def std(x: Array, where: Array, axis: Axis = None, ddof: int = 0, keepdims: bool = False) -> Array:
    """Standard deviation of the chosen values, sum of squares over ``count - ddof``.

    ``ddof=0`` is numpy's default, ``ddof=1`` is torch's. 0 where ``count <= ddof``.
    """
    square = jnp.square(x - mean(x, where, axis, keepdims=True))
    count = _count(x, where, axis, keepdims)
    variance = sum(square, where, axis, keepdims) / jnp.maximum(count - ddof, 1)
    return jnp.sqrt(jnp.where(count > ddof, variance, jnp.zeros_like(variance)))


def _count(x: Array, where: Array, axis: Axis, keepdims: bool) -> Array:
    return jnp.sum(jnp.broadcast_to(where, x.shape), axis, dtype=x.dtype, keepdims=keepdims)
