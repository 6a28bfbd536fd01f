"""Signs of a lie: the rollout is sampled again as it was, and each sign is what its name says."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.sizes import draw_world
from wovr_jax.audit import inverse, signs
from wovr_jax.audit.inverse import InverseConfig, InverseObjective
from wovr_jax.audit.signs import Known
from wovr_jax.run import programs
from wovr_jax.train import step as train_step
from wovr_jax.train.optimizers import TrainingConfig
from wovr_jax.types import Episode, Start
from wovr_jax.world import model
from wovr_jax.world.model import WorldConfig, WorldState

BATCH, CHUNKS, SIZE = 3, 2, 16
SMALL = InverseConfig(size=SIZE, width=4, hidden=8)


def begin(cfg: WorldConfig) -> Start:
    rng = np.random.default_rng(0)
    frame_BHWC = rng.uniform(-1, 1, (BATCH, SIZE, SIZE, 3)).astype(np.float32)
    return Start(
        anchor_BHWC=jnp.asarray(frame_BHWC),
        memory_BMHWC=jnp.repeat(jnp.asarray(frame_BHWC)[:, None], cfg.slots, axis=1),
        action_BMA=jnp.zeros((BATCH, cfg.slots, 7)),
        prompt_BL=jnp.zeros((BATCH, 4), jnp.int32),
        task_B=jnp.zeros(BATCH, jnp.int32),
        step_B=jnp.zeros(BATCH, jnp.int32),
        keyframe_B=jnp.zeros(BATCH, bool),
    )


def know(cfg: WorldConfig, params: dict) -> Known:
    frames = jax.random.uniform(jax.random.key(5), (20, cfg.frames, SIZE, SIZE, 3), minval=-1.0)
    place = signs.find_axes(np.asarray(signs.encode_chunks(cfg, params["vae"], frames)))
    return Known(*map(jnp.asarray, place), inverse.network(SMALL).init(jax.random.key(6)), jnp.ones(7))


def roll(cfg: WorldConfig) -> tuple:
    params, start, key = draw_world(cfg, jax.random.key(1)), begin(cfg), jax.random.key(2)
    # A fresh transformer predicts nothing, and every sampler would do.
    leaves, tree = jax.tree.flatten(params["dit"])
    moved = [x + 0.1 * jax.random.normal(jax.random.fold_in(key, i), x.shape) for i, x in enumerate(leaves)]
    params["dit"] = jax.tree.unflatten(tree, moved)
    action_BNTA = jax.random.normal(jax.random.key(3), (BATCH, CHUNKS, cfg.chunk, 7))
    return params, start, action_BNTA, programs.replay(cfg)(params, None, start, action_BNTA, key).video_BNTHWC, key


def test_a_rollout_is_sampled_again_as_it_was() -> None:
    """The latents that signs are read off decode to the frames of the rollout, in every chunk."""
    cfg = WorldConfig.fake()
    params, start, action_BNTA, video_BNTHWC, key = roll(cfg)
    state = WorldState(start.anchor_BHWC, start.memory_BMHWC, start.action_BMA)
    for n in range(CHUNKS):
        context, _ = signs.encode_window(cfg, params["vae"], state, video_BNTHWC[:, n])
        keys = signs.noise_keys(key, BATCH, n)
        new = signs.sample_chunk(cfg, params["dit"], context, state, action_BNTA[:, n], keys)
        both = jnp.concatenate([context, new], axis=1)
        decoded = model.networks(cfg)[1](params["vae"], both, method="decode")[:, -cfg.chunk :]
        np.testing.assert_allclose(jnp.clip(decoded, -1, 1), video_BNTHWC[:, n], atol=2e-5)
        memory, played = video_BNTHWC[:, n, -cfg.slots :], action_BNTA[:, n, -cfg.slots :]
        state = WorldState(start.anchor_BHWC, memory, played)


def test_every_sign_of_every_chunk() -> None:
    cfg = WorldConfig.fake()
    params, start, action_BNTA, video_BNTHWC, key = roll(cfg)
    known = know(cfg, params)
    read = signs.read(cfg, SMALL)(params, known, start, action_BNTA, video_BNTHWC, key)
    assert tuple(sorted(read)) == tuple(sorted(signs.NAMES))
    assert all(value.shape == (BATCH, CHUNKS) and jnp.isfinite(value).all() for value in read.values())
    assert all(float(value.min()) > 0 for value in read.values())
    # Chunk by chunk, that is with what lies before it: the second chunk alone, from the frames of the first.
    assert float(jnp.abs(read["one_step"][:, 0] - read["one_step"][:, 1]).min()) > 0
    # A world that takes one step anyway is as far from one step as nothing.
    short = dataclasses.replace(cfg, flow=dataclasses.replace(cfg.flow, steps=1))
    video = programs.replay(short)(params, None, start, action_BNTA, key).video_BNTHWC
    assert float(signs.read(short, SMALL)(params, known, start, action_BNTA, video, key)["one_step"].max()) < 1e-5
    # A world without fresh noise is asked with fresh noise all the same.
    fixed = dataclasses.replace(cfg, noise="fixed")
    video = programs.replay(fixed)(params, None, start, action_BNTA, key).video_BNTHWC
    assert float(signs.read(fixed, SMALL)(params, known, start, action_BNTA, video, key)["seeds"].min()) > 0


def test_distance_is_zero_at_a_true_chunk_and_in_its_deviations() -> None:
    rng = np.random.default_rng(7)
    latent_XD = rng.normal(size=(500, 6)) * np.array([9.0, 3.0, 1.0, 0.5, 0.0, 0.0])
    mean_D, axes_DP, place_XP = signs.find_axes(latent_XD)
    assert place_XP.shape == (500, 4), "axes along which nothing differs are none"
    np.testing.assert_allclose(np.cov(place_XP.T), np.eye(4), atol=0.01)
    known = Known(*map(jnp.asarray, (mean_D, axes_DP, np.repeat(place_XP[:1], 5, 0))), {}, jnp.ones(7))
    away = latent_XD[:1] + np.array([[9.0, 0, 0, 0, 0, 0]])  # one deviation along the first axis
    near, far = signs._find_distance(known, jnp.asarray(np.concatenate([latent_XD[:1], away]), jnp.float32))
    assert float(near) == pytest.approx(0.0, abs=2e-3) and float(far) == pytest.approx(1.0, rel=0.1)


def make_episodes(count: int) -> list[Episode]:
    """A bright square that the first two dimensions of the action move by a pixel; the others do nothing."""
    rng, episodes = np.random.default_rng(8), []
    for e in range(count):
        action_SA = np.zeros((10, 7), np.float32)
        action_SA[:, :2] = rng.integers(-1, 2, (10, 2))
        place = np.clip(np.array([8, 8]) + np.cumsum(np.vstack([[0, 0], action_SA[:, :2]]), axis=0), 2, 13).astype(int)
        # Where the border holds it nothing was commanded.
        action_SA[:, :2] = np.diff(place, axis=0)
        frames = np.zeros((11, SIZE, SIZE, 3), np.uint8)
        for frame, (y, x) in zip(frames, place, strict=True):
            frame[y - 2 : y + 3, x - 2 : x + 3] = 255
        episodes.append(Episode(frames, action_SA, np.zeros(11, bool), "move", 0, e, "test", action_SA))
    return episodes


def test_inverse_dynamics_see_what_was_done_and_what_was_not() -> None:
    steps = inverse.collect_steps(make_episodes(40))
    assert np.isinf(np.asarray(steps.scale_A)).tolist() == [False, False, *[True] * 5]
    # The last frame of an episode has no action after it.
    assert len(steps.step_I) == 10 * len(steps.frame_XHWC) // 11
    cfg = InverseConfig(size=SIZE, width=16, hidden=64)
    objective = InverseObjective(cfg, TrainingConfig(steps=150, batch=64, lr=3e-3, warmup=10))
    params = inverse.network(cfg).init(jax.random.key(0))
    state, step = train_step.make(objective, params, train_step.resident(steps), jax.random.key(1))
    for i in range(150):
        state, _ = step(state, jnp.asarray(i))
    unseen = make_episodes(60)[45:]
    frames = jnp.asarray(np.stack([one.frame_SHWC for one in unseen]), jnp.float32) / 127.5 - 1
    actions = jnp.asarray(np.stack([one.action_SA for one in unseen]))
    obeyed = inverse.disagree(cfg, state.params, frames, actions, steps.scale_A)
    ignored = inverse.disagree(cfg, state.params, frames, -actions, steps.scale_A)
    assert float(obeyed.mean()) < 0.3 * float(ignored.mean())
    # What never differed counts nowhere, whatever is commanded.
    odd = actions.at[..., 5].set(9.0)
    np.testing.assert_array_equal(obeyed, inverse.disagree(cfg, state.params, frames, odd, steps.scale_A))
