"""What every test shares: the CPU, and one folder of compiled programs.

JAX's strict promotion settings stay off: optax itself mixes floats with its integer step count, and a bias or a
statistic along the last axis is broadcast on purpose throughout (the shape letters say along what).
"""

from __future__ import annotations

import os
import pathlib
import runpy
import sys
from collections.abc import Callable
from importlib.metadata import version

import pytest

# Before jax is imported. JAX_PLATFORMS=cuda (or tpu) in the environment runs the tests there instead.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".jax_cache"))
# Most programs here are small and quick to compile; together they are most of the time.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Compiling is most of the tests' time, and most of that is spent on making programs quick that then run for
# milliseconds: LLVM's optimisations, and the emitters of fused operations. XLA's own passes stay on. Processes that
# tests start inherit it. XLA stops at a flag that it does not know, hence the version.
FLAGS = {"xla_backend_optimization_level": "0"}
if version("jaxlib").startswith("0.10."):
    FLAGS["xla_cpu_use_fusion_emitters"] = "false"
given = os.environ.get("XLA_FLAGS", "")
added = [f"--{name}={to}" for name, to in FLAGS.items() if name not in given]
os.environ["XLA_FLAGS"] = " ".join([given, *added]).strip()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: two processes share the files, and none should be left with it at the end."""
    items.sort(key=lambda item: item.path.name != "test_pace.py")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple]:
    """Runs a script of launch/ with these arguments in this process: exit status or message, stdout, stderr."""

    def call(script: str, *arguments: object) -> tuple:
        door = pathlib.Path(__file__).parents[1] / "launch" / script
        monkeypatch.setattr(sys, "argv", [str(door), *map(str, arguments)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        status: object = 0
        try:
            runpy.run_path(str(door), run_name="__main__")
        except SystemExit as end:
            status = end.code
        said = capsys.readouterr()
        return status, said.out, said.err

    return call
