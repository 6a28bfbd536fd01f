"""The study of two cameras and the state: whole at the smallest size, and its measures on pictures that are known."""

from __future__ import annotations

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.sizes import fake_world_train
from tests.small_run import save_parts, small_settings
from wovr_jax.core.config import ConfigError
from wovr_jax.core.pixels import make_mosaic
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.run.recipe import CollectConfig
from wovr_jax.sim import embedded
from wovr_jax.sim.tabletop import table as tabletop
from wovr_jax.sim.tabletop.table import TabletopConfig
from wovr_jax.studies import runner, senses
from wovr_jax.world.model import WorldConfig

SIM = TabletopConfig(wrist=True, strip=16)


def _true_frames() -> tuple[jax.Array, jax.Array]:
    """Mosaics and states of grippers beside their plates, (B, 1, 1, ...)."""
    state = embedded.reset_batch(jnp.arange(16), SIM)
    state = state.replace(gripper=state.plate + jnp.array([0.1, -0.05]), closed=jnp.arange(16) % 2 > 0)
    frame = jax.vmap(lambda one: tabletop.render(one, SIM))(state)
    return frame[:, None, None], jax.vmap(tabletop.sense)(state)[:, None, None]


def test_of_true_frames_the_senses_agree() -> None:
    frame, state = _true_frames()
    found = senses.compare(frame, state, 3)
    assert found["views"][0] < 15 and found["eye"][0] < 15, "half a pixel is 16 thousandths"
    np.testing.assert_allclose(found["state"], 0.0, atol=1e-3)
    np.testing.assert_allclose(found["fingers"], 1.0)


def test_senses_that_contradict_each_other_are_found() -> None:
    frame, state = _true_frames()
    moved = jnp.roll(frame[..., 32:64, :], 6, axis=-2)
    assert senses.compare(frame.at[..., 32:64, :].set(moved), state, 0)["views"][0] > 60
    # And a state that says where the gripper is not, or that fingers are open which are closed.
    other = state + jnp.array([0.2, 0.0, 0.0])
    told = frame.at[..., 64:, :].set(jax.vmap(jax.vmap(jax.vmap(_strip)))(other))
    found = senses.compare(told, state, 3)
    np.testing.assert_allclose(found["state"], 100.0, atol=0.1)
    assert found["eye"][0] > 80
    told = frame.at[..., 64:, :].set(jax.vmap(jax.vmap(jax.vmap(_strip)))(state.at[..., 2].set(1.0)))
    np.testing.assert_allclose(senses.compare(told, state, 3)["fingers"], 0.5)


def _strip(state_R: jax.Array) -> jax.Array:
    return make_mosaic([jnp.zeros((32, 32, 3))], state_R, 16)[:, 32:]


@pytest.mark.slow
def test_the_study_runs_from_episodes_to_its_table(tmp_path: pathlib.Path) -> None:
    settings = small_settings(
        save_parts(tmp_path / "parts"),
        job="senses_study",
        seeds=(3,),
        policy=dataclasses.replace(VLAConfig.fake(), images=2, proprio=3),
        world=WorldConfig.fake(views=2, state=3),
        sim=TabletopConfig(size=16, horizon=128, wrist=True, strip=16),
        collect=CollectConfig(demonstrations=4, batch=4),
        world_train=fake_world_train(steps=2, latents="memory"),
    )
    settings["evaluate"]["compare"] = 2
    results = runner.run("senses_study", settings, tmp_path / "run")
    found = {name: seeds["3"] for name, seeds in results["senses_study"].items()}
    assert list(found) == ["full", "no_state", "above", "hand"]
    assert "psnr_hand" not in found["above"] and "state" not in found["no_state"]
    assert all(math.isfinite(x) for name in ("psnr_above", "psnr_hand", "state") for x in found["full"][name])
    rows = results["tables"][0]["rows"]
    assert [row[1] for row in rows if row[0].startswith("view from the hand")] == [
        "both views and the state",
        "both views",
        "the camera in the hand alone",
    ]
    with pytest.raises(ConfigError, match="with wrist=True and a strip, as configs/world_study.py:senses has it"):
        runner.run("senses_study", small_settings(tmp_path / "parts", job="senses_study"), tmp_path / "other")
