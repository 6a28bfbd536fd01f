"""LIBERO in a run: its settings, tasks, official initial states, and the two evaluation protocols in use.

Importing this needs no simulator, so a recipe can hold these settings anywhere. ``libero.libero.benchmark`` offers the
same tasks and imports torch; the files that it reads are read here directly.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import io
import pathlib
import pickle
import re
import typing
import zipfile
from typing import Annotated, Any, Literal

import numpy as np

from wovr_jax.core.config import Between, Count, Faults, Natural, NonNegative, Seed, Share, checked
from wovr_jax.sim.libero.setup import LiberoError, package_folder

Suite = Literal["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"]
# A suite's place in this order is part of the expert's seed: new suites go to the end.
SUITES: tuple[Suite, ...] = typing.get_args(Suite)
Drawing = Literal["libero", "fast"]
Flaw = Literal["none", "early_release", "wrong_object", "missed_grasp"]
ProtocolName = Literal["openvla", "rlinf"]
Beyond = Literal["drawn", "official"]
Init = Annotated[int, Between(0, 50)]
"""A bound of a range of official initial states, of which every task has 50."""


@checked
@dataclasses.dataclass(frozen=True)
class SceneConfig:
    """How environments are built.

    Attributes:
      size: pixels of a square frame's side; 0 for no frames.
      wrist: whether the camera in the hand is drawn too.
      drawing: ``"libero"`` draws exactly as the benchmark does; ``"fast"`` leaves out smoothed edges and mirror
        images in shiny surfaces, at about a third of the cost.
      hard_reset: whether every reset builds the model anew, as the benchmark does. Without, a reset is ten times
        faster; fixtures then stand a little differently for the same seed.
      hold: control steps of 1/20 s that every action is held for. The benchmark has 1; with 2, a chunk of eight
        actions covers sixteen of its steps, and an episode needs half as many frames.
    """

    size: Natural = 256
    wrist: bool = True
    drawing: Drawing = "libero"
    hard_reset: bool = True
    hold: Count = 1


@checked
@dataclasses.dataclass(frozen=True)
class LiberoExpertConfig:
    """How demonstrations are made.

    Attributes:
      noise: standard deviation of the noise on the six executed deltas; labels have none.
      flaw: ``early_release`` lets go on the way and carries on with an empty hand, ``wrong_object`` takes another
        object, ``missed_grasp`` closes above the object and carries on; all then stop.
      flawed_share: share of the demonstrations that have the flaw.
      release_low, release_high: interval of the share of the way at which ``early_release`` lets go.
      linger: control steps after the first success, so that a recording also shows it.
      seed: seed of noise and flaws, together with the trial's task, initial state and seed.
    """

    noise: NonNegative = 0.0
    flaw: Flaw = "none"
    flawed_share: Share = 1.0
    release_low: Share = 0.1
    release_high: Share = 0.6
    linger: Natural = 0
    seed: Seed = 0

    def faults(self) -> Faults:
        """Yields an interval without numbers."""
        if self.release_low > self.release_high:
            yield "release_low", f"expected at most release_high={self.release_high}, got {self.release_low}"


@checked
@dataclasses.dataclass(frozen=True)
class LiberoConfig:
    """LIBERO as the true environment of a run.

    Attributes:
      suite: one of ``SUITES``.
      tasks: indices in the suite; empty for all.
      protocol: how episodes begin: ``"openvla"`` (10 no-op steps) or ``"rlinf"`` (15). Their length is ``steps``, and
        success in any step counts.
      steps: actions of an episode, a multiple of the policy's chunk. RLinf's evaluation has 512.
      inits: official initial states that evaluation uses: the first, and the one after the last.
      beyond: where evaluation begins when it is asked for more trials than there are such states. ``"drawn"`` takes
        layouts that the tasks draw, of seeds that no training uses, and counts them apart. ``"official"`` takes the
        same states again with seeds 1, 2, ..., as published evaluations do, in suites whose fixtures a seed places;
        elsewhere a greedy policy would do the same again.
      train_inits: the same for demonstrations and collections. Empty for layouts that the task itself draws, a new
        one for each episode, as the official ones were drawn: objects and arm.
      overlap: whether ``train_inits`` may share states with ``inits``.
      scene: how environments are built.
      expert: how demonstrations are made.
      demonstrations: an episode folder to take them from instead (``data_prep`` makes some); empty for the expert.
      release: folder with the tokenizer and the action statistics of a released policy, for a run that starts from its
        weights; empty for the package's own words and the statistics of the demonstrations.
      intervened_share: share of the rollouts for world model and classifier in which the gripper does something else
        than the policy says, see ``rollout.draw_intervention``.
      workers: environments at a time in each process, 1 to 1.5 GB each.
    """

    suite: Suite = "libero_spatial"
    tasks: tuple[Natural, ...] = ()
    protocol: ProtocolName = "rlinf"
    steps: Count = 512
    inits: tuple[Init, Init] = (0, 50)
    beyond: Beyond = "drawn"
    train_inits: tuple[Init, ...] = ()
    overlap: bool = False
    scene: SceneConfig = SceneConfig(wrist=False)
    expert: LiberoExpertConfig = LiberoExpertConfig(linger=8)
    demonstrations: str = ""
    release: str = ""
    intervened_share: Share = 0.0
    workers: Count = 2

    @property
    def last_task(self) -> int:
        """The largest index of a task in use."""
        return max(self.tasks, default=89 if self.suite == "libero_90" else 9)

    @property
    def size(self) -> int:
        """Pixels of a square frame's side."""
        return self.scene.size

    def faults(self) -> Faults:
        """Yields demonstrations of another rate, and ranges of initial states that are empty or shared."""
        # The frames of a folder are one control step apart, and the policy's would be `hold` steps apart.
        if self.demonstrations and self.scene.hold != 1:
            yield (
                "scene.hold",
                f"demonstrations of a folder have one action every 1/20 s, and scene.hold={self.scene.hold} holds each "
                "longer; use hold=1, or the expert",
            )
        ranges = {"inits": self.inits} | ({"train_inits": self.train_inits} if self.train_inits else {})
        empty = {name: ends for name, ends in ranges.items() if len(ends) != 2 or ends[0] >= ends[1]}
        for name, ends in empty.items():
            yield name, f"expected the first initial state and the one after the last, got {ends}"
        # Success where training began would partly be memory.
        shared = set.intersection(*(set(range(*ends)) for ends in ranges.values())) if not empty else set()
        if shared and self.train_inits and not self.overlap:
            yield (
                "train_inits",
                f"initial states {min(shared)} to {max(shared)} are both trained on and measured on; choose others for "
                "train_inits or inits, or ask for it with overlap=True",
            )


# --- tasks, initial states and protocols ------------------------------------------------------

OPEN, CLOSE = -1.0, 1.0
"""The gripper's commands, the last number of an action."""
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
    """

    name: str
    settle: int
    settle_gripper: float
    horizons: dict[str, int]
    stops: bool


PROTOCOLS = {
    # openvla-oft: experiments/robot/libero/run_libero_eval.py. The horizons leave some room beyond the longest human
    # demonstration of each suite (193, 254, 270, 505 and 373 steps).
    "openvla": EvaluationProtocol("openvla", 10, -1.0, dict(zip(SUITES, (220, 280, 300, 520, 400), strict=True)), True),
    # RLinf: rlinf/envs/libero/libero_env.py with the horizons of its WoVR configs. Environments that run in step all
    # go on to the same horizon; a success is kept when it is lost again.
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
        # Manifests and lines have this text, and seeds are drawn from it, so it must never change.
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
    # Not at the top: it brings jax along, and every worker imports this module and never calls this function.
    from wovr_jax.data.episodes import instruction_of

    # The benchmark's own list, loaded as a lone file, because importing its package imports torch.
    path = package_folder() / "benchmark" / "libero_suite_task_map.py"
    spec = importlib.util.spec_from_file_location("_libero_task_map", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise LiberoError(f"{path} is missing; this is not the LIBERO package that was expected.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return tuple(Task(suite, i, name, instruction_of(name)) for i, name in enumerate(module.libero_task_map[suite]))


def draws_fixtures(task: Task) -> bool:
    """Returns whether the seed of a reset moves anything in an official initial state: a cabinet, stove or rack.

    Such fixtures have no joints, so initial states do not hold them. The first fixture of a scene is its table or
    floor, which stays where it is.
    """
    fixtures = re.search(r"\(:fixtures(.*?)\)", task.bddl_file.read_text(encoding="utf-8"), re.DOTALL)
    return fixtures is not None and fixtures[1].count(" - ") > 1


def read_init_states(path: pathlib.Path) -> np.ndarray:
    """Returns the official initial states, (N, 1 + nq + nv) float64: time, then positions, then velocities.

    They are the array of a ``.pruned_init``: a zip as torch writes it, with one pickled numpy array and no tensor. The
    file is torch's, and torch is not needed to read one array.

    Raises:
      LiberoError: for a file that is missing, damaged, or holds anything but one array of numbers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # torch names the folder in the zip after the file, so only the end of the member's name is known.
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

    NAMES = (("numpy", "ndarray"), ("numpy", "dtype"), ("numpy.core.multiarray", "_reconstruct"), ("_codecs", "encode"))

    def find_class(self, module: str, name: str) -> Any:
        # The four names build an array and call nothing else.
        # numpy 2 renamed numpy.core to numpy._core; the files have the old name, a new pickle would have the new one.
        plain = module.replace("numpy._core", "numpy.core")
        if (plain, name) not in self.NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which an array of numbers does not need")
        return super().find_class(plain.replace("numpy.core", "numpy._core"), name)
