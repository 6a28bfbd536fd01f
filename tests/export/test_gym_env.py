"""The learned world as Gymnasium's vector environment: Gymnasium's own checks and wrappers, as they come."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.utils import env_checker, performance
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import DictInfoToList, RecordEpisodeStatistics

from tests.play.small import SIM, make_run
from tests.play.test_server import Served
from wovr_jax.export.gym_env import GymWorldEnv
from wovr_jax.play.programs import Programs
from wovr_jax.play.source import open_run

ROWS = 3
CHUNKS = SIM.horizon // 8


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return Programs(open_run(make_run(tmp_path_factory.mktemp("runs") / "small")))


@pytest.fixture(scope="module", params=["world", "truth"])
def env(request, programs: Programs):
    with Served(programs, rows=ROWS) as running:
        env = GymWorldEnv(f"ws://127.0.0.1:{running.port}/{request.param}")
        yield env
        env.close()
        assert env.closed


@pytest.mark.parametrize(
    "check",
    [
        env_checker.check_reset_seed_determinism,
        env_checker.check_reset_options,
        env_checker.check_reset_return_type,
        env_checker.check_reset_return_info_deprecation,
        env_checker.check_seed_deprecation,
    ],
    ids=lambda check: check.__name__,
)
def test_gymnasiums_checks_that_take_a_vector(env: GymWorldEnv, check) -> None:
    check(env)


class OneRow(gymnasium.Env):
    """The first row of a vector environment, for the checks that know single environments only."""

    def __init__(self, env: GymWorldEnv):
        self.env = env
        self.observation_space, self.action_space = env.single_observation_space, env.single_action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        rows = self.np_random.integers(self.env.world.starts, size=ROWS)
        observation, info = self.env.reset(seed=seed, options={"rows": rows})
        return self._first(observation), self._first(info)

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(np.stack([action] * ROWS))
        return self._first(observation), float(reward[0]), bool(terminated[0]), bool(truncated[0]), self._first(info)

    @staticmethod
    def _first(batch):
        return {name: column[0] for name, column in batch.items()}


def test_gymnasiums_whole_check_on_a_row(env: GymWorldEnv, monkeypatch) -> None:
    """Determinism of a step, nothing handed out twice, types and ranges of every value, spaces."""
    # A row that begins late in an episode is truncated after one chunk, and a check wants a second one.
    initials = env.world.starts if env.world.world == "truth" else 6
    monkeypatch.setattr(env.world, "starts", initials)
    monkeypatch.setattr(env.world, "threshold", 2.0)
    env_checker.check_env(OneRow(env), skip_render_check=True)


def test_what_is_returned_lies_in_the_spaces(env: GymWorldEnv) -> None:
    assert env.action_space.shape == (ROWS, 8, 7) and env.num_envs == ROWS
    env.action_space.seed(0)
    observation, info = env.reset(seed=0)
    for _ in range(2 * CHUNKS + 2):
        assert observation in env.observation_space
        assert [env.instructions[task] for task in observation["task"]] == info["instruction"].tolist()
        observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
        assert reward.dtype == np.float32 and {reward.shape, terminated.shape, truncated.shape} == {(ROWS,)}
        assert terminated.dtype == truncated.dtype == bool and not (terminated & truncated).any()


def test_gymnasiums_wrappers_count_episodes(env: GymWorldEnv, monkeypatch) -> None:
    """Returns and lengths in RecordEpisodeStatistics: it goes by the manner of beginning again that we declare."""
    assert env.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    monkeypatch.setattr(env.world, "threshold", 2.0)  # only time ends an episode
    counted = RecordEpisodeStatistics(env)
    env.action_space.seed(0)
    counted.reset(seed=0, options={"rows": [0, 1, 2]})
    ends = []
    for _ in range(2 * CHUNKS + 1):
        *_, truncated, info = counted.step(env.action_space.sample())
        if "episode" in info:
            ends.append((info["_episode"].tolist(), truncated.tolist()))
            assert (info["episode"]["l"][truncated] <= CHUNKS).all() and (info["episode"]["r"] == 0).all()
    assert ends and all(said == was for said, was in ends) and ends[0] == ([True] * ROWS, [True] * ROWS)
    listed = DictInfoToList(env)
    _, infos = listed.reset(seed=0)
    assert [info["instruction"] for info in infos] == [env.instructions[info["task"]] for info in infos]


def test_gymnasiums_benchmark_runs(env: GymWorldEnv) -> None:
    assert performance.benchmark_vector_step(env, target_duration=1, seed=0) > 0
