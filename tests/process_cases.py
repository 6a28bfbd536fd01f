"""Run by test_processes.py as each of two processes that JAX_* name: how processes agree, and how they fail.

python tests/process_cases.py agree        prints what each came to, a line of JSON
python tests/process_cases.py fail         process 0 refuses something while the other waits for it
python tests/process_cases.py late         process 0 takes longer than the other may wait
"""

from __future__ import annotations

import json
import sys
import time

from wovr_jax.core import processes

STEPS, AHEAD = 12, 2


def agree() -> None:
    """A loop whose steps need both processes; one of them is asked to stop, later the other one is, too late."""
    told = processes.once(lambda: {"by": processes.index()}, "tell")
    stops = []
    for asked in ({1: 4}, {0: 6, 1: 5}, {1: STEPS - 1}):
        agreed = processes.Agreement(AHEAD)
        for step in range(1, STEPS + 1):
            if step > AHEAD:
                processes.meet(f"take step {step - AHEAD}")  # as the oldest step in flight is waited for
            wishes = {"SIGTERM"} if step >= asked.get(processes.index(), STEPS) else set()
            if due := agreed.last(wishes) if step == STEPS else agreed(step, wishes):
                stops.append([step, *due])
                break
            time.sleep(0.01 * processes.index())
    print(json.dumps([told, stops]))


def fail() -> None:
    """Only process 0 sees the fault."""
    if processes.first():
        time.sleep(1)
        raise ValueError("the folder is of another run")
    processes.meet("never")


def late() -> None:
    processes.WAIT_S = 1
    processes.once(lambda: time.sleep(3), "fetch the milk")


if __name__ == "__main__":
    with processes.joined():
        {"agree": agree, "fail": fail, "late": late}[sys.argv[1]]()
