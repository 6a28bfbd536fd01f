"""Assets: round trip, damage, other versions, and their size all together."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from wovr_jax.core.config import ConfigError
from wovr_jax.weights import assets
from wovr_jax.weights.assets import AssetError, load_asset, save_asset
from wovr_jax.world.vae import train as vae_train
from wovr_jax.world.vae.net import VAEConfig
from wovr_jax.world.vae.train import VAETraining

CFG = dataclasses.replace(VAEConfig.fake(), latent_mean=(0.1,) * 4, latent_std=(2.0,) * 4)


@pytest.fixture
def saved(tmp_path):
    params = vae_train.network(CFG).init(jax.random.key(0))
    save_asset("small", CFG, params, training=VAETraining(), scores={"psnr": 30.0}, folder=tmp_path)
    return tmp_path, params


def test_round_trip(saved):
    folder, params = saved
    cfg, loaded = load_asset("small", folder)
    assert cfg == CFG
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), loaded, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}
    assert assets.describe("small", folder)["training"]["steps"] == VAETraining().steps


def test_a_damaged_or_foreign_file_is_refused(saved):
    folder, _ = saved
    path = folder / "small.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AssetError, match="has SHA-256 .* its description says"):
        load_asset("small", folder)
    path.unlink()
    with pytest.raises(AssetError, match="small.safetensors is missing"):
        load_asset("small", folder)
    with pytest.raises(AssetError, match="Assets here: small"):
        load_asset("large", folder)


def test_a_config_of_another_version_is_refused(saved):
    folder, _ = saved
    path = folder / "small.json"
    facts = json.loads(path.read_text())
    facts["config"]["z_dims"] = facts["config"].pop("z_dim")
    path.write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match="z_dim"):
        load_asset("small", folder)


def test_weights_beyond_float16_are_refused(tmp_path):
    with pytest.raises(AssetError, match="'a.0' is not finite"):
        save_asset("big", CFG, {"a": {0: np.float32([1e6])}}, training={}, scores={}, folder=tmp_path)


def test_all_assets_together_are_small():
    sizes = [path.stat().st_size for path in assets.FOLDER.glob("*.safetensors")]
    assert sum(sizes) < 3e6
