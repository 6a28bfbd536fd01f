"""Episodes -> a trained world model, watched on held-out episodes while it learns.

Every ``validate_every`` steps the model is measured on windows that it does not train on, and a few held-out
episodes are imagined again from their first frame; the film shows them beside the truth.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from wovr_jax.core import checkpoint, pixels, sharding
from wovr_jax.core.log import Log
from wovr_jax.data import batches, stream
from wovr_jax.data import episodes as disk
from wovr_jax.nn import lora
from wovr_jax.train import loop
from wovr_jax.types import Array, Episode, Params
from wovr_jax.world import latents, replay
from wovr_jax.world import train as training
from wovr_jax.world.latents import Data, Resident
from wovr_jax.world.model import WorldConfig
from wovr_jax.world.train import WorldTrainConfig, WorldTrainState

HELD_OUT = 0.1
"""Share of the episodes that validate."""
VALIDATED = 8
"""Held-out episodes whose windows validate a training that streams."""
FILMED = 3
"""Held-out episodes in a film."""
FILM_FPS = 6


def fit(
    cfg: WorldConfig,
    train: WorldTrainConfig,
    params: Params,
    episodes: Sequence[Episode],
    key: Array,
    folder: str | os.PathLike,
    *,
    old: Sequence[Episode] = (),
    cache: str | os.PathLike = "",
    name: str = "world",
    log: Log | None = None,
) -> dict[str, Any]:
    """Trains, leaves the product in ``folder`` for :func:`load`, returns what the held-out episodes say.

    Args:
      cfg: the world model.
      train: how to train it.
      params: weights ``{"dit": ..., "vae": ...}`` to start from.
      episodes: to learn from, but for the held-out ones.
      key: of the training, and with another fold of its measurements.
      folder: of the stage: checkpoint, product and films.
      old: episodes of earlier rounds, for the replayed share of each batch.
      cache: folder of latents on disk, for ``train.latents="disk"``.
      name: of the stage, for messages and curves.
      log: receives the curves.

    Raises:
      NoDataError, ValueError: when the episodes give no window to train or to validate on.
    """
    folder = pathlib.Path(folder)
    data, held = windows(cfg, train, params["vae"], episodes, cache)
    replayed = windows(cfg, train, params["vae"], old, cache)[0] if old else None
    state, step = training.make(cfg, train, params["dit"], data, key, replay=replayed)
    # Training folds in its step numbers; this one it does not reach.
    measure = training.validation(cfg, train, held, jax.random.fold_in(key, np.uint32(0xFFFFFFFF)))
    shown = _filmed(episodes, cfg.chunk)

    def watch(done: int, state: WorldTrainState) -> dict[str, float] | None:
        if not train.validate_every or done % train.validate_every:
            return None
        dit = training.weights(train, training.trained(state), params["dit"])
        if shown:
            _film(cfg, params | {"dit": dit}, shown, folder / "films" / f"step-{done:06d}.mp4", key)
        return _floats(measure(dit))

    state = loop.fit(name, state, step, train.steps, log=log, folder=folder, on_step=watch)
    kept = training.trained(state)
    checkpoint.save(folder / _product(train), kept)
    final = _floats(measure(training.weights(train, kept, params["dit"])))
    if log:
        log.scalars(name, train.steps, final)
    return final | {"windows": data.count}


def load(train: WorldTrainConfig, params: Params, folder: str | os.PathLike) -> Params:
    """The weights that :func:`fit` left in ``folder``, having started from ``params``: adapters are folded in."""
    adapters = train.lora
    if adapters is None:
        return checkpoint.restore(pathlib.Path(folder) / _product(train), params)
    like = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, adapters))
    return training.weights(train, checkpoint.restore(pathlib.Path(folder) / _product(train), like), params)


def windows(
    cfg: WorldConfig,
    train: WorldTrainConfig,
    vae_params: Params,
    episodes: Sequence[Episode],
    cache: str | os.PathLike = "",
    *,
    held_out: float = HELD_OUT,
) -> tuple[Data, Resident]:
    """Windows to learn from and held-out ones, encoded as ``train.latents`` says.

    Raises:
      ValueError: ``latents="disk"`` without a folder.
    """
    where = {"start_cap": train.start_cap or None, "stride": train.stride, "partial": True}
    where |= {"memory": cfg.slots, "new": cfg.chunk}
    if train.latents == "stream":
        return _streamed(cfg, train, vae_params, episodes, where, held_out)
    cut = batches.windows(episodes, **where, val_share=held_out)
    if train.latents == "fly":
        return latents.frames(cfg, vae_params, cut)
    if train.latents == "memory":
        return latents.encode_windows(cfg, vae_params, cut)
    if not cache:
        raise ValueError("world training: latents='disk' needs a folder to keep them in, got none")
    return latents.encode_once(cache, cfg, vae_params, cut)


def _streamed(
    cfg: WorldConfig,
    train: WorldTrainConfig,
    vae_params: Params,
    episodes: Sequence[Episode],
    where: dict[str, Any],
    held_out: float,
) -> tuple[Data, Resident]:
    """The training side read from disk step by step; of the held-out side as many episodes as are kept in memory."""
    heads = disk.heads(episodes)
    held_E = batches.split(heads, held_out)
    layout = stream.Layout(start_share=train.start_share, **where)
    steps_E = np.array([head.steps for head in heads])
    learn = latents.WindowStream(stream.Stream(episodes, steps_E, ~held_E, layout, train.stream), vae_params, cfg)
    some = [episodes[e] for e in np.flatnonzero(held_E)[:VALIDATED]]
    kept, none = latents.frames(cfg, vae_params, batches.windows(some or [episodes[0]], **where, val_share=0.0))
    return learn, kept if some else none


def _filmed(episodes: Sequence[Episode], chunk: int) -> list[Episode]:
    """Some held-out episodes as long as the longest; none where no whole number of chunks fits."""
    heads = disk.heads(episodes)
    longest = max(head.steps for head in heads)
    held_E = batches.split(heads, HELD_OUT)
    long = [e for e, head in enumerate(heads) if held_E[e] and head.steps == longest]
    return [episodes[e] for e in long[:FILMED]] if longest % chunk == 0 else []


def _film(cfg: WorldConfig, params: Params, episodes: list[Episode], path: pathlib.Path, key: Array) -> None:
    first_BHWC, action_BNTA, true_BNTHWC = replay.recorded(episodes, cfg.chunk)
    seen_BNTHWC = sharding.host(replay.play(cfg, params, first_BHWC, action_BNTA, key))
    pixels.video(path, replay.film(first_BHWC, true_BNTHWC, seen_BNTHWC), fps=FILM_FPS)


def _product(train: WorldTrainConfig) -> str:
    return "dit" if train.lora is None else "adapters"


def _floats(measured: dict[str, Array]) -> dict[str, float]:
    return {name: float(value) for name, value in measured.items()}
