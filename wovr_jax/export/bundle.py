"""Writes a robot bundle (``export.robot`` has its layout), whole and checked or not at all.

The bundle is made in a folder beside its place, opened there as a robot would open it, held against the policy
(``export.contract``), and only then put where it belongs.
"""

from __future__ import annotations

import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from wovr_jax.core import machine
from wovr_jax.core.disk import fresh_folder, replace_folder, settle_folder, write_json
from wovr_jax.export import contract, program, robot
from wovr_jax.export.robot import MANIFEST, PROGRAM, RECIPE, STATISTICS, WEIGHTS
from wovr_jax.export.source import Policy
from wovr_jax.weights import safetensors

Progress = Callable[[int], None]
"""Told the bytes of every leaf that is written."""


def write(
    policy: Policy,
    folder: str | os.PathLike,
    *,
    frames: int = 64,
    overwrite: bool = False,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Writes the bundle of a policy and returns its manifest.

    Args:
      policy: what to export.
      folder: where; its parents are made.
      frames: recorded frames to hold it against the policy.
      overwrite: whether a bundle that is there may be replaced.
      progress: told of each leaf.

    Raises:
      BundleError: ``folder`` holds something that must not be replaced.
      ContractError: the bundle does not act as the policy does; nothing was written.
    """
    folder = settle_folder(folder, _is_bundle)
    vacant(folder, overwrite)
    replayed = contract.recorded(policy.recorded, frames, policy.cfg.chunk)
    fresh = fresh_folder(folder)
    try:
        _write_files(policy, fresh, progress)
        manifest = _describe(policy, fresh)
        write_json(fresh / MANIFEST, manifest)
        manifest["contract"] = contract.check(fresh, policy, replayed)
        write_json(fresh / MANIFEST, manifest)
        replace_folder(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return manifest


def vacant(folder: pathlib.Path, overwrite: bool) -> None:
    """Refuses a place that is taken.

    Raises:
      BundleError: by a bundle without ``overwrite``, or by anything else.
    """
    if folder.exists() and not (folder.is_dir() and (_is_bundle(folder) or not any(folder.iterdir()))):
        raise robot.BundleError(f"{folder} exists and is not a robot bundle; it is not replaced. Name another folder.")
    if _is_bundle(folder) and not overwrite:
        raise robot.BundleError(f"{folder} holds a bundle already. Name another folder, or ask to overwrite it.")


def size(policy: Policy) -> int:
    """Bytes of a policy's weights."""
    return sum(math.prod(fact.shape) * fact.dtype.itemsize for fact in policy.facts.values())


def _write_files(policy: Policy, folder: pathlib.Path, progress: Progress) -> None:
    def told() -> Iterator[tuple[str, np.ndarray]]:
        for name, leaf in policy.leaves():
            progress(leaf.nbytes)
            yield name, leaf

    made = program.make(policy.cfg, policy.image, policy.codec.gripper)
    length, dim = policy.prompt["length"], policy.cfg.action_dim
    (folder / PROGRAM).write_bytes(program.serialise(made, policy.facts, frame=policy.frame, length=length, dim=dim))
    write_json(folder / STATISTICS, policy.statistics)
    write_json(folder / RECIPE, policy.recipe())
    safetensors.write(folder / WEIGHTS, policy.facts, told())


def _describe(policy: Policy, folder: pathlib.Path) -> dict[str, Any]:
    """The manifest of the files in ``folder``, without what the contract will find."""
    return {
        "format": robot.FORMAT,
        "schema": robot.SCHEMA,
        "policy": policy.name,
        "parameters": sum(math.prod(fact.shape) for fact in policy.facts.values()),
        "platforms": list(program.PLATFORMS),
        "versions": machine.versions(),
        "files": {name: robot.facts(folder / name) for name in robot.FILES},
    }


def _is_bundle(folder: pathlib.Path) -> bool:
    return (folder / MANIFEST).is_file() and (folder / PROGRAM).is_file()
