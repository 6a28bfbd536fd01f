"""Recorded actions replayed: what the learned world makes of actions that were chosen in truth.

A policy plays in the true environment, the learned world is given the same actions from the same starts, and their
verdicts are counted. Fidelity, other fingers and films come of the same pairs.
"""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Mapping
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np

from wovr_jax.audit.verdicts import count_verdicts, find_successes, join, read_verdict
from wovr_jax.core import pixels, sharding, stats
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.run import programs
from wovr_jax.run.folder import Product, Run
from wovr_jax.run.recipe import EvaluateConfig
from wovr_jax.run.stages.episodes import Keys
from wovr_jax.run.stages.reward import Judge
from wovr_jax.sim.arena import Actor
from wovr_jax.sim.witness import Witness
from wovr_jax.types import NULL_ACTION, Array, Imagined, Params, Start
from wovr_jax.world.model import WorldConfig

FILM_FPS = 6


def replay(
    run: Run,
    round_: int,
    world_round: int,
    witness: Witness,
    cfg: EvaluateConfig,
    actor: Actor,
    reward_cfg: RewardConfig,
    vae: Product[tuple[WorldConfig, Params]],
    world: Product[Params],
    reward: Product[Judge],
    key: Keys,
) -> Product[None]:
    """The world model's verdict on true rollouts of a policy, whose recorded actions it replays.

    It says how well the world follows what is done in truth, and nothing about what a policy finds in it: those actions
    were not chosen on imagined frames. That is for ``closed_loop``.

    Args:
      run: the run.
      round_, world_round: rounds of the policy and of the world model.
      witness: the true environment.
      cfg: how many episodes, and films of them.
      actor: the policy.
      reward_cfg: the classifier's network.
      vae: the world model's settings, and its VAE.
      world, reward: the learned world and its judge.
      key: of the run, by name.
    """
    name = f"compare-{round_}-in-world-{world_round}"

    def make(folder: pathlib.Path) -> dict[str, Any]:
        judge, play = reward.value, programs.replay(vae.value[0], reward_cfg)
        pairs, loose = [], collections.defaultdict(list)
        # True rollouts first, then the same actions in the learned world: only the world differs.
        for played in witness.play(cfg.compare, actor):

            def imagine(action_BNTA: Any, start: Start = played.start) -> Imagined:
                return play(world.value, judge.params, start, jnp.asarray(action_BNTA), key(name))

            # On the host, for the frames of all episodes together are too many for the device.
            pairs.append(sharding.host((played.rollout, imagine(played.rollout.action_BNTA))))
            # A world model that shows success whatever the fingers do has learned the films and not the physics.
            for how, action_BNTA in loosen_gripper(played.rollout).items():
                loose[how].append(sharding.host(imagine(action_BNTA).prob_BNT))
        # Batches are padded to one size; the padding is cut off here, before anything is counted.
        true, imagined = (join(side, cfg.compare) for side in zip(*pairs, strict=True))
        films = [f"episode-{i}.mp4" for i in range(min(cfg.videos, cfg.compare))]
        for i, film in enumerate(films):
            pixels.video(folder / film, draw_film(true, imagined, i), fps=FILM_FPS)
        frames = cfg.compare * witness.steps
        loose_BNT = {how: np.concatenate(parts)[: cfg.compare] for how, parts in loose.items()}
        return compare_verdicts(true, imagined, loose_BNT, judge.threshold) | {
            "videos": films,
            # What is only read again costs nothing.
            "episodes": cfg.compare if witness.hold else 0,
            "true_steps": frames * witness.hold,
            "imagined_frames": 3 * frames,  # as played, and with the two ways of loosening
        }

    return run.stage(name, make, lambda folder: None)


def measure_fidelity(imagined: Imagined, true: Imagined) -> list[float]:
    """Returns the PSNR (dB) of each chunk between two rollouts of the same actions, both with video.

    The mean is taken over the squared differences of all rollouts and only then turned into dB: so a rollout that went
    astray counts in full, which a mean of ratios would hide.

    Raises:
      ValueError: when either rollout has no video.
    """
    if imagined.video_BNTHWC is None or true.video_BNTHWC is None:
        raise ValueError("fidelity compares frames: make both rollouts with video=True")
    chex.assert_rank(true.video_BNTHWC, 6)
    chex.assert_equal_shape([imagined.video_BNTHWC, true.video_BNTHWC])
    # (B, N, T, H, W, C) -> (B, N) -> (N,)
    error_N = jnp.mean((imagined.video_BNTHWC - true.video_BNTHWC) ** 2, axis=(2, 3, 4, 5)).mean(0)
    return [float(stats.psnr(float(error))) for error in error_N]


def loosen_gripper(rollout: Imagined) -> dict[str, Array]:
    """Returns the actions of a rollout (B, N, T, A) with other fingers, and the arm as it was.

    ``open_fingers`` never close; ``dropped`` let go for good half way between their first closing and the first
    success, or the end. Where a task needs a grasp nothing comes of either: a world model that sees successes there
    has learned from the arm what it should see in the fingers, and a policy would learn from it not to care about them.
    """
    action_BNTA = jnp.asarray(rollout.action_BNTA)
    chex.assert_rank(action_BNTA, 4)
    batch, steps = len(action_BNTA), action_BNTA.shape[1] * action_BNTA.shape[2]

    def first_step(event_BNT: Array) -> Array:
        # (B, N, T) -> (B, S); an event that never comes is put behind the last step.
        event_BS = event_BNT.reshape(batch, steps)
        return jnp.where(event_BS.any(axis=1), event_BS.argmax(axis=1), steps)

    # The gripper closes at commands above 0; see the conventions in types.py.
    closes_B, ends_B = first_step(action_BNTA[..., -1] > 0), first_step(jnp.asarray(read_verdict(rollout)))
    step_NT = jnp.arange(steps).reshape(action_BNTA.shape[1:3])
    # Half way: the hand has the thing by then and has not put it down yet.
    after_BNT = step_NT >= ((closes_B + ends_B) // 2)[:, None, None]
    arm_BNTA, gripper_BNT = action_BNTA[..., :-1], action_BNTA[..., -1]

    def with_gripper(command_BNT: Array) -> Array:
        return jnp.concatenate([arm_BNTA, command_BNT[..., None]], axis=-1)

    return {
        "open_fingers": with_gripper(jnp.full_like(gripper_BNT, NULL_ACTION[-1])),
        "dropped": with_gripper(jnp.where(after_BNT, NULL_ACTION[-1], gripper_BNT)),
    }


def compare_verdicts(
    true: Imagined, imagined: Imagined, loose: Mapping[str, np.ndarray], threshold: float
) -> dict[str, Any]:
    """Returns what imagination said of true rollouts whose actions it played, against what happened.

    Args:
      true, imagined: the two sides, both with video.
      loose: for each entry of :func:`loosen_gripper` the probabilities (B, N, T) that imagination gave.
      threshold: the probability above which a frame counts as success; one such frame makes its episode one.
    """
    every = (imagined.prob_BNT, *loose.values())
    chex.assert_rank(every, 3)
    chex.assert_equal_shape(every)
    # One frame above the threshold is enough, as one success is in the true world.
    imagined_B, *loose_B = (np.any(np.asarray(prob_BNT) > threshold, axis=(1, 2)) for prob_BNT in every)
    return {
        "verdicts": count_verdicts(imagined_B, find_successes(true)),
        "imagined_success": float(imagined_B.mean()),
        "imagined_outcomes": imagined_B.astype(int).tolist(),
        **{how: float(won_B.mean()) for how, won_B in zip(loose, loose_B, strict=True)},
        "psnr": measure_fidelity(imagined, true),
    }


def draw_film(true: Imagined, imagined: Imagined, row: int) -> np.ndarray:
    """Returns uint8 frames (S + 1, H, 2 W + gap, C) of one row: the truth on the left, imagination on the right.

    Raises:
      ValueError: when either rollout has no video.
    """
    halves = []
    for rollout in (true, imagined):
        if rollout.video_BNTHWC is None:
            raise ValueError("a film needs frames: make both rollouts with video=True")
        # (N, T, H, W, C) -> (S, H, W, C), after the frame from which the rollout began.
        video_SHWC = rollout.video_BNTHWC[row].reshape(-1, *rollout.video_BNTHWC.shape[3:])
        halves.append(pixels.to_uint8(np.concatenate([rollout.frame_BNHWC[row, :1], video_SHWC])))
    return pixels.side_by_side(*halves)
