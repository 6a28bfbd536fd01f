"""How far imagination strays when it plays recorded actions from the first frame (open loop).

Only the first frame is given; every later chunk is imagined from imagined frames. Chunk 1 shows what
one prediction is worth, chunk 16 what is left when errors feed on themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax.core.pixels import to_float
from wovr_jax.core.stats import psnr
from wovr_jax.run import programs
from wovr_jax.types import NULL_ACTION, Array, Episode, Params, Start
from wovr_jax.world.model import WorldConfig, networks


def stack_episodes(episodes: Sequence[Episode], chunk: int) -> tuple[Array, Array, Array]:
    """Stacks episodes of one length: first frames (B, H, W, C), actions (B, N, T, A), true frames (B, N, T, H, W, C).

    Raises:
      ValueError: when their length is no whole number of chunks, or differs.
    """
    lengths = {len(episode.action_SA) for episode in episodes}
    if len(lengths) != 1 or min(lengths) % chunk:
        raise ValueError(f"replay: expected episodes of one length, a multiple of {chunk} steps, got {sorted(lengths)}")
    frame_BSHWC = to_float(jnp.asarray(np.stack([episode.frame_SHWC for episode in episodes])))
    action_BSA = jnp.asarray(np.stack([episode.action_SA for episode in episodes]))
    # (B, S, ...) -> (B, N, T, ...)
    action_BNTA, frame_BNTHWC = (
        x.reshape(len(episodes), -1, chunk, *x.shape[2:]) for x in (action_BSA, frame_BSHWC[:, 1:])
    )
    return frame_BSHWC[:, 0], action_BNTA, frame_BNTHWC


def play(cfg: WorldConfig, params: Params, frame_BHWC: Array, action_BNTA: Array, key: Array) -> Array:
    """Returns the frames (B, N, T, H, W, C) of actions from first frames, in the world with weights ``params``."""
    batch = len(frame_BHWC)
    none_B = jnp.zeros(batch, jnp.int32)
    # As at the reset of an episode: the memory is the first frame, held still under the null action.
    start = Start(
        anchor_BHWC=frame_BHWC,
        memory_BMHWC=jnp.repeat(frame_BHWC[:, None], cfg.slots, axis=1),
        action_BMA=jnp.broadcast_to(jnp.asarray(NULL_ACTION), (batch, cfg.slots, len(NULL_ACTION))),
        prompt_BL=none_B[:, None],  # nobody reads it: the actions are recorded
        task_B=none_B,
        keyframe_B=none_B > 0,
        step_B=none_B,
    )
    video_BNTHWC = programs.replay(cfg)(params, None, start, action_BNTA, key).video_BNTHWC
    assert video_BNTHWC is not None
    return video_BNTHWC


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
