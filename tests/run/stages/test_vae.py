"""A VAE trained on episodes: it learns, its statistics are those of its latents, and it comes back from the disk."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from wovr_jax.run.folder import Product, Run
from wovr_jax.run.stages import vae as stage
from wovr_jax.run.stages.episodes import Demonstrations
from wovr_jax.types import Episode
from wovr_jax.weights import native
from wovr_jax.world.model import WorldConfig
from wovr_jax.world.vae import train as vae_train
from wovr_jax.world.vae.train import VAETraining


def episode(seed):
    """A square that wanders over 16 pixels, 12 steps."""
    rng = np.random.default_rng(seed)
    frames = np.zeros((13, 16, 16, 3), np.uint8)
    for frame_HWC, (x, y) in zip(frames, rng.integers(0, 12, (13, 2)), strict=True):
        frame_HWC[y : y + 4, x : x + 4] = 255
    action_SA = rng.uniform(-1, 1, (12, 7)).astype(np.float32)
    return Episode(frames, action_SA, np.zeros(13, bool), "push", 0, seed, "expert", action_SA)


@pytest.mark.slow
def test_a_vae_of_ones_own(tmp_path):
    cfg, made = WorldConfig.fake(), [episode(seed) for seed in range(12)]
    run, train = Run(tmp_path / "run", {}), VAETraining(steps=12, batch=4, warmup=1)
    demos = Product(lambda: Demonstrations(made, []))
    product = stage.open_vae(run, cfg, "", tmp_path, train, demos)
    world, params = product.value
    own, facts = world.vae, product.facts
    assert facts["windows"] > 12 and facts["psnr"] > 4.0
    assert len(own.latent_mean) == own.z_dim and own.latent_mean != cfg.vae.latent_mean
    assert dataclasses.replace(world, vae=cfg.vae) == cfg, "the world model's settings but for the statistics"
    draw = stage.draw_windows(jax.random.key(5), 8, stage.cut_windows(cfg, made))
    z = vae_train.network(own)(params, draw, method="encode")
    assert np.abs(np.asarray(z).mean()) < 0.3 and 0.6 < np.asarray(z).std() < 1.5


def test_of_mosaics_the_vae_learns_every_view_by_itself(tmp_path: pathlib.Path, monkeypatch) -> None:
    class SeenError(Exception):
        """Ends the stage where its training would begin."""

    def look(cfg, train, draw, data):
        raise SeenError(data)

    monkeypatch.setattr(vae_train, "make", look)
    plain = [episode(seed) for seed in range(3)]
    strip = np.full((13, 16, 16, 3), 77, np.uint8)
    made = [
        dataclasses.replace(e, frame_SHWC=np.concatenate([e.frame_SHWC, 255 - e.frame_SHWC, strip], 2)) for e in plain
    ]
    demos = Product(lambda: Demonstrations(made, []))
    cfg = WorldConfig.fake(views=2, state=3)
    with pytest.raises(SeenError) as seen:
        _ = stage.open_vae(Run(tmp_path / "run", {}), cfg, "", tmp_path, VAETraining(steps=1), demos).value
    frame_ESHWC = np.asarray(seen.value.args[0].frame_ESHWC)
    want = [x for e in plain for x in (e.frame_SHWC, 255 - e.frame_SHWC)]
    np.testing.assert_array_equal(frame_ESHWC, np.stack(want))


def test_the_package_says_what_its_parts_have_seen(tmp_path: pathlib.Path) -> None:
    run = Run(tmp_path / "run", {})
    names = ("tabletop_vae", "tabletop_dinov2", "tabletop_siglip")
    facts = stage.count_pretraining(run, [native.FOLDER / f"{name}.json" for name in names]).facts
    assert facts["parts"]["tabletop_vae"] == {"steps": 1600, "frames": 1600 * 8 * 13}
    assert facts["parts"]["tabletop_siglip"] == {"steps": 2500, "frames": 2500 * 64}
    for name, per in (("vae", 13), ("dinov2", 1), ("siglip", 1)):
        about = native.describe(native.FOLDER / f"tabletop_{name}.json")
        train, seen = about["training"], about["seen"]
        assert seen == {"steps": train["steps"], "frames": train["steps"] * train["batch"] * per}
    assert run.ledger()["pretrained"]["pretrained_frames"] == 166_400 + 2 * 160_000 and not facts["said"]


def test_what_weights_from_outside_have_seen_is_counted_or_said(tmp_path: pathlib.Path) -> None:
    """A released part says it; a card without that line is named, and so is a checkpoint, which has no card."""
    silent = tmp_path / "dit.json"
    card = native.describe(native.FOLDER / "tabletop_world.json")
    silent.write_text(json.dumps({name: value for name, value in card.items() if name != "seen"}))
    silent.with_suffix(".safetensors").write_bytes(b"")
    cards = [native.FOLDER / "tabletop_world.json", silent, tmp_path / "stages" / "reward-0" / "reward"]
    run = Run(tmp_path / "run", {})
    facts = stage.count_pretraining(run, cards).facts
    assert facts["parts"] == {"tabletop_world": card["seen"], "dit": None, "reward": None}
    assert run.ledger()["pretrained"]["pretrained_frames"] == card["seen"]["frames"] == 1_920_000
    assert facts["said"] == "what dit, reward saw in pretraining is not written beside it and not counted"
