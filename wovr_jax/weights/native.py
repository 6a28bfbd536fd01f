"""Our own form of weights: ``<name>.safetensors`` and ``<name>.json``, as small assets have it.

The names are parameter paths joined by dots, layers of a stack in one array; the json holds the
class and fields of the config, the SHA-256 of the weights and where they came from. Other than
``wovr_jax.assets`` this file keeps the dtype, and goes leaf by leaf both ways.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from wovr_jax.core import config
from wovr_jax.types import Params
from wovr_jax.weights import tensors
from wovr_jax.weights.keymap import Fact
from wovr_jax.weights.tensors import FileError, Source

MOVED = {"wovr_jax.world.vae:VAEConfig": "wovr_jax.world.vae.net:VAEConfig"}
"""Classes of configs that files of before know by another place."""


def flat(tree: Mapping[Any, Any], above: str = "") -> dict[str, Any]:
    """Nested parameters as ``path -> leaf``, the path joined by ``/``."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{above}/{key}" if above else str(key)
        found |= flat(value, path) if isinstance(value, Mapping) else {path: value}
    return found


def nested(leaves: Mapping[str, Any]) -> Params:
    """The inverse of :func:`flat`; a part of digits is an index, an integer key."""
    tree: Params = {}
    for path, leaf in leaves.items():
        *parents, last = (int(part) if part.isdigit() else part for part in path.split("/"))
        node: Any = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def write(
    folder: str | os.PathLike,
    name: str,
    cfg: Any,
    facts: Mapping[str, Fact],
    leaves: Iterable[tuple[str, np.ndarray]],
    about: Mapping[str, Any],
) -> pathlib.Path:
    """Writes both files, whole or not at all, and returns the json's path.

    Args:
      folder: where; made if it is not there.
      name: of both files.
      cfg: config of the network.
      facts: path -> shape and dtype of every leaf.
      leaves: the leaves, in any order.
      about: JSON facts on the origin.
    """
    weights, card = (pathlib.Path(folder) / f"{name}{suffix}" for suffix in (".safetensors", ".json"))
    fresh = tensors.beside(weights)
    try:
        dotted = {path.replace("/", "."): fact for path, fact in facts.items()}
        tensors.write(fresh, dotted, ((path.replace("/", "."), leaf) for path, leaf in leaves))
        with fresh.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        described = {
            "config_class": f"{type(cfg).__module__}:{type(cfg).__qualname__}",
            "config": config.to_dict(cfg),
            "parameters": sum(int(np.prod(fact.shape)) for fact in facts.values()),
            "sha256": digest,
        }
        text = json.dumps(described | dict(about), indent=2) + "\n"
        card_fresh = tensors.beside(card)
        card_fresh.write_text(text)
        fresh.replace(weights)
        card_fresh.replace(card)
    finally:
        fresh.unlink(missing_ok=True)
    return card


def is_native(path: pathlib.Path) -> bool:
    """Whether ``path`` is the json of our own form."""
    whole = path.suffix == ".json" and path.is_file() and path.with_suffix(".safetensors").is_file()
    return whole and '"config_class"' in path.read_text(errors="replace")


def open_native(path: str | os.PathLike, *, verify: bool = False) -> tuple[Any, Source, dict[str, Any]]:
    """The config, the leaves as a source with paths for names, and all that the json says.

    Args:
      path: the json.
      verify: also compare the SHA-256, which reads the whole file.

    Raises:
      FileError: a file is missing, damaged, or not of this form.
      config.ConfigError: the config's class no longer has the fields.
    """
    path = pathlib.Path(path)
    if path.suffix != ".json" or not path.is_file() or not path.with_suffix(".safetensors").is_file():
        raise FileError(f"{path}: expected the .json of imported weights, with a .safetensors of that name beside it.")
    try:
        about = json.loads(path.read_text())
    except ValueError as error:
        raise FileError(f"{path} is not JSON: {error}.") from error
    weights = path.with_suffix(".safetensors")
    if not isinstance(about, dict) or not {"config_class", "config", "sha256"} <= about.keys():
        raise FileError(f"{path} does not describe imported weights: no config_class, config or sha256 in it.")
    if verify:
        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != about["sha256"]:
            raise FileError(f"{weights} has SHA-256 {digest}, {path.name} says {about['sha256']}. Import them again.")
    module, _, name = MOVED.get(about["config_class"], about["config_class"]).partition(":")
    if not module.startswith("wovr_jax."):
        raise FileError(f"{path}: config_class {about['config_class']!r} is not a class of this package.")
    cfg = config.from_dict(getattr(importlib.import_module(module), name), about["config"], path.name)
    found = tensors.header(weights)
    facts = {name.replace(".", "/"): fact for name, fact in found.facts.items()}
    return cfg, Source(str(path), facts, lambda leaf: tensors.read(found, leaf.replace("/", "."))), about


def load(
    path: str | os.PathLike, *, dtype: Any = None, put: Callable[[np.ndarray], Any] = lambda leaf: leaf
) -> tuple[Any, Params]:
    """The config and the parameters of imported weights.

    Args:
      path: the json.
      dtype: that all leaves are cast to; as they are by default.
      put: what is done with each leaf before the next is read, ``jax.device_put`` for instance.
    """
    cfg, source, _ = open_native(path)
    leaves = {name: put(_cast(source.read(name), dtype)) for name in source.facts}
    return cfg, nested(leaves)


def _cast(leaf: np.ndarray, dtype: Any) -> np.ndarray:
    return leaf if dtype is None else leaf.astype(dtype, copy=False)
