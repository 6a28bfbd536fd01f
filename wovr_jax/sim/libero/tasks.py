"""LIBERO's tasks, instructions, official initial states and the two evaluation protocols in use, without torch.

``libero.libero.benchmark`` offers the same and imports torch, so the files that it reads are read here directly.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import io
import pathlib
import pickle
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from wovr_jax.data.instructions import from_file_name
from wovr_jax.sim.libero.settings import SUITES
from wovr_jax.sim.libero.setup import LiberoError, package_folder

DRAWN = -1
"""Stands in the place of an initial state's number for the layout that the task itself draws with the trial's seed."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One task of a suite.

    Attributes:
      suite: one of ``SUITES``.
      index: its number in the suite, in the benchmark's natural order.
      name: the stem of its files.
      instruction: what the robot is asked to do.
    """

    suite: str
    index: int
    name: str
    instruction: str

    @property
    def bddl_file(self) -> pathlib.Path:
        """The file with the task's scene and goal."""
        return package_folder() / "bddl_files" / self.suite / f"{self.name}.bddl"

    @property
    def init_file(self) -> pathlib.Path:
        """The file with the task's official initial states."""
        return package_folder() / "init_files" / self.suite / f"{self.name}.pruned_init"


@dataclasses.dataclass(frozen=True)
class EvaluationProtocol:
    """How an episode begins and ends.

    Attributes:
      name: the protocol's name.
      settle: no-op control steps after the reset, in which objects come to rest and the gripper opens. They do not
        count towards the horizon.
      settle_gripper: the gripper's command in those steps, -1 for open.
      horizons: suite -> most control steps of an episode.
      stops: whether an episode ends at its first success. Otherwise it runs to the horizon, and a success in any
        step counts.
      trials: initial states of a task.
    """

    name: str
    settle: int
    settle_gripper: float
    horizons: dict[str, int]
    stops: bool
    trials: int = 50


PROTOCOLS = {
    # openvla-oft: experiments/robot/libero/run_libero_eval.py
    "openvla": EvaluationProtocol("openvla", 10, -1.0, dict(zip(SUITES, (220, 280, 300, 520, 400), strict=True)), True),
    # RLinf: rlinf/envs/libero/libero_env.py with the horizons of its WoVR configs
    "rlinf": EvaluationProtocol("rlinf", 15, -1.0, dict.fromkeys(SUITES, 512), False),
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """Where an episode begins.

    Attributes:
      task: the task.
      init: the number of one of its official initial states, or ``DRAWN``.
      seed: the seed of the reset; it places the fixtures, and in a drawn layout everything.
      repeat: tells episodes apart that begin alike.
    """

    task: Task
    init: int
    seed: int = 0
    repeat: int = 0

    @property
    def name(self) -> str:
        """The trial as a word for files: ``libero_spatial/3/17/0`` is task 3 from initial state 17 with seed 0."""
        repeat = f"/{self.repeat}" if self.repeat else ""
        return f"{self.task.suite}/{self.task.index}/{self.init}/{self.seed}{repeat}"


def draw_seed(trial: Trial, number: int) -> int:
    """Returns a seed in [0, 2**32) that depends on the trial and ``number`` alone, e.g. the number of a chunk."""
    # Python's own hash() of text differs from process to process.
    digest = hashlib.sha256(f"{trial.name}/{number}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def protocol(name: str) -> EvaluationProtocol:
    """Returns the protocol of that name.

    Raises:
      LiberoError: for a name that is not in ``PROTOCOLS``.
    """
    if name not in PROTOCOLS:
        raise LiberoError(f"LIBERO protocol: expected one of {', '.join(PROTOCOLS)}, got {name!r}.")
    return PROTOCOLS[name]


@functools.cache
def tasks(suite: str) -> tuple[Task, ...]:
    """Returns the tasks of a suite in their official order.

    Raises:
      LiberoError: for an unknown suite, or when LIBERO is not installed.
    """
    if suite not in SUITES:
        raise LiberoError(f"LIBERO suite: expected one of {', '.join(SUITES)}, got {suite!r}.")
    # The benchmark's own list, loaded as a lone file, because importing its package imports torch.
    path = package_folder() / "benchmark" / "libero_suite_task_map.py"
    spec = importlib.util.spec_from_file_location("_libero_task_map", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise LiberoError(f"{path} is missing; this is not the LIBERO package that was expected.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return tuple(Task(suite, i, name, from_file_name(name)) for i, name in enumerate(module.libero_task_map[suite]))


def trials(suite: str, inits: Iterable[int], *, only: Sequence[int] | None = None, seed: int = 0) -> list[Trial]:
    """Returns every task of a suite at every initial state, task by task.

    Args:
      suite: one of ``SUITES``.
      inits: numbers of official initial states.
      only: indices of the tasks that are wanted; None for all of them.
      seed: the seed of every reset.

    Raises:
      LiberoError: for an unknown suite or task.
    """
    known = tasks(suite)
    for index in only or ():
        if not 0 <= index < len(known):
            raise LiberoError(f"{suite} has tasks 0 to {len(known) - 1}, and {index} was asked for.")
    wanted = known if only is None else [known[index] for index in only]
    states = list(inits)
    return [Trial(task, init, seed) for task in wanted for init in states]


def init_states(task: Task) -> np.ndarray:
    """Returns the official initial states, (N, 1 + nq + nv) float64: time, then positions, then velocities.

    Raises:
      LiberoError: for a file that is missing, damaged, or holds anything but one array of numbers.
    """
    return read_init_states(task.init_file)


def read_init_states(path: pathlib.Path) -> np.ndarray:
    """Reads the array of a ``.pruned_init``: a zip as torch writes it, with one pickled numpy array and no tensor.

    Raises:
      LiberoError: as ``init_states``.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
            states = _ArraysOnly(io.BytesIO(archive.read(member))).load()
    except FileNotFoundError:
        raise LiberoError(f"{path}: no such file of initial states.") from None
    except Exception as error:  # a damaged zip or pickle fails in every way there is
        raise LiberoError(f"{path}: cannot be read as initial states ({type(error).__name__}: {error}).") from error
    if not isinstance(states, np.ndarray) or states.ndim != 2 or states.dtype != np.float64:
        is_array = isinstance(states, np.ndarray)
        kind = f"{states.dtype}{list(states.shape)}" if is_array else type(states).__name__
        raise LiberoError(f"{path}: expected an array (states, numbers) of float64, got {kind}.")
    return states


class _ArraysOnly(pickle.Unpickler):
    """Resolves only the four names that an array of numbers needs, because a pickle may call whatever it can name."""

    NAMES = (
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("_codecs", "encode"),
    )

    def find_class(self, module: str, name: str) -> Any:
        # numpy 2 renamed numpy.core to numpy._core; the files have the old name, a new pickle would have the new one.
        plain = module.replace("numpy._core", "numpy.core")
        if (plain, name) not in self.NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which an array of numbers does not need")
        return super().find_class(plain.replace("numpy.core", "numpy._core"), name)
