"""Adapters: nothing at first, everything in the gradient, merged in float32, refused when misnamed."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from wovr_jax.core import checkpoint
from wovr_jax.nn import lora
from wovr_jax.nn.functional import Pure, scan_blocks, stack
from wovr_jax.nn.lora import LoRAConfig
from wovr_jax.policy import vla
from wovr_jax.world.dit import DiT, DiTConfig, DiTLoRA


class Block(nnx.Module):
    def __init__(self, *, rngs):
        self.inner, self.outer = nnx.Linear(6, 10, rngs=rngs), nnx.Linear(10, 6, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.outer(jnp.tanh(self.inner(x)))


class Net(nnx.Module):
    """A stack of blocks, a list of layers and a head: every place a layer can be in."""

    def __init__(self, rngs):
        self.blocks = stack(lambda rngs: Block(rngs=rngs), 3, rngs)
        self.list = nnx.List([nnx.Linear(6, 6, rngs=rngs)])
        self.conv = nnx.Param(jnp.ones((1, 1, 6, 6)))
        self.head = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.list[0](scan_blocks(self.blocks, x)))


CFG = LoRAConfig(rank=4, alpha=8.0)
NET = Pure(Net)
ADAPTED = Pure(lambda rngs: lora.adapt(Net(rngs), CFG))
X = jax.random.normal(jax.random.key(1), (5, 6))


@pytest.fixture(scope="module")
def params():
    return NET.init(jax.random.key(0))


def lively(params, cfg=CFG):
    """Adapters whose b is not zero."""
    fresh = lora.init(jax.random.key(2), params, cfg)
    return jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), fresh)


@pytest.mark.parametrize("init", ["gaussian", "kaiming"])
def test_fresh_adapters_change_nothing(params, init):
    cfg = LoRAConfig(rank=4, init=init)
    adapters = lora.init(jax.random.key(2), params, cfg)
    np.testing.assert_array_equal(NET(lora.merge(params, adapters, cfg), X), NET(params, X))
    np.testing.assert_allclose(ADAPTED(lora.join(params, adapters), X), NET(params, X), atol=1e-6)
    down, up = adapters["blocks"]["inner"]["lora_a"], adapters["blocks"]["inner"]["lora_b"]
    assert (down.shape, up.shape) == ((3, 6, 4), (3, 4, 10))
    assert not np.any(up) and np.all(down != 0)
    assert not np.allclose(down[0], down[1]), "layers start apart"


def test_the_width_of_a_fresh_a():
    params = {"layer": {"kernel": jax.ShapeDtypeStruct((400, 8), jnp.float32)}}

    def draw(init):
        return lora.init(jax.random.key(0), params, LoRAConfig(rank=50, init=init))["layer"]["lora_a"]

    assert float(draw("gaussian").std()) == pytest.approx(1 / 50, rel=0.03)
    assert 0.049 < float(jnp.abs(draw("kaiming")).max()) <= 0.05  # uniform within 1 / sqrt(400)
    assert float(draw("kaiming").std()) == pytest.approx(0.05 / math.sqrt(3), rel=0.03)


def test_merged_equals_beside(params):
    adapters = lively(params)
    merged, beside = NET(lora.merge(params, adapters, CFG), X), ADAPTED(lora.join(params, adapters), X)
    np.testing.assert_allclose(merged, beside, rtol=1e-4, atol=1e-4)
    assert jnp.abs(merged - NET(params, X)).max() > 0.1
    by_hand = params["head"]["kernel"] + 8 / 4 * adapters["head"]["lora_a"] @ adapters["head"]["lora_b"]
    np.testing.assert_allclose(lora.merge(params, adapters, CFG)["head"]["kernel"], by_hand, rtol=1e-5, atol=1e-5)


def test_only_adapters_have_gradients_and_both_ways_agree(params):
    adapters = lively(params)
    merged = jax.grad(lambda own: jnp.square(NET(lora.merge(params, own, CFG), X)).sum())(adapters)
    beside = jax.grad(lambda own: jnp.square(ADAPTED(lora.join(params, own), X)).sum())(adapters)
    assert jax.tree.structure(beside) == jax.tree.structure(adapters)
    for one, other in zip(jax.tree.leaves(merged), jax.tree.leaves(beside), strict=True):
        assert np.any(one)
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3 * float(jnp.abs(one).max()))


def test_training_and_checkpoint_hold_adapters_only(params, tmp_path):
    before = jax.tree.map(np.array, params)
    own, optimiser = lora.init(jax.random.key(2), params, CFG), optax.adam(0.05)
    state, target = optimiser.init(own), jnp.ones((5, 2))

    @jax.jit
    def step(own, state):

        def objective(own):
            return jnp.square(ADAPTED(lora.join(params, own), X) - target).mean()

        value, gradient = jax.value_and_grad(objective)(own)
        update, state = optimiser.update(gradient, state)
        return optax.apply_updates(own, update), state, value

    values = []
    for _ in range(40):
        own, state, value = step(own, state)
        values.append(float(value))
    assert values[-1] < 0.1 * values[0]
    jax.tree.map(np.testing.assert_array_equal, params, before)

    checkpoint.save(tmp_path / "lora", own)
    back = checkpoint.restore(tmp_path / "lora", jax.eval_shape(lambda: lora.init(jax.random.key(2), params, CFG)))
    jax.tree.map(np.testing.assert_array_equal, back, own)
    np.testing.assert_array_equal(ADAPTED(lora.join(params, back), X), ADAPTED(lora.join(params, own), X))


def test_a_bfloat16_kernel_is_merged_in_float32(params):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    adapters = lively(params)
    merged = lora.merge(half, adapters, CFG)["blocks"]["inner"]["kernel"]
    own = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), adapters["blocks"]["inner"])
    exact = np.asarray(half["blocks"]["inner"]["kernel"], np.float64) + 2.0 * own["lora_a"] @ own["lora_b"]
    assert merged.dtype == jnp.bfloat16

    def error(got):
        return np.abs(np.asarray(got, np.float64) - exact) / np.abs(exact)

    assert error(merged).max() <= 1.001 * 2.0**-8  # one rounding to eight binary digits, and no other
    early = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), adapters["blocks"]["inner"])
    assert error(half["blocks"]["inner"]["kernel"] + 2 * (early["lora_a"] @ early["lora_b"])).max() > 2.0**-7


def test_unknown_targets_are_refused_with_what_there_is(params):
    with pytest.raises(ValueError, match=r"no layer matches 'blocks/q', 'tail'; there are: .*blocks/inner.*list/0"):
        lora.init(jax.random.key(0), params, LoRAConfig(targets=("blocks/q", "head", "tail")))
    with pytest.raises(ValueError, match="no layer matches 'conv'"):
        lora.targets(params, LoRAConfig(targets=("conv",)))
    with pytest.raises(ValueError, match="init: expected one of"):
        LoRAConfig(init="zeros")
    with pytest.raises(ValueError, match="rank: expected at least 1"):
        LoRAConfig(rank=0)


def test_foreign_adapters_are_refused(params):
    adapters = lora.init(jax.random.key(0), params, CFG)
    foreign = {"body": adapters["head"], "blocks": {"inner": adapters["head"]}}
    with pytest.raises(ValueError, match="body is no layer.*blocks/inner has the kernel"):
        lora.merge(params, foreign, CFG)


def test_what_was_joined_is_separated_and_all_but_the_adapters_is_frozen(params):
    adapters = lively(params, CFG)
    joined = lora.join(params, adapters)
    plain, own = lora.separate(joined)
    jax.tree.map(np.testing.assert_array_equal, (plain, own), (params, adapters))
    assert len(lora.find_frozen(joined)) == len(jax.tree.leaves(params))


def test_a_choice_of_layers_leaves_the_others_alone(params):
    cfg = LoRAConfig(rank=2, targets=("blocks/*",))
    assert lora.targets(params, cfg) == ["blocks/inner", "blocks/outer"]
    merged = lora.merge(params, lively(params, cfg), cfg)
    np.testing.assert_array_equal(merged["head"]["kernel"], params["head"]["kernel"])
    assert np.any(merged["blocks"]["outer"]["kernel"] != params["blocks"]["outer"]["kernel"])


def test_the_transformer_of_the_world_takes_them():
    cfg, own = DiTConfig.fake(), DiTLoRA.wan(rank=3)
    plain = Pure(lambda rngs: DiT(cfg, rngs=rngs))
    adapted = Pure(lambda rngs: lora.adapt(DiT(cfg, rngs=rngs), own))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape).astype(np.float32), plain.shapes())
    adapters = lively(params, own)
    assert len(jax.tree.leaves(adapters)) == 2 * (4 + 4 + 2)
    latent, time = rng.standard_normal((1, 3, 4, 2, 4)).astype(np.float32), np.array([[0.0, 0.0, 500.0]], np.float32)
    inputs = latent, time, rng.standard_normal((1, 9, 7)).astype(np.float32)
    one = jax.jit(lambda p, a: plain(lora.merge(p, a, own), *inputs))(params, adapters)
    other = jax.jit(lambda p, a: adapted(lora.join(p, a), *inputs))(params, adapters)
    np.testing.assert_allclose(one, other, atol=1e-4 * float(jnp.abs(one).max()))
    assert jnp.abs(one - jax.jit(lambda p: plain(p, *inputs))(params)).max() > 1e-3


def test_the_released_sizes():
    """Rank 32 over the 5B transformer: 0.9 hundredths of its parameters."""
    shapes = Pure(lambda rngs: DiT(DiTConfig.ti2v_5b(), rngs=rngs)).shapes()
    adapters = jax.eval_shape(functools.partial(lora.init, params=shapes, cfg=DiTLoRA.wan()), jax.random.key(0))
    square, ffn = 8 * 32 * (3072 + 3072), 2 * 32 * (3072 + 14336)
    assert sum(leaf.size for leaf in jax.tree.leaves(adapters)) == 30 * (square + ffn)


def test_the_policy_takes_them():
    shapes = vla.network(vla.VLAConfig.fake()).shapes()
    paths = lora.targets(shapes, vla.PolicyLoRA.oft(rank=2))
    assert "llm/blocks/q" in paths and "siglip/blocks/qkv" in paths and "projector/fc1" in paths
    assert "llm/head" not in paths and "dino/patch_embed" not in paths
