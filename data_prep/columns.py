"""Which columns of a LeRobot data set are what: by what the set says of them, then by their names.

The camera on the table is the first of colour that is not called wrist, hand, gripper or ``image2``; the one in the
hand is the first that is. Pictures of depth, of labels or of heat are none of colour: clipped to eight bits they are
white.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from data_prep.beliefs import Told
from data_prep.demos import SourceError
from wovr_jax.types import ACTION_DIM

HAND = re.compile(r"wrist|hand|gripper|image2")
NO_COLOUR = re.compile(
    r"depth|disparity|mask|segm|normals|flow|infra|thermal|tactile|(^|[._-])(ir|seg|lidar|touch)\d*([._-]|$)",
    re.IGNORECASE,
)
SUCCESS = ("next.success", "next.reward", "next.done")
"""Columns that tell of success, best first; the last one only tells of an end."""
JOINTS = re.compile(r"joint|shoulder|elbow|waist|forearm|motor_\d|^q\d|main_", re.IGNORECASE)
"""How the numbers of an action are named that is no motion of the hand."""
_VECTORS = {"state": ("observation.state", "state"), "action": ("action", "actions")}


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns of a data set are read.

    Attributes:
      image, wrist: cameras; ``wrist`` may be None.
      state, action: vectors; ``state`` may be None.
      success: a column, or None: then the last step of every episode counts as one.
    """

    image: str
    wrist: str | None
    state: str | None
    action: str
    success: str | None


def choose(
    features: Mapping[str, Any], given: Mapping[str, str | None], where: str, told: Told | None = None
) -> Columns:
    """Returns the columns that are named in ``given``, else those that the set's description gives away.

    Args:
      features: of ``info.json``: name -> ``dtype``, ``shape``, ``names`` and more.
      given: name of a column for ``image``, ``wrist``, ``state``, ``action``; ``"none"`` for no wrist or state.
      where: for messages.
      told: takes what is believed, and what looks odd.

    Raises:
      SourceError: a column that is not there, a camera that is none of colour, or actions of another kind.
    """
    told = told or Told()
    cameras = [name for name, feature in features.items() if feature.get("dtype") in ("image", "video")]
    why = {name: reason for name in cameras if (reason := not_colour(name, features[name]))}
    # Names are all there is to tell cameras of colour by; whoever knows better names the column.
    outside = [name for name in cameras if not HAND.search(name) and name not in why]
    inside = [name for name in cameras if HAND.search(name) and name not in why]

    def pick(role: str, likely: list[str], needed: bool) -> str | None:
        name = given.get(role) or (likely[0] if likely else "none")
        if name == "none" and not needed:
            return None
        if name not in features:
            there = ", ".join(f"{key} ({why[key]})" if key in why else key for key in features)
            raise SourceError(f"{where}: no column {name!r} for the {role}; there are {there}. Name it with --{role}.")
        if role in ("image", "wrist") and (name in why or name not in cameras):
            raise SourceError(f"{where}: {name} is no camera of colour ({why.get(name, 'no pictures')}); name another.")
        return name

    # The names of LeRobot itself first, then those of older conversions.
    vectors = {role: [name for name in names if name in features] for role, names in _VECTORS.items()}
    action = pick("action", vectors["action"], True) or ""
    _check_action(action, features[action], where, told)
    image, wrist = pick("image", outside, True) or "", pick("wrist", inside, False)
    told.facts["cameras"] = f"image {image}, wrist {wrist or 'none'}"
    left = [f"{name} ({why[name]})" if name in why else name for name in cameras if name not in (image, wrist)]
    if left:
        told.facts["cameras"] += f"; left: {', '.join(left)}"
    for role, likely, taken in (("image", outside, image), ("wrist", inside, wrist)):
        if not given.get(role) and len(likely) > 1:
            told.warnings.append(
                f"{len(likely)} cameras could be the {role}: {taken} was taken for being the first of "
                f"{', '.join(likely)}; --{role} names one."
            )
    state = pick("state", vectors["state"], False)
    told.facts["columns"] = f"action {action}, state {state or 'none'}"
    return Columns(image, wrist, state, action, next((name for name in SUCCESS if name in features), None))


def not_colour(name: str, feature: Mapping[str, Any]) -> str:
    """Returns why a camera is none of colour, by what its set says of it; empty where it may be one."""
    about = {**feature, **(feature.get("video_info") or {}), **(feature.get("info") or {})}
    if about.get("is_depth_map") or about.get("video.is_depth_map"):
        return "a depth map"
    if str(about.get("video.pix_fmt") or about.get("pix_fmt") or "").startswith("gray"):
        return f"pixels are {about.get('video.pix_fmt') or about.get('pix_fmt')}"
    channels = _channels(feature)
    if channels not in (None, 3, 4):
        return f"{channels} channel{'s' if channels != 1 else ''}"
    match = NO_COLOUR.search(name)
    return f"{match[0].strip('._-')} by its name" if match else ""


def _channels(feature: Mapping[str, Any]) -> int | None:
    """Returns the channels of a camera, None where the set does not tell."""
    shape, names = list(feature.get("shape") or []), feature.get("names")
    if len(shape) != 3:
        return 1 if len(shape) == 2 else None
    for place, name in enumerate(names if isinstance(names, list) and len(names) == 3 else []):
        if str(name).startswith("channel"):
            return int(shape[place])
    # Channels come last or first; a side of a picture is longer than any number of channels.
    return int(min(shape[0], shape[2]))


def flat_names(names: Any) -> list[str]:
    """Returns the names of a vector's numbers, which sets hold as a list or as a dict of lists."""
    if isinstance(names, Mapping):
        names = [part for value in names.values() for part in (value if isinstance(value, list) else [value])]
    return [str(name) for name in names] if isinstance(names, list) else []


def _check_action(name: str, feature: Mapping[str, Any], where: str, told: Told) -> None:
    """Raises a SourceError unless an action has seven numbers, the gripper last as far as it is named."""
    shape = list(feature.get("shape") or [])
    # Two arms have another number; nothing here could make sense of them.
    if shape != [ACTION_DIM]:
        raise SourceError(f"{where}: {name} has shape {shape}, expected {ACTION_DIM} numbers.")
    names = flat_names(feature.get("names"))
    if len(names) != ACTION_DIM:
        return
    told.facts["numbers of an action"] = ", ".join(names)
    fingers = [i for i, part in enumerate(names) if re.search(r"grip|finger|claw|jaw", part, re.IGNORECASE)]
    if fingers and fingers != [ACTION_DIM - 1]:
        raise SourceError(
            f"{where}: the gripper is number {fingers[0]} of {name} by its names ({', '.join(names)}); expected three "
            "shifts, three turns and the gripper last."
        )
    if any(JOINTS.search(part) for part in names[:-1]) or (not fingers and JOINTS.search(names[-1])):
        told.warnings.append(
            f"the numbers of {name} are named {', '.join(names)}: joints, where motions of the hand are expected."
        )
