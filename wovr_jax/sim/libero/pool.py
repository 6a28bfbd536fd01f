"""Processes that hold LIBERO environments, and the pool that replaces those that are lost.

A worker that crashes, hangs or fails is replaced, and its call is answered with ``Lost``; the others notice nothing.
What a worker refuses (a missing asset, say) is raised, since trying again would not help.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from wovr_jax.sim.libero import setup, worker
from wovr_jax.sim.libero.setup import LiberoError
from wovr_jax.sim.libero.tasks import SceneConfig

STARTING_S = 120.0
"""Seconds that a process may take to start, however short the timeout."""


@dataclasses.dataclass(frozen=True)
class Lost:
    """The answer to a call whose worker crashed, hung, or raised."""

    reason: str


class Pool:
    """Worker processes with an environment each.

    Args:
      workers: how many; each takes 0.7 GB, 1 to 1.5 GB with frames.
      cfg: how environments are built; None for functions that need none.
      timeout: seconds of silence after which a worker counts as hung. Building an environment for the first time in an
        installation takes half a minute.

    Raises:
      LiberoError: when LIBERO is not installed, or no renderer works here.
    """

    def __init__(self, workers: int, cfg: SceneConfig | None, *, timeout: float = 300.0):
        self.cfg, self.timeout = cfg, timeout
        # Once and here, not in every worker: it may download.
        self.renderer = setup.settle(bool(cfg.size)) if cfg else None
        # A renderer's state does not survive a fork.
        self._context = multiprocessing.get_context("spawn")
        # All start at once; each takes seconds to import the simulator.
        self._slots = [_Slot(*self._start()) for _ in range(workers)]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._slots)

    def close(self) -> None:
        """Ends the workers, those that hang too."""
        for slot in self._slots:
            slot.end()
        self._slots = []

    def send(self, index: int, function: Callable[..., Any], *arguments: Any) -> None:
        """Begins ``function(state, *arguments)`` in a worker, with its ``worker.WorkerState``.

        ``function`` travels by name, so it has to stand at the top of a module.
        """
        slot = self._slots[index]
        # The clock of silence starts with the call, not with the last answer.
        slot.busy, slot.heard = True, time.monotonic()
        # The line of a dead worker is broken; `receive` finds that out and answers with Lost.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            slot.line.send((function, arguments))

    def receive(self) -> tuple[int, Any]:
        """Waits for the next answer of a busy worker and returns ``(index, value or Lost)``.

        Raises:
          LiberoError: what a worker refused, e.g. a missing asset; trying again would not help.
        """
        while True:
            busy: dict[Any, int] = {slot.line: index for index, slot in enumerate(self._slots) if slot.busy}
            if not busy:
                raise RuntimeError("no worker is busy; send something first")
            readable: list[Any] = multiprocessing.connection.wait(list(busy), timeout=1.0)
            for line in readable:
                answer = self._read(busy[line])
                if answer is not None:
                    return busy[line], answer[0]
            for index in busy.values():
                silence = time.monotonic() - self._slots[index].heard
                if silence > (self.timeout if self._slots[index].ready else max(self.timeout, STARTING_S)):
                    return index, self._replace(index, f"was silent for {silence:.0f} s")

    def map(self, function: Callable[..., Any], jobs: Iterable[tuple], tries: int = 1) -> Iterator[tuple[int, Any]]:
        """Calls ``function(state, *job)`` for every job, as workers come free.

        A job whose worker is lost is begun again, ``tries`` times in all.

        Yields:
          ``(number of the job, value or Lost)``, in the order in which they end.
        """
        waiting = collections.deque((number, job, tries) for number, job in enumerate(jobs))
        running: dict[int, tuple[int, tuple, int]] = {}
        idle = list(range(len(self)))
        while waiting or running:
            while idle and waiting:
                index = idle.pop()
                running[index] = waiting.popleft()
                self.send(index, function, *running[index][1])
            index, value = self.receive()
            idle.append(index)
            number, job, left = running.pop(index)
            if isinstance(value, Lost) and left > 1:
                print(value.reason, file=sys.stderr, flush=True)
                waiting.append((number, job, left - 1))
            else:
                yield number, value

    def _read(self, index: int) -> tuple[Any] | None:
        """Returns a worker's answer in a tuple, or None for a heartbeat; an answer itself may be None."""
        slot = self._slots[index]
        try:
            kind, value = slot.line.recv()
        except (EOFError, ConnectionResetError):
            slot.process.join(5)
            return (self._replace(index, f"died with exit status {slot.process.exitcode}"),)
        slot.heard = time.monotonic()
        # Whatever came, the process is up: from now on the timeout alone counts.
        slot.ready = True
        if kind in ("ready", "beat"):
            return None
        slot.busy = False
        # The same would happen in every worker and at every try.
        if kind == "refused":
            raise LiberoError(value)
        return (Lost(value.strip()) if kind == "failed" else value,)

    def _start(self) -> tuple[Any, multiprocessing.connection.Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=worker.serve, args=(theirs, self.cfg, self.renderer), daemon=True, name="libero"
        )
        process.start()
        # Only the worker may hold its end, or its death would not break the line.
        theirs.close()
        return process, ours

    def _replace(self, index: int, reason: str) -> Lost:
        self._slots[index].end(patience=0.0)
        self._slots[index] = _Slot(*self._start())
        return Lost(f"worker {index} {reason}")


@dataclasses.dataclass
class _Slot:
    """A worker's process, the line to it, and what is known of it."""

    process: Any
    line: multiprocessing.connection.Connection
    ready: bool = False
    busy: bool = False
    heard: float = 0.0

    def end(self, patience: float = 3.0) -> None:
        with contextlib.suppress(OSError):  # its line is broken when it is dead already
            self.line.send(None)
        # A busy worker does not read its line; waiting for it would only take time.
        self.process.join(0.0 if self.busy else patience)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.line.close()
