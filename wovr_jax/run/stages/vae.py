"""The stage that gives the world model its VAE: a pretrained one, or one trained on the demonstrations.

And the account of what pretrained parts have seen before the run.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from wovr_jax.core import sharding
from wovr_jax.core.pixels import split_views
from wovr_jax.data import batches
from wovr_jax.data.batches import Layout, Windows
from wovr_jax.nn.functional import narrow
from wovr_jax.run.folder import Product, Run
from wovr_jax.run.stages.episodes import Demonstrations
from wovr_jax.train import loop
from wovr_jax.types import Array, Params
from wovr_jax.weights import native
from wovr_jax.world.model import WorldConfig
from wovr_jax.world.vae import train as vae_train
from wovr_jax.world.vae.train import VAETraining

NAME = "vae"
START_SHARE = 1 / 6
"""Of the windows: those that begin an episode, where the memory is copies of the anchor."""

VAE = tuple[WorldConfig, Params]
"""The world model's settings with the VAE's latent statistics filled in, and the VAE's weights."""


def open_vae(
    run: Run,
    cfg: WorldConfig,
    name: str,
    folder: pathlib.Path,
    train: VAETraining,
    demonstrations: Product[Demonstrations],
) -> Product[VAE]:
    """The VAE of the world model ``cfg``: pretrained, or trained on windows of the demonstrations.

    Facts of a training: what it scores on held-out episodes, see ``world.vae.train.scores``.

    Args:
      run: the run.
      cfg: the world model.
      name: of a pretrained VAE in ``folder``; empty where no pretrained one knows what the episodes show.
      folder: where it lies.
      train: how to train one.
      demonstrations: to learn from.

    Raises:
      NoDataError: when the episodes give no window.
    """
    if name:
        return Product(lambda: _load(cfg, name, folder))

    def make(folder: pathlib.Path) -> dict[str, Any]:
        shown = demonstrations.value.train
        if cfg.views > 1 or cfg.state:  # of mosaics the VAE sees every view by itself, and no state
            apart = ((episode, split_views(episode.frame_SHWC, cfg.views)) for episode in shown)
            shown = [replace(episode, frame_SHWC=x[:, v]) for episode, x in apart for v in range(cfg.views)]
        data = cut_windows(cfg, shown)
        state, step = vae_train.make(cfg.vae, train, draw_windows, data)
        state = loop.fit(NAME, state, step, train.steps, log=run.log, folder=folder)
        params, key = state.params, jax.random.key(train.seed)
        draw = jax.jit(draw_windows, static_argnums=1)
        seen = (draw(jax.random.fold_in(key, i), train.batch, data) for i in range(32))
        # The transformer is trained on latents of mean 0 and deviation 1, which are known only now.
        vae_cfg = vae_train.with_latent_statistics(cfg.vae, params, seen)
        # About 64 held-out windows, evenly spread, in batches of eight.
        rows = jnp.asarray(data.val_I2)[:: max(1, len(data.val_I2) // 64)]
        held_out = [batches.gather_windows(data, rows[low : low + 8])[0] for low in range(0, len(rows) // 8 * 8, 8)]
        scores = vae_train.scores(vae_cfg, params, held_out) if held_out else {}
        # In the form of a pretrained part, so that the next run can begin with it.
        native.save_asset(NAME, vae_cfg, params, training=train, scores=scores, frames=cfg.frames, folder=folder)
        return {"windows": len(data.train_I2), **scores}

    return run.stage(NAME, make, lambda folder: _load(cfg, NAME, folder))


def count_pretraining(run: Run, cards: Sequence[pathlib.Path]) -> Product[None]:
    """Writes down what pretrained parts have seen, steps and frames, as their ``cards`` say; a checkpoint has none."""

    def make(_: pathlib.Path) -> dict[str, Any]:
        parts = {card.stem: native.describe(card).get("seen") if card.suffix == ".json" else None for card in cards}
        unknown = ", ".join(name for name, seen in parts.items() if not seen)
        return {
            "parts": parts,
            "pretrained_frames": sum(seen["frames"] for seen in parts.values() if seen),
            "said": f"what {unknown} saw in pretraining is not written beside it and not counted" if unknown else "",
        }

    return run.stage("pretrained", make, lambda folder: None)


def _load(cfg: WorldConfig, name: str, folder: pathlib.Path) -> VAE:
    vae_cfg, params = native.load_asset(name, folder)
    # Nothing trains it any more.
    return replace(cfg, vae=vae_cfg), sharding.whole(narrow(params, vae_cfg.dtype))


def cut_windows(cfg: WorldConfig, episodes: Any) -> Windows:
    """The windows of a world model, on the device."""
    windows = batches.windows(episodes, Layout(cfg.slots, cfg.chunk, partial=True))
    return sharding.whole(jax.device_put(windows))


def draw_windows(key: Array, batch: int, data: Windows) -> Array:
    """(batch, F, H, W, 3) windows to train on."""
    # The VAE sees what the world model will: first chunks, whose memory repeats one frame, are rare among all windows.
    row_B = batches.sample_rows(key, batch, data.train_starts, len(data.train_I2), START_SHARE)
    return batches.gather_windows(data, jnp.asarray(data.train_I2)[row_B])[0]
