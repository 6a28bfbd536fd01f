"""Play without a run folder, and what the package's own networks reach."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import pace as preset
from launch import command
from tests.small_run import save_parts, small_settings
from wovr_jax import pace
from wovr_jax.core.config import from_dict, to_dict
from wovr_jax.imagine import imagine, predicate
from wovr_jax.play.source import open_run
from wovr_jax.policy import vla
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.reward import classifier
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.run.bind import open_environment
from wovr_jax.run.folder import Run
from wovr_jax.run.recipe import Recipe
from wovr_jax.run.stages.policy import fit_codec
from wovr_jax.sim import embedded
from wovr_jax.sim.arena import layouts
from wovr_jax.types import Imagined, Params
from wovr_jax.weights import native
from wovr_jax.world import model as world_model
from wovr_jax.world.model import WorldConfig

LAYOUTS = 128


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
        assert (
            status == 0
            and "frames a second" in out
            and "play: policy tabletop_policy, world model tabletop_world" in err
        )
    source = open_run(tmp_path / "runs" / "play")
    there = native.load_asset("tabletop_policy", parts)[1]
    for ours, theirs in zip(jax.tree.leaves(source.policy), jax.tree.leaves(there), strict=True):
        np.testing.assert_array_equal(np.asarray(ours, np.float32), theirs)
    assert source.judge is not None and source.judge.threshold == settings.reward_train.threshold


def test_the_networks_of_the_package_do_what_their_files_say(tmp_path: pathlib.Path) -> None:
    recipe = from_dict(Recipe, preset.get_config("pretrained").to_dict())
    with contextlib.closing(Run(tmp_path / "run", to_dict(recipe))) as run:
        made = pace.pace(recipe, run, pace.Job("demonstrations", measured=()))
    codec, key, prompt_KL = (
        fit_codec("tabletop", made.demonstrations),
        jax.random.key(0),
        open_environment(recipe).prompt_KL,
    )
    vae_cfg, vae = native.load_asset(recipe.vae)
    cfg = dataclasses.replace(recipe.world, vae=vae_cfg)
    seeds = jnp.asarray(layouts(recipe.seed, "evaluate", LAYOUTS))  # which that run never trained on either
    start = embedded.make_starts(seeds, prompt_KL, recipe.embedded, cfg.slots)

    @jax.jit
    def play(policy: Params) -> Imagined:
        act = vla.policy(recipe.policy, policy, codec, 0.0)
        return imagine(act, embedded.world(recipe.embedded), predicate, start, key, chunks=3, video=True)

    says = {name: native.describe(native.FOLDER / f"tabletop_{name}.json")["scores"] for name in ("base", "policy")}
    played = {name: play(native.load_asset(f"tabletop_{name}")[1]) for name in says}
    for name, rollout in played.items():
        assert abs(np.asarray(rollout.success_BNT).any((1, 2)).mean() - says[name]["greedy"]) < 0.12, name

    @jax.jit
    def imagine_again(params: Params, judge: Params, action_BNTA: jax.Array) -> Imagined:
        learned = world_model.world(cfg, params)
        return imagine(action_BNTA, learned, classifier.score(recipe.reward, judge), start, key, chunks=3, video=True)

    true = played["base"]
    dit, judge = (native.load_asset(name)[1] for name in (recipe.world_weights, recipe.reward_weights))
    again = imagine_again({"dit": dit, "vae": vae}, judge, true.action_BNTA)
    error_N = np.square(np.asarray(true.video_BNTHWC) - np.asarray(again.video_BNTHWC)).mean((0, 2, 3, 4, 5))
    assert 10 * np.log10(4 / error_N[0]) > 26 and 10 * np.log10(4 / error_N[2]) > 20, error_N
    paid_B = (np.asarray(again.prob_BNT) > recipe.reward_train.threshold).any((1, 2))
    assert (paid_B == np.asarray(true.success_BNT).any((1, 2))).mean() > 0.8
