"""The kill test itself: its moments reach every stage, and it sees one bit, one metric and one file that differ."""

from __future__ import annotations

import collections
import contextlib
import json
import pathlib
import shutil
import sys

import jax.numpy as jnp
import pytest

from launch.tools import kill_test
from wovr_jax.core import checkpoint
from wovr_jax.core.log import Log

SECONDS = {"sft": 2.0, "collect-0": 1.0, "world-0": 5.0}
STEPS = {"sft": 9, "world-0": 5}


def test_every_stage_has_a_moment_and_the_others_are_where_the_time_goes() -> None:
    moments = kill_test.plan(SECONDS, STEPS, 7, seed=0)
    assert moments == kill_test.plan(SECONDS, STEPS, 7, seed=0) != kill_test.plan(SECONDS, STEPS, 7, seed=1)
    assert {moment.stage for moment in moments} == set(SECONDS) and len(moments) == 7
    assert [moment.stage for moment in moments] == sorted((moment.stage for moment in moments), key=list(SECONDS).index)
    assert all(0 <= moment.after_s <= SECONDS[moment.stage] for moment in moments)
    assert len({moment.stage for moment in kill_test.plan(SECONDS, STEPS, 3, seed=5)}) == 3
    many = kill_test.plan(SECONDS, STEPS, 200, seed=0)
    count = collections.Counter(moment.stage for moment in many)
    assert count["world-0"] > count["sft"] > count["collect-0"] > 1
    by_step = [moment for moment in many if moment.step]
    assert {moment.stage for moment in by_step} == set(STEPS) and 70 < len(by_step) < 110
    assert all(moment.step < STEPS[moment.stage] for moment in by_step)


@pytest.fixture
def runs(tmp_path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Two equal runs; the second was saved at other times and by another clock."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for run, seconds, others in ((whole, 1.0, [4]), (cut, 9.0, [2, 3, 4])):
        stage = run / "stages" / "world-0"
        for step in others:
            checkpoint.save(stage / "fit" / f"{step:08d}", {"w": jnp.full(2, step)})
        checkpoint.save(stage / "dit", {"w": jnp.arange(3.0)})
        (stage / "done.json").write_text(json.dumps({"seconds": seconds, "loss": 0.5}))
        (stage / "film.mp4").write_bytes(b"film")
        (run / "results.json").write_text(json.dumps({"seconds_now": seconds, "phases": [{"true_success": 1}]}))
        with contextlib.closing(Log(run, tensorboard=False)) as log:
            for _ in others[:2]:  # the second run wrote the line again
                log.scalars("world-0", 4, {"loss": 0.25})
    return whole, cut


def test_equal_runs_are_equal(runs: tuple[pathlib.Path, pathlib.Path]) -> None:
    assert kill_test.differences(*runs) == []


def test_one_bit_one_metric_one_file_and_one_fact_are_seen(runs: tuple[pathlib.Path, pathlib.Path]) -> None:
    cut = runs[1]
    checkpoint.save(cut / "stages" / "world-0" / "dit", {"w": jnp.array([0.0, 1.0, 2.0000002])})
    (cut / "stages" / "world-0" / "film.mp4").write_bytes(b"films")
    (cut / "stages" / "world-0" / "done.json").write_text(json.dumps({"seconds": 9.0, "loss": 0.51}))
    with contextlib.closing(Log(cut, tensorboard=False)) as log:
        log.scalars("world-0", 4, {"loss": 0.26})
    shutil.rmtree(cut / "stages" / "world-0" / "fit")
    assert sorted(kill_test.differences(*runs)) == [
        "metrics.jsonl/world-0/4/loss,stage,step: differs",
        "stages/world-0/dit/w: differs",
        "stages/world-0/done.json (loss): differs",
        "stages/world-0/film.mp4: differs",
        "stages/world-0/fit/00000004: only in whole",
    ]


BEGINS = """
import pathlib, sys, time
for name in ("world-0", "sft"):  # a stage asks for another one first
    print("==", name, file=sys.stderr, flush=True)
for name in ("sft", "world-0"):
    for step in (3, 4):
        (pathlib.Path("RUN") / "stages" / name / "fit" / f"{step:08d}").mkdir(parents=True, exist_ok=True)
        time.sleep(0.4)
    (pathlib.Path("RUN") / "stages" / name / "done.json").touch()
time.sleep(60)
"""


def test_a_process_is_killed_in_the_stage_and_after_the_step_that_were_aimed_at(tmp_path: pathlib.Path) -> None:
    """Neither in the inner stage of the one that was aimed at, nor because an earlier process had begun it."""
    run, log = tmp_path / "run", tmp_path / "log"
    log.write_text("== sft\n")
    command = [sys.executable, "-c", BEGINS.replace("RUN", str(run))]
    for moment, name, kill in (
        (kill_test.Moment("sft", 0.1, step=3), "KILL", ("sft", 3, -9)),
        (kill_test.Moment("sft", 0.1, step=4), "TERM", ("sft", 4, -15)),
        (kill_test.Moment("world-0", 0.5), "KILL", ("world-0", 4, -9)),
    ):
        shutil.rmtree(run, ignore_errors=True)
        assert kill_test.kill_at(command, run, moment, name, log) == kill_test.Kill(moment, *kill)


@pytest.mark.slow
def test_a_killed_run_is_the_run_that_was_left_alone(tmp_path: pathlib.Path) -> None:
    assert kill_test.main(["--kills=5", f"--folder={tmp_path}"]) == 0
