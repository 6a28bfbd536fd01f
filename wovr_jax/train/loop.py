"""The training loop: metrics, checkpoints, interruption, exact resumption.

It knows nothing of what is trained. The step draws its own batch from ``fold_in(key, i)``
on the device, so the only state of the loop is the step count, and a resumed run is the
uninterrupted run bit for bit.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax.core import checkpoint, history, processes
from wovr_jax.core.history import CheckpointConfig, History
from wovr_jax.core.log import Log, Progress
from wovr_jax.train.step import ReplayableStep, Step

IN_FLIGHT = 2
"""Steps dispatched ahead of the device: enough to hide dispatch, few enough to stop soon."""
SAVE = "save"
"""The wish of a process to write a checkpoint now; the other wishes are names of signals."""
NONFINITE = "nonfinite"
"""What a bad update trained on is kept under this name, beside the checkpoints."""


class Stopped(processes.Stopping):
    """The run was asked to end, and its state is saved; the same command goes on from there.

    Attributes:
      signal: SIGINT (Ctrl-C), or SIGTERM as a scheduler sends before it takes a machine away.
    """

    def __init__(self, message: str, number: int = signal.SIGINT):
        super().__init__(message)
        self.signal = signal.Signals(number)


class NonFiniteError(FloatingPointError):
    """A metric or the state became NaN or infinite; the message says where.

    Attributes:
      step: number of the update that did it, counting from 1.
    """

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class Enough(Exception):  # noqa: N818  it is no error
    """What ``on_step`` raises to end a training at this step, or a step before it is taken; its argument is what
    ``on_step`` would have returned."""


def fit(
    name: str,
    state: Any,
    step: Step,
    steps: int,
    *,
    log: Log | None = None,
    folder: str | os.PathLike | None = None,
    keep: CheckpointConfig | None = None,
    log_every: int = 20,
    on_step: Callable[[int, Any], dict[str, float] | None] | None = None,
    undefined: Collection[str] = (),
) -> Any:
    """Runs ``state, metrics = step(state, i)`` for i in [0, steps) and returns the last state.

    Args:
      name: the stage, for the progress bar, the log and messages.
      state: any pytree of arrays. The step may donate it.
      step: jitted by the caller; ``i`` is an int32 scalar array, metrics are scalars.
      steps: how many.
      log: receives the mean of each metric over the last ``log_every`` steps.
      folder: checkpoints are kept and looked for in its ``fit``; None for a run that is not resumed.
      keep: how often, and how many of them; by default what is in use (``history.use``).
      log_every: steps between reads of the metrics. The device is never waited for in between.
      on_step: called as ``on_step(done, state)`` after each step, ``done`` counting from 1. It
        must not keep ``state``, which the next step may donate. Scalars that it returns are logged. If it raises
        ``Enough`` the state of this step is returned and no checkpoint of it is kept, so that the training, should it
        be taken up once more, comes to this step and to the same decision. A step that raises it leaves the state as
        it was.
      undefined: metrics that may be NaN, as a share of nothing is.

    Raises:
      NonFiniteError: naming stage, step and metric; the last good checkpoint stays. What the step trained on is in
        ``folder / "nonfinite"`` (``checkpoint.load``) if it is a ``ReplayableStep``.
      CheckpointError: when a state cannot be written; the checkpoints before it stay.
      Stopped: on Ctrl-C or SIGTERM, after the checkpoint is written.
      ValueError: when the checkpoint in ``folder`` is further than ``steps``.
    """
    keep = keep or history.current()
    run = _Fit(name, steps, log, None if folder is None else History(pathlib.Path(folder) / "fit", keep), undefined)
    state, done = run.resume(state)
    # The step donates the state, so what it looks like is noted before: the dump restores into it.
    like = jax.tree.map(_describe_leaf, state)
    with contextlib.closing(run):
        try:
            return _train(run, state, step, done, log_every, keep.every_s, on_step)
        except NonFiniteError as fault:
            kept = _dump(name, run.history, like, step, fault.step)
            raise NonFiniteError(f"{fault} {kept}", fault.step) from None


def _train(
    run: _Fit, state: Any, step: Step, done: int, log_every: int, save_every_s: float, on_step: Callable | None
) -> Any:
    saved_at, agreed, last = time.monotonic(), processes.Agreement(IN_FLIGHT), run.steps
    in_flight: collections.deque[Any] = collections.deque()
    with _interrupts() as interrupted, Progress(run.name, done, run.steps) as progress:
        while done < run.steps:
            try:
                state, metrics = step(state, jnp.asarray(done, jnp.int32))
            except Enough:
                return state
            done += 1
            # Metrics stay on the device until the log is due: reading them would wait for the step.
            run.window.append(metrics)
            in_flight.append(metrics)
            if len(in_flight) > IN_FLIGHT:
                jax.block_until_ready(in_flight.popleft())  # or the host would run ahead without end
            try:
                extra = on_step(done, state) if on_step else None
            except KeyboardInterrupt:
                # The step itself is done, and its state is good: save it, then stop.
                interrupted.append(signal.SIGINT)
                extra = None
            except Enough as enough:
                extra, last = enough.args[0], done
            # The log before the checkpoint: a window that was written is not kept with the state.
            if done % log_every == 0 or done == last:
                progress.metrics = run.write(done)
            if extra:
                run.note(done, extra)
            progress.advance(done)
            if last < run.steps:
                return state
            # Checkpoints are written by all processes together, so all of them have to wish for the same.
            if done == run.steps:
                run.save(done, state, wait=True)
                due = agreed.last(_wishes(interrupted))
            elif due := agreed(done, _wishes(interrupted, time.monotonic() - saved_at > save_every_s)):
                run.save(done, state, wait=due != {SAVE})
                saved_at = time.monotonic()
            # A signal counts only now that the state is saved.
            if signals := sorted(due - {SAVE}):
                raise Stopped(f"{run.name} stopped after step {done} of {run.steps}", signal.Signals[signals[0]])
    return state


def _wishes(interrupted: list[int], late: bool = False) -> set[str]:
    """What this process would do after a step: stop, for a signal of this name; save, by the clock of process 0."""
    return {signal.Signals(number).name for number in interrupted} | ({SAVE} if late and processes.first() else set())


@dataclasses.dataclass
class _Fit:
    """The bookkeeping of one fit.

    Attributes:
      name, steps, log, undefined: see :func:`fit`.
      history: its checkpoints; None for a run that is not resumed.
      saved: step of the last checkpoint.
      window: metrics that are not yet logged, step by step; on the device until they are read.
      means: the metrics logged last.
    """

    name: str
    steps: int
    log: Log | None
    history: History | None
    undefined: Collection[str] = ()
    saved: int | None = None
    window: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    means: dict[str, float] = dataclasses.field(default_factory=dict)

    def resume(self, state: Any) -> tuple[Any, int]:
        """Returns the state and step to go on from."""
        if self.history is None or not (steps := self.history.steps()):
            return state, 0
        if steps[-1] > self.steps:
            raise ValueError(
                f"{self.name}: the checkpoint in {self.history.folder} is at step {steps[-1]}, beyond the {self.steps} "
                f"steps asked for. Ask for at least {steps[-1]} steps, or use a new run folder."
            )
        restored = self.history.restore(state)
        if restored is None:
            return state, 0
        state, facts = restored
        # Metrics since the last line of the log are kept with the state: the mean over them is the uninterrupted run's.
        self.saved, self.window, self.means = facts["step"], facts["window"], facts["means"]
        # Lines of steps after the checkpoint are written again.
        if self.log:
            self.log.rewind(self.name, facts["step"])
        return state, facts["step"]

    def note(self, done: int, extra: dict[str, float]) -> None:
        """Logs what ``on_step`` returned."""
        self.means |= extra
        if self.log:
            self.log.scalars(self.name, done, extra)

    def read(self, done: int) -> None:
        """Brings the window to the host and checks it."""
        # One transfer for the whole window.
        self.window = [
            {name: float(value) for name, value in metrics.items()} for metrics in jax.device_get(self.window)
        ]
        # A NaN in the state spoils every later step: the first one is the update that did it.
        for step, metrics in enumerate(self.window, done - len(self.window) + 1):
            for name, value in metrics.items():
                if not (np.isfinite(value) or (name in self.undefined and np.isnan(value))):
                    raise NonFiniteError(self._explain(f"metric {name!r} is {value}", step), step)

    def write(self, done: int) -> dict[str, float]:
        """Logs the means of the window and empties it."""
        self.read(done)
        # Steps before a resumption may lack a metric that was not measured then.
        means = {
            name: float(np.mean([metrics[name] for metrics in self.window if name in metrics]))
            for name in self.window[-1]
        }
        self.window, self.means = [], self.means | means
        if self.log:
            self.log.scalars(self.name, done, means)
        return means

    def save(self, done: int, state: Any, *, wait: bool) -> None:
        """Writes a checkpoint, unless it would hold a NaN."""
        if self.history is None:
            return
        self.read(done)
        # The loss of this step was computed before its update: a bad update shows first in the state.
        if leaf := _find_in_state(state):
            raise NonFiniteError(self._explain(f"state leaf {leaf!r} holds a NaN", done), done)
        facts = {"stage": self.name, "step": done, "window": self.window, "means": self.means}
        self.history.save(done, state, facts)
        self.saved = done
        # The last save of a process has to be on disk before it ends; others are written behind the training.
        if wait:
            self.history.wait()

    def close(self) -> None:
        """Lets a save that is under way end."""
        if self.history is not None:
            self.history.wait()

    def _explain(self, fault: str, step: int) -> str:
        if self.history is None:
            kept = "No checkpoint was asked for."
        elif self.saved is None:
            kept = "No checkpoint had been written yet."
        else:
            kept = f"The checkpoint of step {self.saved} in {self.history.folder} is kept."
        advice = "Try a smaller learning rate or look at the data."
        return f"{self.name}: {fault} at step {step} of {self.steps}. {kept} {advice}"


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Notes the first Ctrl-C or SIGTERM, so that it never cuts a step in two; the second one has its usual effect."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python lets only the main thread set handlers
        yield noted
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note_first(number: int, _: Any) -> None:
        noted.append(number)
        # Whoever asks a second time does not want to wait for the step.
        put_back()

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, note_first)
    try:
        yield noted
    finally:
        put_back()


# ---------------------------------------------------------------- numbers that are not finite
#
# Metrics are looked at where they leave the device for the log, and the state before it is saved: looking costs no step
# anything, and no checkpoint holds a NaN.


def _find_in_state(state: Any) -> str | None:
    """Returns the path of a leaf that holds a NaN; None when no leaf does."""
    # Counters and keys of random numbers cannot be NaN, and isnan refuses the latter.
    flat = [
        (path, leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
        if jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.inexact)
    ]
    # One program and one transfer for the whole state, not one for each leaf.
    flags = jax.device_get(_have_nan([leaf for _, leaf in flat]))
    bad = [path for (path, _), flag in zip(flat, flags, strict=True) if flag]
    return jax.tree_util.keystr(bad[0], simple=True, separator="/") if bad else None


@jax.jit
def _have_nan(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isnan(leaf).any() for leaf in leaves]


def _describe_leaf(leaf: Any) -> Any:
    """Returns enough of an array to restore one like it, when the array itself has been donated."""
    if not isinstance(leaf, jax.Array):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding if leaf.committed else None)


def _dump(name: str, history: History | None, like: Any, step: Step, bad: int) -> str:
    """Keeps what update ``bad`` trained on and the state before it; returns a sentence on where, or why not.

    Args:
      name: the stage.
      history: checkpoints of the training; None where it keeps none, and then nothing is kept.
      like: shapes of the state.
      step: the step; only a ``ReplayableStep`` can show its batch.
      bad: number of the update, counting from 1.
    """
    if history is None or not isinstance(step, ReplayableStep):
        return ""
    try:
        # The state that failed is donated or spoiled by now; a checkpoint leads to the one before it.
        state = _state_before(bad, history, like, step)
        if state is None and step.on_policy:
            return "Nothing had been saved, so its rollouts are not kept; the same command meets them again."
        kept = {"batch": step.batch(state, jnp.asarray(bad - 1, jnp.int32)), "state": state}
        path = history.folder.with_name(NONFINITE)
        checkpoint.save(path, kept, {"stage": name, "step": bad - 1})
    except checkpoint.CheckpointError as error:  # a full disk, too: the first fault is the one to report
        return f"What this update trained on could not be kept: {error}"
    return f"What this update trained on, and the state before it, are in {path} (checkpoint.load reads them)."


def _state_before(bad: int, history: History, like: Any, step: Step) -> Any:
    """The state of the last checkpoint, led on to update ``bad``; None when nothing had been saved."""
    history.wait()
    restored = history.restore(like)
    if restored is None:
        return None
    state, facts = restored
    # Steps depend on their number alone, so taking them again leads to the very state that was lost.
    for i in range(facts["step"], bad - 1):
        state, _ = step(state, jnp.asarray(i, jnp.int32))
    return state
