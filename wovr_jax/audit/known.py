"""What the signs of a lie compare with: the true episodes that a world model knew, and inverse dynamics of them."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from wovr_jax.audit import inverse, signs
from wovr_jax.audit.inverse import InverseConfig, InverseObjective
from wovr_jax.audit.signs import Known
from wovr_jax.core import checkpoint, config, sharding
from wovr_jax.data import batches
from wovr_jax.run.folder import Product, Run
from wovr_jax.run.stages.episodes import Keys
from wovr_jax.run.stages.vae import cut_windows
from wovr_jax.train import loop
from wovr_jax.train import step as train_step
from wovr_jax.train.optimizers import TrainingConfig
from wovr_jax.types import Episode, Params
from wovr_jax.world.model import WorldConfig

EPISODES = 512
"""True episodes at most, the newest ones: their frames lie in memory."""
WINDOWS, BATCH = 2048, 64
"""Chunks of them whose latents are kept at most, and how many are encoded at once."""
TRAINING = TrainingConfig(steps=1000, batch=128, lr=1e-3)
"""Of the inverse dynamics. On the embedded table the error is below a hundredth of the actions' variance by then."""


def know(
    run: Run,
    world_round: int,
    vae: Product[tuple[WorldConfig, Params]],
    episodes: Callable[[], Sequence[Episode]],
    key: Keys,
) -> Product[tuple[InverseConfig, Known]]:
    """Reads the true episodes of a world and trains inverse dynamics on them.

    Args:
      run: the folder that the stage ``known-<round>`` is kept in.
      world_round: round of the world model.
      vae: the world model's settings, and its VAE.
      episodes: gives the true episodes of the rounds up to this one, the oldest first.
      key: of the run, by name.
    """
    name = f"known-{world_round}"

    def make(folder: pathlib.Path) -> dict[str, Any]:
        newest = episodes()[-EPISODES:]
        steps = inverse.collect_steps(newest)
        cfg = InverseConfig(*steps.frame_XHWC.shape[1:3], actions=steps.action_XA.shape[-1])
        first = inverse.network(cfg).init(key(name, "weights"))
        objective = InverseObjective(cfg, TRAINING)
        state, step = train_step.make(objective, first, train_step.resident(steps), key(name))
        state = loop.fit(name, state, step, TRAINING.steps, log=run.log, folder=folder)
        latent_XD = _encode(*vae.value, newest)
        mean_D, axes_DP, place_XP = signs.find_axes(latent_XD)
        kept = {"mean": mean_D, "axes": axes_DP, "place": place_XP, "scale": steps.scale_A}
        checkpoint.save(folder / "known", kept | {"inverse": state.params})
        return {"inverse": config.to_dict(cfg), "windows": len(latent_XD), "episodes_read": len(newest)}

    def load(folder: pathlib.Path) -> tuple[InverseConfig, Known]:
        kept = sharding.whole(checkpoint.load(folder / "known"))
        cfg = config.from_dict(InverseConfig, run.facts[name]["inverse"])
        return cfg, Known(kept["mean"], kept["axes"], kept["place"], kept["inverse"], kept["scale"])

    return run.stage(name, make, load)


def _encode(cfg: WorldConfig, vae: Params, episodes: Sequence[Episode]) -> np.ndarray:
    """Returns (X, D), the latents of true chunks of episodes that are not held out."""
    data, gather = cut_windows(cfg, episodes), jax.jit(batches.gather_windows)
    row_I2 = sharding.host(data.train_I2)
    row_X2 = row_I2[np.random.default_rng(0).permutation(len(row_I2))[:WINDOWS]]
    latents = []
    for low in range(0, len(row_X2), BATCH):
        # The last batch is filled up with its own rows, so that one program does.
        row_B2 = np.resize(row_X2[low : low + BATCH], (BATCH, 2))
        latents.append(sharding.host(signs.encode_chunks(cfg, vae, gather(data, row_B2)[0])))
    return np.concatenate(latents)[: len(row_X2)]
