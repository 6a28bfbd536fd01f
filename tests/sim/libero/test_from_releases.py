"""A suite's preset on one GPU, from files of the releases' own layout to a policy for the robot, on a fake LIBERO.

Everything is small but the way: released files in, the preset's own settings, the run, the policy out both ways.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from configs import pace as presets
from tests.bridge.layouts import BFLOAT16, arrays, dit_shapes, vae_shapes, write
from tests.export.robots import KEY, imported
from tests.sim.libero import fake_libero as fake
from tests.sim.libero.fake_libero import TASKS
from tests.small_run import run_whole
from wovr_jax.bridge import importer
from wovr_jax.bridge.sources import find, open_source
from wovr_jax.core import checkpoint, config
from wovr_jax.core.log import read_metrics
from wovr_jax.export import bundle, source, torch_folder
from wovr_jax.export.robot import Robot
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.run.recipe import Recipe
from wovr_jax.sim.libero import arena
from wovr_jax.weights import native

STEPS, SIDE = 16, 32


def import_wan(folder):
    """Transformer and VAE as Wan2.2-TI2V-5B releases them: conditioned on text, with no layer that reads actions."""
    theirs = folder / "Wan2.2-TI2V-5B"
    write(theirs / "diffusion_pytorch_model.safetensors", arrays(dit_shapes(), BFLOAT16))
    write(theirs / "Wan2.2_VAE.safetensors", {k: v / 3 for k, v in arrays(vae_shapes()).items()})
    for file in find(theirs):
        importer.write_import(importer.read_import(open_source(file), heads=2), folder / "wan")
    return folder / "wan"


def shrink(settings, folder):
    """The preset with the networks of the small releases, short episodes, and few of everything."""
    card, wan = imported(folder / "policy", recipe="rlinf")[0], import_wan(folder)
    settings["libero"] |= {"steps": STEPS, "scene": {"size": SIDE, "wrist": False}, "workers": 2, "inits": [0, 3]}
    settings["libero"]["release"] = str(card.with_name("policy.rest") / "files")
    networks = {"policy": card, "dit": wan / "dit.json", "vae": wan / "vae.json"}
    cfgs = {name: config.to_dict(native.read_config(path, native.describe(path))) for name, path in networks.items()}
    settings["policy"] = cfgs["policy"]
    settings["world"] |= {"size": "fake", "dit": cfgs["dit"], "vae": cfgs["vae"], "vae_rows": 2}
    settings["reward"] = config.to_dict(RewardConfig.fake(tasks=10))
    settings |= {"policy_weights": str(card), "world_weights": str(wan / "dit.json"), "assets": str(wan)}
    settings["collect"] |= {"first": 24, "again": 24, "retold": 24, "batch": 8}
    settings["world_train"] |= {"steps": 6, "batch": 4, "lr": 1e-2, "lora": {"size": "wan", "rank": 2}}
    settings["refresh"] |= {"steps": 3, "lr": 1e-2}
    settings["reward_train"] |= {"steps": 4, "batch": 8, "stride": 2}
    settings["starts"] |= {"before": 4, "least": 4, "room": 4}
    settings["dream"] |= {"groups": 2, "chunks": 2, "updates": [2, 1]}
    settings["learner"]["lora"] |= {"rank": 2}
    settings["learner"] |= {"microbatch": 4, "lr": 1e-2}
    # Rollouts of one start end alike at this size; the entropy bonus moves the policy all the same.
    settings["learner"]["grpo"] = {"size": "fake", "group": 4, "entropy": 0.1}
    settings["evaluate"] |= {"episodes": 6, "compare": 4, "closed": 2, "videos": 1}
    return config.to_dict(config.from_dict(Recipe, settings)), card


@pytest.mark.slow
def test_from_released_files_to_a_policy_for_the_robot_on_one_device(fake_libero, tmp_path, monkeypatch):
    # The statistics of that release are of this suite.
    monkeypatch.setattr(arena, "tasks", lambda suite: tuple(dataclasses.replace(task, suite=suite) for task in TASKS))
    monkeypatch.setattr(fake, "PUSH", 0.85)  # its actions are a seventh as wide as the fake's own expert has them
    settings = json.loads(presets.get_config("libero_goal,one_h100").to_json())
    settings, card = shrink(settings, tmp_path)
    recipe = config.from_dict(Recipe, settings)
    assert recipe.world_train.latents == "stream" and recipe.starts.rule == "gripper_event" and not recipe.sft.steps
    results = run_whole(settings, tmp_path / "run")
    assert [phase["name"] for phase in results["phases"]] == ["base", "after imagined GRPO", "after PACE"]
    ledger, stages = results["ledger"], tmp_path / "run" / "stages"
    assert [ledger[f"collect-{k}"]["episodes"] for k in (0, 1)] == [24, 24]
    assert "demonstrations" not in ledger and "sft" not in ledger
    # What nobody wrote beside imported weights is said, and not taken for nothing.
    assert "what vae, policy, dit saw in pretraining is not written" in results["remarks"][0]
    # Of the world model adapters alone are kept, with the layers that read actions, which Wan has not.
    for k in (0, 1):
        kept = checkpoint.load(stages / f"world-{k}" / "adapters")
        assert {"blocks", "action_cross", "action_adaln"} == set(kept)
        assert "kernel" in kept["action_cross"]["inner"] and "kernel" not in kept["blocks"]["ffn"]["inner"]
    losses = [line["loss"] for line in read_metrics(tmp_path / "run") if line["stage"] == "world-0" and "loss" in line]
    assert losses and np.isfinite(losses).all()

    policy = source.from_run(tmp_path / "run")
    base, moved = (dict(one.leaves()) for one in (source.from_import(card, policy.recorded, key=KEY), policy))
    assert base.keys() == moved.keys()
    assert any(not np.array_equal(np.asarray(base[name], np.float32), moved[name]) for name in base)
    assert policy.key == KEY and policy.frame == (SIDE, SIDE, 3)
    bundle.write(policy, tmp_path / "robot", frames=4)
    robot = Robot.load(tmp_path / "robot")
    frame = np.zeros((1, SIDE, SIDE, 3), np.uint8)
    assert robot.act(frame, ["pick up the milk"]).action_BTA.shape == (1, 8, 7)
    torch_folder.write(card, tmp_path / "torch", trained=policy)
    assert (tmp_path / "torch" / "tokenizer.json").is_file()
