"""Signs that a chunk was imagined wrongly, which need no truth: what others call predictors of hallucination.

All of them are numbers of a chunk that rise with suspicion. They are read off a finished rollout, which determines
what the world model saw before each chunk; inside a rollout they would cost the same network passes.

    round_trip    RMS of the sampled latents against those of their own decoded frames (u_r of nicklashansen/mmbench2)
    by_motion     the same over the RMS by which the latents moved (its u_norm)
    seeds         mean variance of an element of the latents over ``NOISES`` noises (its u_s)
    one_step      RMS of the latents against those of one single Euler step from the same noise: how bent the flow is
    distance      how far the chunk's latents are from those of the true episodes (k nearest neighbours)
    inverse       how far the actions that the frames look like are from those commanded
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from wovr_jax.audit import inverse
from wovr_jax.audit.inverse import InverseConfig
from wovr_jax.types import NULL_ACTION, Array, Params, Start
from wovr_jax.world import model
from wovr_jax.world.model import WorldConfig, WorldState

NAMES = ("round_trip", "by_motion", "seeds", "one_step", "distance", "inverse")
NOISES = 4
"""Samples behind ``seeds``, that of the rollout among them."""
LEAST_MOTION = 1e-3
NEIGHBOURS = 5
AXES = 32
"""Principal axes of the true latents in which distances are taken, each in its own deviation."""


@struct.dataclass
class Known:
    """What the signs compare with, made of true episodes.

    Attributes:
      mean_D: mean of the latents of true chunks, flattened.
      axes_DP: their principal axes, each over its deviation.
      place_XP: the true chunks along them.
      inverse: weights of the inverse dynamics.
      scale_A: deviation of the true actions.
    """

    mean_D: Array
    axes_DP: Array
    place_XP: Array
    inverse: Params
    scale_A: Array


def find_axes(latent_XD: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns ``mean_D``, ``axes_DP`` and ``place_XP`` of true latents, see ``Known``."""
    mean_D = latent_XD.mean(axis=0)
    centred_XD = latent_XD - mean_D
    _, size_P, axes_PD = np.linalg.svd(centred_XD, full_matrices=False)
    count = int(min(AXES, (size_P > 1e-6 * size_P[0]).sum()))
    axes_DP = (axes_PD[:count] / (size_P[:count, None] / np.sqrt(len(latent_XD)))).T
    return mean_D, axes_DP, centred_XD @ axes_DP


@functools.partial(jax.jit, static_argnums=0)
def encode_chunks(cfg: WorldConfig, vae: Params, frame_BFHWC: Array) -> Array:
    """Returns (B, D), the latents of the new frames of whole windows, flattened."""
    latent_Bfhwc = model.networks(cfg)[1](vae, frame_BFHWC, method="encode")
    return latent_Bfhwc[:, cfg.context_latents :].reshape(len(frame_BFHWC), -1)


@functools.cache
def read(cfg: WorldConfig, inverse_cfg: InverseConfig) -> Callable[..., dict[str, Array]]:
    """``read(world, known, start, action_BNTA, video_BNTHWC, key)``: every sign of every chunk, (B, N) each.

    The key is that of the rollout, whose noise is drawn again.
    """

    @jax.jit
    def read(
        params: Params, known: Known, start: Start, action_BNTA: Array, video_BNTHWC: Array, key: Array
    ) -> dict[str, Array]:
        batch, chunks, steps = action_BNTA.shape[:3]
        seen_BSHWC = jnp.concatenate([start.memory_BMHWC, video_BNTHWC.reshape(batch, -1, *video_BNTHWC.shape[3:])], 1)
        played_BSA = jnp.concatenate([start.action_BMA, action_BNTA.reshape(batch, chunks * steps, -1)], axis=1)

        def chunk(n: Array) -> dict[str, Array]:
            before_BMHWC, memory_BMA = (
                jax.lax.dynamic_slice_in_dim(x, n * steps, cfg.slots, axis=1) for x in (seen_BSHWC, played_BSA)
            )
            state, key_B = WorldState(start.anchor_BHWC, before_BMHWC, memory_BMA), noise_keys(key, batch, n)
            given = (cfg, inverse_cfg, params, known, state)
            return _read_chunk(*given, action_BNTA[:, n], video_BNTHWC[:, n], key_B)

        return {name: sign_NB.T for name, sign_NB in jax.lax.map(chunk, jnp.arange(chunks)).items()}

    return read


def noise_keys(key: Array, batch: int, n: Array | int) -> Array:
    """Returns the keys with which ``imagine`` draws the world's noise of chunk ``n``."""

    def row(b: Array) -> Array:
        return jax.random.split(jax.random.fold_in(jax.random.fold_in(key, b), n))[1]

    return jax.vmap(row)(jnp.arange(batch))


def encode_window(cfg: WorldConfig, vae: Params, state: WorldState, frame_BTHWC: Array) -> tuple[Array, Array]:
    """Returns the latents of the context of a chunk, and those of its frames behind that context."""
    window_BFHWC = jnp.concatenate([state.anchor_BHWC[:, None], state.memory_BMHWC, frame_BTHWC], axis=1)
    latent_Bfhwc = model.networks(cfg)[1](vae, model.arrange_frames(window_BFHWC, cfg), method="encode")
    # The VAE is causal: the context's latents are those that the world saw before there was a chunk.
    return latent_Bfhwc[:, : cfg.context_latents], latent_Bfhwc[:, cfg.context_latents :]


def sample_chunk(
    cfg: WorldConfig, dit: Params, context_Bfhwc: Array, state: WorldState, action_BTA: Array, key_B: Array
) -> Array:
    """Samples the latents of a chunk as ``world.model.chunk`` does."""
    null_B1A = jnp.broadcast_to(jnp.asarray(NULL_ACTION), (len(action_BTA), 1, len(NULL_ACTION)))
    action_BFA = jnp.concatenate([null_B1A, state.action_BMA, action_BTA], axis=1)
    height, width, channels = context_Bfhwc.shape[2:]
    noise_Bfhwc = model.draw_noise(cfg, key_B, (height, width, channels))
    return model.sample(cfg, dit, context_Bfhwc, model.arrange_actions(action_BFA, cfg), noise_Bfhwc)


def _read_chunk(
    cfg: WorldConfig,
    inverse_cfg: InverseConfig,
    params: Params,
    known: Known,
    state: WorldState,
    action_BTA: Array,
    frame_BTHWC: Array,
    key_B: Array,
) -> dict[str, Array]:
    """Samples the latents of a chunk again, with other noises and with one step too, and compares."""
    context_Bfhwc, again_Bfhwc = encode_window(cfg, params["vae"], state, frame_BTHWC)

    def sample(cfg: WorldConfig, key_B: Array) -> Array:
        return sample_chunk(cfg, params["dit"], context_Bfhwc, state, action_BTA, key_B)

    new_Bfhwc = sample(cfg, key_B)
    key_KB = jax.vmap(lambda key: jax.random.split(key, NOISES - 1), out_axes=1)(key_B)
    # A world whose noise is fixed by its row gives the same sample again.
    fresh = dataclasses.replace(cfg, noise="folded")
    samples_KBfhwc = jnp.stack([new_Bfhwc, *(sample(fresh, key_KB[k]) for k in range(NOISES - 1))])
    once_Bfhwc = sample(dataclasses.replace(cfg, flow=dataclasses.replace(cfg.flow, steps=1)), key_B)
    moved_Bfhwc = jnp.diff(jnp.concatenate([context_Bfhwc[:, -1:], new_Bfhwc], axis=1), axis=1)
    round_trip_B = _rms(new_Bfhwc - again_Bfhwc)
    frames = jnp.concatenate([state.memory_BMHWC[:, -1:], frame_BTHWC], axis=1)
    return {
        "round_trip": round_trip_B,
        "by_motion": round_trip_B / jnp.maximum(_rms(moved_Bfhwc), LEAST_MOTION),
        "seeds": samples_KBfhwc.var(axis=0, ddof=1).mean(axis=(1, 2, 3, 4)),
        "one_step": _rms(new_Bfhwc - once_Bfhwc),
        "distance": _find_distance(known, new_Bfhwc.reshape(len(new_Bfhwc), -1)),
        "inverse": inverse.disagree(inverse_cfg, known.inverse, frames, action_BTA, known.scale_A),
    }


def _rms(x_Bfhwc: Array) -> Array:
    return jnp.sqrt(jnp.square(x_Bfhwc).mean(axis=(1, 2, 3, 4)))


def _find_distance(known: Known, latent_BD: Array) -> Array:
    """Returns (B,) the mean distance to the nearest true chunks, in deviations."""
    place_BP = (latent_BD - known.mean_D) @ known.axes_DP
    square_BX = jnp.square(place_BP[:, None] - known.place_XP[None]).sum(axis=-1)
    nearest_BK = -jax.lax.top_k(-square_BX, min(NEIGHBOURS, square_BX.shape[1]))[0]
    return jnp.sqrt(nearest_BK).mean(axis=1)
