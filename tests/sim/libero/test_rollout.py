"""The real simulator against LIBERO's own environment, step by step. Skips itself where LIBERO is not installed.

Everything runs in worker processes, as it does in use: the test process itself imports neither mujoco nor libero.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import signal
import typing

import numpy as np
import pytest

from wovr_jax.data import episodes as disk
from wovr_jax.sim.libero import machine, rollout, setup, worker
from wovr_jax.sim.libero.demonstrate import demonstrations
from wovr_jax.sim.libero.evaluate import trials
from wovr_jax.sim.libero.pool import Lost, Pool
from wovr_jax.sim.libero.setup import LiberoError
from wovr_jax.sim.libero.tasks import (
    DRAWN,
    SUITES,
    EvaluationProtocol,
    Flaw,
    LiberoExpertConfig,
    SceneConfig,
    Trial,
    draws_fixtures,
    protocol,
    read_init_states,
    tasks,
)

pytestmark = pytest.mark.libero

SHORT = EvaluationProtocol("short", 3, -1.0, dict.fromkeys(SUITES, 12), True)
ACTION_SA = np.random.default_rng(0).uniform(-1, 1, (12, 7))


@pytest.fixture(scope="module", autouse=True)
def needs_libero():
    try:
        setup.package_folder()
        machine.choose_renderer()
        if machine.assets_folder() is None:
            raise LiberoError("no assets")
    except LiberoError as error:
        pytest.skip(f"the real LIBERO does not run here: {error}")


def alone(function, *arguments, cfg):
    """What ``function(state, *arguments)`` returns in a worker."""
    with Pool(1, cfg) as pool:
        ((_, value),) = pool.map(function, [arguments])
    assert not isinstance(value, Lost), value.reason
    return value


# ---------------------------------------------------------------- equal to the plain environment


def ours_and_theirs(state, trial):
    """States, frames and observations of the same actions, here and in LIBERO's own environment."""
    scene = state.open_scene(trial.task)
    start, ours = scene.reset(trial, SHORT), []
    for step, action_A in enumerate(ACTION_SA):
        scene.step(action_A, draw=step in (4, len(ACTION_SA) - 1))
        pictures = {name: picture.copy() for name, picture in scene.pictures.items()}
        ours.append((scene.env.get_sim_state(), scene.state_D, pictures))
    state.close_scene()

    from libero.libero.envs import OffScreenRenderEnv
    from robosuite.utils.transform_utils import quat2axisangle

    size = state.cfg.size
    plain = OffScreenRenderEnv(bddl_file_name=str(trial.task.bddl_file), camera_heights=size, camera_widths=size)
    plain.seed(trial.seed)
    plain.reset()
    plain.set_init_state(read_init_states(trial.task.init_file)[trial.init])
    for _ in range(SHORT.settle):
        first, *_ = plain.step([0.0] * 6 + [-1.0])
    theirs = []
    for action_A in ACTION_SA:
        seen, *_ = plain.step(action_A)
        turn = quat2axisangle(seen["robot0_eef_quat"].copy())
        state_D = np.concatenate([seen["robot0_eef_pos"], turn, seen["robot0_gripper_qpos"]])
        theirs.append((plain.get_sim_state(), state_D, {name: seen[f"{name}_image"] for name in scene.pictures}))
    plain.close()
    return start, first["agentview_image"], ours, theirs


def test_states_and_frames_equal_those_of_liberos_own_environment():
    (trial,) = trials("libero_spatial", [3], only=[0], seed=5)
    start, first, ours, theirs = alone(ours_and_theirs, trial, cfg=SceneConfig(size=64))
    assert np.array_equal(start.frame_FHWC[0], first[::-1, ::-1])
    for (our_state, our_robot, _), (their_state, their_robot, _) in zip(ours, theirs, strict=True):
        assert np.array_equal(our_state, their_state)
        assert np.array_equal(our_robot, their_robot.astype(np.float32))
    for step in (4, len(ACTION_SA) - 1):
        for name, frame in ours[step][2].items():
            # A frame drawn after the step shows the hand half a millimetre further on; that one is wrong.
            assert np.array_equal(frame, theirs[step][2][name][::-1, ::-1]), (step, name)


def begun_again(state, trial, other):
    """States after a reset, after the same one again with another trial between, and with another seed."""
    scene, found = state.open_scene(trial.task), []
    for one in (trial, other, trial, dataclasses.replace(trial, seed=trial.seed + 1)):
        scene.reset(one, SHORT)
        fixtures = scene.env.sim.model.body_pos.copy()
        found.append((scene.env.get_sim_state(), fixtures))
    return found


def test_a_trial_begins_alike_whatever_came_before_it():
    trial, other = trials("libero_spatial", [1, 2], only=[0], seed=7)
    first, _, again, reseeded = alone(begun_again, trial, other, cfg=SceneConfig(size=0))
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    # The cabinet and the stove are not in the initial state: the seed places them.
    assert not np.array_equal(first[1], reseeded[1])
    # Nothing of the kind here: a second seed is the same trial again, and an evaluation must not count it twice.
    trial, other = trials("libero_object", [1, 2], only=[7], seed=7)
    first, _, _, reseeded = alone(begun_again, trial, other, cfg=SceneConfig(size=0))
    assert np.array_equal(first[0], reseeded[0]) and np.array_equal(first[1], reseeded[1])


def drawn_and_held(state, trial):
    """Where things lie in drawn layouts, and the end of two held actions beside that of four plain ones."""
    scene = state.open_scene(trial.task)
    places = []
    for seed in (*range(8), 0):
        scene.reset(dataclasses.replace(trial, init=DRAWN, seed=seed), SHORT)
        places.append(scene.env.get_sim_state())
    ends = []
    for hold, actions in ((1, np.repeat(ACTION_SA[:2], 2, axis=0)), (2, ACTION_SA[:2])):
        scene.cfg = dataclasses.replace(scene.cfg, hold=hold)
        scene.reset(trial, dataclasses.replace(SHORT, settle=0))
        seen = scene.play(actions, "none", False)
        ends.append((scene.env.get_sim_state(), seen.state_TD[-1], len(seen.state_TD)))
    return places, ends, scene.states


def test_a_drawn_layout_is_its_seeds_and_a_held_action_is_several_steps():
    (trial,) = trials("libero_object", [0], only=[7])
    (*drawn, again), (plain, held), official = alone(drawn_and_held, trial, cfg=SceneConfig(size=0))
    first = drawn[0]
    assert np.array_equal(first, again) and not np.array_equal(first, drawn[1])
    arm = slice(1, 8)  # the official states were drawn with noise in it, which LIBERO's own environment lacks
    spread, known = (np.asarray(states)[:, arm].std(0).mean() for states in (drawn, official))
    assert 0.7 * known < spread < 1.3 * known
    place = slice(1, 1 + (len(first) - 1) // 2)
    assert np.abs(first[place] - official[:, place]).max(axis=1).min() > 1e-3  # none of the official ones
    assert np.array_equal(plain[0], held[0]) and np.array_equal(plain[1], held[1])
    assert (plain[2], held[2]) == (4, 2)


# ---------------------------------------------------------------- rollouts


def wave(views):
    """A policy that depends on what it sees and on nothing else."""
    return np.stack([0.3 * np.sin(np.arange(56).reshape(8, 7) + view.state_D[0] + view.chunk) for view in views])


@pytest.fixture(scope="module")
def pool():
    with Pool(2, SceneConfig(size=64, hard_reset=False)) as made:
        yield made


def test_a_worker_killed_in_mid_episode_costs_only_that_episode(pool):
    wanted = trials("libero_spatial", [0, 1], only=[0])
    calm = {out.trial: out for out in rollout.rollouts(pool, wave, wanted, SHORT, draw="all", actor="wave")}
    struck = []

    def act(views):
        if not struck and any(view.chunk == 1 for view in views):
            struck.append(pool._slots[0].process.pid)
            os.kill(struck[0], signal.SIGKILL)
        return wave(views)

    rough = {out.trial: out for out in rollout.rollouts(pool, act, wanted, SHORT, draw="all", actor="wave")}
    assert sorted(out.tries for out in rough.values()) == [1, 2]
    (lost,) = (out for out in rough.values() if out.tries == 2)
    assert "died with exit status -9" in lost.lost[0]
    for trial, out in rough.items():
        assert np.array_equal(out.episode.action_SA, calm[trial].episode.action_SA)
        assert np.array_equal(out.episode.frame_SHWC, calm[trial].episode.frame_SHWC)


def test_recorded_episodes_are_whole(pool, tmp_path):
    (trial,) = trials("libero_object", [4], only=[2])
    (out,) = rollout.rollouts(pool, wave, [trial], SHORT, draw="all", actor="wave")
    facts = disk.write(tmp_path / "made", [out.episode])
    (episode,) = disk.read(tmp_path / "made")
    assert episode.frame_SHWC.shape == episode.wrist_SHWC.shape == (13, 64, 64, 3)
    assert episode.state_SD.shape == (13, 8) and episode.action_SA.shape == (12, 7)  # a chunk and half of one
    assert episode.instruction == "pick up the salad dressing and place it in the basket" and facts["state"] == 8
    assert episode.origin["init"] == 4 and episode.origin["suite"] == "libero_object"
    assert episode.frame_SHWC.std() > 20 and not np.array_equal(episode.frame_SHWC[0], episode.frame_SHWC[12])


def test_the_last_frame_is_the_same_alone_and_among_all(pool):
    (trial,) = trials("libero_object", [4], only=[2])
    frames = {}
    for draw in ("all", "last"):
        pool.send(0, worker.begin, trial, SHORT)
        pool.receive()
        pool.send(0, worker.play, ACTION_SA[:8], draw, False)
        frames[draw] = pool.receive()[1].frame_FHWC
    assert len(frames["all"]) == 8 and len(frames["last"]) == 1
    assert np.array_equal(frames["all"][-1], frames["last"][0])


def test_initial_states_that_are_not_there_are_refused(pool):
    with pytest.raises(LiberoError, match="has initial states 0 to 49, and 50 was asked for"):
        list(rollout.rollouts(pool, wave, trials("libero_object", [50], only=[2]), SHORT))
    with pytest.raises(LiberoError, match="has tasks 0 to 9, and 10 was asked for"):
        trials("libero_object", [0], only=[10])


def test_every_suite_has_its_tasks_and_states():
    assert [len(tasks(suite)) for suite in SUITES] == [10, 10, 10, 10, 90]
    for suite in SUITES[:4]:
        for task in tasks(suite):
            assert task.bddl_file.is_file() and len(read_init_states(task.init_file)) == 50
    assert [sum(map(draws_fixtures, tasks(suite))) for suite in SUITES] == [10, 0, 10, 5, 63]


# ---------------------------------------------------------------- the expert


@pytest.mark.parametrize("suite", ["libero_spatial", "libero_object"])
def test_the_expert_succeeds_and_each_flaw_fails(suite):
    (trial,) = trials(suite, [0], only=[2])
    with Pool(1, SceneConfig(size=0, hard_reset=False)) as pool:
        for flaw in typing.get_args(Flaw) if suite == "libero_spatial" else ("none", "early_release"):
            cfg = LiberoExpertConfig(flaw=flaw)
            (out,) = demonstrations(pool, [trial], protocol("openvla"), cfg, draw="none")
            assert out.success is (flaw == "none"), flaw
            assert out.steps < 220


def test_the_expert_refuses_what_it_cannot_do():
    opening = Trial(tasks("libero_goal")[0], 0)
    with (
        Pool(1, SceneConfig(size=0, hard_reset=False)) as pool,
        pytest.raises(LiberoError, match="puts one thing onto or into another"),
    ):
        list(demonstrations(pool, [opening], protocol("openvla"), draw="none"))


# ---------------------------------------------------------------- every task


@pytest.mark.slow
@pytest.mark.parametrize("rules", ["openvla", "rlinf"])
@pytest.mark.parametrize("suite", SUITES)
def test_every_task_of_a_suite_is_built_reset_and_played(suite: str, rules: str) -> None:
    """Two chunks of random motion and the frame after each; under rlinf's rules an episode goes on after a success."""
    brief = dataclasses.replace(protocol(rules), horizons=dict.fromkeys(SUITES, 16))
    wanted = trials(suite, [0])

    def act(views):
        return np.stack([ACTION_SA[:8]] * len(views))

    with Pool(1, SceneConfig(size=64, wrist=False, drawing="fast")) as pool:
        ends = list(rollout.rollouts(pool, act, wanted, brief, tries=1))
    assert {out.trial.task.index: out.lost for out in ends if out.lost} == {}
    assert [out.steps for out in ends] == [16] * len(wanted)


# ---------------------------------------------------------------- assets with a hole


@pytest.fixture
def settle_anew():
    setup.settle.cache_clear()
    yield
    setup.settle.cache_clear()


def test_a_mesh_that_is_missing_is_named(tmp_path, monkeypatch, settle_anew):
    """At once and with the task's name: a worker that tried again and again would fail again and again."""
    (trial, *_) = trials("libero_object", [0], only=[7])
    whole = machine.assets_folder()
    assert whole
    thing = pathlib.Path("stable_hope_objects") / "milk"
    for folder in (pathlib.Path(), thing.parent, thing):
        (tmp_path / folder).mkdir(exist_ok=True)
        for one in (whole / folder).iterdir():
            if one != whole / thing.parent and one != whole / thing and one.name != "visual":
                (tmp_path / folder / one.name).symlink_to(one)
    monkeypatch.setenv(setup.ASSETS, str(tmp_path))
    with Pool(1, SceneConfig(size=0)) as pool, pytest.raises(LiberoError, match=r"milk_and.*opening file.*milk/visual"):
        list(pool.map(worker.begin, [(trial, protocol("openvla"))]))
