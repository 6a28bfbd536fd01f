"""Keys by name, the compile counter, the ledger."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.core import keys, machine
from wovr_jax.run.ledger import Account, Ledger


def data(key: jax.Array) -> list[int]:
    return np.asarray(jax.random.key_data(key)).tolist()


def test_key_is_the_same_in_another_process():
    code = "import jax; from wovr_jax import runtime; print(jax.random.key_data(keys.key(3, 'grpo', 5)).tolist())"
    environment = {"PYTHONHASHSEED": "77", "JAX_PLATFORMS": "cpu", "PYTHONPATH": "."}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert json.loads(result.stdout) == data(keys.key(3, "grpo", 5))


def test_key_depends_on_every_name_and_their_order():
    made = [keys.key(0), keys.key(1), keys.key(0, "a"), keys.key(0, "b"), keys.key(0, "a", "b")]
    made += [keys.key(0, "b", "a"), keys.key(0, "a", 0), keys.key(0, 0), keys.key(0, -1)]
    assert len({tuple(data(key)) for key in made}) == len(made)
    assert jnp.issubdtype(keys[0].dtype, jax.dtypes.prng_key)


def test_key_takes_a_traced_step():
    traced = jax.jit(lambda i: keys.key(0, "noise", i))(jnp.int32(7))
    assert data(traced) == data(keys.key(0, "noise", 7))


def test_compiles_are_counted_by_function():
    def grown(x):
        return x * 2 + 1

    step = jax.jit(grown)
    with machine.count_compiles() as compiles:
        step(jnp.ones(3))
        step(jnp.zeros(3))
        assert compiles["grown"] == 1
        step(jnp.ones(4))
    assert compiles["grown"] == 2
    step(jnp.ones(5))
    assert compiles["grown"] == 2  # no longer listening


def test_ledger_books_by_stage():
    ledger = Ledger()
    ledger.add("collect", true_steps=240, seconds=1.5)
    ledger.add("grpo-1", imagined_frames=1000)
    ledger.add("collect", true_steps=10)
    assert ledger["collect"] == Account(250, 0, 1.5)
    assert ledger["grpo-1"].true_steps == 0 and ledger["never"].true_steps == 0
    assert ledger.total() == Account(250, 1000, 1.5) and Ledger().total() == Account()
    written = json.loads(json.dumps(ledger.to_dict()))
    assert list(written) == ["collect", "grpo-1"] and written["grpo-1"]["imagined_frames"] == 1000


def test_facts_about_the_machine():
    assert 0.01 < machine.peak_rss_gb() < 1000
    assert {"python", "jax", "numpy"} <= set(machine.versions())
    assert machine.device_name()


@pytest.mark.parametrize(("devices", "kept"), [(1, True), (2, False)])
def test_programs_for_several_cpu_devices_are_not_kept(devices, kept, tmp_path):
    """One that was read from the cache may wait for ever (see the function's docstring)."""
    code = (
        "import jax, sys; from wovr_jax import runtime; jax.numpy.ones(3);"  # the cache is in use already
        "runtime.enable_compile_cache(sys.argv[1]); jax.jit(lambda x: x + 1)(1.0).block_until_ready()"
    )
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True)
    assert any("lambda" in one.name for one in tmp_path.iterdir()) == kept


def test_environment_wins_over_the_cache_folder(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    try:
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        assert machine.enable_compile_cache(tmp_path / "a") == tmp_path / "a"
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "b"))
        assert machine.enable_compile_cache(tmp_path / "a") == tmp_path / "b"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
