"""The embedded simulator with a long horizon: a lid, a plate that goes on moving, a button at the end.

"Put the red block on the plate then press the button." One of two blocks lies where a lid slides over it within the
first steps, so the first frame is the only one that shows its colour; more often than not it is the block that the
instruction names. The lid has to be carried aside, the block to the plate, which slides to and fro and takes with it
what lies on it, and last the empty jaws have to close on the button. Rules, actions and pictures are otherwise those
of ``sim.tabletop.table``: planar, deterministic, functions of arrays without a batch axis.

The first frame tells all that will happen by itself: the lid begins nearer to the block that it will cover, and the
plate sets off towards the middle, always at one speed. Otherwise a world model could only guess, and a guess of its own
would be counted as its error.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict

import jax
import jax.numpy as jnp
from flax import struct

from wovr_jax.core.config import Count, Faults, Positive, Share, checked
from wovr_jax.sim import drawing
from wovr_jax.sim.drawing import Canvas
from wovr_jax.types import Array

COLOURS = ("red", "green", "blue")
INSTRUCTIONS = tuple(f"put the {colour} block on the plate then press the button" for colour in COLOURS)
"""The tasks of this simulator; a task index is an index into this tuple."""

LID = 2
"""Place of the lid among the things that can be held: the named block, the other one, the lid."""
SLIDE = 4
"""Steps in which the lid slides from its home over the hidden block."""
REACH = 0.28
"""How far the plate goes to either side of the middle."""
HOME = jnp.array([0.5, 0.18])
"""The place between the two blocks; the lid begins ``LEAN`` from here, on the side that it will cover."""
LEAN = 0.05

LID_HALF, LID_HELD = 0.14, 0.16
BUTTON = 0.11
"""Radius of the button as it is drawn: a rim of it is seen beside a gripper that presses it."""
_LID = jnp.array([0.80, 0.30, 0.75])
_BUTTON = jnp.array([[0.06, 0.40, 0.42], [0.45, 0.95, 0.95]])  # as it is, and while it is pressed


@checked
@dataclasses.dataclass(frozen=True)
class RelayConfig:
    """Geometry in table widths (the table is the unit square, x right, y down).

    Attributes:
      size: rendered height and width in pixels.
      horizon: simulator steps of an episode.
      max_move: distance of a full-speed step on one axis.
      grasp_radius: closed jaws hold a thing whose centre is nearer than this; the lid, where it is one of several...
      grasp_speed: ...if the step moved each axis less than this share of ``max_move``.
      success_radius: a released block nearer than this to the plate's centre lies on the plate.
      plate_radius: of the plate; it takes with it what lies within.
      plate_speed: distance that the plate moves in a step.
      press_radius: empty closed jaws nearer than this to the button's centre press it.
      hidden_share: of the episodes in which the lid hides the named block, and not the other one.
    """

    size: Count = 32
    horizon: Count = 96
    max_move: Positive = 0.04
    grasp_radius: Positive = 0.11
    grasp_speed: Positive = 0.8
    success_radius: Positive = 0.11
    plate_radius: Positive = 0.15
    plate_speed: Positive = 0.01
    press_radius: Positive = 0.07
    hidden_share: Share = 0.7

    def faults(self) -> Faults:
        """Yields a plate that loses what lies on it."""
        if self.success_radius > self.plate_radius:
            yield "success_radius", f"expected at most plate_radius={self.plate_radius}, got {self.success_radius}"

    @classmethod
    def fake(cls) -> RelayConfig:
        """For tests: 16 pixels, three chunks, and steps so long that an expert succeeds in them."""
        return cls(size=16, horizon=24, max_move=0.16)


@struct.dataclass
class RelayState:
    """Everything there is.

    Attributes:
      gripper: (2,) float32 position.
      closed: bool scalar, the last gripper command.
      held: int32 scalar, index of the held thing or -1.
      thing_O2: (3, 2) float32 positions of the named block, the other block and the lid.
      colour_K: (2,) int32 colour indices of the two blocks.
      plate: (2,) float32 position.
      drift: float32 scalar, how far the plate moves to the right in a step.
      button: (2,) float32 position.
      box: (2,) float32, the place that the lid slides over.
      time: int32 scalar, steps taken.
    """

    gripper: Array
    closed: Array
    held: Array
    thing_O2: Array
    colour_K: Array
    plate: Array
    drift: Array
    button: Array
    box: Array
    time: Array


def reset(key: Array, cfg: RelayConfig) -> RelayState:
    """A random layout. The task is the colour of block 0 (``task_of``)."""
    # One key for each draw, so that a change of one leaves the others as they were.
    k_colour, k_side, k_hidden, k_grip, k_thing, k_plate, k_button = jax.random.split(key, 7)

    def around(key: Array, centre: Array, half: list) -> Array:
        return centre + jax.random.uniform(key, centre.shape, minval=-1.0, maxval=1.0) * jnp.array(half)

    # Far away the blocks, left and right by chance, and the lid between them; then the button; near by the plate.
    places = jnp.array([[0.18, 0.18], [0.82, 0.18]])
    places = jnp.where(jax.random.bernoulli(k_side), places, places[::-1])
    hidden = jnp.where(jax.random.bernoulli(k_hidden, cfg.hidden_share), 0, 1)
    lid = HOME.at[0].add(LEAN * jnp.sign(places[hidden, 0] - HOME[0]))
    # The lid's place is drawn more narrowly along x, which tells where it will go.
    thing_O2 = around(k_thing, jnp.concatenate([places, lid[None]]), [[0.03, 0.03], [0.03, 0.03], [0.015, 0.03]])
    plate = around(k_plate, jnp.array([0.5, 0.81]), [REACH, 0.02])
    return RelayState(
        gripper=around(k_grip, jnp.array([0.5, 0.52]), [0.30, 0.06]),
        closed=jnp.array(False),
        held=jnp.array(-1, jnp.int32),
        thing_O2=thing_O2,
        colour_K=jax.random.permutation(k_colour, jnp.arange(3, dtype=jnp.int32))[:2],
        plate=plate,
        drift=jnp.where(plate[0] < 0.5, cfg.plate_speed, -cfg.plate_speed),
        button=around(k_button, jnp.array([0.5, 0.49]), [0.35, 0.02]),
        box=thing_O2[hidden],
        time=jnp.array(0, jnp.int32),
    )


def task_of(state: RelayState) -> Array:
    """Returns the int32 task index: the colour of the named block."""
    return state.colour_K[..., 0]


def step(state: RelayState, action_A: Array, cfg: RelayConfig) -> RelayState:
    """Takes one step: gripper, plate and lid move, then the jaws act, then a held thing follows.

    As on the table, jaws take only when they are nearly still.
    """
    move = jnp.clip(action_A[:2], -1.0, 1.0)
    gripper = jnp.clip(state.gripper + cfg.max_move * move, 0.04, 0.96)
    closed = action_A[6] > 0.0

    turns = jnp.abs(state.plate[0] + state.drift - 0.5) > REACH
    drift = jnp.where(turns, -state.drift, state.drift)
    loose_O = jnp.arange(3) != state.held
    rides_O = loose_O & (distance(state.thing_O2, state.plate) < cfg.plate_radius)
    thing_O2 = state.thing_O2.at[:, 0].add(rides_O * drift)
    # In equal parts, so that the lid arrives with the last of its steps whatever the way.
    slide = (state.box - thing_O2[LID]) / jnp.maximum(SLIDE - state.time, 1)
    thing_O2 = thing_O2.at[LID].add(slide * ((state.time < SLIDE) & loose_O[LID]))

    distance_O = distance(thing_O2, gripper)
    # The lid lies above what it covers, and is nearer to the jaws than that.
    nearest = jnp.where(distance_O[LID] < cfg.grasp_radius, LID, jnp.argmin(distance_O)).astype(jnp.int32)
    still = jnp.max(jnp.abs(move)) < cfg.grasp_speed
    takes = closed & (state.held < 0) & still & (distance_O[nearest] < cfg.grasp_radius)
    held = jnp.where(closed, jnp.where(takes, nearest, state.held), -1)
    return dataclasses.replace(
        state,
        gripper=gripper,
        closed=closed,
        held=held,
        thing_O2=jnp.where((jnp.arange(3) == held)[:, None], gripper, thing_O2),
        plate=state.plate.at[0].add(drift),
        drift=drift,
        time=state.time + 1,
    )


def distance(place: Array, other: Array) -> Array:
    """Returns how far two places, or arrays of them, are apart."""
    return jnp.linalg.norm(place - other, axis=-1)


def placed(state: RelayState, cfg: RelayConfig) -> Array:
    """Returns a bool: the named block lies released on the plate."""
    return (distance(state.thing_O2[0], state.plate) < cfg.success_radius) & (state.held != 0)


def pressed(state: RelayState, cfg: RelayConfig) -> Array:
    """Returns a bool: closed jaws that hold nothing are on the button."""
    return state.closed & (state.held < 0) & (distance(state.gripper, state.button) < cfg.press_radius)


def success(state: RelayState, cfg: RelayConfig) -> Array:
    """Returns a bool: the button is pressed while the named block lies on the plate."""
    return placed(state, cfg) & pressed(state, cfg)


def hides(state: RelayState) -> Array:
    """Returns bools (2,): which of the blocks the lid covers wholly."""
    offset_K = jnp.abs(state.thing_O2[:LID] - state.thing_O2[LID]).max(axis=-1)
    return (offset_K < LID_HALF - drawing.BLOCK) & (jnp.arange(LID) != state.held)


def render(state: RelayState, cfg: RelayConfig) -> Array:
    """Renders (size, size, 3) float32 in [-1, 1], seen from above; see ``sim.drawing``."""
    canvas, hidden_K = Canvas(cfg.size), hides(state)
    canvas.draw_plate(state.plate, cfg.plate_radius)
    canvas.draw_disc(state.button, BUTTON, _BUTTON[pressed(state, cfg).astype(int)])
    for k in (1, 0):
        # A block that is wholly covered is not drawn at all: the soft edge of the lid would tell its colour.
        shown = ~hidden_K[k] & (state.held != k)
        canvas.draw_square(state.thing_O2[k], drawing.BLOCK, drawing.BLOCKS[state.colour_K[k]], shown)
    canvas.draw_square(state.thing_O2[LID], jnp.where(state.held == LID, LID_HELD, LID_HALF), _LID)
    # What is held is nearer to the camera than all that lies.
    k = jnp.clip(state.held, 0, 1)
    lifted = (state.held >= 0) & (state.held < LID)
    canvas.draw_square(state.thing_O2[k], drawing.HELD, drawing.BLOCKS[state.colour_K[k]], lifted)
    canvas.draw_gripper(state.gripper, state.closed)
    return canvas.picture()


def subgoals(states_S: RelayState, cfg: RelayConfig) -> dict[str, Array]:
    """Tells what one episode achieved, from its stacked states: free of the lid, grasped, placed, then pressed."""
    # Before the lid has come to rest it covers nothing yet.
    free_S = (states_S.time >= SLIDE) & (distance(states_S.thing_O2[:, 0], states_S.thing_O2[:, LID]) > LID_HALF)
    reached = {
        "free": jnp.any(free_S),
        "grasped": jnp.any(states_S.held == 0),
        "placed": jnp.any(jax.vmap(lambda s: placed(s, cfg))(states_S)),
        "pressed": jnp.any(jax.vmap(lambda s: success(s, cfg))(states_S)),
    }
    return OrderedDict(reached)  # compiled programs sort a plain dictionary by name
