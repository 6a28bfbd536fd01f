"""What an import believed and no file proves, and what in a release looks odd: said in sentences, never in silence.

A release holds more than its weights: a head that the actions come from, statistics, how pictures were prepared. What
of it the policy here does not use, or uses in another way, is a warning; ``launch/import_weights.py --strict`` makes
refusals of them.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wovr_jax.bridge import rest, strangers
from wovr_jax.bridge.formats import RELEASED_HEADS, Format
from wovr_jax.data import naming
from wovr_jax.policy.backbones import TowerConfig
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.weights.safetensors import FileError
from wovr_jax.weights.source import Source
from wovr_jax.world.dit import DiTConfig

MODULES = {
    "action_head--*": "the actions of this policy come from that head; the language model's action tokens, which "
    "are what runs here, were then never trained: expect no success",
    "noisy_action_projector--*": "this policy makes its actions by diffusion, which the network here does not",
    "vision_backbone--*": "FiLM: the vision towers were trained with layers that the network here does not have",
    "proprio_projector--*": "this policy was trained on the robot's state, which --state would give it",
    "value_head*": "a critic, which the network here has no place for",
    "*": "weights that no part here uses",
}
"""File beside the weights -> what it means that it is there; the first pattern that fits counts."""

STATISTICS, PROCESSOR = "dataset_statistics.json", "preprocessor_config.json"

READ = {
    "architectures",
    "model_type",
    "arch_specifier",
    "auto_map",
    "image_resize_strategy",
    "use_fused_vision_backbone",
    "n_action_bins",
    "pad_token_id",
    "pad_to_multiple_of",
    "text_config",
    "norm_stats",
    "image_sizes",
    "torch_dtype",
    "dtype",
    "vision_backbone_id",
    "timm_override_act_layers",
    "quantization_config",
    "use_film",
    "use_diffusion",
    "use_l1_regression",
}
"""Settings in ``config.json`` of a policy that are read or compared."""
INERT = {
    "_name_or_path",
    "transformers_version",
    "llm_backbone_id",
    "hf_llm_id",
    "timm_model_ids",
    "llm_max_length",
    "id2label",
    "label2id",
    "use_cache",
    "return_dict",
    "attn_implementation",
    "_attn_implementation_autoset",
    "problem_type",
    "output_hidden_states",
    "output_attentions",
    "is_encoder_decoder",
    "is_decoder",
    "chunk_size_feed_forward",
    "bos_token_id",
    "eos_token_id",
    "_commit_hash",
    "torchscript",
    "tie_word_embeddings",
}
"""Settings that change nothing about what the policy answers."""


@dataclasses.dataclass(frozen=True)
class Beliefs:
    """Sentences: ``notes`` on what was believed and why, ``warnings`` on what looks odd."""

    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __add__(self, other: Beliefs) -> Beliefs:
        return Beliefs(self.notes + other.notes, self.warnings + other.warnings)


def of_source(source: Source, kind: Format, cfg: Any, asked: int | None) -> Beliefs:
    """Returns what the names, the header and the number of heads gave to believe; ``asked`` is of the command line."""
    notes, warnings = [*source.notes], [*source.warnings]
    if source.prefix:
        notes += [f"names begin with {source.prefix!r}, which is put back on export"]
    told = (source.config or {}).get("num_heads") or kind.name == "diffusers"
    if isinstance(cfg, DiTConfig) and not told and cfg.dim not in RELEASED_HEADS:
        why = "--heads says so" if asked else "heads of releases are 128 wide"
        warnings += [
            f"{cfg.heads} attention heads are believed because {why}; the file does not tell, and another number "
            'would load too. A config.json beside it with "num_heads" would settle it'
        ]
    return Beliefs(tuple(notes), tuple(warnings))


def of_policy(source: Source, cfg: VLAConfig, folder: pathlib.Path, files: Sequence[pathlib.Path]) -> Beliefs:
    """Returns what a policy's release says beside its weights.

    Args:
      source: the opened weights.
      cfg: config of the policy.
      folder: of the release.
      files: its other files, relative to it.

    Raises:
      FileError: settings in it that cannot be read.
    """
    stop = "a stop token" if cfg.recipe == "oft" else "no stop token"
    notes = [
        f"recipe {cfg.recipe}: {stop} behind the action slots, {cfg.images} picture(s), "
        f"{f'a robot state of {cfg.proprio} numbers' if cfg.proprio else 'no robot state'}; no file tells these"
    ]
    warnings = []
    used = {path.name for path in source.files}
    for file in files:
        if (
            file.suffix in (*strangers.TORCH, ".safetensors")
            and file.name not in used
            and file.name != "training_args.bin"
        ):
            if file.parent.name == "lora_adapter" or file.name.startswith("adapter_model."):
                continue  # what is done with adapters is said by whoever does it
            why = next(text for pattern, text in MODULES.items() if fnmatch.fnmatch(file.name, pattern))
            warnings += [f"{file} is copied and not used: {why}"]
        elif why := _pointer(folder / file):
            warnings += [f"{file} is {why}"]
    twice = sorted(path.name for path in folder.iterdir() if rest.is_weights(path.name) and path.name not in used)
    if twice:
        warnings += [
            f"{', '.join(twice)} hold the network too and are neither read nor copied; what is read is {source.name}"
        ]
    towers = (("dino", cfg.dino, TowerConfig.dinov2_large()), ("siglip", cfg.siglip, TowerConfig.siglip_so400m()))
    unsure = [f"{name} {tower.heads}" for name, tower, release in towers if tower.width != release.width]
    if unsure:
        warnings += [f"attention heads of the towers ({', '.join(unsure)}) are believed because --heads says so"]
    settings = _settings(source.config or {}, cfg, source)
    return (
        Beliefs(tuple(notes), tuple(warnings))
        + settings
        + _processor(folder, files, cfg)
        + _statistics(source, folder, files, cfg)
    )


def _pointer(path: pathlib.Path) -> str | None:
    """Returns what a small file stands for, where git left it in the place of another."""
    try:
        if 0 < path.stat().st_size < 1024:
            strangers.refuse(path)
    except FileError as error:
        return str(error).partition(" is ")[2].rstrip(".") if " pointer of " in str(error) else None
    return None


def _settings(described: Mapping[str, Any], cfg: VLAConfig, source: Source) -> Beliefs:
    """Compares what ``config.json`` says with what the weights are, and names what nobody looks at."""
    warnings = []
    unread = [f"{key} {described[key]!r:.60}" for key in described if key not in READ | INERT and described[key]]
    if unread:
        warnings += [f"config.json says more than is looked at: {', '.join(unread)}"]
    backbone = described.get("vision_backbone_id", "dinosiglip-vit-so-224px")
    if not str(backbone).startswith("dinosiglip"):
        warnings += [f"config.json says vision_backbone_id {backbone!r}, and the towers here are dinosiglip's"]
    sizes = list(described.get("image_sizes") or [])
    if sizes and set(sizes) != {cfg.dino.image, cfg.siglip.image}:
        warnings += [f"config.json says image_sizes {sizes}; positions in the weights are for {cfg.dino.image} pixels"]
    said = str(described.get("torch_dtype") or described.get("dtype") or "")
    held = source.facts["language_model.lm_head.weight"].dtype.name
    if said.removeprefix("torch.") not in ("", held):
        warnings += [f"config.json says {said}, the weights are {held}: they are run in {cfg.llm.dtype}"]
    return Beliefs((), tuple(warnings))


def _processor(folder: pathlib.Path, files: Iterable[pathlib.Path], cfg: VLAConfig) -> Beliefs:
    """Compares how the release prepares pictures with how they are prepared here."""
    if pathlib.Path(PROCESSOR) not in files:
        return Beliefs((f"no {PROCESSOR}: pictures are normalised as in OpenVLA's release",))
    said = strangers.read_settings(folder / PROCESSOR)
    here = {
        "means": [list(cfg.dino.mean), list(cfg.siglip.mean)],
        "stds": [list(cfg.dino.std), list(cfg.siglip.std)],
        "image_resize_strategy": "resize-naive",
        "tvf_do_letterbox": False,
        "use_fused_vision_backbone": True,
    }
    wrong = [
        f"{key} {said[key]}, here {want}" for key, want in here.items() if key in said and not _close(said[key], want)
    ]
    if wrong:
        return Beliefs((), (f"{PROCESSOR} prepares pictures in another way: {'; '.join(wrong)}",))
    return Beliefs((f"{PROCESSOR} prepares pictures as here",))


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_close, a, b))
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (a, b))
    return abs(a - b) < 1e-4 if numbers else a == b


def _statistics(source: Source, folder: pathlib.Path, files: Iterable[pathlib.Path], cfg: VLAConfig) -> Beliefs:
    """Says which statistics turn this policy's tokens into actions, and what is odd about them."""
    inside = (source.config or {}).get("norm_stats") or {}
    beside = None
    if pathlib.Path(STATISTICS) in files and not _pointer(folder / STATISTICS):
        beside = strangers.read_settings(folder / STATISTICS)
    chosen, file = (inside, "norm_stats of config.json") if beside is None else (beside, STATISTICS)
    if not chosen:
        fault = f"no action statistics, neither {STATISTICS} nor norm_stats in config.json"
        return Beliefs((), (f"{fault}: its tokens cannot be turned into actions",))
    why = "it is there" if not inside else "it goes before norm_stats of config.json, as in openvla-oft"
    why = why if beside is not None else f"there is no {STATISTICS}"
    warnings = []
    for key in chosen.keys() & inside.keys() if beside is not None else ():
        if chosen[key] != inside[key]:
            warnings += [f"statistics {key!r} differ between {STATISTICS} and config.json"]
    for key, entry in chosen.items():
        if fault := _fault(entry, cfg):
            warnings += [f"statistics {key!r} in {file}: {fault}"]
        if naming.says_nothing(key.removesuffix(naming.NO_NOOPS)):
            warnings += [f"statistics {key!r} in {file} have the name of a folder, not of a data set: name them anew"]
    return Beliefs((f"statistics: {file}, because {why}; entries {', '.join(map(repr, chosen))}",), tuple(warnings))


def _fault(entry: Any, cfg: VLAConfig) -> str | None:
    action = entry.get("action") if isinstance(entry, dict) else None
    if not isinstance(action, dict) or not {"q01", "q99"} <= action.keys():
        return "no quantiles q01 and q99 of actions"
    low, high, width = action["q01"], action["q99"], cfg.action_dim
    if not len(low) == len(high) == width:
        return f"actions of {len(low)} numbers, and this policy has {width}"
    mask = action.get("mask") or [True] * width
    flat = [str(i) for i in range(width) if mask[i] and not low[i] < high[i]]
    if flat:
        return f"q01 is not below q99 in dimension {', '.join(flat)}, which then never moves"
    if cfg.proprio and len((entry.get("proprio") or {}).get("q01", ())) != cfg.proprio:
        return f"no quantiles of a robot state of {cfg.proprio} numbers"
    return None
