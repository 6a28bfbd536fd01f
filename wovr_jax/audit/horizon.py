"""Up to which chunk does imagination stay with the truth, when it plays recorded actions from the first frame?

A rollout has diverged in the first chunk in which imagination is not even half as near to the truth as a picture that
stands still. "Half as near" is a skill: one less the squared error over that of the first frame held still (the skill
score of weather forecasts, with persistence as the reference). It asks for no scale of the pictures: a camera that sees
little of what moves has small errors, and a still picture has them too.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from wovr_jax.audit.pictures import compare_frames
from wovr_jax.core import sharding, stats
from wovr_jax.evaluate import summarize_outcomes
from wovr_jax.run import programs
from wovr_jax.run.folder import Product, Run
from wovr_jax.run.stages.episodes import Keys
from wovr_jax.sim.arena import Actor
from wovr_jax.sim.witness import Witness
from wovr_jax.types import Array, Params
from wovr_jax.world import fidelity
from wovr_jax.world.model import WorldConfig

SKILL = 0.5
"""A chunk below this skill has diverged: 1 is the truth itself, 0 no better than the first frame held still."""
EQUAL_DB = 40.0
"""A chunk nearer than this PSNR has not, whatever its skill: where nothing moves a still picture cannot be beaten."""
SURVIVING = 0.9
"""The usable horizon ends before the chunk in which fewer of the rollouts are still with the truth."""


def measure_horizon(
    run: Run,
    world_round: int,
    witness: Witness,
    count: int,
    actor: Actor,
    vae: Product[tuple[WorldConfig, Params]],
    world: Product[Params],
    key: Keys,
) -> Product[None]:
    """Recorded actions of a policy in a learned world, chunk by chunk: PSNR, SSIM, latents, first divergence.

    Args:
      run: the folder that the stage ``horizon-in-world-<round>`` is kept in.
      world_round: round of the world model.
      witness: the true environment.
      count: episodes, from the first start states of the evaluation.
      actor: the policy.
      vae: the world model's settings, and its VAE.
      world: the learned world.
      key: of the run, by name.
    """
    name = f"horizon-in-world-{world_round}"

    def make(folder: pathlib.Path) -> dict[str, Any]:
        del folder  # numbers alone, which are facts
        cfg, vae_params = vae.value
        play, frames, latents = programs.replay(cfg), [], []
        for i, played in enumerate(witness.play(count, actor)):
            action_BNTA, start = jnp.asarray(played.rollout.action_BNTA), played.start
            seen = play(world.value, None, start, action_BNTA, key(name, i)).video_BNTHWC
            assert seen is not None and played.rollout.video_BNTHWC is not None
            # Cut to what was asked for; the last batch is filled up with rows that were counted already.
            videos = sharding.host((start.anchor_BHWC, played.rollout.video_BNTHWC, seen))
            first, true, seen = (jnp.asarray(x[: played.count]) for x in videos)
            frames.append(compare_frames(first, _join_chunks(true), _join_chunks(seen)))
            latents.append((played.count, _measure_latents(cfg, vae_params, first, true, seen)))
        joined = {part: np.concatenate([frame[part] for frame in frames]) for part in frames[0]}
        weights = [n for n, _ in latents]
        mean = {part: np.average([x[part] for _, x in latents], axis=0, weights=weights) for part in latents[0][1]}
        length_B = np.full(len(joined["error"]), witness.steps)
        facts = summarize_horizon(**joined, length_B=length_B, chunk=cfg.chunk)
        facts |= {"latent": mean["latent"].tolist(), "psnr_vae": stats.psnr(mean["vae"]).tolist()}
        steps = count * witness.steps
        return facts | {"episodes": count, "true_steps": steps * witness.hold, "imagined_frames": steps}

    return run.stage(name, make, lambda folder: None)


def summarize_horizon(
    error: np.ndarray, still: np.ndarray, ssim: np.ndarray, length_B: np.ndarray, chunk: int
) -> dict[str, Any]:
    """Returns curves over chunks and the usable horizon, ready for JSON.

    Args:
      error, still, ssim: (B, S) of each step, see ``pictures.compare_frames``.
      length_B: steps of each rollout; what stands behind them does not count.
      chunk: steps of a chunk. Of a rollout that ends inside one the steps that there are make it up.

    Returns:
      ``chunk``, ``rollouts``; by chunk ``n``, the rollouts that reach it, ``psnr`` and ``psnr_still`` in dB, from the
      mean of all their squared errors, ``ssim``, and ``with_truth``, the share that has not diverged up to its end,
      with Wilson's interval; ``first``, how many rollouts diverge first in each chunk; ``never``, how many never do;
      ``horizon``, the chunks up to which at least ``SURVIVING`` are with the truth, and the thresholds.
    """
    batch, chunks = len(length_B), -(-int(length_B.max()) // chunk)
    # (B, S) -> (B, N, T), the last chunk filled up with steps that are not live.
    live_BNT = (np.arange(chunks * chunk) < length_B[:, None]).reshape(batch, chunks, chunk)
    live_BN = np.asarray(live_BNT.any(axis=2))
    error_BN, still_BN, ssim_BN = (average_chunks(value_BS, live_BNT) for value_BS in (error, still, ssim))
    first_B = find_divergence(error_BN, still_BN, live_BN)
    n_N = live_BN.sum(axis=0)
    survivals = [summarize_outcomes(first_B[live_BN[:, n]] > n) for n in range(chunks)]
    lost = [n for n, survival in enumerate(survivals) if survival["rate"] < SURVIVING]
    return {
        "chunk": chunk,
        "rollouts": batch,
        "n": n_N.tolist(),
        "psnr": stats.psnr(error_BN.sum(axis=0, where=live_BN) / n_N).tolist(),
        "psnr_still": stats.psnr(still_BN.sum(axis=0, where=live_BN) / n_N).tolist(),
        "ssim": (ssim_BN.sum(axis=0, where=live_BN) / n_N).tolist(),
        "with_truth": survivals,
        "first": [int((first_B == n).sum()) for n in range(chunks)],
        "never": int((first_B == chunks).sum()),
        "horizon": lost[0] if lost else chunks,
        "thresholds": {"skill": SKILL, "equal_db": EQUAL_DB, "surviving": SURVIVING},
    }


def average_chunks(value_BS: np.ndarray, live_BNT: np.ndarray) -> np.ndarray:
    """Returns (B, N), the mean over the live steps of each chunk, 0 where there are none; S may end inside a chunk."""
    batch, chunks, chunk = live_BNT.shape
    padded_BS = np.zeros((batch, chunks * chunk))
    width = min(value_BS.shape[1], chunks * chunk)
    padded_BS[:, :width] = value_BS[:, :width]
    total_BN = np.where(live_BNT, padded_BS.reshape(live_BNT.shape), 0.0).sum(axis=2)
    return total_BN / np.maximum(live_BNT.sum(axis=2), 1)


def find_divergence(error_BN: np.ndarray, still_BN: np.ndarray, live_BN: np.ndarray) -> np.ndarray:
    """Returns (B,) the first chunk in which each rollout has diverged, from 0; N where it never does."""
    astray_BN = is_astray(error_BN, still_BN, live_BN)
    return np.where(astray_BN.any(axis=1), astray_BN.argmax(axis=1), astray_BN.shape[1])


def is_astray(error_BN: np.ndarray, still_BN: np.ndarray, live_BN: np.ndarray) -> np.ndarray:
    """Returns (B, N), which chunks have diverged.

    Args:
      error_BN, still_BN: mean squared errors of imagination, and of the first frame held still.
      live_BN: which chunks a rollout has.
    """
    return (error_BN > (1 - SKILL) * still_BN) & (stats.psnr(error_BN) < EQUAL_DB) & live_BN


def _measure_latents(cfg: WorldConfig, vae: Params, first: Array, true: Array, seen: Array) -> dict[str, np.ndarray]:
    """Returns by chunk the squared error of latents, and that of the pixels of true frames through the VAE and back."""
    latent_N = fidelity.measure_errors(cfg, vae, first, true, seen)["latent_N"]
    back = fidelity.reconstruct(cfg, vae, first, true)
    return sharding.host({"latent": latent_N, "vae": jnp.square(back - true).mean(axis=(0, 2, 3, 4, 5))})


def _join_chunks(video_BNTHWC: Array) -> Array:
    """Returns (B, S, H, W, C)."""
    return video_BNTHWC.reshape(len(video_BNTHWC), -1, *video_BNTHWC.shape[3:])
