"""LayerNorm and RMSNorm over the last axis, with statistics in float32.

Both return the dtype they were given, so a bfloat16 stream stays bfloat16 while the sums
that would lose digits in it do not. Input and learned vectors are never broadcast by
rank: every expansion is written out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from wovr_jax.types import Array


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
        _check_width("LayerNorm", self.dim, x)
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
        _check_width("RMSNorm", self.dim, x)
        full = x.astype(jnp.float32)
        # Scaled in float32 and rounded once. Llama upstream rounds before it scales: the same but for the last bit.
        full = full * jax.lax.rsqrt(jnp.square(full).mean(-1, keepdims=True) + self.eps)
        return (full * _last(self.scale[...], x.ndim)).astype(x.dtype)


def _last(vector_D: Array, rank: int) -> Array:
    """Returns the vector as a float32 array of ``rank`` whose last axis it is."""
    # (D,) -> (1, ..., 1, D). Written out, since a broadcast by rank hides a vector that lies along the wrong axis.
    return vector_D.astype(jnp.float32).reshape((1,) * (rank - 1) + (-1,))


def _check_width(name: str, dim: int, x: Array) -> None:
    if x.shape[-1] != dim:
        raise ValueError(f"{name}: expected a last axis of {dim}, got an array of shape {x.shape}")
