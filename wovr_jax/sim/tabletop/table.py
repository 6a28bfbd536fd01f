"""The embedded true simulator: a planar pick-and-place table in pure JAX.

A gripper seen from above must reach the block that the instruction names, close on it,
carry it to the plate and let go; ``clutter`` puts a block of another colour beside it. Everything is a
function of arrays without a batch axis; callers ``vmap``. The world is deterministic: a
reset key and the actions replay an episode exactly.

Actions follow LIBERO: seven numbers, end-effector deltas in [-1, 1] and the gripper, -1
open and +1 closed. The table is planar, so of the six deltas only x (right) and y (down)
move anything; z and the three rotations are accepted and ignored.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from wovr_jax.core.config import Count, Natural, Positive, Share, checked
from wovr_jax.core.pixels import make_mosaic
from wovr_jax.sim import drawing
from wovr_jax.sim.drawing import Canvas
from wovr_jax.types import Array

COLOURS = ("red", "green", "blue")
INSTRUCTIONS = tuple(f"pick up the {colour} block and put it on the plate" for colour in COLOURS)
"""The tasks of this simulator; a task index is an index into this tuple."""

STATE = 3
"""Numbers of the robot's state: x, y, fingers."""
WRIST = 0.5
"""Part of the table that the camera in the hand sees."""
_AWAY = 10.0
"""Added to the position of a block that is not on the table."""


@checked
@dataclasses.dataclass(frozen=True)
class TabletopConfig:
    """Geometry in table widths (the table is the unit square, x right, y down).

    Attributes:
      size: rendered height and width in pixels.
      horizon: simulator steps of an episode.
      max_move: distance of a full-speed step on one axis.
      grasp_radius: closed jaws hold a block whose centre is nearer than this...
      grasp_speed: ...if the step moved each axis less than this share of ``max_move``.
      success_radius: a released block nearer than this to the plate's centre is a success.
      plate_radius: of the plate, as it is drawn.
      clutter: whether a block of another colour lies in the other slot. Without, the instruction
        names the only block, and the policy need not bind a word to a picture to succeed.
      wrist: whether a second camera, in the hand, shows ``WRIST`` of a table width around the gripper.
      strip: pixels of a third picture's width, which shows the robot's state: where the gripper is, and how far its
        fingers are open (1 open, 0 closed on a block, -1 closed on nothing). 0 for none.
      jitter: half-widths of the uniform layout noise: gripper x, y; blocks x, y; plate x, y.
    """

    size: Count = 32
    horizon: Count = 24
    max_move: Positive = 0.08
    grasp_radius: Positive = 0.13
    grasp_speed: Positive = 0.8
    success_radius: Positive = 0.14
    plate_radius: Positive = 0.17
    clutter: bool = False
    wrist: bool = False
    strip: Natural = 0
    jitter: tuple[Share, Share, Share, Share, Share, Share] = (0.30, 0.08, 0.08, 0.07, 0.16, 0.05)

    @property
    def views(self) -> int:
        """Pictures of a mosaic."""
        return 1 + self.wrist

    @property
    def state(self) -> int:
        """Numbers that its strip shows."""
        return STATE if self.strip else 0

    @classmethod
    def fake(cls) -> TabletopConfig:
        """For tests: 16 pixels, two chunks."""
        return cls(size=16, horizon=16)


@struct.dataclass
class TabletopState:
    """Everything there is: positions (2,), gripper command, which block is held.

    Attributes:
      gripper: (2,) float32 position.
      closed: bool scalar, the last gripper command.
      held: int32 scalar, index of the held block or -1.
      block_K2: (2, 2) float32 positions of the two blocks.
      colour_K: (2,) int32 colour indices; block 0 is the target.
      plate: (2,) float32 position.
    """

    gripper: Array
    closed: Array
    held: Array
    block_K2: Array
    colour_K: Array
    plate: Array


def reset(key: Array, cfg: TabletopConfig) -> TabletopState:
    """A random layout. The task is the colour of block 0 (``task_of``)."""
    # One key for each draw, so that a change of one leaves the others as they were.
    k_colour, k_side, k_grip, k_block, k_plate = jax.random.split(key, 5)
    j = jnp.asarray(cfg.jitter)

    def uniform(key: Array, shape: tuple[int, ...], half: Array) -> Array:
        return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) * half

    # Two places for blocks on the far side, swapped by chance: the target is not to be told by its side.
    slots = jnp.array([[0.26, 0.25], [0.74, 0.25]])
    slots = jnp.where(jax.random.bernoulli(k_side), slots, slots[::-1])
    return TabletopState(
        gripper=jnp.array([0.5, 0.46]) + uniform(k_grip, (2,), j[0:2]),
        closed=jnp.array(False),
        held=jnp.array(-1, jnp.int32),
        # Without clutter the second block is there too, far off the table: one program for both.
        block_K2=(slots + uniform(k_block, (2, 2), j[2:4])).at[1].add(0.0 if cfg.clutter else _AWAY),
        colour_K=jax.random.permutation(k_colour, jnp.arange(3, dtype=jnp.int32))[:2],
        plate=jnp.array([0.5, 0.80]) + uniform(k_plate, (2,), j[4:6]),
    )


def task_of(state: TabletopState) -> Array:
    """Returns the int32 task index: the colour of the target block."""
    return state.colour_K[..., 0]


def step(state: TabletopState, action_A: Array, cfg: TabletopConfig) -> TabletopState:
    """Takes one step: the gripper moves, then the jaws act, then a held block follows.

    A block is taken only by closed jaws that are nearly still, so a block dropped in full
    flight stays lost until the gripper comes back for it.
    """
    move = jnp.clip(action_A[:2], -1.0, 1.0)
    # The edge of the table stops it: most of the gripper is always seen.
    gripper = jnp.clip(state.gripper + cfg.max_move * move, 0.04, 0.96)
    closed = action_A[6] > 0.0
    distance_K = jnp.linalg.norm(state.block_K2 - gripper, axis=-1)
    nearest = jnp.argmin(distance_K).astype(jnp.int32)
    still = jnp.max(jnp.abs(move)) < cfg.grasp_speed
    takes = closed & (state.held < 0) & still & (distance_K[nearest] < cfg.grasp_radius)
    # Open jaws hold nothing; closed ones take, or keep what they have.
    held = jnp.where(closed, jnp.where(takes, nearest, state.held), -1)
    carried_K = jnp.arange(2) == held
    block_K2 = jnp.where(carried_K[:, None], gripper, state.block_K2)
    return dataclasses.replace(state, gripper=gripper, closed=closed, held=held, block_K2=block_K2)


def success(state: TabletopState, cfg: TabletopConfig) -> Array:
    """Returns a bool: the target lies released on the plate."""
    near = jnp.linalg.norm(state.block_K2[0] - state.plate) < cfg.success_radius
    return near & (state.held != 0)


def render(state: TabletopState, cfg: TabletopConfig) -> Array:
    """Renders a mosaic (``core.pixels``) of what the robot senses, (size, V * size + strip, 3) float32 in [-1, 1]."""
    views = [_draw(state, cfg, Canvas(cfg.size))]
    if cfg.wrist:
        views.append(_draw(state, cfg, Canvas(cfg.size, state.gripper, WRIST)))
    return make_mosaic(views, sense(state), cfg.strip)


def sense(state: TabletopState) -> Array:
    """Returns the robot's state, (3,) float32 in [-1, 1]: x, y, fingers; see ``TabletopConfig.strip``."""
    fingers = jnp.where(state.closed, jnp.where(state.held < 0, -1.0, 0.0), 1.0)
    return jnp.append(2.0 * state.gripper - 1.0, fingers)


def _draw(state: TabletopState, cfg: TabletopConfig, canvas: Canvas) -> Array:
    """Paints the scene, seen from above; see ``sim.drawing``."""
    canvas.draw_plate(state.plate, cfg.plate_radius)
    for k in (1, 0):  # the target last, above the other
        half = jnp.where(state.held == k, drawing.HELD, drawing.BLOCK)
        canvas.draw_square(state.block_K2[k], half, drawing.BLOCKS[state.colour_K[k]])
    canvas.draw_gripper(state.gripper, state.closed)
    return canvas.picture()


def subgoals(states_S: TabletopState, cfg: TabletopConfig) -> dict[str, Array]:
    """Tells what one episode achieved, from its stacked states: grasped, carried over the plate, placed."""
    gap_S = jnp.linalg.norm(states_S.gripper - states_S.plate, axis=-1)
    holds_S = states_S.held == 0
    return {
        "grasped": jnp.any(holds_S),
        "wrong_object": jnp.any(states_S.held == 1),
        "carried": jnp.any(holds_S & (gap_S < cfg.success_radius)),
        "placed": jnp.any(jax.vmap(lambda s: success(s, cfg))(states_S)),
    }
