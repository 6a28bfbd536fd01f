"""The fused scan against the same parts in a Python loop, and its contracts."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from wovr_jax.imagine import imagine, predicate, shadow
from wovr_jax.sim import embedded
from wovr_jax.sim.tabletop.table import TabletopConfig
from wovr_jax.types import Array, Start, World

CFG = TabletopConfig(size=16)
PROMPT_KL = jnp.zeros((3, 4), jnp.int32)


def _act(frame_BHWC: Array, prompt_BL: Array, key_B: Array) -> tuple[Array, Array, Array]:
    def one(frame: Array, key: Array) -> tuple[Array, Array, Array]:
        token_TA = jax.random.randint(key, (8, 7), 0, 256)
        action_TA = jnp.clip(token_TA / 127.5 - 1.0 + 0.1 * frame.mean(), -1.0, 1.0)
        return token_TA, jnp.full((8, 7), -jnp.log(256.0)), action_TA

    return jax.vmap(one)(frame_BHWC, key_B)


def _dreaming() -> World:
    """A stochastic stand-in for the learned model: drifts by the actions plus noise."""

    def step(state: Array, action_BTA: Array, key_B: Array) -> tuple[Array, Array, None]:
        noise = jax.vmap(lambda key: jax.random.normal(key, state.shape[1:]))(key_B)
        drift_BT = jnp.cumsum(action_BTA[..., 0], axis=1)
        frame_BTHWC = jnp.clip(state[:, None] + 0.01 * drift_BT[..., None, None, None] + 0.1 * noise[:, None], -1, 1)
        return frame_BTHWC[:, -1], frame_BTHWC, None

    return World(begin=lambda start: start.anchor_BHWC, step=step)


def _brightness(frame_BTHWC: Array, task_B: Array, truth_BT: Array | None) -> Array:
    return jax.nn.sigmoid(frame_BTHWC.mean((-1, -2, -3)))


def _start(batch: int = 4) -> Start:
    return embedded.make_starts(jnp.arange(batch), PROMPT_KL, CFG)


def test_fused_scan_equals_a_python_loop_of_the_same_parts() -> None:
    start, key, world = _start(), jax.random.key(5), _dreaming()
    fused = jax.jit(lambda s: imagine(_act, world, _brightness, s, key, chunks=3, video=True))(start)
    key_B = jax.vmap(lambda b: jax.random.fold_in(key, b))(jnp.arange(4))
    state, frame = world.begin(start), start.memory_BMHWC[:, -1]
    for n in range(3):
        keys = jax.vmap(lambda k, n=n: jax.random.split(jax.random.fold_in(k, n)))(key_B)
        token, _, action = _act(frame, start.prompt_BL, keys[:, 0])
        assert jnp.array_equal(fused.frame_BNHWC[:, n], frame) or jnp.allclose(
            fused.frame_BNHWC[:, n], frame, atol=1e-6
        )
        assert jnp.array_equal(fused.token_BNTA[:, n], token)
        state, video, _ = world.step(state, action, keys[:, 1])
        assert jnp.allclose(fused.video_BNTHWC[:, n], video, atol=1e-6)
        assert jnp.allclose(fused.prob_BNT[:, n], _brightness(video, start.task_B, None), atol=1e-6)
        frame = video[:, -1]


def test_recorded_actions_equal_policy_actions() -> None:
    start, key = _start(), jax.random.key(6)
    lived = imagine(_act, _dreaming(), _brightness, start, key, chunks=2, video=True)
    again = imagine(lived.action_BNTA, _dreaming(), _brightness, start, key, chunks=2, video=True)
    assert jnp.array_equal(lived.video_BNTHWC, again.video_BNTHWC)
    assert jnp.array_equal(lived.prob_BNT, again.prob_BNT)


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    key = jax.random.key(7)
    many = imagine(_act, _dreaming(), _brightness, _start(4), key, chunks=2)
    few = imagine(_act, _dreaming(), _brightness, _start(2), key, chunks=2)
    assert jnp.array_equal(many.action_BNTA[:2], few.action_BNTA)


def test_true_world_reports_the_true_predicate() -> None:
    lived = imagine(_act, embedded.world(CFG), predicate, _start(), jax.random.key(8), chunks=2)
    assert lived.truth_BNT is not None
    assert jnp.array_equal(lived.success_BNT, lived.truth_BNT)


def test_shadow_gives_imagined_frames_and_true_reward() -> None:
    world = shadow(_dreaming(), embedded.world(CFG))
    key, start = jax.random.key(9), _start()
    both = imagine(_act, world, predicate, start, key, chunks=2, video=True)
    dream = imagine(_act, _dreaming(), _brightness, start, key, chunks=2, video=True)
    assert jnp.array_equal(both.video_BNTHWC, dream.video_BNTHWC)
    assert both.truth_BNT is not None


def test_predicate_without_truth_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="`shadow`"):
        imagine(_act, _dreaming(), predicate, _start(), jax.random.key(0), chunks=1)


def test_recorded_actions_of_the_wrong_shape_are_named() -> None:
    with pytest.raises(ValueError, match=r"expected \(4, 3, T, A\).*got \(4, 2, 8, 7\)"):
        imagine(jnp.zeros((4, 2, 8, 7)), _dreaming(), _brightness, _start(), jax.random.key(0), chunks=3)


def test_start_without_simulator_state_is_named() -> None:
    with pytest.raises(ValueError, match=r"Start\.sim"):
        imagine(_act, embedded.world(CFG), predicate, _start().replace(sim=None), jax.random.key(0), chunks=1)


def test_what_does_not_have_the_axes_of_its_name_is_refused_while_tracing() -> None:
    start, key = _start(), jax.random.key(0)
    odd = dataclasses.replace(start, prompt_BL=start.prompt_BL[0])
    with pytest.raises(AssertionError, match=r"imagine: start\.prompt_BL"):
        imagine(_act, _dreaming(), _brightness, odd, key, chunks=1)
    short = dataclasses.replace(start, step_B=start.step_B[:3])
    with pytest.raises(AssertionError, match=r"imagine: start\.step_B"):
        imagine(_act, _dreaming(), _brightness, short, key, chunks=1)
    with pytest.raises(AssertionError, match="imagine: prob_BT of the score"):
        imagine(_act, _dreaming(), lambda *given: _brightness(*given)[:, :1], start, key, chunks=1)
    with pytest.raises(AssertionError, match="imagine: token_BTA of the actor"):
        imagine(lambda *seen: (_act(*seen)[0][:, 0], *_act(*seen)[1:]), _dreaming(), _brightness, start, key, chunks=1)


def test_a_profile_tells_policy_world_and_score_apart() -> None:
    run = jax.jit(lambda s: imagine(_act, _dreaming(), _brightness, s, jax.random.key(0), chunks=1))
    text = run.lower(_start()).as_text(debug_info=True)
    assert all(f"{part}/" in text for part in ("policy", "world", "score"))
