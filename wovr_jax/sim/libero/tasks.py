"""LIBERO's tasks, instructions, official initial states and the two protocols in use, without torch.

``libero.libero.benchmark`` knows the same and imports torch; the files it reads are read here directly.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import io
import pathlib
import pickle
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from wovr_jax.data.episodes import instruction_of
from wovr_jax.sim.libero.settings import SUITES
from wovr_jax.sim.libero.setup import LiberoError, package_folder

DRAWN = -1
"""Instead of the number of an initial state: the layout that the task draws with the seed of the trial."""


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
        """Its scene and goal."""
        return package_folder() / "bddl_files" / self.suite / f"{self.name}.bddl"

    @property
    def init_file(self) -> pathlib.Path:
        """Its initial states."""
        return package_folder() / "init_files" / self.suite / f"{self.name}.pruned_init"


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How an episode begins and ends.

    Attributes:
      name: of the protocol.
      settle: no-op steps after the reset, outside the limit: objects come to rest, the gripper opens.
      settle_gripper: the gripper's command in those steps.
      horizons: suite -> most steps of an episode.
      stops: whether an episode ends at its first success; otherwise it runs to the horizon and a success in any
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
    "openvla": Protocol("openvla", 10, -1.0, dict(zip(SUITES, (220, 280, 300, 520, 400), strict=True)), True),
    # RLinf: rlinf/envs/libero/libero_env.py with the horizons of its WoVR configs
    "rlinf": Protocol("rlinf", 15, -1.0, dict.fromkeys(SUITES, 512), False),
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """Where an episode begins: a task, one of its official initial states or ``DRAWN``, and the seed of the reset.

    ``repeat`` tells episodes apart that begin alike.
    """

    task: Task
    init: int
    seed: int = 0
    repeat: int = 0


def protocol(name: str) -> Protocol:
    """A protocol by name.

    Raises:
      LiberoError: for a name that is not in ``PROTOCOLS``.
    """
    if name not in PROTOCOLS:
        raise LiberoError(f"LIBERO protocol: expected one of {', '.join(PROTOCOLS)}, got {name!r}.")
    return PROTOCOLS[name]


@functools.cache
def tasks(suite: str) -> tuple[Task, ...]:
    """The tasks of a suite in their official order.

    Raises:
      LiberoError: for an unknown suite, or when LIBERO is not installed.
    """
    if suite not in SUITES:
        raise LiberoError(f"LIBERO suite: expected one of {', '.join(SUITES)}, got {suite!r}.")
    return tuple(Task(suite, i, name, instruction_of(name)) for i, name in enumerate(_task_map()[suite]))


def trials(suite: str, inits: Iterable[int], *, only: Sequence[int] | None = None, seed: int = 0) -> list[Trial]:
    """Every task of a suite at every initial state, task by task.

    Args:
      suite: one of ``SUITES``.
      inits: which of the official initial states.
      only: indices of the tasks wanted; all without.
      seed: of every reset.

    Raises:
      LiberoError: for a suite or a task that is not there.
    """
    there = tasks(suite)
    for index in only or ():
        if not 0 <= index < len(there):
            raise LiberoError(f"{suite} has tasks 0 to {len(there) - 1}, and {index} was asked for.")
    chosen = there if only is None else [there[index] for index in only]
    states = list(inits)
    return [Trial(task, init, seed) for task in chosen for init in states]


@functools.cache
def _task_map() -> dict[str, list[str]]:
    """The benchmark's own list, loaded as a lone file because its package imports torch."""
    path = package_folder() / "benchmark" / "libero_suite_task_map.py"
    spec = importlib.util.spec_from_file_location("_libero_task_map", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise LiberoError(f"{path} is missing; this is not the LIBERO package that was expected.")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found.libero_task_map


def init_states(task: Task) -> np.ndarray:
    """(trials, 1 + nq + nv) float64 official initial states: time, positions, velocities.

    Raises:
      LiberoError: a file that is missing, damaged or holds more than one array of numbers.
    """
    return read_init_states(task.init_file)


def read_init_states(path: pathlib.Path) -> np.ndarray:
    """The array in a ``.pruned_init``: a zip as torch writes it, with one pickled numpy array and no tensor."""
    try:
        with zipfile.ZipFile(path) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
            states = _ArraysOnly(io.BytesIO(archive.read(member))).load()
    except FileNotFoundError:
        raise LiberoError(f"{path}: no such file of initial states.") from None
    except Exception as error:  # a damaged zip or pickle fails in every way there is
        raise LiberoError(f"{path}: cannot be read as initial states ({type(error).__name__}: {error}).") from error
    if not isinstance(states, np.ndarray) or states.ndim != 2 or states.dtype != np.float64:
        raise LiberoError(f"{path}: expected an array (states, numbers) of float64, got {_kind(states)}.")
    return states


def _kind(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__


class _ArraysOnly(pickle.Unpickler):
    """Knows the four names that an array of numbers needs; a pickle may call what it can name."""

    NAMES = (
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("_codecs", "encode"),
    )

    def find_class(self, module: str, name: str) -> Any:
        plain = module.replace("numpy._core", "numpy.core")
        if (plain, name) not in self.NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which an array of numbers does not need")
        # numpy.core is called numpy._core since numpy 2.
        return super().find_class(plain.replace("numpy.core", "numpy._core"), name)
