"""Looks at this machine and says what is wrong with it, and the line that mends it.

    python launch/doctor.py             versions, devices, memory, disk, video; LIBERO where it is installed
    python launch/doctor.py --libero    LIBERO has to be there
    python launch/doctor.py --step      and one step of it is taken and drawn, half a minute the first time
    python launch/doctor.py --json      the same for a program: {"well": ..., "checks": [...], "optional": [...]}

Ends with status 1 when something has to be mended. What only some commands need may be missing; it is listed with the
line that brings it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import os
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from launch import command, terminal

CLONE = (ROOT / "pyproject.toml").is_file()
"""Whether this is a clone; else pip put the programs beside an installed package."""
DISK_GB, MEMORY_GB = 10.0, 6.0
"""What the loop on the embedded table wants to find free, generously counted."""
EXTRAS = {
    "serve": "wovr serve, wovr play and wovr export --to jax",
    "formats": "wovr data, wovr import of a policy's tokenizer, LIBERO's assets",
    "hdf5": "wovr data libero_hdf5",
}
"""Extra -> what needs it. Those of tests and accelerators are not listed: who wants them knows."""


class FaultError(Exception):
    """Something to mend: what is wrong, and on the next line the command."""


def main() -> None:
    """Runs every check that was asked for and prints one line each."""
    parser = command.Parser(__doc__)
    parser.add_argument("--libero", action="store_true", help="LIBERO has to be there")
    parser.add_argument("--step", action="store_true", help="take and draw one step of LIBERO")
    parser.add_argument("--json", action="store_true", help="for a program: nothing but JSON on stdout")
    args = parser.parse_args()
    checks: list[tuple[str, Callable[[], str]]] = [
        ("python", python),
        ("packages", packages),
        ("devices", devices),
        ("memory", memory),
        ("disk", disk),
        ("video", video),
    ]
    # Who has LIBERO wants it to work; who has not need not be told three times.
    if args.libero or args.step or libero_is_there():
        checks += [("libero", libero), ("assets", assets), ("renderer", renderer)]
    if args.step:
        checks.append(("step", step))
    reports = []
    for name, check in checks:
        reports.append(examine(name, check))
        if not args.json:
            print(describe(reports[-1]), flush=True)
    missing = find_missing_extras()
    faults = sum(not found["ok"] for found in reports)
    if args.json:
        terminal.print_json({"well": not faults, "checks": reports, "optional": missing})
    else:
        for part in missing:
            print(f"-     {part['name']:9s} for {part['for']}\n          {part['line']}")
        print(f"{faults} to mend." if faults else "All well.")
    sys.exit(bool(faults))  # status 1 for one fault or five


def examine(name: str, check: Callable[[], str]) -> dict[str, Any]:
    """Runs one check; returns its ``name``, whether it is ``ok``, what it ``says``, and the ``line`` that mends it."""
    try:
        return {"name": name, "ok": True, "says": check(), "line": ""}
    except FaultError as fault:
        what, _, line = str(fault).partition("\n")
        return {"name": name, "ok": False, "says": what, "line": line.strip()}
    except Exception as error:  # what nobody thought of must not keep the other checks from being made
        return {"name": name, "ok": False, "says": f"this check itself failed: {error!r}", "line": ""}


def describe(found: dict[str, Any]) -> str:
    """Returns a check as a line, and a second one where it has to be mended."""
    mark = terminal.paint("ok  ", "green") if found["ok"] else terminal.paint("MEND", "red")
    return f"{mark}  {found['name']:9s} {found['says']}" + (f"\n          {found['line']}" if found["line"] else "")


# ---------------------------------------------------------------- the machine


def python() -> str:
    """Checks that the project runs on this Python."""
    version = ".".join(map(str, sys.version_info[:3]))
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        raise FaultError(f"{version}; needed is 3.11, 3.12 or 3.13\nsudo apt-get install -y python3.11 python3.11-venv")
    return f"{version}, {sys.prefix}"


def packages() -> str:
    """Checks that what everything needs is there: in a clone as ``requirements.txt`` pins it, else in its ranges."""
    if not CLONE:  # pip chose versions from the ranges, which are all that is promised
        from wovr_jax.core import extras

        if lacking := extras.find_missing(""):
            wanted = ", ".join(map(str, lacking))
            raise FaultError(f"missing, too old or too new: {wanted}\n{extras.install_line(lacking)}")
        return f"{len(extras.declared()[''])} in the wanted ranges"
    pins = dict(pinned(ROOT / "requirements.txt"))
    wrong = [f"{name} {version or 'missing'} (wanted {pins[name]})" for name, version in different(pins)]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise FaultError(
            f"{', '.join(wrong[:3])}{more}\n{sys.executable} -m pip install -r {ROOT / 'requirements.txt'}"
        )
    return f"{len(pins)} as pinned"


def pinned(file: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Yields name and version of each line of a requirements file."""
    for line in file.read_text(encoding="utf-8").splitlines():
        # The name, the version, and no more: markers and comments may follow.
        pin = re.match(r"([A-Za-z0-9_.-]+)==([^\s;#]+)", line)
        if pin:
            yield pin[1], pin[2]


def different(pins: dict[str, str]) -> Iterator[tuple[str, str | None]]:
    """Yields packages that are not installed in the version of ``pins``, with the one that is."""
    for name, wanted in pins.items():
        version = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(name)
        if version != wanted:
            yield name, version


def devices() -> str:
    """Says what JAX computes on; a graphics card that it does not see is a fault."""
    # Without the driver's own programs: they are what may be missing.
    card = any(pathlib.Path("/dev").glob("nvidia[0-9]*"))
    try:
        import jax

        from wovr_jax.core.machine import device_name

        device = f"{device_name()} (jax {jax.__version__})"
    except ImportError as error:
        raise FaultError(
            f"jax does not start: {error}\n{sys.executable} -m pip install -r {ROOT / 'requirements.txt'}"
        ) from error
    except Exception as error:  # without the wanted devices jax fails in several ways
        raise FaultError(explain(error) or f"jax does not start: {error!r}") from error
    # A user who has set JAX_PLATFORMS=cpu wants it so.
    if card and jax.default_backend() == "cpu" and "cpu" not in os.environ.get("JAX_PLATFORMS", ""):
        line = f"{sys.executable} -m pip install 'jax[cuda13]=={jax.__version__}'"
        raise FaultError(f"there is an NVIDIA card, and jax computes on the {device}\n{line}")
    return device


def explain(error: Exception) -> str:
    """Returns what of the machine made a program fail with ``error``, and what to do; empty where nothing of it did."""
    if isinstance(error, ImportError):
        from wovr_jax.core import extras

        return extras.explain(error)
    if "home directory" in str(error):
        return "There is no home folder for ~: $HOME is not set, and this user is not known here.\nWrite whole paths."
    if (jax := sys.modules.get("jax")) is None:
        return ""
    try:
        jax.devices()
    except Exception as fault:  # a plugin may fail in any way, a missing one by a bare assertion
        # The last line says what failed; there is none where nobody knows the name.
        reason = (str(fault).strip().splitlines() or ["nothing that is installed has that name"])[-1]
        plugins = sorted(plugin.name for plugin in importlib.metadata.entry_points(group="jax_plugins"))
        return (
            f"jax has no devices: JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r} is asked for, installed is "
            f"{', '.join(['cpu', *plugins])} ({reason}).\nJAX_PLATFORMS=cpu computes on the CPU; for a card install "
            "jax[cuda13], for a TPU jax[tpu]. launch/doctor.py looks at the machine."
        )
    return ""


def memory() -> str:
    """Checks the main memory."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if total < MEMORY_GB:
        raise FaultError(
            f"{total:.1f} GiB; the loop on the embedded table takes about 3, with its environment {MEMORY_GB:.0f}\n"
            "choose a machine with more memory, or smaller batches: --config.collect.batch=32"
        )
    return f"{total:.1f} GiB"


def disk() -> str:
    """Checks the room for runs: beside the project, or where the command is given."""
    folder = ROOT if CLONE else pathlib.Path.cwd()
    free = shutil.disk_usage(folder).free / 1e9
    if free < DISK_GB:
        raise FaultError(
            f"{free:.1f} GB free at {folder}, {DISK_GB:.0f} are wanted\ndf -h {folder}; rm -r {folder / 'runs'}/<old>"
        )
    return f"{free:.0f} GB free at {folder}"


def video() -> str:
    """Checks that films are written and read: a small one is, in memory."""
    # The wheel has FFmpeg's libraries in it, H.264 included, which a build from source may lack.
    av_pin = f"av=={dict(pinned(ROOT / 'requirements.txt'))['av']}"
    line = f"{sys.executable} -m pip install --force-reinstall --no-deps --only-binary=:all: {av_pin}"
    try:
        import av
        import numpy as np

        film, frame_HWC = io.BytesIO(), np.full((64, 64, 3), 200, np.uint8)
        with av.open(film, "w", "mp4") as file:
            stream = file.add_stream("libx264", 10, {"crf": "16"}, width=64, height=64, thread_count=1)
            for _ in range(5):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC)))
            file.mux(stream.encode())
        film.seek(0)
        with av.open(film, "r") as back:
            read = [frame.to_ndarray(format="rgb24") for frame in back.decode(video=0)]
    except Exception as error:  # a build of one's own may lack H.264, a library may not load, a decoder may refuse
        raise FaultError(f"no films: {type(error).__name__}: {error}\n{line}") from error
    apart = max((int(np.abs(frame.astype(int) - frame_HWC).max()) for frame in read), default=255)
    if len(read) != 5 or apart > 8:
        raise FaultError(f"of a film of 5 frames {len(read)} are read back, up to {apart} of 255 levels apart\n{line}")
    libavcodec = ".".join(map(str, av.library_versions["libavcodec"]))
    return f"av {av.__version__}, libavcodec {libavcodec}: a small film is written in H.264 and read back"


# ---------------------------------------------------------------- what may be missing


def find_missing_extras() -> list[dict[str, str]]:
    """Returns the optional parts that are not there: ``name``, what they are ``for``, and the ``line`` to type."""
    from wovr_jax.core import extras

    lacking = {name: extras.find_missing(name) for name in EXTRAS}
    parts = [
        {"name": name, "for": EXTRAS[name], "line": extras.install_line(missing)}
        for name, missing in lacking.items()
        if missing
    ]
    if not libero_is_there():
        line = "make libero" if CLONE else libero_line()
        parts.append({"name": "libero", "for": "the real simulator, wovr evaluate", "line": line})
    return parts


# ---------------------------------------------------------------- LIBERO


def libero_line() -> str:
    """Returns what installs LIBERO without make."""
    return f"{sys.executable} -m pip install --no-deps -r {ROOT / 'requirements-libero.txt'}"


def libero_is_there() -> bool:
    """Whether any of it is installed."""
    from wovr_jax.sim.libero import machine

    return machine.installed()["hf-libero"] is not None


def libero() -> str:
    """Checks that the tested versions are there, on a tested Python."""
    from wovr_jax.sim.libero import machine

    # Before the packages: on another Python their pins cannot be installed at all.
    if sys.version_info[:2] > (3, 12):
        raise FaultError(
            "LIBERO was tested on Python 3.11 and 3.12\nmake libero VENV=.venv-libero   (with python3.12 there)"
        )
    pins = dict(pinned(ROOT / "requirements-libero.txt"))
    wrong = [f"{name} {version or 'missing'} (wanted {pins[name]})" for name, version in different(pins)]
    if wrong:
        raise FaultError(
            f"{', '.join(wrong[:3])}{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}\n{libero_line()}"
        )
    return ", ".join(f"{name} {version}" for name, version in machine.installed().items())


def assets() -> str:
    """Checks that meshes and textures are there."""
    from wovr_jax.sim.libero import machine

    with faults():
        folder = machine.assets_folder()
    if folder is None:
        raise FaultError(
            f"no assets; they are downloaded on first use, or lie in a folder named by ${machine.ASSETS}\n"
            f"{sys.executable} -c 'from wovr_jax.sim.libero import machine; machine.download_assets()'"
        )
    # The hash tells two machines apart that draw different pictures from the same code.
    return f"{folder}, sha256 {machine.hash_folder(folder)[:12]}"


def renderer() -> str:
    """Checks that EGL or OSMesa draws."""
    from wovr_jax.sim.libero import machine

    with faults():
        renderer = machine.choose_renderer()
    # What else was tried is shown too: a slow renderer that works may hide a fast one that does not.
    others = [f"{name}: {problem}" for name in machine.LIBRARIES if (problem := machine.try_renderer(name))]
    return f"{renderer}{f' ({others[0]})' if others else ''}"


def step() -> str:
    """Lets one environment in a worker process take and draw a step."""
    from wovr_jax.sim.libero import worker
    from wovr_jax.sim.libero.evaluate import trials
    from wovr_jax.sim.libero.pool import Lost, Pool
    from wovr_jax.sim.libero.tasks import SceneConfig, protocol

    began = time.perf_counter()
    with faults(), Pool(1, SceneConfig()) as pool:
        pool.send(0, worker.begin, trials("libero_spatial", [0], only=[0])[0], protocol("openvla"))
        _, seen = pool.receive()
    if isinstance(seen, Lost):
        raise FaultError(
            f"{seen.reason.splitlines()[-1]}\nsee the text above; {sys.executable} launch/doctor.py --libero"
        )
    # A renderer without a display can succeed and draw one colour.
    shades = len(set(seen.frame_FHWC[0].reshape(-1, 3).sum(-1).tolist()))
    if shades < 50:
        raise FaultError(
            f"the frame has {shades} shades: nothing was drawn\nMUJOCO_GL=osmesa {sys.executable} {__file__} --step"
        )
    return f"256 x 256 pixels of libero_spatial, task 0, in {time.perf_counter() - began:.0f} s"


@contextlib.contextmanager
def faults() -> Iterator[None]:
    """Turns LIBERO's complaints into faults; their last line mends them."""
    from wovr_jax.sim.libero.setup import LiberoError

    try:
        yield
    except LiberoError as error:
        *what, line = str(error).splitlines()
        raise FaultError(f"{' '.join(what) or line}\n{line if what else ''}") from error


if __name__ == "__main__":
    main()
