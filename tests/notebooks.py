"""The cells of a notebook, one after another, in a folder that looks like a clone."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run_cells(name: str, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Returns the names that the cells of a notebook leave, and their figures as ``figures``.

    Args:
      name: of the file in notebooks/.
      folder: where it runs, and what it writes to; empty but for what a test put there.
      monkeypatch: of the test.
    """
    monkeypatch.setenv("MPLBACKEND", "agg")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.close("all")  # What an earlier test left open is not this notebook's.
    cells = json.loads((ROOT / "notebooks" / name).read_text())["cells"]
    for part in ("wovr_jax", "data_prep", "launch", "configs"):
        (folder / part).symlink_to(ROOT / part)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    names["figures"] = len(pyplot.get_fignums())
    pyplot.close("all")
    return names
