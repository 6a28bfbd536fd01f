"""Our own form of weights: ``<name>.safetensors`` and ``<name>.json``; the one reader of it.

The small pretrained parts that come with the package (``assets/``) have this form, and so have weights that
``bridge`` imported. The names are parameter paths joined by dots, layers of a stack in one array; the json holds the
class and fields of the network's config, the SHA-256 of the weights and where they came from.

Everything goes leaf by leaf. A leaf is read, cast and put at its place on the mesh before the next one is read, so
that the host holds one leaf however large the network is, and no device holds the whole of a leaf that is cut.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from wovr_jax.core import checkpoint, config, disk, processes, sharding
from wovr_jax.types import Params
from wovr_jax.weights import safetensors
from wovr_jax.weights.safetensors import FileError

FOLDER = pathlib.Path(__file__).parents[1] / "assets"
"""Where the pretrained parts of the package lie; ``launch/`` has the program that makes them again."""


def flatten(tree: Params) -> dict[str, Any]:
    """Returns nested parameters as ``path -> leaf``, the path joined by ``/``."""
    # Not JAX's tree functions: shardings and shapes are leaves here as well.
    return {"/".join(map(str, keys)): leaf for keys, leaf in traverse_util.flatten_dict(tree).items()}


def unflatten(leaves: Mapping[str, Any]) -> Params:
    """Returns the nested parameters of :func:`flatten`; a part of digits is an index, an integer key."""

    def keys(path: str) -> tuple[int | str, ...]:
        # flax.nnx keeps the modules of a list under integers.
        return tuple(int(part) if part.isdigit() else part for part in path.split("/"))

    return traverse_util.unflatten_dict({keys(path): leaf for path, leaf in leaves.items()})


# ---------------------------------------------------------------- writing


def write(
    folder: str | os.PathLike,
    name: str,
    cfg: Any,
    parameters: int,
    about: Mapping[str, Any],
    save: Callable[[pathlib.Path], object],
) -> pathlib.Path:
    """Writes both files, whole or not at all, and returns the json's path.

    Args:
      folder: where; made if it is not there.
      name: of both files.
      cfg: config of the network.
      parameters: how many numbers it has.
      about: JSON facts on the origin.
      save: writes the weights to the path that it is given.
    """
    card = pathlib.Path(folder) / f"{name}.json"
    # The weights are renamed after the card was written, so an error in either leaves both as they were.
    with disk.replace_file(card) as fresh_card, disk.replace_file(card.with_suffix(".safetensors")) as fresh:
        save(fresh)
        described = {
            "config_class": f"{type(cfg).__module__}:{type(cfg).__qualname__}",
            "config": config.to_dict(cfg),
            **about,  # before the sum, which nothing said about the origin may replace
            "parameters": parameters,
            "sha256": disk.sha256(fresh),
        }
        fresh_card.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return card


def save_asset(
    name: str,
    cfg: Any,
    params: Params,
    *,
    training: Any,
    scores: Mapping[str, Any],
    frames: int = 0,
    folder: pathlib.Path = FOLDER,
) -> pathlib.Path:
    """Writes a small network in float16 and returns the json's path. Of several processes the first one writes.

    Args:
      name: of both files.
      cfg: config of the network.
      params: its parameters.
      training: the settings that made the weights.
      scores: what it reaches.
      frames: of each sample of that training; 0 where nobody knows what the weights have seen.
      folder: where.

    Raises:
      FileError: a parameter is not finite in float16.
    """
    with np.errstate(over="ignore"):  # what overflows is reported below, by name
        half = {path.replace("/", "."): np.asarray(leaf, np.float16) for path, leaf in flatten(params).items()}
    if bad := [path for path, leaf in half.items() if not np.isfinite(leaf).all()]:
        raise FileError(f"asset {name!r}: {bad[0]!r} is not finite in float16 ({len(bad)} such parameters)")
    if not processes.first():  # after the arrays came to the host, in which all processes may have a part
        return folder / f"{name}.json"
    about = {"training": config.to_dict(training), "scores": dict(scores)}
    if frames:
        about["seen"] = {"steps": training.steps, "frames": training.steps * training.batch * frames}
    # All at once, by the library: the parts that come with the package are small.
    return write(folder, name, cfg, sum(x.size for x in half.values()), about, lambda fresh: save_file(half, fresh))


# ---------------------------------------------------------------- reading


def describe(path: str | os.PathLike) -> dict[str, Any]:
    """Returns everything that the json says; reads no weights.

    Raises:
      FileError: a file is missing, or the json is not of this form.
    """
    path = pathlib.Path(path)
    expected = f"{path}: expected the .json of imported weights, with a .safetensors of that name beside it"
    if path.suffix != ".json":
        raise FileError(f"{expected}.")
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.json"))) or "none"
        raise FileError(f"{path} is missing. Weights there: {known}.")
    if not path.with_suffix(".safetensors").is_file():
        raise FileError(f"{expected}; {path.with_suffix('.safetensors').name} is missing.")
    safetensors.refuse_pointer(path)
    try:
        about = disk.read_json(path)
    except ValueError as error:
        raise FileError(f"{path} is not JSON: {error}.") from error
    if not isinstance(about, dict) or not {"config_class", "config", "sha256"} <= about.keys():
        raise FileError(f"{path} does not describe imported weights: no config_class, config or sha256 in it.")
    return about


def load(
    path: str | os.PathLike, *, put: Callable[[str, np.ndarray], Any] = lambda name, leaf: leaf, verify: bool = False
) -> tuple[Any, Params]:
    """Reads the config and the parameters.

    Args:
      path: the json.
      put: what is made of each leaf, by its path, before the next one is read: a cast, a place on a device.
      verify: also compare the SHA-256, in the same pass.

    Raises:
      FileError: a file is missing, damaged, or not of this form.
      config.ConfigError: the config's class no longer has the fields.
    """
    path = pathlib.Path(path)
    about = describe(path)
    cfg = read_config(path, about)
    opened, digest = safetensors.header(path.with_suffix(".safetensors")), hashlib.sha256()
    leaves: dict[str, Any] = {}
    for dotted, leaf in safetensors.read_all(opened, digest.update if verify else None):
        name = dotted.replace(".", "/")
        # A device copies behind the call; without waiting, leaves would gather on the host.
        leaves[name] = jax.block_until_ready(put(name, leaf))
        del leaf  # or it would live on while the next one is read
    if verify:
        compare_digest(path, about, digest.hexdigest())
    return cfg, unflatten(leaves)


def load_asset(name: str, folder: pathlib.Path = FOLDER) -> tuple[Any, Params]:
    """Reads the config and the float32 parameters (numpy) of a pretrained part, and compares its SHA-256.

    Raises:
      FileError, config.ConfigError: as :func:`load`.
    """
    return load(folder / f"{name}.json", put=lambda name, leaf: leaf.astype(np.float32, copy=False), verify=True)


def compare_digest(path: pathlib.Path, about: Mapping[str, Any], digest: str) -> None:
    """Raises a FileError unless the weights of the json at ``path`` have the SHA-256 that it says."""
    if digest != about["sha256"]:
        raise FileError(
            f"{path.with_suffix('.safetensors')} has SHA-256 {digest}, {path.name} says {about['sha256']}. "
            "Restore both files from one place, or import or make them again."
        )


def read_config(path: pathlib.Path, about: Mapping[str, Any]) -> Any:
    """Returns the network's config that a json describes."""
    place: str = about["config_class"]
    module, _, name = place.partition(":")
    if not module.startswith("wovr_jax."):  # a json from elsewhere must not import what it likes
        raise FileError(f"{path}: config_class {place!r} is not a class of this package.")
    return config.from_dict(getattr(importlib.import_module(module), name), about["config"], path.name)


# ---------------------------------------------------------------- for a run


def locate(where: str) -> pathlib.Path:
    """Returns the path that a setting names; a bare name that is no path here is that of a part of the package."""
    path, part = pathlib.Path(where).expanduser(), FOLDER / f"{where}.json"
    return path if path.exists() or not part.is_file() else part


def check_weights(setting: str, where: str, shapes: Params) -> None:
    """Refuses what :func:`load_weights` would refuse, before hours are spent on the way to it; reads headers only.

    Args:
      setting: name of the setting, with which the message begins.
      where: a checkpoint's folder, a json, or the name of a part of the package.
      shapes: ``jax.ShapeDtypeStruct`` of every parameter of the network.

    Raises:
      config.ConfigError: nothing there, or weights of another network.
    """
    # Existence first: the usual fault is a path of another machine, and its message says how to make what is missing.
    path = locate(where)
    is_card = path.suffix == ".json"
    if not (path.is_file() if is_card else checkpoint.exists(path)):
        fault = f"{path} is missing" if is_card else f"no checkpoint at {path}"
        raise config.ConfigError(f"config.{setting}: {fault}. launch/import_weights.py makes weights of a release.")
    try:
        if is_card:
            describe(path)
            _refuse_another_network(path, shapes)
        else:
            checkpoint.compare(path, shapes)
    except ValueError as error:
        raise config.ConfigError(f"config.{setting}: {error}") from error


def load_weights(setting: str, where: str, shapes: Params, axes: sharding.Axes) -> Params:
    """Reads weights of a finished run or of an import to where they lie on the mesh in use.

    Args:
      setting: name of the setting, with which a message begins.
      where: a checkpoint's folder, or the json of our own form, whose leaves are cast as they are read; or the name of
        a part of the package.
      shapes: ``jax.ShapeDtypeStruct`` of every parameter.
      axes: of the network, see ``core.sharding``.

    Returns:
      the parameters, in the dtypes of ``shapes``; without a mesh, on the default device and tied to none.

    Raises:
      config.ConfigError: nothing there, damaged, or weights of another network.
    """
    path = locate(where)
    # Of a checkpoint each process and device reads its own pieces only, for Orbax is told where they lie.
    like = sharding.describe(shapes, axes)
    try:
        return _read_card(path, like) if path.suffix == ".json" else checkpoint.restore(path, like)
    except ValueError as error:
        raise config.ConfigError(f"config.{setting}: {error}") from error


def _read_card(path: pathlib.Path, like: Params) -> Params:
    """Reads our own form leaf by leaf, each to the dtype and place of that leaf in ``like``."""
    read_config(path, describe(path))  # of a class and with fields that this version knows
    _refuse_another_network(path, like)
    wanted = flatten(like)

    def put(name: str, leaf: np.ndarray) -> Any:
        leaf, place = leaf.astype(wanted[name].dtype, copy=False), wanted[name].sharding
        return jnp.asarray(leaf) if place is None else sharding.put(leaf, place)

    return load(path, put=put, verify=True)[1]


def _refuse_another_network(path: pathlib.Path, shapes: Params) -> None:
    """Raises FileError unless the json's weights have exactly the leaves of ``shapes``; reads the header only."""
    # Shapes alone: leaves are cast to the network's dtype anyway.
    facts = safetensors.header(path.with_suffix(".safetensors")).facts
    file = {name: str(fact.shape) for name, fact in facts.items()}
    network = {name.replace("/", "."): str(tuple(leaf.shape)) for name, leaf in flatten(shapes).items()}
    if differences := checkpoint.list_differences(network, file):
        raise FileError(f"{path} is of another network: {differences}")
