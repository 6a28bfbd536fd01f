"""What this machine has for LIBERO: packages, assets and a renderer; whatever is missing is said, or downloaded.

Training does not import this file: ``launch/tools/settle_libero.py`` is a program of its own, which a run calls before
it starts workers. Nothing here imports libero, robosuite or mujoco at the top, and nothing imports jax.

Each fault is a :class:`LiberoError` whose text ends with the command that mends it.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
from typing import Any

from wovr_jax.sim.libero import setup
from wovr_jax.sim.libero.setup import ASSETS, CUDA, LiberoError, package_folder

VERSIONS = {"hf-libero": "0.1.4", "robosuite": "1.4.1", "bddl": "1.0.1", "mujoco": "3.8.1"}
"""The versions that were tested together. mujoco from 3.12 on fails in robosuite 1.4 when an environment is built."""

FOLDERS = ("articulated_objects", "scenes", "stable_hope_objects", "stable_scanned_objects", "turbosquid_objects")
"""The folders of meshes in ``$LIBERO_ASSETS``, beside ``textures``."""
HUB = "lerobot/libero-assets"
"""The data set on the model hub that holds the assets."""

LIBRARIES = {"egl": ("EGL", "libegl1 libegl-mesa0 libgl1-mesa-dri"), "osmesa": ("OSMesa", "libosmesa6")}
"""Renderer -> its shared library and the Debian packages that bring it."""

# Drawing decides: a library may load and still find no driver. Asked is robosuite's own context, which the environments
# draw with: mujoco's chooses among the cards in another way.
PROBE = (
    "import robosuite.utils.binding_utils, robosuite.renderers.context.{}_context as drawing; context = "
    "drawing.{}GLContext(max_width=64, max_height=64, device_id=-1); context.make_current(); print('drawn')"
)
CARD = "MUJOCO_EGL_DEVICE_ID"
"""The environment variable that names the card to draw on, as EGL counts them."""


def installed() -> dict[str, str | None]:
    """Returns the version of each package of ``VERSIONS`` here, None where it is missing."""
    versions: dict[str, str | None] = dict.fromkeys(VERSIONS)
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def assets_folder() -> pathlib.Path | None:
    """Returns the folder of meshes and textures, None when there is none.

    It is ``$LIBERO_ASSETS``, else in the package, else where a download put it.

    Raises:
      LiberoError: when ``$LIBERO_ASSETS`` is no such folder.
    """
    named = os.environ.get(ASSETS)
    if named:
        folder = pathlib.Path(named).expanduser().absolute()
        lacking = [name for name in FOLDERS if not (folder / name).is_dir()]
        if lacking:
            raise LiberoError(
                f"${ASSETS} is {named}, and there is no {', '.join(lacking)} in it. "
                f"Name the folder that holds {', '.join(FOLDERS)}.\n  export {ASSETS}=<folder>"
            )
        return folder
    # hf-libero's package comes without them; a checkout of LIBERO has them inside.
    for place in (lambda: package_folder() / "assets", downloaded):
        if all((place() / name).is_dir() for name in FOLDERS):
            return place()
    return None


def downloaded() -> pathlib.Path:
    """Returns where assets from the hub are kept, which is where hf-libero itself keeps them.

    Raises:
      LiberoError: when this user has no home folder.
    """
    if (folder := os.path.expanduser("~/.cache/libero/assets")).startswith("~"):
        raise LiberoError(f"$HOME is not set, so LIBERO's assets have no place. Name one.\n  export {ASSETS}=<folder>")
    return pathlib.Path(folder)


def download_assets() -> pathlib.Path:
    """Downloads the assets from the hub, whole or not at all, and returns their folder.

    Of several processes that share a home directory one downloads and the others wait.

    Raises:
      LiberoError: when the hub cannot be reached.
    """
    import filelock
    from huggingface_hub import snapshot_download

    folder = downloaded()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The system frees it when the process dies, whichever way.
    with filelock.FileLock(folder.with_name("assets.lock")):
        # Another process may have downloaded them while this one waited for the lock.
        if all((folder / name).is_dir() for name in FOLDERS):
            return folder
        # Always the same name, so that an interrupted download is taken up again.
        fresh = folder.with_name("assets.new")
        print(f"LIBERO's assets come from the hub ({HUB}) to {folder}", file=sys.stderr, flush=True)
        try:
            snapshot_download(HUB, repo_type="dataset", local_dir=fresh)
        except Exception as error:  # the network, the hub and the disk each have errors of their own
            raise LiberoError(
                f"LIBERO's assets are neither named by ${ASSETS} nor in the package, and cannot be downloaded "
                f"({type(error).__name__}: {error}).\n  export {ASSETS}=<folder with {', '.join(FOLDERS)}>"
            ) from error
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
    return folder


def renderers() -> tuple[str, ...]:
    """Returns the renderers to try, best first: EGL where there is a graphics card, OSMesa where there is none."""
    card = any(pathlib.Path("/dev").glob("nvidia[0-9]*")) or pathlib.Path("/dev/dri").exists()
    return ("egl", "osmesa") if card else ("osmesa", "egl")


@functools.cache
def choose_renderer() -> str:
    """Returns ``egl`` or ``osmesa``, whichever draws here; ``$MUJOCO_GL`` wins and is checked too.

    Raises:
      LiberoError: when none does; it names the Debian packages that would.
    """
    asked = os.environ.get("MUJOCO_GL")
    if asked and asked not in LIBRARIES:
        raise LiberoError(f"MUJOCO_GL is {asked!r}; without a screen it is egl or osmesa.\n  unset MUJOCO_GL")
    tried = []
    # What was asked for is not replaced by another: pictures of the two differ in single pixels.
    for name in (asked,) if asked else renderers():
        problem = try_renderer(name)
        if problem is None:
            return name
        tried.append(f"{name}: {problem}")
    packages = " ".join(LIBRARIES[asked or "osmesa"][1].split())
    raise LiberoError(f"no renderer works here; {'; '.join(tried)}.\n  sudo apt-get install -y {packages}")


def try_renderer(name: str) -> str | None:
    """Returns what is wrong with a renderer, None if it draws; ``$MUJOCO_EGL_DEVICE_ID`` is then the card."""
    library, packages = LIBRARIES[name]
    if ctypes.util.find_library(library) is None:
        return f"lib{library} is missing (Debian: {packages})"
    problem, environment = "", {key: value for key, value in os.environ.items() if key != CUDA}
    for card in cards():
        environment |= {"MUJOCO_GL": name, "PYOPENGL_PLATFORM": name, CARD: card}
        # In a process of its own, because a bad driver may take the process down, and a renderer is chosen once.
        command = [sys.executable, "-c", PROBE.format(name, library)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        except subprocess.TimeoutExpired:
            return "it hangs"
        if "drawn" in done.stdout:
            os.environ[CARD] = card
            return None
        problem = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return problem


def cards() -> list[str]:
    """Returns the cards to try: the one that is named, else the first to compute on, and the first that EGL knows."""
    first = os.environ.get(CUDA, "").partition(",")[0]
    return [os.environ[CARD]] if CARD in os.environ else [first, "0"] if first.isdigit() and first != "0" else ["0"]


def settle(draw: bool) -> dict[str, Any]:
    """Finds or downloads what workers need here, and tries that LIBERO can be imported with it.

    Args:
      draw: whether something will be drawn.

    Returns:
      ``renderer``: ``egl`` or ``osmesa``, None where nothing is drawn; ``environment``: the variables of the
      environment that let a process import LIBERO without a question or a foreign setting.

    Raises:
      LiberoError: LIBERO is not installed, its assets are not to be had, or no renderer works here.
    """
    renderer = choose_renderer() if draw else None
    package = package_folder()
    assets = assets_folder() or download_assets()
    os.environ |= {ASSETS: str(assets), "LIBERO_CONFIG_PATH": str(_config_file(package, assets).parent)}
    setup.prepare()
    names = (ASSETS, "LIBERO_CONFIG_PATH", CARD)
    return {"renderer": renderer, "environment": {name: os.environ[name] for name in names if name in os.environ}}


def _config_file(package: pathlib.Path, assets: pathlib.Path) -> pathlib.Path:
    """Writes LIBERO's ``config.yaml`` for exactly this package and these assets; returns its path."""
    folders = {
        "benchmark_root": package,
        "bddl_files": package / "bddl_files",
        "init_states": package / "init_files",
        "datasets": package / "datasets",
        "assets": assets,
    }
    # JSON strings are YAML strings, and quote what YAML would misread.
    text = "".join(f"{name}: {json.dumps(str(folder))}\n" for name, folder in folders.items())
    # Named by its content: environments with other folders do not meet in one file, and workers that start together
    # write the same.
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    file = pathlib.Path(tempfile.gettempdir()) / f"wovr_jax-libero-{os.getuid()}" / name / "config.yaml"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f"config-{os.getpid()}.yaml")
        beside.write_text(text, encoding="utf-8")
        beside.replace(file)
    return file


def fingerprint(renderer: str | None) -> dict[str, Any]:
    """Returns what decides a result besides the policy: versions, renderer, and a hash over the assets."""
    assets = assets_folder()
    return {
        "python": platform.python_version(),
        "packages": installed(),
        "renderer": renderer,
        "assets": None if assets is None else hash_folder(assets),
    }


def hash_folder(folder: pathlib.Path) -> str:
    """Returns the SHA-256 over names and contents of the asset files, in alphabetical order."""
    total = hashlib.sha256()
    for name in FOLDERS + ("textures",):
        for path in sorted((folder / name).rglob("*")):
            if path.is_file():
                # The zero byte ends the name; contents enter by their digest, whose length is fixed.
                total.update(path.relative_to(folder).as_posix().encode() + b"\0")
                total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()
