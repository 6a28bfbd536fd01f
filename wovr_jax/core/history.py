"""The checkpoints of one training: written behind it, the last few and the best one kept, a broken one passed over.

A folder holds a checkpoint a step, named by its number. ``use`` says how many and how often, for every training inside
it, as ``sharding.use`` says on which devices.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import os
import pathlib
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from wovr_jax.core import checkpoint, processes
from wovr_jax.core.config import Count, NonNegative, checked


@checked
@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Which states of a training are kept while it runs.

    Attributes:
      every_s: seconds between checkpoints; one is always written at the end.
      last: how many of the newest are kept. With two, there is one to go back to when the newest is broken.
      best: a metric of which the checkpoint with the largest value is kept as well, with a minus before it
        ("-val_loss") the smallest; empty for none. Trainings that do not log it keep none.
    """

    every_s: NonNegative = 60.0
    last: Count = 2
    best: str = ""


DEFAULT = CheckpointConfig()
_IN_USE: contextvars.ContextVar[CheckpointConfig] = contextvars.ContextVar("checkpoints", default=DEFAULT)


@contextlib.contextmanager
def use(cfg: CheckpointConfig) -> Iterator[None]:
    """Trainings inside keep what ``cfg`` says."""
    token = _IN_USE.set(cfg)
    try:
        yield
    finally:
        _IN_USE.reset(token)


def current() -> CheckpointConfig:
    """The settings in use."""
    return _IN_USE.get()


class History:
    """The checkpoints in ``folder``.

    Args:
      folder: made when the first one is saved.
      cfg: how many are kept.
    """

    def __init__(self, folder: str | os.PathLike, cfg: CheckpointConfig):
        self.folder, self.cfg = pathlib.Path(folder).expanduser().absolute(), cfg
        self._writing: _Behind | None = None
        if self.folder.is_dir() and jax.process_index() == 0:
            for stale in self.folder.glob("*.orbax-checkpoint-tmp*"):  # of a process that died while it wrote
                shutil.rmtree(stale, ignore_errors=True)

    def steps(self) -> list[int]:
        """Of complete checkpoints, ascending; a rename that a dying process left half done is finished."""
        return processes.once(self._steps, "look for checkpoints")

    def _steps(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        names = {path.name.split(".")[0] for path in self.folder.iterdir() if not path.name.endswith(".broken")}
        return sorted(int(name) for name in names if name.isdigit() and checkpoint.exists(self.folder / name))

    def path(self, step: int) -> pathlib.Path:
        """Of the checkpoint of a step."""
        return self.folder / f"{step:08d}"

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest state that is whole, with its facts; None when there is none.

        A broken one is reported, set aside as ``<step>.broken``, and the one before it is used.

        Raises:
          CheckpointError: when the newest is whole but does not fit ``like``.
        """
        for step in reversed(self.steps()):
            try:
                return checkpoint.restore(self.path(step), like), checkpoint.meta(self.path(step))
            except checkpoint.BrokenError as error:
                self._set_aside(step, str(error))
        return None

    def save(self, step: int, tree: Any, facts: Mapping[str, Any]) -> None:
        """Takes the state off the devices and writes it behind the training; waits for the save before.

        Args:
          step: number of the checkpoint.
          tree: the state; it may be donated as soon as this returns.
          facts: JSON facts; ``facts["means"]`` holds the metrics that ``cfg.best`` is looked up in.

        Raises:
          CheckpointError: when this one, or the one before, cannot be written.
        """
        self.wait()
        if jax.default_backend() == "cpu":  # Orbax would read the very memory that the next step is given
            tree = jax.tree.map(lambda leaf: jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf, tree)
        finish = checkpoint.begin(self.path(step), tree, facts)
        # Several processes meet at barriers, which have to come in one order on each: they write in the open.
        self._writing = _Behind(finish, apart=jax.process_count() == 1)

    def wait(self) -> None:
        """Until the last save is on disk and older ones are gone.

        Raises:
          CheckpointError: when it cannot be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.join()
            self._prune()

    def _prune(self) -> None:
        if jax.process_index() == 0:
            steps = self._steps()
            for step in set(steps) - set(steps[-self.cfg.last :]) - self._best(steps):
                checkpoint.remove(self.path(step))

    def _best(self, steps: list[int]) -> set[int]:
        name, sign = self.cfg.best.removeprefix("-"), -1.0 if self.cfg.best.startswith("-") else 1.0
        if not name:
            return set()
        means = {step: checkpoint.meta(self.path(step)).get("means", {}) for step in steps}
        scores = {step: sign * found[name] for step, found in means.items() if name in found}
        return {max(scores, key=lambda step: (scores[step], step))} if scores else set()

    def _set_aside(self, step: int, why: str) -> None:
        path = self.path(step)
        aside = path.with_suffix(".broken")
        if jax.process_index() == 0:
            print(f"{why} It is now {aside.name}, and the checkpoint before it is used.", file=sys.stderr, flush=True)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        checkpoint.barrier(f"set aside {path}")


class _Behind:
    """A call that runs in a thread of its own, or when it is waited for; ``join`` raises what it raised."""

    def __init__(self, call: Callable[[], None], *, apart: bool):
        self._call, self._error = call, None
        self._thread = threading.Thread(target=self._run, name="checkpoint") if apart else None
        if self._thread:
            self._thread.start()

    def join(self) -> None:
        if self._thread:
            self._thread.join()
        else:
            self._run()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._call()
        except Exception as error:
            self._error = error
