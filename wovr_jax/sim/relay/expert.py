"""A scripted expert for ``sim.relay.table``: as digital and as noisy as the table's, and without flaws."""

from __future__ import annotations

import jax.numpy as jnp

from wovr_jax.sim.relay import table as relay
from wovr_jax.sim.relay.table import HOME, LID, RelayConfig, RelayState, distance
from wovr_jax.sim.tabletop.expert import ExpertConfig, move_digitally
from wovr_jax.types import ACTION_DIM, Array

CLEAR = 0.23
"""A lid whose centre is farther from a thing than this leaves it wholly free."""


def begin(key: Array, cfg: ExpertConfig) -> Array:
    """Returns what the expert carries through an episode: whether it has succeeded."""
    del key, cfg  # nothing of it is drawn
    return jnp.array(False)


def act(done: Array, state: RelayState, cfg: ExpertConfig, sim: RelayConfig) -> tuple[Array, Array]:
    """Returns the clean action (7,) for a state: lid aside, block to the plate, button; afterwards away from it."""
    block, lid, placed = state.thing_O2[0], state.thing_O2[LID], relay.placed(state, sim)
    done = done | relay.success(state, sim)
    target = jnp.where(placed, state.button, block)
    covered = distance(lid, target) < CLEAR
    # Back to where the lid came from, or to the farther side where what is to be freed lies there.
    side = jnp.where(target[0] > 0.5, jnp.array([0.15, 0.35]), jnp.array([0.85, 0.35]))
    aside = jnp.where(distance(HOME, target) > CLEAR, HOME, side)
    away = jnp.where(state.button[0] > 0.5, jnp.array([0.2, 0.5]), jnp.array([0.8, 0.5]))

    free, holds_block, holds_lid = state.held < 0, state.held == 0, state.held == LID
    goal = jnp.where(covered, lid, target)
    goal = jnp.where(holds_block, state.plate, jnp.where(holds_lid, aside, goal))
    goal = jnp.where(done, away, goal)
    # Well within each radius, since noise moves the gripper before the jaws act.
    near = jnp.where(placed & ~covered, 0.6 * sim.press_radius, 0.6 * sim.grasp_radius)
    near = jnp.where(holds_block, 0.5 * sim.success_radius, near)
    there = distance(goal, state.gripper) < near

    # Things are taken and let go at rest, and so is the wrong one, at once; the lid as soon as the target is free.
    lets_go = (holds_block & there) | (holds_lid & ~covered) | (state.held == 1)
    rest = lets_go | (free & there)
    move = jnp.where(rest, 0.0, move_digitally((goal - state.gripper) / sim.max_move, cfg))
    # Closed jaws on the way from the button: with open ones that picture would be the same as on the way to it.
    grip = ((~free | there) & ~lets_go) | done
    return done, jnp.zeros(ACTION_DIM).at[:2].set(move).at[6].set(jnp.where(grip, 1.0, -1.0))
