"""Start states: where keyframes fall, what memory holds, and that a table survives the disk."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.core import keys
from wovr_jax.core.config import ConfigError
from wovr_jax.data import starts
from wovr_jax.data.batches import NoDataError
from wovr_jax.data.episodes import EpisodesError
from wovr_jax.data.starts import StartsConfig
from wovr_jax.types import NULL_ACTION, Episode, Start

NULL = np.asarray(NULL_ACTION, np.float32)
PROMPTS = np.array([[1, 2], [3, 4]], np.int32)


def numbered(
    steps: int = 24, seed: int = 0, closed: tuple[int, int] | None = (6, 15), won_at: int | None = None
) -> Episode:
    """Frame t is filled with t; the gripper is closed in steps [closed)."""
    action = np.repeat(np.arange(1, steps + 1, dtype=np.float32)[:, None] / 100, 7, axis=1)
    low, high = closed or (0, 0)
    action[:, -1] = np.where((np.arange(steps) >= low) & (np.arange(steps) < high), 1.0, -1.0)
    frame = np.broadcast_to(np.arange(steps + 1, dtype=np.uint8)[:, None, None, None], (steps + 1, 2, 2, 3))
    success = np.arange(steps + 1) >= (steps + 1 if won_at is None else won_at)
    return Episode(frame.copy(), action, success, "x", seed % 2, seed, "base", action)


def keyframes(episodes, rule, before=6, rng=0, *, each=1, room=0, steps=24, **options) -> starts.Starts:
    """Of episodes that may take 24 steps; no time has to be left to a keyframe unless a test asks for it."""
    cfg = StartsConfig(rule=rule, before=before, each=each, room=room, **options)
    return starts.keyframes(episodes, cfg, rng, steps=steps)


def frame_numbers(frame) -> list[int]:
    return np.round((np.asarray(frame)[..., 0, 0, 0] + 1) * 127.5).astype(int).tolist()


def test_gripper_events():
    action = numbered().action_SA
    assert starts.gripper_events(action).tolist() == [6, 15]
    assert starts.gripper_events(action, "close").tolist() == [6]
    assert starts.gripper_events(action, "open").tolist() == [15]
    assert starts.gripper_events(numbered(closed=(0, 3)).action_SA).tolist() == [0, 3]  # open before the first step


def test_initial_starts():
    table = starts.initial([numbered(seed=3), numbered(steps=9, seed=4)])
    start = starts.gather(table, np.array([1, 0]), PROMPTS)
    assert isinstance(start, Start) and start.sim is None
    assert start.memory_BMHWC.shape == (2, 4, 2, 2, 3) and start.memory_BMHWC.dtype == jnp.float32
    assert (start.memory_BMHWC == -1.0).all() and (start.anchor_BHWC == -1.0).all()
    np.testing.assert_array_equal(start.action_BMA, np.tile(NULL, (2, 4, 1)))
    assert start.task_B.tolist() == [0, 1] and start.prompt_BL.tolist() == [[1, 2], [3, 4]]
    assert not start.keyframe_B.any() and start.step_B.tolist() == [0, 0]


def at(step: int) -> Start:
    """The start at ``step``, through the uniform rule."""
    for seed in range(1000):
        table = keyframes([numbered(seed=7)], "uniform", rng=seed)
        if table.step_K[0] == step:
            return starts.gather(table, np.array([0]), PROMPTS)
    raise AssertionError(f"step {step} was never drawn")


@pytest.mark.parametrize(
    ("step", "memory", "actions"),
    [
        (1, [0, 0, 0, 1], [None, None, None, 0]),
        (3, [0, 1, 2, 3], [None, 0, 1, 2]),
        (4, [1, 2, 3, 4], [0, 1, 2, 3]),
        (17, [14, 15, 16, 17], [13, 14, 15, 16]),
    ],
)
def test_memory_and_the_actions_that_produced_it(step, memory, actions):
    start = at(step)
    assert frame_numbers(start.memory_BMHWC) == [memory] and frame_numbers(start.anchor_BHWC) == [0]
    recorded = numbered().action_SA
    expected = [NULL if action is None else recorded[action] for action in actions]
    np.testing.assert_allclose(start.action_BMA[0], expected, rtol=1e-6)
    assert start.keyframe_B.all() and start.step_B.tolist() == [step] and start.task_B.tolist() == [1]


@pytest.mark.parametrize(
    ("rule", "options", "allowed"),
    [
        ("gripper_event", {"before": 3}, {3, 4, 5, 12, 13, 14}),
        ("gripper_event", {"before": 3, "event": "open"}, {12, 13, 14}),
        ("gripper_event", {"before": 9, "event": "close"}, {1, 2, 3, 4, 5}),
        ("gripper_event", {"before": 9, "least": 8, "event": "open"}, {6, 7}),
        ("last_event", {"before": 2}, {13, 14}),
        ("progress", {}, {6, 12, 18}),
        ("uniform", {}, set(range(1, 24))),
        # With 10 of 24 steps left none is later than 14, whatever the rule.
        ("gripper_event", {"before": 3, "room": 10}, {3, 4, 5, 12, 13, 14}),
        ("gripper_event", {"before": 3, "room": 12}, {3, 4, 5, 12}),
        ("last_event", {"before": 2, "room": 16}, {8}),
        ("progress", {"room": 10}, {6, 12, 14}),
        ("uniform", {"room": 10}, set(range(1, 15))),
        # Events at 6 and 15: the later one while a step before it leaves the room, else the earlier one.
        ("last_chance", {"before": 3}, {12, 13, 14}),
        ("last_chance", {"before": 3, "room": 10}, {12, 13, 14}),
        ("last_chance", {"before": 3, "room": 11}, {3, 4, 5}),
        ("last_chance", {"before": 3, "least": 2, "room": 11}, {12, 13}),
        ("last_chance", {"before": 3, "room": 20}, {4}),  # both came too late
    ],
)
def test_where_keyframes_fall(rule, options, allowed):
    table = keyframes([numbered()], rule, each=400, rng=0, **options)
    assert set(table.step_K.tolist()) == allowed
    assert table.initials == 0 and {row["rule"] for row in table.provenance()} == {rule}


def test_failure_without_a_gripper_event():
    table = keyframes([numbered(closed=None)], "last_event", before=3, each=100)
    assert set(table.step_K.tolist()) == {21, 22, 23}
    assert keyframes([numbered(closed=None)], "last_chance", each=9, room=8).step_K.tolist() == [16] * 9


def test_room_is_counted_from_the_end_of_the_episodes_time():
    """An episode of which only 12 steps are there, and one that is too short for any keyframe."""
    cut = numbered(steps=12, closed=(6, 20))
    assert set(keyframes([cut], "uniform", each=99, room=8).step_K.tolist()) == set(range(1, 12))
    assert set(keyframes([cut], "uniform", each=99, room=8, steps=12).step_K.tolist()) == {1, 2, 3, 4}
    with pytest.raises(NoDataError, match=r"less room \(24 of 24 steps\)"):
        keyframes([numbered()], "last_chance", room=24)


def test_the_default_rule_has_a_name_that_says_what_it_is():
    assert StartsConfig().rule == "last_chance" and StartsConfig().deadline and StartsConfig().room == 8
    # Numbers on the disk keep their meaning.
    assert starts.RULES[1] == "last_event" and starts.RULES[7] == "last_chance"
    with pytest.raises(ConfigError, match="'last_event', .*'last_chance', got 'before_failure'"):
        StartsConfig(rule="before_failure")


def test_keyframes_come_from_failures():
    mixed = [numbered(seed=0, won_at=18), numbered(seed=1), numbered(seed=2, won_at=1)]
    table = keyframes(mixed, "uniform", each=50)
    assert set(table.episode_K.tolist()) == {1}


def test_nothing_begins_in_an_episode_that_was_intervened_in():
    """Of five failures of the gripper two are scripted: neither their starts nor their keyframes are learned from."""
    mixed = [numbered(seed=seed) for seed in range(5)]
    for e in (1, 3):
        mixed[e] = dataclasses.replace(mixed[e], origin={"suite": "x", "intervened": "twitch"})
    assert starts.initial(mixed).episode_K.tolist() == [0, 2, 4]
    assert starts.initial(mixed).seed_K.tolist() == [0, 2, 4]
    assert keyframes(mixed, "uniform", each=2).episode_K.tolist() == [0, 0, 2, 2, 4, 4]
    # What replays recorded actions wants a row for each.
    assert starts.initial(mixed, intervened=True).episode_K.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(NoDataError, match="2 were given, all intervened in"):
        starts.initial([mixed[1], mixed[3]])
    with pytest.raises(NoDataError, match="in 2 episodes, of which 0 failed by themselves"):
        keyframes([mixed[1], mixed[3]], "uniform")


def test_no_keyframe_and_wrong_settings():
    with pytest.raises(NoDataError, match="rule 'uniform' finds no keyframe in 1 episodes, of which 0 failed"):
        keyframes([numbered(won_at=3)], "uniform")
    with pytest.raises(NoDataError, match="rule 'gripper_event' finds no keyframe in 1 episodes, of which 1 failed"):
        keyframes([numbered(closed=None)], "gripper_event")
    with pytest.raises(ConfigError, match="rule: expected one of 'last_event', .*, got 'gripper'"):
        StartsConfig(rule="gripper")
    with pytest.raises(ConfigError, match="event: expected one of 'any', 'open', 'close', got 'shut'"):
        StartsConfig(event="shut")
    with pytest.raises(ConfigError, match="before: expected at least 1, got 0"):
        StartsConfig(before=0)
    with pytest.raises(ConfigError, match="least: expected at most before=3, got 4"):
        StartsConfig(before=3, least=4)
    with pytest.raises(NoDataError):
        starts.initial([])


def test_the_same_seed_gives_the_same_keyframes():
    episodes = [numbered(seed=seed) for seed in range(20)]
    first, again, other = (keyframes(episodes, "gripper_event", rng=seed).step_K for seed in (1, 1, 2))
    assert first.tolist() == again.tolist() != other.tolist()


def test_played_actions_lead_to_the_step():
    table = keyframes([numbered(steps=10), numbered(steps=24, seed=5)], "progress", rng=0)
    recorded = numbered().action_SA
    assert table.played_KSA.shape == (2, 24, 7)
    for row, step in enumerate(table.step_K.tolist()):
        np.testing.assert_array_equal(table.played_KSA[row, :step, :6], recorded[:step, :6])
        np.testing.assert_array_equal(table.played_KSA[row, step:], np.tile(NULL, (24 - step, 1)))


def table_of_both() -> starts.Starts:
    episodes = [numbered(seed=seed) for seed in range(10)]
    return starts.join(starts.initial(episodes), keyframes([numbered(steps=30, seed=11)], "uniform", each=5, steps=30))


def test_drawn_groups_are_equal_rows_with_the_share_of_keyframes():
    table = jax.device_put(table_of_both())
    assert len(table) == 15 and table.initials == 10 and table.played_KSA.shape == (15, 30, 7)
    row = jax.jit(lambda t, k: starts.draw(t, k, 12, 8, share=1 / 3))(table, keys.key(0, "draw"))
    groups = np.asarray(row).reshape(12, 8)
    assert (groups == groups[:, :1]).all() and (groups[:, 0] >= 10).sum() == 4
    start = jax.jit(starts.gather)(table, row, PROMPTS)
    assert start.keyframe_B.reshape(12, 8)[:, 0].sum() == 4
    assert (starts.draw(starts.initial([numbered()]), keys.key(0), 3, 2) == 0).all()
    only = keyframes([numbered()], "uniform", each=4)
    assert len(starts.draw(only, keys.key(0), 3, 2, share=0.0)) == 6


def test_host_and_device_tables_give_the_same():
    table, row = table_of_both(), jnp.array([0, 12, 14])
    host, device = starts.gather(table, row, PROMPTS), starts.gather(jax.device_put(table), row, PROMPTS)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(host), jax.tree.leaves(device), strict=True))


def test_disk_round_trip(tmp_path):
    table = table_of_both()
    starts.save(tmp_path / "starts", table, meta={"episodes": "abc"})
    again = starts.load(tmp_path / "starts")
    assert again.initials == table.initials and again.provenance() == table.provenance()
    for field in dataclasses.fields(starts.Starts):
        assert np.array_equal(getattr(again, field.name), getattr(table, field.name))
    with pytest.raises(EpisodesError, match="exists already"):
        starts.save(tmp_path / "starts", table)
    starts.save(tmp_path / "starts", starts.initial([numbered()]), overwrite=True)
    assert len(starts.load(tmp_path / "starts")) == 1
    (tmp_path / "starts" / "task_K.npy").write_bytes(b"\x93NUM")
    with pytest.raises(EpisodesError, match=r"task_K.npy is missing or cut short"):
        starts.load(tmp_path / "starts")
    with pytest.raises(EpisodesError, match="no start states"):
        starts.load(tmp_path / "nothing")


def test_join_refuses_the_wrong_order():
    key = keyframes([numbered()], "uniform")
    with pytest.raises(ValueError, match="episode starts first"):
        starts.join(key, key)


# --- contact --------------------------------------------------------------------------------


def gripping(width_S: list[float], until: int = 12) -> Episode:
    """An episode whose fingers stand this far apart, told to close from step 2 to step ``until``."""
    episode = numbered(steps=len(width_S) - 1, closed=(2, until))
    state_SD = np.zeros((len(width_S), 8), np.float32)
    state_SD[:, 6], state_SD[:, 7] = np.asarray(width_S) / 2, -np.asarray(width_S) / 2
    return dataclasses.replace(episode, state_SD=state_SD)


def test_a_contact_is_where_closing_fingers_stop_before_they_meet():
    closing = [0.08, 0.08, 0.08, 0.079, 0.07, 0.055, 0.045]
    held = gripping([*closing, 0.0449, 0.0449, 0.0448, 0.0448, 0.0448, 0.0448, 0.06, 0.08])
    # Not step 2, where they were told to close and had not moved, nor the opening at 12.
    assert starts.contacts(held).tolist() == [6]
    empty = gripping([*closing, 0.03, 0.015, 0.004, 0.0005, 0.0004, 0.0004, 0.02, 0.04])
    assert starts.contacts(empty).tolist() == []
    table = keyframes([held], "contact", 2, each=4)
    assert set(table.step_K.tolist()) <= {4, 5} and {row["rule"] for row in table.provenance()} == {"contact"}
    with pytest.raises(NoDataError, match="finds no keyframe in 1 episodes"):
        keyframes([empty], "contact")
    with pytest.raises(NoDataError, match="reads the fingers off the robot's state, which is not here"):
        keyframes([numbered()], "contact")


def test_a_release_ends_what_was_carried_and_not_a_tremor():
    closing = [0.08, 0.08, 0.08, 0.079, 0.07, 0.055, 0.045]
    carried = gripping([*closing, *[0.0448] * 9, 0.06, 0.08, 0.08], until=16)
    assert starts.contacts(carried).tolist() == [6] and starts.releases(carried).tolist() == [16]
    table = keyframes([carried], "release", 4, each=8, least=3)
    assert set(table.step_K.tolist()) == {12, 13} and {row["rule"] for row in table.provenance()} == {"release"}
    touched = gripping([*closing, *[0.0448] * 5, 0.06, 0.08, 0.08])
    assert starts.contacts(touched).tolist() == [6] and starts.releases(touched).tolist() == []
