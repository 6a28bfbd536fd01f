"""The closed loop: what a policy is paid for in the learned world, and what the same actions do in the true one.

The actions are chosen on imagined frames, so that only this sees a policy that exploits its world.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax.audit.verdicts import count_verdicts, join
from wovr_jax.data import starts as start_states
from wovr_jax.data.starts import Starts
from wovr_jax.evaluate import summarize_outcomes
from wovr_jax.imagine import imagine
from wovr_jax.policy import vla
from wovr_jax.policy.actions import Codec
from wovr_jax.reward import classifier
from wovr_jax.run.folder import Product, Run
from wovr_jax.run.programs import Improvement
from wovr_jax.run.stages.episodes import Keys
from wovr_jax.run.stages.reward import Judge
from wovr_jax.sim.arena import Arena
from wovr_jax.types import Array, Imagined, Params, Start
from wovr_jax.world import model as world_model
from wovr_jax.world.model import WorldConfig


def close_loop(
    run: Run,
    round_: int,
    world_round: int,
    arena: Arena,
    count: int,
    batch: int,
    cfg: Improvement,
    codec: Callable[[], Codec],
    prompt_KL: Array,
    policy: Product[Params],
    starts: Product[Starts],
    vae: Product[tuple[WorldConfig, Params]],
    world: Product[Params],
    reward: Product[Judge],
    key: Keys,
) -> Product[None]:
    """What a policy is paid for in the learned world, against what the same actions do in truth.

    The policy plays in the learned world as it does when it learns; the true simulator then follows the actions that it
    chose there, from the same states. Success in either world counts up to the end of the true episode.

    Args:
      run: the run.
      round_, world_round: rounds of the policy and of the world model.
      arena: the true environment.
      count: rollouts from episode starts, and from keyframes, each from another one; fewer where there are fewer.
      batch: rollouts at once.
      cfg: the policy and the judge, chunks of a rollout and temperature; the learned world and the learned reward are
        used whatever the policy learns in.
      codec: gives the codec between actions and tokens.
      prompt_KL: (tasks, L) prompt tokens of every task.
      policy: plain weights.
      starts: where rollouts begin.
      vae: the world model's settings, and its VAE.
      world, reward: the learned world and its judge.
      key: of the run, by name.
    """
    name = f"closed-{round_}-in-world-{world_round}"

    def make(folder: pathlib.Path) -> dict[str, Any]:
        del folder  # a few numbers, which are facts
        table, judge = starts.value, reward.value
        roll = roll_in_world(cfg, codec(), vae.value[0])
        # By the world and not by the policy: all that meet in one world begin alike.
        row_K = _draw_distinct(table, key(f"closed-in-world-{world_round}"), count)
        parts = []
        for low in range(0, len(row_K), batch):
            # The last batch is filled up with its own rows, so that one program does.
            row_B = np.resize(row_K[low : low + batch], batch)
            start = start_states.gather(table, jnp.asarray(row_B), prompt_KL)
            parts.append(roll(policy.value, world.value, judge.params, start, key(name, low)))
        rollout = join(parts, len(row_K))
        # (K, N, T, ...) -> (K, S, ...)
        action_KSA, prob_KS = (x.reshape(len(row_K), -1, *x.shape[3:]) for x in (rollout.action_BNTA, rollout.prob_BNT))
        left_K = arena.steps - np.asarray(table.step_K)[row_K]
        live_KS = np.arange(prob_KS.shape[1]) < left_K[:, None]
        true_KS = arena.follow(table, row_K, np.asarray(action_KSA))
        imagined_K, true_K = (np.any(won & live_KS, axis=1) for won in (prob_KS > judge.threshold, true_KS))
        # Those that brought the simulator to a keyframe are true steps too; those after the end of an episode are none.
        steps = int((arena.steps - left_K + live_KS.sum(axis=1)).sum())
        return summarize_closed_loop(imagined_K, true_K, row_K >= table.initials) | {
            "episodes": len(row_K),
            "true_steps": steps * arena.hold,
            "imagined_frames": prob_KS.size,
        }

    return run.stage(name, make, lambda folder: None)


@functools.cache
def roll_in_world(cfg: Improvement, codec: Codec, world: WorldConfig) -> Callable[..., Imagined]:
    """``roll(policy, world, reward, start, key)``: plain weights act in the learned world, before the learned judge."""

    @jax.jit
    def roll(policy_params: Params, params: Params, reward_params: Params, start: Start, key: Array) -> Imagined:
        act = vla.policy(cfg.policy, policy_params, codec, cfg.temperature)
        model, score = world_model.world(world, params), classifier.score(cfg.reward, reward_params)
        return imagine(act, model, score, start, key, chunks=cfg.dream.chunks)

    return roll


def _draw_distinct(table: Starts, key: Array, count: int) -> np.ndarray:
    """Draws ``count`` rows that are episode starts and as many that are keyframes, or all there are, none twice."""
    places = ((0, table.initials), (table.initials, len(table)))
    keys = jax.random.split(key)
    rows = [low + np.asarray(jax.random.permutation(k, high - low))[:count] for k, (low, high) in zip(keys, places)]
    return np.concatenate(rows)


def summarize_closed_loop(imagined_K: np.ndarray, true_K: np.ndarray, keyframe_K: np.ndarray) -> dict[str, Any]:
    """Returns what rollouts chosen in imagination were paid for, ready for JSON: all of them, and by kind of start.

    Args:
      imagined_K, true_K: success of the same actions in either world.
      keyframe_K: whether a rollout began at a keyframe.

    Returns:
      ``all``, ``episode_start`` and ``keyframe``, None where there is no such rollout: the four counts, and rates with
      intervals (``evaluate.summarize_outcomes``) of ``imagined`` and ``true`` success, of ``false_success``, the share
      of true failures that are paid as successes, and of ``precision``, the share of paid successes that are true;
      these two are None where no rollout fails, or none is paid.
    """
    imagined_K, true_K = np.asarray(imagined_K, bool), np.asarray(true_K, bool)

    def summarize(rows_K: np.ndarray) -> dict[str, Any]:
        imagined, true = imagined_K[rows_K], true_K[rows_K]
        counts = count_verdicts(imagined, true)
        shares = {
            "imagined": imagined,
            "true": true,
            "false_success": imagined[~true],
            "precision": true[imagined],
        }
        rates = {name: summarize_outcomes(outcomes) if outcomes.size else None for name, outcomes in shares.items()}
        return {count: counts[count] for count in ("tp", "fp", "fn", "tn")} | rates

    kinds = {"all": np.ones_like(keyframe_K), "episode_start": ~keyframe_K, "keyframe": keyframe_K}
    return {kind: summarize(rows_K) if rows_K.any() else None for kind, rows_K in kinds.items()}
