"""The table between OpenVLA-OFT's weights, as Hugging Face folders hold them, and ours.

The names are those of the release: ``vision_backbone.featurizer`` is DINOv2 and
``vision_backbone.fused_featurizer`` SigLIP, in timm's names (only DINOv2's LayerScale is called
``scale_factor``), then ``projector`` and ``language_model``. Source:
moojink/openvla-oft:prismatic/extern/hf/modeling_prismatic.py.

Features are those of the second-to-last block, so the last block of each tower, its final norm
and SigLIP's attention pool never reach the policy. They are no leaves here, but a folder without
them would not load in torch: they are kept, and written back as they were.

The projector of the robot's state lies in a file of its own (``bridge.state_projector``) and has rows where the config
asks for it. What the discrete recipe does not have, this table refuses: FiLM, action and value heads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from wovr_jax.nn.lora import DOWN, UP
from wovr_jax.policy.backbones import IMAGENET_MEAN, IMAGENET_STD, LlamaConfig, TowerConfig
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.weights.table import Row, Table, require
from wovr_jax.weights.transforms import KERNEL, Shape

NAME = "OpenVLA-OFT"
"""The release, for messages."""

DINO, SIGLIP, LLM = "vision_backbone.featurizer", "vision_backbone.fused_featurizer", "language_model.model"
STATE = "proprio_projector"
PEFT = "base_model.model."
"""What PEFT puts before the name of every module."""

# fmt: off
_TOWER_LINEARS = (
    # ours    theirs, below blocks.<i>
    ("qkv",   "attn.qkv"),   # rows are q, k, v, heads in order within each, as our columns
    ("proj",  "attn.proj"),
    ("fc1",   "mlp.fc1"),
    ("fc2",   "mlp.fc2"),
)
_LLM_LINEARS = (
    # ours    theirs, below layers.<i>; rotary halves are in the same order
    ("q",     "self_attn.q_proj"),
    ("k",     "self_attn.k_proj"),
    ("v",     "self_attn.v_proj"),
    ("o",     "self_attn.o_proj"),
    ("gate",  "mlp.gate_proj"),
    ("up",    "mlp.up_proj"),
    ("down",  "mlp.down_proj"),
)
_LLM_NORMS = (
    ("norm1", "input_layernorm"),
    ("norm2", "post_attention_layernorm"),
)
# fmt: on

_DINO_CLS = 1
"""Prefix tokens that are the class token; registers follow it."""


def vla_table(cfg: VLAConfig) -> Table:
    """Returns the rows of the policy, and the shapes of what the release has and the policy does not use."""
    rows = [*_tower_rows("dino", DINO), *_tower_rows("siglip", SIGLIP)]
    rows += [
        # The class token and the registers go before the patches together: (1, 1, D) and (1, 4, D) -> (1, 5, D).
        Row(f"{DINO}.cls_token", "dino/prefix", part=(0, _DINO_CLS)),
        Row(f"{DINO}.reg_token", "dino/prefix", part=(_DINO_CLS, None)),
        *(Row(f"{DINO}.blocks.<i>.ls{k}.scale_factor", f"dino/blocks/ls{k}") for k in (1, 2)),
    ]
    rows += [row for k in (1, 2, 3) for row in _weight_and_bias(f"projector.fc{k}", f"projector/fc{k}")]
    rows += [
        Row(f"{LLM}.layers.<i>.{theirs}.weight", f"llm/blocks/{ours}/kernel", KERNEL) for ours, theirs in _LLM_LINEARS
    ]
    rows += [Row(f"{LLM}.layers.<i>.{theirs}.weight", f"llm/blocks/{ours}/scale") for ours, theirs in _LLM_NORMS]
    rows += [
        Row(f"{LLM}.embed_tokens.weight", "llm/embed/embedding"),
        Row(f"{LLM}.norm.weight", "llm/norm/scale"),
        Row("language_model.lm_head.weight", "llm/head/kernel", KERNEL),
    ]
    if cfg.proprio:
        rows += [row for k in (1, 2) for row in _weight_and_bias(f"{STATE}.fc{k}", f"proprio/fc{k}")]
    return Table(NAME, tuple(rows), kept=dict(_unused(cfg)))


def adapter_table(cfg: VLAConfig, rank: int = 0, names: Collection[str] = ()) -> Table:
    """Returns the rows of LoRA adapters as PEFT names them.

    Of the layers that the policy does not run, adapters are kept as the layers are: those of ``rank`` that a file
    with these ``names`` has.
    """
    rows, kept = [], {}
    for row in vla_table(cfg).rows:
        # Every linear layer may have an adapter, and linear layers are what has a kernel.
        if row.transform is KERNEL:
            theirs, ours = row.theirs.removesuffix(".weight"), row.ours.removesuffix("kernel")
            rows += [
                Row(f"{PEFT}{theirs}.lora_A.weight", f"{ours}{DOWN}", KERNEL),
                Row(f"{PEFT}{theirs}.lora_B.weight", f"{ours}{UP}", KERNEL),
            ]
    for layer, (outputs, inputs) in unused_layers(cfg).items():
        # a: (r, inputs), b: (outputs, r), as torch lays out the weights of two linear layers
        pair = {f"{PEFT}{layer}.lora_A.weight": (rank, inputs), f"{PEFT}{layer}.lora_B.weight": (outputs, rank)}
        kept |= pair if pair.keys() & set(names) else {}
    head = {f"{PEFT}language_model.lm_head.base_layer.weight": "the head itself, which PEFT saves beside its adapter"}
    return Table("LoRA adapters of OpenVLA-OFT", tuple(rows), head, kept=kept)


def unused_layers(cfg: VLAConfig) -> dict[str, Shape]:
    """Returns the linear layers of a release that reach no action: name -> shape of the weight."""
    # Norms have weights of one axis, and the pool's latent token is called no weight.
    linear = {name: shape for name, shape in _unused(cfg) if name.endswith(".weight") and len(shape) == 2}
    return {name.removesuffix(".weight"): shape for name, shape in linear.items()}


def vla_config(
    shapes: Mapping[str, Shape],
    described: Mapping[str, Any],
    *,
    heads: int | None = None,
    dtype: Any = "bfloat16",  # both come from outside, and the config checks them
    recipe: Any = "rlinf",
    images: int = 1,
) -> VLAConfig:
    """Reads the policy's config off the shapes of its tensors and ``config.json``.

    Args:
      shapes: of all tensors.
      described: ``config.json``; what it leaves out are defaults of transformers 4.40.1, which wrote it.
      heads: of both towers, where they are not those of the release.
      dtype: in which matrix products are run.
      recipe, images: as in ``VLAConfig``; nothing in a folder tells them.

    Raises:
      KeyError: naming a tensor that no such folder can be without.
      ValueError: for a variant with other parts, or heads that nothing tells.
    """
    require(NAME, described, {"model_type": "openvla", "use_fused_vision_backbone": True, "n_action_bins": 256})
    require(NAME, described, {"arch_specifier": "no-align+fused-gelu-mlp", "image_resize_strategy": "resize-naive"})
    # What is required here are parts that this network has no layer for: such a folder would load and act wrongly.
    text = described.get("text_config") or {}
    rope = text.get("rope_parameters") or {}  # where transformers 5 keeps what 4.40.1 has beside it
    rows, width = shapes[f"{LLM}.embed_tokens.weight"]
    llm_heads = text.get("num_attention_heads", 32)
    require(NAME, text, {"model_type": "llama", "hidden_act": "silu", "num_key_value_heads": llm_heads})
    require(NAME, text, {"rope_scaling": None, "attention_bias": False, "tie_word_embeddings": False})
    require(NAME, text, {"vocab_size": rows, "head_dim": width // llm_heads, "mlp_bias": False})
    require(NAME, rope, {"rope_type": "default"})
    depth, mlp = _depth(shapes, f"{LLM}.layers."), shapes[f"{LLM}.layers.0.mlp.gate_proj.weight"][0]
    require(NAME, text, {"hidden_size": width, "num_hidden_layers": depth, "intermediate_size": mlp})
    require(NAME, text, {"sliding_window": None, "pretraining_tp": 1, "quantization_config": None})
    require(NAME, described, {"timm_override_act_layers": [None, None], "quantization_config": None})
    require(NAME, described, {"use_film": False, "use_diffusion": False, "use_l1_regression": False})
    if width % llm_heads:
        raise ValueError(f"the language model's width {width} does not make {llm_heads} heads")
    llm = LlamaConfig(
        rows=rows,
        width=width,
        depth=depth,
        heads=llm_heads,
        mlp=mlp,
        rope_theta=text.get("rope_theta", rope.get("rope_theta", 10000.0)),
        eps=text.get("rms_norm_eps", 1e-6),
        remat=True,
        dtype=dtype,
    )
    prefix = _DINO_CLS + shapes[f"{DINO}.reg_token"][1]
    dino = _tower(shapes, DINO, TowerConfig.dinov2_large(dtype), heads)
    dino = dataclasses.replace(dino, prefix=prefix, layer_scale=True, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    siglip = _tower(shapes, SIGLIP, TowerConfig.siglip_so400m(dtype), heads)
    return VLAConfig(
        dino,
        siglip,
        llm,
        # As the release counts: action tokens are the last 256 before the rows that padding added to the table.
        vocab_size=rows - described.get("pad_to_multiple_of", 64),
        recipe=recipe,
        pad=described.get("pad_token_id", 32000),
        stop=text.get("eos_token_id", 2),
        images=images,
        # (width, state dimensions); a policy that takes no state has no projector
        proprio=shapes.get(f"{STATE}.fc1.weight", (0, 0))[1],
    )


def _tower(shapes: Mapping[str, Shape], theirs: str, release: TowerConfig, heads: int | None) -> TowerConfig:
    """Returns a tower's sizes; the release's heads where it has the release's width."""
    # (D, 3, patch, patch) of the convolution that embeds patches
    width, _, patch, _ = shapes[f"{theirs}.patch_embed.proj.weight"]
    # Attention's weights are D x D whatever the heads: their number leaves no trace in a file.
    if heads is None and width != release.width:
        raise ValueError(f"{theirs} is {width} wide, not {release.width}; say how many heads its attention has")
    if heads not in (None, release.heads) and width == release.width:
        raise ValueError(f"{theirs} is a release's, with {release.heads} heads, not {heads}; leave --heads away")
    return TowerConfig(
        # (1, patches, D): pictures are square
        image=patch * math.isqrt(shapes[f"{theirs}.pos_embed"][1]),
        patch=patch,
        width=width,
        depth=_depth(shapes, f"{theirs}.blocks."),
        heads=release.heads if width == release.width else heads or 0,
        mlp=shapes[f"{theirs}.blocks.0.mlp.fc1.weight"][0],
        remat=True,
        dtype=release.dtype,
    )


def _tower_rows(ours: str, theirs: str) -> Iterator[Row]:
    yield Row(f"{theirs}.pos_embed", f"{ours}/pos_embed")
    yield from _weight_and_bias(f"{theirs}.patch_embed.proj", f"{ours}/patch_embed")
    for name, module in _TOWER_LINEARS:
        yield from _weight_and_bias(f"{theirs}.blocks.<i>.{module}", f"{ours}/blocks/{name}")
    for norm in ("norm1", "norm2"):
        yield Row(f"{theirs}.blocks.<i>.{norm}.weight", f"{ours}/blocks/{norm}/scale")
        yield Row(f"{theirs}.blocks.<i>.{norm}.bias", f"{ours}/blocks/{norm}/bias")


def _weight_and_bias(theirs: str, ours: str) -> tuple[Row, Row]:
    return Row(f"{theirs}.weight", f"{ours}/kernel", KERNEL), Row(f"{theirs}.bias", f"{ours}/bias")


def _unused(cfg: VLAConfig) -> Iterator[tuple[str, Shape]]:
    """Yields names and shapes of what is in a release and reaches no action."""
    for theirs, tower in ((DINO, cfg.dino), (SIGLIP, cfg.siglip)):
        # The features are those of the block before the last.
        width, mlp, block = tower.width, tower.mlp, f"{theirs}.blocks.{tower.depth - 1}"
        yield from _shapes_of_norm(f"{block}.norm1", width)
        yield from _shapes_of_linear(f"{block}.attn.qkv", width, 3 * width)
        yield from _shapes_of_linear(f"{block}.attn.proj", width, width)
        yield from _shapes_of_norm(f"{block}.norm2", width)
        yield from _shapes_of_linear(f"{block}.mlp.fc1", width, mlp)
        yield from _shapes_of_linear(f"{block}.mlp.fc2", mlp, width)
        if tower.layer_scale:
            yield from ((f"{block}.ls{k}.scale_factor", (width,)) for k in (1, 2))
        yield from _shapes_of_norm(f"{theirs}.norm", width)
    # timm builds SigLIP with its attention pool, which makes one vector of a picture; the policy takes the patches.
    pool, width, mlp = f"{SIGLIP}.attn_pool", cfg.siglip.width, cfg.siglip.mlp
    yield f"{pool}.latent", (1, 1, width)
    yield from _shapes_of_linear(f"{pool}.q", width, width)
    yield from _shapes_of_linear(f"{pool}.kv", width, 2 * width)
    yield from _shapes_of_linear(f"{pool}.proj", width, width)
    yield from _shapes_of_norm(f"{pool}.norm", width)
    yield from _shapes_of_linear(f"{pool}.mlp.fc1", width, mlp)
    yield from _shapes_of_linear(f"{pool}.mlp.fc2", mlp, width)


def _shapes_of_linear(name: str, width_in: int, width_out: int) -> tuple[tuple[str, Shape], ...]:
    return (f"{name}.weight", (width_out, width_in)), (f"{name}.bias", (width_out,))


def _shapes_of_norm(name: str, width: int) -> tuple[tuple[str, Shape], ...]:
    return (f"{name}.weight", (width,)), (f"{name}.bias", (width,))


def _depth(shapes: Mapping[str, Shape], stem: str) -> int:
    # The number of blocks is the largest in the names, and one more.
    return 1 + max((int(name[len(stem) :].split(".")[0]) for name in shapes if name.startswith(stem)), default=-1)
