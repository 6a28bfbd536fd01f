"""Start -> Imagined: the one player. A ``lax.scan`` over chunks, and nothing leaves the device inside it.

Each chunk: the policy samples eight actions from the last frame, the world turns them into
eight frames, the scorer says how likely each frame shows success. The world is the learned
model or the true simulator (``types.World``), and actions are a policy's or recorded ones, so
imagination, collection, evaluation, replays and the ladder are the same loop (WoVR, section 4.2;
episode semantics of RLinf:rlinf/envs/world_model/world_model_wan_env.py, chunk_step).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from wovr_jax.core import sharding
from wovr_jax.types import Array, Imagined, Start, World

Act = Callable[[Array, Array, Array], tuple[Array, Array, Array]]
"""``act(frame_BHWC, prompt_BL, key_B) -> (token_BTA, logp_BTA, action_BTA)``."""

Score = Callable[[Array, Array, Array | None], Array]
"""``score(frame_BTHWC, task_B, truth_BT or None) -> prob_BT``."""


def imagine(
    actor: Act | Array,
    world: World,
    score: Score,
    start: Start,
    key: Array,
    *,
    chunks: int,
    threshold: float = 0.5,
    video: bool = False,
    steps: int | None = None,
) -> Imagined:
    """Rolls a batch of start states forward for ``chunks`` chunks.

    Args:
      actor: a policy, or recorded actions (B, chunks, T, A) to play instead (tokens and
        log-probabilities of the result are then zero).
      world: turns actions into frames.
      score: success probability of each new frame.
      start: B start states.
      key: one PRNG key; each trajectory and chunk gets its own by folding in its index, so a
        row does not depend on the other rows.
      chunks: N, a static number.
      threshold: a frame counts as success when its probability is above this.
      video: whether to keep every new frame (B, N, T, H, W, C).
      steps: of a true episode, of which ``start.step_B`` are over: success after that many is none. None: no deadline.

    Returns:
      ``Imagined`` in the layout (B, N, T).

    Raises:
      ValueError: recorded actions whose shape does not fit ``start`` and ``chunks``.
      AssertionError: parts of ``start``, or results of actor, world or score, of another shape than their names say.
    """
    _check_start(start)
    batch, start = start.task_B.shape[0], sharding.batch(start)
    recorded_NBTA = None if callable(actor) else _time_major(actor, batch, chunks)
    # One key a trajectory, folded from its row and not split: split(key, B) gives other keys for another B.
    key_B = jax.vmap(lambda b: jax.random.fold_in(key, b))(jnp.arange(batch))

    def chunk(carry: tuple[Any, Array], xs: tuple[Array, Array | None]) -> tuple[tuple[Any, Array], dict]:
        state, frame_BHWC = carry
        n, recorded_BTA = xs
        # One key a chunk for the policy and one for the world, also where nobody acts: recorded actions are played
        # under the noise that the world had when the policy chose them.
        keys_B2 = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, n)))(key_B)
        k_policy_B, k_world_B = keys_B2[:, 0], keys_B2[:, 1]
        with jax.named_scope("policy"):
            if recorded_BTA is None:
                assert callable(actor)
                token_BTA, logp_BTA, action_BTA = actor(frame_BHWC, start.prompt_BL, k_policy_B)
            else:
                action_BTA = recorded_BTA
                token_BTA, logp_BTA = jnp.zeros(action_BTA.shape, jnp.int32), jnp.zeros_like(action_BTA)
        with jax.named_scope("world"):
            state, frame_BTHWC, truth_BT = world.step(state, action_BTA, k_world_B)
        with jax.named_scope("score"):
            prob_BT = score(frame_BTHWC, start.task_B, truth_BT)
        _check_chunk(batch, (token_BTA, logp_BTA, action_BTA), frame_BTHWC, (prob_BT, truth_BT))
        # Named as in ``Imagined``: the scan puts the chunks before them, and B and N change places at the end.
        out = {"frame_BNHWC": frame_BHWC, "token_BNTA": token_BTA, "logp_BNTA": logp_BTA, "action_BNTA": action_BTA}
        out |= {"prob_BNT": prob_BT} | ({} if truth_BT is None else {"truth_BNT": truth_BT})
        # Frames are nearly all of a rollout's memory; the learner needs those that the policy saw, one a chunk.
        out |= {"video_BNTHWC": frame_BTHWC} if video else {}
        # The policy is asked again at the last new frame only; what lies before it is the world's own memory.
        return (state, frame_BTHWC[:, -1]), out

    # The anchor (first frame of the episode) and the memory (last frames, and the actions that led to them) go to the
    # world; the policy begins at the newest frame of the memory. At an episode's start all of them are one frame.
    first = (world.begin(start), start.memory_BMHWC[:, -1])
    _, out_NB = jax.lax.scan(chunk, first, (jnp.arange(chunks), recorded_NBTA))
    # (N, B, ...) -> (B, N, ...): the one transpose of the spine
    out = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), out_NB)
    # Strictly above, as thresholds are chosen (``reward.calibrate``). Imagination does not stop at a success: the first
    # frame above ends the episode where rewards are counted.
    success_BNT = out["prob_BNT"] > threshold
    if steps is not None:
        # From the middle of an episode only the rest of it is left, though every rollout has as many chunks.
        out["live_BNT"] = jnp.arange(success_BNT[0].size).reshape(chunks, -1) < (steps - start.step_B)[:, None, None]
        success_BNT &= out["live_BNT"]
    facts = {"prompt_BL": start.prompt_BL, "task_B": start.task_B, "keyframe_B": start.keyframe_B}
    return Imagined(success_BNT=success_BNT, **facts, **out)


def predicate(frame_BTHWC: Array, task_B: Array, truth_BT: Array | None) -> Array:
    """Scores by asking the true simulator instead of a network.

    Raises:
      ValueError: in a world that does not know the truth.
    """
    del frame_BTHWC, task_B
    if truth_BT is None:
        raise ValueError("the true predicate was asked of a world that does not know it; use the simulator or `shadow`")
    return truth_BT.astype(jnp.float32)


def shadow(model: World, simulator: World) -> World:
    """Returns a world with the frames of the model, and the truth of the simulator moved by the same actions.

    Rung (c) of the ladder: the policy sees imagination and is rewarded by what really
    happened.
    """

    def begin(start: Start) -> tuple[Any, Any]:
        return model.begin(start), simulator.begin(start)

    def step(state: tuple[Any, Any], action_BTA: Array, key_B: Array) -> tuple[tuple[Any, Any], Array, Array | None]:
        imagined, frame_BTHWC, _ = model.step(state[0], action_BTA, key_B)
        true, _, truth_BT = simulator.step(state[1], action_BTA, key_B)
        return (imagined, true), frame_BTHWC, truth_BT

    return World(begin=begin, step=step)


def _time_major(action_BNTA: Array, batch: int, chunks: int) -> Array:
    if action_BNTA.ndim != 4 or action_BNTA.shape[:2] != (batch, chunks):
        raise ValueError(
            f"recorded actions: expected ({batch}, {chunks}, T, A) for {batch} start states and chunks={chunks}, "
            f"got {action_BNTA.shape}"
        )
    return jnp.swapaxes(action_BNTA, 0, 1)  # (B, N, T, A) -> (N, B, T, A)


def _check_start(start: Start) -> None:
    """Checks, while the program is traced, that every part has the axes of its name and one batch."""
    batch = start.task_B.shape[:1]
    for field in dataclasses.fields(start):
        if field.name == "sim":  # whatever the simulator carries; the learned world has none
            continue
        part, axes = getattr(start, field.name), field.name.rpartition("_")[2]
        chex.assert_rank(part, len(axes), custom_message=f"imagine: start.{field.name}")
        chex.assert_tree_shape_prefix(part, batch, custom_message=f"imagine: start.{field.name}")


def _check_chunk(
    batch: int, acted: tuple[Array, Array, Array], frame_BTHWC: Array, scored: tuple[Array, Array | None]
) -> None:
    """Checks, while the program is traced, what came from actor, world and score."""
    for part, name in zip(acted, ("token_BTA", "logp_BTA", "action_BTA"), strict=True):
        chex.assert_rank(part, 3, custom_message=f"imagine: {name} of the actor")
        chex.assert_equal(part.shape, acted[2].shape, custom_message=f"imagine: {name} of the actor")
    steps = (batch, acted[2].shape[1])
    chex.assert_rank(frame_BTHWC, 5, custom_message="imagine: frame_BTHWC of the world")
    chex.assert_tree_shape_prefix(frame_BTHWC, steps, custom_message="imagine: frame_BTHWC of the world")
    for part, name in zip(scored, ("prob_BT of the score", "truth_BT of the world"), strict=True):
        if part is not None:
            chex.assert_shape(part, steps, custom_message=f"imagine: {name}")
