"""RLinf's start states for imagined rollouts, to ours.

    python -m data_prep.rlinf_starts RLinf-Wan-LIBERO-Goal/dataset --out data/goal_starts
    python -m data_prep.rlinf_starts RLinf-Wan-LIBERO-Goal/dataset --out data/goal_kir --episodes

A folder holds one ``.npy`` a trajectory: a list of frames, each a dict with ``image`` (uint8,
height x width x 3), ``delta_action`` (7 numbers: the action that led into the frame) and
``instruction`` or ``task``. A file of one frame is the start of an episode. A file of more,
named ``*_kir.npy``, is a keyframe: its first frame is the episode's first, the anchor, and its
last four are the memory, with their actions. So RLinf:rlinf/envs/world_model/
world_model_wan_env.py reads them; files of two or three frames count as starts there and here.

Tasks are numbered by instruction in alphabetical order, as RLinf's task-embedding classifier
numbers them: for that classifier the folder must hold all of its suite's instructions, or they
have to be given with ``--tasks``.

What the files do not say: at which step of its episode a keyframe lies (``step_K`` counts the
frames of the file), and the simulator's state (``played_KSA`` are the file's actions, and with
the seed of the file's name they replay only if nothing was cut out between). An episode made of
a keyframe file has no success in it, since it leads up to a failure.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data_prep import beliefs
from data_prep.convert import read_tasks, shorten
from data_prep.demos import SourceError
from data_prep.files import check, nearby, place
from data_prep.plain_pickle import RefusedError, load
from wovr_jax.core.disk import InUseError
from wovr_jax.data import episodes as disk
from wovr_jax.data import starts
from wovr_jax.data.batches import NoDataError
from wovr_jax.data.starts import RULES, UNKNOWN, Starts
from wovr_jax.types import ACTION_DIM, NULL_ACTION, Episode

MEMORY = 4
"""Frames of memory, and so the fewest of a keyframe file."""
ACTOR = "rlinf"


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """The content of one file.

    Attributes:
      name: of the file.
      frame_SHWC: (S + 1, H, W, 3) uint8.
      action_SA: (S + 1, 7) float32; ``action_SA[i]`` led into frame i. Null where the file has none.
      instruction: what the robot was asked to do.
      seed: the number after ``seed_`` in the name, 0 without.
    """

    name: str
    frame_SHWC: np.ndarray
    action_SA: np.ndarray
    instruction: str
    seed: int

    @property
    def is_keyframe(self) -> bool:
        """Whether the file has a memory of its own; shorter ones count as starts of episodes."""
        return len(self.frame_SHWC) >= MEMORY


def read(
    folder: str | os.PathLike, *, keyframes: bool = True, refused: list[str] | None = None
) -> Iterator[Trajectory]:
    """Yields the trajectories of a folder, in the order of their names.

    Args:
      folder: with the ``.npy`` files.
      keyframes: whether files named ``*_kir.npy`` are read.
      refused: takes why files were left out; without it the first such file ends the reading.

    Raises:
      NoDataError: no such folder, or no file in it.
      RefusedError: naming the file, when it holds anything but plain data or misses something.
    """
    folder = pathlib.Path(folder)
    files = sorted(folder.glob("*.npy")) if folder.is_dir() else []
    # By name, as RLinf tells them apart when it is asked for starts only.
    files = [file for file in files if keyframes or not file.stem.endswith("_kir")]
    if not files:
        found = nearby(folder, lambda path: path.suffix == ".npy", "a file .npy")
        raise NoDataError(f"{folder}: no folder with .npy files{'' if keyframes else ' but keyframes'}: {found}.")
    for file in files:
        try:
            yield trajectory(file)
        except RefusedError as error:
            if refused is None:
                raise
            refused.append(str(error))


def trajectory(path: str | os.PathLike) -> Trajectory:
    """Reads and checks one file; see :func:`read` for what is refused."""
    path = pathlib.Path(path)
    try:
        check(path, "a file of numpy", b"\x93NUMPY")
    except SourceError as error:
        raise RefusedError(str(error)) from error
    # Never by np.load with pickles allowed: such a file may run any function.
    frames = load(path)
    if not frames or not all(isinstance(frame, dict) for frame in frames):
        raise RefusedError(f"{path}: expected a list of frames, each a dict, got {_kinds(frames)}.")
    images = [_image(frame, f"{path}, frame {i}") for i, frame in enumerate(frames)]
    if len({image.shape for image in images}) > 1:
        raise RefusedError(f"{path}: its frames have different sizes, {sorted({image.shape for image in images})}.")
    # The start of an episode has no action that led to it; a memory has one for each frame.
    needed = len(frames) >= MEMORY
    actions = [_action(frame, f"{path}, frame {i}", needed) for i, frame in enumerate(frames)]
    seed = re.search(r"seed_(\d+)", path.stem)
    return Trajectory(
        path.name, np.stack(images), np.stack(actions), _instruction(frames[0], path), int(seed[1]) if seed else 0
    )


def tasks(trajectories: Sequence[Trajectory], given: Sequence[str] | None = None) -> list[str]:
    """Returns the instructions in the order of their task numbers: ``given``, or all that occur, by alphabet.

    Raises:
      NoDataError: when an instruction is not among those given.
    """
    known = sorted({file.instruction for file in trajectories})
    # Numbers that shift by one task would train every task with another one's words.
    strange = sorted(set(known) - set(given or known))
    if strange:
        raise NoDataError(
            f"{len(strange)} instructions are not among the {len(given or ())} tasks: {strange[0]!r}, ..."
        )
    return list(given or known)


def judge(trajectories: Sequence[Trajectory], refused: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Returns what was believed of the files, name -> evidence, and a warning for each thing that looks odd."""
    keys = [file for file in trajectories if file.is_keyframe]
    few = [file.name for file in trajectories if 1 < len(file.frame_SHWC) < MEMORY]
    unnamed = [file.name for file in trajectories if not re.search(r"seed_\d+", file.name)]
    texts = sorted({file.instruction for file in trajectories})
    warnings = []
    if few:
        warnings.append(f"{len(few)} files of two or three frames count as starts, of their first frame: {few[0]}.")
    if unnamed:
        warnings.append(f"{len(unnamed)} files have no seed in their name and get 0: {unnamed[0]}.")
    if strange := [text for text in texts if beliefs.EMPTY_WORDS.fullmatch(text)]:
        warnings.append(f"instructions that ask for nothing: {strange}.")
    flat = [file.name for file in trajectories if np.ptp(file.frame_SHWC[0]) < 4]
    if flat:
        warnings.append(f"{len(flat)} files begin with a picture of one shade: {flat[0]}.")
    facts = {"instructions": f"{len(texts)}: {'; '.join(texts[:5])}{'; ...' if len(texts) > 5 else ''}"}
    facts["files"] = f"{len(trajectories) - len(keys)} starts, {len(keys)} keyframes, {len(refused)} refused"
    if keys:
        gripper_N = np.concatenate([file.action_SA[:, -1] for file in keys])
        facts["gripper"] = f"-1 open, 1 closed: values {gripper_N.min():.3g} to {gripper_N.max():.3g}"
        if gripper_N.min() > -0.1 and gripper_N.min() < 0.9:
            warnings.append(f"the gripper never opens: its least value is {gripper_N.min():.3g}, and -1 is open.")
        if max(np.abs(file.action_SA[:, :-1]).max() for file in keys) > 1 + 1e-3:
            warnings.append("motions beyond -1 to 1, which the simulator cuts off.")
    return facts, warnings


def to_starts(trajectories: Sequence[Trajectory], instructions: Sequence[str]) -> Starts:
    """Returns the table that rollouts begin from: starts of episodes first, then keyframes.

    Raises:
      NoDataError: for trajectories of different frame sizes, or none.
    """
    # Our table keeps the starts of episodes in its first rows; the sort is stable, so names stay in order otherwise.
    ordered = sorted(trajectories, key=lambda file: file.is_keyframe)
    sizes = {file.frame_SHWC.shape[1:] for file in ordered}
    # The table is one array, and a network has one size of frames.
    if len(sizes) != 1:
        raise NoDataError(f"start states of one frame size are needed, got {sorted(sizes) or 'none'}.")
    null_A = np.asarray(NULL_ACTION, np.float32)
    longest = max(len(file.frame_SHWC) - 1 for file in ordered)
    # Padded with null actions behind each start, as in tables of our own.
    played_KSA = np.tile(null_A, (len(ordered), max(longest, 1), 1))
    memories, actions, steps = [], [], []
    for file, played_SA in zip(ordered, played_KSA, strict=True):
        key = file.is_keyframe
        # A start has its one frame M times, as at the reset of every rollout.
        memories.append(file.frame_SHWC[-MEMORY:] if key else np.repeat(file.frame_SHWC[:1], MEMORY, axis=0))
        actions.append(file.action_SA[-MEMORY:] if key else np.tile(null_A, (MEMORY, 1)))
        steps.append(len(file.frame_SHWC) - 1 if key else 0)
        # The first action led into the anchor, which is before anything that could be played.
        played_SA[: steps[-1]] = file.action_SA[1 : 1 + steps[-1]]
    # By which rule they were taken the files do not say; ``last_event`` is the nearest of ours.
    rule = [RULES.index("last_event" if file.is_keyframe else "initial") for file in ordered]
    return Starts(
        anchor_KHWC=np.stack([file.frame_SHWC[0] for file in ordered]),
        memory_KMHWC=np.stack(memories),
        action_KMA=np.stack(actions),
        played_KSA=played_KSA,
        task_K=np.array([instructions.index(file.instruction) for file in ordered], np.int32),
        step_K=np.array(steps, np.int32),
        seed_K=np.array([file.seed for file in ordered], np.int32),
        init_K=np.full(len(ordered), UNKNOWN, np.int32),
        episode_K=np.arange(len(ordered), dtype=np.int32),
        rule_K=np.array(rule, np.int32),
        initials=sum(not file.is_keyframe for file in ordered),
    )


def to_episodes(trajectories: Sequence[Trajectory], instructions: Sequence[str]) -> Iterator[Episode]:
    """Yields keyframe files as short episodes; a file of one frame has no step and makes none."""
    for file in trajectories:
        if file.is_keyframe:
            yield Episode(
                frame_SHWC=file.frame_SHWC,
                action_SA=file.action_SA[1:],  # there the action leads out of a frame, here into it
                success_S=np.zeros(len(file.frame_SHWC), bool),
                instruction=file.instruction,
                task=instructions.index(file.instruction),
                seed=file.seed,
                actor=ACTOR,
                label_SA=file.action_SA[1:],
            )


def _image(frame: dict[Any, Any], where: str) -> np.ndarray:
    image = frame.get("image")
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        got = f"{image.dtype}{list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise RefusedError(f"{where}: expected 'image' as uint8 (height, width, 3), got {got}.")
    return image


def _action(frame: dict[Any, Any], where: str, needed: bool) -> np.ndarray:
    # RLinf leaves it out at starts, where nothing led into the frame.
    if "delta_action" not in frame and not needed:
        return np.asarray(NULL_ACTION, np.float32)
    try:
        action = np.asarray(frame["delta_action"], np.float32)
    except (KeyError, TypeError, ValueError):
        action = np.empty(0, np.float32)
    if action.shape != (ACTION_DIM,) or not np.isfinite(action).all():
        raise RefusedError(
            f"{where}: expected 'delta_action' as {ACTION_DIM} finite numbers, got {frame.get('delta_action')}."
        )
    return action


def _instruction(frame: dict[Any, Any], path: pathlib.Path) -> str:
    # Either name occurs, in files of different sets.
    text = frame.get("instruction", frame.get("task"))
    text = text.decode() if isinstance(text, bytes) else text
    if not isinstance(text, str) or not text.strip():
        raise RefusedError(f"{path}: expected 'instruction' or 'task' as text in the first frame, got {text!r}.")
    return text.strip()


def _kinds(frames: list[Any]) -> str:
    return ", ".join(sorted({type(frame).__name__ for frame in frames})) or "nothing"


def main() -> None:
    """Reads a folder and writes start states or episodes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=place, help="folder of .npy files")
    parser.add_argument("--out", type=place, required=True, help="folder to write")
    parser.add_argument("--episodes", action="store_true", help="write keyframe files as short episodes")
    parser.add_argument("--no-keyframes", action="store_true", help="leave *_kir.npy out")
    parser.add_argument("--tasks", type=place, help="text file, one instruction a line, in order of task number")
    parser.add_argument("--skip", action="store_true", help="leave out what cannot be read, and say so")
    parser.add_argument("--strict", action="store_true", help="write nothing where anything looks odd")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    args = parser.parse_args()
    try:
        refused: list[str] = []
        files = list(read(args.folder, keyframes=not args.no_keyframes, refused=refused))
        if refused and not (args.skip and files):
            said = f"{len(refused)} files cannot be read; --skip leaves them out and keeps the other {len(files)}."
            raise RefusedError("\n".join([said, *shorten(refused)]))
        for message in shorten(refused):
            print(f"skipped: {message}", file=sys.stderr)
        believed, warnings = judge(files, refused)
        print(beliefs.render(believed, warnings))
        if args.strict and warnings:
            raise RefusedError("\n".join(["--strict: nothing was written, for these look odd.", *warnings]))
        instructions = tasks(files, read_tasks(args.tasks) if args.tasks else None)
        meta: dict[str, Any] = {"source": "RLinf start states", "tasks": instructions}
        meta |= {"skipped": refused, "believed": believed, "warnings": warnings}
        if args.episodes:
            disk.write(args.out, to_episodes(files, instructions), meta=meta, overwrite=args.overwrite)
        else:
            starts.save(args.out, to_starts(files, instructions), meta=meta, overwrite=args.overwrite)
    except (RefusedError, SourceError, NoDataError, disk.EpisodesError, InUseError, OSError) as error:
        sys.exit(str(error))
    keys = sum(file.is_keyframe for file in files)
    print(f"{args.out}: {len(files) - keys} starts and {keys} keyframes of {len(instructions)} tasks")


if __name__ == "__main__":
    main()
