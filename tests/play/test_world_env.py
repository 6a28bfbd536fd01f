"""The learned world as a vector environment: a row is a session, and the client keeps Gymnasium's manners."""

from __future__ import annotations

import ast
import pathlib
import sys

import numpy as np
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from tests.play.small import EPISODES, SIM, THRESHOLD
from tests.play.test_server import Served
from wovr_jax.export import wire, world_env
from wovr_jax.export.world_env import WorldEnv, WorldEnvError
from wovr_jax.play.programs import Programs
from wovr_jax.play.session import Session

ROWS = 3


@pytest.fixture(scope="module")
def served(programs: Programs):
    with Served(programs, rows=ROWS) as running:
        yield running


@pytest.fixture
def env(served: Served):
    with WorldEnv(f"ws://127.0.0.1:{served.port}/world") as env:
        yield env


def draw_actions(chunks: int) -> np.ndarray:
    action_NBTA = np.random.default_rng(1).uniform(-1, 1, (chunks, ROWS, 8, 7)).astype(np.float32)
    action_NBTA[..., 6] = np.where(action_NBTA[..., 6] > 0, 1, -1)
    return action_NBTA


def never(env: WorldEnv) -> None:
    """Lets no frame count as a success, so that only time ends an episode."""
    env.threshold = 2.0


def test_a_row_is_what_a_player_sees(env: WorldEnv, programs: Programs) -> None:
    assert (env.num_envs, env.action_shape, env.observation_shape) == (ROWS, (8, 7), (16, 16, 3))
    assert env.threshold == THRESHOLD and env.instructions == programs.source.instructions
    never(env)
    observation, info = env.reset(seed=3, options={"rows": [0, 1, 2]})
    rng = np.random.default_rng(3)
    rng.integers(len(programs.source.starts), size=ROWS)
    noise_N = rng.integers(2**31 - 1, size=ROWS)
    action_NBTA = draw_actions(2)
    steps = [env.step(action_BTA) for action_BTA in action_NBTA]
    for row in range(ROWS):
        session = Session(programs)
        begun = session.begin(row, 0, int(noise_N[row]))
        np.testing.assert_array_equal(observation[row], begun.imagined_HWC)
        assert info["instruction"][row] == begun.instruction
        for n in range(2):
            chunk = session.step(action_NBTA[n, row])
            seen, frame, prob = steps[n][0][row], steps[n][4]["frame"][row], steps[n][4]["prob"][row]
            # A program of another batch may round differently.
            np.testing.assert_allclose(frame.astype(int), chunk.imagined_THWC.astype(int), atol=1)
            np.testing.assert_allclose(prob, chunk.prob_T, atol=1e-4)
            np.testing.assert_array_equal(seen, frame[-1])


def test_an_episode_ends_in_time_and_begins_again(env: WorldEnv) -> None:
    never(env)
    env.reset(seed=0, options={"rows": [0, 1, EPISODES]})
    # Two chunks are an episode; from a keyframe less is left.
    keyframe_step = int(env._step_N[2])
    assert SIM.horizon == 16 and keyframe_step > 0
    ends = [env.step(action_BTA)[3].tolist() for action_BTA in draw_actions(3)]
    short = keyframe_step >= 8
    assert [row[:2] for row in ends] == [[False, False], [True, True], [False, False]]
    assert [row[2] for row in ends][:2] == ([True, False] if short else [False, True])


def test_a_row_that_ended_begins_again_and_the_others_go_on(env: WorldEnv, programs: Programs) -> None:
    never(env)
    env.reset(seed=0, options={"rows": [0, 1, 2]})
    first, second = draw_actions(2)
    env.step(first)
    env._ended_N[1] = True
    observation, reward, terminated, _, info = env.step(second)
    table = programs.source.starts
    assert observation[1].tolist() in np.asarray(table.memory_KMHWC)[:, -1].tolist()
    assert reward[1] == 0 and not terminated[1] and len(info["instruction"]) == ROWS
    np.testing.assert_array_equal(observation[[0, 2]], info["frame"][[0, 2], -1])
    assert env._step_N[0] == 16 and env._step_N[1] < 16


def test_a_success_is_paid_once(env: WorldEnv) -> None:
    env.threshold = -1.0  # every frame is one
    env.reset(seed=0)
    first, second = draw_actions(2)
    _, reward, terminated, truncated, _ = env.step(first)
    assert reward.tolist() == [1.0] * ROWS and terminated.all() and not truncated.any()
    _, reward, terminated, truncated, _ = env.step(second)
    assert reward.tolist() == [0.0] * ROWS and not terminated.any() and not truncated.any()


def test_what_does_not_fit_is_said(env: WorldEnv) -> None:
    with pytest.raises(WorldEnvError, match="no rollout has begun; reset first"):
        env._ask({"do": "step", "action": draw_actions(1)[0]})
    with pytest.raises(WorldEnvError, match=r"'action': expected float32 \[3, 8, 7\], got float32 \[8, 7\]"):
        env.step(draw_actions(1)[0, 0])
    with pytest.raises(WorldEnvError, match="'row': expected 0 to 17"):
        env.reset(options={"rows": [0, 0, 99]})
    with pytest.raises(WorldEnvError, match="every row that has not begun yet"):
        zeros = np.zeros(ROWS, np.int32)
        env._ask({"do": "reset", "where": np.zeros(ROWS, bool), "row": zeros, "noise": zeros})
    with pytest.raises(WorldEnvError, match="expected a map with 'do', reset or step"):
        env._ask({"do": "film"})
    env.reset(seed=0)
    assert env.step(draw_actions(1)[0])[0].shape == (ROWS, 16, 16, 3)


def test_pages_may_not_take_the_path_of_programs(served: Served, programs: Programs) -> None:
    address = f"ws://127.0.0.1:{served.port}/world"
    with pytest.raises(InvalidStatus, match="403"), connect(address, origin=f"http://127.0.0.1:{served.port}"):
        pass
    with Served(programs) as closed, pytest.raises(InvalidStatus, match="404"):
        WorldEnv(f"ws://127.0.0.1:{closed.port}/world")


def test_the_client_needs_three_packages() -> None:
    for module in (world_env, wire):
        tree = ast.parse(pathlib.Path(module.__file__).read_text())
        names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        outside = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"wovr_jax"}
        assert outside <= {"numpy", "msgpack", "websockets"}
        assert {name for name in names if name.startswith("wovr_jax")} <= {"wovr_jax.export"}
