"""Random scenes of ``sim.relay.table``, to pretrain the policy's towers; windows are drawn by ``sim.tabletop.scenes``.

Nothing here is reached by training: launch/tools/pretrain_tabletop.py draws from it.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from wovr_jax.sim import drawing
from wovr_jax.sim.relay import table as relay
from wovr_jax.sim.relay.table import LID, RelayConfig, RelayState
from wovr_jax.sim.tabletop.scenes import draw_labelled
from wovr_jax.types import Array

OBJECTS, ATTRIBUTES = 7, 9
"""Gripper, three colours of blocks, plate, lid, button; jaws closed, each colour seen, each held, lid held, pressed."""


def draw_scenes(key: Array, batch: int, sim: RelayConfig) -> dict[str, Any]:
    """Random tables, and what is where; the fields of ``policy.towers_train.Scenes``."""
    radii = [drawing.GRIPPER, *[drawing.BLOCK] * 3, sim.plate_radius, relay.LID_HALF, relay.BUTTON]
    return draw_labelled(key, batch, sim, _draw_state, _label, radii)


def _draw_state(key: Array, sim: RelayConfig) -> RelayState:
    """The gripper anywhere or near something, blocks and lid perhaps moved, or one of them held."""
    keys = (jax.random.fold_in(key, i) for i in itertools.count())

    def chance(p: float) -> Array:
        return jax.random.bernoulli(next(keys), p)

    def anywhere() -> Array:
        return jax.random.uniform(next(keys), (2,), minval=0.04, maxval=0.96)

    def near(place: Array) -> Array:
        return jnp.clip(place + 0.1 * jax.random.normal(next(keys), (2,)), 0.04, 0.96)

    def choose(*places: Array) -> Array:
        return jnp.stack(places)[jax.random.randint(next(keys), (), 0, len(places))]

    state = relay.reset(next(keys), sim)
    block, other, lid = state.thing_O2
    moved = choose(anywhere(), near(state.plate), near(state.plate))
    block = jnp.where(chance(0.4), moved, block)
    other = jnp.where(chance(0.15), anywhere(), other)
    lid = choose(lid, state.box, near(lid), near(state.box), anywhere())
    gripper = choose(anywhere(), near(block), near(lid), near(state.plate), near(state.button), near(state.button))
    held = jax.random.choice(next(keys), jnp.array([-1, 0, 1, LID]), p=jnp.array([0.5, 0.25, 0.05, 0.2]))
    # What is held is where the gripper is, and the jaws are closed on it.
    thing_O2 = jnp.where((jnp.arange(3) == held)[:, None], gripper, jnp.stack([block, other, lid]))
    closed = (held >= 0) | chance(0.5)
    return dataclasses.replace(state, gripper=gripper, closed=closed, held=held.astype(jnp.int32), thing_O2=thing_O2)


def _label(state: RelayState, sim: RelayConfig) -> tuple[Array, Array, Array]:
    """Position (7, 2), presence (7,) and attributes (9,) of a scene."""
    # Blocks are labelled by their colour P. One that the lid hides is not in the picture, whatever the state knows.
    seen_P = jnp.zeros(3, bool).at[state.colour_K].set(~relay.hides(state))
    colour_P2 = jnp.full((3, 2), 0.5).at[state.colour_K].set(state.thing_O2[:LID])
    held_P = jnp.zeros(3, bool).at[state.colour_K].set(jnp.arange(LID) == state.held)
    ends = jnp.stack([state.plate, state.thing_O2[LID], state.button])
    position = jnp.concatenate([state.gripper[None], jnp.where(seen_P[:, None], colour_P2, 0.5), ends])
    present = jnp.concatenate([jnp.ones(1, bool), seen_P, jnp.ones(3, bool)])
    last = jnp.stack([state.held == LID, relay.pressed(state, sim)])
    return position, present, jnp.concatenate([state.closed[None], seen_P, held_P, last])
