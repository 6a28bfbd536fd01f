"""The world model as a simulator: window layout, options, independence of rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.types import NULL_ACTION, Start
from wovr_jax.world import model
from wovr_jax.world.dit import DiTConfig
from wovr_jax.world.model import WorldConfig, arrange_actions, arrange_frames, quantise, world

CFG = WorldConfig.fake()


def randomised(cfg, seed=0):
    """Weights of ordinary size in which nothing is zero; drawn on the host, which is quicker than ``init``."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if len(leaf.shape) > 1:
            return rng.standard_normal(leaf.shape, np.float32) / np.sqrt(np.prod(leaf.shape[:-1]), dtype=np.float32)
        return 0.1 * rng.standard_normal(leaf.shape, np.float32) + (path[-1].key in ("scale", "gamma"))

    shapes = {name: net.shapes() for name, net in zip(("dit", "vae"), model.networks(cfg), strict=True)}
    return jax.tree_util.tree_map_with_path(draw, shapes)


def start(batch=2, side=16):
    rng = np.random.default_rng(1)
    frame = rng.uniform(-1, 1, (batch, 5, side, side, 3)).astype(np.float32)
    action = rng.uniform(-1, 1, (batch, 4, 7)).astype(np.float32)
    zeros = jnp.zeros(batch, jnp.int32)
    return Start(
        anchor_BHWC=jnp.asarray(frame[:, 0]),
        memory_BMHWC=jnp.asarray(frame[:, 1:]),
        action_BMA=jnp.asarray(action),
        prompt_BL=zeros[:, None],
        task_B=zeros,
        keyframe_B=zeros.astype(bool),
        step_B=zeros,
    )


def actions(batch=2):
    return jax.random.uniform(jax.random.key(3), (batch, 2, 8, 7), minval=-1.0)


def keys(batch=2, seed=7):
    return jax.vmap(lambda b: jax.random.fold_in(jax.random.key(seed), b))(jnp.arange(batch))


@functools.cache
def roller(cfg):
    """Compiled: last state and frames (B, N, T, ...) of all chunks."""

    def run(params, begin, action_BNTA, key_B):
        simulator = world(cfg, params)

        def chunk(state, xs):
            n, action = xs
            state, frame, truth = simulator.step(state, action, jax.vmap(jax.random.fold_in, (0, None))(key_B, n))
            assert truth is None
            return state, frame

        order = jnp.arange(action_BNTA.shape[1])
        state, frame = jax.lax.scan(chunk, simulator.begin(begin), (order, action_BNTA.swapaxes(0, 1)))
        return state, frame.swapaxes(0, 1)

    return jax.jit(run)


def roll(cfg, *args):
    return roller(cfg)(*args)


@pytest.fixture(scope="module")
def params():
    return randomised(CFG)


def test_sizes_of_a_window():
    assert (CFG.frames, CFG.slots, CFG.context_latents, CFG.latents) == (13, 4, 2, 4)
    full = WorldConfig.wan()
    assert (full.frames, full.context_latents, full.latents, full.dit.channels) == (13, 2, 4, 48)


def test_frames_become_memory(params):
    action = actions()
    state, frame = roll(CFG, params, start(), action, keys())
    assert frame.shape == (2, 2, 8, 16, 16, 3)
    assert jnp.abs(frame).max() <= 1.0
    np.testing.assert_array_equal(state.memory_BMHWC, frame[:, -1, -4:])
    np.testing.assert_array_equal(state.action_BMA, action[:, -1, -4:])
    np.testing.assert_array_equal(state.anchor_BHWC, start().anchor_BHWC)


def test_a_chunk_is_encode_sample_decode(params):
    # By hand, with the layout written out: [anchor, memory] in, null action for the anchor, frames 5..12 out.
    begin, action = start(), actions()[:, 0]
    dit, vae = model.networks(CFG)

    @jax.jit
    def by_hand(params):
        context = vae(
            params["vae"], jnp.concatenate([begin.anchor_BHWC[:, None], begin.memory_BMHWC], 1), method="encode"
        )
        null = jnp.tile(jnp.asarray(NULL_ACTION), (2, 1, 1))
        slots = jnp.concatenate([null, begin.action_BMA, action], axis=1)
        latent = jnp.stack([jax.random.normal(jax.random.fold_in(k, 0), (2, 2, 2, 4)) for k in keys()])
        for now, after in ((1.0, 5 / 6), (5 / 6, 0.0)):
            time = jnp.tile(jnp.array([0.0, 0.0, 1000 * now, 1000 * now])[None], (2, 1))
            velocity = dit(params["dit"], jnp.concatenate([context, latent], 1), time, slots)
            latent = latent + (after - now) * velocity[:, 2:]
        frame = vae(params["vae"], jnp.concatenate([context, latent], 1), method="decode")
        return jnp.clip(frame[:, 5:13], -1, 1)

    _, got = roll(CFG, params, begin, actions(), keys())
    np.testing.assert_allclose(got[:, 0], by_hand(params), atol=2e-4)


def test_a_row_does_not_depend_on_its_batch(params):
    _, both = roll(CFG, params, start(), actions(), keys())
    first = jax.tree.map(lambda leaf: leaf[:1], (start(), actions(), keys()))
    _, alone = roll(CFG, params, *first)
    np.testing.assert_allclose(both[:1], alone, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_the_vae_may_take_a_rollout_in_pieces(params, rows):
    """Three trajectories, of which one or all are taken at once: two would not go into three."""
    three = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:1]]), (start(), actions(), keys()))
    _, whole = roll(CFG, params, *three)
    _, found = roll(dataclasses.replace(CFG, vae_rows=rows), params, *three)
    np.testing.assert_allclose(found, whole, atol=1e-5)
    np.testing.assert_allclose(found[2], found[0], atol=1e-5)


def test_actions_and_noise_matter(params):
    _, frame = roll(CFG, params, start(), actions(), keys())
    _, other = roll(CFG, params, start(), -actions(), keys())
    _, again = roll(CFG, params, start(), actions(), keys(seed=8))
    assert jnp.abs(frame - other).max() > 1e-3
    assert jnp.abs(frame - again).max() > 1e-3


def test_fixed_noise_ignores_the_keys():
    fixed = dataclasses.replace(CFG, noise="fixed")
    size = (2, 2, 4)
    np.testing.assert_array_equal(model.draw_noise(fixed, keys(), size), model.draw_noise(fixed, keys(seed=8), size))
    noise = model.draw_noise(fixed, keys(), size)
    assert jnp.abs(noise[0] - noise[1]).max() > 0.1  # but rows differ, as in the reference
    assert jnp.abs(model.draw_noise(CFG, keys(), size) - model.draw_noise(CFG, keys(seed=8), size)).max() > 0.1


@pytest.mark.parametrize(
    "changes, slots, held",
    [
        ({}, [0, 1, 2, 3, 4], [0, 1, 1, 1, 1]),
        ({"anchor": False}, [1, 1, 2, 3, 4], [0, 1, 1, 1, 1]),
        ({"memory": 1}, [0, 4, 4, 4, 4], [0, 0, 0, 0, 1]),
        ({"memory": 2}, [0, 3, 3, 3, 4], [0, 0, 0, 1, 1]),
        ({"memory": 1, "anchor": False}, [4, 4, 4, 4, 4], [0, 0, 0, 0, 1]),
    ],
)
def test_anchor_and_memory_options(changes, slots, held):
    cfg = WorldConfig.fake(**changes)
    frame = jnp.arange(13.0).reshape(1, 13, 1, 1, 1)
    new = [5, 6, 7, 8, 9, 10, 11, 12]
    np.testing.assert_array_equal(arrange_frames(frame, cfg).ravel(), slots + new)
    np.testing.assert_array_equal(arrange_frames(frame[:, :5], cfg).ravel(), slots)
    action = jnp.full((1, 13, 7), 0.5)
    is_null = jnp.all(arrange_actions(action, cfg)[0] == jnp.asarray(NULL_ACTION)[None], axis=-1)
    np.testing.assert_array_equal(~is_null, np.array(held + [1] * 8, bool))


def test_without_anchor_the_anchor_has_no_influence(params):
    cfg = dataclasses.replace(CFG, anchor=False)
    begin = start()
    _, frame = roll(cfg, params, begin, actions(), keys())
    _, other = roll(cfg, params, begin.replace(anchor_BHWC=-begin.anchor_BHWC), actions(), keys())
    np.testing.assert_array_equal(frame, other)


def test_eight_bits():
    level = jnp.arange(256.0)
    exact = level / 127.5 - 1.0
    np.testing.assert_array_equal(quantise(exact, "none"), exact)
    np.testing.assert_allclose((quantise(exact, "round") + 1) * 127.5, level, atol=1e-3)
    between = (level[:-1] + 0.75) / 127.5 - 1.0  # floor darkens what rounding keeps
    np.testing.assert_allclose((quantise(between, "floor") + 1) * 127.5, level[:-1], atol=1e-3)
    np.testing.assert_allclose((quantise(between, "round") + 1) * 127.5, level[1:], atol=1e-3)


def test_the_reference_rolls_on_bytes_with_the_same_noise(params):
    rlinf = {"flow": dataclasses.replace(CFG.flow, round_time=True), "eight_bit": "floor", "noise": "fixed"}
    cfg = dataclasses.replace(CFG, dit=dataclasses.replace(CFG.dit, sinusoid_dtype="bfloat16"), **rlinf)
    state, frame = roll(cfg, params, start(), actions(), keys())
    level = (np.asarray(frame) + 1.0) * 127.5
    np.testing.assert_allclose(level, np.round(level), atol=1e-3)
    np.testing.assert_array_equal(state.memory_BMHWC, frame[:, -1, -4:])
    _, again = roll(cfg, params, start(), actions(), keys(seed=8))
    np.testing.assert_array_equal(frame, again)


def test_refuses_what_does_not_fit(params):
    with pytest.raises(ValueError, match=r"(?s)dit\.channels: .*got 3.*\.chunk: .*got 6.*\.memory: .*got 5"):
        WorldConfig.fake(dit=DiTConfig.fake(channels=3), chunk=6, memory=5)
    with pytest.raises(ValueError, match=r"(?s)eight_bit: .*got 'yes'.*noise: .*got 'none'"):
        WorldConfig.fake(eight_bit="yes", noise="none")
    simulator = world(CFG, params)
    short = start().replace(memory_BMHWC=start().memory_BMHWC[:, :3])
    with pytest.raises(AssertionError, match="world model: memory_BMHWC"):
        simulator.begin(short)
    with pytest.raises(AssertionError, match="world model: action_BTA"):
        simulator.step(simulator.begin(start()), actions()[:, 0, :7], keys())
