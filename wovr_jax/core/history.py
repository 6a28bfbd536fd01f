"""The states of one training: saved behind it, the last few and the best one kept, a damaged one passed over.

A folder holds a checkpoint a step, named by its number. ``use`` says how many and how often, for every training inside
it, as ``sharding.use`` says on which devices. Orbax's ``CheckpointManager`` writes and removes them;
``core/checkpoint.py`` says what is added to it.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import logging
import math
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from wovr_jax.core import checkpoint, processes
from wovr_jax.core.config import Count, NonNegative, checked

# Orbax advises to save less often when a save has to wait for the one before; once for a run is enough.
logging.getLogger("absl").addFilter(lambda record: processes.first() or "previous save" not in str(record.msg))


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
    """Makes the trainings inside the block keep what ``cfg`` says."""
    token = _IN_USE.set(cfg)
    try:
        yield
    finally:
        _IN_USE.reset(token)


def current() -> CheckpointConfig:
    """Returns the settings in use."""
    return _IN_USE.get()


class History:
    """The checkpoints in ``folder``.

    Args:
      folder: made when the first one is saved.
      cfg: how many are kept.
    """

    def __init__(self, folder: str | os.PathLike, cfg: CheckpointConfig):
        self.folder, self.cfg = pathlib.Path(folder).expanduser().absolute(), cfg
        self._manager: ocp.CheckpointManager | None = None
        self._saving: int | None = None

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints in ascending order."""
        return processes.once(self._steps, "look for checkpoints")

    def _steps(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        # Earlier versions renamed a step into its place, and a kill may have left ``<step>.new`` or ``<step>.old``.
        names = {path.name.split(".")[0] for path in self.folder.iterdir() if not path.name.endswith(".broken")}
        return sorted(int(name) for name in names if name.isdigit() and checkpoint.exists(self.folder / name))

    def path(self, step: int) -> pathlib.Path:
        """Returns the folder of the checkpoint of a step."""
        return self.folder / f"{step:08d}"

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """Returns the newest state that is whole, with its facts; None when there is none.

        A broken one is reported, set aside as ``<step>.broken``, and the one before it is used.

        Raises:
          CheckpointError: when the newest is whole but does not fit ``like``.
        """
        # A broken checkpoint says nothing about the one before it: each has files of its own.
        for step in reversed(self.steps()):
            try:
                return checkpoint.restore(self.path(step), like), checkpoint.meta(self.path(step))
            except checkpoint.BrokenError as error:
                self._set_aside(step, str(error))
        return None

    def save(self, step: int, tree: Any, facts: Mapping[str, Any]) -> None:
        """Takes the state off the devices and writes it behind the training; waits for the save before.

        Args:
          step: number of the checkpoint, larger than those before it.
          tree: the state; it may be donated as soon as this returns.
          facts: JSON facts; ``facts["means"]`` holds the metrics that ``cfg.best`` is looked up in.

        Raises:
          CheckpointError: when this one, or the one before, cannot be written.
        """
        self.wait()
        # On a CPU Orbax reads the arrays where they lie, while the next step may be given their memory. jaxlib 0.10
        # keeps it back as long as Orbax looks at it, but nothing promises so.
        if jax.default_backend() == "cpu":
            tree = jax.tree.map(lambda leaf: jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf, tree)
        with checkpoint.explain_failure(self.path(step)):
            self._manager = self._manager or self._open()
            # By its own schedule Orbax would decline some steps; the training loop has decided already.
            args, means = checkpoint.save_args(tree, facts), dict(facts.get("means", {}))
            self._manager.save(step, args=args, metrics=means, force=True)
        self._saving = step

    def wait(self) -> None:
        """Waits until the last save is on disk and older ones are gone.

        Raises:
          CheckpointError: when it cannot be written.
        """
        if self._saving is not None and self._manager is not None:
            step, self._saving = self._saving, None
            with checkpoint.explain_failure(self.path(step)):
                self._manager.wait_until_finished()

    def _open(self) -> ocp.CheckpointManager:
        if processes.first():
            # A process may have died while it wrote a step, or while it removed one.
            checkpoint.sweep(self.folder)
            for path in self.folder.glob("[0-9]" * 8):
                if not checkpoint.exists(path):
                    shutil.rmtree(path)
        # A metric to be small is turned round, and a training that does not log it is nowhere better than its newest.
        name, sign = self.cfg.best.removeprefix("-"), -1.0 if self.cfg.best.startswith("-") else 1.0

        def score(means: Mapping[str, float]) -> float:
            return sign * means[name] if name in means else -math.inf

        newest, best = LatestN(self.cfg.last), BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            step_format_fixed_length=8,
            preservation_policy=AnyPreservationPolicy([newest, best]) if name else newest,
            best_fn=score if name else None,  # Orbax writes the metrics beside the state for the next process
            lightweight_initialize=not name,  # and reads them only then
            # Else a thread may make the folder of a save that has failed, after what it had begun was removed.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def _set_aside(self, step: int, why: str) -> None:
        path = self.path(step)
        aside = path.with_suffix(".broken")
        if processes.first():
            print(f"{why} It is now {aside.name}, and the checkpoint before it is used.", file=sys.stderr, flush=True)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        processes.meet(f"set aside {path}")
        self._manager = None  # it keeps a list of its own, in which the step still is
