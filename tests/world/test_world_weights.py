"""Where a world model's training starts: random weights, those of a run, or imported ones."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from wovr_jax.core import checkpoint
from wovr_jax.core.config import ConfigError, from_dict, to_dict
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.run.recipe import Recipe
from wovr_jax.run.stages import Stages
from wovr_jax.weights import native
from wovr_jax.weights.safetensors import Fact
from wovr_jax.world.dit import DiTLoRA
from wovr_jax.world.model import WorldConfig, networks
from wovr_jax.world.train import WorldTrainConfig

WORLD = WorldConfig.fake()


@pytest.fixture(scope="module")
def begin(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``begin(path)``: the weights that a run with ``world_weights=path`` starts from."""
    folder = tmp_path_factory.mktemp("assets")
    vae = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), networks(WORLD)[1].shapes())
    native.save_asset("vae", WORLD.vae, vae, training={}, scores={}, folder=folder)
    parts = {"policy": VLAConfig.fake(), "world": WORLD, "reward": RewardConfig.fake()}
    recipe = Recipe(**parts, assets=str(folder), vae="vae")

    def fresh(path: pathlib.Path) -> Any:
        return Stages(dataclasses.replace(recipe, world_weights=str(path)), None).fresh_world  # pyright: ignore

    return fresh


@pytest.fixture(scope="module")
def dit() -> Any:
    return networks(WORLD)[0].init(jax.random.key(7))


def test_a_checkpoint_of_a_run(begin: Any, dit: Any, tmp_path: pathlib.Path) -> None:
    checkpoint.save(tmp_path / "dit", dit)
    found = begin(tmp_path / "dit")
    jax.tree.map(np.testing.assert_array_equal, found, dit)
    assert not any(leaf.committed for leaf in jax.tree.leaves(found))  # a committed array would compile anew


def test_imported_weights_in_their_own_dtype(begin: Any, dit: Any, tmp_path: pathlib.Path) -> None:
    half = {path: np.asarray(leaf).astype(ml_dtypes.bfloat16) for path, leaf in native.flatten(dit).items()}
    facts = {path: Fact(leaf.shape, leaf.dtype) for path, leaf in half.items()}
    card = native.write(tmp_path, "dit", WORLD.dit, facts, half.items(), {})
    found = native.flatten(begin(card))
    assert {leaf.dtype for leaf in found.values()} == {np.dtype("float32")}
    for path, leaf in half.items():
        np.testing.assert_array_equal(found[path], leaf.astype(np.float32))


def test_weights_of_another_network_are_refused_leaf_by_leaf(begin: Any, tmp_path: pathlib.Path) -> None:
    wider = dataclasses.replace(WORLD.dit, ffn=64)
    dit = networks(dataclasses.replace(WORLD, dit=wider))[0].init(jax.random.key(0))
    checkpoint.save(tmp_path / "dit", dit)
    leaves = native.flatten(jax.device_get(dit))
    facts = {path: Fact(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    card = native.write(tmp_path / "imported", "dit", wider, facts, leaves.items(), {})
    for path, says in (
        (tmp_path / "dit", r"blocks/ffn/inner/kernel: expected float32\[2,40,56\], got float32\[2,40,64\]"),
        (card, r"is of another network, 3 differ:\n.*blocks\.ffn\.inner\.bias: \(2, 64\) there, \(2, 56\) here"),
        (tmp_path / "nowhere", "no checkpoint at"),
        (tmp_path / "nowhere.json", "nowhere.json is missing"),
    ):
        with pytest.raises(ConfigError, match=rf"(?s)config\.world_weights: .*{says}"):
            begin(path)


def test_adapters_beside_random_weights_are_refused() -> None:
    train = WorldTrainConfig.fake(lora=DiTLoRA.wan(rank=2))
    parts = {"policy": VLAConfig.fake(), "world": WORLD, "reward": RewardConfig.fake(), "world_weights": "x"}
    settings = to_dict(Recipe(**parts, world_train=train))
    assert from_dict(Recipe, settings).world_train.lora == train.lora  # a size and a rank can be set from outside
    with pytest.raises(ConfigError, match=r"world_weights=\.\.\., or train everything"):
        from_dict(Recipe, settings | {"world_weights": ""})
