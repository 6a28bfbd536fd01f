"""The closed loop: what a policy is paid for in a learned world, and what the same actions do in the true one."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.audit import closed_loop
from wovr_jax.core import keys, stats
from wovr_jax.core.pixels import to_uint8
from wovr_jax.data import starts
from wovr_jax.data.starts import Starts, StartsConfig
from wovr_jax.policy.actions import Codec
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.run.bind import improvement
from wovr_jax.run.folder import Product, Run
from wovr_jax.run.recipe import Recipe
from wovr_jax.run.stages.reward import Judge
from wovr_jax.sim import embedded
from wovr_jax.sim.tabletop.expert import ExpertConfig
from wovr_jax.sim.tabletop.table import TabletopConfig
from wovr_jax.types import NULL_ACTION, Array, Imagined, Params, Start
from wovr_jax.world.model import WorldConfig

CFG = TabletopConfig(size=16)
PROMPT_KL = jnp.zeros((3, 2), jnp.int32)
EPISODES, COUNT, BATCH = 12, 5, 4


@pytest.fixture(scope="module")
def table() -> Starts:
    """Twelve episode starts, and two keyframes of each episode."""
    episodes = list(
        embedded.play_demonstrations(range(EPISODES), jax.random.key(0), ExpertConfig(), CFG, batch=EPISODES)
    )
    failed = [dataclasses.replace(episode, success_S=np.zeros_like(episode.success_S)) for episode in episodes]
    how = StartsConfig(rule="uniform", each=2, room=0)
    return starts.join(starts.initial(episodes), starts.keyframes(failed, how, steps=CFG.horizon))


Play = Callable[[Start], tuple[np.ndarray, np.ndarray]]
"""A stand-in of policy, learned world and judge: start -> probabilities (B, S) and actions (B, S, A)."""


Judge_ = Callable[[Start, Array], np.ndarray]
"""A stand-in of learned world and judge: start and actions (B, 1, T, A) -> probabilities (B, T) of that chunk."""


def close(
    folder: pathlib.Path,
    table: Starts,
    play: Play,
    patch: pytest.MonkeyPatch,
    force: Judge_ = lambda start, action_BNTA: np.zeros((BATCH, 8), np.float32),
) -> tuple[dict[str, Any], list[Start]]:
    """Facts of the stage, and the starts that it began from, batch by batch."""
    begun: list[Start] = []

    def replay(world: Params, reward: Params, start: Start, action_BNTA: Array, key: Array) -> Imagined:
        none = {field.name: None for field in dataclasses.fields(Imagined)}
        return Imagined(**none | {"prob_BNT": jnp.asarray(force(start, action_BNTA))[:, None]})

    def roll(policy: Params, world: Params, reward: Params, start: Start, key: Array) -> Imagined:
        begun.append(start)
        prob_BS, action_BSA = play(start)
        none = {field.name: None for field in dataclasses.fields(Imagined)}
        prob_BNT, action_BNTA = prob_BS.reshape(BATCH, -1, 8), action_BSA.reshape(BATCH, -1, 8, 7)
        return Imagined(**none | {"prob_BNT": jnp.asarray(prob_BNT), "action_BNTA": jnp.asarray(action_BNTA)})

    patch.setattr(closed_loop, "roll_in_world", lambda *settings: roll)
    patch.setattr(closed_loop.programs, "replay", lambda *settings: replay)
    recipe = Recipe(policy=VLAConfig.fake(), world=WorldConfig.fake(), reward=RewardConfig.fake(), sim=CFG)
    true = embedded.Embedded(CFG, ExpertConfig(), seed=0, batch=BATCH, memory=4, prompt_KL=PROMPT_KL)
    how = (true, COUNT, BATCH, improvement(recipe), Codec, PROMPT_KL)
    learned = (Product(lambda: (WorldConfig.fake(), {})), Product(dict), Product(lambda: Judge({}, 0.5)))
    products = (Product(dict), Product(lambda: table), *learned)
    made = closed_loop.close_loop(Run(folder, {}), 1, 0, *how, *products, lambda *names: keys.key(0, *names))
    return made.facts, begun


def rest(start: Start) -> np.ndarray:
    return np.broadcast_to(np.float32(NULL_ACTION), (BATCH, CFG.horizon, 7))


def test_a_world_that_always_shows_success_pays_every_failure(
    table: Starts, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the replay of recorded successes, which is all that was asked before, would have called it right."""

    def play(start: Start) -> tuple[np.ndarray, np.ndarray]:
        return np.ones((BATCH, CFG.horizon), np.float32), rest(start)

    facts, begun = close(tmp_path / "run", table, play, monkeypatch)
    for kind, count in (("all", 2 * COUNT), ("episode_start", COUNT), ("keyframe", COUNT)):
        made = facts[kind]
        assert (made["false_success"]["n"], made["false_success"]["rate"], made["precision"]["rate"]) == (count, 1, 0)
        assert made["imagined"]["rate"] == 1.0 and made["true"]["rate"] == 0.0 and made["fp"] == count
    # Ten starts in batches of four; the last one is filled up. None comes twice.
    steps = np.concatenate([start.step_B for start in begun])[: 2 * COUNT]
    anchors = [bytes(np.asarray(row)) for start in begun for row in start.memory_BMHWC][: 2 * COUNT]
    assert len(begun) == 3 and len(set(anchors)) == 2 * COUNT
    assert not steps[:COUNT].any() and steps[COUNT:].all()
    # From its reset to its end every episode is stepped once, whoever chose the actions.
    assert facts["true_steps"] == 2 * COUNT * CFG.horizon and facts["imagined_frames"] == 4 * COUNT * CFG.horizon
    assert facts["all"]["forced_false_success"]["rate"] == 0.0, "the world that is shown the truth sees none"


def test_success_after_the_end_of_the_episode_counts_in_neither_world(
    table: Starts, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def play(start: Start) -> tuple[np.ndarray, np.ndarray]:
        # The last step of a rollout lies within the episode only where that began at its reset.
        last_S = np.float32(np.arange(CFG.horizon) == CFG.horizon - 1)
        return np.broadcast_to(last_S, (BATCH, CFG.horizon)), rest(start)

    facts, _ = close(tmp_path / "run", table, play, monkeypatch)
    assert facts["episode_start"]["imagined"]["rate"] == 1.0 and facts["keyframe"]["imagined"]["rate"] == 0.0
    assert facts["keyframe"]["precision"] is None


def test_the_truth_is_that_of_the_actions_chosen_in_imagination(
    table: Starts, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever goes on in imagination as the episode went on in truth gets what the episode got."""
    episodes = list(
        embedded.play_demonstrations(range(EPISODES), jax.random.key(0), ExpertConfig(), CFG, batch=EPISODES)
    )
    row_of = {bytes(np.asarray(table.memory_KMHWC[row])): row for row in range(len(table))}
    rows: list[int] = []

    def play(start: Start) -> tuple[np.ndarray, np.ndarray]:
        pixels = np.round((np.asarray(start.memory_BMHWC) + 1) * 127.5).astype(np.uint8)
        mine, action_BSA = [row_of[bytes(frames)] for frames in pixels], rest(start).copy()
        for b, row in enumerate(mine):
            step = int(table.step_K[row])
            action_BSA[b, : CFG.horizon - step] = episodes[table.episode_K[row]].action_SA[step:]
        rows.extend(mine)
        return np.zeros((BATCH, CFG.horizon), np.float32), action_BSA

    facts, _ = close(tmp_path / "run", table, play, monkeypatch)
    won = [bool(episodes[table.episode_K[row]].success_S[table.step_K[row] + 1 :].any()) for row in rows[: 2 * COUNT]]
    assert 0 < sum(won) < len(won), "some of both, or nothing is tested"
    counts = {count: facts["all"][count] for count in ("tp", "fp", "fn", "tn")}
    assert counts == {"tp": 0, "fp": 0, "fn": sum(won), "tn": len(won) - sum(won)}


def test_each_chunk_is_imagined_again_from_the_true_frames_before_it(
    table: Starts, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the world is shown is what the simulator drew: memory, actions and step, chunk by chunk and row by row."""
    seen: list[Start] = []
    chunks, rng = CFG.horizon // 8, np.random.default_rng(0)
    chosen: list[np.ndarray] = []

    def rows(batch: int) -> np.ndarray:
        return np.resize(np.arange(min(BATCH, 2 * COUNT - BATCH * batch)), BATCH)

    def play(start: Start) -> tuple[np.ndarray, np.ndarray]:
        chosen.append(rng.uniform(-1, 1, (BATCH, CFG.horizon, 7)).astype(np.float32))
        return np.ones((BATCH, CFG.horizon), np.float32), chosen[-1]

    def force(start: Start, action_BNTA: Array) -> np.ndarray:
        seen.append(start)
        # The last frame of every second chunk is paid; rows are told apart by their actions.
        at, batch = divmod(len(seen) - 1, 3)
        np.testing.assert_array_equal(action_BNTA[:, 0], chosen[batch][rows(batch), 8 * at : 8 * at + 8])
        return np.float32(np.arange(8) == 7) * np.ones((BATCH, 1), np.float32) * (at == 1)

    facts, begun = close(tmp_path / "run", table, play, monkeypatch, force)
    assert len(seen) == 3 * chunks and len(begun) == 3
    true = embedded.Embedded(CFG, ExpertConfig(), seed=0, batch=BATCH, memory=4, prompt_KL=PROMPT_KL)
    row_of = {bytes(to_uint8(starts.gather(table, np.array([row]), PROMPT_KL).memory_BMHWC)): row for row in range(36)}
    for batch, (start, action_BSA) in enumerate(zip(begun, chosen, strict=True)):
        row_B = np.array([row_of[bytes(to_uint8(one)[None])] for one in start.memory_BMHWC])
        frame_BSHWC = true.follow(table, row_B, action_BSA, film=True)[1]
        assert frame_BSHWC is not None
        row_B = rows(batch)
        for at in range(chunks):
            shown = seen[3 * at + batch]
            np.testing.assert_array_equal(shown.step_B, np.asarray(start.step_B)[row_B] + 8 * at)
            np.testing.assert_array_equal(shown.anchor_BHWC, start.anchor_BHWC[row_B])
            if at:
                last = slice(8 * at - 4, 8 * at)
                np.testing.assert_array_equal(to_uint8(shown.memory_BMHWC), frame_BSHWC[row_B, last])
                np.testing.assert_array_equal(shown.action_BMA, action_BSA[row_B, last])
    # Step 15 lies within the episode from a reset, and from some keyframes not; none of these actions succeeds.
    left_K = CFG.horizon - np.concatenate([np.asarray(start.step_B) for start in begun])[: 2 * COUNT]
    forced, paid = facts["all"]["forced_false_success"], facts["all"]["false_success"]
    assert forced["n"] == paid["n"] == 2 * COUNT - facts["all"]["tp"] - facts["all"]["fn"]
    assert facts["all"]["true"]["rate"] == 0.0 and forced["rate"] == np.mean(left_K > 15) < 1.0 == paid["rate"]


def test_a_run_without_keyframes_begins_at_resets_alone(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    episodes = list(embedded.play_demonstrations(range(3), jax.random.key(0), ExpertConfig(), CFG, batch=4))

    def play(start: Start) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((BATCH, CFG.horizon), np.float32), rest(start)

    facts, _ = close(tmp_path / "run", starts.initial(episodes), play, monkeypatch)
    assert facts["keyframe"] is None and facts["all"]["tn"] == 3, "fewer than asked for, where there are fewer"


def test_a_closed_loop_says_what_was_paid_by_kind_of_start() -> None:
    imagined, true, forced = [1, 1, 1, 0, 1, 1, 0, 0], [1, 1, 0, 1, 0, 0, 0, 0], [1, 1, 0, 1, 1, 0, 0, 0]
    made = closed_loop.summarize_closed_loop(imagined, true, forced, np.arange(8) >= 4)
    assert [made[kind]["forced_false_success"]["rate"] for kind in made] == [0.2, 0.0, 0.25]
    counts = {kind: [made[kind][count] for count in ("tp", "fp", "fn", "tn")] for kind in made}
    assert counts == {"all": [2, 3, 1, 2], "episode_start": [2, 1, 1, 0], "keyframe": [0, 2, 0, 2]}
    false, precision = made["all"]["false_success"], made["all"]["precision"]
    assert (false["n"], false["rate"], precision["n"], precision["rate"]) == (5, 0.6, 5, 0.4)
    assert (false["low"], false["high"]) == stats.wilson(3, 5)
    assert made["keyframe"]["true"]["rate"] == 0.0 and made["keyframe"]["imagined"]["rate"] == 0.5
    # Nothing fails, nothing is paid, nothing begins at a keyframe: no number is made up.
    won = closed_loop.summarize_closed_loop([1, 0], [1, 1], [1, 1], np.zeros(2, bool))
    assert won["all"]["false_success"] is None and won["all"]["forced_false_success"] is None
    assert won["keyframe"] is None
    assert closed_loop.summarize_closed_loop([0], [0], [0], np.zeros(1, bool))["all"]["precision"] is None
