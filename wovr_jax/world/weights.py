"""The tables between Wan2.2's weights and ours: transformer and VAE, in every dialect of names in use.

A dialect is a column of the tables below:

* ``wan``: the original release and DiffSynth-Studio, which agree in every name. RLinf's fork
  adds the action MLPs ``action_mlp1`` (cross-attention) and ``action_mlp2`` (AdaLN) and has no
  ``text_embedding``;
* ``diffusers``: the folders ``transformer`` and ``vae`` of a converted pipeline.

Sources: Wan-Video/Wan2.2:wan/modules/model.py and vae2_2.py; huggingface/diffusers:
transformer_wan.py and autoencoder_kl_wan.py; DiffSynth-Studio-RLinf:diffsynth/models/wan_video_dit.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from wovr_jax.weights.table import Row, Table, require
from wovr_jax.weights.transforms import KERNEL, Flattened, Ones, Shape
from wovr_jax.world.dit import DiTConfig
from wovr_jax.world.vae.net import VAEConfig

NAME = "Wan2.2-TI2V-5B"
"""The release, for messages."""

DIALECTS = ("wan", "diffusers")

# ---------------------------------------------------------------- transformer

# fmt: off
_LINEARS = (
    # ours                    wan                        diffusers
    ("time_embedding/inner",  "time_embedding.0",        "condition_embedder.time_embedder.linear_1"),
    ("time_embedding/outer",  "time_embedding.2",        "condition_embedder.time_embedder.linear_2"),
    ("time_projection",       "time_projection.1",       "condition_embedder.time_proj"),
    ("head",                  "head.head",               "proj_out"),
    ("text_embedding/inner",  "text_embedding.0",        "condition_embedder.text_embedder.linear_1"),
    ("text_embedding/outer",  "text_embedding.2",        "condition_embedder.text_embedder.linear_2"),
    ("blocks/self_attn/q",    "blocks.<i>.self_attn.q",  "blocks.<i>.attn1.to_q"),
    ("blocks/self_attn/k",    "blocks.<i>.self_attn.k",  "blocks.<i>.attn1.to_k"),
    ("blocks/self_attn/v",    "blocks.<i>.self_attn.v",  "blocks.<i>.attn1.to_v"),
    ("blocks/self_attn/o",    "blocks.<i>.self_attn.o",  "blocks.<i>.attn1.to_out.0"),
    ("blocks/cross_attn/q",   "blocks.<i>.cross_attn.q", "blocks.<i>.attn2.to_q"),
    ("blocks/cross_attn/k",   "blocks.<i>.cross_attn.k", "blocks.<i>.attn2.to_k"),
    ("blocks/cross_attn/v",   "blocks.<i>.cross_attn.v", "blocks.<i>.attn2.to_v"),
    ("blocks/cross_attn/o",   "blocks.<i>.cross_attn.o", "blocks.<i>.attn2.to_out.0"),
    ("blocks/ffn/inner",      "blocks.<i>.ffn.0",        "blocks.<i>.ffn.net.0.proj"),
    ("blocks/ffn/outer",      "blocks.<i>.ffn.2",        "blocks.<i>.ffn.net.2"),
)
_VECTORS = (
    ("blocks/self_attn/norm_q/scale",   "blocks.<i>.self_attn.norm_q.weight",   "blocks.<i>.attn1.norm_q.weight"),
    ("blocks/self_attn/norm_k/scale",   "blocks.<i>.self_attn.norm_k.weight",   "blocks.<i>.attn1.norm_k.weight"),
    ("blocks/cross_attn/norm_q/scale",  "blocks.<i>.cross_attn.norm_q.weight",  "blocks.<i>.attn2.norm_q.weight"),
    ("blocks/cross_attn/norm_k/scale",  "blocks.<i>.cross_attn.norm_k.weight",  "blocks.<i>.attn2.norm_k.weight"),
    # The affine norm before cross-attention is the third of the original and the second of diffusers.
    ("blocks/cross_norm/scale",         "blocks.<i>.norm3.weight",              "blocks.<i>.norm2.weight"),
    ("blocks/cross_norm/bias",          "blocks.<i>.norm3.bias",                "blocks.<i>.norm2.bias"),
)
_TABLES = (
    ("blocks/modulation",  "blocks.<i>.modulation",  "blocks.<i>.scale_shift_table"),
    ("head_modulation",    "head.modulation",        "scale_shift_table"),
)
_ACTIONS = (
    # Only RLinf's fork has actions.
    ("action_cross/inner",  "action_mlp1.0"),
    ("action_cross/outer",  "action_mlp1.2"),
    ("action_adaln/inner",  "action_mlp2.0"),
    ("action_adaln/outer",  "action_mlp2.2"),
)
_TEXT = ("text_embedding.*", "condition_embedder.text_embedder.*")
_CROSS = (("blocks.<i>.cross_attn.*", "blocks.<i>.norm3.*"), ("blocks.<i>.attn2.*", "blocks.<i>.norm2.*"))
# fmt: on


def dit_table(cfg: DiTConfig, dialect: str = "wan", *, from_text: bool = False) -> Table:
    """Returns the rows of the transformer.

    Args:
      cfg: the network; ``bridge.text_dit`` has the released one's.
      dialect: column of names.
      from_text: the file is the text-conditioned network and ``cfg`` is not: the text path is
        dropped and the action modules are left fresh, to be filled with :func:`fresh`.
    """
    column = DIALECTS.index(dialect)
    names = [(ours, theirs[column]) for ours, *theirs in _LINEARS]
    # A row that no leaf takes is no fault, so one table serves every variant. Action modules that are to be made new
    # must have no row, though: the engine would not know which of the two to believe.
    if column == 0 and not from_text:
        names += _ACTIONS
    # Their patches are embedded by a convolution whose windows do not overlap, ours by a matrix: the same sum.
    patch = Flattened((cfg.channels, 1, cfg.patch, cfg.patch))
    rows = [Row("patch_embedding.weight", "patch_embedding/kernel", patch)]
    rows += [Row("patch_embedding.bias", "patch_embedding/bias")]
    rows += [row for ours, theirs in names for row in _weight_and_bias(theirs, ours)]
    rows += [Row(theirs[column], ours) for ours, *theirs in _VECTORS]
    # Modulation tables have an axis for the batch there: (1, 6, D) -> (6, D).
    rows += [Row(theirs[column], ours, Ones(before=1)) for ours, *theirs in _TABLES]
    if not from_text:
        return Table(f"the Wan2.2 transformer, {dialect} names", tuple(rows))
    dropped = {_TEXT[column]: "the text path: actions take its place"}
    if cfg.action_conditioning == "adaln":
        dropped |= dict.fromkeys(_CROSS[column], "this network has no cross-attention")
    new = {"action_*": "action modules, which a text-conditioned file does not have: newly initialised"}
    return Table(f"the text-conditioned Wan2.2 transformer, {dialect} names", tuple(rows), dropped, new)


def fresh(shapes: Mapping[str, Shape], seed: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """Yields action modules for a network that had none: Xavier-uniform kernels, zero biases, float32."""
    # By sorted path and with a generator for each leaf, so that one leaf is drawn at a time and always the same.
    for index, (path, shape) in enumerate(sorted(shapes.items())):
        # Xavier: the variance 2 / (inputs + outputs) is that of a uniform draw within sqrt(6 / (inputs + outputs)).
        bound = math.sqrt(6.0 / sum(shape)) if path.endswith("kernel") else 0.0
        yield path, np.random.default_rng([seed, index]).uniform(-bound, bound, shape).astype(np.float32)


def dit_sizes(shapes: Mapping[str, Shape], heads: int | None = None) -> dict[str, Any]:
    """Returns what a file with ``wan`` names tells of the transformer, whatever it is conditioned on.

    Heads are 128 wide, as in every release, unless their number is given.

    Raises:
      KeyError: naming a tensor that no such file can be without.
      ValueError: when the width does not make whole heads.
    """
    dim, channels, _, patch, _ = shapes["patch_embedding.weight"]  # (D, c, 1, patch, patch)
    if heads is None and dim % 128:
        raise ValueError(f"width {dim} does not make heads of 128; say how many heads the network has")
    return {
        "dim": dim,
        "heads": heads or dim // 128,
        "layers": 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")),
        "ffn": shapes["blocks.0.ffn.0.bias"][0],
        "channels": channels,
        "patch": patch,
        "freq_dim": shapes["time_embedding.0.weight"][1],
    }


def dit_config(shapes: Mapping[str, Shape], heads: int | None = None) -> DiTConfig:
    """Returns the config of a file with ``wan`` names and actions.

    Raises:
      KeyError, ValueError: as :func:`dit_sizes`.
    """
    parts = {"cross": "action_mlp1.0.weight", "adaln": "action_mlp2.0.weight"}
    held = [part for part, name in parts.items() if name in shapes]
    conditioning = held[0] if len(held) == 1 else "dual"
    sizes: dict[str, Any] = dit_sizes(shapes, heads) | {"action_conditioning": conditioning}
    if conditioning != "adaln":
        return DiTConfig(**sizes, action_dim=shapes[parts["cross"]][1])
    # The AdaLN channel takes the actions of all frames of a latent at once.
    return DiTConfig(**sizes, action_dim=shapes[parts["adaln"]][1] // DiTConfig.frames_per_latent)


# ---------------------------------------------------------------- VAE

# fmt: off
_BLOCK = (
    # ours       wan            diffusers
    ("conv1",    "residual.2",  "conv1"),
    ("conv2",    "residual.6",  "conv2"),
    ("shortcut", "shortcut",    "conv_shortcut"),
)
_BLOCK_NORMS = (
    ("norm1",    "residual.0",  "norm1"),
    ("norm2",    "residual.3",  "norm2"),
)
_HALF = (
    # of the encoder and of the decoder
    ("conv_in",             "conv1",            "conv_in"),
    ("conv_out",            "head.2",           "conv_out"),
    ("mid/attention/qkv",   "middle.1.to_qkv",  "mid_block.attentions.0.to_qkv"),
    ("mid/attention/proj",  "middle.1.proj",    "mid_block.attentions.0.proj"),
)
_MIDDLE = (
    ("mid/res0",            "middle.0",         "mid_block.resnets.0"),
    ("mid/res1",            "middle.2",         "mid_block.resnets.1"),
)
# {n} is where a level's resampling stands in the original: after its residual blocks.
_LEVEL = {
    "encoder": ("down/<d>", "downsamples.<d>.downsamples.{n}", "down_blocks.<d>.downsampler"),
    "decoder": ("up/<d>",   "upsamples.<d>.upsamples.{n}",     "up_blocks.<d>.upsampler"),
}
_LEVEL_BLOCK = {
    "encoder": ("down/<d>/res/<r>", "downsamples.<d>.downsamples.<r>", "down_blocks.<d>.resnets.<r>"),
    "decoder": ("up/<d>/res/<r>",   "upsamples.<d>.upsamples.<r>",     "up_blocks.<d>.resnets.<r>"),
}
# fmt: on


def vae_table(cfg: VAEConfig, dialect: str = "wan") -> Table:
    """Returns the rows of the VAE."""
    column = DIALECTS.index(dialect)
    rows = [
        *_weight_and_bias(("conv1", "quant_conv")[column], "quant"),
        *_weight_and_bias(("conv2", "post_quant_conv")[column], "post_quant"),
    ]
    # The decoder has one residual block more at each level.
    for half, blocks in (("encoder", cfg.res_blocks), ("decoder", cfg.res_blocks + 1)):
        rows += [
            row for ours, *theirs in _HALF for row in _weight_and_bias(f"{half}.{theirs[column]}", f"{half}/{ours}")
        ]
        for ours, *theirs in (*_MIDDLE, _LEVEL_BLOCK[half]):
            rows += _residual_block(f"{half}.{theirs[column]}", f"{half}/{ours}", column)
        ours, *theirs = _LEVEL[half]
        level = f"{half}.{theirs[column]}".format(n=blocks)
        rows += _weight_and_bias(f"{level}.resample.1", f"{half}/{ours}/resample")
        rows += _weight_and_bias(f"{level}.time_conv", f"{half}/{ours}/time_conv")
        rows += [Row(f"{half}.{('head.0', 'norm_out')[column]}.gamma", f"{half}/norm_out/gamma", Ones(after=3))]
        norm = ("middle.1.norm", "mid_block.attentions.0.norm")[column]
        rows += [Row(f"{half}.{norm}.gamma", f"{half}/mid/attention/norm/gamma", Ones(after=2))]  # planar: one less
    return Table(f"the Wan2.2 VAE, {dialect} names", tuple(rows))


def vae_config(shapes: Mapping[str, Shape]) -> VAEConfig:
    """Reads the sizes off a file with ``wan`` names; latent statistics are the release's, if it has as many channels.

    Raises:
      KeyError: naming a tensor that no such file can be without.
    """
    encoder_dim, inputs, *_ = shapes["encoder.conv1.weight"]
    first = "encoder.downsamples.{}.downsamples.{}.residual.2.weight"
    levels = _count(shapes, lambda level: first.format(level, 0))
    blocks = _count(shapes, lambda block: first.format(0, block))
    # Only a level that halves time has a convolution over it.
    halving = f"encoder.downsamples.{{}}.downsamples.{blocks}.time_conv.weight"
    z_dim, release = shapes["conv2.weight"][0], VAEConfig.wan2_2()
    statistics = (release.latent_mean, release.latent_std) if z_dim == release.z_dim else ((), ())
    return VAEConfig(
        patch=math.isqrt(inputs // 3),  # three colours of patch x patch pixels
        encoder_dim=encoder_dim,
        decoder_dim=shapes["decoder.head.0.gamma"][0],
        z_dim=z_dim,
        dim_mult=tuple(shapes[first.format(level, 0)][0] // encoder_dim for level in range(levels)),
        res_blocks=blocks,
        temporal_down=tuple(halving.format(level) in shapes for level in range(levels - 1)),
        latent_mean=statistics[0],
        latent_std=statistics[1],
    )


def vae_config_of_diffusers(facts: Mapping[str, Any]) -> VAEConfig:
    """Reads the sizes that the ``config.json`` of a diffusers AutoencoderKLWan gives.

    Raises:
      ValueError: for a variant with other parts, such as the VAE of Wan2.1.
    """
    require(NAME, facts, {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12})
    require(NAME, {"attn_scales": list(facts.get("attn_scales", []))}, {"attn_scales": []})
    return VAEConfig(
        encoder_dim=facts["base_dim"],
        decoder_dim=facts.get("decoder_base_dim") or facts["base_dim"],
        z_dim=facts["z_dim"],
        dim_mult=tuple(facts["dim_mult"]),
        res_blocks=facts["num_res_blocks"],
        temporal_down=tuple(facts["temperal_downsample"]),  # spelt so
        latent_mean=tuple(facts["latents_mean"]),
        latent_std=tuple(facts["latents_std"]),
    )


def diffusers_of_vae_config(cfg: VAEConfig) -> dict[str, Any]:
    """Returns the ``config.json`` of a diffusers AutoencoderKLWan of these sizes."""
    return {
        "_class_name": "AutoencoderKLWan",
        "base_dim": cfg.encoder_dim,
        "decoder_base_dim": cfg.decoder_dim,
        "z_dim": cfg.z_dim,
        "dim_mult": list(cfg.dim_mult),
        "num_res_blocks": cfg.res_blocks,
        "attn_scales": [],
        "temperal_downsample": list(cfg.temporal_down),
        "dropout": 0.0,
        "is_residual": True,
        "in_channels": cfg.channels * cfg.patch**2,
        "out_channels": cfg.channels * cfg.patch**2,
        "patch_size": cfg.patch,
        "scale_factor_temporal": cfg.time,
        "scale_factor_spatial": cfg.space,
        "latents_mean": list(cfg.latent_mean or (0.0,) * cfg.z_dim),
        "latents_std": list(cfg.latent_std or (1.0,) * cfg.z_dim),
    }


# ---------------------------------------------------------------- both


def _weight_and_bias(theirs: str, ours: str) -> tuple[Row, Row]:
    return Row(f"{theirs}.weight", f"{ours}/kernel", KERNEL), Row(f"{theirs}.bias", f"{ours}/bias")


def _residual_block(theirs: str, ours: str, column: int) -> list[Row]:
    convolutions = [(f"{theirs}.{names[column]}", f"{ours}/{name}") for name, *names in _BLOCK]
    norms = [
        Row(f"{theirs}.{names[column]}.gamma", f"{ours}/{name}/gamma", Ones(after=3)) for name, *names in _BLOCK_NORMS
    ]
    return [row for pair in convolutions for row in _weight_and_bias(*pair)] + norms


def _count(names: Mapping[str, Any], name: Callable[[int], str]) -> int:
    """Counts ``name(0)``, ``name(1)``, ... until one is not there."""
    return next(n for n in itertools.count() if name(n) not in names)
