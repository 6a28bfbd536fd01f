"""Small pretrained parts that come with the package: what the paper takes pretrained, at the size of the embedded run.

An asset is ``<name>.safetensors`` (float16 weights; a parameter's path joined by dots) and
``<name>.json``: the class and fields of its config, the settings of its training, what it
scores, and the SHA-256 of the weights. ``launch/tools/pretrain_tabletop.py`` makes them again. Imported weights
(``bridge.native``) have the same form in their own dtype, and load here too.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from wovr_jax.core import checkpoint, config, processes
from wovr_jax.types import Params
from wovr_jax.weights.native import MOVED

FOLDER = pathlib.Path(__file__).parents[1] / "assets"


class AssetError(ValueError):
    """An asset is missing, or not the one that its description belongs to."""


def load_asset(name: str, folder: pathlib.Path = FOLDER) -> tuple[Any, Params]:
    """The config (an instance of its dataclass) and the float32 parameters (numpy) of an asset.

    Raises:
      AssetError: if a file is missing or the weights do not have the hash of the description.
      config.ConfigError: if the config's class no longer has the fields.
    """
    facts = describe(name, folder)
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise AssetError(f"asset {name!r}: {path} is missing. Make it with launch/tools/pretrain_tabletop.py.")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != facts["sha256"]:
        raise AssetError(
            f"asset {name!r}: {path} has SHA-256 {digest}, its description says {facts['sha256']}. "
            "Restore both files from one commit, or make them again with launch/tools/pretrain_tabletop.py."
        )
    module, _, class_name = MOVED.get(facts["config_class"], facts["config_class"]).partition(":")
    cls = getattr(importlib.import_module(module), class_name)
    with safe_open(path, "flax") as file:  # numpy knows no bfloat16
        flat = {key: np.asarray(file.get_tensor(key), np.float32) for key in file.keys()}  # noqa: SIM118  no mapping
    return config.from_dict(cls, facts["config"], f"{name}.json"), _nested(flat)


def describe(name: str, folder: pathlib.Path = FOLDER) -> dict[str, Any]:
    """Everything that the asset's json says.

    Raises:
      AssetError: if there is no such asset, naming those there are.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.json"))) or "none"
        raise AssetError(f"asset {name!r}: {path} is missing. Assets here: {known}.")
    return json.loads(path.read_text())


def save_asset(
    name: str, cfg: Any, params: Params, *, training: Any, scores: dict[str, Any], folder: pathlib.Path = FOLDER
) -> pathlib.Path:
    """Writes both files and returns the json's path; ``training``: the settings that made the weights."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    with np.errstate(over="ignore"):  # what overflows is reported below, by name
        flat = {".".join(str(entry.key) for entry in path): np.asarray(leaf, np.float16) for path, leaf in leaves}
    bad = [key for key, value in flat.items() if not np.isfinite(value).all()]
    if bad:
        raise AssetError(f"asset {name!r}: {bad[0]!r} is not finite in float16 ({len(bad)} such parameters)")
    data = save(flat)
    facts = {
        "config_class": f"{type(cfg).__module__}:{type(cfg).__qualname__}",
        "config": config.to_dict(cfg),
        "training": config.to_dict(training),
        "scores": scores,
        "parameters": sum(value.size for value in flat.values()),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    path = folder / f"{name}.json"
    if not processes.first():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.safetensors").write_bytes(data)
    path.write_text(json.dumps(facts, indent=2) + "\n")
    return path


def _nested(flat: dict[str, np.ndarray]) -> Params:
    """Dotted paths to nested dicts; a path entry of digits is a list index, an integer key."""
    tree: Params = {}
    for path, value in flat.items():
        *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def look(setting: str, where: str) -> None:
    """Whether there is anything that ``given`` could read, before hours are spent on the way to it.

    Raises:
      config.ConfigError: nothing there.
    """
    path = pathlib.Path(where).expanduser()
    there = path.is_file() if path.suffix == ".json" else checkpoint.exists(path)
    if not there:
        says = f"{path} is missing" if path.suffix == ".json" else f"no checkpoint at {path}"
        raise config.ConfigError(f"config.{setting}: {says}. launch/import_weights.py makes weights of a release.")


def given(setting: str, where: str, shapes: Params) -> Params:
    """Weights of a finished run (a checkpoint's folder) or of an import (a json), as the network keeps them.

    Raises:
      config.ConfigError: nothing there, or weights of another network; the message begins with ``setting``.
    """
    path = pathlib.Path(where).expanduser()
    like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
    try:
        found = load_asset(path.stem, path.parent)[1] if path.suffix == ".json" else checkpoint.restore(path, like)
    except ValueError as error:
        raise config.ConfigError(f"config.{setting}: {error}") from error
    there, here = (jax.tree.map(lambda leaf: str(leaf.shape), tree) for tree in (found, like))
    if different := config.diff(there, here):
        shown = "\n  ".join(f"{name}: {old} there, {new} here" for name, (old, new) in list(different.items())[:12])
        raise config.ConfigError(f"config.{setting}: {path} is of another network, {len(different)} differ:\n  {shown}")
    return jax.tree.map(lambda leaf, own: jnp.asarray(leaf, own.dtype), found, like)
