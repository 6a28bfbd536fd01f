"""Which file is which: formats of weights by the names in them, and the config and table of each."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from wovr_jax.bridge.text_dit import TextDiT, TextDiTConfig, text_dit_config, text_dit_config_of_diffusers
from wovr_jax.nn.functional import Pure
from wovr_jax.policy import vla
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.policy.weights import vla_config, vla_table
from wovr_jax.reward import classifier
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.reward.weights import reward_config, reward_table
from wovr_jax.weights.native import flatten
from wovr_jax.weights.safetensors import FileError
from wovr_jax.weights.source import Source
from wovr_jax.weights.table import Table, require
from wovr_jax.weights.transforms import Shape
from wovr_jax.world import weights
from wovr_jax.world.dit import DiT, DiTConfig
from wovr_jax.world.vae.net import VAE, VAEConfig


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
      part: network it is for: "dit", "vae", "policy" or "reward".
      name: who writes it: "wan", "rlinf", "diffusers" or "openvla".
      mark: a name that only this kind of file has.
      file: what such a file is called.
    """

    part: str
    name: str
    mark: str
    file: str

    @property
    def is_text(self) -> bool:
        """Whether it holds a transformer conditioned on text."""
        return self.part == "dit" and self.name != "rlinf"

    def __str__(self) -> str:
        return f"{self.part} ({self.name})"


RELEASED_HEADS = {1536: 12, 3072: 24, 5120: 40}
"""Width of a released Wan transformer -> its heads. No tensor tells how many there are."""

# The first whose mark is found is the format; RLinf's transformer has the names of Wan's and more.
FORMATS = (
    Format("dit", "rlinf", r"action_mlp\d\.", "model-00001.safetensors"),
    Format("dit", "diffusers", r"condition_embedder\.|blocks\.\d+\.attn1\.", "diffusion_pytorch_model.safetensors"),
    Format("dit", "wan", r"text_embedding\.|blocks\.\d+\.self_attn\.", "diffusion_pytorch_model.safetensors"),
    Format("vae", "wan", r"encoder\.downsamples\.|decoder\.upsamples\.", "Wan2.2_VAE.pth"),
    Format("vae", "diffusers", r"(en|de)coder\.(down|up)_blocks\.", "diffusion_pytorch_model.safetensors"),
    Format("policy", "openvla", r"vision_backbone\.(fused_)?featurizer\.", "model.safetensors"),
    Format("reward", "rlinf", r"(net|visual_encoder)\.\d+\.\d+\.", "resnet_rm.pth"),
)


def detect(source: Source) -> Format:
    """Recognises the format of a file.

    Raises:
      FileError: when no name in it is known.
    """
    # By names alone: sizes differ between releases, and metadata are missing in most files.
    for kind in FORMATS:
        if any(re.match(kind.mark, name) for name in source.facts):
            return kind
    shown = ", ".join(list(source.facts)[:3]) or "none"
    known = ", ".join(map(str, FORMATS))
    raise FileError(
        f"{source.name}: not a known kind of weights. Known are {known}; the first names in it are {shown}."
        f"{_parts(source)}"
    )


def _parts(source: Source) -> str:
    """Says under which parts the names of an unknown file fall, where one of them is a network that is known."""
    # A generator beside its average, a student beside its teacher: which one is meant, no file tells.
    groups = collections.Counter(name.partition(".")[0] for name in source.facts)
    inner = (name.partition(".")[2] for name in source.facts)
    if not any(re.match(kind.mark, name) for name in inner for kind in FORMATS):
        return ""
    listed = ", ".join(f"{group}. ({count})" for group, count in groups.most_common(8))
    return f" They fall into {listed}: save the one that is meant alone, without the others."


def named(cfg: Any, name: str) -> Format:
    """Returns the format ``name`` of the network that ``cfg`` describes.

    Raises:
      FileError: there is none, or it cannot hold this variant.
    """
    part = part_of(cfg)
    kinds = {kind.name: kind for kind in FORMATS if kind.part == part}
    if name not in kinds:
        raise FileError(f"{part} has no format {name!r}; it has {', '.join(kinds)}.")
    is_text = isinstance(cfg, TextDiTConfig)
    # The same layers, but no format has a place for the other's way to condition them.
    if part == "dit" and kinds[name].is_text != is_text:
        conditioned, right = ("text", "wan or diffusers") if is_text else ("actions", "rlinf")
        raise FileError(f"a transformer conditioned on {conditioned} has no place in format {name!r}; use {right}.")
    return kinds[name]


def config_of(source: Source, kind: Format, heads: int | None = None, recipe: str = "rlinf", images: int = 1) -> Any:
    """Reads the network's config, from ``config.json`` where the format has one and from shapes where not.

    ``heads``, ``recipe`` and ``images`` are what no file tells: attention heads of unusual sizes, the policy's stop
    token, and how many pictures it sees.

    Raises:
      FileError: the file lacks what tells the sizes.
    """
    try:
        if kind.name == "diffusers":
            if source.config is None:
                raise FileError(f"{source.name}: config.json of the diffusers folder is missing beside it.")
            if kind.part == "vae":
                return weights.vae_config_of_diffusers(source.config)
            cfg = text_dit_config_of_diffusers(source.config)
            return _refuse_heads(source, cfg, heads)
        if kind.part == "policy":
            if source.config is None:
                raise FileError(
                    f"{source.name}: config.json of the OpenVLA folder is missing beside it. A trainer that leaves "
                    "weights alone (RLinf's full_weights.pt) wants them put into the folder of the model it began with."
                )
            # What torch computes in is the dtype of the weights; the head is in it wherever some norms are not.
            dtype = _float_of(source, "language_model.lm_head.weight")
            return vla_config(source.shapes, source.config, heads=heads, dtype=dtype, recipe=recipe, images=images)
        if kind.part == "dit":
            make = weights.dit_config if kind.name == "rlinf" else text_dit_config
            cfg = make(source.shapes, heads or _heads(source))
            return _refuse_heads(source, _numerics(_described(cfg, source), source, kind), heads)
        return weights.vae_config(source.shapes) if kind.part == "vae" else reward_config(source.shapes)
    except FileError:  # a ValueError, but it says all there is to say
        raise
    except (KeyError, ValueError, TypeError, ZeroDivisionError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise FileError(f"{source.name}: looks like {kind}, but its sizes cannot be told: {what}.") from error


def table_of(cfg: Any, kind: Format, *, from_text: bool = False) -> Table:
    """Returns the rows between ``kind`` and the network of ``cfg``; ``from_text`` as in ``weights.dit_table``."""
    dialect = "diffusers" if kind.name == "diffusers" else "wan"
    if kind.part == "dit":
        return weights.dit_table(cfg, dialect, from_text=from_text)
    if kind.part == "policy":
        return vla_table(cfg)
    return weights.vae_table(cfg, dialect) if kind.part == "vae" else reward_table(cfg)


def network(cfg: Any) -> Pure:
    """Returns the network of a config, without weights."""
    if isinstance(cfg, TextDiTConfig):
        return Pure(lambda rngs: TextDiT(cfg, rngs=rngs))
    if isinstance(cfg, DiTConfig):
        return Pure(lambda rngs: DiT(cfg, rngs=rngs))
    if isinstance(cfg, VLAConfig):
        return vla.network(cfg)
    return Pure(lambda rngs: VAE(cfg, rngs=rngs)) if isinstance(cfg, VAEConfig) else classifier.network(cfg)


def shapes(cfg: Any) -> dict[str, Shape]:
    """Returns path and shape of every leaf of the network."""
    return {path: tuple(leaf.shape) for path, leaf in flatten(network(cfg).shapes()).items()}


def part_of(cfg: Any) -> str:
    """Returns the name of the network that a config describes.

    Raises:
      FileError: nobody else has such a network.
    """
    # A subclass counts as its base, so TextDiTConfig is a "dit" as well.
    parts: Iterable[tuple[type, str]] = (
        (DiTConfig, "dit"),
        (VAEConfig, "vae"),
        (VLAConfig, "policy"),
        (RewardConfig, "reward"),
    )
    for cls, part in parts:
        if isinstance(cfg, cls):
            return part
    raise FileError(f"{type(cfg).__name__} has no outside format.")


def _heads(source: Source) -> int | None:
    """Returns the number of heads as an original ``config.json`` gives it, or as a release of that width has them."""
    told = (source.config or {}).get("num_heads")
    return told or RELEASED_HEADS.get(source.facts["patch_embedding.weight"].shape[0])


def _refuse_heads(source: Source, cfg: DiTConfig, asked: int | None) -> DiTConfig:
    """Returns ``cfg``, unless the heads that were asked for are others than a file or a release says.

    Any number that divides the width would load, and attend to something else.
    """
    facts = source.config or {}
    told = {"config.json beside it": facts.get("num_heads") or facts.get("num_attention_heads")}
    told |= {f"a release of width {cfg.dim}": RELEASED_HEADS.get(cfg.dim)}
    says, heads = next(((who, count) for who, count in told.items() if count), ("", 0))
    if asked and heads and asked != heads:
        raise FileError(f"{source.name}: --heads {asked}, but {says} has {heads}. Leave --heads away.")
    return cfg


def _described(cfg: DiTConfig, source: Source) -> DiTConfig:
    """Returns ``cfg`` with what only an original ``config.json`` tells; sizes that it gives must be the file's.

    Raises:
      ValueError: naming every size that differs.
    """
    facts = source.config or {}
    sizes = {"dim": cfg.dim, "ffn_dim": cfg.ffn, "num_layers": cfg.layers, "in_dim": cfg.channels}
    sizes |= {"out_dim": cfg.channels, "freq_dim": cfg.freq_dim, "qk_norm": True}
    sizes |= {"patch_size": [1, cfg.patch, cfg.patch], "cross_attn_norm": True, "window_size": [-1, -1]}
    require("the weights beside it", facts, sizes)
    return dataclasses.replace(cfg, eps=facts.get("eps", cfg.eps))


def _float_of(source: Source, name: str) -> str:
    """Returns the dtype of a tensor, float32 where it is none that products are run in; the plan refuses those."""
    dtype = source.facts[name].dtype.name
    return dtype if dtype in ("bfloat16", "float16") else "float32"


def _numerics(cfg: DiTConfig, source: Source, kind: Format) -> DiTConfig:
    """Returns ``cfg`` with the dtypes in which the weights want to be run."""
    dtype = source.facts["patch_embedding.weight"].dtype.name
    if dtype != "bfloat16":
        return cfg
    # Weights in bfloat16 were trained in it. RLinf's training rounded the time embedding too, so its weights expect
    # the rounded one.
    sinusoid = "bfloat16" if kind.name == "rlinf" else cfg.sinusoid_dtype
    return dataclasses.replace(cfg, dtype=dtype, residual_dtype=dtype, sinusoid_dtype=sinusoid)
