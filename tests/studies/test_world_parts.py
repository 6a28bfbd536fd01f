"""The study of the world model: its table, its episodes, and one seed of it at the smallest size."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from tests.sizes import fake_world_train
from wovr_jax.core.config import ConfigError, from_dict, to_dict
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.report import tables
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.run.folder import RunError
from wovr_jax.run.recipe import CollectConfig, EvaluateConfig, Recipe
from wovr_jax.sim.tabletop.expert import ExpertConfig
from wovr_jax.sim.tabletop.table import TabletopConfig
from wovr_jax.sim.tabletop.wander import wander
from wovr_jax.studies import runner
from wovr_jax.studies import world_parts as world_study
from wovr_jax.studies.variants import merge_settings
from wovr_jax.train import loop
from wovr_jax.weights import native
from wovr_jax.world.model import WorldConfig, networks


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("assets")
    world = WorldConfig.fake()
    native.save_asset(
        "vae", world.vae, networks(world)[1].init(jax.random.key(1)), training={}, scores={}, folder=folder
    )
    return Recipe(
        policy=VLAConfig.fake(),
        world=world,
        reward=RewardConfig.fake(),
        assets=str(folder),
        vae="vae",
        seeds=(3,),
        job="world_study",
        sim=dataclasses.replace(TabletopConfig.fake(), horizon=128),
        expert=ExpertConfig(noise=0.3),
        collect=CollectConfig(demonstrations=3, batch=4),
        evaluate=EvaluateConfig(compare=2),
        world_train=fake_world_train(latents="disk"),
    )


def test_every_variant_differs_from_the_full_model_in_one_thing(recipe: Recipe) -> None:
    settings = to_dict(recipe)
    worlds = [from_dict(Recipe, merge_settings(settings, {"world": one.change})).world for one in world_study.VARIANTS]
    assert len(set(worlds)) == 6
    assert (worlds[0].anchor, worlds[0].memory, worlds[0].noisy_context) == (True, 4, True)
    assert worlds[0].dit.action_conditioning == "dual"


def test_episodes_keep_moving_to_their_end() -> None:
    """With demonstrations of this length everything after the first success is a still picture."""
    sim = TabletopConfig(horizon=128)
    keys = jax.random.split(jax.random.key(0), 16)
    play = jax.jit(jax.vmap(lambda seed, key: wander(seed, key, ExpertConfig(), sim)[0]))
    states = play(np.arange(16), keys)
    gripper_move = np.abs(np.diff(states.gripper, axis=1)).max(-1) > 1e-3
    assert gripper_move[:, 96:].mean() > 0.5
    travelled = np.linalg.norm(states.block_K2[:, 96:, 0] - states.block_K2[:, 96:97, 0], axis=-1).max(1)
    assert (travelled > 0.15).mean() > 0.7
    # And it begins as a demonstration does: the first place the block goes to is the plate.
    placed = np.linalg.norm(states.block_K2[:, :40, 0] - states.plate[:, :40], axis=-1).min(1) < sim.success_radius
    assert placed.mean() > 0.8


def test_strolls_show_motions_that_an_expert_never_makes() -> None:
    """Open jaws that leave the block: without any, a world model answers that command with the way to the block."""
    sim, keys = TabletopConfig(horizon=32), jax.random.split(jax.random.key(1), 64)
    away = []
    for share in (0.0, 0.5):
        cfg = ExpertConfig(noise=0.0, flip=0.0, stroll_share=share)
        play = jax.jit(jax.vmap(lambda seed, key, cfg=cfg: wander(seed, key, cfg, sim)))
        states, _, action = play(np.arange(64), keys)
        to_block = states.block_K2[:, :-1, 0] - states.gripper[:, :-1]
        free = (action[..., 6] < 0) & (np.linalg.norm(to_block, axis=-1) > 0.2)
        away.append(float((((action[..., :2] * to_block).sum(-1) < -1e-3) & free).sum() / free.sum()))
    assert away[0] == 0.0
    assert 0.1 < away[1] < 0.6


def test_one_seed_is_trained_measured_tabled_and_not_made_twice(
    recipe: Recipe, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(recipe, variants=("full",))  # the others are the same code with other settings
    results = runner.run("world_study", to_dict(recipe), tmp_path / "run")
    found = {name: seeds["3"] for name, seeds in results["world_study"].items()}
    assert list(found) == ["full", "still", "vae"]
    assert all(len(one["latent"]) == len(one["psnr"]) == 16 for one in found.values())
    assert found["full"] != found["still"] != found["vae"]
    assert "true frames through the VAE" in (tmp_path / "run" / "report.html").read_text()
    assert any(line.startswith("(true frames through the VAE)") for line in tables.render_text(results).splitlines())

    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("trained again")

    monkeypatch.setattr(loop, "fit", never)
    again = runner.run("world_study", to_dict(recipe), tmp_path / "run")
    assert json.dumps(again["world_study"]) == json.dumps(results["world_study"])

    stage, numbers, picture = runner.probe(tmp_path / "run", None, 2)  # and the model can be asked
    assert stage == "full-seed3" and set(numbers) == {"x", "y", "jaws"} and picture.is_file()
    assert json.loads(picture.with_suffix(".json").read_text())["starts"] == 2
    with pytest.raises(RunError, match="has no finished world model cross-seed3; it has full-seed3"):
        runner.probe(tmp_path / "run", "cross-seed3", 2)


def test_episodes_too_short_for_the_last_chunk_are_refused(recipe: Recipe, tmp_path: pathlib.Path) -> None:
    short = dataclasses.replace(recipe, sim=dataclasses.replace(recipe.sim, horizon=120))
    with pytest.raises(ConfigError, match=r"config\.sim\.horizon: chunk 16 of an episode ends at step 128.*got 120"):
        runner.run("world_study", to_dict(short), tmp_path / "run")


def test_the_table_is_mean_and_spread_over_the_seeds_that_are_there() -> None:
    def seeds(*ends: float) -> dict[str, dict[str, list[float]]]:
        return {str(i): {"latent": [0.1] * 15 + [end], "psnr": [30.0] * 15 + [28.0 + i]} for i, end in enumerate(ends)}

    names = [one.name for one in world_study.VARIANTS] + list(world_study.REFERENCES)
    found = {name: seeds(0.1, 0.1) for name in names} | {"memory_1": seeds(0.3, 0.05), "cross": seeds(0.2), "adaln": {}}
    rows = {row[0]: row[1:] for row in world_study.table(found)["rows"]}
    assert rows["one memory frame"] == [
        "0.100 ± 0.000",
        "0.100 ± 0.000",
        "0.175 ± 0.177",
        "30.0 ± 0.0",
        "30.0 ± 0.0",
        "28.5 ± 0.7",
        "1 of 2 seeds",
    ]
    assert rows["full"][-1] == "-"
    assert rows["actions through cross-attention only"][2:] == ["0.200", "30.0", "30.0", "28.0", "1 of 1 seeds"]
    assert "actions through AdaLN only" not in rows  # not run yet
