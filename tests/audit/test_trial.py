"""One policy in truth and in every learned world: who begins where, who is judged by what, and what is counted."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from tests.audit.rollouts import rollout
from wovr_jax.audit import horizon, trial
from wovr_jax.core import keys
from wovr_jax.policy.actions import Codec
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.run.bind import improvement
from wovr_jax.run.folder import Product, Run
from wovr_jax.run.recipe import Recipe
from wovr_jax.run.stages.reward import Judge
from wovr_jax.sim.arena import Actor
from wovr_jax.sim.tabletop.table import TabletopConfig
from wovr_jax.sim.witness import Played
from wovr_jax.types import Array, Imagined, Params, Start
from wovr_jax.world.model import WorldConfig

BATCH, COUNT = 4, 6
TRUE = [1, 0, 0, 1, 1, 0]
"""True success of six layouts; a seventh and eighth row, which fill the last batch up, succeed."""


def start(low: int) -> Start:
    none = {field.name: None for field in dataclasses.fields(Start)}
    # Layouts are told apart by their first pixel.
    anchor_BHWC = np.arange(low, low + BATCH, dtype=np.float32).reshape(BATCH, 1, 1, 1) / 10
    return Start(**none | {"anchor_BHWC": anchor_BHWC, "step_B": np.arange(low, low + BATCH)})


class Table:
    """An arena whose two batches are known."""

    steps, hold = 16, 2

    def __init__(self) -> None:
        self.actors: list[Actor] = []

    def play(self, count: int, actor: Actor) -> Iterator[Played]:
        self.actors.append(actor)
        for low in range(0, count, BATCH):
            won = [*map(bool, TRUE[low : low + BATCH]), True, True][:BATCH]
            yield Played(start(low), rollout([0.0] * BATCH, won), min(BATCH, count - low))


def act(temperature: float) -> Actor:
    return Actor(None, lambda: {"temperature": temperature}, jax.random.key(0), temperature)


def give(*values: Any) -> list[Product]:
    return [Product(lambda value=value: value) for value in values]


def test_every_world_begins_where_the_truth_does_and_has_its_own_judge(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, int, list[int], tuple]] = []

    def roll_in_world(cfg: Any, codec: Codec, world: WorldConfig) -> Any:
        assert cfg.dream.chunks == 2, "as long as a true episode of sixteen steps in chunks of eight"

        def roll(policy: Params, params: Params, reward: Params, start: Start, key: Array) -> Imagined:
            assert policy["temperature"] == cfg.temperature and params["world"] == reward["world"]
            layout_B = np.asarray(start.step_B)
            data = tuple(np.asarray(jax.random.key_data(key)).tolist())
            seen.append((cfg.temperature, params["world"], layout_B.tolist(), data))
            # The higher the number of the layout, the likelier a success.
            return rollout((layout_B / 10).tolist(), [False] * BATCH)

        return roll

    monkeypatch.setattr(trial, "roll_in_world", roll_in_world)
    recipe = Recipe(
        policy=VLAConfig.fake(),
        world=WorldConfig.fake(),
        reward=RewardConfig.fake(),
        sim=TabletopConfig.fake(),
        temperature=1.3,
    )
    arena, worlds = Table(), give({"world": 0}, {"world": 1})
    judges = give(Judge({"world": 0}, 0.15), Judge({"world": 1}, 0.35))
    vae = Product(lambda: (WorldConfig.fake(), {}))
    run, key = Run(tmp_path / "run", {}), lambda *names: keys.key(0, *names)
    learned = (improvement(recipe), Codec, vae, worlds, judges, key)
    facts = trial.try_policy(run, "base", arena, COUNT, act, *learned).facts
    levels = facts["levels"]
    assert [level["temperature"] for level in levels] == [1.3, 0.0] == [actor.temperature for actor in arena.actors]
    for level in levels:
        assert level["true"] == TRUE and level["imagined"] == [[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]]
    assert (facts["episodes"], facts["true_steps"], facts["imagined_frames"]) == (12, 12 * 16 * 2, 12 * 2 * 16)
    # Either temperature, either world, either batch; the noise is the world's and the batch's, and nobody else's.
    assert [(t, w, rows[0]) for t, w, rows, _ in seen] == [
        (t, w, low) for t in (1.3, 0.0) for w in (0, 1) for low in (0, 4)
    ]
    noise = {(w, rows[0]): key for _, w, rows, key in seen}
    assert len(set(noise.values())) == 4
    trial.try_policy(run, "other", Table(), COUNT, act, *learned)
    assert all(noise[w, rows[0]] == key for _, w, rows, key in seen)


def test_recorded_actions_are_followed_and_what_fills_the_last_batch_up_is_not_counted(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    videos = rng.uniform(-1, 1, (8, 2, 2, 12, 12, 3)).astype(np.float32)
    first = rng.uniform(-1, 1, (8, 12, 12, 3)).astype(np.float32)

    class Filmed(Table):
        steps = 4

        def play(self, count: int, actor: Actor) -> Iterator[Played]:
            for low in range(0, count, BATCH):
                rows = slice(low, low + BATCH)
                begun = dataclasses.replace(start(low), anchor_BHWC=first[rows])
                played = rollout([0.0] * BATCH, [False] * BATCH).replace(video_BNTHWC=videos[rows])
                yield Played(begun, played, min(BATCH, count - low))

    def replay(cfg: WorldConfig) -> Any:
        def play(params: Params, reward: None, start: Start, action_BNTA: Array, key: Array) -> Imagined:
            low = int(start.step_B[0])
            seen = videos[low : low + BATCH].copy()
            # Rows 1, 6 and 7 are seen upside down in their second chunk; the last two were not asked for.
            astray_B = np.isin(np.arange(low, low + BATCH), (1, 6, 7))
            seen[astray_B, 1] *= -1
            return rollout([0.0] * BATCH, [False] * BATCH).replace(video_BNTHWC=jax.numpy.asarray(seen))

        return play

    def measure(cfg: WorldConfig, vae: Params, first: Array, true: Array, seen: Array) -> dict[str, np.ndarray]:
        assert len(first) == len(true) == len(seen)
        return {"latent": np.array([len(first), 0.0]), "vae": np.array([0.01, 0.04])}

    monkeypatch.setattr(horizon.programs, "replay", replay)
    monkeypatch.setattr(horizon, "_measure_latents", measure)
    vae = Product(lambda: (SimpleNamespace(chunk=2), {}))
    how = (Filmed(), COUNT, act(1.3), vae, Product(dict), lambda *names: keys.key(0, *names))
    facts = horizon.measure_horizon(Run(tmp_path / "run", {}), 1, *how).facts
    assert (facts["rollouts"], facts["first"], facts["never"]) == (6, [0, 1], 5)
    assert facts["psnr"][0] > 100 and facts["horizon"] == 1
    # Four rows and two of the second batch: the mean weighs them so.
    assert facts["latent"] == pytest.approx([(4 * 4 + 2 * 2) / 6, 0.0])
    assert facts["psnr_vae"] == pytest.approx([10 * np.log10(400), 20.0])
    assert (facts["episodes"], facts["true_steps"], facts["imagined_frames"]) == (6, 48, 24)
