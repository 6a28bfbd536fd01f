"""Keys by name: the same in every process, another one for every name."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax.core import keys


def data(key: jax.Array) -> list[int]:
    return np.asarray(jax.random.key_data(key)).tolist()


def test_key_is_the_same_in_another_process():
    code = "import jax; from wovr_jax.core import keys; print(jax.random.key_data(keys.key(3, 'grpo', 5)).tolist())"
    environment = {"PYTHONHASHSEED": "77", "JAX_PLATFORMS": "cpu", "PYTHONPATH": "."}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert json.loads(result.stdout) == data(keys.key(3, "grpo", 5))


def test_key_depends_on_every_name_and_their_order():
    made = [keys.key(0), keys.key(1), keys.key(0, "a"), keys.key(0, "b"), keys.key(0, "a", "b")]
    made += [keys.key(0, "b", "a"), keys.key(0, "a", 0), keys.key(0, 0), keys.key(0, -1)]
    assert len({tuple(data(key)) for key in made}) == len(made)
    assert jnp.issubdtype(made[0].dtype, jax.dtypes.prng_key)


def test_key_takes_a_traced_step():
    traced = jax.jit(lambda i: keys.key(0, "noise", i))(jnp.int32(7))
    assert data(traced) == data(keys.key(0, "noise", 7))
