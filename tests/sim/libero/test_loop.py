"""The loop on LIBERO: presets that fit the package, weights that are missed at once, and the whole of it on a fake."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import pace as presets
from tests.sim.libero.test_arena import actor, recipe, small_policy
from tests.sizes import fake_learner, fake_reward_train, fake_sft, fake_world_train
from tests.small_run import run_whole
from wovr_jax import pace
from wovr_jax.core import checkpoint
from wovr_jax.core.config import ConfigError, from_dict, to_dict
from wovr_jax.data import episodes as disk
from wovr_jax.data import starts as start_states
from wovr_jax.grpo import GRPOConfig
from wovr_jax.policy import vla
from wovr_jax.run.bind import Products, bind_stages, open_environment
from wovr_jax.run.folder import Run
from wovr_jax.run.recipe import DreamConfig, EvaluateConfig, Recipe, RefreshConfig, StartsConfig
from wovr_jax.sim.libero import machine, setup
from wovr_jax.sim.libero.pool import Pool
from wovr_jax.sim.libero.setup import LiberoError
from wovr_jax.sim.libero.tasks import DRAWN, Trial, protocol, tasks
from wovr_jax.sim.libero.witness import LiberoWitness
from wovr_jax.world.vae.train import VAETraining


def preset(names):
    return from_dict(Recipe, json.loads(presets.get_config(names).to_json()))


def test_the_presets_of_libero_fit_the_package():
    small, tiny = preset("libero_small"), preset("libero_small,libero_smoke")
    assert small.libero.scene.hold == 2 and small.libero.expert.flaw == "early_release" and not small.vae
    assert dataclasses.replace(tiny.libero, steps=96, inits=(0, 50), expert=small.libero.expert) == small.libero
    for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10"):
        full = preset(suite)
        assert full.libero.suite == suite and (full.collect.first, full.collect.again) == (1500, 1000)
        assert (full.learner.grpo.group, full.dream.chunks * full.policy.chunk, full.learner.lr) == (8, 256, 2e-5)
        assert full.world_train.lr == 1e-5 and full.world_train.start_cap == 250 and full.temperature == 1.6


def test_weights_that_are_not_there_are_missed_before_anything_is_done(fake_libero, tmp_path):
    full = preset("libero_spatial")
    run = Run(tmp_path / "run", to_dict(full))
    with pytest.raises(ConfigError, match=r"config\.policy_weights: weights/libero_spatial/policy\.json is missing"):
        bind_stages(full, run, Products())
    policy = small_policy()
    checkpoint.save(tmp_path / "policy", vla.network(policy).init(jax.random.key(0)))
    with pytest.raises(ConfigError, match=r"config\.world_weights: .*dit\.json is missing.*import_weights"):
        there = dataclasses.replace(full, policy=policy, policy_weights=str(tmp_path / "policy"))
        bind_stages(there, run, Products())
    assert fake_libero.opened == 0


@pytest.mark.slow
def test_the_whole_loop_on_a_fake_libero(fake_libero, tmp_path):
    one = dataclasses.replace(
        recipe(),
        vae="",
        towers=(),
        vae_train=VAETraining(steps=2, batch=2, warmup=1),
        sft=dataclasses.replace(fake_sft(), frozen=()),
        world_train=fake_world_train(),
        refresh=RefreshConfig(steps=2),
        reward_train=fake_reward_train(steps=4, extra=0.25, stride=2),
        starts=StartsConfig(share=0.5),
        dream=DreamConfig(groups=4, chunks=2, updates=(2, 1)),
        learner=fake_learner(grpo=GRPOConfig.fake(group=4, entropy=0.1)),
        evaluate=EvaluateConfig(episodes=6, compare=5, videos=1),
    )
    results = run_whole(to_dict(one), tmp_path / "run")
    assert [phase["name"] for phase in results["phases"]] == ["base", "after imagined GRPO", "after PACE"]
    ledger = results["ledger"]
    assert ledger["collect-0"]["true_steps"] == 4 * one.libero.steps and ledger["grpo-1"]["true_steps"] == 0
    assert "vae" in ledger and all(phase["subgoals"] == {} for phase in results["phases"])
    assert (tmp_path / "run" / "stages" / "compare-0-in-world-0" / "episode-0.mp4").is_file()
    assert all(0 <= row[how] <= 1 for row in results["comparison"] for how in ("open_fingers", "dropped"))
    assert run_whole(to_dict(one), tmp_path / "run")["phases"] == results["phases"]


def states_on_the_way(state, task, seed, action_SA):
    """Proprioception after the reset of a drawn layout and after each action, in a worker."""
    scene = state.open_scene(task)
    states = [scene.reset(Trial(task, DRAWN, seed), protocol("rlinf")).state_TD[-1]]
    for action_A in action_SA:
        scene.step(action_A)
        states.append(scene.state_D)
    return np.stack(states)


@pytest.mark.slow
@pytest.mark.libero
def test_collection_and_measurement_on_the_real_libero(tmp_path):
    """Ten minutes and more is what the loop takes there; this is what of it touches the simulator."""
    try:
        setup.package_folder(), machine.choose_renderer()
        if machine.assets_folder() is None:
            raise LiberoError("no assets")
    except LiberoError as error:
        pytest.skip(f"the real LIBERO does not run here: {error}")
    tiny = preset("libero_small,libero_smoke")
    libero = dataclasses.replace(tiny.libero, steps=16, workers=2, intervened_share=0.0)
    tiny = dataclasses.replace(tiny, libero=libero, starts=StartsConfig())
    arena, (policy, _) = open_environment(tiny).arena, actor()
    witness = LiberoWitness(arena)
    facts = arena.collect(tmp_path / "made", "collect-0", 2, policy)
    assert facts == {"episodes": 2, "successes": 0, "true_steps": 2 * 16 * 2}
    first, second = disk.read(tmp_path / "made")
    assert first.frame_SHWC.shape == (17, 64, 64, 3) and first.state_SD.shape == (17, 8) and first.seed != second.seed
    # Followed by other workers, without a camera, from the reset and from the middle: the same states to the last bit.
    table = start_states.initial([first, second], intervened=True)
    table = start_states.join(table, start_states.keyframes([first], StartsConfig(rule="uniform"), steps=16))
    row_K = np.arange(len(table))
    went = [np.pad(e.action_SA[s:], ((0, s), (0, 0))) for e, s in zip((first, second, first, first), table.step_K)]
    success_KS, frame_KSHWC = witness.follow(table, row_K, np.stack(went), film=True)
    assert not success_KS.any() and frame_KSHWC is not None
    assert np.array_equal(frame_KSHWC[0], first.frame_SHWC[1:]), "the same pictures, from other workers"
    assert not witness.follow(table, row_K, np.stack(went))[0].any()
    jobs = [(tasks("libero_object")[7], e.seed, e.action_SA) for e in (first, second)]
    with Pool(2, dataclasses.replace(tiny.libero.scene, size=0)) as pool:
        for number, state_SD in pool.map(states_on_the_way, jobs):
            assert np.array_equal(state_SD, (first, second)[number].state_SD)
    measured = arena.measure(tmp_path / "sampled", 2, policy)
    (played,) = witness.play(2, policy)
    assert np.array_equal(measured.success_B, np.asarray(played.rollout.truth_BNT).any((1, 2)))
    assert played.rollout.video_BNTHWC.shape == (2, 2, 8, 64, 64, 3)


@pytest.mark.slow
def test_online_rl_on_a_fake_libero(fake_libero, tmp_path):
    """A policy that knows nothing, pushed at random; what it is trained on is what the workers saw."""
    one = dataclasses.replace(
        recipe(),
        vae="",
        towers=(),
        sft=dataclasses.replace(fake_sft(), frozen=()),
        starts=StartsConfig(share=0.0),
        dream=DreamConfig(world="true", reward="true", groups=4, chunks=2, updates=(2,)),
        learner=fake_learner(grpo=GRPOConfig.fake(group=4, entropy=0.1)),
        evaluate=EvaluateConfig(episodes=6, compare=5, videos=1),
    )
    results = pace.run("online_grpo", to_dict(one), tmp_path / "run")
    assert [phase["name"] for phase in results["phases"]] == ["base", "after online GRPO"]
    ledger = results["ledger"]
    assert 0 < ledger["grpo-1"]["true_steps"] <= 2 * 16 * one.libero.steps
    assert not {"vae", "world-0", "collect-0"} & set(ledger) and ledger["grpo-1"]["imagined_frames"] == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    gaps = [line["ratio_gap"] for line in lines if line.get("stage") == "grpo-1"]
    assert len(gaps) == 2 and max(gaps) < 1e-4, "actor and learner disagree about what was done"
