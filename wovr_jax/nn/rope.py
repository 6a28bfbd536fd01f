"""Rotary position embeddings: Wan's over (time, row, column), and Llama's over a line.

A table holds *angles*, one for each position and pair of channels; the two families
differ in which channels form a pair:

    Wan    neighbours   (0, 1), (2, 3), ...          ``rotate_pairs``
    Llama  halves       (0, D/2), (1, D/2 + 1), ...  ``rotate_halves``

Letters of this file: H heads, D width of one head, P = D / 2 pairs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def wan_split(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head given to (time, row, column): rows and columns get 2 * (D // 6) each.

    128 -> (44, 42, 42). Source: Wan2.2 wan/modules/model.py.
    """
    if head_dim % 2 or head_dim < 6:
        raise ValueError(f"rope: a head of Wan needs an even width of at least 6, got {head_dim}")
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def wan_angles(frames: int, rows: int, columns: int, head_dim: int, theta: float = 10_000.0) -> np.ndarray:
    """(f * h * w, P) float32 angles of a latent grid, column fastest, every axis counted from 0.

    Each axis restarts its own frequencies theta^(-2j/m) for its m channels. The table is a
    constant made in float64 on the host.
    """
    grid = np.meshgrid(np.arange(frames), np.arange(rows), np.arange(columns), indexing="ij")
    parts = [
        axis.reshape(-1, 1) * _frequencies(width, theta)[None]
        for axis, width in zip(grid, wan_split(head_dim), strict=True)
    ]
    return np.concatenate(parts, axis=1).astype(np.float32)


def rotate_pairs(x_BLHD: Array, angle_LP: Array | np.ndarray) -> Array:
    """Rotates neighbouring channels (2k, 2k + 1) by ``angle_LP[:, k]``, in float32."""
    angle = jnp.asarray(angle_LP, jnp.float32)[None, :, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    pair = x_BLHD.astype(jnp.float32).reshape(*x_BLHD.shape[:-1], -1, 2)
    even, odd = pair[..., 0], pair[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x_BLHD.shape).astype(x_BLHD.dtype)


def llama_angles(position_BL: Array, head_dim: int, theta: float = 10_000.0) -> Array:
    """(B, L, P) float32 angles position * theta^(-2j/D). Source: transformers models/llama."""
    if head_dim % 2:
        raise ValueError(f"rope: a head of Llama needs an even width, got {head_dim}")
    frequency = jnp.asarray(_frequencies(head_dim, theta), jnp.float32)
    return position_BL.astype(jnp.float32)[..., None] * frequency[None, None]


def rotate_halves(x_BLHD: Array, angle_BLP: Array) -> Array:
    """Rotates channels (k, k + D/2) by ``angle_BLP[..., k]``, in float32."""
    cos, sin = jnp.cos(angle_BLP)[:, :, None], jnp.sin(angle_BLP)[:, :, None]
    first, second = jnp.split(x_BLHD.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BLHD.dtype)


def _frequencies(width: int, theta: float) -> np.ndarray:
    return theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
