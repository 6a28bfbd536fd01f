"""Episodes -> a VAE of one's own, where no pretrained one knows what they show."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from wovr_jax.core import sharding
from wovr_jax.core.log import Log
from wovr_jax.data import batches
from wovr_jax.data.batches import Windows
from wovr_jax.train import loop
from wovr_jax.types import Array, Episode, Params
from wovr_jax.weights import native
from wovr_jax.world.model import WorldConfig
from wovr_jax.world.vae import train as vae_train
from wovr_jax.world.vae.net import VAEConfig
from wovr_jax.world.vae.train import VAETraining

NAME = "vae"
START_SHARE = 1 / 6
"""Of the windows: those that begin an episode, where the memory is copies of the anchor."""
HELD_OUT = 0.1


def fit(
    cfg: WorldConfig,
    training: VAETraining,
    episodes: Sequence[Episode],
    folder: pathlib.Path,
    *,
    log: Log | None = None,
) -> dict[str, Any]:
    """Trains the VAE of ``cfg`` on windows of ``episodes``, leaves it in ``folder`` for :func:`load`.

    Returns:
      what it scores on held-out episodes, see ``vae_train.scores``.

    Raises:
      NoDataError: when the episodes give no window.
    """
    data = cut(cfg, episodes)
    state, step = vae_train.make(cfg.vae, training, _draw, data)
    state = loop.fit(NAME, state, step, training.steps, log=log, folder=folder)
    params, key = state["params"], jax.random.key(training.seed)
    draw = jax.jit(_draw, static_argnums=1)
    seen = (draw(jax.random.fold_in(key, i), training.batch, data) for i in range(32))
    own = vae_train.normalised(cfg.vae, params, seen)
    rows = jnp.asarray(data.val_I2)[:: max(1, len(data.val_I2) // 64)]
    held = [batches.gather_windows(data, rows[low : low + 8])[0] for low in range(0, len(rows) // 8 * 8, 8)]
    scores = vae_train.scores(own, params, held) if held else {}
    native.save_asset(NAME, own, params, training=training, scores=scores, folder=folder)
    return {"windows": len(data.train_I2), **scores}


def cut(cfg: WorldConfig, episodes: Sequence[Episode]) -> Windows:
    """The windows of a world model, on the device."""
    found = batches.windows(episodes, memory=cfg.slots, new=cfg.chunk, partial=True, val_share=HELD_OUT)
    return sharding.whole(jax.device_put(found))


def load(folder: pathlib.Path) -> tuple[VAEConfig, Params]:
    """Config with latent statistics, and weights."""
    return native.load_asset(NAME, folder)


def _draw(key: Array, batch: int, cut: Windows) -> Array:
    """(batch, F, H, W, 3) windows to train on."""
    row_B = batches.sample_rows(key, batch, cut.train_starts, len(cut.train_I2), START_SHARE)
    return batches.gather_windows(cut, jnp.asarray(cut.train_I2)[row_B])[0]
