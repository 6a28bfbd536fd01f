"""A policy as the folder that OpenVLA-OFT's PyTorch stack loads: weights and index new, every other file as it was.

``bridge.exporter`` writes it, beside its place; here it is read again and every tensor and file compared before the
folder is put where it belongs. The other files and the tensors that the policy does not use are those that an import
kept, so a policy that was trained further here is written over the import that it began with.
"""

from __future__ import annotations

import filecmp
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from wovr_jax.bridge import exporter, importer, rest
from wovr_jax.bridge.sources import find, open_source
from wovr_jax.core.disk import fresh_folder, replace_folder
from wovr_jax.export.robot import BundleError
from wovr_jax.export.source import Policy
from wovr_jax.weights import native

FORMAT = "openvla"


def write(
    card: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    trained: Policy | None = None,
    shard_bytes: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> list[pathlib.Path]:
    """Writes the folder and returns its files.

    Args:
      card: ``policy.json`` of an imported policy.
      folder: where; its parents are made.
      trained: the policy whose weights are written in the place of the import's, in the import's dtypes.
      shard_bytes: most bytes of a weight file; 5 GB as released when not given.
      overwrite: whether an exported folder that is there may be replaced.
      progress: told of the bytes of each tensor.

    Raises:
      BundleError: ``folder`` holds something else, ``trained`` is another network, or what was written is not
        what was to be written.
      FileError: ``card`` is no imported policy, or what it kept is damaged.
    """
    card, folder = pathlib.Path(card), pathlib.Path(folder).expanduser().absolute()
    cfg, _, about = native.open_native(card, verify=True)
    origin = about.get("source", {})
    kept = {pathlib.PurePath(name) for name in origin.get("rest", {}) if name != rest.TENSORS}
    own = {str(name.relative_to(rest.FILES)) for name in kept} | {origin.get("state", {}).get("file", "")}
    vacant(folder, own, overwrite)
    fresh, work = fresh_folder(folder), fresh_folder(folder.with_name(folder.name + ".work"))
    try:
        source = card if trained is None else _retrained(card, about, trained, work)
        exporter.write_export(source, FORMAT, fresh, shard_bytes=shard_bytes, progress=progress)
        _read_back(source, cfg, fresh)
        replace_folder(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def vacant(folder: pathlib.Path, kept: set[str], overwrite: bool) -> None:
    """Refuses to replace anything but an earlier export, and that only when asked."""
    if folder.exists() and not folder.is_dir():
        raise BundleError(f"{folder} is a file; name a folder.")
    there = (
        {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} if folder.exists() else set()
    )
    strange = sorted(name for name in there - kept if not rest.WEIGHTS.fullmatch(name))
    if strange:
        raise BundleError(
            f"{folder} holds {strange[0]}, which no export wrote; it is not replaced. Name another folder."
        )
    if there and not overwrite:
        raise BundleError(f"{folder} holds an exported policy already. Name another folder, or ask to overwrite it.")


def _retrained(card: pathlib.Path, about: dict[str, Any], trained: Policy, work: pathlib.Path) -> pathlib.Path:
    """The import ``card`` with other weights, in ``work``; what it kept is the import's own."""
    cfg, source, _ = native.open_native(card)
    if trained.cfg != cfg:
        raise BundleError(
            f"{trained.name} is not the network of {card}: their configs differ. Name the import it began with."
        )
    facts = source.facts

    def leaves() -> Iterator[tuple[str, np.ndarray]]:
        for name, leaf in trained.leaves():
            path = name.replace(".", "/")
            yield path, np.asarray(leaf).astype(facts[path].dtype, copy=False)

    made = native.write(work, card.stem, cfg, facts, leaves(), {"source": about["source"]})
    kept = card.absolute().with_name(rest.folder_name(card.stem))
    made.with_name(kept.name).symlink_to(kept, target_is_directory=True)
    return made


def _read_back(card: pathlib.Path, cfg: Any, folder: pathlib.Path) -> None:
    """Compares the folder with the card: every leaf, every kept tensor, every other file."""
    _, source, about = native.open_native(card)
    kept = rest.open_rest(card.with_name(rest.folder_name(card.stem)), about["source"]["rest"])
    (weights,) = find(folder)
    back = importer.read_import(open_source(weights), cfg=cfg)
    pairs = [*((source.read, back.leaves()),), (kept.read, back.rest())]
    for read, written in pairs:
        for name, tensor in written:
            if not _same(tensor, read(name)):
                raise BundleError(f"{folder}: {name} is not what was to be written. Nothing was put in place.")
    for file in kept.files:
        if not filecmp.cmp(kept.folder / rest.FILES / file, folder / file, shallow=False):
            raise BundleError(f"{folder / file} is not the release's. Nothing was put in place.")


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
