"""Recorded actions played in the learned world, and how far it strays from what really happened.

Only the first frame is given; every later chunk is imagined from imagined frames. Chunk 1 shows what
one prediction is worth, chunk 16 what is left when errors feed on themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax.core.pixels import side_by_side, to_float, to_uint8
from wovr_jax.core.stats import psnr
from wovr_jax.types import NULL_ACTION, Array, Episode, Params
from wovr_jax.world import model
from wovr_jax.world.model import WorldConfig, WorldState, networks


def recorded(episodes: Sequence[Episode], chunk: int) -> tuple[Array, Array, Array]:
    """First frames (B, H, W, C), actions (B, N, T, A) and true frames (B, N, T, H, W, C) of equally long episodes.

    Raises:
      ValueError: when their length is no whole number of chunks, or differs.
    """
    lengths = {len(episode.action_SA) for episode in episodes}
    if len(lengths) != 1 or min(lengths) % chunk:
        raise ValueError(f"replay: expected episodes of one length, a multiple of {chunk} steps, got {sorted(lengths)}")
    frame_BSHWC = to_float(jnp.asarray(np.stack([episode.frame_SHWC for episode in episodes])))
    action_BSA = jnp.asarray(np.stack([episode.action_SA for episode in episodes]))
    split = lambda x: x.reshape(len(episodes), -1, chunk, *x.shape[2:])  # noqa: E731
    return frame_BSHWC[:, 0], split(action_BSA), split(frame_BSHWC[:, 1:])


@functools.partial(jax.jit, static_argnums=0)
def play(cfg: WorldConfig, params: Params, frame_BHWC: Array, action_BNTA: Array, key: Array) -> Array:
    """The frames (B, N, T, H, W, C) of actions from first frames, in the world with weights ``params``."""
    batch = len(frame_BHWC)
    null_BMA = jnp.broadcast_to(jnp.asarray(NULL_ACTION), (batch, cfg.slots, len(NULL_ACTION)))
    begin = WorldState(frame_BHWC, jnp.repeat(frame_BHWC[:, None], cfg.slots, axis=1), null_BMA)
    world = model.world(cfg, params)

    def chunk(state: WorldState, xs: tuple[Array, Array]) -> tuple[WorldState, Array]:
        n, action_BTA = xs
        key_B = jax.vmap(lambda b: jax.random.fold_in(jax.random.fold_in(key, n), b))(jnp.arange(batch))
        state, frame_BTHWC, _ = world.step(state, action_BTA, key_B)
        return state, frame_BTHWC

    chunks = jnp.arange(action_BNTA.shape[1])
    _, frame_NBTHWC = jax.lax.scan(chunk, begin, (chunks, jnp.swapaxes(action_BNTA, 0, 1)))
    return jnp.swapaxes(frame_NBTHWC, 0, 1)


@functools.partial(jax.jit, static_argnums=0)
def errors(
    cfg: WorldConfig, vae_params: Params, frame_BHWC: Array, true_BNTHWC: Array, seen_BNTHWC: Array
) -> dict[str, Array]:
    """Distance of imagined from true videos with the same first frames, chunk by chunk.

    Returns:
      ``latent_N``, the mean squared difference of the chunk's normalised latents, each video encoded in windows of
      its own (first frame, the M frames before the chunk, the chunk), the same windows whatever ``cfg`` was trained
      to see; ``psnr_N`` in dB, of all pixels of the chunk together.
    """
    known = cfg.context_latents
    encode = lambda window: networks(cfg)[1](vae_params, window, method="encode")[:, known:]  # noqa: E731

    def latent(windows: tuple[Array, Array]) -> Array:
        return jnp.square(encode(windows[0]) - encode(windows[1])).mean()

    pair = (_windows(cfg, frame_BHWC, true_BNTHWC), _windows(cfg, frame_BHWC, seen_BNTHWC))
    pixel_N = jnp.square(true_BNTHWC - seen_BNTHWC).mean(axis=(0, 2, 3, 4, 5))
    return {"latent_N": jax.lax.map(latent, pair), "psnr_N": psnr(pixel_N)}


@functools.partial(jax.jit, static_argnums=0)
def reconstructed(cfg: WorldConfig, vae_params: Params, frame_BHWC: Array, true_BNTHWC: Array) -> Array:
    """The true frames through the VAE and back: what a model without any error of its own would show."""
    _, vae = networks(cfg)

    def chunk(window_BFHWC: Array) -> Array:
        latent_Bfhwc = vae(vae_params, window_BFHWC, method="encode")
        return jnp.clip(vae(vae_params, latent_Bfhwc, method="decode")[:, -cfg.chunk :], -1.0, 1.0)

    return jnp.swapaxes(jax.lax.map(chunk, _windows(cfg, frame_BHWC, true_BNTHWC)), 0, 1)


def _windows(cfg: WorldConfig, frame_BHWC: Array, video_BNTHWC: Array) -> Array:
    """(N, B, F, H, W, C): the window of each chunk, anchor and memory in full."""
    batch, chunks, steps = video_BNTHWC.shape[:3]
    anchor_BFHWC = jnp.repeat(frame_BHWC[:, None], cfg.slots, axis=1)
    all_BFHWC = jnp.concatenate([anchor_BFHWC, video_BNTHWC.reshape(batch, -1, *frame_BHWC.shape[1:])], axis=1)
    place_NF = steps * np.arange(chunks)[:, None] + np.arange(cfg.slots + steps)
    window_BNFHWC = jnp.concatenate(
        [jnp.repeat(frame_BHWC[:, None, None], chunks, axis=1), all_BFHWC[:, place_NF]], axis=2
    )
    return jnp.swapaxes(window_BNFHWC, 0, 1)


def film(frame_BHWC: Array, true_BNTHWC: Array, seen_BNTHWC: Array) -> np.ndarray:
    """uint8 frames (S + 1, B H, 2 W + gap, C): one row an episode, the truth on the left, imagination on the right."""
    halves = []
    for video_BNTHWC in (true_BNTHWC, seen_BNTHWC):
        video_BSHWC = video_BNTHWC.reshape(len(frame_BHWC), -1, *frame_BHWC.shape[1:])
        video_SBHWC = np.moveaxis(to_uint8(jnp.concatenate([frame_BHWC[:, None], video_BSHWC], axis=1)), 1, 0)
        halves.append(video_SBHWC.reshape(len(video_SBHWC), -1, *video_SBHWC.shape[3:]))
    return side_by_side(*halves)
