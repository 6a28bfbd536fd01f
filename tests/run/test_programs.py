"""Replaying recorded episodes: what the world is given, and which of its frames belong to which episode."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.sizes import fake_learner
from wovr_jax import grpo
from wovr_jax.core.pixels import to_float
from wovr_jax.data import starts
from wovr_jax.data.starts import StartsConfig
from wovr_jax.policy.actions import Codec
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.run import programs
from wovr_jax.run.bind import improvement
from wovr_jax.run.recipe import DreamConfig, Recipe
from wovr_jax.sim import embedded as arena
from wovr_jax.sim.tabletop.expert import ExpertConfig
from wovr_jax.sim.tabletop.table import TabletopConfig
from wovr_jax.types import NULL_ACTION, Episode, Imagined
from wovr_jax.world.model import WorldConfig

PROMPT_KL = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)


def episode(index: int, steps: int) -> Episode:
    frame = np.full((steps + 1, 4, 4, 3), index, np.uint8)
    action = np.full((steps, 7), index / 10, np.float32)
    return Episode(frame, action, np.zeros(steps + 1, bool), "reach", index % 2, index, "base", action)


def test_episodes_are_replayed_in_equal_batches_from_their_own_first_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = [episode(0, 16), episode(1, 12), episode(2, 3)], []

    def play(params, reward, start, action_BNTA, key):
        """Frames that count the steps: 100 after the first."""
        assert (params, reward) == ("world", "weights")
        asked.append((start, np.asarray(action_BNTA), jax.random.key_data(key).tolist()))
        none = {field.name: None for field in dataclasses.fields(Imagined)}
        step_NT = 100 + np.arange(16).reshape(2, 8)
        video = np.broadcast_to(to_float(step_NT.astype(np.uint8))[None, ..., None, None, None], (2, 2, 8, 4, 4, 3))
        return Imagined(**none | {"frame_BNHWC": video[:, :, 0], "video_BNTHWC": video})

    monkeypatch.setattr(programs, "replay", lambda cfg, reward: play if reward == "judge" else None)
    cfg, key = WorldConfig.fake(), jax.random.key(0)
    how = {"batch": 2, "judge": ("judge", "weights")}
    films = list(programs.replay_episodes(cfg, "world", made, PROMPT_KL, key, **how))
    assert [len(film) for film in films] == [17, 13, 4]
    for index, film in enumerate(films):
        assert film.dtype == np.uint8
        assert film[:, 0, 0, 0].tolist() == [index, *range(100, 100 + len(film) - 1)]

    assert [key for *_, key in asked] == [jax.random.key_data(jax.random.fold_in(key, low)).tolist() for low in (0, 2)]
    (first, action, _), (last, filled, _) = asked
    np.testing.assert_allclose(first.anchor_BHWC[:, 0, 0, 0], to_float(np.array([0, 1], np.uint8)), atol=1e-6)
    np.testing.assert_array_equal(first.prompt_BL, PROMPT_KL)
    assert action.shape == filled.shape == (2, 2, 8, 7)
    done = action[1].reshape(16, 7)  # an episode that is over does nothing
    np.testing.assert_array_equal(done[:12], np.float32(0.1))
    np.testing.assert_array_equal(done[12:], np.broadcast_to(np.float32(NULL_ACTION), (4, 7)))
    np.testing.assert_array_equal(filled[0], filled[1])  # the last batch is filled up, so that one program does
    assert last.task_B.tolist() == [0, 0]
    # As long as is asked for: one program for collections whose longest episodes differ.
    list(programs.replay_episodes(cfg, "world", made[2:], PROMPT_KL, key, steps=16, **how))
    assert asked[-1][1].shape == (2, 2, 8, 7)


def test_a_rollout_from_a_keyframe_ends_with_its_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hand that has done nothing for 16 of 24 steps needs more than the 8 that are left to it."""
    sim = TabletopConfig(size=16)
    seeds, expert = np.arange(8), ExpertConfig(flawed_share=0.0, noise=0.0)
    shown = next(e for e in arena.play_demonstrations(seeds, jax.random.key(0), expert, sim) if e.success_S.any())
    won = int(shown.success_S.argmax())  # so many steps are needed from the first frame
    assert 8 < won <= sim.horizon
    idle = np.tile(np.float32(NULL_ACTION), (sim.horizon, 1))
    frame = np.repeat(shown.frame_SHWC[:1], sim.horizon + 1, axis=0)
    failed = dataclasses.replace(shown, frame_SHWC=frame, action_SA=idle, success_S=np.zeros(sim.horizon + 1, bool))
    cfg = StartsConfig(rule="last_chance", each=1, room=8)
    late = starts.keyframes([failed], cfg, steps=sim.horizon)
    assert late.step_K.tolist() == [16]
    table = jax.device_put(starts.join(starts.initial([failed]), late))

    def copy_the_expert(*_, **__):
        """Acts as the expert did before the frame that is most like the one seen."""
        seen_SHWC, action_SA = jnp.asarray(to_float(shown.frame_SHWC)), np.tile(np.float32(NULL_ACTION), (32, 1))
        action_SA[: len(shown.action_SA)] = shown.action_SA

        def act(frame_BHWC, prompt_BL, key_B):
            del prompt_BL, key_B
            far_BS = jnp.abs(frame_BHWC[:, None] - seen_SHWC).sum((2, 3, 4))
            at_BT = jnp.argmin(far_BS, axis=1)[:, None] + jnp.arange(8)
            action_BTA = jnp.asarray(action_SA)[at_BT]
            return jnp.zeros(action_BTA.shape, jnp.int32), jnp.zeros(action_BTA.shape), action_BTA

        return act

    monkeypatch.setattr(programs.vla, "policy", copy_the_expert)
    recipe = Recipe(
        policy=VLAConfig.fake(),
        world=WorldConfig.fake(),
        reward=RewardConfig.fake(),
        sim=sim,
        starts=StartsConfig(share=0.5),
        dream=DreamConfig(groups=2, chunks=3, world="true", reward="true"),
        learner=fake_learner(),
    )
    drawn_from = (table, PROMPT_KL[jnp.zeros(3, int)], programs.true_states(table, sim))

    def dream(**changes):
        rl = dataclasses.replace(improvement(recipe), **changes)
        _, start = programs.begin(rl, *drawn_from, jax.random.key(1))
        threshold = {"threshold": jnp.float32(0.5)}
        rollout = programs.dream.__wrapped__(rl, Codec(), None)({}, threshold, start, jax.random.key(0))
        return rollout, grpo.signal(rollout.success_BNT, rl.learner.grpo, rollout.live_BNT)

    rollout, signal = dream()
    assert rollout.keyframe_B.tolist() == [False, False, True, True]
    assert rollout.truth_BNT.reshape(4, -1).argmax(1).tolist() == [won - 1] * 4  # all of them get there, some too late
    assert rollout.success_BNT.any((1, 2)).tolist() == [True, True, False, False]
    assert signal.return_B.tolist() == [1.0, 1.0, 0.0, 0.0]
    weight_BS = signal.weight_BNT.reshape(4, -1)
    assert ((weight_BS > 0).sum(1) == jnp.array([won, won, 8, 8])).all() and (weight_BS[2:, 8:] == 0).all()
    np.testing.assert_allclose(weight_BS.sum(1), 1 / 4, rtol=1e-6)
    # RLinf's way, by name: as many steps as from the start.
    free = dataclasses.replace(recipe, starts=StartsConfig(share=0.5, deadline=False))
    assert improvement(recipe).steps == sim.horizon and improvement(free).steps is None
    rollout, signal = dream(steps=None)
    assert rollout.live_BNT is None and signal.return_B.tolist() == [1.0] * 4
