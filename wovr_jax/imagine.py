"""Start -> Imagined: one ``lax.scan`` over chunks, nothing leaves the device inside it.

Each chunk: the policy samples eight actions from the last frame, the world turns them into
eight frames, the scorer says how likely each frame shows success. The world is the learned
model or the true simulator (``types.World``), so imagination, collection, evaluation and
the ladder are the same loop (WoVR, section 4.2; episode semantics of
RLinf:rlinf/envs/world_model/world_model_wan_env.py, chunk_step).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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

    Returns:
      ``Imagined`` in the layout (B, N, T).

    Raises:
      ValueError: recorded actions whose shape does not fit ``start`` and ``chunks``.
    """
    batch, start = start.task_B.shape[0], sharding.batch(start)
    recorded_NBTA = None if callable(actor) else _time_major(actor, batch, chunks)
    key_B = jax.vmap(lambda b: jax.random.fold_in(key, b))(jnp.arange(batch))

    def chunk(carry: tuple[Any, Array], xs: tuple[Array, Array | None]) -> tuple[tuple[Any, Array], dict]:
        state, frame_BHWC = carry
        n, recorded_BTA = xs
        k_policy_B, k_world_B = _split(key_B, n)
        if recorded_BTA is None:
            assert callable(actor)
            token_BTA, logp_BTA, action_BTA = actor(frame_BHWC, start.prompt_BL, k_policy_B)
        else:
            action_BTA = recorded_BTA
            token_BTA, logp_BTA = jnp.zeros(action_BTA.shape, jnp.int32), jnp.zeros_like(action_BTA)
        state, frame_BTHWC, truth_BT = world.step(state, action_BTA, k_world_B)
        prob_BT = score(frame_BTHWC, start.task_B, truth_BT)
        out = {"frame": frame_BHWC, "token": token_BTA, "logp": logp_BTA, "action": action_BTA, "prob": prob_BT}
        out |= {} if truth_BT is None else {"truth": truth_BT}
        out |= {"video": frame_BTHWC} if video else {}
        return (state, frame_BTHWC[:, -1]), out

    first = (world.begin(start), start.memory_BMHWC[:, -1])
    _, out_NB = jax.lax.scan(chunk, first, (jnp.arange(chunks), recorded_NBTA))
    out = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), out_NB)  # the one transpose of the spine
    return Imagined(
        frame_BNHWC=out["frame"],
        prompt_BL=start.prompt_BL,
        task_B=start.task_B,
        token_BNTA=out["token"],
        logp_BNTA=out["logp"],
        action_BNTA=out["action"],
        prob_BNT=out["prob"],
        success_BNT=out["prob"] > threshold,
        truth_BNT=out.get("truth"),
        video_BNTHWC=out.get("video"),
    )


def predicate(frame_BTHWC: Array, task_B: Array, truth_BT: Array | None) -> Array:
    """A scorer that asks the true simulator instead of a network."""
    del frame_BTHWC, task_B
    if truth_BT is None:
        raise ValueError(
            "the true predicate was asked of a world that does not know it; use the simulator or `shadowed`"
        )
    return truth_BT.astype(jnp.float32)


def shadowed(model: World, simulator: World) -> World:
    """The frames of the model, the truth of the simulator moved by the same actions.

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


def _split(key_B: Array, n: Array) -> tuple[Array, Array]:
    """Policy and world keys of chunk ``n``, one pair for each trajectory."""
    keys_B2 = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, n)))(key_B)
    return keys_B2[:, 0], keys_B2[:, 1]


def _time_major(action_BNTA: Array, batch: int, chunks: int) -> Array:
    if action_BNTA.ndim != 4 or action_BNTA.shape[:2] != (batch, chunks):
        raise ValueError(
            f"recorded actions: expected ({batch}, {chunks}, T, A) for {batch} start states and chunks={chunks}, "
            f"got {action_BNTA.shape}"
        )
    return jnp.swapaxes(action_BNTA, 0, 1)
