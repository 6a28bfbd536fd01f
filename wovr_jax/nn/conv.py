"""Convolutions, channels last: a causal one over (frames, rows, columns) and a planar one.

The causal convolution has two implementations with the same numbers:

* ``native``: one 3-D ``lax`` convolution, what accelerators are good at;
* ``fold``: the time taps become input channels of one 2-D convolution over all B * F
  frames. XLA on a CPU runs this two to six times as fast, forward and backward, since only
  its 2-D convolution is tuned.

``auto`` takes ``fold`` on a CPU and ``native`` elsewhere, when the function is traced.
"""

from __future__ import annotations

from typing import Literal

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from wovr_jax.types import Array

Implementation = Literal["auto", "native", "fold"]

_INIT = nnx.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")  # torch's default for convolutions


def causal_conv3d(
    x_BFHWC: Array,
    kernel_THWIO: Array,
    bias_O: Array | None = None,
    *,
    stride: int = 1,
    past: int | None = None,
    implementation: str = "auto",
) -> Array:
    """Convolution that sees the present and past frames only.

    Args:
      x_BFHWC: input.
      kernel_THWIO: odd height and width; the last time tap meets the present frame.
      bias_O: added to every position.
      stride: step between output frames.
      past: zero frames set before the first; the default, T - 1, keeps the frame count at
        stride 1. With 0 the first output frame is the first that has its whole past.
      implementation: see the module's docstring.

    Returns:
      (B, (F + past - T) // stride + 1, H, W, O); zero padding in space keeps H and W.

    Raises:
      AssertionError: for channels that do not match.
    """
    taps, height, width, channels, _ = kernel_THWIO.shape
    chex.assert_axis_dimension(x_BFHWC, -1, channels, custom_message="causal_conv3d: channels of the kernel")
    past = taps - 1 if past is None else past
    native = implementation == "native" or (implementation == "auto" and jax.default_backend() != "cpu")
    if (taps, height, width) == (1, 1, 1):  # one matrix product on the channels, on any backend
        y = x_BFHWC[:, ::stride] @ kernel_THWIO[0, 0, 0]
    elif native:
        y = lax.conv_general_dilated(
            x_BFHWC,
            kernel_THWIO,
            window_strides=(stride, 1, 1),
            # All padding of time stands before the first frame: this alone makes the convolution causal.
            padding=((past, 0), _same(height), _same(width)),
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        )
    else:
        y = _fold(x_BFHWC, kernel_THWIO, stride, past)
    return y if bias_O is None else y + bias_O


def _fold(x_BFHWC: Array, kernel_THWIO: Array, stride: int, past: int) -> Array:
    """Computes the convolution with its time taps as input channels of a planar one."""
    taps, height, width, channels, features = kernel_THWIO.shape
    frames = (x_BFHWC.shape[1] + past - taps) // stride + 1
    # Tap t of output frame i meets input frame i * stride + t - past. (B, F, H, W, C) -> (B, F', H, W, T * C)
    folded = jnp.concatenate([_shift(x_BFHWC, t - past, stride, frames) for t in range(taps)], axis=-1)
    # (T, H, W, I, O) -> (H, W, T * I, O): the taps in the order in which the frames were joined.
    kernel_HWIO = kernel_THWIO.transpose(1, 2, 0, 3, 4).reshape(height, width, taps * channels, features)
    return conv2d(folded, kernel_HWIO, padding=(_same(height), _same(width)))


def _shift(x_BFHWC: Array, start: int, stride: int, frames: int) -> Array:
    """Takes frames start, start + stride, ..., ``frames`` of them; those before the first are zero."""
    missing = min(frames, max(0, -(start // stride)))  # how many of them lie before the first frame
    first = start + missing * stride
    kept = (
        x_BFHWC[:, first : first + (frames - missing - 1) * stride + 1 : stride] if frames > missing else x_BFHWC[:, :0]
    )
    if not missing:
        return kept
    # Zeros are joined here, not padded once for all taps: that saves a pass over the input.
    B, _, H, W, C = x_BFHWC.shape
    return jnp.concatenate([jnp.zeros((B, missing, H, W, C), x_BFHWC.dtype), kept], axis=1)


def conv2d(
    x_HWC: Array,
    kernel_HWIO: Array,
    *,
    stride: int = 1,
    padding: tuple[tuple[int, int], tuple[int, int]] | str = "SAME",
) -> Array:
    """Planar convolution of (..., H, W, C) with any number of leading axes.

    ``padding`` is (top, bottom), (left, right), or a name of ``lax``. A 1 x 1 kernel is a matmul.
    """
    height, width = kernel_HWIO.shape[:2]
    # A matrix product keeps the leading axes, so that a layout over devices survives; the reshape below may not.
    if (height, width) == (1, 1) and padding in ("SAME", "VALID", ((0, 0), (0, 0))):
        return x_HWC[..., ::stride, ::stride, :] @ kernel_HWIO[0, 0]
    lead = x_HWC.shape[:-3]
    y = lax.conv_general_dilated(
        x_HWC.reshape(-1, *x_HWC.shape[-3:]),  # (..., H, W, C) -> (N, H, W, C)
        kernel_HWIO,
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y.reshape(*lead, *y.shape[1:])


def upsample_conv2d(x_HWC: Array, kernel_HWIO: Array) -> Array:
    """Doubles height and width by repeating pixels, then convolves with a 3 x 3 kernel.

    Computed before the repetition: of the nine taps of an output pixel those that meet the
    same input pixel are summed first, which leaves four. (..., H, W, I) to (..., 2H, 2W, O).
    """
    *lead, H, W, channels = x_HWC.shape
    features = kernel_HWIO.shape[-1]
    # Row taps -1, 0, 1 of an even output row meet input rows i-1, i, i; of an odd row i, i, i+1.
    # So output phase p (even, odd) of an axis has two merged taps, each a sum over the three of the kernel: (P, T, K).
    merge_PTK = jnp.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], jnp.float32)
    # In float32, so that sums of bfloat16 taps are rounded once. Row taps a, columns b; row phase p, columns q.
    phases = jnp.einsum("pak,qbl,klio->abipqo", merge_PTK, merge_PTK, kernel_HWIO.astype(jnp.float32))
    # (2, 2, I, 2, 2, O) -> (2, 2, I, 4 * O): the four phases are output channels of one 2 x 2 convolution.
    phases = phases.reshape(2, 2, channels, 4 * features).astype(kernel_HWIO.dtype)
    y = conv2d(x_HWC, phases, padding=((1, 1), (1, 1))).reshape(-1, H + 1, W + 1, 2, 2, features)
    # Position i of y began one pixel early: even rows read it at i, odd rows at i + 1; then columns likewise.
    # (N, H + 1, W + 1, 2, 2, O) -> (N, 2H, W + 1, 2, O) -> (N, 2H, 2W, O)
    rows = jnp.stack([y[:, p : p + H, :, p] for p in (0, 1)], axis=2).reshape(-1, 2 * H, W + 1, 2, features)
    out = jnp.stack([rows[:, :, q : q + W, q] for q in (0, 1)], axis=3)
    return out.reshape(*lead, 2 * H, 2 * W, features)


def _same(size: int) -> tuple[int, int]:
    """Returns the padding of an odd kernel that keeps the size."""
    return (size // 2, size // 2)


class CausalConv3D(nnx.Module):
    """Learned ``causal_conv3d``. Parameters: kernel (T, H, W, I, O) and bias (O,), float32."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: tuple[int, int, int] = (3, 3, 3),
        *,
        stride: int = 1,
        past: int | None = None,
        implementation: str = "auto",
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(_INIT(rngs.params(), (*kernel, inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32))
        self.stride, self.past, self.implementation, self.dtype = stride, past, implementation, dtype

    def __call__(self, x_BFHWC: Array) -> Array:
        """Convolves (B, F, H, W, I) to (B, F', H, W, O), in the compute dtype."""
        return causal_conv3d(
            x_BFHWC.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            self.bias[...].astype(self.dtype),
            stride=self.stride,
            past=self.past,
            implementation=self.implementation,
        )


class Conv2D(nnx.Module):
    """Learned ``conv2d``. Parameters: kernel (H, W, I, O) and bias (O,), float32."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        padding: tuple[tuple[int, int], tuple[int, int]] | str | None = None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(_INIT(rngs.params(), (kernel, kernel, inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32))
        # The symmetric padding of torch, not "SAME": they differ at stride 2.
        self.padding = (_same(kernel), _same(kernel)) if padding is None else padding
        self.stride, self.dtype = stride, dtype

    def __call__(self, x_HWC: Array) -> Array:
        """Convolves (..., H, W, I) to (..., H', W', O), in the compute dtype."""
        y = conv2d(
            x_HWC.astype(self.dtype), self.kernel[...].astype(self.dtype), stride=self.stride, padding=self.padding
        )
        return y + self.bias[...].astype(self.dtype)

    def upsample(self, x_HWC: Array) -> Array:
        """Applies the layer after a doubling by repeated pixels (3 x 3 at stride 1), see ``upsample_conv2d``."""
        y = upsample_conv2d(x_HWC.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return y + self.bias[...].astype(self.dtype)
