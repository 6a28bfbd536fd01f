"""The stage that trains the world model, and in later rounds refreshes it, watched on held-out episodes meanwhile.

Every ``validate_every`` steps the model is measured on windows that it does not train on, and a few held-out
episodes are imagined again from their first frame; the film shows them beside the truth.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from wovr_jax.core import checkpoint, pixels, sharding
from wovr_jax.data import batches, stream
from wovr_jax.data import episodes as disk
from wovr_jax.data.batches import Layout
from wovr_jax.run import programs
from wovr_jax.run.folder import Product, Run
from wovr_jax.run.recipe import RefreshConfig
from wovr_jax.run.stages.episodes import Demonstrations, Keys, join_rounds
from wovr_jax.train import loop
from wovr_jax.train.step import TrainState
from wovr_jax.types import Array, Episode, Params
from wovr_jax.weights import native
from wovr_jax.world import dit, latents
from wovr_jax.world import model as world_model
from wovr_jax.world import train as training
from wovr_jax.world.latents import Data, Resident
from wovr_jax.world.model import WorldConfig
from wovr_jax.world.train import WorldTrainConfig

VALIDATED = 8
"""Held-out episodes whose windows validate a training that streams."""
FILMED = 3
"""Held-out episodes in a film."""
FILM_FPS = 6


def start_world(cfg: WorldConfig, weights: str, key: Keys) -> Params:
    """Weights from which the world model's transformer starts, on the mesh in use.

    Args:
      cfg: the world model.
      weights: a json of imported weights or the folder of a checkpoint; empty for random weights.
      key: of the run, by name.

    Raises:
      ConfigError: nothing there, or weights of another network.
    """
    network = world_model.networks(cfg)[0]
    if weights:
        return native.load_weights("world_weights", weights, network.shapes(), dit.AXES)
    return sharding.place(network.init(key("world")), dit.AXES)


def fit_world(
    run: Run,
    train: WorldTrainConfig,
    refresh: RefreshConfig,
    start: Callable[[], Params],
    prompt_KL: Array,
    key: Keys,
    round_: int,
    vae: Product[tuple[WorldConfig, Params]],
    worlds: Sequence[Product[Params]],
    rollouts: Sequence[Product[Sequence[Episode]]],
    demonstrations: Product[Demonstrations],
) -> Product[Params]:
    """The world model of a round, ``{"dit": ..., "vae": ...}``: trained in round 0, refreshed after that (PACE).

    Without a step of training it is frozen, the weights that it starts from in every round.

    Args:
      run: the run.
      train: how to train the transformer.
      refresh: what a refresh changes in that.
      start: gives the transformer's weights that the first training starts from.
      round_: the round.
      vae: the world model's settings with the VAE's statistics, and the frozen VAE.
      worlds: those of the rounds before; a refresh starts from the last of them.
      rollouts: true episodes of every round so far. The newest are learned from, in the first round with the
        demonstrations; a share of each batch of a refresh is drawn from the older ones.
      demonstrations: scripted episodes.
      prompt_KL: (tasks, L) prompt tokens of every task.
      key: of the run, by name.

    Raises:
      NoDataError, ValueError: when the episodes give no window to train or to validate on.
    """
    for_use = functools.partial(_for_use, vae)
    if not train.steps:  # frozen: nothing is made, and weights from outside are not copied into the run
        return worlds[-1] if worlds else Product(lambda: {"dit": start(), "vae": vae.value[1]}).used_as(for_use)
    name = f"world-{round_}"
    if worlds:
        before = worlds[round_ - 1]
        train, start = dataclasses.replace(train, **dataclasses.asdict(refresh)), lambda: before.load()["dit"]

    def make(folder: pathlib.Path) -> dict[str, Any]:
        (cfg, vae_params), start_dit, train_key = vae.value, start(), key(name)
        new = disk.join([rollouts[-1].value, demonstrations.value.train if round_ == 0 else []])
        old = join_rounds(rollouts[:-1])  # mixed in: a refresh on the newest alone would forget what the others showed
        data, held_out = windows(cfg, train, vae_params, new, run.folder / "latents")
        replayed = windows(cfg, train, vae_params, old, run.folder / "latents")[0] if old else None
        state, step = training.make(cfg, train, start_dit, data, train_key, replay=replayed)
        # Training folds in its step numbers; this one it does not reach.
        measure = training.validation(cfg, train, held_out, jax.random.fold_in(train_key, np.uint32(0xFFFFFFFF)))
        filmed = _choose_filmed(new, cfg.chunk)

        def watch(done: int, state: TrainState) -> dict[str, float] | None:
            if not train.validate_every or done % train.validate_every:
                return None
            # The result, so the average where there is one: it is what imagination will use.
            params = {"dit": training.merge_weights(train, state.result, start_dit), "vae": vae_params}
            if filmed:
                _film(cfg, params, filmed, prompt_KL, folder / "films" / f"step-{done:06d}.mp4", train_key)
            return _floats(measure(params["dit"]))

        kept = loop.fit(name, state, step, train.steps, log=run.log, folder=folder, on_step=watch).result
        for k, steps in enumerate(train.own_memory):
            own, both, again = f"{name}-own-{k}", disk.join([old, new]), dataclasses.replace(train, steps=steps)
            params = {"dit": training.merge_weights(train, kept, start_dit), "vae": vae_params}
            seen = list(programs.replay_episodes(cfg, params, both, prompt_KL, key(own, "imagine")))
            recalled = windows(cfg, train, vae_params, both, run.folder / "latents", seen=seen)[0]
            state, step = training.make(cfg, again, start_dit, recalled, key(own), replay=data)
            begun = dataclasses.replace(state, params=kept)  # where the training came to, not where it began
            kept = loop.fit(own, begun, step, steps, log=run.log, folder=folder / own).result
        checkpoint.save(folder / ("dit" if train.lora is None else "adapters"), kept)  # adapters: 3 % of a 5B model
        final = _floats(measure(training.merge_weights(train, kept, start_dit)))  # of what is kept
        run.log.scalars(name, train.steps, final)
        return final | {"windows": data.count}

    def load(folder: pathlib.Path) -> Params:
        cfg, vae_params = vae.value
        return {"dit": load_world(cfg, train, start, folder), "vae": vae_params}

    return run.stage(name, make, load).used_as(for_use)


def _for_use(vae: Product[tuple[WorldConfig, Params]], params: Params) -> Params:
    return world_model.for_use(vae.value[0], params)


def load_world(cfg: WorldConfig, train: WorldTrainConfig, start: Callable[[], Params], folder: pathlib.Path) -> Params:
    """The transformer that a stage left in ``folder``, having started from ``start()``: adapters are folded in."""
    shapes = sharding.describe(world_model.networks(cfg)[0].shapes(), dit.AXES)
    if train.lora is None:
        return checkpoint.restore(folder / "dit", shapes)
    # By shapes: the weights that they sit beside are not read for that.
    like = jax.eval_shape(functools.partial(training.pick_trained, train), shapes, jax.random.key(0))
    kept = checkpoint.restore(folder / "adapters", sharding.describe(like, dit.AXES))
    return training.merge_weights(train, kept, start())


def windows(
    cfg: WorldConfig,
    train: WorldTrainConfig,
    vae_params: Params,
    episodes: Sequence[Episode],
    cache: str | os.PathLike = "",
    *,
    held_out: float = batches.HELD_OUT,
    seen: Sequence[np.ndarray] | None = None,
) -> tuple[Data, Resident]:
    """Windows to learn from and held-out ones, encoded as ``train.latents`` says.

    ``seen`` are the episodes as they were imagined, for ``Windows.seen_ESHWC``.

    Raises:
      ValueError: ``latents="disk"`` without a folder.
    """
    cap = train.start_cap or None
    # Keyframes and refreshes begin anywhere in an episode, so the memory may reach before its first frame.
    layout = Layout(cfg.slots, cfg.chunk, cap, train.stride, True, train.start_share, train.shift)
    # By what fits where: pixels, read step by step or held; or latents, which a folder may keep for other trainings.
    if train.latents == "stream":
        heads = disk.heads(episodes)
        held_E = batches.split(heads, held_out)
        steps_E = np.array([head.steps for head in heads])
        data = latents.WindowStream(stream.Stream(episodes, steps_E, ~held_E, layout, train.stream), vae_params, cfg)
        # Validation draws from memory, so of the held-out side there are as many episodes as may stay there.
        some = [episodes[e] for e in np.flatnonzero(held_E)[:VALIDATED]]
        layout = dataclasses.replace(layout, shift=0)
        kept, none = latents.frames(cfg, vae_params, batches.windows(some or [episodes[0]], layout, val_share=0.0))
        return data, kept if some else none
    cut = batches.windows(episodes, layout, val_share=held_out)
    cut = cut if seen is None else dataclasses.replace(cut, seen_ESHWC=batches.stack(seen))
    if train.latents == "fly":
        return latents.frames(cfg, vae_params, cut)
    if train.latents == "memory":
        return latents.encode_windows(cfg, vae_params, cut)
    if not cache:
        raise ValueError("world training: latents='disk' needs a folder to keep them in, got none")
    return latents.encode_once(cache, cfg, vae_params, cut)


def _choose_filmed(episodes: Sequence[Episode], chunk: int) -> list[Episode]:
    """Some held-out episodes as long as the longest; none where no whole number of chunks fits."""
    heads = disk.heads(episodes)
    longest = max(head.steps for head in heads)
    held_E = batches.split(heads)
    long = [e for e, head in enumerate(heads) if held_E[e] and head.steps == longest]
    # Of equal length, so that one program plays them and one film holds them.
    return [episodes[e] for e in long[:FILMED]] if longest % chunk == 0 else []


def _film(
    cfg: WorldConfig, params: Params, episodes: list[Episode], prompt_KL: Array, path: pathlib.Path, key: Array
) -> None:
    """Writes a film with a row for each episode, the truth on the left, imagination on the right."""
    imagined = programs.replay_episodes(cfg, params, episodes, prompt_KL, key, batch=len(episodes))
    rows = [pixels.side_by_side(*pair) for pair in zip((episode.frame_SHWC for episode in episodes), imagined)]
    pixels.video(path, np.concatenate(rows, axis=1), fps=FILM_FPS)


def _floats(measured: dict[str, Array]) -> dict[str, float]:
    return {name: float(value) for name, value in measured.items()}
