"""The networks that OpenVLA takes ready-made: the vision towers (DINOv2 with registers, SigLIP; one class) and Llama.

Facts that are easy to get wrong, all held by tests. Of the towers: both use the exact (erf) GELU and LayerNorm
eps 1e-6; position embeddings are added to patches only, before the prefix tokens join; the features are
the raw output of the **second-to-last** block, without the final norm and without prefix tokens
(prismatic: prismatic/models/backbones/vision/dinosiglip_vit.py). A tower of published depth ``n`` therefore holds
``n - 1`` blocks. The last block, the final norm and SigLIP's attention pool are in release files but never reach the
policy; they are not parameters here.

Of Llama as OpenVLA-OFT runs it: RMSNorm (eps 1e-6, in float32), rotate-half RoPE, SwiGLU, no biases, untied head.
Attention is fully bidirectional; the only mask is over padding keys. Stock Llama is causal and would be wrong without
any error (openvla-oft runs on transformers-openvla-oft, where SDPA's ``is_causal`` is False).
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx

from wovr_jax.core.config import Between, Count, DType, Faults, Finite, Natural, Positive, checked
from wovr_jax.nn import lora
from wovr_jax.nn.functional import scan_blocks, stack
from wovr_jax.nn.transformer import LayerNorm, RMSNorm, attention, llama_angles, rotate_halves
from wovr_jax.types import Array

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@checked
@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """One vision transformer.

    Attributes:
      image: input height and width in pixels; other sizes are resized to it.
      patch: side of a patch in pixels.
      width, heads, mlp: width D, attention heads, hidden width of the MLP.
      depth: blocks of the published network; ``depth - 1`` are run.
      prefix: learned tokens before the patches (DINOv2: one cls and four registers).
      layer_scale: whether each residual branch has a learned scale (DINOv2).
      mean, std: normalisation of pixels in [0, 1].
      remat: recompute blocks in the backward pass.
      dtype: of matrix products and activations; norms and softmax stay float32.
    """

    image: Count
    patch: Count
    width: Count
    depth: Annotated[int, Between(2)]
    heads: Count
    mlp: Count
    prefix: Natural = 0
    layer_scale: bool = False
    mean: tuple[Finite, Finite, Finite] = HALF
    std: tuple[Positive, Positive, Positive] = HALF
    remat: bool = False
    dtype: DType = "float32"

    def faults(self) -> Faults:
        """Yields pictures that are no grid of patches, and a width that is no row of heads."""
        if self.image % self.patch:
            yield "image", f"expected a multiple of patch={self.patch}, got {self.image}"
        if self.width % self.heads:
            yield "width", f"expected a multiple of heads={self.heads}, got {self.width}"

    @classmethod
    def dinov2_large(cls, dtype: DType = "bfloat16") -> TowerConfig:
        """timm vit_large_patch14_reg4_dinov2 at 224 pixels."""
        sizes = (224, 14, 1024, 24, 16, 4096, 5, True)
        return cls(*sizes, mean=IMAGENET_MEAN, std=IMAGENET_STD, remat=True, dtype=dtype)

    @classmethod
    def siglip_so400m(cls, dtype: DType = "bfloat16") -> TowerConfig:
        """timm vit_so400m_patch14_siglip_224."""
        return cls(224, 14, 1152, 27, 16, 4304, remat=True, dtype=dtype)

    @classmethod
    def tabletop_dinov2(cls) -> TowerConfig:
        """For 32-pixel frames; its weights are shipped."""
        return cls(32, 8, 96, 4, 4, 384, 5, True, IMAGENET_MEAN, IMAGENET_STD)

    @classmethod
    def tabletop_siglip(cls) -> TowerConfig:
        """For 32-pixel frames; its weights are shipped."""
        return cls(32, 8, 96, 4, 4, 384)

    @classmethod
    def libero_dinov2(cls) -> TowerConfig:
        """For 64-pixel frames of LIBERO; trained with the policy."""
        return cls(64, 8, 128, 5, 4, 512, 5, True, IMAGENET_MEAN, IMAGENET_STD)

    @classmethod
    def libero_siglip(cls) -> TowerConfig:
        """For 64-pixel frames of LIBERO; trained with the policy."""
        return cls(64, 8, 128, 5, 4, 512)

    @classmethod
    def fake(cls, prefix: int = 0, layer_scale: bool = False) -> TowerConfig:
        """Tiny, for tests."""
        return cls(16, 8, 16, 3, 2, 24, prefix, layer_scale)

    @property
    def patches(self) -> int:
        """Number of patch tokens of an image."""
        return (self.image // self.patch) ** 2


class TowerBlock(nnx.Module):
    """Pre-norm transformer block: ``x + ls1 * attn(LN x)``, then ``x + ls2 * mlp(LN x)``."""

    def __init__(self, cfg: TowerConfig, *, rngs: nnx.Rngs):
        def dense(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, dtype=jnp.dtype(cfg.dtype), rngs=rngs)

        self.heads = cfg.heads
        self.norm1 = LayerNorm(cfg.width, eps=1e-6)
        self.qkv = dense(cfg.width, 3 * cfg.width)
        self.proj = dense(cfg.width, cfg.width)
        self.norm2 = LayerNorm(cfg.width, eps=1e-6)
        self.fc1 = dense(cfg.width, cfg.mlp)
        self.fc2 = dense(cfg.mlp, cfg.width)
        # LayerScale begins at one here: fresh towers are small and few blocks deep.
        self.ls1 = nnx.Param(jnp.ones(cfg.width)) if cfg.layer_scale else None
        self.ls2 = nnx.Param(jnp.ones(cfg.width)) if cfg.layer_scale else None

    def __call__(self, x_BLD: Array) -> Array:
        """Runs one layer."""
        batch, length, width = x_BLD.shape
        with jax.named_scope("self_attention"):
            # (B, L, 3 * D) -> (B, L, 3, H, D / H) -> three of (B, L, H, D / H); timm joins q, k and v in this order.
            qkv = self.qkv(self.norm1(x_BLD)).reshape(batch, length, 3, self.heads, width // self.heads)
            q_BLHE, k_BLHE, v_BLHE = jnp.moveaxis(qkv, 2, 0)
            y_BLD = self.proj(attention(q_BLHE, k_BLHE, v_BLHE).reshape(batch, length, width))
            x_BLD = x_BLD + _scale(self.ls1, y_BLD)
        with jax.named_scope("mlp"):
            hidden = jax.nn.gelu(self.fc1(self.norm2(x_BLD)), approximate=False)
            return x_BLD + _scale(self.ls2, self.fc2(hidden))


class Tower(nnx.Module):
    """Pictures (B, H, W, 3) in [-1, 1] to (B, patches, width), the features of the second-to-last block."""

    def __init__(self, cfg: TowerConfig, *, rngs: nnx.Rngs):
        def normal(*shape: int) -> nnx.Param:
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))

        self.cfg = cfg
        patch = (cfg.patch, cfg.patch)  # window and stride: patches do not overlap
        self.patch_embed = nnx.Conv(3, cfg.width, patch, patch, padding="VALID", dtype=jnp.dtype(cfg.dtype), rngs=rngs)
        # Added to patches at the size of training only; another size of picture is resized, not the positions.
        self.pos_embed = normal(1, cfg.patches, cfg.width)
        self.prefix = normal(1, cfg.prefix, cfg.width) if cfg.prefix else None
        self.blocks = stack(lambda r: TowerBlock(cfg, rngs=r), cfg.depth - 1, rngs)

    def __call__(self, frame_BHWC: Array) -> Array:
        """Returns the features of the patches, row by row."""
        cfg = self.cfg
        x_BhwD = self.patch_embed(normalise(resize(frame_BHWC, cfg.image), cfg.mean, cfg.std))
        # (B, h, w, D) -> (B, h * w, D), the column fastest
        x_BLD = x_BhwD.reshape(x_BhwD.shape[0], cfg.patches, cfg.width) + self.pos_embed.astype(x_BhwD.dtype)
        if self.prefix is not None:  # behind the positions, of which these tokens have none
            prefix = jnp.broadcast_to(self.prefix[...], (x_BLD.shape[0], cfg.prefix, cfg.width))
            x_BLD = jnp.concatenate([prefix.astype(x_BLD.dtype), x_BLD], axis=1)
        # The prefix has done its work in the blocks (registers keep artefacts out of the patches) and is dropped.
        return scan_blocks(self.blocks, x_BLD, remat=cfg.remat)[:, cfg.prefix :]


def resize(frame_BHWC: Array, size: int) -> Array:
    """Resizes to (size, size), bicubic and antialiased; pictures of that size stay as they are.

    RLinf's input path without its 8-bit rounding, which stays with the caller.
    """
    batch, height, width, channels = frame_BHWC.shape
    if (height, width) == (size, size):
        return frame_BHWC
    # A cubic kernel overshoots at edges: without the clip, pixels would leave the range that the towers know.
    return jnp.clip(jax.image.resize(frame_BHWC, (batch, size, size, channels), "cubic", antialias=True), -1.0, 1.0)


def normalise(frame_BHWC: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """Maps pixels in [-1, 1] to ((x + 1) / 2 - mean) / std, float32."""
    # (3,) -> (1, 1, 1, 3): one mean and deviation for each colour.
    mean_1113, std_1113 = (jnp.asarray(value).reshape(1, 1, 1, 3) for value in (mean, std))
    return (0.5 * (frame_BHWC + 1.0) - mean_1113) / std_1113


def _scale(scale: nnx.Param | None, x_BLD: Array) -> Array:
    return x_BLD if scale is None else x_BLD * scale[None, None].astype(x_BLD.dtype)


@checked
@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A Llama language model.

    Attributes:
      rows: rows of embedding and head: real ids plus padding rows.
      width, depth, heads, mlp: width D, layers, attention heads, hidden width of the SwiGLU.
      rope_theta: base of the rotary frequencies.
      eps: of the RMSNorms; OpenVLA has 1e-6, not Llama-2's 1e-5.
      remat: recompute layers in the backward pass.
      dtype: of matrix products and activations; norms, rotary tables, softmax and logits are float32.
    """

    rows: Count
    width: Count
    depth: Count
    heads: Count
    mlp: Count
    rope_theta: Positive = 10000.0
    eps: Positive = 1e-6
    remat: bool = False
    dtype: DType = "float32"

    def faults(self) -> Faults:
        """Yields a width that does not fall into heads of an even width, whose halves rotary positions pair."""
        if self.width % (2 * self.heads):
            yield "width", f"expected a multiple of 2 * heads={2 * self.heads}, got {self.width}"

    @classmethod
    def llama2_7b(cls, dtype: DType = "bfloat16") -> LlamaConfig:
        """Llama-2 7B with OpenVLA's vocabulary rows and eps."""
        return cls(32064, 4096, 32, 32, 11008, remat=True, dtype=dtype)


class LlamaBlock(nnx.Module):
    """Pre-norm block: attention with rotary positions, then SwiGLU."""

    def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs):
        # Residual branches start small, so that a deep stack starts near the identity.
        small = nnx.initializers.variance_scaling(0.5 / cfg.depth, "fan_in", "truncated_normal")
        usual = nnx.initializers.lecun_normal()

        def dense(inputs: int, outputs: int, init=usual) -> nnx.Linear:
            dtype = jnp.dtype(cfg.dtype)
            return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=init, dtype=dtype, rngs=rngs)

        self.heads = cfg.heads
        # No biases and two norms, the names of the released layers shortened.
        self.norm1 = RMSNorm(cfg.width, eps=cfg.eps)
        self.q, self.k, self.v = (dense(cfg.width, cfg.width) for _ in range(3))
        self.o = dense(cfg.width, cfg.width, small)
        self.norm2 = RMSNorm(cfg.width, eps=cfg.eps)
        self.gate, self.up = dense(cfg.width, cfg.mlp), dense(cfg.width, cfg.mlp)
        self.down = dense(cfg.mlp, cfg.width, small)

    def __call__(self, x_BLD: Array, angle_BLP: Array, mask: Array) -> Array:
        """Runs one layer: x + attention(norm x), then x + mlp(norm x)."""
        batch, length, width = x_BLD.shape
        heads = batch, length, self.heads, width // self.heads
        with jax.named_scope("self_attention"):
            # (B, L, D) -> (B * L, D): XLA:CPU copies a transposed operand of the weight gradients otherwise.
            x_ND = self.norm1(x_BLD).reshape(-1, width)
            # (B * L, D) -> (B, L, H, D / H)
            q_BLHE, k_BLHE, v_BLHE = (layer(x_ND).reshape(heads) for layer in (self.q, self.k, self.v))
            q_BLHE, k_BLHE = rotate_halves(q_BLHE, angle_BLP), rotate_halves(k_BLHE, angle_BLP)
            x_ND = attention(q_BLHE, k_BLHE, v_BLHE, mask).reshape(-1, width)
            x_BLD = x_BLD + self.o(x_ND).reshape(x_BLD.shape)
        with jax.named_scope("mlp"):
            h_ND = self.norm2(x_BLD).reshape(-1, width)
            # SwiGLU: the gate opens or closes each hidden channel.
            return x_BLD + self.down(jax.nn.silu(self.gate(h_ND)) * self.up(h_ND)).reshape(x_BLD.shape)


class Llama(nnx.Module):
    """Embeddings in, logits out; the caller builds the sequence."""

    def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.embed = nnx.Embed(cfg.rows, cfg.width, dtype=jnp.dtype(cfg.dtype), rngs=rngs)
        self.blocks = stack(lambda r: LlamaBlock(cfg, rngs=r), cfg.depth, rngs)
        self.norm = RMSNorm(cfg.width, eps=cfg.eps)
        self.head = nnx.Linear(cfg.width, cfg.rows, use_bias=False, dtype=jnp.dtype(cfg.dtype), rngs=rngs)

    def __call__(self, x_BLD: Array, mask_BL: Array) -> Array:
        """Returns the hidden states after the last norm, (B, L, D).

        Args:
          x_BLD: embedded sequence.
          mask_BL: bool, False at padding; positions count the real tokens only.
        """
        # Padding takes no position, so a prompt means the same however far it was padded. Which one a pad gets itself
        # does not matter: nobody looks there.
        position_BL = jnp.cumsum(mask_BL.astype(jnp.int32), axis=1) - 1
        angle_BLP = llama_angles(position_BL, self.cfg.width // self.cfg.heads, self.cfg.rope_theta)
        # (B, K) -> (B, 1, 1, K): every query sees exactly the keys that are no padding.
        x_BLD = scan_blocks(self.blocks, x_BLD, angle_BLP, mask_BL[:, None, None, :], remat=self.cfg.remat)
        return self.norm(x_BLD)

    def logits(self, hidden_BLD: Array, first: int, count: int) -> Array:
        """Returns float32 logits of ``count`` ids from ``first`` on."""
        # Only those columns of the head are multiplied: 256 action ids of 32,064.
        return lora.columns(self.head, hidden_BLD, first, count).astype(jnp.float32)
