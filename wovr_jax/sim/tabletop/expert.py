"""A scripted expert for the embedded table, its noise and its named flaws.

The expert is digital: each axis moves at one of a few speeds, so a token policy sees few
distinct actions. It reacts to the state at every step, hence recovers from anything that
noise does to it. A flaw makes it fail in one coarse, correctable way.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from wovr_jax.core.config import Faults, NonNegative, Share, checked
from wovr_jax.sim.tabletop import table as tabletop
from wovr_jax.sim.tabletop.table import TabletopConfig, TabletopState
from wovr_jax.types import ACTION_DIM, Array


@checked
@dataclasses.dataclass(frozen=True)
class ExpertConfig:
    """How demonstrations are made.

    Attributes:
      speeds: the speeds of an axis, as shares of a full-speed step; 0 and 1 included.
      noise: standard deviation added to the executed deltas (labels stay clean).
      flip: probability that the executed gripper command is flipped for a step.
      flaw: ``early_release`` lets go on the way and then idles.
      flawed_share: share of the demonstrations that carry the flaw.
      release_low, release_high: distance to the plate at which a flawed one lets go.
      stroll_share: share of the episodes of ``wander`` that walk at random instead.
    """

    speeds: tuple[Share, ...] = (0.0, 0.25, 0.5, 1.0)
    noise: NonNegative = 0.2
    flip: Share = 0.03
    flaw: Literal["none", "early_release"] = "early_release"
    flawed_share: Share = 0.35
    release_low: NonNegative = 0.26
    release_high: NonNegative = 0.44
    stroll_share: Share = 0.0

    def faults(self) -> Faults:
        """Yields an expert that cannot stand still or hurry, and an interval without numbers."""
        if not {0.0, 1.0} <= set(self.speeds):
            yield "speeds", f"expected shares with 0 and 1 among them, got {self.speeds}"
        if self.release_low > self.release_high:
            yield "release_low", f"expected at most release_high={self.release_high}, got {self.release_low}"


@struct.dataclass
class ExpertState:
    """What the expert carries through an episode: its flaw and whether it has given up."""

    release: Array  # distance to the plate at which it lets go; 0 for a flawless one
    idle: Array  # bool


def begin(key: Array, cfg: ExpertConfig) -> ExpertState:
    """Draws whether, and where, this demonstration lets go too early."""
    # Drawn for every one and then masked, so that flawed and flawless ones are one program under ``vmap``.
    k_flaw, k_where = jax.random.split(key)
    flawed = jax.random.bernoulli(k_flaw, cfg.flawed_share if cfg.flaw == "early_release" else 0.0)
    where = jax.random.uniform(k_where, minval=cfg.release_low, maxval=cfg.release_high)
    return ExpertState(release=jnp.where(flawed, where, 0.0), idle=jnp.array(False))


def act(expert: ExpertState, state: TabletopState, cfg: ExpertConfig, sim: TabletopConfig) -> tuple[ExpertState, Array]:
    """Returns the clean action (7,) for a state: reach, close, carry, let go, stay."""
    holding = state.held == 0
    wrong = state.held == 1
    placed = tabletop.success(state, sim)
    goal = jnp.where(holding, state.plate, state.block_K2[0])
    offset = goal - state.gripper
    # Well within the radius at which closed jaws take the block, since noise moves the gripper before they close.
    on_block = jnp.linalg.norm(offset) < 0.6 * sim.grasp_radius
    to_plate = jnp.linalg.norm(state.plate - state.gripper)
    # Over the plate, or for a flawed one too early: outside the radius of success it has then failed for good.
    lets_go = holding & ((to_plate < 0.5 * sim.success_radius) | (to_plate < expert.release))
    gives_up = expert.idle | (holding & (to_plate < expert.release) & (to_plate >= sim.success_radius))

    # A block is taken and let go at rest only; the table ignores jaws that close in full flight.
    rest = placed | lets_go | gives_up | (on_block & ~holding)
    move = jnp.where(rest, 0.0, move_digitally(offset / sim.max_move, cfg))
    # Closed on the block and on the way; opened at the goal, after giving up, and at once when it holds the wrong one.
    grip = (holding & ~lets_go) | (on_block & ~holding & ~placed)
    grip = grip & ~gives_up & ~wrong
    action = jnp.zeros(ACTION_DIM).at[:2].set(move).at[6].set(jnp.where(grip, 1.0, -1.0))
    return dataclasses.replace(expert, idle=gives_up), action


def move_digitally(wish: Array, cfg: ExpertConfig) -> Array:
    """Returns the nearest allowed speed, per axis, with its sign."""
    # A token policy sees few distinct actions this way, and each of them often.
    speeds = jnp.asarray(cfg.speeds)
    size = jnp.clip(jnp.abs(wish), 0.0, 1.0)
    nearest = jnp.argmin(jnp.abs(size[:, None] - speeds[None, :]), axis=-1)
    return jnp.sign(wish) * speeds[nearest]


def disturb(label: Array, key: Array, cfg: ExpertConfig) -> Array:
    """Returns what is executed: noisy deltas, and now and then a flipped gripper."""
    k_move, k_flip = jax.random.split(key)
    # Only a moving gripper is disturbed: blocks are taken and let go at rest, and that is to succeed.
    move = label[:2] + cfg.noise * jax.random.normal(k_move, (2,)) * (jnp.abs(label[:2]).max() > 0)
    flip = jax.random.bernoulli(k_flip, cfg.flip)
    grip = jnp.where(flip, -label[6], label[6])
    return label.at[:2].set(jnp.clip(move, -1.0, 1.0)).at[6].set(grip)
