"""The way of docs/robot_lab.md as its commands: a laboratory of its own processes, the table in the robot's place."""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from wovr_jax.core.disk import read_json
from wovr_jax.data.recordings import LABELS

ROOT = pathlib.Path(__file__).resolve().parents[3]
SIZES = ("--size", "16", "--horizon", "16")
PATIENCE_S = 1800


def start(folder: pathlib.Path, door: str, *words: object, **how: object) -> subprocess.Popen[str]:
    """Starts a program of ours in ``folder``, as a user would."""
    command = [sys.executable, str(ROOT / "launch" / door), *map(str, words)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | how
    return subprocess.Popen(command, cwd=folder, env=environment, **pipe)  # pyright: ignore


def finish(program: subprocess.Popen[str]) -> tuple[int, str]:
    """Returns exit status and what it said."""
    said = program.communicate(timeout=PATIENCE_S)[0]
    return program.returncode, said


def train(folder: pathlib.Path, run: str, preset: str, draw: random.Random | None = None) -> tuple[int, str]:
    """Runs the one command of a run; with ``draw`` it is killed at a random time first, or not."""
    words = ("train.py", f"--config={ROOT}/configs/robot.py:{preset}", f"--run={folder / run}")
    if draw and draw.random() < 0.7:
        program = start(folder, *words)
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.communicate(timeout=draw.uniform(5, 60))
        program.kill()
        program.communicate()
    return finish(start(folder, *words))


@contextlib.contextmanager
def served(folder: pathlib.Path, command: list[str]) -> Iterator[str]:
    """The policy server, with the words that the run printed; gives its address."""
    door, *words = command[1:]
    server = start(folder, door.removeprefix("launch/"), *words, "--port", "0", stderr=subprocess.DEVNULL)
    assert server.stdout is not None
    try:
        (url,) = re.findall(r"ws://\S+", server.stdout.readline())
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "wrong"), [("tabletop,tiny", 0.0), ("tabletop,senses,tiny", 0.125)])
def test_a_laboratory_takes_a_run_from_demonstrations_to_its_last_policy(
    tmp_path: pathlib.Path, preset: str, wrong: float
) -> None:
    """With one camera and right labels; and with two, the robot's state, and one label in eight wrong."""
    draw, stages, shown = random.Random(int(100 * wrong)), [], tmp_path / "recordings" / "tiny" / "demonstrations"
    sizes = (*SIZES, *["--senses"] * ("senses" in preset))
    status, said = train(tmp_path, "run", preset)
    assert status == 1 and "waits for 16 of 16 recorded demonstrations" in said
    assert finish(start(tmp_path, "tools/table_robot.py", "show", shown, "--episodes", 16, *sizes))[0] == 0
    while (outcome := train(tmp_path, "run", preset, draw))[0]:
        status, said = outcome
        wanted = read_json(tmp_path / "run" / "wanted.json")
        stages.append(wanted["stage"])
        assert status == 1 and " ".join(wanted["command"]) in said and "The same command goes on" in said, said
        with served(tmp_path, wanted["command"]) as url:
            words = ("drive", url, "--wanted", tmp_path / "run" / "wanted.json", "--wrong", wrong, *sizes)
            assert (drove := finish(start(tmp_path, "tools/table_robot.py", *words)))[0] == 0, drove[1]
        assert len(read_json(pathlib.Path(wanted["folder"]) / LABELS)["labels"]) == wanted["episodes"]
    assert stages == ["evaluate-0", "collect-0", "evaluate-1", "collect-1", "evaluate-2"]
    assert "True success (greedy) went from" in outcome[1] and (tmp_path / "run" / "report.html").is_file()
    # Left alone, on the same recordings: the same weights bit for bit, or it would wait for others.
    status, said = train(tmp_path, "again", preset)
    assert status == 0, said
    for name in ("base", "grpo-1", "grpo-2"):
        first, second = (read_json(tmp_path / run / "policies" / f"{name}.json") for run in ("run", "again"))
        assert first["weights"] == second["weights"], name
    bundles = [tmp_path / "run" / "policies" / name for name in ("base", "grpo-2")]
    status, said = finish(start(tmp_path, "tools/table_robot.py", "measure", *bundles, "--episodes", 32, *sizes))
    assert status == 0 and "grpo-2" in said, said
