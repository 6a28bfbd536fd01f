"""Several processes: steps over the devices of all are those of one device, and checkpoints move between them."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.test_sharding import on_devices, on_meshes

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROCESSES, EACH = 2, 2


def on_processes(script: str, *words: str) -> list[str]:
    """The last line that each of two processes prints, which have two devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={EACH}"
    shared = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / "tests" / script), *words]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [
        subprocess.Popen(command, env=shared | {"PROCESS_OF_TEST": f"{address} {PROCESSES} {i}"}, **pipe)
        for i in range(PROCESSES)
    ]
    try:
        ended = [process.communicate(timeout=900) for process in started]
    finally:
        for process in started:
            process.kill()  # one that waits for another that failed
    for process, (_, err) in zip(started, ended, strict=True):
        assert process.returncode == 0, err[-3000:]
    return [out.splitlines()[-1] for out, _ in ended]


@pytest.mark.slow
def test_training_steps_of_two_processes_are_those_of_one_device() -> None:
    (alone,) = on_meshes("world,grpo", "1x1x1").values()
    for said in on_processes("mesh_cases.py", "world,grpo", "2x2x1"):
        (found,) = json.loads(said).values()
        for case, near in (("world", 5e-6), ("grpo", 1e-4)):  # as on meshes of one process
            scale = max(map(abs, alone[case]))
            np.testing.assert_allclose(found[case], alone[case], atol=near * scale, rtol=0, err_msg=case)


@pytest.mark.slow
def test_a_state_saved_by_eight_devices_is_restored_by_two_processes_and_back(tmp_path: pathlib.Path) -> None:
    saved, _ = on_devices(8, "moved_checkpoint.py", "save", str(tmp_path / "eight"), "2x2x2").split()
    for said in on_processes("moved_checkpoint.py", "restore", str(tmp_path / "eight"), "1x4x1"):
        assert said.split()[0] == saved
    written = {said.split()[0] for said in on_processes("moved_checkpoint.py", "save", str(tmp_path / "two"), "1x4x1")}
    assert written == {saved}
    restored, _ = on_devices(8, "moved_checkpoint.py", "restore", str(tmp_path / "two"), "1x8x1").split()
    assert restored == saved
