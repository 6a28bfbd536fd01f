"""The scripts that start a run on many hosts, against stand-ins of gcloud and srun: what they call and begin again.

No TPU and no SLURM is here; that the real programs take these arguments is not tested.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TRAIN = ("--config=configs/pace.py", "--config.name=it's", "--run=/shared/first")


def program(path: pathlib.Path, text: str) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}")
    path.chmod(0o755)
    return path


def pod(*words: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "launch" / "tpu_pod.sh"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | (environment or {}))


def test_a_dry_run_prints_the_commands_in_their_order() -> None:
    done = pod("--dry-run", "--slice=s", "--zone=z", "--type=v6e-16", "--nfs=h:/x", "--assets=gs://b/w", "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    wanted = (
        "queued-resources create s",
        "archive",
        "tpu-vm scp",
        "install",
        "mount",
        "rsync",
        "launch/train.py",
        "tail",
    )
    assert len(lines) == len(wanted) + 1
    for line, word in zip(lines, (*wanted, "queued-resources delete s"), strict=True):
        assert word in line, (word, line)
    assert "--accelerator-type=v6e-16" in lines[0] and "--spot" in lines[0] and "--zone=z" in lines[0]
    assert all("--worker=all" in line for line in lines[2:7]) and "--worker=0" in lines[7]


@pytest.mark.parametrize(
    ("words", "said"),
    [((), "after --"), (("--slize=s",), "unknown: --slize"), (("--", "--run=/elsewhere/run"), "--run=/shared/<name>")],
)
def test_what_cannot_work_is_refused_before_anything_is_asked_for(words: tuple[str, ...], said: str) -> None:
    done = pod("--dry-run", *words)
    assert done.returncode == 2 and said in done.stderr and not done.stdout


GCLOUD = """
echo "$*" >> calls
case "$*" in
  *"queued-resources describe"*) cat state 2> /dev/null || exit 1 ;;
  *"queued-resources create"*) echo ACTIVE > state ;;
  *"queued-resources delete"*) rm state ;;
  *"tpu-vm scp"*) cp "$5" . ;;
  *"tpu-vm ssh"*) for word; do [[ $word != --command=* ]] || bash -c "${word#--command=}"; done ;;
esac
"""
# Saves and stops; is taken away with its slice; ends well.
PYTHON = """
turn=$(ls turn.* 2> /dev/null | wc -l); touch turn.$turn; echo "turn $turn: $*"
case $turn in 0) exit 143 ;; 1) echo SUSPENDED > ../state; kill -9 $PPID ;; esac
"""


@pytest.mark.skipif(shutil.which("flock") is None, reason="hosts of a slice have flock, this machine has not")
def test_a_run_that_stops_or_loses_its_slice_is_begun_again_and_the_slice_removed_at_the_end(
    tmp_path: pathlib.Path,
) -> None:
    program(tmp_path / "bin" / "gcloud", f"cd {tmp_path}\n{GCLOUD}")
    program(tmp_path / "wovr_jax" / ".venv" / "bin" / "python", PYTHON)
    program(tmp_path / "wovr_jax" / ".venv" / "bin" / "pip", "")
    path = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = pod("--poll=0", "--", *TRAIN, environment=path)
    assert done.returncode == 0, done.stderr
    turns = [line for line in (tmp_path / "wovr_jax" / "run.log").read_text().splitlines() if line.startswith("turn")]
    assert turns == [f"turn {n}: launch/train.py {' '.join(TRAIN)}" for n in range(3)]
    calls = [
        line.split("queued-resources ")[1].split()[0]
        for line in (tmp_path / "calls").read_text().splitlines()
        if "queued-resources" in line and "describe" not in line
    ]
    assert calls == ["create", "delete", "create", "delete"]
    assert "status 143; begun again (1 of 100)" in done.stderr and "status GONE; begun again (2 of 100)" in done.stderr
    assert (tmp_path / "wovr_jax" / "launch" / "train.py").is_file()  # the project was unpacked there


def test_a_job_that_has_sigterm_passes_it_on_and_goes_back_into_the_queue(tmp_path: pathlib.Path) -> None:
    program(tmp_path / "srun", f"trap 'exit 143' TERM; echo \"$*\" > {tmp_path}/srun.said; sleep 30 & wait")
    program(tmp_path / "scontrol", f'echo "$*" > {tmp_path}/scontrol.said')
    job = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path)}
    command = ["bash", str(ROOT / "launch" / "slurm.sh"), *TRAIN]
    with subprocess.Popen(command, env=os.environ | job | {"SLURM_GPUS_ON_NODE": "4"}) as process:
        while not (tmp_path / "srun.said").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
    assert (tmp_path / "scontrol.said").read_text().split() == ["requeue", "7"]
    assert (tmp_path / "srun.said").read_text().endswith(f"launch/train.py {' '.join(TRAIN)}\n")


def test_a_job_that_is_refused_stays_out_of_the_queue(tmp_path: pathlib.Path) -> None:
    program(tmp_path / "srun", "exit 1")
    program(tmp_path / "scontrol", f"touch {tmp_path}/scontrol.said")
    job = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run(["bash", str(ROOT / "launch" / "slurm.sh"), *TRAIN], env=os.environ | job, timeout=20)
    assert done.returncode == 1 and not (tmp_path / "scontrol.said").exists()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not here")
def test_shellcheck_has_nothing_to_say() -> None:
    scripts = map(str, (ROOT / "launch").glob("*.sh"))
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
