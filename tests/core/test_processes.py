"""Several processes: steps over the devices of all are those of one device, and checkpoints move between them."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from configs.pace import get_config
from tests.core.test_sharding import on_devices, on_meshes
from wovr_jax.core import processes
from wovr_jax.core.config import ConfigError
from wovr_jax.core.log import read_metrics
from wovr_jax.studies import runner

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROCESSES, EACH = 2, 2


def started(command: Sequence[str], *, limit_s: float = 900) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of two processes of one command, which have two devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={EACH}"
    shared = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    shared |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(PROCESSES)}
    shared["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # see machine.enable_compile_cache
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    there = [
        subprocess.Popen([sys.executable, *command], env=shared | {"JAX_PROCESS_ID": str(i)}, **pipe)
        for i in range(PROCESSES)
    ]
    try:
        said = [process.communicate(timeout=limit_s) for process in there]
    finally:
        for process in there:
            process.kill()  # one that waits for another that failed
    return [(process.returncode, out, err) for process, (out, err) in zip(there, said, strict=True)]


def on_processes(script: str, *words: str) -> list[str]:
    """The last line that each of two processes prints."""
    ended = started([str(ROOT / "tests" / script), *words])
    for status, _, err in ended:
        assert status == 0, err[-3000:]
    return [out.splitlines()[-1] for _, out, _ in ended]


# --- how they find each other ---------------------------------------------------------------


def detect(**environment: str) -> dict[str, Any] | None:
    return processes.detect(environment, on_tpu=False)


SLURM = dict.fromkeys(processes.SLURM, "3")


def test_a_process_on_its_own_looks_for_no_other() -> None:
    assert detect() is None
    assert detect(JAX_NUM_PROCESSES="1", JAX_COORDINATOR_ADDRESS="a:1") is None
    assert detect(**SLURM | {"SLURM_NTASKS": "1"}) is None
    assert detect(SLURM_JOB_ID="3", SLURM_NTASKS="2", SLURM_PROCID="0", SLURM_LOCALID="0") is None  # sbatch, not srun
    assert detect(**SLURM, JAX_NUM_PROCESSES="1") is None  # tasks of a job that have nothing to do with each other
    assert processes.count() == 1 and processes.first()


def test_processes_are_found_by_hand_by_slurm_and_on_a_tpu() -> None:
    by_hand = detect(JAX_COORDINATOR_ADDRESS="a:1", JAX_NUM_PROCESSES="4", JAX_PROCESS_ID="3", **SLURM)
    assert by_hand is not None and by_hand["process_id"] == 3 and by_hand["num_processes"] == 4
    assert detect(**SLURM) == {"cluster_detection_method": "slurm", "num_processes": 3}
    assert processes.detect({}, on_tpu=True) == {}


def test_a_step_has_the_tasks_of_the_step_and_not_those_of_the_job() -> None:
    # A shell in an allocation of three: nobody has started the others, and nobody may ever do.
    assert detect(**SLURM, SLURM_STEP_NUM_TASKS="1") is None
    step = detect(**SLURM | {"SLURM_NTASKS": "8"}, SLURM_STEP_NUM_TASKS="2")  # srun -n 2 in an allocation of eight
    assert step == {"cluster_detection_method": "slurm", "num_processes": 2}
    assert detect(**SLURM | {"SLURM_NTASKS": "2(x4)"}) is None


@pytest.mark.parametrize(
    "given", [("a:1", "", ""), ("", "2", "0"), ("a:1", "2", "2"), ("a:1", "two", "0"), ("a:1", "2", "")]
)
def test_half_of_the_variables_is_refused(given: tuple[str, str, str]) -> None:
    with pytest.raises(processes.ProcessError, match="need all of JAX_COORDINATOR_ADDRESS"):
        detect(**dict(zip(processes.BY_HAND, given, strict=True)))


def test_what_several_processes_cannot_do_is_refused_by_its_name(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(ConfigError, match="a study .ladder. runs in one process"):
        runner.run("ladder", json.loads(get_config("tiny").to_json()), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- how they agree and fail ----------------------------------------------------------------


def test_all_stop_after_the_same_step_whichever_was_asked() -> None:
    """A process that stopped at once would save alone, and the others wait for it in a step."""
    first, second = map(json.loads, on_processes("core/process_cases.py", "agree"))
    assert first == second
    told, stops = first
    assert told == {"by": 0}
    assert stops == [[4 + 3, "SIGTERM"], [5 + 3, "SIGTERM"], [12, "SIGTERM"]]


def test_a_refusal_of_process_0_ends_the_process_that_waits_for_it() -> None:
    for status, _, err in started([str(ROOT / "tests" / "core" / "process_cases.py"), "fail"], limit_s=300):
        assert status not in (0, None)
        assert "ValueError: the folder is of another run" in err  # a missed heartbeat would not know it


def test_states_that_two_processes_save_behind_a_training_come_back_in_both(tmp_path: pathlib.Path) -> None:
    """The newest one is damaged in a file, and only one of the two processes looks at that file."""
    first, second = map(json.loads, on_processes("core/process_cases.py", "history", str(tmp_path / "fit")))
    assert first == second == {"saved": [2, 3], "step": 2, "kernel": [2.0] * 4, "then": [2, 3]}
    assert sorted(path.name for path in (tmp_path / "fit").iterdir()) == ["00000002", "00000003", "00000003.broken"]


@pytest.mark.slow
def test_a_wait_is_bounded_and_says_for_what() -> None:
    (_, _, first), (status, _, err) = started([str(ROOT / "tests" / "core" / "process_cases.py"), "late"], limit_s=100)
    assert status != 0 and "waited 1 s for the others to fetch the milk" in err
    assert "process 1: ProcessError" in first


# --- what they compute ----------------------------------------------------------------------


@pytest.mark.parametrize("mesh", ["1x4x1", *(pytest.param(m, marks=pytest.mark.slow) for m in ("2x2x1", "1x2x2"))])
def test_simulators_of_two_hosts_play_the_trials_of_one(mesh: str, tmp_path: pathlib.Path) -> None:
    """Each process plays its share with the policy on its own devices; the others' is told, or lies on the disk."""
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    found = on_devices(1, "sim/libero/host_cases.py", str(alone), "1x1x1")
    assert on_processes("sim/libero/host_cases.py", str(pair), mesh) == [found] * 2
    kept = ("sampled-*/trials.jsonl", "sampled-*/trials-1.jsonl")
    assert [len(next(pair.glob(name)).read_text().splitlines()) for name in kept] == [3, 3]


def test_rows_that_two_hosts_would_play_are_refused_at_once(tmp_path: pathlib.Path) -> None:
    for status, _, err in started([str(ROOT / "tests/sim/libero/host_cases.py"), str(tmp_path / "run"), "1x1x4"]):
        assert status != 0 and "tensor 4 reaches over several processes" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_training_steps_of_two_processes_are_those_of_one_device() -> None:
    (alone,) = on_meshes("world,grpo", "1x1x1").values()
    for said in on_processes("core/mesh_cases.py", "world,grpo", "2x2x1"):
        (found,) = json.loads(said).values()
        for case, near in (("world", 5e-6), ("grpo", 1e-4)):  # as on meshes of one process
            scale = max(map(abs, alone[case]))
            np.testing.assert_allclose(found[case], alone[case], atol=near * scale, rtol=0, err_msg=case)


@pytest.mark.slow
def test_a_state_saved_by_eight_devices_is_restored_by_two_processes_and_back(tmp_path: pathlib.Path) -> None:
    saved, _ = on_devices(8, "core/moved_checkpoint.py", "save", str(tmp_path / "eight"), "2x2x2").split()
    for said in on_processes("core/moved_checkpoint.py", "restore", str(tmp_path / "eight"), "1x4x1"):
        assert said.split()[0] == saved
    written = on_processes("core/moved_checkpoint.py", "save", str(tmp_path / "two"), "1x4x1")
    assert {said.split()[0] for said in written} == {saved}
    restored, _ = on_devices(8, "core/moved_checkpoint.py", "restore", str(tmp_path / "two"), "1x8x1").split()
    assert restored == saved


@pytest.mark.slow
def test_a_whole_run_of_two_processes_is_that_of_one_on_the_same_mesh(tmp_path: pathlib.Path) -> None:
    """Every stage of the loop, from demonstrations to the report."""
    command = [str(ROOT / "launch" / "train.py"), "--config=configs/pace.py:tiny"]
    command += ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.checkpoints.every_s=0.5"]
    one, two = tmp_path / "one", tmp_path / "two"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={PROCESSES * EACH}"
    alone = [sys.executable, *command, f"--run={one}"]
    subprocess.run(alone, env=os.environ | {"XLA_FLAGS": flags}, check=True, timeout=1500, cwd=ROOT)
    ended = started([*command, f"--run={two}"], limit_s=1500)
    for status, _, err in ended:
        assert status == 0, err[-3000:]
    quiet = [line for line in ended[1][1].splitlines() if not line.startswith("[Gloo]")]  # the transport speaks in C++
    assert "== grpo-2" in ended[0][2] and quiet == [] and "==" not in ended[1][2]  # process 0 tells of progress
    assert curves(one).keys() == curves(two).keys()
    for at, value in curves(one).items():
        if "loss" in at:  # sums over devices in another order: 1e-7 in the first stage, more in those that build on it
            np.testing.assert_allclose(curves(two)[at], value, rtol=1e-3, err_msg=at)
    phases = [json.loads((run / "results.json").read_text())["phases"] for run in (one, two)]
    assert phases[0] == phases[1]


def curves(run: pathlib.Path) -> dict[str, float]:
    """Stage, step and metric -> value."""
    lines = read_metrics(run)
    return {f"{line['stage']} {line['step']} {name}": value for line in lines for name, value in line.items()}
