"""How far imagined chunks are from true ones, and how far the VAE alone is: for who looks at a finished world model."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax.core.stats import psnr
from wovr_jax.types import Array, Params
from wovr_jax.world.model import WorldConfig, networks


@functools.partial(jax.jit, static_argnums=0)
def measure_errors(
    cfg: WorldConfig, vae_params: Params, frame_BHWC: Array, true_BNTHWC: Array, seen_BNTHWC: Array
) -> dict[str, Array]:
    """Measures the distance of imagined from true videos with the same first frames, chunk by chunk.

    Returns:
      ``latent_N``, the mean squared difference of the chunk's normalised latents, each video encoded in windows of
      its own (first frame, the M frames before the chunk, the chunk), the same windows whatever ``cfg`` was trained
      to see; ``psnr_N`` in dB, of all pixels of the chunk together.
    """

    def encode(window_BFHWC: Array) -> Array:
        # The first latents are those of anchor and memory; only those of the chunk itself are compared.
        return networks(cfg)[1](vae_params, window_BFHWC, method="encode")[:, cfg.context_latents :]

    def latent(windows: tuple[Array, Array]) -> Array:
        return jnp.square(encode(windows[0]) - encode(windows[1])).mean()

    # (B, N, T, H, W, C) -> (N,): the mean comes before the logarithm, so that a bad rollout counts in full.
    pixel_N = jnp.square(true_BNTHWC - seen_BNTHWC).mean(axis=(0, 2, 3, 4, 5))
    pair = (_cut_windows(cfg, frame_BHWC, true_BNTHWC), _cut_windows(cfg, frame_BHWC, seen_BNTHWC))
    # Chunk by chunk: all windows of a long video at once would not fit into memory.
    return {"latent_N": jax.lax.map(latent, pair), "psnr_N": psnr(pixel_N)}


@functools.partial(jax.jit, static_argnums=0)
def reconstruct(cfg: WorldConfig, vae_params: Params, frame_BHWC: Array, true_BNTHWC: Array) -> Array:
    """Puts the true frames through the VAE and back: what a model without any error of its own would show."""
    _, vae = networks(cfg)

    def chunk(window_BFHWC: Array) -> Array:
        # The whole window goes through, as the VAE looks back in time, and the chunk at its end is kept.
        latent_Bfhwc = vae(vae_params, window_BFHWC, method="encode")
        return jnp.clip(vae(vae_params, latent_Bfhwc, method="decode")[:, -cfg.chunk :], -1.0, 1.0)

    # (N, B, T, H, W, C) -> (B, N, T, H, W, C)
    return jnp.swapaxes(jax.lax.map(chunk, _cut_windows(cfg, frame_BHWC, true_BNTHWC)), 0, 1)


def _cut_windows(cfg: WorldConfig, frame_BHWC: Array, video_BNTHWC: Array) -> Array:
    """Cuts (N, B, F, H, W, C): the window of each chunk, anchor and memory in full."""
    batch, chunks, steps = video_BNTHWC.shape[:3]
    # Before the first chunk the memory is the first frame again and again, so there are as many of it in front.
    anchor_BFHWC = jnp.repeat(frame_BHWC[:, None], cfg.slots, axis=1)
    all_BFHWC = jnp.concatenate([anchor_BFHWC, video_BNTHWC.reshape(batch, -1, *frame_BHWC.shape[1:])], axis=1)
    # Chunk n sees the frames that end where it does; with the padding in front they begin at n * T.
    place_NF = steps * np.arange(chunks)[:, None] + np.arange(cfg.slots + steps)
    window_BNFHWC = jnp.concatenate(
        [jnp.repeat(frame_BHWC[:, None, None], chunks, axis=1), all_BFHWC[:, place_NF]], axis=2
    )
    return jnp.swapaxes(window_BNFHWC, 0, 1)
