"""How processes get LIBERO: where it is installed, and what is settled before it is imported.

LIBERO's package (libero/libero/__init__.py) asks a question on the terminal when it is first imported, takes its
folders from a file in the home directory that another environment may have written, and downloads its assets in a way
that current huggingface_hub refuses. ``settle`` has all three seen to before workers start: by a program of its own
(``sim.libero.machine``), since none of it is part of training. Nothing here imports libero, robosuite or mujoco at the
top, and nothing imports jax, because every worker imports this.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import pathlib
import sys
from typing import Any

SETTLE = "settle_libero.py"
"""The program that looks for what LIBERO needs here."""

INSTALL = "make libero   (or: pip install --no-deps -r requirements-libero.txt)"
ASSETS = "LIBERO_ASSETS"
"""The environment variable that names a folder of assets."""
CUDA = "CUDA_VISIBLE_DEVICES"
"""The one that names the cards to compute on. robosuite reads it too, and fails where it is empty or counts otherwise
than EGL."""


class LiberoError(ValueError):
    """Tells why LIBERO cannot run here as asked, and what to do."""


def package_folder() -> pathlib.Path:
    """Returns ``.../site-packages/libero/libero``, with tasks, initial states and code.

    Raises:
      LiberoError: when LIBERO is not installed.
    """
    # Found without being imported: the import asks its question.
    spec = importlib.util.find_spec("libero")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        folder = pathlib.Path(location) / "libero"
        if (folder / "bddl_files").is_dir():
            return folder
    raise LiberoError(f"LIBERO is not installed in {sys.prefix}.\n  {INSTALL}")


@functools.cache
def settle(draw: bool) -> str | None:
    """Has everything made ready for workers, which inherit the environment that is set here; returns the renderer.

    Args:
      draw: whether they will draw; without, no renderer is looked for, and it is None.

    Raises:
      LiberoError: LIBERO is not installed, its assets are not to be had, or no renderer works here.
    """
    settled = _ask("settle", *["--draw"] * draw)
    os.environ.update(settled["environment"])
    return settled["renderer"]


def fingerprint(renderer: str | None) -> dict[str, Any]:
    """Returns what decides a result besides the policy: versions, renderer, and a hash over the assets."""
    return _ask("fingerprint", f"--renderer={renderer or ''}")


def _ask(*words: str) -> Any:
    # Not at the top: it brings jax along, and every worker imports this module and never calls this function.
    from wovr_jax.sim.arena import call_program

    status, said = call_program(SETTLE, *words)
    if status:
        raise LiberoError(said or f"{SETTLE} ended with exit status {status}; what it said stands above.")
    return json.loads(said)


def prepare(renderer: str | None = None) -> None:
    """Imports ``libero.libero`` in this process, in the environment that was settled.

    Args:
      renderer: ``egl`` or ``osmesa``; None when nothing will be drawn.
    """
    if renderer:
        os.environ["MUJOCO_GL"] = os.environ["PYOPENGL_PLATFORM"] = renderer
    import libero.libero as library  # pyright: ignore[reportMissingImports]

    # LIBERO's own search looks in the package and on the hub, and does not read `assets` in its file.
    library._assets_path_cache = os.environ[ASSETS]
