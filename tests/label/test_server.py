"""The page of labels and its socket: who may come in, what is answered, what the door says."""

from __future__ import annotations

import http.client
import pathlib
import re
import signal
import subprocess
import sys
import urllib.request

import msgpack
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from tests.label.small import PATIENCE, Served, record
from tests.play.small import make_run
from wovr_jax.data import episodes as disk
from wovr_jax.data.recordings import read_labels
from wovr_jax.export import wire
from wovr_jax.label.scores import score
from wovr_jax.label.store import LabelError, Store

DOOR = pathlib.Path(__file__).parents[2] / "launch" / "label.py"


@pytest.fixture
def served(tmp_path):
    record(tmp_path / "recordings", 3)
    with Served(tmp_path / "recordings") as running:
        yield running


def open_socket(served: Served, origin: str | None = ""):
    origin = f"http://127.0.0.1:{served.port}" if origin == "" else origin
    return connect(f"ws://127.0.0.1:{served.port}/ws", compression=None, origin=origin)  # pyright: ignore


def test_the_page_is_one_file_and_only_it_may_connect(served):
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=PATIENCE)
    connection.request("GET", "/")
    reply = connection.getresponse()
    text = reply.read().decode()
    assert reply.status == 200 and "<title>Labels</title>" in text
    assert not re.findall(r"""(?:src|href)=["'](?!data:)[^"']""", text) and "@import" not in text and "url(" not in text
    assert "default-src 'none'" in (reply.getheader("Content-Security-Policy") or "")
    for origin in (None, "http://somewhere.example", f"http://localhost:{served.port}"):
        with pytest.raises(InvalidStatus, match="403"), open_socket(served, origin):
            pass
    connection.request("GET", "/", headers={"Host": "attacker.example"})
    assert connection.getresponse().status == 403


def test_marks_over_the_wire(served):
    with open_socket(served) as page:
        told = wire.unpack(page.recv(timeout=PATIENCE))
        assert told["told"] == "list" and told["by"] == "ada" and len(told["items"]) == 3 and told["judge"] is None
        wrong = {
            "text": "expected a binary message",
            b"\xc1": "expected one whole msgpack map",
            msgpack.packb([1]): "'do': expected one of",
            msgpack.packb({"do": "mark", "item": 0, "outcome": "won"}): "'outcome': expected one of",
        }
        for message, words in wrong.items():
            page.send(message)
            assert words in page.recv(timeout=PATIENCE)
        page.send(wire.pack({"do": "mark", "item": 1, "outcome": "success", "first_success": 4, "lies_from": None}))
        assert wire.unpack(page.recv(timeout=PATIENCE))["label"]["first_success"] == 4
    (label,) = read_labels(served.store.folder).values()
    assert label.outcome == "success" and label.by == "ada"


def test_a_bug_is_logged_and_the_page_goes_on(served, monkeypatch, caplog):
    with open_socket(served) as page:
        page.recv(timeout=PATIENCE)
        with monkeypatch.context() as broken:
            broken.setattr(served.store, "mark", lambda *_: 1 / 0)
            page.send(wire.pack({"do": "mark", "item": 1, "outcome": "success"}))
            assert "the server's log says why" in page.recv(timeout=PATIENCE)
        assert "ZeroDivisionError" in caplog.text
        page.send(wire.pack({"do": "list"}))
        assert isinstance(page.recv(timeout=PATIENCE), bytes)


# The classifier -------------------------------------------------------------------------------------------------------


def test_the_classifier_of_a_run_scores_every_frame(tmp_path):
    run = make_run(tmp_path / "small")
    source = disk.EpisodeSource(run / "stages" / "demonstrations" / "episodes")
    for number in range(3):
        disk.write(tmp_path / "recordings" / f"2026-{number}", [source[number]])
    scores = score(Store(tmp_path / "recordings", "ada"), run)
    assert scores.name == "small, round 1" and scores.threshold == 0.25
    for number in range(3):
        assert scores.probs[number].shape == source[number].success_S.shape
        assert (scores.probs[number] > 0).all() and scores.probs[number].std() > 0
    record(tmp_path / "others", 1)
    with pytest.raises(LabelError, match="small does not know 'task 0'; it knows: pick up the"):
        score(Store(tmp_path / "others", "ada"), run)
    with pytest.raises(LabelError, match="is not a run folder"):
        score(Store(tmp_path / "recordings", "ada"), tmp_path)
    for mark in run.glob("stages/reward-*/done.json"):
        mark.unlink()
    with pytest.raises(LabelError, match="no finished classifier"):
        score(Store(tmp_path / "recordings", "ada"), run)


# The door -------------------------------------------------------------------------------------------------------------


def test_the_door_tells_the_address_and_ends_well(tmp_path):
    record(tmp_path / "recordings", 3)
    Store(tmp_path / "recordings", "bob").mark(0, "failure", None, None)
    command = [sys.executable, str(DOOR), str(tmp_path / "recordings"), "--port", "0", "--by", "ada"]
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        told = re.fullmatch(r"3 recordings, 2 without a label, at (http://127.0.0.1:\d+)\n", line)
        assert told, process.stderr.read()
        with urllib.request.urlopen(told[1], timeout=PATIENCE) as reply:
            assert b"<title>Labels</title>" in reply.read()
        process.send_signal(signal.SIGINT)
        rest, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and rest == "" and said == "stopped\n"


def test_what_the_door_cannot_open_is_said(opened, tmp_path):
    status, out, _ = opened("label.py", tmp_path / "none", "--port", 0)
    assert "no recordings in it. launch/serve.py --record FOLDER writes some" in status and not out
    (tmp_path / "recordings" / "strange").mkdir(parents=True)
    status, _, _ = opened("label.py", tmp_path / "recordings", "--port", 0)
    assert "is no recording: manifest.json is missing" in status
