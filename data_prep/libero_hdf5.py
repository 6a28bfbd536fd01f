"""LIBERO's HDF5 demonstrations to episodes.

    python -m data_prep.libero_hdf5 datasets/libero_spatial --out data/spatial

A folder holds one ``<task>_demo.hdf5`` a task. In each, ``data/demo_<i>`` has ``actions``, ``states``, ``rewards`` and
``obs/{agentview_rgb, eye_in_hand_rgb, ee_states, gripper_states, joint_states}``. Frames lie as the simulator draws
them and are turned by 180 degrees here, as OpenVLA's data are.

LIBERO's own files hold, in row t, the image *after* action t and the simulator state *before* it; files made anew by
OpenVLA's script hold both before it. Which it is, is read off the joints: they are in the images' rows and in
the states'.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np

from data_prep import convert, files
from data_prep.beliefs import Told
from data_prep.demos import Demo, SourceError, Stream, find_success
from wovr_jax.core.disk import InUseError
from wovr_jax.data.episodes import EpisodesError, instruction_of

FRAMES, WRIST = "obs/agentview_rgb", "obs/eye_in_hand_rgb"
BLOCK = 16
"""Pictures that are read at once."""
JOINTS = slice(1, 8)
"""The arm's joints in a row of ``states``; the first number is the time."""


def find(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the data files of a folder, or the one file named.

    Raises:
      SourceError: when there is none; the message says what there is.
    """
    paths = [folder] if folder.is_file() else sorted(path for path in _list(folder) if _is_data(path))
    if not paths:
        raise SourceError(
            f"{folder}: no folder with .hdf5 files of demonstrations: "
            f"{files.nearby(folder, _is_data, 'a file of demonstrations')}."
        )
    return paths


def _is_data(path: pathlib.Path) -> bool:
    # Whatever its name is written like; a link to a file that is not there is named when it is opened.
    return path.suffix.lower() in (".hdf5", ".h5") and not path.is_dir()


def _list(folder: pathlib.Path) -> list[pathlib.Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


@contextlib.contextmanager
def _open(path: pathlib.Path) -> Iterator[h5py.File]:
    """Opens a file, and says of one that cannot be opened what it is."""
    files.check(path, "an HDF5 file", b"\x89HDF")
    try:
        file = h5py.File(path, "r")
    except OSError as error:  # h5py's word for damage, and for a lock
        raise SourceError(files.unreadable(path, "an HDF5 file", error)) from error
    with file:
        yield file


def survey(paths: list[pathlib.Path]) -> Told:
    """Returns what the heads of the files say of themselves: how pictures lie, what actions are, how fast they come."""
    told, seen = Told({"success": "where the reward is 1"}), {}
    for path in paths:
        # What is wrong with a file is said when it is read.
        with contextlib.suppress(SourceError), _open(path) as file:
            for name, value in _describe(file).items():
                seen.setdefault(name, {}).setdefault(value, path.name)
    for name, values in seen.items():
        told.facts[name] = ", ".join(map(str, values))
        if len(values) > 1:
            told.warnings.append(
                f"{name} differs between files: {', '.join(f'{v} in {n}' for v, n in values.items())}."
            )
    if set(seen.get("image convention", {"opengl": ""})) != {"opengl"}:
        told.warnings.append(
            f"pictures are said to lie by the convention {told.facts['image convention']!r}, and LIBERO's are "
            "'opengl', upside down; look at some frames, and name another --rotation."
        )
    if "absolute" in seen.get("actions are", {}):
        told.warnings.append("the controller took positions (control_delta is false), and actions here are changes.")
    return told


def _describe(file: h5py.File) -> dict[str, str]:
    """Returns what a file's attributes tell, as far as they do."""
    attributes = dict(file["data"].attrs) if isinstance(file.get("data"), h5py.Group) else {}
    facts = {}
    if "macros_image_convention" in attributes:
        facts["image convention"] = _text(attributes["macros_image_convention"])
    with contextlib.suppress(ValueError, AttributeError, TypeError):
        settings = json.loads(_text(attributes.get("env_args", "{}"))).get("env_kwargs", {})
        if "control_freq" in settings:
            facts["frame rate"] = f"{settings['control_freq']} steps in a second"
        controller = settings.get("controller_configs", {})
        if "control_delta" in controller:
            facts["actions are"] = "changes" if controller["control_delta"] else "absolute"
    return facts


def read(path: pathlib.Path) -> Iterator[Demo | SourceError]:
    """Yields the demonstrations of a file by their numbers, and in the place of a damaged one the error that says so.

    Raises:
      SourceError: naming the file, when it is none of demonstrations or cannot be opened.
    """
    with _open(path) as file:
        group: Any = file.get("data")
        if not isinstance(group, h5py.Group):
            raise SourceError(
                f"{path}: not a file of demonstrations (it has no group 'data'); in it there is "
                f"{', '.join(list(file)[:8]) or 'nothing'}."
            )
        names = sorted(group, key=_number)
        # Files that were cut short while copying still open; their header counts what should be there.
        if group.attrs.get("num_demos", len(names)) != len(names) or not names:
            counted = group.attrs.get("num_demos", "none")
            yield SourceError(f"{path}: {len(names)} demonstrations, its header counts {counted}.")
        for name in names:
            where = f"{path.name}, {name}"
            try:
                yield demo(group[name], where, instruction_of(path.stem))
            except SourceError as error:
                yield error
            except (OSError, RuntimeError, KeyError) as error:  # h5py's words for damage inside
                yield SourceError(f"{where}: damaged or cut short ({type(error).__name__}: {error}).")


def demo(group: Any, name: str, instruction: str) -> Demo:
    """Reads one demonstration of an open file; its pictures are read when they are asked for."""
    if not isinstance(group, h5py.Group):
        raise SourceError(f"{name}: expected a group with actions and pictures, got {type(group).__name__}.")
    odd: list[str] = []
    actions_TA, reward_T = (_array(group, key, name) for key in ("actions", "rewards"))
    steps = len(actions_TA)
    if group.attrs.get("num_samples", steps) != steps:
        raise SourceError(f"{name}: {steps} actions, its header counts {group.attrs['num_samples']}; cut short?")
    # Proprioception in the order of the episodes: hand position and rotation, then the two fingers.
    state = None
    if "obs/ee_states" in group and "obs/gripper_states" in group:
        state = np.concatenate([_array(group, f"obs/{key}_states", name) for key in ("ee", "gripper")], axis=1)
    success_T = find_success(reward_T, name, odd)
    if "dones" in group and not success_T.any() and np.asarray(_array(group, "dones", name), bool)[:-1].any():
        odd.append("its dones come before the end though no reward does")
    return Demo(
        name=name,
        frame_THWC=_pictures(group, FRAMES, name),
        action_TA=actions_TA,
        success_T=success_T,
        instruction=instruction,
        wrist_THWC=_pictures(group, WRIST, name) if WRIST in group else None,
        state_TD=state,
        pairing=pairing(group, name),
        odd=odd,
    )


def _pictures(group: h5py.Group, key: str, name: str) -> Stream:
    """Returns pictures that are read in blocks, when they are asked for."""
    dataset = group.get(key)
    if not isinstance(dataset, h5py.Dataset):
        seen: Any = group.get("obs", {})
        cameras = [camera for camera in seen if "rgb" in camera or "image" in camera]
        raise SourceError(f"{name}: {key} is missing; cameras there are {', '.join(cameras) or 'none'}.")
    if dataset.ndim != 4 or dataset.shape[3] != 3 or dataset.dtype != np.uint8:
        raise SourceError(
            f"{name}: expected {key} as uint8 (T, H, W, 3), got {dataset.dtype}{list(dataset.shape)}; depth, or "
            "channels first?"
        )

    def make() -> Iterator[np.ndarray]:
        for first in range(0, len(dataset), BLOCK):
            try:
                block = dataset[first : first + BLOCK]
            except (OSError, RuntimeError) as error:
                raise SourceError(f"{name}: {key} is damaged from frame {first} on ({error}).") from error
            yield from block

    return Stream(len(dataset), make)


def pairing(group: h5py.Group, name: str) -> str:
    """Returns ``"after"`` or ``"before"``, by which rows of ``states`` the joints of the images' rows agree with.

    Raises:
      SourceError: when the arm does not move enough to tell, or the file has no joints.
    """
    joints_TJ, states_TJ = _array(group, "obs/joint_states", name), _array(group, "states", name)[:, JOINTS]
    if joints_TJ.shape != states_TJ.shape or len(joints_TJ) < 3:
        raise SourceError(f"{name}: joints of shape {joints_TJ.shape} beside states of {states_TJ.shape}.")
    # Row 0 of a file made anew is the state before the no-op steps that its first image comes after.
    before = np.abs(joints_TJ[1:] - states_TJ[1:]).mean()
    after = np.abs(joints_TJ[:-1] - states_TJ[1:]).mean()
    # Twice as far is a wide margin: the right pairing agrees but for the states' rounding.
    if max(before, after) < 2 * min(before, after) or max(before, after) == 0:
        raise SourceError(f"{name}: cannot tell whether images come before or after their actions.")
    return "before" if before < after else "after"


def _array(group: h5py.Group, key: str, name: str) -> np.ndarray:
    dataset = group.get(key)
    if not isinstance(dataset, h5py.Dataset):
        raise SourceError(f"{name}: {key} is missing.")
    return dataset[()]


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _number(name: str) -> tuple[int, Any]:
    # By number, for HDF5 lists names by alphabet: demo_10 before demo_2.
    digits = name.rpartition("_")[2]
    return (int(digits), "") if digits.isdigit() else (sys.maxsize, name)


def main() -> None:
    """Reads a folder of HDF5 files and writes episodes."""
    args = convert.parser(__doc__, rotation="turn", gripper="environment", actor="human").parse_args()
    try:
        paths = find(args.source)
        # One file a task, so the names of the files are the list of tasks.
        tasks = [instruction_of(path.stem) for path in paths]
        convert.run(args, [(path.name, path) for path in paths], read, tasks, "LIBERO HDF5", survey(paths))
    except (SourceError, EpisodesError, InUseError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
