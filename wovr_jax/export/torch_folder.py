"""Writes the folder that OpenVLA-OFT's PyTorch stack loads: weights and index are new, every other file as it was.

``bridge.exporter`` writes it beside its place; here it is read again, and every tensor and file compared, before the
folder is put where it belongs. The other files, and tensors that the policy does not use, are those that an import
kept; a policy that was trained further here therefore needs the import that it began with.
"""

from __future__ import annotations

import filecmp
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from wovr_jax.bridge import exporter, importer, rest
from wovr_jax.bridge.sources import find, open_source
from wovr_jax.core.disk import drop_folder, fresh_folder, replace_folder
from wovr_jax.export.robot import BundleError
from wovr_jax.export.source import Policy
from wovr_jax.weights import writer
from wovr_jax.weights.source import open_native

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
      folder: where to write it; its parents are made.
      trained: the policy whose weights are written in the place of the import's, in the import's dtypes.
      shard_bytes: most bytes of a weight file; 5 GB, as releases have, when not given.
      overwrite: whether an existing exported folder may be replaced.
      progress: called with the bytes of each tensor.

    Raises:
      BundleError: when ``folder`` holds something else, ``trained`` is another network, or the written folder does not
        read back as it should.
      FileError: when ``card`` is no imported policy, or the files that it kept are damaged.
    """
    card, folder = pathlib.Path(card), pathlib.Path(folder).expanduser().absolute()
    cfg, _, about = open_native(card, verify=True)
    origin = about.get("source", {})
    kept = {pathlib.PurePath(name) for name in origin.get("rest", {}) if name != rest.TENSORS}
    # Names that an earlier export of this import would have written; anything else in the folder is someone's work.
    expected = {str(name.relative_to(rest.FILES)) for name in kept} | {origin.get("state", {}).get("file", "")}
    check_vacant(folder, expected, overwrite)
    fresh, work = fresh_folder(folder), fresh_folder(folder.with_name(folder.name + ".work"))
    try:
        source = card if trained is None else _retrained(card, about, trained, work)
        exporter.write_export(source, FORMAT, fresh, shard_bytes=shard_bytes, progress=progress)
        _read_back(source, cfg, fresh)
        replace_folder(fresh, folder)
    finally:
        drop_folder(fresh)
        drop_folder(work)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def check_vacant(folder: pathlib.Path, expected: set[str], overwrite: bool) -> None:
    """Refuses to replace anything but an earlier export, and that only when asked.

    Args:
      folder: where an export is to go.
      expected: relative names of the files that an export writes beside its weights.
      overwrite: whether an earlier export may be replaced.

    Raises:
      BundleError: when the place is taken.
    """
    if folder.exists() and not folder.is_dir():
        # Replacing a folder would remove it.
        raise BundleError(f"{folder} is a file; name a folder.")
    # rglob of a folder that does not exist yields nothing.
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    strange = sorted(name for name in present - expected if not rest.WEIGHTS.fullmatch(name))
    if strange:
        raise BundleError(
            f"{folder} holds {strange[0]}, which no export wrote; it is not replaced. Name another folder."
        )
    if present and not overwrite:
        raise BundleError(f"{folder} holds an exported policy already. Name another folder, or ask to overwrite it.")


def _retrained(card: pathlib.Path, about: dict[str, Any], trained: Policy, work: pathlib.Path) -> pathlib.Path:
    """Writes the import ``card`` with other weights into ``work``, and returns the new card."""
    cfg, source, _ = open_native(card)
    # Shapes alone would not tell: heads and normalization leave no trace in them.
    if trained.cfg != cfg:
        raise BundleError(
            f"{trained.name} is not the network of {card}: their configs differ. Name the import it began with."
        )
    facts = source.facts

    def leaves() -> Iterator[tuple[str, np.ndarray]]:
        for name, leaf in trained.leaves():
            path = name.replace(".", "/")
            # Trained in float32, released in bfloat16: PyTorch's stack expects the release's dtypes.
            yield path, np.asarray(leaf).astype(facts[path].dtype, copy=False)

    retrained = writer.write_native(work, card.stem, cfg, facts, leaves(), {"source": about["source"]})
    # Gigabytes that nothing changes are not copied.
    kept = card.absolute().with_name(rest.folder_name(card.stem))
    retrained.with_name(kept.name).symlink_to(kept, target_is_directory=True)
    return retrained


def _read_back(card: pathlib.Path, cfg: Any, folder: pathlib.Path) -> None:
    """Compares the folder with the card: every leaf, every kept tensor, every other file."""
    _, source, about = open_native(card)
    kept = rest.open_rest(card.with_name(rest.folder_name(card.stem)), about["source"]["rest"])
    (weights,) = find(folder)
    back = importer.read_import(open_source(weights), cfg=cfg)
    # What the policy uses, then what the import only kept.
    for read, written in ((source.read, back.leaves()), (kept.read, back.rest())):
        for name, tensor in written:
            wanted = read(name)
            # As bytes, because NaN is not equal to itself.
            same = tensor.dtype == wanted.dtype and tensor.shape == wanted.shape
            if not same or tensor.tobytes() != wanted.tobytes():
                raise BundleError(f"{folder}: {name} is not what was to be written. Nothing was put in place.")
    for file in kept.files:
        if not filecmp.cmp(kept.folder / rest.FILES / file, folder / file, shallow=False):
            raise BundleError(f"{folder / file} is not the release's. Nothing was put in place.")
