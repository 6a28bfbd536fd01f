"""Random arrays in the place of weights and data, made on the device, of the shapes that programs take."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wovr_jax.nn.functional import Pure
from wovr_jax.policy.actions import BINS
from wovr_jax.types import Array

NOISE = 2**20
"""Different random numbers in what is made up; larger arrays repeat them."""


def small_ids(*shape: int) -> np.ndarray:
    """Returns small token ids, which every vocabulary has; none of them is padding."""
    return (1 + np.arange(math.prod(shape)) % 9).reshape(shape).astype(np.int32)


def compute_dtypes(net: Pure) -> dict[tuple[Any, ...], Any]:
    """Returns path -> dtype for the weights that their layer casts before each use; all others stay float32."""
    dtypes = {}
    for path, module in nnx.iter_modules(net.module(net.shapes())):
        dtype = getattr(module, "dtype", None)
        if dtype is not None:
            # Norms and tables have no dtype of their own and are computed with in float32.
            for name in ("kernel", "bias", "embedding"):
                if isinstance(getattr(module, name, None), nnx.Variable):
                    dtypes[*map(str, path), name] = jnp.dtype(dtype)
    return dtypes


def cast(tree: Any, dtypes: dict[tuple[Any, ...], Any]) -> Any:
    """Returns shapes with other dtypes where the path is in ``dtypes``; adapters, which are not, stay as they are."""

    def change(path: Any, leaf: Any) -> Any:
        dtype = dtypes.get(tuple(_name(key) for key in path))
        return leaf if dtype is None else jax.ShapeDtypeStruct(leaf.shape, dtype)

    return jax.tree_util.tree_map_with_path(change, tree)


def _name(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def last_name(path: Any) -> str:
    """Returns the name at the end of a path of ``jax.tree_util``, empty for the root."""
    return _name(path[-1]) if path else ""


def fill(shapes: Any) -> Any:
    """Makes the arrays of a tree of shapes on the device, in one program.

    Weights and moments are told from data by their place: what lies under ``opt_state`` begins at zero, as a training
    does. Weights are normal numbers over the root of what a layer sums, scales and variances lie around 1. Frames are
    within [-1, 1]; prompts and tokens are small ids; of flags the last one of every other row is set, so that the
    groups of an update have both outcomes.
    """
    block = jax.random.normal(jax.random.key(0), (NOISE,), jnp.float32)
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)

    # The noise is an argument, and each array a repetition of it that begins elsewhere: drawn one by one, billions of
    # numbers would take their own memory twice again, and their programs minutes to compile.
    @jax.jit
    def make(block: Array) -> list[Array]:
        return [_draw(path, leaf, block, place) for place, (path, leaf) in enumerate(leaves)]

    return tree.unflatten(make(block))


def _draw(path: Any, leaf: Any, block: Array, place: int) -> Array:
    name, size, shape, dtype = last_name(path), math.prod(leaf.shape), leaf.shape, leaf.dtype
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    if any(_name(key) == "opt_state" for key in path):
        return jnp.zeros(shape, dtype)
    if jnp.issubdtype(dtype, jnp.bool_):
        # Rows by turns: none, and the last flag of the row.
        flags = np.zeros((shape[0], size // shape[0]) if shape else (), bool)
        if shape:
            flags[1::2, -1] = True
        return jnp.asarray(flags.reshape(shape))
    turned, times = jnp.roll(block, 7919 * place), -(-size // NOISE)
    noise = jnp.broadcast_to(turned, (times, NOISE)).reshape(-1)[:size].reshape(shape)
    if jnp.issubdtype(dtype, jnp.integer):
        if dtype == jnp.uint8:
            return jnp.clip(64 * noise + 128, 0, 255).astype(dtype)
        if "prompt" in name or "token" in name:
            return jnp.asarray(small_ids(*shape)).astype(dtype)
        return jnp.zeros(shape, dtype)
    if not shape:
        return jnp.ones(shape, dtype)  # a factor on the learning rate, a threshold
    if "logp" in name:
        return jnp.full(shape, -math.log(BINS), dtype)
    if name in ("scale", "gamma", "var", "ls1", "ls2"):
        return (1 + 0.1 * jnp.clip(noise, -3, 3)).astype(dtype)
    if "hwc" in name:
        return noise.astype(dtype)  # latents
    if "frame" in name or "HWC" in name or "action" in name:
        return jnp.clip(0.5 * noise, -1, 1).astype(dtype)
    return (noise / math.sqrt(_fan_in(name, shape))).astype(dtype)


def _fan_in(name: str, shape: tuple[int, ...]) -> int:
    """Returns about how many numbers an output sums; what is no kernel gets small numbers."""
    if name not in ("kernel", "lora_a", "lora_b"):
        return 2500
    # (in, out) and (layers, in, out); the kernel of a convolution has its window in front.
    return math.prod(shape[:-1] if len(shape) > 3 else shape[-2:-1])
