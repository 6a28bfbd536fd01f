"""The training loop: progress, metrics, checkpoints, interruption, exact resumption.

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
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from wovr_jax.core import checkpoint, history, processes
from wovr_jax.core.history import CheckpointConfig, History
from wovr_jax.core.log import Log

IN_FLIGHT = 2
"""Steps dispatched ahead of the device: enough to hide dispatch, few enough to stop soon."""
LINE_EVERY_S = 20.0
"""Seconds between progress lines when standard error is not a terminal."""

Step = Callable[[Any, jax.Array], tuple[Any, dict[str, jax.Array]]]


class Stopped(processes.Stopping):
    """The run was asked to end, and its state is saved; the same command goes on from there.

    Attributes:
      signal: SIGINT (Ctrl-C), or SIGTERM as a scheduler sends before it takes a machine away.
    """

    def __init__(self, message: str, number: int = signal.SIGINT):
        super().__init__(message)
        self.signal = signal.Signals(number)


@dataclasses.dataclass(frozen=True)
class Shown:
    """A step that can show what it trained on, for when that has to be looked at.

    Attributes:
      step: ``step(state, i) -> (state, metrics)``.
      batch: ``batch(state, i)``, arrays; what ``step`` would train on.
      of_state: whether the batch depends on the state, as rollouts of a policy do.
    """

    step: Step
    batch: Callable[[Any, jax.Array], Any]
    of_state: bool = False

    def __call__(self, state: Any, i: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        return self.step(state, i)


class NonFiniteError(FloatingPointError):
    """A metric or the state became NaN or infinite; the message says where.

    Attributes:
      step: of the update that did it, counting from 1.
    """

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


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
    nan_ok: tuple[str, ...] = (),
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
        must not keep ``state``, which the next step may donate. Scalars that it returns are logged.
      nan_ok: metrics that may be NaN (a mean over nothing, say).

    Raises:
      NonFiniteError: naming stage, step and metric; the last good checkpoint stays. What the step trained on is in
        ``folder / "nonfinite"`` (``checkpoint.load``) if it is one that can show it.
      CheckpointError: when a state cannot be written; the checkpoints before it stay.
      Stopped: on Ctrl-C or SIGTERM, after the checkpoint is written.
      ValueError: when the checkpoint in ``folder`` is further than ``steps``.
    """
    keep = keep or history.current()
    run = _Run(name, steps, log, folder, nan_ok, keep)
    state, done = run.resume(state)
    like = jax.tree.map(_shape_of, state)
    with contextlib.closing(run):
        try:
            return _train(run, state, step, done, log_every, keep.every_s, on_step)
        except NonFiniteError as fault:
            raise NonFiniteError(f"{fault} {run.dump(fault.step, like, step)}", fault.step) from None


def _train(
    run: _Run, state: Any, step: Step, done: int, log_every: int, save_every_s: float, on_step: Callable | None
) -> Any:
    saved_at, agreed = time.monotonic(), processes.Agreement(IN_FLIGHT)
    in_flight: collections.deque[Any] = collections.deque()
    with _interrupts() as interrupted, _Progress(run.name, done, run.steps) as progress:
        while done < run.steps:
            state, metrics = step(state, jnp.asarray(done, jnp.int32))
            done += 1
            run.window.append(metrics)
            in_flight.append(metrics)
            if len(in_flight) > IN_FLIGHT:
                jax.block_until_ready(in_flight.popleft())
            try:
                extra = on_step(done, state) if on_step else None
            except KeyboardInterrupt:
                interrupted.append(signal.SIGINT)
                extra = None
            if done % log_every == 0 or done == run.steps:
                progress.metrics = run.write(done)
            if extra:
                run.note(done, extra)
            progress.advance(done)
            if done == run.steps:
                run.save(done, state, wait=True)
                due = agreed.last(_wishes(interrupted))
            elif due := agreed(done, _wishes(interrupted, time.monotonic() - saved_at > save_every_s)):
                run.save(done, state, wait=due != {SAVE})
                saved_at = time.monotonic()
            if signals := sorted(due - {SAVE}):
                raise Stopped(f"{run.name} stopped after step {done} of {run.steps}", signal.Signals[signals[0]])
    return state


SAVE = "save"


def _wishes(interrupted: list[int], late: bool = False) -> set[str]:
    """What this process would do after a step: stop, for a signal of this name; save, by the clock of process 0."""
    return {signal.Signals(number).name for number in interrupted} | ({SAVE} if late and processes.first() else set())


class _Run:
    """The bookkeeping of one fit: metrics not yet logged, and the checkpoints."""

    def __init__(
        self,
        name: str,
        steps: int,
        log: Log | None,
        folder: str | os.PathLike | None,
        nan_ok: tuple[str, ...],
        keep: CheckpointConfig,
    ):
        self.name, self.steps, self.log, self.nan_ok = name, steps, log, nan_ok
        self.history = None if folder is None else History(pathlib.Path(folder) / "fit", keep)
        self.saved: int | None = None
        self.window: list[dict[str, Any]] = []
        self.means: dict[str, float] = {}

    def resume(self, state: Any) -> tuple[Any, int]:
        """The state and step to go on from."""
        if self.history is None or not (there := self.history.steps()):
            return state, 0
        if there[-1] > self.steps:
            raise ValueError(
                f"{self.name}: the checkpoint in {self.history.folder} is at step {there[-1]}, beyond the {self.steps} "
                f"steps asked for. Ask for at least {there[-1]} steps, or use a new run folder."
            )
        found = self.history.restore(state)
        if found is None:
            return state, 0
        state, facts = found
        self.saved, self.window, self.means = facts["step"], facts["window"], facts["means"]
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
        self.window = [_floats(metrics) for metrics in jax.device_get(self.window)]
        for back, metrics in enumerate(reversed(self.window)):
            for metric, value in metrics.items():
                if metric not in self.nan_ok and not np.isfinite(value):
                    raise NonFiniteError(self._fault(f"metric {metric!r} is {value}", done - back), done - back)

    def write(self, done: int) -> dict[str, float]:
        """Logs the means of the window and empties it."""
        self.read(done)
        means = {metric: float(np.mean([m[metric] for m in self.window])) for metric in self.window[-1]}
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
        bad = _nan_leaf(state)
        if bad:
            raise NonFiniteError(self._fault(f"state leaf {bad!r} holds a NaN", done), done)
        facts = {"stage": self.name, "step": done, "window": self.window, "means": self.means}
        self.history.save(done, state, facts)
        self.saved = done
        if wait:
            self.history.wait()

    def close(self) -> None:
        """Lets a save that is under way end."""
        if self.history is not None:
            self.history.wait()

    def dump(self, bad: int, like: Any, step: Step) -> str:
        """Keeps what update ``bad`` trained on, and the state before it; says where, or why not."""
        if self.history is None or not isinstance(step, Shown):
            return ""
        try:
            state = self._state_before(bad, like, step)
            if state is None and step.of_state:
                return "Nothing had been saved, so its rollouts are not kept; the same command meets them again."
            kept = {"batch": step.batch(state, jnp.asarray(bad - 1, jnp.int32)), "state": state}
            path = self.history.folder.with_name("nonfinite")
            checkpoint.save(path, kept, {"stage": self.name, "step": bad - 1})
        except checkpoint.CheckpointError as error:  # a full disk, too: the first fault is the one to report
            return f"What this update trained on could not be kept: {error}"
        return f"What this update trained on, and the state before it, are in {path} (checkpoint.load reads them)."

    def _state_before(self, bad: int, like: Any, step: Step) -> Any:
        """That of the last checkpoint, led on to update ``bad``; None when nothing had been saved."""
        assert self.history is not None
        self.history.wait()
        found = self.history.restore(like)
        if found is None:
            return None
        state, facts = found
        for i in range(facts["step"], bad - 1):
            state, _ = step(state, jnp.asarray(i, jnp.int32))
        return state

    def _fault(self, what: str, step: int) -> str:
        if self.history is None:
            kept = "No checkpoint was asked for."
        elif self.saved is None:
            kept = "No checkpoint had been written yet."
        else:
            kept = f"The checkpoint of step {self.saved} in {self.history.folder} is kept."
        advice = "Try a smaller learning rate or look at the data."
        return f"{self.name}: {what} at step {step} of {self.steps}. {kept} {advice}"


def _shape_of(leaf: Any) -> Any:
    """Enough of an array to restore one like it, when the array itself has been donated."""
    if not isinstance(leaf, jax.Array):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding if leaf.committed else None)


def _floats(metrics: dict[str, Any]) -> dict[str, float]:
    return {metric: float(value) for metric, value in metrics.items()}


def _nan_leaf(state: Any) -> str | None:
    flat = [
        (keys, leaf)
        for keys, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
        if jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.inexact)
    ]
    bad = _has_nan([leaf for _, leaf in flat])
    names = [jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in flat]
    return next((name for name, is_bad in zip(names, jax.device_get(bad), strict=True) if is_bad), None)


@jax.jit
def _has_nan(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isnan(leaf).any() for leaf in leaves]


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Notes the first Ctrl-C or SIGTERM, so that it never cuts a step in two; the second one has its usual effect."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def first(number: int, _: Any) -> None:
        noted.append(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, first)
    try:
        yield noted
    finally:
        restore()


class _Progress:
    """A bar on a terminal, a line every LINE_EVERY_S seconds elsewhere; both on standard error."""

    def __init__(self, name: str, done: int, steps: int):
        self.name, self.first, self.steps = name, done, steps
        self.metrics: dict[str, float] = {}
        self._begin = self._line = time.monotonic()
        shown = sys.stderr.isatty() and processes.first()
        self._bar = tqdm.tqdm(
            total=steps, initial=done, desc=name, file=sys.stderr, disable=not shown, dynamic_ncols=True
        )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, done: int) -> None:
        if not self._bar.disable:
            self._bar.set_postfix_str(self._shown(), refresh=False)
            self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._line > LINE_EVERY_S:
            self._line = time.monotonic()
            rate = (done - self.first) / (self._line - self._begin)
            eta = tqdm.tqdm.format_interval((self.steps - done) / rate)
            text = f"{self.name} {done}/{self.steps}, {rate:.2f} steps/s, {eta} left, {self._shown()}"
            processes.say(text)

    def _shown(self) -> str:
        return ", ".join(f"{metric} {value:.4g}" for metric, value in list(self.metrics.items())[:4])
