"""The example of RL in PyTorch through the server: its parts, and all of it in a process that holds no jax."""

from __future__ import annotations

import importlib.util
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from data_prep import to_lerobot
from tests.play.test_server import Served
from wovr_jax.data import episodes as disk
from wovr_jax.export.world_env import WorldEnv
from wovr_jax.play.programs import Programs

torch = pytest.importorskip("torch")

ROOT = pathlib.Path(__file__).parents[2]
FILE = ROOT / "notebooks" / "torch_world_rl.py"
ROWS = 16


@pytest.fixture(scope="module")
def rl() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("torch_world_rl", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["torch_world_rl"] = module  # dataclasses look there
    torch.set_num_threads(1)  # two take longer at this size
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def served(programs: Programs):
    with Served(programs, rows=ROWS) as running:
        yield running


@pytest.fixture
def world(served: Served):
    with WorldEnv(f"ws://127.0.0.1:{served.port}/world") as env:
        yield env


@pytest.fixture(scope="module")
def table(run: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("lerobot") / "table"
    to_lerobot.write(disk.EpisodeSource(run / "stages" / "demonstrations" / "episodes"), out, robot="table")
    return out


def make_policy(rl: types.ModuleType, env: WorldEnv) -> torch.nn.Module:
    torch.manual_seed(0)
    return rl.Policy(env.observation_shape, env.action_shape, len(env.instructions))


def test_demonstrations_are_the_runs(rl, world: WorldEnv, table: pathlib.Path, run: pathlib.Path) -> None:
    frame, task, token = rl.read_demonstrations(table, world)
    episodes = disk.read(run / "stages" / "demonstrations" / "episodes")
    steps = [len(episode.action_SA) for episode in episodes]
    assert len(frame) == len(task) == len(token) == sum(steps) and token.shape[1:] == (8, 7)
    by_first = {episode.frame_SHWC[0].tobytes(): episode for episode in episodes}
    for low in np.cumsum([0, *steps[:-1]]):
        episode = by_first[frame[low].numpy().tobytes()]
        assert world.instructions[task[low]] == episode.instruction
        np.testing.assert_allclose(rl.to_action(token[low]), episode.label_SA[:8], atol=1 / 16 + 1e-6)
        last = low + len(episode.action_SA) - 1
        np.testing.assert_array_equal(token[last], rl.to_token(np.tile(episode.label_SA[-1], (8, 1))))


def test_imitation_teaches(rl, world: WorldEnv, table: pathlib.Path) -> None:
    policy, (frame, task, token) = make_policy(rl, world), rl.read_demonstrations(table, world)
    before = policy(frame, task).log_prob(token).mean().item()
    rl.imitate(policy, (frame, task, token), 30)
    assert policy(frame, task).log_prob(token).mean().item() > before + 0.5


def test_a_rollout_counts_up_to_its_end(rl, world: WorldEnv) -> None:
    world.threshold = 2.0
    rolled = rl.roll(make_policy(rl, world), world, np.arange(ROWS))
    world.reset(options={"rows": np.arange(ROWS)})
    late = world._step_N > 8
    assert late.any() and not late.all()
    assert rolled.live[0].all() and rolled.live[1].tolist() == [not one for one in world._step_N >= 8]
    assert rolled.token.shape == (2, ROWS, 8, 7) and (rolled.logp < 0).all() and not rolled.reward.any()


def test_an_update_moves_probability_to_what_was_paid(rl, world: WorldEnv) -> None:
    policy, rows = make_policy(rl, world), np.repeat([0, 1], ROWS // 2)
    world.threshold = 2.0
    rolled = rl.join([rl.roll(policy, world, rows)])
    rolled.reward = torch.tensor([1.0, 0.0] * 4 + [1.0] * 8)  # the second group teaches nothing

    def gain() -> torch.Tensor:
        drawn = zip(rolled.frame, rolled.token)
        logp = torch.stack([policy(seen, rolled.task).log_prob(token) for seen, token in drawn])
        return ((logp - rolled.logp).sum((2, 3)) * rolled.live).sum(0)[:8].detach()

    rl.update(policy, torch.optim.Adam(policy.parameters(), lr=1e-3), rolled, ROWS // 2)
    assert gain()[0::2].mean() > 0 > gain()[1::2].mean()
    still = {name: value.clone() for name, value in policy.state_dict().items()}
    rolled.reward[:] = 1.0
    assert rl.update(policy, torch.optim.Adam(policy.parameters(), lr=1e-3), rolled, ROWS // 2) == 0.0
    assert all((value == still[name]).all() for name, value in policy.state_dict().items())


@pytest.mark.slow
def test_the_judge_pays_more_after_it(rl, world: WorldEnv) -> None:
    """In a learned world of random weights the judge's best third is made the goal, and is then reached more often."""
    policy, best = make_policy(rl, world), []
    world.starts = 1  # what differs between rollouts is then the actions and the noise
    for seed in range(12):
        world.reset(seed=seed)
        drawn = [rl.to_action(torch.randint(rl.BINS, (ROWS, 8, 7))) for _ in range(2)]
        best.append(np.max([world.step(actions)[4]["prob"].max(1) for actions in drawn], axis=0))
    world.threshold = float(np.quantile(np.concatenate(best), 0.7))
    paid = rl.improve(policy, world, updates=30, rollouts=4 * ROWS, group=ROWS, lr=5e-3, seed=0)
    assert np.mean(paid[-8:]) > np.mean(paid[:8]) + 0.08, paid


@pytest.mark.slow
def test_the_program_as_it_is_run(served: Served, table: pathlib.Path) -> None:
    arguments = ["--imitate=8", "--updates=2", "--rollouts=32", "--episodes=8"]
    arguments += ["--url", f"ws://127.0.0.1:{served.port}"]
    words = f"import runpy, sys; sys.argv = {[str(FILE), str(table), *arguments]!r}\n"
    words += f"runpy.run_path({str(FILE)!r}, run_name='__main__')\n"
    words += "assert not {'jax', 'flax', 'grain'} & set(sys.modules), 'jax came along'"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert [line.split(":")[0] for line in said if line.startswith(("update", "before", "after"))] == [
        *["before"] * 2, "update 1/2", "update 2/2", *["after"] * 2
    ]  # fmt: skip
    assert sum("of 8" in line for line in said) == 4
    command = [sys.executable, str(FILE), str(table.parent), *arguments]
    wrong = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert wrong.returncode == 1 and "expected a LeRobot data set" in wrong.stderr and "Traceback" not in wrong.stderr
