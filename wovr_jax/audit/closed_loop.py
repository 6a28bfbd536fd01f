"""The closed loop: what a policy is paid for in the learned world, and what the same actions do in the true one.

The actions are chosen on imagined frames, so that only this sees a policy that exploits its world. Every chunk is also
imagined anew from the true frames before it, under the same actions (teacher forcing): what is paid even then was got
wrong in the chunk that pays, and what is not, in one before it.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax.audit.verdicts import count_verdicts, join
from wovr_jax.core import sharding
from wovr_jax.data import starts as start_states
from wovr_jax.data.starts import Starts
from wovr_jax.evaluate import summarize_outcomes
from wovr_jax.imagine import imagine
from wovr_jax.policy import vla
from wovr_jax.policy.actions import Codec
from wovr_jax.reward import classifier
from wovr_jax.run import programs
from wovr_jax.run.bind import Products
from wovr_jax.run.folder import Product, Run
from wovr_jax.run.programs import Improvement
from wovr_jax.run.recipe import Recipe
from wovr_jax.run.stages.episodes import Keys, join_rounds
from wovr_jax.run.stages.reward import Judge
from wovr_jax.sim.witness import Witness
from wovr_jax.types import Array, Imagined, Params, Start
from wovr_jax.world import model as world_model
from wovr_jax.world.model import WorldConfig


def close_loop(
    run: Run,
    round_: int,
    world_round: int,
    witness: Witness,
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
    chose there, from the same states, and films them; each chunk is imagined and judged again from the true frames
    before it. Success counts up to the end of the true episode everywhere.

    Args:
      run: the run.
      round_, world_round: rounds of the policy and of the world model.
      witness: the true environment.
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
        row_K = draw_distinct(table, key(f"closed-in-world-{world_round}"), count)
        parts = []
        for low in range(0, len(row_K), batch):
            # The last batch is filled up with its own rows, so that one program does.
            row_B = np.resize(row_K[low : low + batch], batch)
            start = start_states.gather(table, jnp.asarray(row_B), prompt_KL)
            parts.append(roll(policy.value, world.value, judge.params, start, key(name, low)))
        rollout = join(parts, len(row_K))
        # (K, N, T, ...) -> (K, S, ...)
        action_KSA, prob_KS = (x.reshape(len(row_K), -1, *x.shape[3:]) for x in (rollout.action_BNTA, rollout.prob_BNT))
        left_K = witness.steps - np.asarray(table.step_K)[row_K]
        live_KS = np.arange(prob_KS.shape[1]) < left_K[:, None]
        true_KS, frame_KSHWC = witness.follow(table, row_K, np.asarray(action_KSA), film=True)
        assert frame_KSHWC is not None
        replay = programs.replay(vae.value[0], cfg.reward)
        forced_KS = _force(
            lambda start, action_BNTA, low: replay(
                world.value, judge.params, start, action_BNTA, key(f"{name}-forced", low)
            ),
            *(table, row_K, np.asarray(rollout.action_BNTA), frame_KSHWC, prompt_KL, batch),
        )
        won = (prob_KS > judge.threshold, true_KS, forced_KS > judge.threshold)
        imagined_K, true_K, forced_K = (np.any(won_KS & live_KS, axis=1) for won_KS in won)
        # Those that brought the simulator to a keyframe are true steps too; those after the end of an episode are none.
        steps = int((witness.steps - left_K + live_KS.sum(axis=1)).sum())
        return summarize_closed_loop(imagined_K, true_K, forced_K, row_K >= table.initials) | {
            "episodes": len(row_K),
            "true_steps": steps * witness.hold,
            "imagined_frames": 2 * prob_KS.size,
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


def _force(
    play: Callable[[Start, Array, int], Imagined],
    table: Starts,
    row_K: np.ndarray,
    action_KNTA: np.ndarray,
    frame_KSHWC: np.ndarray,
    prompt_KL: Array,
    batch: int,
) -> np.ndarray:
    """Returns (K, S) success probabilities of chunks each of which is imagined from the true frames before it.

    Args:
      play: ``play(start, action_BNTA, low)``: the learned world and its judge; ``low`` tells the batches apart.
      table, row_K: start states, and which of them the rollouts began from.
      action_KNTA: what was played.
      frame_KSHWC: uint8, what the true camera saw after each action.
      prompt_KL: (tasks, L) prompt tokens of every task.
      batch: rollouts at once.
    """
    begun = jax.tree.map(lambda column_K: np.asarray(column_K)[row_K], table)
    count, chunks, steps = action_KNTA.shape[:3]
    action_KSA = action_KNTA.reshape(count, chunks * steps, -1)
    seen_KSHWC = np.concatenate([begun.memory_KMHWC, frame_KSHWC], axis=1)
    played_KSA = np.concatenate([begun.action_KMA, action_KSA], axis=1)
    prob_NKT = []
    for n in range(chunks):
        # The M frames up to the chunk; of those of the first one the table knows all.
        memory = np.arange(begun.memory_KMHWC.shape[1]) + n * steps
        moment = dataclasses.replace(
            begun, memory_KMHWC=seen_KSHWC[:, memory], action_KMA=played_KSA[:, memory], step_K=begun.step_K + n * steps
        )
        parts = []
        for low in range(0, count, batch):
            part_B = np.resize(np.arange(low, min(low + batch, count)), batch)
            start = start_states.gather(moment, jnp.asarray(part_B), prompt_KL)
            parts.append(
                sharding.host(play(start, jnp.asarray(action_KNTA[part_B, n : n + 1]), n * count + low).prob_BNT)
            )
        prob_NKT.append(np.concatenate(parts)[:count, 0])
    return np.concatenate(prob_NKT, axis=1)


def find_starts(world: int, recipe: Recipe, made: Products) -> Product[Starts]:
    """Returns the newest start states of when a world was made."""
    if made.starts:
        return made.starts[world]
    # An arena that explores has no start states of its own; what was collected for its world model began somewhere.
    begun = made.rollouts[: world + 1]
    return Product(lambda: start_states.initial(join_rounds(begun), memory=recipe.world.slots))


def draw_distinct(table: Starts, key: Array, count: int) -> np.ndarray:
    """Draws ``count`` rows that are episode starts and as many that are keyframes, or all there are, none twice."""
    places = ((0, table.initials), (table.initials, len(table)))
    keys = jax.random.split(key)
    rows = [low + np.asarray(jax.random.permutation(k, high - low))[:count] for k, (low, high) in zip(keys, places)]
    return np.concatenate(rows)


def summarize_closed_loop(
    imagined_K: np.ndarray, true_K: np.ndarray, forced_K: np.ndarray, keyframe_K: np.ndarray
) -> dict[str, Any]:
    """Returns what rollouts chosen in imagination were paid for, ready for JSON: all of them, and by kind of start.

    Args:
      imagined_K, true_K: success of the same actions in either world.
      forced_K: success where each chunk is imagined from the true frames before it.
      keyframe_K: whether a rollout began at a keyframe.

    Returns:
      ``all``, ``episode_start`` and ``keyframe``, None where there is no such rollout: the four counts, and rates with
      intervals (``evaluate.summarize_outcomes``) of ``imagined`` and ``true`` success, of ``false_success``, the share
      of true failures that are paid as successes, of ``forced_false_success``, the same for ``forced_K``, and of
      ``precision``, the share of paid successes that are true; these are None where no rollout fails, or none is paid.
    """
    imagined_K, true_K, forced_K = (np.asarray(won_K, bool) for won_K in (imagined_K, true_K, forced_K))

    def summarize(rows_K: np.ndarray) -> dict[str, Any]:
        imagined, true = imagined_K[rows_K], true_K[rows_K]
        counts = count_verdicts(imagined, true)
        shares = {
            "imagined": imagined,
            "true": true,
            "false_success": imagined[~true],
            "forced_false_success": forced_K[rows_K][~true],
            "precision": true[imagined],
        }
        rates = {name: summarize_outcomes(outcomes) if outcomes.size else None for name, outcomes in shares.items()}
        return {count: counts[count] for count in ("tp", "fp", "fn", "tn")} | rates

    kinds = {"all": np.ones_like(keyframe_K), "episode_start": ~keyframe_K, "keyframe": keyframe_K}
    return {kind: summarize(rows_K) if rows_K.any() else None for kind, rows_K in kinds.items()}
