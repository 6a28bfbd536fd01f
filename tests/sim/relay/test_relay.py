"""The second embedded simulator: what is hidden, what moves, what has to come first, its expert."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.core import pixels
from wovr_jax.core.config import ConfigError
from wovr_jax.policy.tokenizer import Tokenizer
from wovr_jax.sim import embedded
from wovr_jax.sim.relay import table as relay
from wovr_jax.sim.relay.table import LID, RelayConfig, RelayState
from wovr_jax.sim.tabletop.expert import ExpertConfig
from wovr_jax.sim.tabletop.table import TabletopConfig

HIDDEN = RelayConfig(hidden_share=1.0)
EXPERT = ExpertConfig(flaw="none")
STEP = jax.jit(relay.step, static_argnums=2)


def _action(x: float = 0.0, y: float = 0.0, grip: float = -1.0) -> jax.Array:
    return jnp.array([x, y, 0.0, 0.0, 0.0, 0.0, grip])


def _after(steps: int, cfg: RelayConfig = HIDDEN, seed: int = 3) -> RelayState:
    state = relay.reset(jax.random.key(seed), cfg)
    for _ in range(steps):
        state = STEP(state, _action(), cfg)
    return state


def _at(state: RelayState, place: jax.Array, **changes: object) -> RelayState:
    return dataclasses.replace(state, gripper=place, **changes)


def _placed(state: RelayState) -> RelayState:
    """The named block lies in the middle of the plate."""
    return dataclasses.replace(state, thing_O2=state.thing_O2.at[0].set(state.plate))


def _recolour(state: RelayState) -> RelayState:
    """The same state with the third colour on the named block."""
    return dataclasses.replace(state, colour_K=state.colour_K.at[0].set(3 - state.colour_K.sum()))


def _demos(count: int) -> list:
    return list(embedded.play_demonstrations(range(count), jax.random.key(1), EXPERT, RelayConfig(), batch=64))


def test_the_first_frame_shows_what_the_later_ones_hide() -> None:
    first, later = _after(0), _after(8)
    assert float(jnp.abs(relay.render(first, HIDDEN) - relay.render(_recolour(first), HIDDEN)).max()) > 0.5
    np.testing.assert_array_equal(relay.render(later, HIDDEN), relay.render(_recolour(later), HIDDEN))
    # Neither does a hidden block's place show, as long as the lid covers all of it.
    moved = dataclasses.replace(later, thing_O2=later.thing_O2.at[0].add(0.03))
    np.testing.assert_array_equal(relay.render(later, HIDDEN), relay.render(moved, HIDDEN))


def test_the_other_block_is_hidden_where_the_setting_says_so() -> None:
    shares = []
    for share in (0.0, 0.7):
        cfg = RelayConfig(hidden_share=share)
        state = embedded.reset_batch(jnp.arange(256), cfg)
        shares.append(float((state.box == state.thing_O2[:, 0]).all(-1).mean()))
    assert shares[0] == 0.0 and 0.6 < shares[1] < 0.8
    assert bool(relay.hides(_after(4, RelayConfig(hidden_share=0.0)))[1])


def test_the_first_frame_tells_where_lid_and_plate_will_go() -> None:
    state = embedded.reset_batch(jnp.arange(512), RelayConfig())
    lid, box = state.thing_O2[:, LID, 0], state.box[:, 0]
    # Two pixels between the nearest lids that go to different sides.
    left, right = lid[box < 0.5], lid[box > 0.5]
    assert len(left) > 100 and len(right) > 100 and float(right.min() - left.max()) > 2 / 32
    assert bool(((state.drift > 0) == (state.plate[:, 0] < 0.5)).all())


def test_nothing_lies_on_anything_at_the_start() -> None:
    state = embedded.reset_batch(jnp.arange(512), RelayConfig())
    block, other, lid = (state.thing_O2[:, i] for i in range(3))

    def gap(a: jax.Array, b: jax.Array) -> float:
        return float(jnp.abs(a - b).max(-1).min())

    assert gap(block, lid) > 0.085 + 0.14 - 1e-3 and gap(other, lid) > 0.085 + 0.14 - 1e-3
    for thing, half in ((block, 0.085), (other, 0.085), (lid, 0.14)):
        assert gap(thing, state.button) > half + relay.BUTTON - 0.01  # soft edges may touch
        assert gap(thing, state.plate) > half + 0.15
    assert gap(state.button, state.plate) > relay.BUTTON + 0.15


def test_jaws_near_both_take_the_lid_and_then_the_block() -> None:
    state = _after(8)
    taken = STEP(_at(state, state.thing_O2[0]), _action(grip=1.0), HIDDEN)
    assert int(taken.held) == LID
    # Carried aside, it frees the block.
    aside = dataclasses.replace(state, thing_O2=state.thing_O2.at[LID].set(jnp.array([0.5, 0.5])))
    assert int(STEP(_at(aside, aside.thing_O2[0]), _action(grip=1.0), HIDDEN).held) == 0
    assert int(STEP(_at(aside, aside.thing_O2[0]), _action(x=1.0, grip=1.0), HIDDEN).held) == -1  # in full flight


def test_a_lid_that_is_held_does_not_slide() -> None:
    state = _after(0)
    state = STEP(_at(state, state.thing_O2[LID]), _action(grip=1.0), HIDDEN)
    held = STEP(state, _action(grip=1.0), HIDDEN)
    assert int(held.held) == LID
    np.testing.assert_array_equal(held.thing_O2[LID], held.gripper)


def test_the_plate_goes_on_moving_turns_and_takes_the_block_along() -> None:
    cfg = RelayConfig(horizon=160)
    states = embedded.roll(_placed(_after(8)), jnp.tile(_action(), (160, 1)), cfg)
    step_S = np.diff(states.plate[:, 0])
    np.testing.assert_allclose(np.abs(step_S), cfg.plate_speed, atol=1e-6)
    assert (step_S > 0).any() and (step_S < 0).any()
    assert float(jnp.abs(states.plate[:, 0] - 0.5).max()) <= relay.REACH + 1e-6
    np.testing.assert_allclose(states.thing_O2[:, 0], states.plate, atol=1e-4)
    # What does not lie on it stays.
    np.testing.assert_array_equal(states.thing_O2[:, 1], states.thing_O2[:1, 1].repeat(160, axis=0))


def test_the_button_counts_only_after_the_block() -> None:
    state = _after(8)
    early = STEP(_at(state, state.button), _action(grip=1.0), HIDDEN)
    assert bool(relay.pressed(early, HIDDEN)) and not bool(relay.success(early, HIDDEN))
    # Pressed first and placed afterwards is no success either: the jaws that carried are elsewhere.
    late = _placed(STEP(early, _action(grip=-1.0), HIDDEN))
    assert not bool(relay.success(late, HIDDEN))
    done = STEP(_at(_placed(state), state.button), _action(grip=1.0), HIDDEN)
    assert bool(relay.success(done, HIDDEN))
    assert not bool(relay.success(STEP(done, _action(grip=-1.0), HIDDEN), HIDDEN))  # of one frame


def test_full_jaws_do_not_press() -> None:
    state = _placed(_after(8))
    holding = _at(state, state.button, held=jnp.array(1, jnp.int32), closed=jnp.array(True))
    assert not bool(relay.pressed(STEP(holding, _action(grip=1.0), HIDDEN), HIDDEN))


def test_the_picture_tells_press_and_grasp_and_is_as_soft_as_the_tables() -> None:
    state = _after(8)
    opened = relay.render(_at(state, state.button), HIDDEN)
    pressed = relay.render(_at(state, state.button, closed=jnp.array(True)), HIDDEN)
    assert opened.shape == (32, 32, 3) and float(jnp.abs(opened).max()) <= 1.0
    assert float((jnp.abs(opened - pressed).max(-1) > 0.3).sum()) > 20  # more than the gripper alone
    # Band-limited: hardly more energy above half of the highest frequency of the grid than the table has.
    shares = []
    for cfg in (HIDDEN, TabletopConfig(clutter=True)):
        frames = np.asarray(embedded.make_starts(jnp.arange(32), jnp.zeros((3, 2), jnp.int32), cfg).anchor_BHWC)
        power = np.abs(np.fft.fft2(frames - frames.mean((1, 2), keepdims=True), axes=(1, 2))) ** 2
        fast = np.abs(np.fft.fftfreq(32)) > 0.25
        shares.append(power[:, fast[:, None] | fast[None, :]].sum() / power.sum())
    assert shares[0] < 1.25 * shares[1] < 0.05, shares


def test_the_expert_succeeds_and_goes_on_afterwards() -> None:
    episodes = _demos(256)
    assert np.mean([episode.success_S.any() for episode in episodes]) >= 0.97
    assert 30 < np.median([episode.success_S.argmax() for episode in episodes]) < 60
    ends = [(episode.frame_SHWC[episode.success_S.argmax()], episode.frame_SHWC[-1]) for episode in episodes]
    assert np.mean([(then != last).any() for then, last in ends]) == 1.0
    assert not np.mean([episode.success_S[-1] for episode in episodes]) > 0.1  # it has left the button


def test_labels_are_clean_and_executed_actions_are_not() -> None:
    episode = _demos(1)[0]
    assert set(np.unique(np.abs(episode.label_SA[:, :2])).round(2)) <= {0.0, 0.25, 0.5, 1.0}
    assert not np.array_equal(episode.label_SA, episode.action_SA)


def test_seed_and_actions_replay_an_episode_exactly() -> None:
    cfg = RelayConfig()
    episode = _demos(3)[2]
    for step in (40, cfg.horizon):
        state = embedded.replay(jnp.array([episode.seed]), jnp.asarray(episode.action_SA)[None], jnp.array([step]), cfg)
        frame = relay.render(jax.tree.map(lambda leaf: leaf[0], state), cfg)
        assert np.array_equal(pixels.to_uint8(frame), episode.frame_SHWC[step])


def test_subgoals_come_in_their_order_and_name_what_is_missing() -> None:
    cfg = RelayConfig()
    played = [np.stack([episode.action_SA for episode in _demos(64)])]
    played += [np.tile(_action(), (64, cfg.horizon, 1))]
    rates = []
    for action_BSA in played:
        rates.append(embedded.measure_subgoals(jnp.asarray(action_BSA), jnp.arange(64), cfg))
    assert list(rates[0]) == ["free", "grasped", "placed", "pressed"]
    assert min(rates[0].values()) > 0.9
    # Who does nothing finds what was never covered free.
    assert 0.1 < rates[1]["free"] < 0.5 and rates[1]["grasped"] == rates[1]["pressed"] == 0.0


def test_its_words_are_known_and_come_after_those_of_the_table() -> None:
    words = Tokenizer.relay()
    assert len(np.unique(words.prompts(relay.INSTRUCTIONS), axis=0)) == 3
    assert words.words[: len(Tokenizer.tabletop().words)] == Tokenizer.tabletop().words
    with pytest.raises(ValueError, match="unknown"):
        Tokenizer.tabletop().prompts(relay.INSTRUCTIONS)


def test_settings_without_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="success_radius: expected at most plate_radius"):
        RelayConfig(success_radius=0.2)
