"""The embedded table: its rules, its determinism, its expert."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.core import pixels
from wovr_jax.data import starts
from wovr_jax.data.starts import StartsConfig
from wovr_jax.sim import embedded
from wovr_jax.sim.tabletop import eye
from wovr_jax.sim.tabletop import table as tabletop
from wovr_jax.sim.tabletop.expert import ExpertConfig
from wovr_jax.sim.tabletop.table import TabletopConfig
from wovr_jax.types import Imagined

CFG = TabletopConfig()


def _action(x: float = 0.0, y: float = 0.0, grip: float = -1.0) -> jax.Array:
    return jnp.array([x, y, 0.0, 0.0, 0.0, 0.0, grip])


def _over_target(gripper_offset: float = 0.0) -> tabletop.TabletopState:
    state = tabletop.reset(jax.random.key(3), CFG)
    return state.replace(gripper=state.block_K2[0] + jnp.array([gripper_offset, 0.0]))


def test_still_jaws_take_a_near_block() -> None:
    assert int(tabletop.step(_over_target(0.05), _action(grip=1.0), CFG).held) == 0


def test_jaws_in_full_flight_take_nothing() -> None:
    # A rule without the speed condition would hold block 0 here.
    assert int(tabletop.step(_over_target(0.05), _action(x=-1.0, grip=1.0), CFG).held) == -1


def test_far_jaws_take_nothing() -> None:
    assert int(tabletop.step(_over_target(0.14), _action(grip=1.0), CFG).held) == -1


def test_held_block_follows_and_stays_where_it_is_dropped() -> None:
    state = tabletop.step(_over_target(), _action(grip=1.0), CFG)
    state = tabletop.step(state, _action(y=1.0, grip=1.0), CFG)
    assert jnp.allclose(state.block_K2[0], state.gripper)
    dropped = tabletop.step(state, _action(y=1.0, grip=-1.0), CFG)
    assert jnp.allclose(dropped.block_K2[0], state.block_K2[0])


def test_success_needs_release() -> None:
    state = _over_target()
    state = state.replace(gripper=state.plate, held=jnp.array(0, jnp.int32), closed=jnp.array(True))
    held = tabletop.step(state, _action(grip=1.0), CFG)
    assert not bool(tabletop.success(held, CFG))
    assert bool(tabletop.success(tabletop.step(held, _action(grip=-1.0), CFG), CFG))


def test_unused_dimensions_change_nothing() -> None:
    state = tabletop.reset(jax.random.key(0), CFG)
    plain = tabletop.step(state, _action(0.5, 0.5), CFG)
    noisy = tabletop.step(state, _action(0.5, 0.5).at[2:6].set(0.7), CFG)
    assert all(bool(jnp.array_equal(a, b)) for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(noisy), strict=True))


def test_frames_are_in_range_and_show_the_gripper_command() -> None:
    state = _over_target()
    opened = tabletop.render(state, CFG)
    closed = tabletop.render(tabletop.step(state, _action(grip=1.0), CFG), CFG)
    assert opened.shape == (32, 32, 3)
    assert float(jnp.abs(opened).max()) <= 1.0
    assert float(jnp.abs(opened - closed).max()) > 0.5


def _demos(cfg: ExpertConfig, count: int) -> list:
    return list(embedded.play_demonstrations(range(count), jax.random.key(1), cfg, CFG, batch=64))


def test_the_simulator_follows_actions_from_the_middle_of_episodes_as_they_went_on() -> None:
    """Reset by seed and played up to the step, the rest of each recorded episode ends as it did."""
    episodes = [episode for episode in _demos(ExpertConfig(), 16) if len(episode.action_SA) == CFG.horizon]
    how = StartsConfig(rule="uniform", each=2, room=0)
    hopeless = [dataclasses.replace(episode, success_S=np.zeros_like(episode.success_S)) for episode in episodes]
    table = starts.join(starts.initial(episodes), starts.keyframes(hopeless, how, steps=CFG.horizon))
    words = jnp.zeros((3, 1), jnp.int32)
    table_arena = embedded.Embedded(CFG, ExpertConfig(), seed=0, batch=8, memory=4, prompt_KL=words)
    row_K = np.arange(len(table))[::-1]
    went_on = np.zeros((len(row_K), CFG.horizon, 7), np.float32)
    for k, row in enumerate(row_K):
        episode, step = episodes[table.episode_K[row]], int(table.step_K[row])
        went_on[k, : CFG.horizon - step] = episode.action_SA[step:]
    won_KS, frame_KSHWC = table_arena.follow(table, row_K, went_on, film=True)
    unseen = table_arena.follow(table, row_K, went_on)
    assert unseen[1] is None and np.array_equal(unseen[0], won_KS)
    assert frame_KSHWC is not None and frame_KSHWC.dtype == np.uint8
    assert won_KS.shape == (len(row_K), CFG.horizon) and won_KS.dtype == bool
    for k, row in enumerate(row_K):
        episode, step = episodes[table.episode_K[row]], int(table.step_K[row])
        assert won_KS[k, : CFG.horizon - step].tolist() == episode.success_S[step + 1 :].tolist()
        # Drawn by another program, which may round another way.
        off = frame_KSHWC[k, : CFG.horizon - step].astype(int) - episode.frame_SHWC[step + 1 :]
        assert np.abs(off).max() <= 1
    assert won_KS.any() and not won_KS[:, -1].all()


def test_flawless_expert_succeeds_and_flawed_one_fails() -> None:
    good = _demos(ExpertConfig(flaw="none"), 64)
    bad = _demos(ExpertConfig(flawed_share=1.0, noise=0.0, flip=0.0), 64)
    assert np.mean([episode.success_S.any() for episode in good]) >= 0.98
    assert np.mean([episode.success_S.any() for episode in bad]) <= 0.02


def test_unknown_flaw_is_refused() -> None:
    with pytest.raises(ValueError, match="early_release"):
        ExpertConfig(flaw="clumsy")


def test_seed_and_actions_replay_an_episode_exactly() -> None:
    episode = _demos(ExpertConfig(), 3)[2]
    state = embedded.replay(
        jnp.array([episode.seed]), jnp.asarray(episode.action_SA)[None], jnp.array([CFG.horizon]), CFG
    )
    frame = tabletop.render(jax.tree.map(lambda leaf: leaf[0], state), CFG)
    assert np.array_equal(pixels.to_uint8(frame), episode.frame_SHWC[-1])


def test_labels_are_clean_and_executed_actions_are_not() -> None:
    episode = _demos(ExpertConfig(flaw="none"), 1)[0]
    speeds = np.abs(episode.label_SA[:, :2])
    assert set(np.unique(speeds).round(2)) <= {0.0, 0.25, 0.5, 1.0}
    assert not np.array_equal(episode.label_SA, episode.action_SA)


def test_episodes_refuse_a_rollout_without_video() -> None:
    empty = Imagined(*([jnp.zeros(1)] * 8))
    with pytest.raises(ValueError, match="video=True"):
        list(embedded.split_episodes(empty, [0], "base", tabletop.INSTRUCTIONS))


def test_a_second_camera_and_the_state_stand_beside_the_same_picture() -> None:
    full = dataclasses.replace(CFG, wrist=True, strip=16)
    assert (full.views, full.state, CFG.views, CFG.state) == (2, 3, 1, 0)
    state = _over_target(0.05)
    mosaic = tabletop.render(state, full)
    assert mosaic.shape == (32, 80, 3)
    np.testing.assert_array_equal(mosaic[:, :32], tabletop.render(state, CFG))
    # The hand sees itself in the middle, wherever it is, and the block beside it at twice the size.
    for x in (0.0, 0.3):
        moved = state.replace(gripper=state.gripper + jnp.array([x, 0.0]))
        seen = eye.locate_gripper(tabletop.render(moved, full)[:, 32:64])
        np.testing.assert_allclose(seen.xy, 0.5, atol=0.02)
    alone = state.replace(gripper=jnp.array([0.5, 0.5]))  # of the whole table the hand sees no edge
    above, hand = (eye.locate_gripper(tabletop.render(alone, full)[:, low : low + 32]).area for low in (0, 32))
    np.testing.assert_allclose(hand / above, 4.0, rtol=0.3)


def test_fingers_tell_a_block_from_nothing() -> None:
    open_, held, empty = (
        tabletop.step(_over_target(x), _action(grip=grip), CFG) for x, grip in ((0.0, -1.0), (0.0, 1.0), (0.3, 1.0))
    )
    assert [float(tabletop.sense(state)[2]) for state in (open_, held, empty)] == [1.0, 0.0, -1.0]
    np.testing.assert_allclose(tabletop.sense(held)[:2], 2 * held.gripper - 1)
