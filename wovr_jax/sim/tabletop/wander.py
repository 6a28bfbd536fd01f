"""Scripted episodes that never come to rest, for studies of the world model. Training does not import this file."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from wovr_jax.sim.tabletop import table as tabletop
from wovr_jax.sim.tabletop.expert import ExpertConfig, ExpertState, act, disturb
from wovr_jax.sim.tabletop.table import TabletopConfig, TabletopState
from wovr_jax.types import ACTION_DIM, Array


def wander(seed: Array, key: Array, cfg: ExpertConfig, sim: TabletopConfig) -> tuple[TabletopState, Array, Array]:
    """Plays like ``embedded.demonstrate``, without flaws or an end: once the block lies at its goal, the goal moves.

    The first goal is the plate, every later one anywhere on the table. However long the episode, something moves in
    it, which is what a world model is to be asked about at a late chunk. An expert shows few of the motions there are
    (open jaws always go to the block); a share of strolls shows the others.
    """
    first = tabletop.reset(jax.random.key(seed), sim)
    flawless = ExpertState(release=jnp.array(0.0), idle=jnp.array(False))
    k_kind, k_walk = jax.random.split(jax.random.fold_in(key, 1))
    # Both are computed for every episode and one is chosen: under ``vmap`` there is one program for all.
    strolls, walk_SA = jax.random.bernoulli(k_kind, cfg.stroll_share), _stroll(k_walk, sim)

    def body(
        carry: tuple[Array, TabletopState], xs: tuple[Array, Array]
    ) -> tuple[tuple[Array, TabletopState], tuple[TabletopState, Array, Array]]:
        (goal, state), (key, walk_A) = carry, xs
        k_goal, k_noise = jax.random.split(key)
        # The expert is shown a plate that lies at the goal; the true plate stays where it is drawn.
        arrived = tabletop.success(dataclasses.replace(state, plate=goal), sim)
        goal = jnp.where(arrived, jax.random.uniform(k_goal, (2,), minval=0.15, maxval=0.85), goal)
        _, label = act(flawless, dataclasses.replace(state, plate=goal), cfg, sim)
        label = jnp.where(strolls, walk_A, label)
        executed = disturb(label, k_noise, cfg)
        after = tabletop.step(state, executed, sim)
        return (goal, after), (after, label, executed)

    xs = (jax.random.split(key, sim.horizon), walk_SA)
    _, (states, label_SA, action_SA) = jax.lax.scan(body, (first.plate, first), xs)
    states = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, states)
    return states, label_SA, action_SA


def _stroll(key: Array, sim: TabletopConfig, hold: int = 4) -> Array:
    """Draws (S, A): a push in any direction and a command to the jaws, each held for ``hold`` steps."""
    k_push, k_jaws = jax.random.split(key)
    count = sim.horizon // hold + 1  # one more than needed where ``hold`` divides the horizon
    push = jax.random.uniform(k_push, (count, 2), minval=-1.0, maxval=1.0)
    jaws = jnp.where(jax.random.bernoulli(k_jaws, 0.4, (count,)), 1.0, -1.0)
    action = jnp.zeros((count, ACTION_DIM)).at[:, :2].set(push).at[:, 6].set(jaws)
    return action.repeat(hold, axis=0)[: sim.horizon]
