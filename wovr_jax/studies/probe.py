"""Does the learned world obey? From one start frame, one command at a time, beside the true simulator.

A chunk of equal actions pushes the gripper left, right, up or down at two speeds, or opens and closes the jaws. The
gripper is then found in the last frame of both worlds by the same eye (``sim.tabletop.eye``): how far it went, and
whether it is closed. Nothing here needs a policy, a reward or an episode.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax.sim import embedded
from wovr_jax.sim.tabletop import eye
from wovr_jax.sim.tabletop import table as tabletop
from wovr_jax.sim.tabletop.table import TabletopConfig, TabletopState
from wovr_jax.studies import open_loop
from wovr_jax.types import NULL_ACTION, Array, Params
from wovr_jax.world.model import WorldConfig

AXES = {"x": 0, "y": 1}
"""Axis -> its place in an action and in a position."""
PUSHES = (-0.5, -0.25, 0.25, 0.5)
"""Commands on an axis, as shares of a full-speed step."""
JAWS = 6
LOST_AREA = 0.25
"""A gripper seen with less than this share of its true area counts as lost."""


def probe(cfg: WorldConfig, params: Params, sim: TabletopConfig, seeds: np.ndarray, key: Array) -> dict[str, Any]:
    """Measures how well predicted motion follows the commanded one, axis by axis, over the layouts of ``seeds``.

    Returns:
      ``x``, ``y``: ``sign``, share of commands whose predicted displacement has their sign; ``slope`` and
      ``correlation`` of predicted against true displacement under the same actions (1 and 1 for a perfect model);
      ``across``, root mean square of the difference on the other axis, in pixels; ``lost``, share of last frames in
      which no gripper is to be seen (they count as a wrong sign and are left out of the rest).
      ``jaws``: ``sign``, share of last frames whose jaws are as commanded; ``slope``, predicted change of the closed
      share from opening to closing over the true one; ``lost``.
    """
    scores: dict[str, Any] = {}
    for axis, place in AXES.items():
        seen = _look(cfg, params, sim, seeds, [_action(place, push) for push in PUSHES], key)
        scores[axis] = _score_pushes(seen, place, np.repeat(PUSHES, len(seeds)), sim.size)
    scores["jaws"] = _score_jaws(_look(cfg, params, sim, seeds, [_action(JAWS, -1.0), _action(JAWS, 1.0)], key))
    return scores


def frames(
    cfg: WorldConfig, params: Params, sim: TabletopConfig, seeds: np.ndarray, actions: list[np.ndarray], key: Array
) -> tuple[Array, Array, Array]:
    """Plays K actions, each for a chunk: first frames (K B, H, W, C), true and imagined ones (K B, T, H, W, C)."""
    # Every action from every layout, layouts fastest: (K, A) -> (K B, T, A).
    seed_B = jnp.asarray(np.tile(seeds, len(actions)), jnp.int32)
    action_BTA = jnp.asarray(np.repeat(np.repeat(actions, len(seeds), axis=0)[:, None], cfg.chunk, axis=1))
    first_BHWC, true_BTHWC = true_frames(seed_B, action_BTA, sim)
    return first_BHWC, true_BTHWC, open_loop.play(cfg, params, first_BHWC, action_BTA[:, None], key)[:, 0]


@functools.partial(jax.jit, static_argnames="sim")
def true_frames(seed_B: Array, action_BTA: Array, sim: TabletopConfig) -> tuple[Array, Array]:
    """Renders first frames (B, H, W, C), and those (B, T, H, W, C) after each action, of the true table."""

    def render(state: TabletopState) -> Array:
        return tabletop.render(state, sim)

    state = embedded.reset_batch(seed_B, sim)
    states_BT = jax.vmap(lambda s, a: embedded.roll(s, a, sim))(state, action_BTA)
    return jax.vmap(render)(state), jax.vmap(jax.vmap(render))(states_BT)


def _action(place: int, value: float) -> np.ndarray:
    # The null action and not zeros: it says open jaws, so that a push moves nothing else.
    action_A = np.array(NULL_ACTION, np.float32)
    action_A[place] = value
    return action_A


def _look(cfg: WorldConfig, params: Params, sim: TabletopConfig, seeds: np.ndarray, actions, key) -> list[eye.Sight]:
    """Looks at the first frames, the last true ones and the last imagined ones."""
    first_BHWC, true_BTHWC, dream_BTHWC = frames(cfg, params, sim, seeds, actions, key)
    moments = (first_BHWC, true_BTHWC[:, -1], dream_BTHWC[:, -1])
    # Of a mosaic, the camera above: there the gripper is where it is.
    return jax.device_get([eye.locate_gripper(frame[..., : sim.size, :]) for frame in moments])


def _score_pushes(seen: list[eye.Sight], place: int, push_B: np.ndarray, size: int) -> dict[str, float]:
    first, true, dream = seen
    # A position read off a picture without a gripper means nothing, so those frames are left out of the fit.
    there_B = dream.area >= LOST_AREA * true.area
    went_B2, should_B2 = dream.xy - first.xy, true.xy - first.xy
    went_B, should_B = went_B2[there_B, place], should_B2[there_B, place]
    across_B = (went_B2 - should_B2)[there_B, 1 - place]
    return {
        # Not out of this share: a model that lets the gripper vanish must not gain by it.
        "sign": float((there_B & (np.sign(went_B2[:, place]) == np.sign(push_B))).mean()),
        # Least squares through the origin, since no command is no motion in both worlds.
        "slope": float(went_B @ should_B / max(should_B @ should_B, 1e-9)),
        "correlation": _correlate(np.asarray(went_B), np.asarray(should_B)),
        "across": float(size * np.sqrt(np.mean(across_B**2))) if len(across_B) else float("nan"),
        "lost": float(1.0 - there_B.mean()),
    }


def _correlate(a_B: np.ndarray, b_B: np.ndarray) -> float:
    """Returns Pearson's correlation; 0 where one of them does not vary."""
    spread = np.std(a_B) * np.std(b_B) if len(a_B) else 0.0
    return float(np.mean((a_B - a_B.mean()) * (b_B - b_B.mean())) / spread) if spread > 1e-12 else 0.0


def _score_jaws(seen: list[eye.Sight]) -> dict[str, float]:
    _, true, dream = seen
    # The first half was told to open, the second to close.
    there_B, half = dream.area >= LOST_AREA * true.area, len(true.closed) // 2
    shut_B = np.arange(2 * half) >= half
    change = [float(world.closed[half:].mean() - world.closed[:half].mean()) for world in (dream, true)]
    return {
        "sign": float((there_B & ((dream.closed > 0.5) == shut_B)).mean()),
        "slope": change[0] / change[1],
        "lost": float(1.0 - there_B.mean()),
    }


# --- the picture ----------------------------------------------------------------------------

COMMANDS = {
    "left": (0, -0.5),
    "right": (0, 0.5),
    "up": (1, -0.5),
    "down": (1, 0.5),
    "open": (6, -1.0),
    "close": (6, 1.0),
}
COLUMNS = 2
TRUE_RGB, IMAGINED_RGB = (179, 89, 0), (47, 111, 208)
"""Of the stripes beside the rows: amber is true and blue imagined, as in the report."""


def sheet(cfg: WorldConfig, params: Params, sim: TabletopConfig, seed: int, key: Array) -> np.ndarray:
    """Draws one start frame and all commands as uint8 (H, W, 3); of each command a true row above an imagined one.

    A row is the sign of the command, the start frame, and every second frame after it.
    """
    actions = [_action(*command) for command in COMMANDS.values()]
    first_BHWC, true_BTHWC, dream_BTHWC = frames(cfg, params, sim, np.array([seed]), actions, key)
    blocks = []
    for i, name in enumerate(COMMANDS):
        rows = [np.concatenate([first_BHWC[i : i + 1], video[i, 1::2]]) for video in (true_BTHWC, dream_BTHWC)]
        blocks.append(_block(name, [np.clip((np.concatenate(row, axis=1) + 1) * 127.5, 0, 255) for row in rows]))
    # Opposite commands side by side.
    columns = [np.concatenate(blocks[i::COLUMNS]) for i in range(COLUMNS)]
    return np.concatenate(columns, axis=1).round().astype(np.uint8)


def _block(name: str, rows: list[np.ndarray], gap: int = 6) -> np.ndarray:
    """Draws two rows of frames with a stripe each and the command's sign before them, on white."""
    size = rows[0].shape[0]
    stripes = [np.full((size, 3, 3), colour, float) for colour in (TRUE_RGB, IMAGINED_RGB)]
    both = np.concatenate([np.concatenate(pair, axis=1) for pair in zip(stripes, rows, strict=True)])
    sign = np.full((2 * size, size, 3), 255.0)
    # In the middle of the two rows, since it belongs to both.
    sign[size // 2 : size // 2 + size] = _glyph(name, size)
    return np.pad(np.concatenate([sign, both], axis=1), [(gap, gap), (gap, gap), (0, 0)], constant_values=255.0)


def _glyph(name: str, size: int) -> np.ndarray:
    """Draws an arrow for a push; for the jaws a ring (open) or a disc (closed)."""
    y_HW, x_HW = np.mgrid[:size, :size] * 2.0 / (size - 1) - 1.0
    if name in ("open", "close"):
        radius_HW = np.hypot(x_HW, y_HW)
        ink = (radius_HW < 0.5) & ((radius_HW > 0.3) | (name == "close"))
    else:
        place, push = COMMANDS[name]
        along, across = (x_HW, y_HW)[place] * np.sign(push), np.abs((y_HW, x_HW)[place])
        # A triangle whose tip points along the push, and the shaft behind it.
        ink = (across < 0.5 - 0.7 * along) & (along > 0) & (across < 0.5) | (across < 0.15) & (np.abs(along) < 0.6)
    return np.where(ink[..., None], 40.0, 255.0)
