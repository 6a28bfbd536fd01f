"""Play without a run folder, and what the package's own networks reach."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import pace as preset
from launch import command
from tests.small_run import save_parts, small_settings
from wovr_jax.play.source import open_run
from wovr_jax.policy import vla
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.reward import classifier
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.weights import native
from wovr_jax.world import model as world_model
from wovr_jax.world.model import WorldConfig


def test_without_a_run_folder_it_begins_with_networks_of_the_package(
    opened, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    parts, world = save_parts(tmp_path / "assets"), WorldConfig.fake()
    networks = {
        "tabletop_policy": (VLAConfig.fake(), vla.network(VLAConfig.fake())),
        "tabletop_world": (world, world_model.networks(world)[0]),
        "tabletop_reward": (RewardConfig.fake(), classifier.network(RewardConfig.fake())),
    }
    for name, (cfg, network) in networks.items():
        native.save_asset(name, cfg, network.init(jax.random.key(7)), training={}, scores={}, folder=parts)
    settings = ConfigDict(small_settings(parts))
    settings.reward_train.rule = "fixed"
    preset.pretrained(settings)
    monkeypatch.setattr(native, "FOLDER", parts)
    monkeypatch.setattr(command, "load_config", lambda file, preset: settings.to_dict())
    monkeypatch.setattr(command, "default_run", lambda *_: tmp_path / "runs" / "play")
    for _ in range(2):  # the second time everything is there
        status, out, err = opened("play.py", "--measure", 2)
        assert status == 0 and "frames a second" in out and "play: sft in world-0" in err
    source = open_run(tmp_path / "runs" / "play")
    there = native.load_asset("tabletop_policy", parts)[1]
    for ours, theirs in zip(jax.tree.leaves(source.policy), jax.tree.leaves(there), strict=True):
        np.testing.assert_array_equal(np.asarray(ours, np.float32), theirs)
    assert source.judge is not None and source.judge.threshold == settings.reward_train.threshold
