"""Random windows of the embedded simulators and scenes of the table, to pretrain the parts that the package ships.

Nothing here is reached by training: launch/tools/pretrain_tabletop.py draws from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from wovr_jax.core.pixels import split_views
from wovr_jax.sim import drawing, embedded
from wovr_jax.sim.embedded import Simulator, suite_of
from wovr_jax.sim.tabletop import table as tabletop
from wovr_jax.sim.tabletop.expert import ExpertConfig
from wovr_jax.sim.tabletop.table import TabletopConfig, TabletopState
from wovr_jax.types import Array

CLEAN, NOISY = ExpertConfig(flawed_share=0.5), ExpertConfig(noise=0.7, flip=0.1)
ACTORS = (0.45, 0.35, 0.2)
"""Shares of the expert (flawed or not), the expert under heavy noise, and a random walk."""


def draw_windows(key: Array, batch: int, sim: Simulator, frames: int = 13, memory: int = 4) -> Array:
    """(batch * V, frames, size, size, 3): the anchor, ``memory`` frames up to a random moment, and those after it.

    V is 2, one view behind the other, where the table has a second camera, else 1.

    Three actors, as a policy in training does a bit of each. Half of the tables are cluttered. A sixth of the windows
    begin at the episode's start, where the memory is copies of the anchor.
    """
    k_seed, k_actor, k_kind, k_at, k_first = jax.random.split(key, 5)
    new = frames - 1 - memory
    at_B = jax.random.randint(k_at, (batch,), 0, sim.horizon - new + 1)
    at_B = jnp.where(jax.random.bernoulli(k_first, 1 / 6, (batch,)), 0, at_B)
    seed_B = jax.random.randint(k_seed, (batch,), 0, jnp.iinfo(jnp.int32).max)
    tables = _variants(sim)
    # Each actor on each table.
    share = jnp.array(ACTORS).repeat(len(tables)) / len(tables)
    kind_B = jax.random.choice(k_kind, len(share), (batch,), p=share)

    def draw(seed: Array, key: Array, kind: Array, at: Array) -> Array:
        states = jax.tree.map(lambda leaf: leaf[kind], _play_all(seed, key, tables))
        # A memory that would reach before the episode is filled with its first frame.
        index_F = jnp.maximum(at + jnp.arange(1 - memory, new + 1), 0)
        index_F = jnp.concatenate([jnp.zeros(1, index_F.dtype), index_F])
        window = jax.tree.map(lambda leaf: leaf[index_F], states)
        return jax.vmap(lambda state: suite_of(sim).render(state, sim))(window)

    frame_BFHWC = jax.vmap(draw)(seed_B, jax.random.split(k_actor, batch), kind_B, at_B)
    view_BVFHHC = split_views(frame_BFHWC, getattr(sim, "views", 1)).swapaxes(1, 2)
    return view_BVFHHC.reshape(-1, *view_BVFHHC.shape[2:])


def _variants(sim: Simulator) -> list[Simulator]:
    """The table without clutter and with it; another simulator as it is."""
    if not isinstance(sim, TabletopConfig):
        return [sim]
    return [dataclasses.replace(sim, clutter=clutter) for clutter in (False, True)]


def _play_all(seed: Array, key: Array, tables: Sequence[Simulator]) -> Any:
    """Three actors, each on each table: leaves (actors x tables, horizon + 1, ...)."""
    played = []
    for cfg in (CLEAN, NOISY):
        played += [embedded.demonstrate(seed, key, cfg, table)[0] for table in tables]
    played += [_walk(seed, key, table) for table in tables]
    return jax.tree.map(lambda *leaf: jnp.stack(leaf), *played)


def _walk(seed: Array, key: Array, sim: Simulator) -> Any:
    """A walk that keeps its direction and its jaws for four steps at a time."""
    first = suite_of(sim).reset(jax.random.key(seed), sim)
    k_push, k_jaws = jax.random.split(key)
    push = jax.random.normal(k_push, (sim.horizon // 4 + 1, 2)).repeat(4, axis=0)[: sim.horizon]
    jaws = jnp.where(jax.random.bernoulli(k_jaws, 0.4, (sim.horizon // 4 + 1,)), 1.0, -1.0).repeat(4)[: sim.horizon]
    action_SA = jnp.zeros((sim.horizon, 7)).at[:, :2].set(push).at[:, 6].set(jaws)
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, embedded.roll(first, action_SA, sim))


def draw_scenes(key: Array, batch: int, sim: TabletopConfig) -> dict[str, Any]:
    """Random tables, and what is where: gripper, three colours of blocks, plate; jaws closed, colour there, held.

    Returns:
      The fields of ``policy.towers_train.Scenes``.
    """
    radii = [drawing.GRIPPER, *[drawing.BLOCK] * 3, sim.plate_radius]
    return draw_labelled(key, batch, sim, _draw_state, _label, radii)


def draw_labelled(
    key: Array, batch: int, sim: Simulator, draw: Callable, label: Callable, radii: Sequence[float]
) -> dict[str, Any]:
    """Draws states with ``draw(key, sim)``, renders them, and labels them with ``label(state, sim)``."""
    state_B = jax.vmap(lambda k: draw(k, sim))(jax.random.split(key, batch))
    frame_BHWC = jax.vmap(lambda state: suite_of(sim).render(state, sim))(state_B)
    position_BO2, present_BO, attribute_BE = jax.vmap(lambda state: label(state, sim))(state_B)
    return {
        # Rounded to what an 8-bit picture can hold, as every frame is that comes from a disk.
        "frame_BHWC": jnp.round((frame_BHWC + 1.0) * 127.5) / 127.5 - 1.0,
        "position_BO2": position_BO2,
        "present_BO": present_BO,
        "attribute_BE": attribute_BE,
        "radius_O": jnp.array(radii),
    }


def _draw_state(key: Array, sim: TabletopConfig) -> TabletopState:
    """One block or two; the gripper anywhere or near something, a block perhaps moved or held."""
    keys = iter(jax.random.split(key, 12))

    def chance(p: float) -> Array:
        return jax.random.bernoulli(next(keys), p)

    def anywhere() -> Array:
        return jax.random.uniform(next(keys), (2,), minval=0.04, maxval=0.96)

    def near(place: Array) -> Array:
        return jnp.clip(place + 0.12 * jax.random.normal(next(keys), (2,)), 0.04, 0.96)

    layout, clutter = next(keys), chance(0.6)
    plain, full = (tabletop.reset(layout, dataclasses.replace(sim, clutter=both)) for both in (False, True))
    state = jax.tree.map(lambda a, b: jnp.where(clutter, b, a), plain, full)

    moved = jnp.where(chance(0.5), anywhere(), near(state.plate))
    block = jnp.where(chance(0.3), moved, state.block_K2[0])
    choice = jax.random.randint(next(keys), (), 0, 4)
    gripper = jnp.stack([state.gripper, anywhere(), near(block), near(state.plate)])[choice]
    holds, closed = chance(0.35), chance(0.2)
    # A block that is held is where the gripper is.
    block_K2 = state.block_K2.at[0].set(jnp.where(holds, gripper, block))
    held = jnp.where(holds, 0, -1).astype(jnp.int32)
    return state.replace(gripper=gripper, closed=holds | closed, held=held, block_K2=block_K2)


def _label(state: TabletopState, sim: TabletopConfig) -> tuple[Array, Array, Array]:
    """Position (5, 2), presence (5,) and attributes (7,) of a scene."""
    del sim
    # Blocks are labelled by their colour P, and a scene may lack a colour: it is then in the middle, and not present.
    colour_P2 = jnp.full((3, 2), 0.5).at[state.colour_K].set(state.block_K2)
    there_P = jnp.zeros(3, bool).at[state.colour_K].set(jnp.all(state.block_K2 <= 1.0, axis=-1))
    held_P = (jnp.arange(3) == state.colour_K[0]) & (state.held == 0)
    position = jnp.concatenate([state.gripper[None], jnp.where(there_P[:, None], colour_P2, 0.5), state.plate[None]])
    present = jnp.concatenate([jnp.ones(1, bool), there_P, jnp.ones(1, bool)])
    return position, present, jnp.concatenate([state.closed[None], there_P, held_P])
