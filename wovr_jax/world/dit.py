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
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wovr_jax.core.config import Count, DType, Faults, Positive, checked
from wovr_jax.nn.functional import scan_blocks, stack
from wovr_jax.nn.lora import LoRAConfig
from wovr_jax.nn.transformer import Kernel, LayerNorm, RMSNorm, attention, rotate_pairs, wan_angles
from wovr_jax.types import ACTION_DIM, Array

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
ISLANDS = ("*norm*", "*modulation", "time_*", "action_adaln/*", "head/*")  # float32 always (``functional.narrow``)

Activation = Callable[[Array], Array]
EXACT_GELU: Activation = functools.partial(jax.nn.gelu, approximate=False)
"""By the error function; ``jax.nn.gelu`` itself is the approximation by tanh."""


@checked
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
      kernel: attention kernel, see ``nn.transformer``.
      remat: whether the backward pass recomputes blocks instead of storing activations; on a CPU
        it is also the quicker way, since the scan would copy what it stores.
    """

    dim: Count = 3072
    heads: Count = 24
    layers: Count = 30
    ffn: Count = 14336
    channels: Count = 48
    patch: Count = 2
    freq_dim: Count = 256
    action_dim: Count = ACTION_DIM
    frames_per_latent: Count = 4
    action_conditioning: Literal["dual", "cross", "adaln"] = "dual"
    eps: Positive = 1e-6
    theta: Positive = 10_000.0
    dtype: DType = "float32"
    residual_dtype: DType = "float32"
    sinusoid_dtype: DType = "float32"
    kernel: Kernel = "xla"
    remat: bool = True

    def faults(self) -> Faults:
        """Yields widths that cannot be divided as attention and positions divide them."""
        if self.dim % self.heads:
            yield "dim", f"expected a multiple of heads={self.heads}, got {self.dim}"
        elif self.head_dim % 2 or self.head_dim < 6:
            # Rotary positions turn pairs of channels, and time, rows and columns each want at least one pair.
            yield "dim", f"expected heads of an even width of at least 6, got {self.dim} over {self.heads} heads"
        if self.freq_dim % 2:
            yield "freq_dim", f"expected an even number, half of it cosines, got {self.freq_dim}"

    @property
    def head_dim(self) -> int:
        """Width E of one head."""
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


class DiTLoRA(LoRAConfig):
    """Adapters of the transformer, by the names of its layers."""

    @classmethod
    def wan(cls, **changes: Any) -> DiTLoRA:
        """Attention and feed-forward of every block, as DiffSynth-Studio trains it."""
        options: dict[str, Any] = {"targets": ("blocks/*_attn/[qkvo]", "blocks/ffn/*")}
        return cls(**options | changes)


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
    """Two linear layers with an activation between them; upstream's networks differ in which one."""

    def __init__(self, sizes: tuple[int, int, int], activation: Activation, dtype: str, *, init=None, rngs: nnx.Rngs):
        self.activation = activation
        self.inner = _linear(sizes[0], sizes[1], dtype, init=init, rngs=rngs)
        self.outer = _linear(sizes[1], sizes[2], dtype, init=init, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Maps the last axis from ``sizes[0]`` to ``sizes[2]``."""
        return self.outer(self.activation(self.inner(x)))


class Attention(nnx.Module):
    """Projections, q and k norms over all heads together, and the output layer."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        self.heads, self.kernel = cfg.heads, cfg.kernel
        self.q, self.k, self.v, self.o = (_linear(cfg.dim, cfg.dim, cfg.dtype, rngs=rngs) for _ in range(4))
        # Over all D channels, before they are split into heads, which keeps the logits of attention in range.
        self.norm_q = RMSNorm(cfg.dim, eps=cfg.eps)
        self.norm_k = RMSNorm(cfg.dim, eps=cfg.eps)

    def key_value(self, context_BKD: Array) -> tuple[Array, Array]:
        """Returns keys and values (B, K, H, E)."""
        return self._split(self.norm_k(self.k(context_BKD))), self._split(self.v(context_BKD))

    def __call__(self, x_BLD: Array, key_value: tuple[Array, Array] | None = None, angle_LP=None) -> Array:
        """Attends to ``key_value``, or to itself with positions when there is none."""
        q_BLHE = self._split(self.norm_q(self.q(x_BLD)))
        k_BKHE, v_BKHE = key_value or self.key_value(x_BLD)
        if angle_LP is not None:  # tokens of actions carry no position
            q_BLHE, k_BKHE = rotate_pairs(q_BLHE, angle_LP), rotate_pairs(k_BKHE, angle_LP)
        out_BLHE = attention(q_BLHE, k_BKHE, v_BKHE, kernel=self.kernel)
        return self.o(out_BLHE.reshape(x_BLD.shape))  # (B, L, H, E) -> (B, L, D)

    def _split(self, x_BLD: Array) -> Array:
        return x_BLD.reshape(*x_BLD.shape[:2], self.heads, -1)  # (B, L, D) -> (B, L, H, E)


class Block(nnx.Module):
    """Self-attention, cross-attention to the actions, feed-forward; the first and last modulated."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        self.dtype = cfg.dtype
        self.modulation = _modulation_table(6, cfg.dim, rngs)
        self.norm = LayerNorm(cfg.dim, eps=cfg.eps, affine=False)
        self.self_attn = Attention(cfg, rngs=rngs)
        if cfg.action_conditioning != "adaln":
            self.cross_norm = LayerNorm(cfg.dim, eps=cfg.eps)
            self.cross_attn = Attention(cfg, rngs=rngs)
        self.ffn = MLP((cfg.dim, cfg.ffn, cfg.dim), jax.nn.gelu, cfg.dtype, rngs=rngs)

    def __call__(self, token_BfnD: Array, key_value, time_Bf6D: Array, angle_LP: np.ndarray) -> Array:
        """Runs one layer; ``key_value`` is None in a network without the cross channel."""
        grid, line = token_BfnD.shape, (token_BfnD.shape[0], -1, token_BfnD.shape[-1])
        stream = token_BfnD.dtype
        # A learned offset on the layer's share of the time embedding: six vectors (B, f, 1, D), one each for every
        # latent frame, whose n tokens share them. Float32, as is every sum into the stream of tokens.
        modulation_Bf6D = self.modulation[...].astype(jnp.float32)[None, None] + time_Bf6D
        shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = jnp.split(modulation_Bf6D, 6, axis=2)

        with jax.named_scope("self_attention"):
            x_BfnD = (self.norm(token_BfnD.astype(jnp.float32)) * (1.0 + scale_sa) + shift_sa).astype(self.dtype)
            # (B, f, n, D) -> (B, L, D): every token of the window sees every other, of later frames too.
            y_BLD = self.self_attn(x_BfnD.reshape(line), angle_LP=angle_LP)
            update_BfnD = gate_sa * y_BLD.reshape(grid).astype(jnp.float32)
            token_BfnD = (token_BfnD.astype(jnp.float32) + update_BfnD).astype(stream)

        if key_value is not None:
            with jax.named_scope("cross_attention"):
                # Neither modulated nor gated; keys and values of the action tokens come ready from ``DiT.context``.
                y_BLD = self.cross_attn(self.cross_norm(token_BfnD).astype(self.dtype).reshape(line), key_value)
                token_BfnD = (token_BfnD.astype(jnp.float32) + y_BLD.reshape(grid).astype(jnp.float32)).astype(stream)

        with jax.named_scope("mlp"):
            x_BfnD = (self.norm(token_BfnD.astype(jnp.float32)) * (1.0 + scale_ff) + shift_ff).astype(self.dtype)
            update_BfnD = gate_ff * self.ffn(x_BfnD).astype(jnp.float32)
            return (token_BfnD.astype(jnp.float32) + update_BfnD).astype(stream)


class DiT(nnx.Module):
    """The transformer; see the module's docstring."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        pixel = cfg.channels * cfg.patch**2
        small = nnx.initializers.normal(0.02)
        self.patch_embedding = _linear(pixel, cfg.dim, cfg.dtype, rngs=rngs)
        # Time and its projection stay float32: modulation multiplies every token of every layer.
        self.time_embedding = MLP((cfg.freq_dim, cfg.dim, cfg.dim), jax.nn.silu, "float32", init=small, rngs=rngs)
        self.time_projection = _linear(cfg.dim, 6 * cfg.dim, "float32", rngs=rngs)
        if cfg.action_conditioning != "adaln":
            self.action_cross = MLP((cfg.action_dim, cfg.dim, cfg.dim), EXACT_GELU, cfg.dtype, rngs=rngs)
        if cfg.action_conditioning != "cross":
            group = cfg.frames_per_latent * cfg.action_dim
            self.action_adaln = MLP((group, 4 * cfg.dim, cfg.dim), jax.nn.silu, "float32", rngs=rngs)
        self.blocks = stack(lambda rngs: Block(cfg, rngs=rngs), cfg.layers, rngs)
        self.head_modulation = _modulation_table(2, cfg.dim, rngs)
        self.head_norm = LayerNorm(cfg.dim, eps=cfg.eps, affine=False)
        # A fresh network predicts a velocity of zero everywhere, whatever its blocks do.
        self.head = _linear(cfg.dim, pixel, "float32", init=nnx.initializers.zeros, rngs=rngs)

    @jax.named_scope("action_context")
    def context(self, action_BFA: Array | None) -> Context:
        """Computes everything that depends on the actions of the window only.

        Args:
          action_BFA: (B, F, A) environment actions; slot i produced frame i, F = 1 + 4 (f - 1).

        Raises:
          ValueError: when F or A does not fit the config.
        """
        if action_BFA is None:
            raise ValueError("the transformer needs actions (B, F, A), or the context computed from them")
        chex.assert_rank(action_BFA, 3, custom_message="transformer: action_BFA")
        group, (_, frames, width) = self.cfg.frames_per_latent, action_BFA.shape
        if width != self.cfg.action_dim or frames % group != 1:
            raise ValueError(f"actions: expected (B, 1 + {group} k, {self.cfg.action_dim}), got {action_BFA.shape}")
        key_value = frame = None
        if self.cfg.action_conditioning != "adaln":  # one token for each action
            key_value = self.key_value(self.action_cross(action_BFA.astype(self.cfg.dtype)))
        if self.cfg.action_conditioning != "cross":  # one vector for each latent frame; it says when an action was
            frame = self.action_adaln(group_actions(action_BFA, group))
        return Context(key_value, frame)

    def key_value(self, context_BKD: Array) -> tuple[Array, Array]:
        """Returns keys and values of all cross-attention layers, each (layers, B, K, H, E)."""
        # The layers are stacked, so all of them project the few tokens of the context in one batched product.
        graph, state = nnx.split(self.blocks.cross_attn)  # pyright: ignore[reportAttributeAccessIssue]
        return jax.vmap(lambda layer: nnx.merge(graph, layer).key_value(context_BKD))(state)

    def __call__(
        self, latent_Bfhwc: Array, time_Bf: Array, action_BFA: Array | None = None, *, context: Context | None = None
    ) -> Array:
        """Predicts the flow velocity (noise minus data), float32, for every latent frame.

        Args:
          latent_Bfhwc: (B, f, h, w, c) latents, each frame at its own noise level.
          time_Bf: (B, f) noise levels in [0, 1000]; 0 for clean context frames.
          action_BFA: (B, F, A); not needed when ``context`` is given.
          context: the result of ``context(action_BFA)``.

        Raises:
          ValueError: when shapes do not fit each other or the config.
        """
        cfg = self.cfg
        chex.assert_rank(latent_Bfhwc, 5, custom_message="transformer: latent_Bfhwc")
        b, f, h, w, c = latent_Bfhwc.shape
        if c != cfg.channels or h % cfg.patch or w % cfg.patch:
            form = f"{cfg.channels} channels and sides divisible by {cfg.patch}"
            raise ValueError(f"latents: expected {form}, got {latent_Bfhwc.shape}")
        chex.assert_shape(time_Bf, (b, f), custom_message="transformer: time_Bf, one level for each latent frame")
        context = self.context(action_BFA) if context is None else context

        with jax.named_scope("embeddings"):
            # Rounded to the digits of ``sinusoid_dtype``; a cast there and back may be compiled away.
            digits = jnp.finfo(cfg.sinusoid_dtype)
            wave_BfD = jax.lax.reduce_precision(sinusoid(time_Bf, cfg.freq_dim), digits.nexp, digits.nmant)
            embedding_BfD = self.time_embedding(wave_BfD)
            if context.frame is not None:  # the adaln channel: actions enter wherever the noise level does
                embedding_BfD = embedding_BfD + context.frame
            # (B, f, h, w, c) -> (B, f, n, c * patch^2) -> (B, f, n, D)
            pixel_Bfnp = patchify(latent_Bfhwc, cfg.patch).astype(cfg.dtype)
            token_BfnD = self.patch_embedding(pixel_Bfnp).astype(cfg.residual_dtype)
            angle_LP = wan_angles(f, h // cfg.patch, w // cfg.patch, cfg.head_dim, cfg.theta)
            # (B, f, 6 * D) -> (B, f, 6, D): shift, scale and gate of self-attention, then of the feed-forward layer.
            time_Bf6D = self.time_projection(jax.nn.silu(embedding_BfD)).reshape(*time_Bf.shape, 6, -1)

        layered = (context.key_value,)  # every layer gets its own keys and values, and the same of all else
        token_BfnD = scan_blocks(self.blocks, token_BfnD, time_Bf6D, angle_LP, layered=layered, remat=cfg.remat)

        with jax.named_scope("head"):
            # The head is modulated by the embedding itself, the same for shift and scale, plus its own offsets.
            modulation_Bf2D = self.head_modulation[...].astype(jnp.float32)[None, None] + embedding_BfD[:, :, None]
            shift_Bf1D, scale_Bf1D = jnp.split(modulation_Bf2D, 2, axis=2)
            x_BfnD = self.head_norm(token_BfnD.astype(jnp.float32)) * (1.0 + scale_Bf1D) + shift_Bf1D
            return unpatchify(self.head(x_BfnD), h, w, cfg.patch)


def sinusoid(time_Bf: Array, dim: int) -> Array:
    """Returns (B, f, dim) float32: cosines, then sines, of time * 10000^(-2i / dim), each within 5e-7.

    The original computes angles in float64; in float32 one near 1000 radians is known to 3e-5 only.
    """
    # In turns, of which whole ones do not count. Cut to 12 digits, time and frequency have a product that float32
    # holds exactly; what was cut off of either adds less than a tenth of a turn.
    turns = 10_000.0 ** (-np.arange(dim // 2) / (dim // 2)) / (2.0 * np.pi)
    coarse = (turns.astype(np.float32).view(np.uint32) & 0xFFFFF000).view(np.float32)[None, None]
    time_Bf1 = time_Bf.astype(jnp.float32)[..., None]
    cut_Bf1 = jax.lax.reduce_precision(time_Bf1, 8, 11)
    whole = cut_Bf1 * coarse
    rest = time_Bf1 * (turns - coarse).astype(np.float32) + (time_Bf1 - cut_Bf1) * coarse
    angle = np.float32(2.0 * np.pi) * (whole - jnp.round(whole) + rest)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def group_actions(action_BFA: Array, size: int) -> Array:
    """Returns (B, f, size * A): the actions of each latent frame, action 0 repeated before the first."""
    # The first latent frame stands for one frame, the others for ``size``: (B, 1 + size k, A) -> (B, size (1 + k), A).
    first_BfA = jnp.repeat(action_BFA[:, :1], size - 1, axis=1)
    padded_BFA = jnp.concatenate([first_BfA, action_BFA], axis=1).astype(jnp.float32)
    # (B, size * f, A) -> (B, f, size * A)
    return padded_BFA.reshape(action_BFA.shape[0], -1, size * action_BFA.shape[-1])


def patchify(latent_Bfhwc: Array, patch: int) -> Array:
    """Cuts latents into (B, f, n, c * patch^2) tokens, the column fastest; inside a token (c, row, column)."""
    b, f, h, w, c = latent_Bfhwc.shape
    grid = latent_Bfhwc.reshape(b, f, h // patch, patch, w // patch, patch, c)
    # (b, f, row of tokens, row, column of tokens, column, c) -> (b, f, row of tokens, column of tokens, c, row, column)
    return grid.transpose(0, 1, 2, 4, 6, 3, 5).reshape(b, f, -1, c * patch**2)


def unpatchify(pixel_Bfnp: Array, h: int, w: int, patch: int) -> Array:
    """Joins tokens to (B, f, h, w, c); inside an *output* token the order is (row, column, c)."""
    b, f = pixel_Bfnp.shape[:2]
    grid = pixel_Bfnp.reshape(b, f, h // patch, w // patch, patch, patch, -1)
    # (b, f, row of tokens, column of tokens, row, column, c) -> (b, f, row of tokens, row, column of tokens, column, c)
    return grid.transpose(0, 1, 2, 4, 3, 5, 6).reshape(b, f, h, w, -1)


def _linear(width_in: int, width_out: int, dtype: str, *, init=None, rngs: nnx.Rngs) -> nnx.Linear:
    init = init or nnx.initializers.xavier_uniform()
    return nnx.Linear(width_in, width_out, dtype=jnp.dtype(dtype), kernel_init=init, rngs=rngs)


def _modulation_table(rows: int, dim: int, rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(jax.random.normal(rngs.params(), (rows, dim), jnp.float32) / np.float32(dim**0.5))
