"""Llama as OpenVLA-OFT runs it: the released layers, with every token seeing every other.

RMSNorm (eps 1e-6, in float32), rotate-half RoPE, SwiGLU, no biases, untied head. Attention is fully
bidirectional; the only mask is over padding keys. Stock Llama is causal and would be wrong without any
error (openvla-oft runs on transformers-openvla-oft, where SDPA's ``is_causal`` is False).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from wovr_jax.core.config import Count, DType, Faults, Positive, checked
from wovr_jax.nn import lora
from wovr_jax.nn.attention import attention, llama_angles, padding_mask, rotate_halves
from wovr_jax.nn.functional import scan_blocks, stack
from wovr_jax.nn.norms import RMSNorm
from wovr_jax.types import Array


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
        x_BLD = scan_blocks(self.blocks, x_BLD, angle_BLP, padding_mask(mask_BL), remat=self.cfg.remat)
        return self.norm(x_BLD)

    def logits(self, hidden_BLD: Array, first: int, count: int) -> Array:
        """Returns float32 logits of ``count`` ids from ``first`` on."""
        # Only those columns of the head are multiplied: 256 action ids of 32,064.
        return lora.columns(self.head, hidden_BLD, first, count).astype(jnp.float32)
