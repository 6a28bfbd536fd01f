"""Workers that die, hang or fail cost one call and no more. The real processes, without the simulator in them."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from wovr_jax.sim.libero.pool import Lost, Pool
from wovr_jax.sim.libero.setup import LiberoError

ROOT = pathlib.Path(__file__).resolve().parents[3]


def double(state, number):
    return 2 * number


def die_on(state, number, fatal):
    if number == fatal:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die_once(state, mark, dies):
    if dies and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return mark.exists()


def fail(state):
    raise ZeroDivisionError("of the worker")


def refuse(state):
    raise LiberoError("no assets\n  export LIBERO_ASSETS=<folder>")


def hang(state, seconds):
    time.sleep(seconds)
    return "woke up"


def work_slowly(state, steps):
    for _ in range(steps):
        time.sleep(0.4)
        state.heartbeat()
    return steps


def say_pid(state):
    print("results on stdout belong to the master")
    return os.getpid()


@pytest.fixture(scope="module")
def pool():
    with Pool(2, None, timeout=1.2) as made:
        yield made


def test_every_job_is_answered_whichever_worker_does_it(pool):
    assert dict(pool.map(double, [(i,) for i in range(9)])) == {i: 2 * i for i in range(9)}


def test_a_killed_worker_costs_one_call_and_is_replaced(pool):
    answers = dict(pool.map(die_on, [(i, 3) for i in range(8)]))
    lost = answers.pop(3)
    assert isinstance(lost, Lost) and "died with exit status -9" in lost.reason
    assert answers == {i: i for i in range(8) if i != 3}
    assert dict(pool.map(double, [(i,) for i in range(4)])) == {i: 2 * i for i in range(4)}


def test_a_job_is_begun_again_as_often_as_asked(pool, tmp_path, capfd):
    jobs = [(tmp_path / str(i), i != 2) for i in range(4)]
    assert dict(pool.map(die_once, jobs, tries=2)) == {i: i != 2 for i in range(4)}
    assert capfd.readouterr().err.count("died with exit status -9") == 3
    ((_, lost),) = pool.map(die_on, [(3, 3)], tries=2)
    assert isinstance(lost, Lost)


def test_a_hung_worker_is_ended_after_the_timeout(pool):
    began = time.monotonic()
    ((_, lost),) = pool.map(hang, [(60.0,)])
    assert isinstance(lost, Lost) and "was silent for" in lost.reason
    assert time.monotonic() - began < 30


def test_signs_of_life_hold_off_the_timeout(pool):
    assert dict(pool.map(work_slowly, [(5,)])) == {0: 5}  # two seconds, silent for 0.4 at most


def test_an_exception_comes_back_with_its_traceback_and_the_worker_lives(pool):
    before = {pid for _, pid in pool.map(say_pid, [(), ()])}
    ((_, lost),) = pool.map(fail, [()])
    assert isinstance(lost, Lost) and "ZeroDivisionError: of the worker" in lost.reason
    assert {pid for _, pid in pool.map(say_pid, [(), ()])} <= before


def test_what_a_worker_refuses_is_raised(pool):
    with pytest.raises(LiberoError, match="export LIBERO_ASSETS"):
        list(pool.map(refuse, [()]))
    assert dict(pool.map(double, [(1,)])) == {0: 2}


def test_a_worker_imports_no_jax():
    """Each would take 0.2 GB more, and a thread pool of its own."""
    code = "import sys, wovr_jax.sim.libero.worker, wovr_jax.sim.libero.expert; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_closing_ends_workers_that_hang():
    with Pool(1, None) as made:
        made.send(0, hang, 60.0)
        process = made._slots[0].process
        began = time.monotonic()
    assert not process.is_alive() and time.monotonic() - began < 20
