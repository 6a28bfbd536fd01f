"""The world model of two cameras and the robot's state: the VAE's part exactly, and a chunk of imagination."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.core import pixels
from wovr_jax.types import NULL_ACTION, Start
from wovr_jax.world import model
from wovr_jax.world.model import WorldConfig

PLAIN = WorldConfig.fake()
CFG = WorldConfig.fake(views=2, state=3)
KEYS = jax.random.split(jax.random.key(0), 4)
VIEWS = [jax.random.uniform(key, (2, 13, 16, 16, 3), minval=-1.0) for key in KEYS[:2]]
STATE = jax.random.uniform(KEYS[2], (2, 13, 3), minval=-1.0)
MOSAIC = pixels.make_mosaic(VIEWS, STATE, 16)
VAE, ALONE = model.networks(CFG)[1], model.networks(PLAIN)[1]
PARAMS = ALONE.init(KEYS[3])


def test_the_weights_are_those_of_the_plain_vae():
    assert jax.tree.map(jnp.shape, VAE.shapes()) == jax.tree.map(jnp.shape, ALONE.shapes())


def test_every_view_is_coded_as_if_it_were_alone():
    latent = VAE(PARAMS, MOSAIC, method="encode")
    assert latent.shape == (2, 4, 2, 6, PLAIN.vae.z_dim)
    alone = [ALONE(PARAMS, view, method="encode") for view in VIEWS]
    np.testing.assert_allclose(latent[:, :, :, :4], jnp.concatenate(alone, axis=3), atol=1e-5)
    decoded = VAE(PARAMS, latent, method="decode")
    assert decoded.shape == MOSAIC.shape
    for v, one in enumerate(alone):
        want = ALONE(PARAMS, one, method="decode")
        np.testing.assert_allclose(pixels.split_views(decoded, 2)[:, :, v], want, atol=1e-5)


def test_the_state_goes_through_exactly_and_fills_its_columns():
    latent = VAE(PARAMS, MOSAIC, method="encode")
    np.testing.assert_allclose(pixels.read_state(VAE(PARAMS, latent, method="decode"), 2, 3), STATE, atol=1e-6)
    # Twelve numbers a latent frame, the first frame's four times the same; 16 places.
    column = latent[:, :, :, 4:].reshape(2, 4, -1)
    np.testing.assert_allclose(column[:, 0, :12], model.STATE_SCALE * jnp.tile(STATE[:, 0], 4), atol=1e-6)
    np.testing.assert_allclose(column[:, 1, :12], model.STATE_SCALE * STATE[:, 1:5].reshape(2, 12), atol=1e-6)
    np.testing.assert_array_equal(column[..., 12:], column[..., :4])


def test_copies_that_disagree_are_averaged():
    latent = VAE(PARAMS, MOSAIC, method="encode")
    # The first number of the second latent frame stands in places 0 and 12.
    moved = latent.at[:, 1, 1, 5, 0].add(0.5 * model.STATE_SCALE)
    got = pixels.read_state(VAE(PARAMS, moved, method="decode"), 2, 3)
    want = np.array(STATE)
    want[:, 1, 0] += 0.25
    np.testing.assert_allclose(got, np.clip(want, -1, 1), atol=1e-6)


def test_a_prefix_of_the_frames_gives_a_prefix_of_the_latents():
    whole, part = (VAE(PARAMS, MOSAIC[:, :frames], method="encode") for frames in (13, 5))
    np.testing.assert_allclose(part, whole[:, :2], atol=1e-5)


def test_views_without_a_state_and_a_state_without_a_second_view():
    both = model.networks(dataclasses.replace(CFG, state=0))[1]
    mosaic = pixels.make_mosaic(VIEWS)
    assert both(PARAMS, both(PARAMS, mosaic, method="encode"), method="decode").shape == mosaic.shape
    one = model.networks(dataclasses.replace(CFG, views=1))[1]
    mosaic = pixels.make_mosaic(VIEWS[:1], STATE, 16)
    decoded = one(PARAMS, one(PARAMS, mosaic, method="encode"), method="decode")
    np.testing.assert_allclose(pixels.read_state(decoded, 1, 3), STATE, atol=1e-6)


def test_a_state_that_its_strip_has_no_room_for():
    many = model.networks(dataclasses.replace(CFG, state=5))[1]
    with pytest.raises(ValueError, match="a state of 5 numbers needs 20 latent ones, the strip has 16"):
        many(PARAMS, MOSAIC, method="encode")


def test_a_chunk_is_a_mosaic_again_and_the_state_is_imagined_by_itself():
    dit = model.networks(CFG)[0].init(KEYS[0])
    first = MOSAIC[:, 0]
    none = jnp.zeros(2, jnp.int32)
    start = Start(
        anchor_BHWC=first,
        memory_BMHWC=jnp.repeat(first[:, None], 4, axis=1),
        action_BMA=jnp.broadcast_to(jnp.asarray(NULL_ACTION), (2, 4, 7)),
        prompt_BL=none[:, None],
        task_B=none,
        keyframe_B=none > 0,
        step_B=none,
    )
    world = model.world(CFG, {"dit": dit, "vae": PARAMS})
    action = jax.random.uniform(KEYS[1], (2, 8, 7), minval=-1.0)
    _, frame_BTHWC, truth = world.step(world.begin(start), action, jax.random.split(KEYS[2], 2))
    assert frame_BTHWC.shape == (2, 8, 16, 48, 3) and truth is None
    # Whatever the transformer says, a band is one number.
    strip = frame_BTHWC[:, :, :15, 32:].reshape(2, 8, 3, 5, 16, 3)
    assert jnp.ptp(strip, axis=(3, 4, 5)).max() < 1e-6
