"""One run by several processes: they find each other, decide together, and end together.

All processes run the same program with the same settings over the devices of all, and see one run folder. Process 0
writes it; what only one process can know (which stages are done, what the clock says) it tells the others, by the
service through which JAX's processes find each other and not by the devices. A process that fails tells the others why
before it ends, so none of them waits for it. In one process every function here does nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax._src import distributed  # as Orbax does: JAX gives no other way to its key-value service

BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
"""What JAX's own detection reads in a step that srun has started."""
JOIN_S = 300
"""For the processes to find each other."""
WAIT_S = 900
"""For process 0 to do what the others wait for."""
HEARTBEAT_S = 60
"""After which a process that has vanished is missed, and the others end."""
FAREWELL_S = 10

_TURN = itertools.count()
"""Numbers what the processes do together; the same in each, as they run the same program. Keys and barriers of the
service can be used once only, so each gets a number."""


class ProcessError(ValueError):
    """Processes that do not find each other, or one that is waited for in vain; the message says which and why."""


class Stopping(KeyboardInterrupt):
    """An end that all processes have agreed on, and that is no failure."""


def count() -> int:
    """Returns how many processes this run has."""
    # Not jax.process_count(): that makes the devices, after which processes cannot find each other any more.
    return distributed.global_state.num_processes if _service() is not None else 1


def index() -> int:
    """Returns the number of this process."""
    return distributed.global_state.process_id if _service() is not None else 0


def first() -> bool:
    """Returns whether this is process 0, which writes files and tells of progress."""
    return index() == 0


@contextlib.contextmanager
def join() -> Iterator[None]:
    """Joins the processes that the environment names, before anything touches a device; at the end they part.

    * ``JAX_COORDINATOR_ADDRESS`` (host:port of process 0), ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``, by hand;
    * a SLURM step of several tasks, unless JAX_NUM_PROCESSES is 1;
    * a TPU slice.

    With none of them nothing happens. A failure inside ends the other processes too, which print it.

    Raises:
      ProcessError: when only some of the variables are set, or the processes do not find each other.
    """
    how = detect(os.environ, on_tpu="tpu" in (getattr(jax.config, "jax_platforms", None) or "").split(","))
    if how is None:
        yield
        return
    _connect(how)
    try:
        yield
    except Stopping:
        _part()  # agreed on by all, so all of them come to this end
        raise
    except BaseException as error:
        _tell(f"{type(error).__name__}: {error}")
        raise
    _part()


def detect(environment: Mapping[str, str], *, on_tpu: bool) -> dict[str, Any] | None:
    """Returns the arguments of ``jax.distributed.initialize`` for an environment; None for a process on its own.

    Raises:
      ProcessError: see ``join``.
    """
    address, number, index = (environment.get(name, "") for name in BY_HAND)
    if number == "1":
        return None
    if address or number or index:
        if not (address and number.isdigit() and index.isdigit() and int(index) < int(number)):
            raise ProcessError(
                f"Several processes need all of {', '.join(BY_HAND)} (host:port, a count, a number below it); got "
                f"{address!r}, {number!r}, {index!r}. For one process set none of them."
            )
        by_hand = {"coordinator_address": address, "num_processes": int(number), "process_id": int(index)}
        # All is said, also within a job of SLURM, whose own numbers JAX would look up.
        return by_hand | {"cluster_detection_method": "deactivate"}
    # A batch script has SLURM's job, but no step: what srun did not start is on its own. A shell in an allocation has a
    # step of one task, and in SLURM_NTASKS those of the job, which nobody may ever start; JAX would wait for them.
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "")
    if all(name in environment for name in SLURM) and tasks.isdigit() and int(tasks) > 1:
        return {"cluster_detection_method": "slurm", "num_processes": int(tasks)}
    return {} if on_tpu else None


def _connect(how: Mapping[str, Any]) -> None:
    # The default of the CPU computes within one process only.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Its handler would take every SIGTERM, also where no training looks for it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **how,
            initialization_timeout=JOIN_S,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=FAREWELL_S,
        )
    except (RuntimeError, ValueError) as error:
        raise ProcessError(
            f"The processes of this run do not come together within {JOIN_S} s ({error}). Start the same command for "
            f"each of them; a process that is to run on its own wants {BY_HAND[1]}=1."
        ) from error
    threading.Thread(target=_listen, name=LISTENS, daemon=True).start()


def once(call: Callable[[], Any], what: str, *, wait_s: int | None = None) -> Any:
    """Calls ``call`` in process 0 and returns its value, which JSON can hold, in every process.

    Args:
      call: a function of no arguments.
      what: what it does, for the message of a process that waited in vain.
      wait_s: seconds that the others wait; ``WAIT_S`` by default.

    Raises:
      ProcessError: in the others, when they have waited so long.
    """
    if count() == 1:
        return call()
    return gather(call() if first() else None, what, of=(0,), wait_s=wait_s)[0]


def gather(value: Any, what: str, *, of: Sequence[int] = (), wait_s: int | None = None) -> list[Any]:
    """Returns in each process the values, which JSON can hold, of all of them or of those named; see ``once``."""
    if count() == 1:
        return [value]
    # Over the service and not as an array: values are of any size and form, and no device has to be free.
    key = f"wovr/gather/{next(_TURN)}"
    if index() in (of or range(count())):
        _service().key_value_set(f"{key}/{index()}", json.dumps(value))
    with _explain_wait(what, wait_s or WAIT_S) as ms:
        keys = [f"{key}/{number}" for number in of or range(count())]
        return [json.loads(_service().blocking_key_value_get(each, ms)) for each in keys]


def meet(what: str, *, wait_s: int | None = None) -> None:
    """Waits here for all other processes; see ``once``."""
    if count() > 1:
        with _explain_wait(what, wait_s or WAIT_S) as ms:
            _service().wait_at_barrier(f"wovr/meet/{next(_TURN)}", ms)


class Agreement:
    """Decides what all processes do after the same step of a loop, whichever of them wished for it.

    A wish is announced for a step that no process can have passed: each step needs all of them, and none is more than
    ``ahead`` steps ahead of one that it waits for. So nobody waits, and no device is asked.

    Args:
      ahead: steps that a process dispatches before it waits for the oldest.
    """

    def __init__(self, ahead: int):
        self._ahead = ahead
        self._wished: dict[str, int] = {}
        self._met: set[str] = set()
        self._place = f"wovr/agreement/{next(_TURN)}" if count() > 1 else ""

    def __call__(self, step: int, wishes: set[str]) -> set[str]:
        """Returns what is to be done now, after ``step`` was dispatched and the oldest one waited for.

        Raises:
          ProcessError: when a step was passed for which something had been agreed: the steps do not need all processes.
        """
        if not self._place:
            return wishes
        for wish in wishes:
            if self._wished.get(wish, 0) < step:  # not announced, or done and wished again
                # Another process may have dispatched ``ahead`` more, and looks again only after its next one.
                self._wished[wish] = step + self._ahead + 1
                self._announce(self._wished[wish], wish)
        # Keys are step/wish/process.
        announced = {key.removeprefix(f"{self._place}/") for key, _ in self._announced()} - self._met
        due = {key for key in announced if int(key.split("/")[0]) <= step}
        self._met |= due
        if late := [key for key in due if int(key.split("/")[0]) < step]:
            raise ProcessError(f"process {index()} is past step {late[0]}, agreed on: these steps do not need all.")
        return {key.split("/")[1] for key in due}

    def last(self, wishes: set[str]) -> set[str]:
        """Returns the wishes of all processes at the end of the loop, also those for a step that will not come."""
        if not self._place:
            return wishes
        for wish in wishes:
            self._announce(sys.maxsize, wish)
        meet("come to the end of a training")  # after this no wish can be announced any more
        return {key.split("/")[-2] for key, _ in self._announced()}

    def _announce(self, step: int, wish: str) -> None:
        _service().key_value_set(f"{self._place}/{step}/{wish}/{index()}", "", allow_overwrite=True)

    def _announced(self) -> list[tuple[str, str]]:
        return _service().key_value_dir_get(f"{self._place}/")


def say(text: str) -> None:
    """Prints a line for whoever watches the run, in process 0; standard output is for results."""
    if first():
        print(text, file=sys.stderr, flush=True)


def _service() -> Any:
    return distributed.global_state.client


@contextlib.contextmanager
def _explain_wait(what: str, wait_s: int) -> Iterator[int]:
    """Gives the milliseconds of a wait, and says in words when it was in vain."""
    try:
        yield wait_s * 1000
    except jax.errors.JaxRuntimeError as error:
        raise ProcessError(
            f"process {index()} of {count()} waited {wait_s} s for the others to {what}, in vain: {error}"
        ) from error


FAILED = "wovr/failed"
"""Key of who failed and why; empty when the run is over."""
HEARD = "wovr/heard"
"""Barrier of those who have read it."""
LISTENS = "processes"
"""Name of the thread that waits for it."""


def _listen() -> None:
    """Ends this process when another one fails, wherever it is held up; runs in a thread."""
    while (service := _service()) is not None:
        try:
            message = service.blocking_key_value_get(FAILED, 10_000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                continue
            return  # the service has ended, and JAX ends this process unless the run is over
        if message and message.split(":")[0] != _name():
            print(f"{message}\n{_name()} ends with it.", file=sys.stderr, flush=True)
            _hear()
            os._exit(1)  # the main thread may sit in a collective that will never end, and hears of nothing else
        return


def _tell(why: str) -> None:
    """Lets the others know, and waits until they have heard: when process 0 ends, the service ends with it."""
    _put(f"{_name()}: {why}")
    _hear()


def _put(message: str) -> None:
    """Writes what all processes hear, and waits for the thread of this one to hear it."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one has put it before
        _service().key_value_set(FAILED, message)
    # A thread that still listened at the end would break the exit of this process.
    for thread in threading.enumerate():
        if thread.name == LISTENS:
            thread.join(FAREWELL_S)


def _hear() -> None:
    """Waits for the others to have read it, and leaves together with them."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _service().wait_at_barrier(HEARD, FAREWELL_S * 1000)
        jax.distributed.shutdown()  # together, or JAX takes the silence of those that are gone for another failure


def _name() -> str:
    return f"process {index()}"


def _part() -> None:
    meet("come to the end of the run")
    _put("")
    jax.distributed.shutdown()
