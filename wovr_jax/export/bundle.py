"""Writes a robot bundle, whole and checked or not at all; ``export.robot`` has its layout.

The bundle is made in a folder beside its place, opened there as a robot would open it, compared with the policy
(``export.contract``), and only then put where it belongs.
"""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from wovr_jax.core import machine
from wovr_jax.core.disk import drop_folder, fresh_folder, own, replace_folder, settle_folder, write_json
from wovr_jax.export import contract, program, robot
from wovr_jax.export.robot import MANIFEST, PROGRAM, RECIPE, STATISTICS, WEIGHTS
from wovr_jax.export.source import Policy
from wovr_jax.weights import writer

Progress = Callable[[int], None]
"""Called with the bytes of every leaf that is written."""


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
      folder: where to write it; its parents are made.
      frames: how many recorded frames the bundle and the policy are compared on.
      overwrite: whether an existing bundle may be replaced.
      progress: called with the bytes of each leaf.

    Raises:
      BundleError: when ``folder`` holds something that must not be replaced.
      ContractError: when the bundle does not act as the policy does; nothing was written.
    """
    folder = pathlib.Path(folder).expanduser().absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Before anything is settled: what another export is about to check looks whole to whoever comes meanwhile.
    hold = own(folder.with_name(folder.name + ".owner"), folder)
    try:
        return _write(policy, settle_folder(folder, _is_bundle), frames, overwrite, progress)
    finally:
        hold.release(force=True)


def _write(policy: Policy, folder: pathlib.Path, frames: int, overwrite: bool, progress: Progress) -> dict[str, Any]:
    """Writes and checks the bundle beside its place, and puts it there."""
    check_vacant(folder, overwrite)
    # Read first: a folder without episodes is noticed before gigabytes are written.
    replayed = contract.choose_frames(policy.recorded, frames, policy.cfg.chunk, policy.senses)
    fresh = fresh_folder(folder)
    # Whatever fails from here on, nothing is left beside the place either.
    try:
        _write_files(policy, fresh, progress)
        manifest = _describe(policy, fresh)
        # Written twice: a bundle opens only with a manifest, and what the contract measures belongs in it.
        write_json(fresh / MANIFEST, manifest)
        manifest["contract"] = contract.check(fresh, policy, replayed)
        write_json(fresh / MANIFEST, manifest)
        replace_folder(fresh, folder)
    finally:
        drop_folder(fresh)
    return manifest


def check_vacant(folder: pathlib.Path, overwrite: bool) -> None:
    """Refuses a place that is taken.

    Raises:
      BundleError: when a bundle is there and ``overwrite`` is false, or when anything else is there.
    """
    # An empty folder is free: whoever made it meant the bundle to go there.
    if folder.exists() and not (folder.is_dir() and (_is_bundle(folder) or not any(folder.iterdir()))):
        raise robot.BundleError(f"{folder} exists and is not a robot bundle; it is not replaced. Name another folder.")
    if _is_bundle(folder) and not overwrite:
        raise robot.BundleError(f"{folder} holds a bundle already. Name another folder, or ask to overwrite it.")


def size(policy: Policy) -> int:
    """Returns the bytes of a policy's weights."""
    return sum(math.prod(fact.shape) * fact.dtype.itemsize for fact in policy.facts.values())


def _write_files(policy: Policy, folder: pathlib.Path, progress: Progress) -> None:
    def leaves() -> Iterator[tuple[str, np.ndarray]]:
        for name, leaf in policy.leaves():
            progress(leaf.nbytes)
            yield name, leaf

    # From the config alone, as a robot that never saw this process's network would have it.
    made = program.make(policy.cfg, policy.image, policy.codec.gripper)
    # The program is traced from shapes alone; the weights are only read for their own file, leaf by leaf.
    length, dim = policy.prompt["length"], policy.cfg.action_dim
    (folder / PROGRAM).write_bytes(program.serialise(made, policy.facts, frame=policy.frame, length=length, dim=dim))
    write_json(folder / STATISTICS, policy.statistics)
    write_json(folder / RECIPE, policy.recipe())
    writer.write(folder / WEIGHTS, policy.facts, leaves())


def _describe(policy: Policy, folder: pathlib.Path) -> dict[str, Any]:
    """Returns the manifest of the files in ``folder``, without what the contract will measure."""
    return {
        "format": robot.FORMAT,
        "schema": robot.SCHEMA,
        "policy": policy.name,
        "parameters": sum(math.prod(fact.shape) for fact in policy.facts.values()),
        "platforms": list(program.PLATFORMS),
        "versions": machine.versions(),
        "files": {name: robot.file_facts(folder / name) for name in robot.FILES},
    }


def _is_bundle(folder: pathlib.Path) -> bool:
    # Both: other programs write a manifest.json too, and a folder of theirs must not be replaced.
    return (folder / MANIFEST).is_file() and (folder / PROGRAM).is_file()
