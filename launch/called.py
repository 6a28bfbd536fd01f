"""How a program behaves that a run calls (``sim.arena.call_program``): it speaks to the run, and ends when it does."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

from launch import command


@contextlib.contextmanager
def answer_run() -> Iterator[None]:
    """Prints a refusal for the run, which ends with it, and ends this program with status 1."""
    end_with_run()
    try:
        # The standard output is for the answer; libraries print too.
        with command.explain_errors("stopped"), contextlib.redirect_stdout(sys.stderr):
            yield
    except SystemExit as end:
        if not isinstance(end.code, str):
            raise
        print(end.code)
        sys.exit(1)


def end_with_run() -> None:
    """Has this process end when the run closes its end of the pipe, which the system does for a run that was killed."""
    # Ctrl-C reaches both, and the run answers it: this program ends when the run does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_wait_for_end, daemon=True).start()


def _wait_for_end() -> None:
    # Not sys.stdin: a thread that holds its lock at the end would break the exit.
    os.read(0, 1)
    # What such a program writes is written whole or not at all, and workers end when their line breaks.
    os._exit(1)
