"""Wan2.2's causal video VAE, over a whole window at once.

1 + 4n frames become 1 + n latent frames. Upstream streams a video through the network in
chunks, and every causal convolution keeps the last two frames of a chunk in a cache for the
next; over a fixed window that equals a plain causal network with three rules:

* convolutions over time see zeros before the first frame;
* a temporal halving passes the first frame on unconvolved, a doubling likewise and does
  not let the later frames see it;
* the parameter-free shortcuts pad one zero frame on the left, or drop the first copy.

So a prefix of the frames gives a prefix of the latents, and back.

Source: Wan-Video/Wan2.2:wan/modules/vae2_2.py; module names follow diffusers'
AutoencoderKLWan. Letters: F H W C frames and pixels, f h w c latents, D channels inside.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from wovr_jax.core.config import Count, DType, Faults, Finite, Positive, checked
from wovr_jax.nn.conv import CausalConv3D, Conv2D, Implementation
from wovr_jax.nn.transformer import attention
from wovr_jax.types import Array

# Mean and deviation of each of the 48 latent channels, as published with the weights: the transformer sees latents of
# about mean 0 and deviation 1.
# fmt: off
_WAN_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
_WAN_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on


@checked
@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Sizes of the VAE.

    Attributes:
      channels: colour channels of a frame.
      patch: pixels per side that space-to-depth folds into channels first.
      encoder_dim, decoder_dim: channels at the finest level.
      z_dim: channels of a latent.
      dim_mult: channels of each level, in multiples of the finest; every level but the last
        ends in a spatial halving.
      res_blocks: residual blocks of an encoder level; a decoder level has one more.
      temporal_down: for each halving, whether it halves time too.
      latent_mean, latent_std: statistics that normalise each latent channel; empty for 0 and 1.
      conv: implementation of the causal convolutions (``nn.conv.IMPLEMENTATIONS``).
      dtype: of convolutions and residuals; norm and softmax statistics are float32 always.
    """

    channels: Count = 3
    patch: Count = 2
    encoder_dim: Count = 160
    decoder_dim: Count = 256
    z_dim: Count = 48
    dim_mult: tuple[Count, ...] = (1, 2, 4, 4)
    res_blocks: Count = 2
    temporal_down: tuple[bool, ...] = (False, True, True)
    latent_mean: tuple[Finite, ...] = ()
    latent_std: tuple[Positive, ...] = ()
    conv: Implementation = "auto"
    dtype: DType = "float32"

    def faults(self) -> Faults:
        """Yields lists of other lengths than the levels and channels have, and levels that no shortcut joins."""
        if len(self.temporal_down) != len(self.dim_mult) - 1:
            halvings = len(self.dim_mult) - 1
            yield "temporal_down", f"expected an entry for each of the {halvings} halvings, got {self.temporal_down}"
        for name in ("latent_mean", "latent_std"):
            if len(getattr(self, name)) not in (0, self.z_dim):
                yield name, f"expected z_dim={self.z_dim} numbers or none, got {len(getattr(self, name))}"
        for (space, time), a, b in zip([*self.factors, (1, 1)], (1, *self.dim_mult), self.dim_mult):
            # The shortcut turns a * time * space^2 channels into b by means or copies; above, b into a.
            stacked = a * time * space**2
            if stacked % b and b % stacked:
                yield "dim_mult", f"no shortcut from multiple {a} to {b} in {self.dim_mult}: one must divide the other"

    @classmethod
    def wan2_2(cls) -> VAEConfig:
        """The VAE of Wan2.2-TI2V-5B: 48 channels, 16x in space, 4x in time, 705 M parameters."""
        return cls(latent_mean=_WAN_MEAN, latent_std=_WAN_STD)

    @classmethod
    def tabletop(cls) -> VAEConfig:
        """For 32 x 32 frames of the embedded table: 4 x 4 latents, 8x in space, 4x in time."""
        return cls(
            encoder_dim=12, decoder_dim=12, z_dim=16, dim_mult=(1, 2, 2), res_blocks=1, temporal_down=(True, True)
        )

    @classmethod
    def libero_small(cls) -> VAEConfig:
        """For 64 x 64 frames of LIBERO: 8 x 8 latents, 8x in space, 4x in time."""
        return dataclasses.replace(cls.tabletop(), decoder_dim=16)

    @classmethod
    def fake(cls) -> VAEConfig:
        """For tests: the smallest network with every kind of block."""
        return cls(encoder_dim=4, decoder_dim=4, z_dim=4, dim_mult=(1, 2, 2), res_blocks=1, temporal_down=(True, True))

    @property
    def factors(self) -> list[tuple[int, int]]:
        """(space, time) of every halving, finest first."""
        return [(2, 2 if halves else 1) for halves in self.temporal_down]

    @property
    def space(self) -> int:
        """Pixels per latent position, on a side."""
        return self.patch * 2 ** len(self.temporal_down)

    @property
    def time(self) -> int:
        """Frames per latent frame, after the first."""
        return 2 ** sum(self.temporal_down)

    def latent_frames(self, frames: int) -> int:
        """Returns the latent frames of a window. Raises ValueError unless it is 1 + n * ``time`` frames long."""
        if frames < 1 or (frames - 1) % self.time:
            raise ValueError(f"VAE: a window has 1 + n * {self.time} frames, got {frames}")
        return 1 + (frames - 1) // self.time


class ChannelNorm(nnx.Module):
    """Scales every channel vector to length sqrt(D), then by a learned gamma; no epsilon inside the mean."""

    def __init__(self, dim: int):
        self.gamma = nnx.Param(jnp.ones(dim, jnp.float32))

    def __call__(self, x: Array) -> Array:
        square = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)  # float32: sums over many channels
        # torch's F.normalize: length bounded below by 1e-12. So of a vector of zeros zeros are left, not NaN.
        scale = jax.lax.rsqrt(jnp.maximum(square, 1e-24)) * math.sqrt(x.shape[-1])
        return (x * scale * self.gamma[...]).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """Norm, SiLU, convolution, twice; added to the input, through a 1 x 1 x 1 convolution when widths differ."""

    def __init__(self, inputs: int, outputs: int, cfg: VAEConfig, rngs: nnx.Rngs):
        self.norm1 = ChannelNorm(inputs)
        self.conv1 = _conv(inputs, outputs, cfg, rngs)
        self.norm2 = ChannelNorm(outputs)
        self.conv2 = _conv(outputs, outputs, cfg, rngs)
        self.shortcut = None if inputs == outputs else _conv(inputs, outputs, cfg, rngs, kernel=(1, 1, 1))

    @jax.named_scope("residual_block")
    def __call__(self, x_BFHWD: Array) -> Array:
        y = self.conv1(jax.nn.silu(self.norm1(x_BFHWD)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x_BFHWD if self.shortcut is None else self.shortcut(x_BFHWD))


class FrameAttention(nnx.Module):
    """One head of attention among the positions of each frame; frames do not see one another."""

    def __init__(self, dim: int, cfg: VAEConfig, rngs: nnx.Rngs):
        self.norm = ChannelNorm(dim)
        self.qkv = Conv2D(dim, 3 * dim, 1, dtype=cfg.dtype, rngs=rngs)
        self.proj = Conv2D(dim, dim, 1, dtype=cfg.dtype, rngs=rngs)
        self.proj.kernel[...] = jnp.zeros_like(self.proj.kernel[...])  # a fresh block is the identity

    @jax.named_scope("frame_attention")
    def __call__(self, x_BFHWD: Array) -> Array:
        B, F, H, W, D = x_BFHWD.shape
        # (B, F, H, W, 3 D) -> (B * F, H * W, 1, 3 D): frames on the batch axis, and one head as wide as the channels.
        q, k, v = jnp.split(self.qkv(self.norm(x_BFHWD)).reshape(B * F, H * W, 1, 3 * D), 3, axis=-1)
        return x_BFHWD + self.proj(attention(q, k, v).reshape(B, F, H, W, D))


class Middle(nnx.Module):
    """Residual block, attention, residual block, at the coarsest level."""

    def __init__(self, dim: int, cfg: VAEConfig, rngs: nnx.Rngs):
        self.res0 = ResidualBlock(dim, dim, cfg, rngs)
        self.attention = FrameAttention(dim, cfg, rngs)
        self.res1 = ResidualBlock(dim, dim, cfg, rngs)

    @jax.named_scope("middle")
    def __call__(self, x_BFHWD: Array) -> Array:
        return self.res1(self.attention(self.res0(x_BFHWD)))


class Down(nnx.Module):
    """An encoder level: residual blocks, and below the last level a halving of space and perhaps time."""

    def __init__(self, inputs: int, outputs: int, cfg: VAEConfig, rngs: nnx.Rngs, space: int, time: int):
        self.outputs, self.space, self.time = outputs, space, time
        widths = [inputs] + [outputs] * cfg.res_blocks
        self.res = nnx.List([ResidualBlock(a, b, cfg, rngs) for a, b in zip(widths, widths[1:])])
        if space == 2:
            edge = ((0, 1), (0, 1))  # upstream pads below and to the right only
            self.resample = Conv2D(outputs, outputs, stride=2, padding=edge, dtype=cfg.dtype, rngs=rngs)
        if time == 2:
            # No zeros before the first frame: output i sees frames 2i, 2i + 1, 2i + 2, so the first has a whole past.
            self.time_conv = _conv(outputs, outputs, cfg, rngs, kernel=(3, 1, 1), stride=2, past=0)

    @jax.named_scope("down")
    def __call__(self, x_BFHWD: Array) -> Array:
        y = x_BFHWD
        for block in self.res:
            y = block(y)
        if self.space == 2:
            y = self.resample(y)
        if self.time == 2 and y.shape[1] > 1:
            # 1 + 2n frames -> 1 + n. The first stands alone: upstream's cache is empty when it comes, and it is only
            # put into the cache, so that the next two frames see it.
            y = jnp.concatenate([y[:, :1], self.time_conv(y)], axis=1)
        return y + average_down(x_BFHWD, self.outputs, self.time, self.space)


class Up(nnx.Module):
    """A decoder level: residual blocks, and above the last level a doubling of space and perhaps time."""

    def __init__(self, inputs: int, outputs: int, cfg: VAEConfig, rngs: nnx.Rngs, space: int, time: int):
        self.outputs, self.space, self.time = outputs, space, time
        widths = [inputs] + [outputs] * (cfg.res_blocks + 1)
        self.res = nnx.List([ResidualBlock(a, b, cfg, rngs) for a, b in zip(widths, widths[1:])])
        if space == 2:
            self.resample = Conv2D(outputs, outputs, dtype=cfg.dtype, rngs=rngs)
        if time == 2:
            self.time_conv = _conv(outputs, 2 * outputs, cfg, rngs, kernel=(3, 1, 1))

    @jax.named_scope("up")
    def __call__(self, x_BFHWD: Array) -> Array:
        y = x_BFHWD
        for block in self.res:
            y = block(y)
        if self.space == 1:
            return y
        if self.time == 2 and y.shape[1] > 1:
            # 1 + n frames -> 1 + 2n. The first is passed on, and the others see zeros in its place: upstream marks the
            # cache with "Rep" instead of keeping the first frame in it.
            first, later = y[:, :1], y[:, 1:]
            # The halves of the time convolution's channels are the even and the odd frames.
            even, odd = jnp.split(self.time_conv(later), 2, axis=-1)
            B, n, *rest = later.shape
            later = jnp.stack([even, odd], axis=2).reshape(B, 2 * n, *rest)  # (B, n, 2, H, W, D) -> (B, 2n, H, W, D)
            y = jnp.concatenate([first, later], axis=1)
        y = self.resample.upsample(y)
        return y + duplicate_up(x_BFHWD, self.outputs, self.time, self.space)


class Encoder(nnx.Module):
    """Patchified frames to 2 * z_dim channels."""

    def __init__(self, cfg: VAEConfig, rngs: nnx.Rngs):
        widths = [cfg.encoder_dim * m for m in (1, *cfg.dim_mult)]
        self.conv_in = _conv(cfg.channels * cfg.patch**2, widths[0], cfg, rngs)
        factors = [*cfg.factors, (1, 1)]
        self.down = nnx.List([Down(a, b, cfg, rngs, *by) for a, b, by in zip(widths, widths[1:], factors)])
        self.mid = Middle(widths[-1], cfg, rngs)
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = _conv(widths[-1], 2 * cfg.z_dim, cfg, rngs)

    @jax.named_scope("encoder")
    def __call__(self, x_BFHWC: Array) -> Array:
        x = self.conv_in(x_BFHWC)
        for level in self.down:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid(x))))


class Decoder(nnx.Module):
    """z_dim channels to patchified frames."""

    def __init__(self, cfg: VAEConfig, rngs: nnx.Rngs):
        widths = [cfg.decoder_dim * m for m in (cfg.dim_mult[-1], *reversed(cfg.dim_mult))]
        self.conv_in = _conv(cfg.z_dim, widths[0], cfg, rngs)
        self.mid = Middle(widths[0], cfg, rngs)
        factors = [*reversed(cfg.factors), (1, 1)]
        self.up = nnx.List([Up(a, b, cfg, rngs, *by) for a, b, by in zip(widths, widths[1:], factors)])
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = _conv(widths[-1], cfg.channels * cfg.patch**2, cfg, rngs)

    @jax.named_scope("decoder")
    def __call__(self, z_Bfhwc: Array) -> Array:
        x = self.mid(self.conv_in(z_Bfhwc))
        for level in self.up:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class VAE(nnx.Module):
    """Frames in [-1, 1] to normalised latents and back."""

    def __init__(self, cfg: VAEConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.encoder = Encoder(cfg, rngs)
        self.quant = _conv(2 * cfg.z_dim, 2 * cfg.z_dim, cfg, rngs, kernel=(1, 1, 1))
        self.post_quant = _conv(cfg.z_dim, cfg.z_dim, cfg, rngs, kernel=(1, 1, 1))
        self.decoder = Decoder(cfg, rngs)

    def encode(self, frame_BFHWC: Array) -> Array:
        """Encodes (B, 1 + 4n, H, W, 3) to the normalised posterior mean (B, 1 + n, h, w, c), float32."""
        # The mean and no draw from the posterior, in training too: a window has one encoding, which can be kept.
        mean, std = self._statistics()
        return (self.moments(frame_BFHWC)[0] - mean) / std

    def decode(self, latent_Bfhwc: Array) -> Array:
        """Decodes normalised latents (B, 1 + n, h, w, c) to frames (B, 1 + 4n, H, W, 3), float32, not clamped."""
        mean, std = self._statistics()
        return self.decode_raw(latent_Bfhwc * std + mean)

    def moments(self, frame_BFHWC: Array) -> tuple[Array, Array]:
        """Returns mean and log-variance of the posterior, float32, as the network gives them (not normalised).

        Raises:
          ValueError: if the frame count is not 1 + 4n, or the height or width does not divide.
        """
        _, F, H, W, _ = frame_BFHWC.shape
        self.cfg.latent_frames(F)
        if H % self.cfg.space or W % self.cfg.space:
            raise ValueError(f"VAE: height and width must be multiples of {self.cfg.space}, got {H} x {W}")
        x = self.quant(self.encoder(patchify(frame_BFHWC, self.cfg.patch)))
        mean, logvar = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return mean, logvar

    def decode_raw(self, z_Bfhwc: Array) -> Array:
        """Decodes latents that are not normalised: what the training of the VAE needs."""
        return unpatchify(self.decoder(self.post_quant(z_Bfhwc)), self.cfg.patch).astype(jnp.float32)

    def _statistics(self) -> tuple[Array, Array]:
        zeros, ones = (0.0,) * self.cfg.z_dim, (1.0,) * self.cfg.z_dim
        return jnp.array(self.cfg.latent_mean or zeros), jnp.array(self.cfg.latent_std or ones)


def average_down(x_BFHWD: Array, features: int, time: int, space: int) -> Array:
    """Computes the encoder's shortcut: space(-time)-to-depth, then the mean over groups of channels.

    An odd number of frames is padded with a zero frame on the left when time halves. Where
    the channels are fewer than ``features`` each is repeated (no released size needs that).
    """
    x = jnp.pad(x_BFHWD, ((0, 0), (-x_BFHWD.shape[1] % time, 0), (0, 0), (0, 0), (0, 0)))
    B, F, H, W, D = x.shape
    # (B, F, H, W, D) -> (B, F/t, H/s, W/s, D * t * s * s): channels (D, time, row, column), the column fastest.
    x = x.reshape(B, F // time, time, H // space, space, W // space, space, D)
    x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6).reshape(B, F // time, H // space, W // space, -1)
    if x.shape[-1] < features:
        return x.repeat(features // x.shape[-1], axis=-1)
    return x.reshape(*x.shape[:-1], features, -1).mean(-1)


def duplicate_up(x_BFHWD: Array, features: int, time: int, space: int) -> Array:
    """Computes the decoder's shortcut: repeated channels, then depth-to-space(-time).

    Of the copies of a video's first frame all but the last are dropped, as its doubling leaves it single.
    """
    B, F, H, W, D = x_BFHWD.shape
    # (B, F, H, W, features * t * s * s) -> (B, F * t, H * s, W * s, features)
    x = x_BFHWD.repeat(features * time * space**2 // D, axis=-1)
    x = x.reshape(B, F, H, W, features, time, space, space).transpose(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(B, F * time, H * space, W * space, features)[:, time - 1 :]


def patchify(frame_BFHWC: Array, patch: int) -> Array:
    """Folds space into channels; a channel is (colour, column, row), the row fastest."""
    B, F, H, W, C = frame_BFHWC.shape
    x = frame_BFHWC.reshape(B, F, H // patch, patch, W // patch, patch, C)
    return x.transpose(0, 1, 2, 4, 6, 5, 3).reshape(B, F, H // patch, W // patch, C * patch**2)


def unpatchify(x_BFHWD: Array, patch: int) -> Array:
    """Unfolds what ``patchify`` folded."""
    B, F, H, W, D = x_BFHWD.shape
    x = x_BFHWD.reshape(B, F, H, W, D // patch**2, patch, patch)
    return x.transpose(0, 1, 2, 6, 3, 5, 4).reshape(B, F, H * patch, W * patch, D // patch**2)


def _conv(inputs: int, outputs: int, cfg: VAEConfig, rngs: nnx.Rngs, kernel=(3, 3, 3), **kwargs) -> CausalConv3D:
    return CausalConv3D(inputs, outputs, kernel, implementation=cfg.conv, dtype=cfg.dtype, rngs=rngs, **kwargs)
