"""Pretraining of the small VAE: it learns, reproducibly, and looks where things move."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.world.vae import train as vae_train
from wovr_jax.world.vae.net import VAEConfig
from wovr_jax.world.vae.train import VAETraining

CFG = VAEConfig.fake()
# Adam: Muon takes a minute to compile, a matrix iteration for every kernel.
TRAINING = VAETraining(steps=40, batch=2, lr=1e-2, warmup=5, optimizer="adamw")


def draw(key: jax.Array, batch: int) -> jax.Array:
    """A bright square at a random place, which jumps after the first frame: (B, 5, 16, 16, 3)."""
    at_BF2 = jax.random.randint(key, (batch, 5, 2), 0, 12)
    at_BF2 = at_BF2.at[:, 2:].set(at_BF2[:, 1:2])
    row, column = jnp.arange(16)[:, None], jnp.arange(16)[None, :]
    inside = (abs(row - at_BF2[..., 0, None, None]) < 3) & (abs(column - at_BF2[..., 1, None, None]) < 3)
    return jnp.where(inside, 0.8, -0.4)[..., None] * jnp.ones(3)


def test_training_lowers_the_loss_and_is_reproducible():
    state, step = vae_train.make(CFG, TRAINING, draw)
    losses = []
    for i in range(TRAINING.steps):
        state, metrics = step(state, jnp.int32(i))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < 0.7 * losses[0]
    again, step = vae_train.make(CFG, TRAINING, draw)
    assert float(step(again, jnp.int32(0))[1]["loss"]) == losses[0]

    held_out = [draw(jax.random.key(7), 16)]
    cfg = vae_train.with_latent_statistics(CFG, state.params, held_out)
    latent = vae_train.network(cfg)(state.params, held_out[0], method="encode").reshape(-1, cfg.z_dim)
    np.testing.assert_allclose(latent.mean(0), 0.0, atol=1e-2)
    np.testing.assert_allclose(latent.std(0), 1.0, atol=1e-2)
    found = vae_train.scores(cfg, state.params, held_out)
    assert found["psnr"] > found["psnr_moving"] and found["psnr"] > found["psnr_worst"]


def test_muon_has_a_matrix_for_every_kernel():
    state, step = vae_train.make(CFG, dataclasses.replace(TRAINING, optimizer="muon"), draw)
    after, _ = jax.eval_shape(step, state, jnp.int32(0))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    with pytest.raises(ValueError, match="optimizer: expected one of 'adamw', 'muon'"):
        vae_train.make(CFG, dataclasses.replace(TRAINING, optimizer="muno"), draw)


def test_an_error_of_zero_has_a_gradient_with_and_without_knee():
    for knee in (0.0, 0.1):
        training = dataclasses.replace(TRAINING, knee=knee)
        found = jax.grad(lambda f, t=training: vae_train.loss(Echo(), {}, t, f, jax.random.key(0))[0])(
            jnp.zeros((1, 1, 4, 4, 3))
        )
        assert np.isfinite(found).all()


class Echo:
    """Gives back what a test asks for: zero moments, a black frame."""

    def __call__(self, params, x, method):
        latent = jnp.zeros((1, 1, 1, 1, 2))
        return (latent, latent - 60.0) if method == "moments" else jnp.zeros((1, 1, 4, 4, 3))


def test_moving_pixels_by_hand():
    frame = jnp.zeros((1, 3, 2, 2, 3)).at[0, 1, 0, 1, 2].set(0.5).at[0, 2, 1, 0, 0].set(0.05)
    np.testing.assert_array_equal(vae_train.moving(frame)[0, 0, :, :, 0], [[0, 1], [0, 0]])


def test_focus_weighs_moving_pixels_and_keeps_the_scale():
    """Weights have mean one: the focus moves attention and does not change the size of the loss."""
    vae = vae_train.network(CFG)
    params = vae.init(jax.random.key(0))
    frame = draw(jax.random.key(1), 2)

    @functools.partial(jax.jit, static_argnums=0)  # a setting, not an array
    def total(focus: float) -> jax.Array:
        training = dataclasses.replace(TRAINING, focus=focus)
        return vae_train.loss(vae, params, training, frame, jax.random.key(2))[0]

    losses = [total(focus) for focus in (0.0, 2.0)]
    assert losses[0] != losses[1]
    assert float(losses[1]) == pytest.approx(float(losses[0]), rel=0.5)
