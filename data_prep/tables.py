"""The files of a LeRobot data set, each read with words for what is wrong with it: tables, descriptions, pictures."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep import files
from data_prep.demos import SourceError
from wovr_jax.core import disk


def picture(cell: Any, name: str, folder: pathlib.Path | None = None) -> np.ndarray:
    """Decodes a frame that lies in a table as an encoded picture, or in a file that the table names.

    Raises:
      SourceError: no picture, a damaged one, or one that is not of colour.
    """
    from PIL import Image  # part of an extra; data sets with videos do without

    cell = cell if isinstance(cell, Mapping) else {"bytes": cell}
    encoded = cell.get("bytes")
    if not encoded and cell.get("path"):
        path = (folder or pathlib.Path()) / cell["path"]
        files.check(path, "a picture")
        encoded = path.read_bytes()
    if not isinstance(encoded, bytes):
        raise SourceError(f"{name}: a picture is missing: its cell holds neither bytes nor the path of a file.")
    if encoded.startswith(files.LFS):
        raise SourceError(f"{name}: a picture is a pointer of Git LFS: fetch the data with `git lfs pull`.")
    try:
        image = Image.open(io.BytesIO(encoded))
        mode, pixels = image.mode, np.asarray(image.convert("RGB"))
    except Exception as error:  # a damaged picture fails in every way there is
        raise SourceError(f"{name}: a picture is damaged ({type(error).__name__}: {error}).") from error
    if mode.startswith(("I", "F")):
        raise SourceError(f"{name}: expected pictures of colour with 8 bits, got depth or the like (mode {mode}).")
    return pixels


def numbers(column: Any) -> np.ndarray:
    """Returns a column of one number a row, which may lie in lists of one."""
    value_N = np.asarray(column.to_pylist(), np.float64)
    return value_N.reshape(len(value_N), -1)[:, 0] if value_N.size else value_N.reshape(-1)


def fill(folder: pathlib.Path, pattern: str, at: Mapping[str, Any], where: pathlib.Path) -> pathlib.Path:
    """Returns the path of a file by a pattern of ``where``; raises a SourceError where it asks for more than ``at``."""
    try:
        return folder / pattern.format(**at)
    except (KeyError, IndexError, ValueError) as error:
        raise SourceError(f"{where}: the path {pattern!r} cannot be filled with {', '.join(at)} ({error}).") from error


def need(facts: Mapping[str, Any], key: str, kind: Any, where: pathlib.Path) -> Any:
    """Returns ``facts[key]``; raises a SourceError where it is missing or of another type."""
    value = facts.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        got = "nothing" if value is None else repr(value)[:60]
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise SourceError(f"{where}: expected {key!r} as {names}, got {got}.")
    return value


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the object of a JSON file; raises a SourceError where it is none."""
    files.check(path, "a description of a data set")
    try:
        facts = disk.read_json(path)
    except ValueError as error:
        raise SourceError(f"{path}: not JSON ({error}).") from error
    if not isinstance(facts, dict):
        raise SourceError(f"{path}: expected an object, got {type(facts).__name__}.")
    return facts


def read_table(path: pathlib.Path, columns: list[str] | None = None) -> pa.Table:
    """Returns a table with those of the columns that it has, or with all."""
    files.check(path, "a parquet file", b"PAR1")
    try:
        with pq.ParquetFile(path) as file:
            there = file.schema_arrow.names
            return file.read([name for name in columns if name in there] if columns is not None else None)
    except Exception as error:  # pyarrow's own, and the system's
        raise SourceError(files.unreadable(path, "a parquet file", error)) from error
