"""The one attention function of the repository.

Letters of this file: H heads, D width of one head, L queries, K keys.
"""

from __future__ import annotations

import typing
from typing import Literal

import jax
import jax.numpy as jnp

Array = jax.Array

Kernel = Literal["xla", "cudnn"]
KERNELS = typing.get_args(Kernel)
K_MASK = -1e30
"""Logit of a pair that may not meet: finite, so that a row without keys is no NaN."""


def attention(
    q_BLHD: Array,
    k_BKHD: Array,
    v_BKHD: Array,
    mask: Array | None = None,
    *,
    scale: float | None = None,
    kernel: str = "xla",
) -> Array:
    """softmax(q k^T * scale) v over the keys, with logits and softmax in float32.

    Args:
      q_BLHD: (B, L, H, D) queries.
      k_BKHD: (B, K, H, D) keys; also v_BKHD.
      mask: bool, True where a query may look; broadcastable to (B, H, L, K), and of rank 2
        (L, K), 3 (B, L, K) or 4. Without a mask every query sees every key. A query that
        may look nowhere gets the mean of the values.
      scale: 1 / sqrt(D) when not given.
      kernel: "xla", or "cudnn" for the fused kernel of NVIDIA devices (bfloat16 only).

    Returns:
      (B, L, H, D) in the dtype of the queries.

    Raises:
      ValueError: for shapes that do not fit together, or an unknown kernel.
    """
    _check(q_BLHD, k_BKHD, v_BKHD, kernel)
    if mask is not None:
        mask = _mask_of_rank_four(mask)
    scale = float(q_BLHD.shape[-1] ** -0.5 if scale is None else scale)
    if kernel == "cudnn":
        return jax.nn.dot_product_attention(q_BLHD, k_BKHD, v_BKHD, mask=mask, scale=scale, implementation="cudnn")
    # Heads before positions, and the division by the sum after the second product: the same
    # numbers, and half the time on XLA:CPU, forward and backward.
    q_BHLD, k_BHKD, v_BHKD = (jnp.swapaxes(x, 1, 2) for x in (q_BLHD, k_BKHD, v_BKHD))
    logit_BHLK = scale * jnp.einsum("BHLD,BHKD->BHLK", q_BHLD, k_BHKD, preferred_element_type=jnp.float32)
    if mask is not None:
        logit_BHLK = jnp.where(mask, logit_BHLK, K_MASK)
    top_BHL1 = jax.lax.stop_gradient(logit_BHLK.max(-1, keepdims=True))
    weight_BHLK = jnp.exp(logit_BHLK - top_BHL1)  # float32: bfloat16 cannot sum a long row to one
    out_BHLD = jnp.einsum(
        "BHLK,BHKD->BHLD", weight_BHLK.astype(v_BHKD.dtype), v_BHKD, preferred_element_type=jnp.float32
    )
    out_BHLD = out_BHLD / weight_BHLK.sum(-1, keepdims=True)
    return jnp.swapaxes(out_BHLD, 1, 2).astype(q_BLHD.dtype)


def padding_mask(valid_BK: Array) -> Array:
    """(B, 1, 1, K) mask under which every query sees exactly the valid keys."""
    return valid_BK[:, None, None, :]


def causal_mask(length: int) -> Array:
    """(L, L) mask under which position i sees positions 0..i."""
    return jnp.tril(jnp.ones((length, length), bool))


def _mask_of_rank_four(mask: Array) -> Array:
    if mask.dtype != jnp.bool_:
        raise ValueError(f"attention mask: expected bool, True where a query may look, got {mask.dtype}")
    if mask.ndim == 2:
        return mask[None, None]
    if mask.ndim == 3:
        return mask[:, None]
    if mask.ndim == 4:
        return mask
    raise ValueError(f"attention mask: expected rank 2 (L, K), 3 (B, L, K) or 4 (B, H, L, K), got shape {mask.shape}")


def _check(q_BLHD: Array, k_BKHD: Array, v_BKHD: Array, kernel: str) -> None:
    if kernel not in KERNELS:
        raise ValueError(f"attention kernel: expected one of {KERNELS}, got {kernel!r}")
    shapes = q_BLHD.shape, k_BKHD.shape, v_BKHD.shape
    if any(len(shape) != 4 for shape in shapes) or k_BKHD.shape != v_BKHD.shape:
        raise ValueError(f"attention: expected q (B, L, H, D) and equal k, v (B, K, H, D), got {shapes}")
    (batch, _, heads, width), (*key_batch, _, key_heads, key_width) = shapes[0], shapes[1]
    if (batch, heads, width) != (*key_batch, key_heads, key_width):
        raise ValueError(f"attention: batch, heads and head width of q and k differ: {shapes[0]} and {shapes[1]}")
