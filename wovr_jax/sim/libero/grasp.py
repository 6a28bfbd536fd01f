"""Where the scripted expert takes hold: grasps of an object among its neighbours, from the scene's collision shapes.

Lengths are metres in the world's frame, z up; angles are radians; the hand points straight down. The sizes of the
Panda's hand were measured in the simulator: its underside lies 3.4 cm above the grip point, which is the point between
the finger tips that the controller moves; the tips reach 1.6 cm below that point, and the fingers open 8 cm.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

PALM, TIP = 0.034, 0.016
"""How far the hand's underside is above the grip point, and the finger tips below it."""
WIDEST = 0.074
"""Width of the widest object that the fingers go around; they open 8 cm."""
RIM_DEPTH, RIM_INSIDE = 0.022, 0.004
"""Where a bowl's rim is pinched: this far below its edge, and inside its outer radius."""
BEARINGS = np.deg2rad(np.arange(0, 360, 15))
SWING = np.pi
"""By how much the arm is turned away about its base while heights are looked up."""


@dataclasses.dataclass(frozen=True)
class Grasp:
    """A way to take hold of an object.

    Attributes:
      yaw: rotation of the hand about the vertical from its rotation at rest, within half a pi either way.
      offset_2: from the object's origin to the grip point, x and y.
      height: height of the grip point.
      cost: lower is better; neighbours in the way count most.
    """

    yaw: float
    offset_2: np.ndarray
    height: float
    cost: float


class Heights:
    """How high the scene is at a place, without the robot and one body, measured by rays from above.

    Args:
      model, data: MuJoCo's; ``data`` is copied.
      without: index of the body that rays pass through.
      arm_joint: index in qpos of the joint that turns the arm about its base.
    """

    def __init__(self, model: Any, data: Any, without: int, arm_joint: int):
        import mujoco  # pyright: ignore[reportMissingImports]

        self._model, self._data, self._without = model, copy.copy(data), without
        self._ray = mujoco.mj_ray  # pyright: ignore[reportAttributeAccessIssue]
        # Rays can pass through one body only, so the robot is moved out of their way in the copy.
        self._data.qpos[arm_joint] += SWING
        mujoco.mj_kinematics(model, self._data)  # pyright: ignore[reportAttributeAccessIssue]
        # Rays meet geoms of group 0, the collision shapes.
        self._group = np.array([1, 0, 0, 0, 0, 0], np.uint8)
        self._hit = np.full(1, -1, np.int32)

    def at(self, x: float, y: float, start: float) -> float:
        """Returns the height of the first surface below ``start``; minus infinity where there is none."""
        down = np.array([0.0, 0.0, -1.0])
        depth = self._ray(
            self._model, self._data, np.array([x, y, start]), down, self._group, 1, self._without, self._hit
        )
        return -np.inf if depth < 0 else start - depth

    def highest(self, places: Iterable[np.ndarray], start: float) -> float:
        """Returns the height of the highest surface at any of the places (x, y)."""
        return max(self.at(float(x), float(y), start) for x, y in places)


def shape_points(model: Any, data: Any, body: int) -> np.ndarray:
    """Returns points (P, 3) that span the collision shapes of a body and of the bodies that hang on it.

    Raises:
      ValueError: when the body has no collision shape.
    """
    import mujoco  # pyright: ignore[reportMissingImports]

    kinds = mujoco.mjtGeom  # pyright: ignore[reportAttributeAccessIssue]
    bodies = descendants(model, body)
    parts = []
    for geom in range(model.ngeom):
        if model.geom_bodyid[geom] not in bodies or not (model.geom_contype[geom] or model.geom_conaffinity[geom]):
            continue
        size = model.geom_size[geom]
        if model.geom_type[geom] == kinds.mjGEOM_MESH:
            mesh = model.geom_dataid[geom]
            first = model.mesh_vertadr[mesh]
            points = model.mesh_vert[first : first + model.mesh_vertnum[mesh]]
        else:
            # Half the extents of the shape's box in its own frame; a box's size is that already.
            half = {
                kinds.mjGEOM_SPHERE: size[[0, 0, 0]],
                kinds.mjGEOM_CYLINDER: size[[0, 0, 1]],
                kinds.mjGEOM_CAPSULE: np.array([size[0], size[0], size[0] + size[1]]),
            }.get(kinds(model.geom_type[geom]), size)
            # The eight corners: (3, 2, 2, 2) -> (8, 3).
            points = half * np.array(np.meshgrid(*[(-1, 1)] * 3)).reshape(3, -1).T
        parts.append(points @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom])
    if not parts:
        raise ValueError(f"body {model.body(body).name} has no collision shape")
    return np.concatenate(parts)


def descendants(model: Any, body: int) -> set[int]:
    """Returns the indices of a body and of all bodies that hang on it."""
    bodies = {body}
    # One pass is enough, because MuJoCo numbers children after their parents.
    for other in range(body + 1, model.nbody):
        if model.body_parentid[other] in bodies:
            bodies.add(other)
    return bodies


def grasps(points: np.ndarray, origin_3: np.ndarray, around: Heights, finger_bearing: float, rim: bool) -> list[Grasp]:
    """Returns ways to take hold of an object, best first; an empty list where it is too wide for the hand.

    Args:
      points: (P, 3) points that span the object.
      origin_3: the object's origin.
      around: the scene without the object.
      finger_bearing: angle in the world of the line between the fingers, at yaw 0.
      rim: whether it is pinched at its rim, like a bowl; otherwise the fingers go around it.
    """
    top, bottom = points[:, 2].max(), points[:, 2].min()
    ways = []
    # Fingers that go around an object do the same half a turn further; at a rim, that is its other side.
    for bearing in BEARINGS if rim else BEARINGS[: len(BEARINGS) // 2]:
        across, along = np.array([np.cos(bearing), np.sin(bearing)]), np.array([-np.sin(bearing), np.cos(bearing)])
        # The fingers are alike, so half a turn changes nothing and a yaw within +-90 degrees is always enough.
        yaw = (bearing - finger_bearing + np.pi / 2) % np.pi - np.pi / 2
        spread, length = (points[:, :2] - origin_3[:2]) @ across, (points[:, :2] - origin_3[:2]) @ along
        if rim:
            places, height, width = [(0.0, across * (spread.max() - RIM_INSIDE))], top - RIM_DEPTH, 0.0
        else:
            width = float(np.ptp(spread))
            # At half its height, unless the palm would then touch its top or the tips what it stands on.
            height = max((top + bottom) / 2, top - PALM + 0.004, bottom + 0.012)
            middle = across * (spread.max() + spread.min()) / 2 + along * (length.max() + length.min()) / 2
            room = np.ptp(length) / 2 - 0.010
            shifts = [0.0] + [shift for shift in (-0.03, -0.015, 0.015, 0.03) if abs(shift) < room]
            places = [(shift, middle + shift * along) for shift in shifts]
        if width > WIDEST:
            continue
        for shift, offset_2 in places:
            blocked = obstruction(around, origin_3[:2] + offset_2, across, along, height, top + 0.6)
            # Weights found by trial. More than 1 cm of room is worth nothing further.
            cost = 50 * max(blocked, -0.01) + 0.25 * abs(yaw) + 12 * width + 6 * abs(shift)
            ways.append(Grasp(float(yaw), offset_2, float(height), float(cost)))
    return sorted(ways, key=lambda grasp: grasp.cost)


def obstruction(
    around: Heights, place_2: np.ndarray, across: np.ndarray, along: np.ndarray, height: float, start: float
) -> float:
    """Returns by how much neighbours reach into the open fingers or the hand; negative when both are free.

    Args:
      around: the scene without the object.
      place_2: the grip point.
      across, along: unit vectors (2,) along the line between the fingers, and at right angles to it.
      height: height of the grip point.
      start: height above everything, from which rays go down.
    """
    # The footprint of each finger when open, and of the hand above them.
    fingers = [
        place_2 + side * reach * across + slip * along
        for side in (-1, 1)
        for reach in (0.034, 0.044, 0.054)
        for slip in (-0.012, 0.0, 0.012)
    ]
    hand = [
        place_2 + reach * across + slip * along
        for reach in np.linspace(-0.105, 0.105, 11)
        for slip in (-0.032, 0, 0.032)
    ]
    return max(around.highest(fingers, start) - (height - TIP), around.highest(hand, start) - (height + PALM))
