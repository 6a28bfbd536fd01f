"""LoRA adapters of a policy: PEFT folders in and out, and merged into the weights on their way in.

A PEFT folder holds ``adapter_config.json`` and ``adapter_model.safetensors``; a release may have one, ``lora_adapter``.
openvla-oft writes it beside weights that hold the sum already, RLinf publishes it beside weights that do not, and no
file tells which: merging is asked for, never assumed.

Source: huggingface/peft:src/peft/utils/save_and_load.py.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from wovr_jax.bridge import rest, sources, strangers
from wovr_jax.core import checkpoint, config, disk
from wovr_jax.data import naming
from wovr_jax.nn import lora
from wovr_jax.nn.lora import DOWN, UP, LoRAConfig
from wovr_jax.policy import vla
from wovr_jax.policy.train import PolicyAdapters
from wovr_jax.policy.vla import PolicyLoRA, VLAConfig
from wovr_jax.policy.weights import PEFT, adapter_table
from wovr_jax.weights import native, writer
from wovr_jax.weights.plan import Plan, plan_export, plan_import
from wovr_jax.weights.safetensors import Fact, FileError
from wovr_jax.weights.source import Source, open_native

CONFIG, WEIGHTS, FOLDER = "adapter_config.json", "adapter_model.safetensors", "lora_adapter"
OLD_WEIGHTS = "adapter_model.bin"
"""As PEFT wrote them before safetensors."""
OTHER_KINDS = ("use_rslora", "use_dora", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern")
OTHER_KINDS += ("lora_bias", "layer_replication", "trainable_token_indices", "target_parameters", "use_qalora")
"""Settings of PEFT that make another sum than kernel + scale * a @ b, or train something beside it."""
INERT = {
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "target_modules",
    "init_lora_weights",
    "bias",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",
    "peft_version",
    "loftq_config",
    "eva_config",
    "corda_config",
    "megatron_config",
    "megatron_core",
    "runtime_config",
    "exclude_modules",
}
"""Settings that are read, or mean nothing for what adapters add once they are trained."""
INITS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Ways to begin that leave the base weights as they are."""


@dataclasses.dataclass(frozen=True)
class Adapters:
    """An opened PEFT folder that was checked; no data were read yet.

    Attributes:
      folder: where it is.
      about: the policy and the adapters.
      plan: which tensor goes where.
      read: name -> tensor.
      file: that holds them.
      odd: what looks odd in its settings.
    """

    folder: pathlib.Path
    about: PolicyAdapters
    plan: Plan
    read: Callable[[str], np.ndarray]
    file: pathlib.Path
    odd: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What the folder is called; in a hub's cache the last one is a commit."""
        try:
            return naming.name_of(self.folder)
        except ValueError:
            return self.folder.name

    @functools.cached_property
    def leaves(self) -> dict[str, np.ndarray]:
        """Path -> value of all adapters. They are a hundredth of the weights at most, so memory holds all."""
        return dict(self.plan.leaves(self.read))

    def merge(self, path: str, leaf: np.ndarray) -> None:
        """Adds what belongs to a leaf of the policy, layer by layer, in float32 and rounded once."""
        layer, _, name = path.rpartition("/")
        if name == "kernel" and f"{layer}/{DOWN}" in self.plan.leaf:
            down, up = self.leaves[f"{layer}/{DOWN}"], self.leaves[f"{layer}/{UP}"]
            # (layers, I, O) with a (layers, I, r) and b (layers, r, O): a layer at a time, or one layer alone
            for kernel, a, b in zip(leaf, down, up) if leaf.ndim == 3 else [(leaf, down, up)]:
                _add(kernel, a, b, self.about.lora.scale)

    def merge_kept(self, name: str, tensor: np.ndarray) -> None:
        """Adds what belongs to a tensor of the release that the policy does not use, in the layout of torch."""
        down, up = (f"{PEFT}{name.removesuffix('.weight')}.lora_{letter}.weight" for letter in "AB")
        if down in self.plan.kept:
            # torch has (O, I), so b comes first: (O, r) x (r, I)
            _add(tensor, self.read(up), self.read(down), self.about.lora.scale)

    def report(self, what: str) -> str:
        """Returns a sentence on what is done with them, ``what``: merged or kept."""
        cfg = self.about.lora
        pairs = (len(self.plan.tensor) + len(self.plan.kept)) // 2
        count = sum(fact.size for fact in (*self.plan.tensor.values(), *self.plan.kept.values()))
        dropped = f"; not taken: {', '.join(self.plan.dropped)}" if self.plan.dropped else ""
        return (
            f"{self.name}: {pairs} adapters of rank {cfg.rank} and scale {cfg.scale:g}, {count:,} parameters, "
            f"{what}{dropped}"
        )

    def warnings(self) -> list[str]:
        """Says what looks odd; reads the adapters."""
        still = all(not leaf.any() for path, leaf in self.leaves.items() if path.endswith(f"/{UP}"))
        idle = [f"{self.folder.name}: all b of its adapters are zero, as before a training: they change nothing"]
        return [*self.odd, *(idle if still else [])]


def _add(kernel: np.ndarray, left: np.ndarray, right: np.ndarray, scale: float) -> None:
    # kernel + scale a b in float32: in bfloat16 the product alone would lose most of what fine-tuning changed.
    product = np.matmul(left.astype(np.float32), right.astype(np.float32))
    kernel[...] = (kernel.astype(np.float32) + np.float32(scale) * product).astype(kernel.dtype)


def open_peft(folder: str | os.PathLike, network: VLAConfig) -> Adapters:
    """Opens and checks a PEFT folder.

    Raises:
      FileError: no such folder, another kind of adapter, or adapters that change the base weights.
      KeymapError: with everything that does not fit the policy.
    """
    folder = pathlib.Path(folder).expanduser()
    settings = _read_config(folder / CONFIG)
    held = _open(folder)
    rank = settings["r"]
    # Which layers are adapted is read off the names in the file: every row that could be there, then those that are.
    # (In float32, as any dtype does here: names and shapes are compared, nothing is written.)
    every = {path: Fact(shape, np.dtype(np.float32)) for path, shape in _shapes(network, ("*",), rank).items()}
    links = plan_export(str(folder), adapter_table(network), every).links
    targets = {
        path.rpartition("/")[0] for path, group in links.items() if any(link.theirs in held.facts for link in group)
    }
    ours = {path: fact.shape for path, fact in every.items() if path.rpartition("/")[0] in targets}
    checked = plan_import(str(folder), adapter_table(network, rank, held.facts), held.facts, ours, held.doubled)
    # After the plan, whose list of strange names says more where the whole folder is of another model.
    if not targets:
        raise FileError(f"{held.name} adapts no layer that the policy runs.")
    init = "gaussian" if settings.get("init_lora_weights") == "gaussian" else "kaiming"
    cfg = PolicyLoRA(rank, float(settings["lora_alpha"]), tuple(sorted(targets)), init)
    odd = (*held.warnings, *_unread(folder, settings, held.facts))
    return Adapters(folder, PolicyAdapters(network, cfg), checked, held.read, held.files[0], odd)


def _open(folder: pathlib.Path) -> Source:
    """Opens the file of a PEFT folder, under the names that PEFT's own ``save_pretrained`` gives."""
    files = [folder / name for name in (WEIGHTS, OLD_WEIGHTS) if (folder / name).is_file()]
    if not files:
        raise FileError(f"{folder}: expected {WEIGHTS} (or {OLD_WEIGHTS}) beside {CONFIG}; neither is there.")
    source = sources.open_source(files[0], cut=False)
    # A state dict that was saved instead has the adapter's name behind lora_A, and PEFT's prefix may be missing.
    names = {name: re.sub(r"\.lora_([AB])\.\w+\.weight$", r".lora_\1.weight", name) for name in source.facts}
    if not any(name.startswith(PEFT) for name in names):
        names = {name: PEFT + short.removeprefix("module.") for name, short in names.items()}
    back = {short: name for name, short in names.items()}
    twice = {short for short, count in collections.Counter(names.values()).items() if count > 1}
    return dataclasses.replace(
        source,
        facts={names[name]: fact for name, fact in source.facts.items()},
        read=lambda name: source.read(back[name]),
        doubled=sorted({*source.doubled, *twice}),
    )


def _unread(folder: pathlib.Path, settings: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Says which settings nobody looks at, and which layers they name that have no adapter."""
    unread = [
        f"{name} {settings[name]!r}" for name in settings if settings[name] and name not in {*INERT, *OTHER_KINDS}
    ]
    odd = [f"{folder.name}/{CONFIG} says more than is looked at: {', '.join(unread)}"] if unread else []
    modules = {name.removeprefix(PEFT).rpartition(".lora_")[0] for name in names}
    wanted = settings.get("target_modules")
    absent = [
        target
        for target in (wanted if isinstance(wanted, list) else [])
        if not any(module == target or module.endswith(f".{target}") for module in modules)
    ]
    if absent:
        odd += [f"{folder.name}/{CONFIG} names target_modules {', '.join(absent)}, for which the file has no adapter"]
    return odd


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    """Reads ``adapter_config.json`` and refuses any that is not one of plain LoRA."""
    try:
        settings = strangers.read_settings(path)
        rank, alpha = settings["r"], settings["lora_alpha"]
    except (FileError, KeyError) as error:
        where = sorted(below.parent.name for below in path.parent.glob(f"*/{CONFIG}"))
        hint = f" There is one in {', '.join(where)} below it." if where else ""
        raise FileError(f"{path} cannot be read as the config of LoRA adapters: {error!r}.{hint}") from error
    wrong = [f"{name} {settings[name]!r}" for name in OTHER_KINDS if settings.get(name)]
    wrong += [f"peft_type {settings.get('peft_type')!r}"] if settings.get("peft_type") != "LORA" else []
    wrong += [f"bias {settings['bias']!r}"] if settings.get("bias", "none") not in ("none", None) else []
    # PiSSA, OLoRA and the like take a part out of the base weights first: the same adapters mean another network.
    init = settings.get("init_lora_weights", True)
    wrong += [f"init_lora_weights {init!r}, which changes the base weights"] if init not in INITS else []
    if not isinstance(rank, int) or rank < 1 or isinstance(alpha, bool) or not isinstance(alpha, int | float):
        wrong.append(f"r {rank!r}, lora_alpha {alpha!r}")
    elif alpha <= 0:
        raise FileError(
            f"{path}: lora_alpha {alpha}, so the adapters' scale is {alpha / rank:g}, and adding them changes nothing. "
            "verl's model merger writes 0 whatever the training had: put the training's own lora_alpha there."
        )
    if wrong:
        raise FileError(f"{path}: expected plain LoRA, got {'; '.join(wrong)}.")
    return settings


def _shapes(network: VLAConfig, targets: tuple[str, ...], rank: int) -> dict[str, tuple[int, ...]]:
    """Returns path and shape of every adapter, in the network that has one at each of ``targets``."""
    kernels = vla.network(network).shapes()
    made = jax.eval_shape(lambda key: lora.init(key, kernels, LoRAConfig(rank, targets=targets)), jax.random.key(0))
    return {path: tuple(leaf.shape) for path, leaf in native.flatten(made).items()}


# Our own form ---------------------------------------------------------------------------------------------------


def write_native(opened: Adapters, folder: str | os.PathLike, name: str = "lora") -> pathlib.Path:
    """Writes adapters in our form, with what they brought beside the weights, and returns the json."""
    beside = pathlib.Path(folder) / rest.folder_name(name)
    fresh = disk.fresh_folder(beside)
    try:
        # Adapters of layers that the policy does not run, and the folder's other files, go back as they were.
        files = rest.other_files([opened.file])
        kept = ((name, opened.read(name)) for name in opened.plan.kept)
        digests = rest.write(fresh, opened.plan.kept, kept, opened.folder, files)
        source = {"file": opened.name, "format": "peft", "rest": digests}
        about = {"source": source, "report": [opened.report("kept")], "warnings": opened.warnings()}
        card = writer.write_native(folder, name, opened.about, opened.plan.leaf, opened.leaves.items(), about)
        disk.replace_folder(fresh, beside)
    finally:
        disk.drop_folder(fresh)
    return card


def export(path: str | os.PathLike, folder: str | os.PathLike) -> list[pathlib.Path]:
    """Writes a PEFT folder from adapters in our form, or from the checkpoint that a fine-tuning left.

    Args:
      path: json of :func:`write_native`, or the folder ``stages/sft/adapters`` of a run.
      folder: where. What an import kept is put back as it was.

    Raises:
      FileError: neither of the two.
      KeymapError: with everything that does not fit.
    """
    path, folder = pathlib.Path(path), pathlib.Path(folder)
    if checkpoint.exists(path):
        # What a fine-tuning of ours left: the adapters alone, and in its facts what they belong to.
        about = config.from_dict(PolicyAdapters, checkpoint.meta(path), str(path))
        shapes = _shapes(about.network, about.lora.targets, about.lora.rank)
        like = native.unflatten({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
        return write_peft(folder, about, native.flatten(checkpoint.restore(path, like)))
    about, source, card = open_native(path, verify=True)
    if not isinstance(about, PolicyAdapters):
        raise FileError(f"{path} holds no adapters; --to peft writes adapters only.")
    leaves = {name: source.read(name) for name in source.facts}
    # Adapters that were trained here have no rest; those that were imported may not go without theirs.
    digests = card.get("source", {}).get("rest")
    return write_peft(
        folder, about, leaves, rest.open_rest(path.with_name(rest.folder_name(path.stem)), digests) if digests else None
    )


def write_peft(
    folder: pathlib.Path, about: PolicyAdapters, leaves: Mapping[str, np.ndarray], kept: rest.Rest | None = None
) -> list[pathlib.Path]:
    """Writes ``adapter_model.safetensors`` and ``adapter_config.json``; PEFT loads them onto the release's modules."""
    facts = {path: Fact(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    beside = kept.facts if kept else {}
    checked = plan_export("adapters", adapter_table(about.network, about.lora.rank, beside), facts, beside)
    stream = [*checked.tensors(leaves.__getitem__), *((name, kept.read(name)) for name in beside if kept)]
    with disk.replace_file(folder / WEIGHTS) as fresh:
        writer.write(fresh, {**checked.tensor, **checked.kept}, stream, {"format": "pt"})
    # A folder that came from PEFT gets its own config back, byte for byte, among the other files.
    if kept:
        return [folder / WEIGHTS, *kept.copy_files(folder)]
    disk.write_json(folder / CONFIG, peft_config(about.lora, checked.tensor), indent=2, each=True)
    return [folder / WEIGHTS, folder / CONFIG]


def peft_config(cfg: LoRAConfig, names: Iterable[str]) -> dict[str, Any]:
    """Returns the ``adapter_config.json`` of adapters with these names; it lists every adapted module in full.

    PEFT would take a short name such as ``q_proj`` for every module that ends so, in the vision towers too.
    """
    modules = {name.removeprefix(PEFT).rpartition(".lora_")[0] for name in names}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": cfg.rank,
        # PEFT declares a whole number here, although it takes any.
        "lora_alpha": int(cfg.alpha) if cfg.alpha == int(cfg.alpha) else cfg.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(modules),
        "init_lora_weights": "gaussian" if cfg.init == "gaussian" else True,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
