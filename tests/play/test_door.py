"""launch/play.py: what it prints, what it refuses in words, and how it ends."""

from __future__ import annotations

import pathlib
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import numpy as np
import pytest

from wovr_jax.play import latency
from wovr_jax.play.programs import Programs

DOOR = pathlib.Path(__file__).parents[2] / "launch" / "play.py"


def test_it_tells_the_address_serves_the_page_and_ends_well(run: pathlib.Path, programs: Programs) -> None:
    programs.warm()  # what the process compiles is then in the cache
    command = [sys.executable, str(DOOR), str(run), "--port", "0", "--round", "1"]
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        told = re.fullmatch(r"playing at (http://127.0.0.1:\d+) until Ctrl-C\n", process.stdout.readline())
        assert told, process.stderr.read()
        with urllib.request.urlopen(told[1], timeout=60) as reply:
            assert b"<title>Two worlds</title>" in reply.read()
        process.send_signal(signal.SIGINT)
        rest, said = process.communicate(timeout=60)
    assert process.returncode == 0 and rest == "" and said == "small: policy grpo-1, world model world-1\nstopped\n"


def test_what_it_cannot_open_is_said(opened, run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    status, out, _ = opened("play.py", tmp_path, "--port", 0)
    assert "is not a run folder" in status and not out
    status, _, _ = opened("play.py", run, "--port", 0, "--world", 9)
    assert "expected a world model of round 9, found round 0, round 1" in status
    # Before anything is loaded: the folder is not there either.
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        status, _, _ = opened("play.py", tmp_path / "none", "--port", held.getsockname()[1])
    assert "the port is in use" in status


def test_latency_is_of_every_chunk(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = latency.measure(programs, 3)
    assert seconds.shape == (3,) and (seconds > 0).all()
    said = latency.describe(np.array([0.01] * 19 + [0.1]), 8)
    assert said == "a chunk of 8 frames: median 10.0 ms, p95 14.5 ms (20); 800 frames a second"
