"""The video VAE a piece at a time, for videos whose activations do not fit into memory at once.

The weights and the numbers are those of ``vae.VAE`` over the whole video. What a later piece
needs to know of the earlier ones is the last frames that every causal convolution saw: two,
or one for the convolution that halves time. They are the state, a tuple of arrays in the order of the
network, of a size that does not depend on the length of the video or of its pieces::

    latent, past = encode_piece(cfg, params, frame_BFHWC[:, :5])
    latent, past = encode_piece(cfg, params, frame_BFHWC[:, 5:13], past)

The first piece is 1 + n * time frames (1 + n latents), every other n * time frames (n latents).
Upstream (Wan-Video/Wan2.2:wan/modules/vae2_2.py) streams with n = 0, then 1, always.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from wovr_jax.nn.conv import CausalConv3D, causal_conv3d
from wovr_jax.nn.functional import Params, Pure
from wovr_jax.types import Array
from wovr_jax.world.vae import (
    VAE,
    Decoder,
    Down,
    Encoder,
    Middle,
    ResidualBlock,
    Up,
    VAEConfig,
    average_down,
    duplicate_up,
    patchify,
    unpatchify,
)

Past = tuple[Array, ...]


def encode_piece(cfg: VAEConfig, params: Params, frame_BFHWC: Array, past: Past | None = None) -> tuple[Array, Past]:
    """The normalised latents of the next frames, float32, and the state behind them.

    Args:
      cfg: the VAE.
      params: its weights.
      frame_BFHWC: 1 + n * ``cfg.time`` frames when ``past`` is None, else n * ``cfg.time`` of them, n >= 1.
      past: what the call on the frames before returned; None at the start of a video.

    Raises:
      ValueError: for another number of frames, or sides that do not divide.
    """
    frames, rows, columns = frame_BFHWC.shape[1:4]
    if past is None:
        cfg.latent_frames(frames)
    elif not frames or frames % cfg.time:
        raise ValueError(f"VAE: a piece that is not the first has n * {cfg.time} frames, n >= 1, got {frames}")
    if rows % cfg.space or columns % cfg.space:
        raise ValueError(f"VAE: height and width must be multiples of {cfg.space}, got {rows} x {columns}")
    vae, walk = _network(cfg, params), _Walk(past)
    moments = vae.quant(walk.encoder(vae.encoder, patchify(frame_BFHWC, cfg.patch)))
    mean_Bfhwc = jnp.split(moments.astype(jnp.float32), 2, axis=-1)[0]
    shift, scale = vae._statistics()
    return (mean_Bfhwc - shift) / scale, tuple(walk.seen)


def decode_piece(cfg: VAEConfig, params: Params, latent_Bfhwc: Array, past: Past | None = None) -> tuple[Array, Past]:
    """The frames of the next normalised latents, float32, not clamped, and the state behind them.

    Args:
      cfg: the VAE.
      params: its weights.
      latent_Bfhwc: f >= 1 latents: 1 + (f - 1) * ``cfg.time`` frames when ``past`` is None, else f * ``cfg.time``.
      past: what the call on the latents before returned; None at the start of a video.

    Raises:
      ValueError: for no latents, or another number of channels.
    """
    if not latent_Bfhwc.shape[1] or latent_Bfhwc.shape[-1] != cfg.z_dim:
        raise ValueError(f"VAE: expected at least one latent of {cfg.z_dim} channels, got {latent_Bfhwc.shape}")
    vae, walk = _network(cfg, params), _Walk(past)
    shift, scale = vae._statistics()
    x_BFHWD = walk.decoder(vae.decoder, vae.post_quant(latent_Bfhwc * scale + shift))
    return unpatchify(x_BFHWD, cfg.patch).astype(jnp.float32), tuple(walk.seen)


def encode(cfg: VAEConfig, params: Params, frame_BFHWC: Array, *, latents: int = 1) -> Array:
    """``VAE.encode`` of any 1 + n * time frames, ``latents`` at a time: one program whatever the length.

    Raises:
      ValueError: as ``encode_piece``, or when ``latents`` is not positive.
    """
    cfg.latent_frames(frame_BFHWC.shape[1])
    return _in_pieces(functools.partial(encode_piece, cfg, params), frame_BFHWC, latents * cfg.time)


def decode(cfg: VAEConfig, params: Params, latent_Bfhwc: Array, *, latents: int = 1) -> Array:
    """``VAE.decode`` of any number of latents, ``latents`` at a time: one program whatever the length.

    Raises:
      ValueError: as ``decode_piece``, or when ``latents`` is not positive.
    """
    return _in_pieces(functools.partial(decode_piece, cfg, params), latent_Bfhwc, latents)


def _in_pieces(piece: Callable[..., tuple[Array, Past]], x_BF: Array, size: int) -> Array:
    """The first frame alone, a scan over pieces of ``size`` frames, and what is left."""
    if size < 1:
        raise ValueError(f"VAE: a piece has at least one latent, got {size}")
    first, past = piece(x_BF[:, :1])
    parts, count = [first], (x_BF.shape[1] - 1) // size
    if count:
        batch, *rest = x_BF.shape[0], *x_BF.shape[2:]
        pieces_NBF = x_BF[:, 1 : 1 + count * size].reshape(batch, count, size, *rest).swapaxes(0, 1)

        def one(past: Past, piece_BF: Array) -> tuple[Past, Array]:
            out_BF, past = piece(piece_BF, past)
            return past, out_BF

        past, out_NBF = jax.lax.scan(one, past, pieces_NBF)
        parts.append(out_NBF.swapaxes(0, 1).reshape(batch, -1, *out_NBF.shape[3:]))
    if 1 + count * size < x_BF.shape[1]:
        parts.append(piece(x_BF[:, 1 + count * size :], past)[0])
    return jnp.concatenate(parts, axis=1)


@functools.cache
def _pure(cfg: VAEConfig) -> Pure:
    return Pure(lambda rngs: VAE(cfg, rngs=rngs))


def _network(cfg: VAEConfig, params: Params) -> VAE:
    vae = _pure(cfg).module(params)
    assert isinstance(vae, VAE)
    return vae


class _Walk:
    """One piece on its way through the network: hands every causal convolution the frames it saw last.

    The methods follow ``__call__`` of the modules of ``vae``; only what depends on time differs.
    """

    def __init__(self, past: Past | None):
        self.first = past is None
        self.seen: list[Array] = []
        self._past = iter(past or ())

    def conv(self, layer: CausalConv3D, x_BFHWD: Array) -> Array:
        """The convolution over the frames before and these; no frames, when too few have come by yet."""
        taps, *_, features = layer.kernel.shape
        if taps == 1:
            return layer(x_BFHWD)
        x = x_BFHWD.astype(layer.dtype)
        zeros = taps - 1 if layer.past is None else layer.past
        before = jnp.zeros((len(x), zeros, *x.shape[2:]), x.dtype) if self.first else next(self._past)
        x = jnp.concatenate([before, x], axis=1)
        self.seen.append(x[:, x.shape[1] - (taps - layer.stride) :])
        if x.shape[1] < taps:
            return jnp.zeros((len(x), 0, *x.shape[2:-1], features), x.dtype)
        kernel, bias = layer.kernel[...].astype(layer.dtype), layer.bias[...].astype(layer.dtype)
        return causal_conv3d(x, kernel, bias, stride=layer.stride, past=0, implementation=layer.implementation)

    def residual(self, block: ResidualBlock, x_BFHWD: Array) -> Array:
        y = self.conv(block.conv1, jax.nn.silu(block.norm1(x_BFHWD)))
        y = self.conv(block.conv2, jax.nn.silu(block.norm2(y)))
        return y + (x_BFHWD if block.shortcut is None else block.shortcut(x_BFHWD))

    def middle(self, mid: Middle, x_BFHWD: Array) -> Array:
        return self.residual(mid.res1, mid.attention(self.residual(mid.res0, x_BFHWD)))

    def down(self, level: Down, x_BFHWD: Array) -> Array:
        y = x_BFHWD
        for block in level.res:
            y = self.residual(block, y)
        if level.space == 2:
            y = level.resample(y)
        if level.time == 2:
            halved = self.conv(level.time_conv, y)
            # The first frame of a video passes unconvolved.
            y = jnp.concatenate([y[:, :1], halved], axis=1) if self.first else halved
        return y + average_down(x_BFHWD, level.outputs, level.time, level.space)

    def up(self, level: Up, x_BFHWD: Array) -> Array:
        y = x_BFHWD
        for block in level.res:
            y = self.residual(block, y)
        if level.space == 1:
            return y
        if level.time == 2:
            # Nor do the frames after it see it: for them it is zero.
            doubled = self._double(level, y[:, 1:] if self.first else y)
            y = jnp.concatenate([y[:, :1], doubled], axis=1) if self.first else doubled
        shortcut = duplicate_up(x_BFHWD, level.outputs, level.time, level.space, first=self.first)
        return level.resample.upsample(y) + shortcut

    def _double(self, level: Up, x_BFHWD: Array) -> Array:
        even, odd = jnp.split(self.conv(level.time_conv, x_BFHWD), 2, axis=-1)
        B, F, *rest = x_BFHWD.shape
        return jnp.stack([even, odd], axis=2).reshape(B, 2 * F, *rest)

    def encoder(self, encoder: Encoder, x_BFHWC: Array) -> Array:
        x = self.conv(encoder.conv_in, x_BFHWC)
        for level in encoder.down:
            x = self.down(level, x)
        return self.conv(encoder.conv_out, jax.nn.silu(encoder.norm_out(self.middle(encoder.mid, x))))

    def decoder(self, decoder: Decoder, z_Bfhwc: Array) -> Array:
        x = self.middle(decoder.mid, self.conv(decoder.conv_in, z_Bfhwc))
        for level in decoder.up:
            x = self.up(level, x)
        return self.conv(decoder.conv_out, jax.nn.silu(decoder.norm_out(x)))
