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

import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np

from data_prep import convert
from data_prep.demos import Demo, SourceError
from wovr_jax.data.episodes import EpisodesError, instruction_of

FRAMES, WRIST = "obs/agentview_rgb", "obs/eye_in_hand_rgb"
JOINTS = slice(1, 8)
"""The arm's joints in a row of ``states``; the first number is the time."""


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the data files of a folder, or the one file named.

    Raises:
      SourceError: when there is none.
    """
    paths = [folder] if folder.is_file() else sorted(folder.glob("*.hdf5"))
    if not paths:
        raise SourceError(f"{folder}: no folder with .hdf5 files.")
    return paths


def read(path: pathlib.Path) -> Iterator[Demo]:
    """Yields the demonstrations of a file, in the order of their numbers.

    Raises:
      SourceError: naming file and demonstration, when something is missing, damaged or of another shape.
    """
    try:
        with h5py.File(path, "r") as file:
            if not isinstance(file.get("data"), h5py.Group):
                raise SourceError(f"{path}: not a file of demonstrations (it has no group 'data').")
            names = sorted(file["data"], key=_number)
            # Files that were cut short while copying still open; their header counts what should be there.
            if file["data"].attrs.get("num_demos", len(names)) != len(names) or not names:
                raise SourceError(
                    f"{path}: {len(names)} demonstrations, its header counts {file['data'].attrs.get('num_demos')}."
                )
            for name in names:
                yield demo(file["data"][name], f"{path.name}, {name}", instruction_of(path.stem))
    except OSError as error:  # h5py's word for damage
        raise SourceError(f"{path}: damaged or cut short ({error}).") from error


def demo(group: h5py.Group, name: str, instruction: str) -> Demo:
    """Reads one demonstration of an open file."""
    arrays = {key: _array(group, key, name) for key in ("actions", FRAMES, "rewards")}
    steps = len(arrays["actions"])
    if group.attrs.get("num_samples", steps) != steps:
        raise SourceError(f"{name}: {steps} actions, its header counts {group.attrs['num_samples']}; cut short?")
    # Proprioception in the order of the episodes: hand position and rotation, then the two fingers.
    state = None
    if "obs/ee_states" in group and "obs/gripper_states" in group:
        state = np.concatenate([_array(group, f"obs/{key}_states", name) for key in ("ee", "gripper")], axis=1)
    return Demo(
        name=name,
        frame_THWC=arrays[FRAMES],
        action_TA=arrays["actions"],
        # The reward is 1 in the steps that end with the task done, else 0.
        success_T=arrays["rewards"] > 0,
        instruction=instruction,
        wrist_THWC=_array(group, WRIST, name) if WRIST in group else None,
        state_TD=state,
        pairing=pairing(group, name),
    )


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


def _number(name: str) -> tuple[int, Any]:
    # By number, for HDF5 lists names by alphabet: demo_10 before demo_2.
    digits = name.rpartition("_")[2]
    return (int(digits), "") if digits.isdigit() else (sys.maxsize, name)


def main() -> None:
    """Reads a folder of HDF5 files and writes episodes."""
    args = convert.parser(__doc__, rotation="turn", gripper="environment", actor="human").parse_args()
    try:
        paths = files(args.source)
        # One file a task, so the names of the files are the list of tasks.
        tasks = [instruction_of(path.stem) for path in paths]
        convert.run(args, [(path.name, path) for path in paths], read, tasks, "LIBERO HDF5")
    except (SourceError, EpisodesError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
