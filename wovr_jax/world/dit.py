"""The diffusion transformer of the world model: Wan2.2-TI2V moved from text to actions.

Noisy latents, one noise level for each latent frame and the actions of the window go in,
the flow velocity comes out. Actions enter through two channels (WoVR, section 4.1):

* *cross*: every action, through an MLP, is one token of the cross-attention context. The
  tokens carry no position, so this channel alone cannot tell the order of the actions;
* *adaln*: the four actions of each latent frame, through an MLP, are added to the time
  embedding that modulates the frame's tokens in every block and in the head. Frame 0 of a
  window is a latent frame alone: its action is repeated four times.

What differs from upstream, with equal numbers: modulation is computed once for each latent
frame instead of each token (the tokens of a frame share it), and ``context`` computes
everything that depends on actions only, so that a sampler does it once for all its steps.
Source: Wan2.2 wan/modules/model.py; RLinf's DiffSynth-Studio fork, diffsynth/models/wan_video_dit.py.

Letters of this file, beside those of ``types.py``: n tokens of one latent frame,
L = f * n tokens of a window, H heads of width E.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wovr_jax.nn.attention import attention
from wovr_jax.nn.functional import scan_blocks, stack
from wovr_jax.nn.norms import LayerNorm, RMSNorm
from wovr_jax.nn.rope import rotate_pairs, wan_angles
from wovr_jax.types import ACTION_DIM, Array

CONDITIONINGS = ("dual", "cross", "adaln")

AXES = (
    ("blocks/*_attn/[qkv]/kernel", ("layers", "embed", "heads")),
    ("blocks/*_attn/[qkv]/bias", ("layers", "heads")),
    ("blocks/*_attn/o/kernel", ("layers", "heads", "embed")),
    ("blocks/*_attn/norm_?/scale", ("layers", "heads")),
    ("blocks/ffn/inner/kernel", ("layers", "embed", "mlp")),
    ("blocks/ffn/inner/bias", ("layers", "mlp")),
    ("blocks/ffn/outer/kernel", ("layers", "mlp", "embed")),
    ("*/inner/kernel", (None, "embed")),
    ("*/outer/kernel", ("embed", None)),
    ("time_projection/kernel", ("embed", None)),
    ("patch_embedding/kernel", (None, "embed")),
    ("head/kernel", ("embed", None)),
    ("blocks/*/lora_a", ("layers", "embed", None)),
    ("blocks/*/lora_b", ("layers", None, "embed")),
)
"""What the axes of the parameters mean (``sharding``). The MLPs of text, actions and time see a few tokens only."""


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Sizes and numerics of the transformer.

    Attributes:
      dim: width D.
      heads: attention heads; ``dim`` is a multiple of it.
      layers: blocks.
      ffn: hidden width of the feed-forward layers.
      channels: latent channels c, in and out.
      patch: rows and columns of latent pixels in one token.
      freq_dim: width of the sinusoidal time embedding.
      action_dim: A.
      frames_per_latent: pixel frames, hence actions, of every latent frame but the first.
      action_conditioning: "dual" for both channels; "cross" without the AdaLN channel;
        "adaln" without cross-attention layers.
      eps: of every norm.
      theta: base of the rotary frequencies.
      dtype: of matrix products and attention; norms, softmax, time and modulation stay float32.
      residual_dtype: in which the token stream is kept between layers.
      sinusoid_dtype: "bfloat16" rounds the time embedding as RLinf's training did.
      kernel: attention kernel, see ``nn.attention``.
      remat: whether the backward pass recomputes blocks instead of storing activations; on a CPU
        it is also the quicker way, since the scan would copy what it stores.
    """

    dim: int = 3072
    heads: int = 24
    layers: int = 30
    ffn: int = 14336
    channels: int = 48
    patch: int = 2
    freq_dim: int = 256
    action_dim: int = ACTION_DIM
    frames_per_latent: int = 4
    action_conditioning: str = "dual"
    eps: float = 1e-6
    theta: float = 10_000.0
    dtype: str = "float32"
    residual_dtype: str = "float32"
    sinusoid_dtype: str = "float32"
    kernel: str = "xla"
    remat: bool = True

    def __post_init__(self) -> None:
        if self.action_conditioning not in CONDITIONINGS:
            raise ValueError(f"action_conditioning: expected one of {CONDITIONINGS}, got {self.action_conditioning!r}")
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim: expected an even number, half of it cosines, got {self.freq_dim}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @classmethod
    def ti2v_5b(cls, **changes) -> DiTConfig:
        """The sizes of Wan2.2-TI2V-5B: 5.03 billion parameters with both action channels."""
        sizes: dict[str, Any] = {"dtype": "bfloat16", "residual_dtype": "bfloat16"}
        return cls(**sizes | changes)

    @classmethod
    def tabletop(cls, **changes) -> DiTConfig:
        """The embedded run: 4 x 4 latents, small enough to train on a laptop in minutes."""
        sizes: dict[str, Any] = {"dim": 128, "heads": 4, "layers": 4, "ffn": 512, "channels": 16, "freq_dim": 64}
        return cls(**sizes | changes)

    @classmethod
    def libero_small(cls, **changes) -> DiTConfig:
        """A run on LIBERO from nothing: 8 x 8 latents, 64 tokens a window."""
        sizes: dict[str, Any] = {"dim": 192, "heads": 6, "layers": 6, "ffn": 768, "channels": 16, "freq_dim": 64}
        return cls(**sizes | changes)

    @classmethod
    def fake(cls, **changes) -> DiTConfig:
        """For tests: heads of 20 channels, which the three rotary axes share unevenly."""
        sizes: dict[str, Any] = {"dim": 40, "heads": 2, "layers": 2, "ffn": 56, "channels": 4, "freq_dim": 16}
        return cls(**sizes | changes)


class Context(NamedTuple):
    """What the transformer derives from the actions alone.

    Attributes:
      key_value: keys and values of all cross-attention layers, each (layers, B, F, H, E);
        None without the cross channel.
      frame: (B, f, D), the AdaLN channel's share of the time embedding, float32; None without it.
    """

    key_value: tuple[Array, Array] | None
    frame: Array | None


class MLP(nnx.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, sizes: tuple[int, int, int], activation: str, dtype: str, *, init=None, rngs: nnx.Rngs):
        self.activation = activation
        self.inner = _linear(sizes[0], sizes[1], dtype, init=init, rngs=rngs)
        self.outer = _linear(sizes[1], sizes[2], dtype, init=init, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.outer(_ACTIVATIONS[self.activation](self.inner(x)))


class Attention(nnx.Module):
    """Projections, q and k norms over all heads together, and the output layer."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        self.heads, self.kernel = cfg.heads, cfg.kernel
        self.q, self.k, self.v, self.o = (_linear(cfg.dim, cfg.dim, cfg.dtype, rngs=rngs) for _ in range(4))
        self.norm_q = RMSNorm(cfg.dim, eps=cfg.eps)
        self.norm_k = RMSNorm(cfg.dim, eps=cfg.eps)

    def key_value(self, context_BKD: Array) -> tuple[Array, Array]:
        """Keys and values (B, K, H, E)."""
        return self._split(self.norm_k(self.k(context_BKD))), self._split(self.v(context_BKD))

    def __call__(self, x_BLD: Array, key_value: tuple[Array, Array] | None = None, angle_LP=None) -> Array:
        """Attends to ``key_value``, or to itself with positions when there is none."""
        q_BLHE = self._split(self.norm_q(self.q(x_BLD)))
        k_BKHE, v_BKHE = key_value or self.key_value(x_BLD)
        if angle_LP is not None:
            q_BLHE, k_BKHE = rotate_pairs(q_BLHE, angle_LP), rotate_pairs(k_BKHE, angle_LP)
        out_BLHE = attention(q_BLHE, k_BKHE, v_BKHE, kernel=self.kernel)
        return self.o(out_BLHE.reshape(x_BLD.shape))

    def _split(self, x_BLD: Array) -> Array:
        return x_BLD.reshape(*x_BLD.shape[:2], self.heads, -1)


class Block(nnx.Module):
    """Self-attention, cross-attention to the actions, feed-forward; the first and last modulated."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        self.dtype = cfg.dtype
        self.modulation = _table(6, cfg.dim, rngs)
        self.norm = LayerNorm(cfg.dim, eps=cfg.eps, affine=False)
        self.self_attn = Attention(cfg, rngs=rngs)
        if cfg.action_conditioning != "adaln":
            self.cross_norm = LayerNorm(cfg.dim, eps=cfg.eps)
            self.cross_attn = Attention(cfg, rngs=rngs)
        self.ffn = MLP((cfg.dim, cfg.ffn, cfg.dim), "gelu_tanh", cfg.dtype, rngs=rngs)

    def __call__(self, token_BfnD: Array, key_value, time_Bf6D: Array, angle_LP: np.ndarray) -> Array:
        """One layer; ``key_value`` is None in a network without the cross channel."""
        shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = _modulation(self.modulation, time_Bf6D)
        x_BLD = _flat(_modulate(self.norm, token_BfnD, shift_sa, scale_sa, self.dtype))
        token_BfnD = _add(token_BfnD, self.self_attn(x_BLD, angle_LP=angle_LP), gate_sa)
        if key_value is not None:
            x_BLD = _flat(self.cross_norm(token_BfnD).astype(self.dtype))
            token_BfnD = _add(token_BfnD, self.cross_attn(x_BLD, key_value))
        x_BfnD = _modulate(self.norm, token_BfnD, shift_ff, scale_ff, self.dtype)
        return _add(token_BfnD, self.ffn(x_BfnD), gate_ff)


class DiT(nnx.Module):
    """The transformer; see the module's docstring."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        pixel = cfg.channels * cfg.patch**2
        small = nnx.initializers.normal(0.02)
        self.patch_embedding = _linear(pixel, cfg.dim, cfg.dtype, rngs=rngs)
        # Time and its projection stay float32: modulation multiplies every token of every layer.
        self.time_embedding = MLP((cfg.freq_dim, cfg.dim, cfg.dim), "silu", "float32", init=small, rngs=rngs)
        self.time_projection = _linear(cfg.dim, 6 * cfg.dim, "float32", rngs=rngs)
        if cfg.action_conditioning != "adaln":
            self.action_cross = MLP((cfg.action_dim, cfg.dim, cfg.dim), "gelu", cfg.dtype, rngs=rngs)
        if cfg.action_conditioning != "cross":
            group = cfg.frames_per_latent * cfg.action_dim
            self.action_adaln = MLP((group, 4 * cfg.dim, cfg.dim), "silu", "float32", rngs=rngs)
        self.blocks = stack(lambda rngs: Block(cfg, rngs=rngs), cfg.layers, rngs)
        self.head_modulation = _table(2, cfg.dim, rngs)
        self.head_norm = LayerNorm(cfg.dim, eps=cfg.eps, affine=False)
        self.head = _linear(cfg.dim, pixel, "float32", init=nnx.initializers.zeros, rngs=rngs)

    def context(self, action_BFA: Array | None) -> Context:
        """Everything that depends on the actions of the window only.

        Args:
          action_BFA: (B, F, A) environment actions; slot i produced frame i, F = 1 + 4 (f - 1).

        Raises:
          ValueError: when F or A does not fit the config.
        """
        action_BFA = _checked_actions(action_BFA, self.cfg)
        key_value = frame = None
        if self.cfg.action_conditioning != "adaln":
            key_value = self.key_value(self.action_cross(action_BFA.astype(self.cfg.dtype)))
        if self.cfg.action_conditioning != "cross":
            frame = self.action_adaln(group_actions(action_BFA, self.cfg.frames_per_latent))
        return Context(key_value, frame)

    def key_value(self, context_BKD: Array) -> tuple[Array, Array]:
        """Keys and values of all cross-attention layers, each (layers, B, K, H, E)."""
        graph, state = nnx.split(self.blocks.cross_attn)  # pyright: ignore[reportAttributeAccessIssue]
        return jax.vmap(lambda layer: nnx.merge(graph, layer).key_value(context_BKD))(state)

    def __call__(
        self, latent_Bfhwc: Array, time_Bf: Array, action_BFA: Array | None = None, *, context: Context | None = None
    ) -> Array:
        """The flow velocity (noise minus data), float32, for every latent frame.

        Args:
          latent_Bfhwc: (B, f, h, w, c) latents, each frame at its own noise level.
          time_Bf: (B, f) noise levels in [0, 1000]; 0 for clean context frames.
          action_BFA: (B, F, A); not needed when ``context`` is given.
          context: the result of ``context(action_BFA)``.

        Raises:
          ValueError: when shapes do not fit each other or the config.
        """
        _check_latents(latent_Bfhwc, time_Bf, self.cfg)
        if context is None:
            context = self.context(action_BFA)
        embedding_BfD = self._time(time_Bf, context)
        frames, rows, columns = latent_Bfhwc.shape[1], *(side // self.cfg.patch for side in latent_Bfhwc.shape[2:4])
        angle_LP = wan_angles(frames, rows, columns, self.cfg.head_dim, self.cfg.theta)

        pixel_Bfnp = patchify(latent_Bfhwc, self.cfg.patch).astype(self.cfg.dtype)
        token_BfnD = self.patch_embedding(pixel_Bfnp).astype(self.cfg.residual_dtype)
        time_Bf6D = self.time_projection(jax.nn.silu(embedding_BfD)).reshape(*time_Bf.shape, 6, -1)
        token_BfnD = scan_blocks(
            self.blocks, token_BfnD, time_Bf6D, angle_LP, layered=(context.key_value,), remat=self.cfg.remat
        )
        shift, scale = _modulation(self.head_modulation, jnp.repeat(embedding_BfD[:, :, None], 2, axis=2))
        velocity_Bfnp = self.head(_modulate(self.head_norm, token_BfnD, shift, scale, "float32"))
        return unpatchify(velocity_Bfnp, latent_Bfhwc.shape[2], latent_Bfhwc.shape[3], self.cfg.patch)

    def _time(self, time_Bf: Array, context: Context) -> Array:
        bits = jnp.finfo(self.cfg.sinusoid_dtype)  # a cast there and back may be compiled away
        wave_BfD = jax.lax.reduce_precision(sinusoid(time_Bf, self.cfg.freq_dim), bits.nexp, bits.nmant)
        embedding_BfD = self.time_embedding(wave_BfD)
        return embedding_BfD if context.frame is None else embedding_BfD + context.frame


def sinusoid(time_Bf: Array, dim: int) -> Array:
    """(B, f, dim) float32: cosines, then sines, of time * 10000^(-2i / dim)."""
    frequency = jnp.asarray(10_000.0 ** (-np.arange(dim // 2) / (dim // 2)), jnp.float32)
    angle = time_Bf.astype(jnp.float32)[..., None] * frequency[None, None]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def group_actions(action_BFA: Array, size: int) -> Array:
    """(B, f, size * A): the actions of each latent frame, action 0 repeated before the first."""
    first_BfA = jnp.repeat(action_BFA[:, :1], size - 1, axis=1)
    padded_BFA = jnp.concatenate([first_BfA, action_BFA], axis=1).astype(jnp.float32)
    return padded_BFA.reshape(action_BFA.shape[0], -1, size * action_BFA.shape[-1])


def patchify(latent_Bfhwc: Array, patch: int) -> Array:
    """(B, f, n, c * patch^2) tokens, the column fastest; inside a token (c, row, column)."""
    b, f, h, w, c = latent_Bfhwc.shape
    grid = latent_Bfhwc.reshape(b, f, h // patch, patch, w // patch, patch, c)
    return grid.transpose(0, 1, 2, 4, 6, 3, 5).reshape(b, f, -1, c * patch**2)


def unpatchify(pixel_Bfnp: Array, h: int, w: int, patch: int) -> Array:
    """Back to (B, f, h, w, c); inside an *output* token the order is (row, column, c)."""
    b, f = pixel_Bfnp.shape[:2]
    grid = pixel_Bfnp.reshape(b, f, h // patch, w // patch, patch, patch, -1)
    return grid.transpose(0, 1, 2, 4, 3, 5, 6).reshape(b, f, h, w, -1)


_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def _linear(width_in: int, width_out: int, dtype: str, *, init=None, rngs: nnx.Rngs) -> nnx.Linear:
    init = init or nnx.initializers.xavier_uniform()
    return nnx.Linear(width_in, width_out, dtype=jnp.dtype(dtype), kernel_init=init, rngs=rngs)


def _table(rows: int, dim: int, rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(jax.random.normal(rngs.params(), (rows, dim), jnp.float32) / np.float32(dim**0.5))


def _modulation(table: nnx.Param, time_BfkD: Array) -> list[Array]:
    """The table plus the time embedding as k vectors (B, f, 1, D), one for each latent frame."""
    sum_BfkD = table[...].astype(jnp.float32)[None, None] + time_BfkD
    return jnp.split(sum_BfkD, sum_BfkD.shape[2], axis=2)


def _modulate(norm: LayerNorm, token_BfnD: Array, shift: Array, scale: Array, dtype: str) -> Array:
    return (norm(token_BfnD.astype(jnp.float32)) * (1.0 + scale) + shift).astype(dtype)


def _add(token_BfnD: Array, update: Array, gate_Bf1D: Array | None = None) -> Array:
    """Residual sum in float32, stored in the dtype of the stream."""
    update_BfnD = update.reshape(token_BfnD.shape).astype(jnp.float32)
    update_BfnD = update_BfnD if gate_Bf1D is None else gate_Bf1D * update_BfnD
    return (token_BfnD.astype(jnp.float32) + update_BfnD).astype(token_BfnD.dtype)


def _flat(token_BfnD: Array) -> Array:
    return token_BfnD.reshape(token_BfnD.shape[0], -1, token_BfnD.shape[-1])


def _checked_actions(action_BFA: Array | None, cfg: DiTConfig) -> Array:
    if action_BFA is None:
        raise ValueError("the transformer needs actions (B, F, A), or the context computed from them")
    _, frames, width = action_BFA.shape
    if width != cfg.action_dim or frames % cfg.frames_per_latent != 1:
        raise ValueError(
            f"actions: expected (B, 1 + {cfg.frames_per_latent} k, {cfg.action_dim}), got {action_BFA.shape}"
        )
    return action_BFA


def _check_latents(latent_Bfhwc: Array, time_Bf: Array, cfg: DiTConfig) -> None:
    b, f, h, w, c = latent_Bfhwc.shape
    if c != cfg.channels or h % cfg.patch or w % cfg.patch:
        raise ValueError(
            f"latents: expected {cfg.channels} channels and sides divisible by {cfg.patch}, got {latent_Bfhwc.shape}"
        )
    if time_Bf.shape != (b, f):
        raise ValueError(f"time: expected one level for each latent frame {(b, f)}, got {time_Bf.shape}")
