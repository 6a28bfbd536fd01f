"""The compile counter, the compile cache, and facts about the machine."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from tests.compiles import count_compiles
from wovr_jax.core import machine


def test_compiles_are_counted_by_function():
    def grown(x):
        return x * 2 + 1

    step = jax.jit(grown)
    with count_compiles() as compiles:
        step(jnp.ones(3))
        step(jnp.zeros(3))
        assert compiles["grown"] == 1
        step(jnp.ones(4))
    assert compiles["grown"] == 2
    step(jnp.ones(5))
    assert compiles["grown"] == 2  # no longer listening


def test_facts_about_the_machine():
    assert 0.01 < machine.peak_rss_gb() < 1000
    assert {"python", "jax", "numpy"} <= set(machine.versions())
    assert machine.device_name()


@pytest.mark.parametrize(("devices", "kept"), [(1, True), (2, False)])
def test_programs_for_several_cpu_devices_are_not_kept(devices, kept, tmp_path):
    """One that was read from the cache may wait for ever (see the function's docstring)."""
    code = (
        "import jax, sys; from wovr_jax.core import machine; jax.numpy.ones(3);"  # the cache is in use already
        "machine.enable_compile_cache(sys.argv[1]); jax.jit(lambda x: x + 1)(1.0).block_until_ready()"
    )
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True)
    assert any("lambda" in entry.name for entry in tmp_path.iterdir()) == kept


def test_environment_wins_over_the_cache_folder(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    try:
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        assert machine.enable_compile_cache(tmp_path / "a") == tmp_path / "a"
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "b"))
        assert machine.enable_compile_cache(tmp_path / "a") == tmp_path / "b"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
