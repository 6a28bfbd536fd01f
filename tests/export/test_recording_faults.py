"""Recordings are whole or not there, whatever the disk, clients and other servers do."""

from __future__ import annotations

import collections
import concurrent.futures
import errno
import re
import socket
from typing import Any

import numpy as np
import pytest

from tests.export.recording import FRAME, Robot, Served, read, recordings, unfinished, wait_until
from tests.test_faults import files_no_larger_than
from wovr_jax.export import recorder as recorders
from wovr_jax.export import wire
from wovr_jax.export.recorder import UNFINISHED
from wovr_jax.types import Episode

FULL = OSError(errno.ENOSPC, "No space left on device")
LAYOUT_OF_A_FULL_DISK = 999


@pytest.fixture
def served(tmp_path):
    with Served(tmp_path / "recordings") as running:
        yield running


@pytest.fixture
def folder(served):
    return served.recorder.folder


@pytest.fixture
def robot(served):
    with Robot(served.url) as client:
        yield client


# What the disk does ---------------------------------------------------------------------------------------------------


def test_a_full_disk_while_the_episode_goes_on(robot, folder, monkeypatch):
    def refuse(*_: object) -> None:
        raise FULL

    robot.start()
    robot.step()
    with monkeypatch.context() as full:
        full.setattr(recorders, "_write", refuse)
        robot.step()
        wait_until(lambda: robot.step()["state"] == "lost")
        assert "actions" in robot.ask({"prompt": "lift it", **robot.look()})
        assert re.search(r"the disk is full \(\d+ MiB are free", robot.end("success")["why"])
    assert recordings(folder) == [] and unfinished(folder) == []
    name = robot.start()
    robot.step()
    assert robot.end("success")["state"] == "written" and recordings(folder) == [name]


@pytest.mark.parametrize("where", ["add", "close"])
def test_a_full_disk_when_the_episode_ends(robot, folder, monkeypatch, where):
    def refuse(*_: object) -> None:
        raise FULL

    robot.start()
    robot.step()
    with monkeypatch.context() as full:
        full.setattr(recorders.EpisodeWriter, where, refuse)
        state = robot.end("success")
    assert state["state"] == "lost" and "the disk is full" in state["why"]
    assert recordings(folder) == [] and unfinished(folder) == []
    assert "no episode is being recorded (the last was" in robot.ask({"record": "success", "steps": 1})


def test_a_full_disk_as_the_system_tells_of_it(robot, folder):
    robot.start()
    robot.step()
    wait_until(lambda: len(list(folder.glob(f"{UNFINISHED}*/*/wrist"))) == 1)
    with files_no_larger_than(64):
        state = robot.end("success")
    assert state["state"] == "lost" and "the disk is full" in state["why"]
    assert recordings(folder) == [] and unfinished(folder) == []


def test_a_failure_of_our_own_is_logged_and_told(robot, folder, monkeypatch, caplog):
    robot.start()
    robot.step()
    with monkeypatch.context() as broken:
        broken.setattr(recorders.EpisodeWriter, "add", lambda *_: 1 / 0)
        assert "ZeroDivisionError" in robot.end("success")["why"]
    assert "ZeroDivisionError" in caplog.text and recordings(folder) == []


# Clients that vanish, and servers -------------------------------------------------------------------------------------


def test_the_episode_of_a_client_that_vanishes_is_dropped(tmp_path):
    told: list[str] = []
    with Served(tmp_path, told.append) as running:
        with Robot(running.url) as robot:
            name = robot.start()
            robot.step(3)
            robot.socket.socket.shutdown(socket.SHUT_RDWR)
        wait_until(lambda: told)
        assert told == [f"recording {name}: dropped, why its client left before its end, steps 3"]
        wait_until(lambda: unfinished(tmp_path) == [])
    assert recordings(tmp_path) == []


def test_what_a_killed_server_left_is_removed_and_a_living_one_keeps_its_own(tmp_path):
    with Served(tmp_path) as living, Robot(living.url) as robot:
        robot.start()
        robot.step()
        dead = tmp_path / f"{UNFINISHED}{socket.gethostname()}-0123ab"
        (dead / "20260101T000000-000000-00000-0123ab").mkdir(parents=True)
        elsewhere = tmp_path / f"{UNFINISHED}some.other.machine-4567cd"
        elsewhere.mkdir()
        with Served(tmp_path):
            assert not dead.exists() and elsewhere.exists() and len(unfinished(tmp_path)) == 1
        assert robot.end("success")["state"] == "written"
    assert len(recordings(tmp_path)) == 1


def test_a_server_that_stops_drops_what_goes_on(tmp_path):
    with Served(tmp_path) as running, Robot(running.url) as robot:
        robot.start()
        robot.step()
    assert list(tmp_path.iterdir()) == []


class Lab:
    """A client that does, episode after episode, what clients do, and remembers which of them are whole."""

    def __init__(self, url: str, seed: int):
        self.url, self.rng, self.robot = url, np.random.default_rng(seed), Robot(url, seed)
        self.whole: dict[str, tuple[str, np.ndarray, np.ndarray]] = {}
        self.done: collections.Counter[str] = collections.Counter()

    def play(self, episodes: int) -> Lab:
        kinds = ("success", "failure", "discard", "vanishes", "half", "cut", "twice", "retries", "full", "full at end")
        with self.robot:
            for _ in range(episodes):
                kind = str(self.rng.choice(kinds))
                self.done[kind] += 1
                self._play_one(kind)
        return self

    def _play_one(self, kind: str) -> None:
        robot = self.robot
        name = robot.start(layout=LAYOUT_OF_A_FULL_DISK if kind == "full at end" else int(self.rng.integers(900)))
        for _ in range(self.rng.integers(1, 4)):
            if self.rng.random() < 0.3:
                robot.ask({"prompt": "lift it", **robot.look()})
            robot.step(int(self.rng.integers(1, 4)))
        if kind in ("vanishes", "half", "cut"):
            return self._leave(kind)
        if kind == "discard":
            assert robot.say(record="discard")["state"] == "discarded"
            return None
        if kind == "retries":  # half a frame, which is refused, and then the whole one
            message = wire.pack({"record": "step", "step": robot.steps + 1, **robot.look(1)})
            assert isinstance(robot.ask(message[:-5]), str)
            assert isinstance(robot.ask(wire.pack({"record": "success", "steps": robot.steps + 1})), str)
            robot.step()
        if kind == "full":
            # A picture by which the disk is known to be full.
            look = robot.look(1) | {"observation/image": np.full((1, *FRAME), 255, np.uint8)}
            robot.say(record="step", step=robot.steps + 1, action=np.zeros((1, 7)), **look)
            assert robot.say(record="success", steps=robot.steps + 1)["state"] == "lost"
            return None
        outcome = "failure" if kind == "failure" else "success"
        state = robot.end(outcome)
        assert state["state"] == ("lost" if kind == "full at end" else "written"), state
        if state["state"] == "written":
            self.whole[name] = (outcome, robot.sent("image"), np.concatenate(robot.executed))
        if kind == "twice":
            assert isinstance(robot.ask({"record": "failure", "steps": robot.steps}), str)
        return None

    def _leave(self, kind: str) -> None:
        """Ends the connection in the middle of an episode, one way or another, and comes back."""
        message = wire.pack({"record": "step", "step": self.robot.steps + 1, **self.robot.look(1)})
        if kind == "half":
            self.robot.ask(message[: len(message) // 2])
        if kind == "cut":  # in the middle of a frame of the WebSocket: 200 bytes are announced and 50 come
            self.robot.socket.socket.sendall(b"\x82\xfe\x00\xc8" + bytes(4) + message[:50])
        self.robot.socket.socket.shutdown(socket.SHUT_RDWR)
        self.robot.__exit__()
        self.robot.__enter__()


def test_a_thousand_episodes_of_clients_that_vanish_cut_mark_twice_and_fill_the_disk(tmp_path, monkeypatch):
    write, add = recorders._write, recorders.EpisodeWriter.add

    def write_some(file: Any, data: memoryview) -> None:
        if bytes(data[:50]) == b"\xff" * 50:
            file.write(data[:20])
            raise FULL
        write(file, data)

    def add_some(self: Any, episode: Episode) -> None:
        add(self, episode)
        if episode.seed == LAYOUT_OF_A_FULL_DISK:
            raise FULL

    monkeypatch.setattr(recorders, "_write", write_some)
    monkeypatch.setattr(recorders.EpisodeWriter, "add", add_some)
    told: list[str] = []
    with Served(tmp_path, told.append) as running:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            labs = list(pool.map(lambda seed: Lab(running.url, seed).play(250), range(4)))
        wait_until(lambda: unfinished(tmp_path) == [])
        wait_until(lambda: len(told) == 1000)
    done = sum((lab.done for lab in labs), collections.Counter())
    whole = {name: facts for lab in labs for name, facts in lab.whole.items()}
    assert sum(done.values()) == 1000 and min(done.values()) > 50, done
    assert len(whole) == done["success"] + done["failure"] + done["twice"] + done["retries"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(whole), "half an episode, or one that is missing"
    for name, (outcome, frame_SHWC, action_SA) in whole.items():
        episode = read(tmp_path, name)
        np.testing.assert_array_equal(episode.frame_SHWC, frame_SHWC)
        np.testing.assert_array_equal(episode.action_SA, action_SA)
        assert episode.success_S.any() == (outcome == "success") and episode.origin["outcome"] == outcome
    states = collections.Counter(re.findall(r": (\w+)", line)[0] for line in told)
    assert states == {
        "written": len(whole),
        "lost": done["full"] + done["full at end"],
        "discarded": done["discard"],
        "dropped": done["vanishes"] + done["half"] + done["cut"],
    }
