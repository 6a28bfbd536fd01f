"""One world model for two cameras and the robot's state, or one for each camera: four trainings a seed, one table.

Scripted episodes of the table that never come to rest are shown as mosaics (``core.pixels``): the camera above, the
camera in the hand, the robot's state. One model learns all of it together, one both cameras without the state; two
others learn a camera alone, with as many steps, so that the two of them cost about what the first one does. All play
the recorded actions of held-out episodes from their first frames. How far is each view from the truth after chunk 1, 4
and 16? Do the views of one model show the same gripper, and how far off is the state that it imagines?
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from wovr_jax.core import config
from wovr_jax.core.pixels import read_state, split_views
from wovr_jax.core.stats import psnr
from wovr_jax.run.folder import Run
from wovr_jax.run.recipe import Recipe
from wovr_jax.sim.tabletop import eye
from wovr_jax.sim.tabletop.table import WRIST
from wovr_jax.studies import open_loop
from wovr_jax.studies.variants import REFERENCE, Settings, Variant, choose_variants
from wovr_jax.studies.world_parts import CHUNKS, Seed
from wovr_jax.types import Array

JOB = "senses_study"
VIEWS = ("above", "hand")
"""The two cameras, in the order of a mosaic."""
ALONE = {"views": 1, "state": 0}
VARIANTS = (
    Variant(REFERENCE, "both views and the state", {}),
    Variant("no_state", "both views", {"state": 0}),
    *(Variant(name, f"the camera {where} alone", ALONE) for name, where in zip(VIEWS, ("above", "in the hand"))),
)
NEAR = 0.14
"""The plate is wholly seen by the camera in the hand where it is nearer than this, in table widths."""
MILLE = 1000.0
"""Positions are told in thousandths of the table's width: millimetres of a table of one metre."""


def study(recipe: Recipe, run: Run, keep: Callable[[dict[str, Any]], None] = lambda results: None) -> dict[str, Any]:
    """Trains and measures every variant on every seed; returns the numbers and their table.

    ``keep`` is given the same of what is there after each of them.

    Raises:
      ConfigError: episodes too short for the last chunk of the table, or without the senses.
    """
    needed = max(CHUNKS) * recipe.world.chunk
    if recipe.outside or recipe.relay or recipe.senses[:2] != (2, 3) or recipe.sim.horizon != needed:
        raise config.ConfigError(
            f"config.sim: this study plays {needed} steps of the embedded table with wrist=True and a strip, as "
            "configs/world_study.py:senses has it"
        )
    variants = choose_variants(VARIANTS, recipe.variants)
    found: dict[str, dict[str, Settings]] = {variant.name: {} for variant in variants}
    for seed in recipe.seeds:
        one_seed = Seed(dataclasses.replace(recipe, seed=seed), run)
        for variant in variants:
            found[variant.name][str(seed)] = measure(one_seed, variant)
            keep(_results(found))
    return _results(found)


def _results(found: dict[str, dict[str, Settings]]) -> dict[str, Any]:
    return {JOB: found, "tables": [table(found)]}


def measure(seed: Seed, variant: Variant) -> Settings:
    """Returns what a variant shows, chunk by chunk: ``psnr_<view>`` in dB, and, of both, what :func:`compare` does."""
    size = seed.recipe.size
    # What it is shown of a mosaic: from which pixel to which.
    low, high = {"hand": (size, 2 * size), "above": (0, size), "no_state": (0, 2 * size)}.get(variant.name, (0, None))
    world = seed.train(variant, lambda frame: frame[..., low:high, :])

    def make(_: pathlib.Path) -> Settings:
        first_BHWC, action_BNTA, true_BNTHWC = seed.held_out
        first, true = (x[..., low:high, :] for x in (first_BHWC, true_BNTHWC))
        seen = open_loop.play(*world, first, action_BNTA, seed.key("senses study"))
        views = world[0].views
        names = VIEWS if views > 1 else (variant.name,)
        shown = read_state(true_BNTHWC, 2, 3)
        said: Settings = {"imagined_frames": int(np.prod(seen.shape[:3]))}
        # (B, N, T, V, H, H, 3)
        apart = zip(names, *(jnp.moveaxis(split_views(x, views), 3, 0) for x in (seen, true)), strict=True)
        for name, mine, theirs in apart:
            said[f"psnr_{name}"] = psnr(jnp.square(mine - theirs).mean(axis=(0, 2, 3, 4, 5))).tolist()
            if name == "above":
                said["gripper"] = _distance(eye.locate_gripper(mine).xy, place(shown))
        if views > 1:
            # The same measured on the true frames says how well the eye sees.
            said |= compare(seen, shown, world[0].state)
            said |= {f"true_{name}": value for name, value in compare(true, shown, 0).items()}
        return said

    name = f"senses-{variant.name}-seed{seed.recipe.seed}"
    return seed.run.stage(name, make, lambda folder: None).facts


def compare(seen_BNTHWC: Array, true_BNTR: Array, numbers: int) -> dict[str, list[float | None]]:
    """Returns how well the senses of imagined mosaics agree, chunk by chunk, in thousandths of the table's width.

    Args:
      seen_BNTHWC: imagined.
      true_BNTR: the true state.
      numbers: of the imagined state; 0 for none.

    Returns:
      ``views``, the median distance of the gripper from the plate seen from above, against the same seen from the hand,
      in frames in which the hand sees the plate; with a state, ``state``, the median error of the imagined position,
      ``eye``, the median distance of the imagined position from where the gripper is seen from above, and ``fingers``,
      the share of the frames in which the fingers are nearest to the true one of their three states.
    """
    view = split_views(seen_BNTHWC[..., : 2 * seen_BNTHWC.shape[-3], :], 2)
    above, hand = view[..., 0, :, :, :], view[..., 1, :, :, :]
    gripper = eye.locate_gripper(above).xy
    offset = eye.locate_plate(above) - gripper
    near = jnp.max(jnp.abs(offset), axis=-1) < NEAR
    found = {"views": _distance(offset, (eye.locate_plate(hand) - 0.5) * WRIST, near)}
    if numbers:
        state = read_state(seen_BNTHWC, 2, numbers)
        right = jnp.round(jnp.clip(state[..., 2], -1.0, 1.0)) == jnp.round(true_BNTR[..., 2])
        found["state"] = _distance(place(state), place(true_BNTR))
        found["eye"] = _distance(place(state), gripper)
        found["fingers"] = np.asarray(right.mean(axis=(0, 2))).tolist()
    return found


def place(state: Array) -> Array:
    """Returns (..., 2), where in table widths a state (..., R) says that the gripper is."""
    return (state[..., :2] + 1.0) / 2.0


def _distance(a: Array, b: Array, where: Array | bool = True) -> list[float | None]:
    """Returns the median distance (N,) of places (B, N, T, 2), in thousandths of the table's width."""
    apart_BNT = jnp.where(where, jnp.linalg.norm(a - b, axis=-1), jnp.nan)
    # NaN where no frame of a chunk could be asked, which JSON has no number for.
    return [None if np.isnan(x) else MILLE * float(x) for x in np.asarray(jnp.nanmedian(apart_BNT, axis=(0, 2)))]


ROWS = {
    "psnr_above": ("view from above, PSNR in dB", 1),
    "psnr_hand": ("view from the hand, PSNR in dB", 1),
    "gripper": ("gripper seen from above against the true one", 1),
    "views": ("gripper to plate, the two views apart", 1),
    "true_views": ("the same in true frames", 1),
    "state": ("imagined position against the true one", 1),
    "eye": ("imagined position against the gripper seen from above", 1),
    "fingers": ("fingers right, share", 3),
}
"""What is measured -> what the table calls it, and digits."""


def table(found: dict[str, dict[str, Settings]]) -> dict[str, Any]:
    """Tables mean and standard deviation over seeds, measure by measure."""
    rows = [["", "model", *(f"chunk {n}" for n in CHUNKS)]]
    says = {variant.name: variant.says for variant in VARIANTS}
    for measured, (what, digits) in ROWS.items():
        for name, seeds in found.items():
            values = [facts[measured] for facts in seeds.values() if measured in facts]
            # Of true frames there is one truth, whichever model is asked.
            if values and not (measured.startswith("true") and name != REFERENCE):
                cells = [[value[n - 1] for value in values if value[n - 1] is not None] for n in CHUNKS]
                rows.append([what, says[name], *(_format(cell, digits) for cell in cells)])
    return {
        "title": "Two cameras and the robot's state",
        "why": "Recorded actions of held-out episodes, played from the first frame. Positions in thousandths of the "
        "table's width. Mean and standard deviation over seeds, each with episodes and weights of its own.",
        "rows": rows,
    }


def _format(values: list[float], digits: int) -> str:
    if not values:
        return "-"
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"
