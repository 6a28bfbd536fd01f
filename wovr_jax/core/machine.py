"""The compile cache, and facts about the machine."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import pathlib
import platform
import resource
import sys

import jax
from jax.experimental.compilation_cache import compilation_cache


def enable_compile_cache(folder: str | os.PathLike) -> pathlib.Path:
    """Keeps compiled programs in ``folder`` between processes; returns the folder in use.

    The environment variable ``JAX_COMPILATION_CACHE_DIR`` wins over ``folder``. Small and
    quick programs are kept too: on a laptop they are most of the start-up time.

    On several CPU devices nothing is kept or read, since a program from the cache may stand still for ever there
    (jaxlib 0.10.2): its devices do not agree on the order of collectives that are independent, and wait in different
    ones. The sharded policy step did so in 9 of 9 processes that read it, in none of the 4 that had compiled it.
    """
    path = pathlib.Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or folder).expanduser().resolve()
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # else a cache that a program has used stays in use
    jax.config.update("jax_compilation_cache_dir", str(path))
    # JAX's own limits leave out what compiles in less than a second.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path


def peak_rss_gb() -> float:
    """Returns the largest resident memory of this process so far, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kibibytes, macOS bytes.
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that decide a number."""
    installed = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "wovr_jax"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # ours, when it runs from its source
            installed[package] = importlib.metadata.version(package)
    return installed


def device_name() -> str:
    """Returns what the process computes on, for example ``"1 x NVIDIA H100"`` or ``"cpu, 2 cores"``."""
    devices = jax.devices()
    if devices[0].platform == "cpu":
        # The cores that this process may use: a container or a scheduler often gives fewer than there are.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return f"cpu, {cores} cores"
    return f"{len(devices)} x {devices[0].device_kind}"
