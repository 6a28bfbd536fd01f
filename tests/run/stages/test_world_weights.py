"""Where a world model's training starts: random weights, those of a run, or imported ones."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from tests.sizes import fake_world_train
from wovr_jax.core import checkpoint
from wovr_jax.core.config import ConfigError, from_dict, to_dict
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.run.recipe import Recipe
from wovr_jax.run.stages.world import start_world
from wovr_jax.weights import native, writer
from wovr_jax.weights.safetensors import Fact
from wovr_jax.world.dit import DiTLoRA
from wovr_jax.world.model import WorldConfig, networks

WORLD = WorldConfig.fake()


def begin(path: pathlib.Path) -> Any:
    """The weights that a run with ``world_weights=path`` starts from; a run checks them first."""
    native.check_weights("world_weights", str(path), networks(WORLD)[0].shapes())
    return start_world(WORLD, str(path), lambda *_: jax.random.key(0))


@pytest.fixture(scope="module")
def dit() -> Any:
    return networks(WORLD)[0].init(jax.random.key(7))


def test_a_checkpoint_of_a_run(dit: Any, tmp_path: pathlib.Path) -> None:
    checkpoint.save(tmp_path / "dit", dit)
    found = begin(tmp_path / "dit")
    jax.tree.map(np.testing.assert_array_equal, found, dit)
    assert not any(leaf.committed for leaf in jax.tree.leaves(found))  # a committed array would compile anew


def test_imported_weights_in_their_own_dtype(dit: Any, tmp_path: pathlib.Path) -> None:
    half = {path: np.asarray(leaf).astype(ml_dtypes.bfloat16) for path, leaf in native.flatten(dit).items()}
    facts = {path: Fact(leaf.shape, leaf.dtype) for path, leaf in half.items()}
    card = writer.write_native(tmp_path, "dit", WORLD.dit, facts, half.items(), {})
    found = native.flatten(begin(card))
    assert {leaf.dtype for leaf in found.values()} == {np.dtype("float32")}
    for path, leaf in half.items():
        np.testing.assert_array_equal(found[path], leaf.astype(np.float32))


def test_weights_of_another_network_are_refused_leaf_by_leaf(tmp_path: pathlib.Path) -> None:
    wider = dataclasses.replace(WORLD.dit, ffn=64)
    dit = networks(dataclasses.replace(WORLD, dit=wider))[0].init(jax.random.key(0))
    checkpoint.save(tmp_path / "dit", dit)
    leaves = native.flatten(jax.device_get(dit))
    facts = {path: Fact(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    card = writer.write_native(tmp_path / "imported", "dit", wider, facts, leaves.items(), {})
    for path, says in (
        (tmp_path / "dit", r"blocks/ffn/inner/kernel: expected float32\[2,40,56\], got float32\[2,40,64\]"),
        (
            card,
            r"another network: 3 leaves differ\.\n.*blocks\.ffn\.inner\.bias: expected \(2, 56\), got \(2, 64\)",
        ),
        (tmp_path / "nowhere", "no checkpoint at"),
        (tmp_path / "nowhere.json", "nowhere.json is missing"),
    ):
        with pytest.raises(ConfigError, match=rf"(?s)^config\.world_weights: .*{says}"):
            native.check_weights("world_weights", str(path), networks(WORLD)[0].shapes())
        with pytest.raises(ConfigError, match=rf"(?s)^config\.world_weights: .*{says}"):
            start_world(WORLD, str(path), lambda *_: jax.random.key(0))


def test_adapters_beside_random_weights_are_refused() -> None:
    train = fake_world_train(lora=DiTLoRA.wan(rank=2))
    parts = {"policy": VLAConfig.fake(), "world": WORLD, "reward": RewardConfig.fake(), "world_weights": "x"}
    settings = to_dict(Recipe(**parts, world_train=train))
    assert from_dict(Recipe, settings).world_train.lora == train.lora  # a size and a rank can be set from outside
    with pytest.raises(ConfigError, match=r"world_weights=\.\.\., or train everything"):
        from_dict(Recipe, settings | {"world_weights": ""})
