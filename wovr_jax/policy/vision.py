"""The two vision towers: DINOv2 with registers and SigLIP, one class.

Facts that are easy to get wrong, all held by tests: both towers use the exact (erf) GELU and LayerNorm
eps 1e-6; position embeddings are added to patches only, before the prefix tokens join; the features are
the raw output of the **second-to-last** block, without the final norm and without prefix tokens
(prismatic: prismatic/models/backbones/vision/dinosiglip_vit.py).

A tower of published depth ``n`` therefore holds ``n - 1`` blocks. The last block, the final norm and
SigLIP's attention pool are in release files but never reach the policy; they are not parameters here.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx

from wovr_jax.core.config import Between, Count, DType, Faults, Finite, Natural, Positive, checked
from wovr_jax.nn.attention import attention
from wovr_jax.nn.functional import scan_blocks, stack
from wovr_jax.nn.norms import LayerNorm
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
