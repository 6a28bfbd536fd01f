"""Stacks of blocks in bfloat16 on a CPU: no float32 copy of all layers, and the same numbers and gradients."""

from __future__ import annotations

import dataclasses

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wovr_jax.export import program
from wovr_jax.nn.functional import Pure, scan_blocks, stack
from wovr_jax.policy import vla
from wovr_jax.policy.processing import Processing
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.weights import native
from wovr_jax.world.dit import DiT, DiTConfig

Shape = jax.ShapeDtypeStruct


def narrow(params):
    return jax.tree.map(lambda leaf: Shape(leaf.shape, jnp.bfloat16), params)


def extra(call, params, *inputs):
    """Memory of the compiled call beside its operands, relative to the parameters."""
    memory = jax.jit(call).lower(params, *inputs).compile().memory_analysis()
    assert memory is not None
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    return memory.temp_size_in_bytes / held


def test_the_transformer_takes_at_most_a_third_more_than_its_weights():
    """30 layers with the proportions of the 5B network: the most is the context, which projects with all layers."""
    cfg = DiTConfig(dim=256, heads=2, layers=30, ffn=1195, channels=4, freq_dim=16)
    cfg = dataclasses.replace(cfg, dtype="bfloat16", residual_dtype="bfloat16")
    net = Pure(lambda rngs: DiT(cfg, rngs=rngs))
    inputs = Shape((1, 2, 4, 4, 4), jnp.float32), Shape((1, 2), jnp.float32), Shape((1, 5, 7), jnp.float32)
    assert extra(lambda params, *inputs: net(params, *inputs), narrow(net.shapes()), *inputs) <= 0.3


def deep_policy(remat: bool) -> VLAConfig:
    """As deep as the released policy, and narrow."""
    cfg, half = VLAConfig.fake(), {"dtype": "bfloat16", "remat": remat}
    towers = {
        name: dataclasses.replace(getattr(cfg, name), width=64, depth=24, heads=2, mlp=256, **half)
        for name in ("dino", "siglip")
    }
    return dataclasses.replace(
        cfg, **towers, llm=dataclasses.replace(cfg.llm, width=256, depth=32, heads=2, mlp=688, **half)
    )


def test_a_bundle_takes_at_most_a_third_more_than_its_weights():
    cfg = deep_policy(remat=False)
    side, policy = cfg.dino.image, program.make(cfg, Processing(size=cfg.dino.image), 6)
    shapes = native.flatten(narrow(vla.network(cfg).shapes()))
    weights = {path.replace("/", "."): leaf for path, leaf in shapes.items()}
    blob = program.serialise(policy, weights, frame=(side, side, 3), length=6, dim=7)
    quantile, seeds = Shape((7,), jnp.float32), Shape((1,), jnp.uint32)
    statistics = {"q01": quantile, "q99": quantile, "mask": Shape((7,), jnp.bool_)}
    inputs = Shape((1, side, side, 3), jnp.uint8), Shape((1, 6), jnp.int32), seeds, Shape((), jnp.float32)
    assert extra(jax.export.deserialize(bytearray(blob)).call, weights, statistics, *inputs) <= 0.3


def test_the_policy_takes_at_most_a_third_more_than_its_weights():
    cfg = deep_policy(remat=True)
    net, side = vla.network(cfg), cfg.dino.image
    inputs = Shape((1, side, side, 3), jnp.float32), Shape((1, 6), jnp.int32)
    assert extra(lambda params, *inputs: net(params, *inputs), narrow(net.shapes()), *inputs) <= 0.3


class Block(nnx.Module):
    def __init__(self, *, rngs):
        self.layer = nnx.Linear(16, 16, dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x, slice_BD, mask_BD, nothing):
        assert nothing is None
        return x + jnp.where(mask_BD, self.layer(x) * slice_BD, 0).astype(x.dtype)


class Net(nnx.Module):
    def __init__(self, *, rngs):
        self.blocks = stack(lambda rngs: Block(rngs=rngs), 5, rngs)

    def __call__(self, x, slices, mask, by_hand=False):
        if not by_hand:
            return scan_blocks(self.blocks, x, mask, None, layered=(slices,))
        graph, state = nnx.split(self.blocks)
        for i in range(5):
            x = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[i], state))(x, slices[i], mask, None)  # noqa: B023
        return x


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layer_by_layer_is_the_same(dtype):
    net = Pure(lambda rngs: Net(rngs=rngs))
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), net.init(jax.random.key(0)))
    x, slices = jax.random.normal(jax.random.key(1), (3, 16)), jnp.linspace(0.5, 1.5, 80).reshape(5, 1, 16)
    mask = jnp.arange(48).reshape(3, 16) % 5 > 0

    def results(by_hand):
        def loss(params, x, slices):
            out = net(params, x, slices, mask, by_hand=by_hand)
            return jnp.square(out.astype(jnp.float32)).mean(), out

        # Forward alone goes another way than with a gradient.
        return loss(params, x, slices)[1], *jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(params, x, slices)

    for got, want in zip(jax.tree.leaves(results(False)), jax.tree.leaves(results(True)), strict=True):
        assert got.dtype == want.dtype
        scale = np.abs(np.asarray(want, np.float32)).max()
        np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), atol=0.02 * scale)
