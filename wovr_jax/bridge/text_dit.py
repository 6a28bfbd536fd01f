"""The world model's transformer as Wan2.2 released it, before actions: conditioned on text.

No run of ours uses it. It is here because released weights are of this network: they are taken in as they are, written
out again, and compared with the original; ``with_actions`` is the network that training starts from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
from flax import nnx

from wovr_jax.core.config import Count, checked
from wovr_jax.types import Array
from wovr_jax.weights.table import require
from wovr_jax.weights.transforms import Shape
from wovr_jax.world.dit import MLP, Context, DiT, DiTConfig
from wovr_jax.world.weights import NAME, dit_sizes


@checked
@dataclasses.dataclass(frozen=True)
class TextDiTConfig(DiTConfig):
    """Sizes of the released network: its cross-attention context is encoded text of width ``text_dim``."""

    action_conditioning: Literal["dual", "cross", "adaln"] = "cross"
    text_dim: Count = 4096


class TextDiT(DiT):
    """The transformer whose context is text instead of actions."""

    def __init__(self, cfg: TextDiTConfig, *, rngs: nnx.Rngs):
        super().__init__(cfg, rngs=rngs)
        del self.action_cross  # the text takes its place
        small = nnx.initializers.normal(0.02)
        self.text_embedding = MLP((cfg.text_dim, cfg.dim, cfg.dim), jax.nn.gelu, cfg.dtype, init=small, rngs=rngs)

    def context(self, action_BFA: Array | None) -> Context:
        """Refuses actions, of which this network knows nothing.

        Raises:
          ValueError: always.
        """
        raise ValueError("this transformer has no actions; give it the context computed from text (text_context)")

    def text_context(self, text_BKD: Array) -> Context:
        """Returns what all layers need of encoded text (B, K, text_dim)."""
        # Text reaches every latent frame by cross-attention alone; the AdaLN channel belongs to actions.
        return Context(self.key_value(self.text_embedding(text_BKD.astype(self.cfg.dtype))), None)


def with_actions(cfg: TextDiTConfig) -> DiTConfig:
    """Returns the same transformer with both action channels instead of text."""
    # By the base's fields: text_dim is not among them.
    fields: dict[str, Any] = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(DiTConfig)}
    fields["action_conditioning"] = "dual"
    return DiTConfig(**fields)


def text_dit_config(shapes: Mapping[str, Shape], heads: int | None = None) -> TextDiTConfig:
    """Returns the sizes of a text-conditioned file with ``wan`` names; heads as for ``world.weights.dit_config``.

    Raises:
      KeyError: naming a tensor that no such file can be without.
      ValueError: when the width does not make whole heads.
    """
    return TextDiTConfig(**dit_sizes(shapes, heads), text_dim=shapes["text_embedding.0.weight"][1])


def text_dit_config_of_diffusers(facts: Mapping[str, Any]) -> TextDiTConfig:
    """Returns the sizes that the ``config.json`` of a diffusers transformer gives.

    Raises:
      ValueError: for a variant with parts that this network does not have.
    """
    require(NAME, facts, {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "image_dim": None})
    require(NAME, facts, {"added_kv_proj_dim": None, "out_channels": facts.get("in_channels", 16)})
    heads, width = facts.get("num_attention_heads", 40), facts.get("attention_head_dim", 128)
    # Windows of one latent frame: patches never mix frames, each of which has its own noise level.
    time, patch, _ = facts.get("patch_size", (1, 2, 2))
    require(NAME, {"patch_size over time": time}, {"patch_size over time": 1})
    return TextDiTConfig(
        dim=heads * width,
        heads=heads,
        layers=facts.get("num_layers", 40),
        ffn=facts.get("ffn_dim", 13824),
        channels=facts.get("in_channels", 16),
        patch=patch,
        freq_dim=facts.get("freq_dim", 256),
        text_dim=facts.get("text_dim", 4096),
        eps=facts.get("eps", 1e-6),
    )


def diffusers_of_text_dit_config(cfg: TextDiTConfig) -> dict[str, Any]:
    """Returns the ``config.json`` of a diffusers transformer of these sizes."""
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": [1, cfg.patch, cfg.patch],
        "num_attention_heads": cfg.heads,
        "attention_head_dim": cfg.head_dim,
        "in_channels": cfg.channels,
        "out_channels": cfg.channels,
        "text_dim": cfg.text_dim,
        "freq_dim": cfg.freq_dim,
        "ffn_dim": cfg.ffn,
        "num_layers": cfg.layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": cfg.eps,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,  # of diffusers' table of angles; here they are computed
    }
