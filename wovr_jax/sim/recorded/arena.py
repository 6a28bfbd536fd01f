"""A robot that nobody simulates as an arena: its episodes are recorded by people, and read from a folder.

The arena plays nothing. What a stage wants of it is looked for in the folder by a program of its own
(``launch/tools/read_recordings.py``), as LIBERO's expert has one. Where the episodes are not there yet, that program
exports the policy which is to be recorded and says what to do; the run stops with these words, and the same command
goes on when the episodes are there. What an audit asks is ``sim.recorded.witness``.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np

from wovr_jax.core import config, processes
from wovr_jax.core.config import Between, Count, Faults, Natural, Positive, checked
from wovr_jax.data import episodes as disk
from wovr_jax.sim.arena import Actor, Measured, add_halves, call_program
from wovr_jax.types import Array

READ = "read_recordings.py"
"""The program that knows recordings and their labels, which are not part of training."""
PATIENCE_S = 3600
"""How long the processes of a run wait for the one that reads, which may export a policy first."""


class RecordedError(ValueError):
    """Tells what a run of recorded episodes waits for, or what it cannot do."""


@checked
@dataclasses.dataclass(frozen=True)
class RecordedConfig:
    """A robot whose episodes are recorded, as the true environment of a run.

    Attributes:
      folder: where the recordings lie: ``demonstrations`` in it, then ``collect-0``, ``evaluate-0`` and so on as the
        run asks for them (``data.recordings`` says what a folder of recordings is). A relative one begins where the
        command is given.
      name: of the robot and its tasks, for manifests and action statistics.
      instructions: what the robot may be asked to do; a task's number is its place among them.
      success: what counts as a success, in a sentence for whoever labels.
      words: the vocabulary in which the policy reads instructions (``policy.tokenizer``) where it is of no ``release``.
      release: folder with the tokenizer of a released policy, for a run that starts from its weights.
      size: pixels of a square frame's side.
      views: cameras that the run uses, 1, or 2 with the one in the hand, whose frames are as large.
      state: numbers of the robot's state that it uses, 0 for none; the demonstrations' quantiles scale them.
      strip: pixels in width of the strip that shows them beside the cameras' pictures (``core.pixels``), a multiple of
        the side of a token of the world model.
      steps: of the longest episode, a multiple of the policy's chunk.
      hz: actions in a second, from which minutes of robot time are counted.
      last: frames from the end of an episode that show its success, where nobody marked the first one.
    """

    folder: str = ""
    name: str = "robot"
    instructions: tuple[str, ...] = ()
    success: str = ""
    words: Literal["tabletop", "relay", "libero"] = "libero"
    release: str = ""
    size: Count = 256
    views: Annotated[int, Between(1, 2)] = 1
    state: Natural = 0
    strip: Natural = 0
    steps: Count = 512
    hz: Positive = 10.0
    last: Count = 1

    @property
    def last_task(self) -> int:
        """The largest number of a task."""
        return len(self.instructions) - 1

    def faults(self) -> Faults:
        """Yields what only the laboratory can say and did not."""
        for name in ("folder", "instructions", "success"):
            if not getattr(self, name):
                yield name, "expected one of the laboratory's own, got none"
        if bool(self.strip) != bool(self.state):
            yield "strip", f"expected pixels for the {self.state} numbers of the state, and 0 without, got {self.strip}"


class Recorded:
    """A robot before a training; see ``sim.arena.Arena``.

    Args:
      cfg: folder, tasks, sizes.
      run: the run's folder, where policies are exported and what is wanted is written down.
    """

    hold, explore, follow = 1, None, None

    def __init__(self, cfg: RecordedConfig, run: pathlib.Path):
        self.cfg, self.run = cfg, run
        self.name, self.instructions, self.steps = cfg.name, cfg.instructions, cfg.steps

    def demonstrate(self, folder: pathlib.Path, key: Array, count: int, validation: int) -> dict[str, Any]:
        """Copies recorded demonstrations; the last of them are held out.

        Raises:
          RecordedError: there are too few, or some that cannot be used.
        """
        del key  # nothing is drawn
        return add_halves(self._read("demonstrations", {folder / "episodes": count, folder / "validation": validation}))

    def collect(self, folder: pathlib.Path, purpose: str, count: int, actor: Actor) -> dict[str, Any]:
        """Copies recorded rollouts of this very policy.

        Raises:
          RecordedError: as ``demonstrate``; it says how to record them.
        """
        return add_halves(self._read(purpose, {folder: count}, actor))

    def measure(self, folder: pathlib.Path, count: int, actor: Actor) -> Measured:
        """Returns how the recorded evaluation of this very policy went.

        Raises:
          RecordedError: as ``collect``.
        """
        # The stage is called evaluate-<round>, and has a folder for each temperature.
        (manifest,) = self._read(folder.parent.name, {folder: count}, actor)
        meta = manifest["meta"]
        return Measured(np.array(meta["outcomes"], bool), {}, manifest["steps"], starts=meta["starts"])

    def _read(
        self, stage: str, parts: Mapping[pathlib.Path, int], actor: Actor | None = None
    ) -> list[Mapping[str, Any]]:
        """Has so many episodes of what ``stage`` wants written to each folder, and returns their manifests."""
        asked = {"cfg": config.to_dict(self.cfg), "run": str(self.run), "stage": stage}
        asked |= {"parts": {str(folder): count for folder, count in parts.items()}}
        asked |= {"actor": actor.name, "temperature": actor.temperature} if actor else {}

        def read() -> list[Mapping[str, Any]]:
            status, said = call_program(READ, "--for-run", json.dumps(asked))
            if status:
                raise RecordedError(said or f"{READ} ended with exit status {status}; what it said stands above.")
            return [disk.manifest(folder) for folder in parts]

        return processes.once(read, f"read the recordings of {stage}", wait_s=PATIENCE_S)
