"""A policy of two cameras and the robot's state, from the run to the robot: its bundle, and what the server wants."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from tests.export.robots import CFG as PLAIN
from tests.export.robots import TASKS, episode, fake_run
from wovr_jax.core import checkpoint, config, pixels
from wovr_jax.data import episodes as disk
from wovr_jax.data.records import EpisodesError
from wovr_jax.data.senses import Senses, make_senses, measure_bounds, read_senses
from wovr_jax.export import bundle, contract, observation, program, source
from wovr_jax.export.observation import ObservationError
from wovr_jax.export.robot import Robot
from wovr_jax.export.server import PolicyServer, ServerConfig, metadata
from wovr_jax.policy import vla

CFG = dataclasses.replace(PLAIN, images=2, proprio=3)
BOUNDS = {"q01": [0.1, -2.0, 0.0], "q99": [0.5, 2.0, 0.08]}
SENSES = Senses(2, 3, 16, (0.1, -2.0, 0.0), (0.5, 2.0, 0.08))
SHAPE = (16, 16, 3)
MESSAGE = {
    "observation/image": np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8),
    "observation/wrist_image": np.random.default_rng(1).integers(0, 256, SHAPE, np.uint8),
    "observation/state": np.array([0.3, 1.0, 0.5]),
    "prompt": TASKS[0],
}


def recorded(i: int):
    """An episode as a robot records it."""
    one, rng = episode(i), np.random.default_rng(100 + i)
    state_SD = rng.uniform(-1, 1, (len(one.frame_SHWC), 3)).astype(np.float32)
    return dataclasses.replace(one, wrist_SHWC=one.frame_SHWC[::-1].copy(), state_SD=state_SD)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run on mosaics, as ``fake_run`` has one on pictures."""
    folder = fake_run(tmp_path_factory.mktemp("senses") / "run", rounds=0)
    (folder / "config.json").write_text(json.dumps({"policy": config.to_dict(CFG), "temperature": 1.6}))
    for stage, seeds in (("demonstrations", range(6)), ("collect-0", range(10, 14))):
        mosaics = [SENSES.compose_episode(recorded(i), "here") for i in seeds]
        disk.write(folder / "stages" / stage / "episodes", mosaics, meta={"proprio": BOUNDS}, overwrite=True)
    params = jax.device_get(vla.network(CFG).init(jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: (leaf + 0.15 * rng.standard_normal(leaf.shape)).astype(np.float32), params)
    shutil.rmtree(folder / "stages" / "sft" / "policy")
    checkpoint.save(folder / "stages" / "sft" / "policy", params)
    return folder


@pytest.fixture(scope="module")
def policy(run: pathlib.Path) -> source.Policy:
    return source.from_run(run)


@pytest.fixture(scope="module")
def robot(policy: source.Policy, tmp_path_factory: pytest.TempPathFactory) -> Robot:
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    # Written only if it acts on recorded mosaics as the policy does.
    bundle.write(policy, folder, frames=6)
    return Robot.load(folder)


def test_a_run_says_what_its_policy_senses(policy: source.Policy, robot: Robot) -> None:
    assert policy.senses == SENSES and policy.frame == (16, 48, 3)
    assert read_senses(robot.recipe) == SENSES, "through JSON and back"
    assert robot.frame_shape == (16, 48, 3) and robot.camera_shape == SHAPE
    assert program.make_robot(policy).camera_shape == SHAPE


def test_the_policy_uses_every_sense(robot: Robot) -> None:
    """Otherwise nothing here would notice one that is lost on the way."""

    def act(**change: np.ndarray) -> np.ndarray:
        seen = observation.read(MESSAGE | change, SHAPE, SENSES).frame_HWC
        return robot.act(seen[None], [TASKS[0]]).logp_BTA

    here = act()
    for name, other in (
        ("observation/image", 255 - MESSAGE["observation/image"]),
        ("observation/wrist_image", 255 - MESSAGE["observation/wrist_image"]),
        ("observation/state", np.array([0.15, -1.0, 0.0])),
    ):
        assert np.abs(act(**{name: other}) - here).max() > 1e-4, name


def test_the_network_sees_of_a_mosaic_what_it_sees_of_the_parts(policy: source.Policy) -> None:
    """Three ways to one answer: the bundle's, the loop's (a float mosaic), and OpenVLA-OFT's (pictures, state)."""
    seen = observation.read(MESSAGE, SHAPE, SENSES).frame_HWC[None]
    net, params = vla.network(CFG), checkpoint.load(policy.recorded.parents[1] / "sft" / "policy")
    prompt = policy.tokens(TASKS[0])[None]
    want = net(params, pixels.to_float(seen), prompt)
    views = np.stack([MESSAGE["observation/image"], MESSAGE["observation/wrist_image"]])[None]
    state = SENSES.scale(MESSAGE["observation/state"])[None]
    np.testing.assert_allclose(net(params, pixels.to_float(views), prompt, state), want, atol=0.02)
    pictures, shown = program.look(CFG, policy.image, seen)
    np.testing.assert_allclose(net(params, pictures, prompt, shown), want, atol=1e-4)


def test_the_server_joins_what_a_client_sends(robot: Robot) -> None:
    server = PolicyServer(robot, ServerConfig(port=0))
    reply = server._act(MESSAGE, None)
    mosaic = SENSES.compose(*(MESSAGE[f"observation/{name}"] for name in ("image", "wrist_image", "state")))
    want = robot.act(mosaic[None], [TASKS[0]], seeds=[0])
    np.testing.assert_array_equal(reply["actions"], want.action_BTA[0])
    said = metadata(robot, 0.0)["observation"]
    assert "'observation/wrist_image' (as large), 'observation/state' (3 numbers) and 'prompt'" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"observation/wrist_image": None}, "no 'observation/wrist_image' in the observation; expected"),
        ({"observation/wrist_image": np.zeros((8, 8, 3), np.uint8)}, r"wrist_image': expected uint8 \[16, 16, 3\]"),
        ({"observation/state": None}, "no 'observation/state' in the observation"),
        ({"observation/state": np.zeros(8)}, r"state': expected 3 finite numbers, got float64 \[8\]"),
        ({"observation/state": [0.0, float("nan"), 0.0]}, "state': expected 3 finite numbers"),
        ({"observation/state": "here"}, "expected 3 finite numbers, got str of length 4"),
    ],
)
def test_a_sense_that_is_missing_or_other_is_refused(change: dict[str, object], said: str) -> None:
    message = {name: value for name, value in (MESSAGE | change).items() if value is not None}
    with pytest.raises(ObservationError, match=said):
        observation.read(message, SHAPE, SENSES)


def test_frames_to_replay_may_be_recordings_or_mosaics(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    disk.write(tmp_path / "raw", [recorded(i) for i in range(10, 14)])
    raw, made = (
        contract.choose_frames(folder, 4, 8, SENSES) for folder in (tmp_path / "raw", run / "stages/collect-0/episodes")
    )
    np.testing.assert_array_equal(raw.frame_KHWC, made.frame_KHWC)
    disk.write(tmp_path / "plain", [episode(0)])
    with pytest.raises(EpisodesError, match=r"2 cameras and a state of 3 numbers; wrist, state is missing"):
        contract.choose_frames(tmp_path / "plain", 1, 8, SENSES)


def test_bounds_are_quantiles_and_what_is_beyond_is_cut_off() -> None:
    states = [np.linspace(0, 1, 101)[:, None] * np.array([1.0, 10.0]), np.full((1, 2), 0.5)]
    bounds = measure_bounds([state.astype(np.float32) for state in states])
    np.testing.assert_allclose(bounds["q99"], np.quantile(np.concatenate(states), 0.99, axis=0), rtol=1e-6)
    senses = make_senses(1, 2, 4, bounds)
    np.testing.assert_allclose(senses.scale(np.array([[bounds["q01"][0], 99.0]])), [[-1, 1]], atol=1e-6)
    # Without bounds a state is in [-1, 1] already.
    np.testing.assert_allclose(make_senses(1, 2, 4, None).scale(np.array([0.25, -0.5])), [0.25, -0.5], atol=1e-6)
    masked = make_senses(1, 3, 4, {"q01": [-1.0, 0.0, 0.0], "q99": [3.0, 2.0, 1.0], "mask": [True, True, False]})
    got = masked.scale(np.array([[1.0, 5.0, 0.3], [3.0, 0.0, -2.0]]))
    np.testing.assert_allclose(got, [[0.0, 1.0, 0.3], [1.0, -1.0, -1.0]], atol=1e-6)
    with pytest.raises(ValueError, match="expected 3 values, as the policy takes, got bounds of 2"):
        make_senses(1, 3, 4, bounds)
    with pytest.raises(ValueError, match="expected 1 or 2 views, and bounds and a strip for a state"):
        Senses(2, 3, 0, (0.0,) * 3, (1.0,) * 3)
