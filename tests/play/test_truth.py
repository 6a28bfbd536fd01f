"""The true simulator for programs: the layouts of the evaluation, and the very outcomes that the run measures there."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from websockets.exceptions import InvalidStatus

from tests.play.small import SIM
from tests.play.test_server import Served
from wovr_jax.export.world_env import WorldEnv, WorldEnvError
from wovr_jax.play.programs import Programs
from wovr_jax.play.rollouts import TrueRollouts
from wovr_jax.play.source import PlayError
from wovr_jax.sim import embedded
from wovr_jax.sim.arena import layouts
from wovr_jax.sim.tabletop.expert import ExpertConfig

ROWS = 4


@pytest.fixture(scope="module")
def served(programs: Programs):
    with Served(programs, rows=ROWS) as running:
        yield running


@pytest.fixture
def truth(served: Served):
    with WorldEnv(f"ws://127.0.0.1:{served.port}/truth") as env:
        yield env


def test_it_begins_on_layouts_of_the_evaluation(truth: WorldEnv, programs: Programs) -> None:
    recipe = programs.source.recipe
    assert (truth.world, truth.starts, truth.steps) == ("truth", recipe.evaluate.episodes, SIM.horizon)
    observation, info = truth.reset(options={"rows": [0, 3, 1, 7]})
    state = embedded.reset_batch(jnp.asarray(layouts(recipe.seed, "evaluate", 8)[[0, 3, 1, 7]]), SIM)
    frame = np.asarray(jax.vmap(lambda one: embedded.suite_of(SIM).render(one, SIM))(state))
    np.testing.assert_allclose(observation / 127.5 - 1.0, frame, atol=0.51 / 127.5)
    assert info["task"].tolist() == embedded.suite_of(SIM).task_of(state).tolist()
    assert info["instruction"] == [programs.source.instructions[task] for task in info["task"]]


def test_what_happens_is_what_the_simulator_does(truth: WorldEnv, programs: Programs) -> None:
    """The expert's own actions, from layouts that it was not asked on: goal and frames are those of a replay."""
    seeds = layouts(programs.source.recipe.seed, "evaluate", ROWS)
    expert = ExpertConfig(flaw="none", noise=0.0, flip=0.0)
    episodes = list(embedded.play_demonstrations(seeds, jax.random.key(0), expert, SIM, batch=ROWS))
    assert any(episode.success_S.any() for episode in episodes)
    truth.reset(options={"rows": range(ROWS)})
    won, prob = np.zeros(ROWS, bool), []
    for n in range(SIM.horizon // 8):
        actions = np.stack([episode.action_SA[8 * n : 8 * n + 8] for episode in episodes])
        truth._ended_N[:] = False  # so that no row begins anew, and the whole episode is seen
        _, reward, terminated, _, info = truth.step(actions)
        won |= terminated
        assert reward.tolist() == terminated.tolist()
        prob.append(info["prob"])
        for row, episode in enumerate(episodes):
            np.testing.assert_array_equal(info["frame"][row], episode.frame_SHWC[8 * n + 1 : 8 * n + 9])
    np.testing.assert_array_equal(np.concatenate(prob, 1), [episode.success_S[1:] for episode in episodes])
    assert won.tolist() == [bool(episode.success_S.any()) for episode in episodes]


def test_a_row_begins_again_and_the_others_go_on(truth: WorldEnv) -> None:
    still = np.tile(np.float32([0, 0, 0, 0, 0, 0, -1]), (ROWS, 8, 1))
    before, _ = truth.reset(seed=0, options={"rows": [0, 1, 2, 3]})
    right = still.copy()
    right[..., 0] = 1.0
    moved, *_ = truth.step(right)
    assert (moved != before).reshape(ROWS, -1).any(axis=1).all()
    truth._ended_N[:] = [False, True, False, False]
    after, *_ = truth.step(still)
    np.testing.assert_array_equal(after[[0, 2, 3]], moved[[0, 2, 3]])
    assert (after[1] != moved[1]).any()


def test_rows_that_are_not_there(truth: WorldEnv) -> None:
    with pytest.raises(WorldEnvError, match=f"'row': expected 0 to {truth.starts - 1}"):
        truth.reset(options={"rows": [0, 0, 0, truth.starts]})


def test_a_suite_without_a_compiled_simulator(programs: Programs) -> None:
    host = dataclasses.replace(programs.source, sim=None, suite="libero_spatial")
    with pytest.raises(PlayError, match="libero_spatial has no true simulator that can be played here"):
        TrueRollouts(host, ROWS)
    with Served(Programs(host), rows=ROWS) as running:
        with WorldEnv(f"ws://127.0.0.1:{running.port}/world") as world:
            assert world.world == "world-1"
        with pytest.raises(InvalidStatus, match="404"):
            WorldEnv(f"ws://127.0.0.1:{running.port}/truth")
