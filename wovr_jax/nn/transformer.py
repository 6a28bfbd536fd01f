"""Layers of the transformers: norms, rotary positions, and the one attention function of the repository.

The norms keep their statistics in float32 and return the dtype they were given, so a bfloat16 stream stays bfloat16
while the sums that would lose digits in it do not. Input and learned vectors are never broadcast by rank: every
expansion is written out.

A rotary table holds *angles*, one for each position and pair of channels. Wan counts over (time, row, column), Llama
over a line, and the two differ in which channels form a pair:

    Wan    neighbours   (0, 1), (2, 3), ...          ``rotate_pairs``
    Llama  halves       (0, D/2), (1, D/2 + 1), ...  ``rotate_halves``

Letters of this file: H heads, D width of one head, L queries, K keys, P = D / 2 pairs of channels.
"""

from __future__ import annotations

from typing import Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wovr_jax.types import Array

Kernel = Literal["xla", "cudnn"]
K_MASK = -1e30
"""Logit of a pair that may not meet: finite, so that a row without keys is no NaN."""


def attention(q_BLHD: Array, k_BKHD: Array, v_BKHD: Array, mask: Array | None = None, *, kernel: str = "xla") -> Array:
    """softmax(q k^T / sqrt(D)) v over the keys, with logits and softmax in float32.

    Args:
      q_BLHD: (B, L, H, D) queries.
      k_BKHD: (B, K, H, D) keys; also v_BKHD.
      mask: bool, True where a query may look; of rank 4, broadcastable to (B, H, L, K). Without a mask every query
        sees every key. A query that may look nowhere gets the mean of the values.
      kernel: "xla", or "cudnn" for the fused kernel of NVIDIA devices (bfloat16 only).

    Returns:
      (B, L, H, D) in the dtype of the queries.

    Raises:
      AssertionError: for shapes that do not fit together.
    """
    chex.assert_rank([q_BLHD, k_BKHD, v_BKHD], 4, custom_message="attention: q (B, L, H, D), k and v (B, K, H, D)")
    chex.assert_equal_shape([k_BKHD, v_BKHD], custom_message="attention: keys and values")
    chex.assert_equal_shape([q_BLHD, k_BKHD], dims=(0, 2, 3), custom_message="attention: batch, heads, width")
    if mask is not None:
        chex.assert_rank(mask, 4, custom_message="attention mask (B, H, L, K)")
        chex.assert_type(mask, bool, custom_message="attention mask, True where a query may look")
    scale = float(q_BLHD.shape[-1] ** -0.5)
    if kernel == "cudnn":
        return jax.nn.dot_product_attention(q_BLHD, k_BKHD, v_BKHD, mask=mask, scale=scale, implementation="cudnn")
    # (B, L, H, D) -> (B, H, L, D). Heads before positions, and the division by the sum after the second product: the
    # same numbers, and half the time on XLA:CPU, forward and backward.
    q_BHLD, k_BHKD, v_BHKD = (jnp.swapaxes(x, 1, 2) for x in (q_BLHD, k_BKHD, v_BKHD))
    # bfloat16 operands, float32 sums: what an accelerator's matrix unit does anyway, and a CPU has to be told.
    logit_BHLK = scale * jnp.einsum("BHLD,BHKD->BHLK", q_BHLD, k_BHKD, preferred_element_type=jnp.float32)
    if mask is not None:
        logit_BHLK = jnp.where(mask, logit_BHLK, K_MASK)
    # The largest logit is taken away so that exp cannot overflow. It cancels in the quotient, and so does its gradient.
    top_BHL1 = jax.lax.stop_gradient(logit_BHLK.max(-1, keepdims=True))
    weight_BHLK = jnp.exp(logit_BHLK - top_BHL1)  # float32: bfloat16 cannot sum a long row to one
    out_BHLD = jnp.einsum(
        "BHLK,BHKD->BHLD", weight_BHLK.astype(v_BHKD.dtype), v_BHKD, preferred_element_type=jnp.float32
    )
    out_BHLD = out_BHLD / weight_BHLK.sum(-1, keepdims=True)
    return jnp.swapaxes(out_BHLD, 1, 2).astype(q_BLHD.dtype)  # (B, H, L, D) -> (B, L, H, D)


def wan_split(head_dim: int) -> tuple[int, int, int]:
    """Returns the channels of a head given to (time, row, column): rows and columns get 2 * (D // 6) each.

    128 -> (44, 42, 42). Source: Wan2.2 wan/modules/model.py.
    """
    if head_dim % 2 or head_dim < 6:
        raise ValueError(f"rope: a head of Wan needs an even width of at least 6, got {head_dim}")
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def wan_angles(frames: int, rows: int, columns: int, head_dim: int, theta: float = 10_000.0) -> np.ndarray:
    """Returns the (f * h * w, P) float32 angles of a latent grid, column fastest, every axis counted from 0.

    Each axis restarts its own frequencies theta^(-2j/m) for its m channels. The table is a
    constant made in float64 on the host.
    """
    grid = np.meshgrid(np.arange(frames), np.arange(rows), np.arange(columns), indexing="ij")
    # One block of pairs for each axis: position (f * h * w, 1) times frequency (1, m / 2). The order time, row, column
    # is that of the released weights; another one would give other attention without any error.
    parts = [
        axis.reshape(-1, 1) * _frequencies(width, theta)[None]
        for axis, width in zip(grid, wan_split(head_dim), strict=True)
    ]
    return np.concatenate(parts, axis=1).astype(np.float32)


def rotate_pairs(x_BLHD: Array, angle_LP: Array | np.ndarray) -> Array:
    """Rotates neighbouring channels (2k, 2k + 1) by ``angle_LP[:, k]``, in float32."""
    angle = jnp.asarray(angle_LP, jnp.float32)[None, :, None, :]  # (L, P) -> (1, L, 1, P): for all rows and heads
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    pair = x_BLHD.astype(jnp.float32).reshape(*x_BLHD.shape[:-1], -1, 2)  # (B, L, H, D) -> (B, L, H, P, 2)
    even, odd = pair[..., 0], pair[..., 1]
    # (even + i odd) e^(i angle), as upstream writes it with complex numbers.
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x_BLHD.shape).astype(x_BLHD.dtype)


def llama_angles(position_BL: Array, head_dim: int, theta: float = 10_000.0) -> Array:
    """Returns the (B, L, P) float32 angles position * theta^(-2j/D). Source: transformers models/llama."""
    if head_dim % 2:
        raise ValueError(f"rope: a head of Llama needs an even width, got {head_dim}")
    frequency = jnp.asarray(_frequencies(head_dim, theta), jnp.float32)
    return position_BL.astype(jnp.float32)[..., None] * frequency[None, None]


def rotate_halves(x_BLHD: Array, angle_BLP: Array) -> Array:
    """Rotates channels (k, k + D/2) by ``angle_BLP[..., k]``, in float32."""
    cos, sin = jnp.cos(angle_BLP)[:, :, None], jnp.sin(angle_BLP)[:, :, None]  # (B, L, P) -> (B, L, 1, P)
    first, second = jnp.split(x_BLHD.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BLHD.dtype)


def _frequencies(width: int, theta: float) -> np.ndarray:
    # In float64 on the host and rounded once, as Wan's own table is.
    return theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps), times ``scale`` plus ``bias`` when affine.

    Args:
      dim: width of the last axis.
      eps: added to the (biased) variance.
      affine: whether there are learned ``scale`` (ones) and ``bias`` (zeros).
    """

    def __init__(self, dim: int, *, eps: float = 1e-6, affine: bool = True):
        self.dim = dim
        self.eps = eps
        self.affine = affine
        if affine:
            self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))
            self.bias = nnx.Param(jnp.zeros((dim,), jnp.float32))

    def __call__(self, x: Array) -> Array:
        chex.assert_axis_dimension(x, -1, self.dim, custom_message="LayerNorm")
        full = x.astype(jnp.float32)  # bfloat16 sums over thousands of channels lose the mean
        # In two passes: mean(x^2) - mean(x)^2 would lose the variance of a stream that is far from zero.
        centred = full - full.mean(-1, keepdims=True)
        full = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        if self.affine:
            full = full * _last(self.scale[...], x.ndim) + _last(self.bias[...], x.ndim)
        return full.astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * ``scale``, the form of Llama and of Wan's q and k norms.

    Args:
      dim: width of the last axis.
      eps: added to the mean square.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6):
        self.dim = dim
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))

    def __call__(self, x: Array) -> Array:
        chex.assert_axis_dimension(x, -1, self.dim, custom_message="RMSNorm")
        full = x.astype(jnp.float32)
        # Scaled in float32 and rounded once. Llama upstream rounds before it scales: the same but for the last bit.
        full = full * jax.lax.rsqrt(jnp.square(full).mean(-1, keepdims=True) + self.eps)
        return (full * _last(self.scale[...], x.ndim)).astype(x.dtype)


def _last(vector_D: Array, rank: int) -> Array:
    """Returns the vector as a float32 array of ``rank`` whose last axis it is."""
    # (D,) -> (1, ..., 1, D). Written out, since a broadcast by rank hides a vector that lies along the wrong axis.
    return vector_D.astype(jnp.float32).reshape((1,) * (rank - 1) + (-1,))
