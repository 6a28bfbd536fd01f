"""Recording beside the policy server: whole or not at all, whatever clients and the disk do."""

from __future__ import annotations

import concurrent.futures
import re
import socket
from typing import Any

import numpy as np
import pytest

from tests.export.recording import (
    CHUNK,
    FRAME,
    POLICY,
    WIDTH,
    FakeRobot,
    Robot,
    Served,
    read,
    recordings,
    unfinished,
    wait_until,
)
from tests.export.test_server import load_client
from wovr_jax.data import episodes as disk
from wovr_jax.export import recorder as recorders
from wovr_jax.export.recorder import RecordConfig, Recorder
from wovr_jax.export.robot import BundleError
from wovr_jax.export.server import PolicyServer, ServerConfig


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


# An episode ---------------------------------------------------------------------------------------------------------


def test_an_episode_is_an_episode_folder_with_all_that_was_sent(robot, folder):
    name = robot.start("lift it", layout=7, by="ada")
    first = robot.ask({"prompt": "lift it", "observation/image": robot.sent("image")[0]})["actions"]
    robot.step(3)
    robot.step(1)
    second = robot.ask({"prompt": "lift it", "observation/image": robot.sent("image")[-1]})["actions"]
    robot.step(2, person=True)
    robot.step(1)
    assert recordings(folder) == []
    assert robot.end("success") == {"state": "written", "name": name, "outcome": "success", "steps": 7}
    assert recordings(folder) == [name] and unfinished(folder) == []
    episode = read(folder, name)
    for ours, theirs in (("frame_SHWC", "image"), ("wrist_SHWC", "wrist_image"), ("state_SD", "state")):
        np.testing.assert_array_equal(getattr(episode, ours), robot.sent(theirs))
    np.testing.assert_array_equal(episode.action_SA, np.concatenate(robot.executed))
    # What the policy proposed, from the newest answer; of steps that a person steered, what they did.
    assert CHUNK == 8
    np.testing.assert_array_equal(episode.label_SA[:4], first[:4])
    np.testing.assert_array_equal(episode.label_SA[4:6], episode.action_SA[4:6])
    np.testing.assert_array_equal(episode.label_SA[6], second[2])
    assert episode.success_S.tolist() == [False] * 7 + [True]
    assert (episode.instruction, episode.task, episode.seed, episode.actor) == ("lift it", 0, 7, POLICY["policy"])
    origin = dict(episode.origin)
    assert origin.items() >= (POLICY | {"outcome": "success", "by": "ada", "clock": "server"}).items()
    assert origin["asked"] == [0, 4] and origin["changed"] == 5 and origin["intervened"] == "person"
    assert len(origin["seconds"]) == 8 and origin["seconds"][0] == 0 <= origin["seconds"][-1] < 60
    assert origin["began"].endswith("+00:00")


def test_what_the_policy_proposed_was_done_where_the_client_does_not_say(robot, folder):
    name = robot.start()
    assert "policy proposed none for step 1" in robot.ask({"record": "step", "step": 1, **robot.look(1)})
    actions = robot.ask({"prompt": "lift it", "observation/image": robot.sent("image")[0]})["actions"]
    robot.say(record="step", step=1, **robot.look(CHUNK))
    assert "proposed none for step 9" in robot.ask({"record": "step", "step": 9, **robot.look(1)})
    robot.say(record="failure", steps=CHUNK)
    episode = read(folder, name)
    np.testing.assert_array_equal(episode.action_SA, actions)
    np.testing.assert_array_equal(episode.label_SA, actions)
    assert not episode.success_S.any() and episode.origin["changed"] == 0 and "intervened" not in episode.origin


def test_without_the_policy_it_is_a_demonstration(served, folder):
    with Robot(served.url, wrist=False) as robot:
        name = robot.start(time=100.0)
        robot.step(2, time=[100.05, 100.1])
        assert robot.end("success", first_success=1)["state"] == "written"
    episode = read(folder, name)
    assert episode.actor == "human" and episode.wrist_SHWC is None and episode.state_SD is None
    assert episode.success_S.tolist() == [False, True, True]
    assert episode.origin["seconds"] == [0.0, 0.05, 0.1] and episode.origin["clock"] == "client"


def test_names_sort_by_time_and_episodes_without_a_layout_share_none(robot, folder):
    names = []
    for i in range(5):
        names.append(robot.start(f"task {i % 2}"))
        robot.step()
        robot.end("failure")
    assert recordings(folder) == names == sorted(names)
    episodes = [read(folder, name) for name in names]
    assert len({episode.seed for episode in episodes}) == 5
    assert [episode.task for episode in episodes] == [0, 1, 0, 1, 0]


def test_a_client_that_knows_nothing_of_it_is_served_and_not_recorded(robot, folder):
    assert robot.metadata["record"] == ["start", "step", "success", "failure", "discard"]
    for _ in range(3):
        reply = robot.ask({"prompt": "lift it", **robot.look()})
        assert reply.keys() == {"actions", "server_timing"}
    assert recordings(folder) == [] and unfinished(folder) == []


def test_a_server_that_does_not_record_says_so(tmp_path):
    with Served(tmp_path) as running:
        running.server.recorder = None
        with Robot(running.url) as robot:
            assert "start it with --record" in robot.ask({"record": "start", "prompt": "lift it", **robot.look()})
        running.server.recorder = running.recorder
    assert PolicyServer(FakeRobot(), ServerConfig())._metadata.find(b"record\xc0") > 0  # null


def test_a_policy_of_other_actions_is_refused(tmp_path):
    robot, recorder = FakeRobot(), Recorder(RecordConfig(str(tmp_path)), POLICY)
    robot.chunk_shape = (8, 14)
    with pytest.raises(BundleError, match="episodes have 7 numbers an action, this policy's 14"):
        PolicyServer(robot, ServerConfig(), recorder=recorder)
    recorder.close()


# What is refused -----------------------------------------------------------------------------------------------------


def test_wrong_starts_are_answered_in_words(robot):
    look = robot.look()
    small = {"observation/image": np.zeros((2, 2, 3), np.uint8)}
    starts: dict[str, dict] = {
        "expected one of start, step, success, failure, discard, got 'stop'": {"record": "stop"},
        r"'record': expected one of .*, got .\['start'\]": {"record": ["start"]},
        r"step: no episode is being recorded \(this connection began none\)": {"record": "step", "step": 1},
        "success: no episode is being recorded": {"record": "success", "steps": 0},
        "start: unknown key 'imagee'; expected record, task": {"record": "start", "imagee": 1},
        r"'prompt': expected text of 1 to 1000 characters, got nothing": {"record": "start", **look},
        r"'observation/image': expected uint8 \[4, 6, 3\], got uint8 \[2, 2, 3\]": {**look, **small, "prompt": "a"},
        r"'observation/image': expected uint8 \[4, 6, 3\], got nothing": {"prompt": "a"},
        "both 'observation/image' and 'image'": {**look, "prompt": "a", "image": look["observation/image"]},
        r"'observation/state': expected finite numbers \[1\], got str": {
            **look,
            "prompt": "a",
            "observation/state": "x",
        },
        "'observation/state': expected 1 to 64 numbers, got 65": {
            **look,
            "prompt": "a",
            "observation/state": [0.0] * 65,
        },
        "some not finite": {**look, "prompt": "a", "observation/state": np.float32([np.nan])},
        r"'observation/wrist_image': expected uint8 \[9, 9, 3\], got": {
            **look,
            "prompt": "a",
            "observation/wrist_image": np.zeros((9, 9, 3), np.float32),
        },
        "'layout': expected a whole number from 0": {**look, "prompt": "a", "layout": -1},
        "'by': expected text of at most 100": {**look, "prompt": "a", "by": "a" * 101},
    }
    for words, message in starts.items():
        reply = robot.ask({"record": "start"} | message)
        assert isinstance(reply, str) and re.search(words, reply), (words, reply)


def test_wrong_steps_and_ends_are_answered_in_words_and_change_nothing(robot, folder):
    look, name = robot.look(), robot.start()
    robot.step(2)
    step = {"record": "step", "step": 3, "action": np.zeros((1, 7), np.float32), **robot.look(1)}
    end = {"record": "success", "steps": 2}
    steps: dict[str, dict] = {
        f"start: {name} is still being recorded, 2 steps": {"record": "start", "prompt": "a", **look},
        "'step': 2 steps are here, so the next is number 3, got 4": step | {"step": 4},
        "'step': 2 steps are here, so the next is number 3, got 2": step | {"step": 2},
        "'step': expected a whole number": step | {"step": True},
        r"'action': expected finite numbers \[1, 7\], got float32 \[6\]": step | {"action": np.zeros(6, np.float32)},
        r"'action': expected .*, some not finite": step | {"action": np.full((1, 7), np.nan)},
        r"'observation/image': expected uint8 \[1, 4, 6, 3\], got uint8 \[4, 6, 3\]": step | look,
        r"'observation/image': expected uint8 \[0, 4, 6, 3\]": step
        | {"observation/image": np.zeros((0, *FRAME), "u1")},
        "'observation/wrist_image': the episode began with it": step | {"observation/wrist_image": None},
        "'time': the episode began without it": step | {"time": [1.0]},
        r"'observation/wrist_image': expected uint8 \[1, 2, 2, 3\], got uint8 \[1, 1, 2, 3\]": step
        | {"observation/wrist_image": np.zeros((1, 1, 2, 3), np.uint8)},
        "'person': expected true or false": step | {"person": 1},
        "step: unknown key 'reward'": step | {"reward": 1},
        "'steps': the episode had 3, and 2 are here": end | {"steps": 3},
        "'first_success': expected a frame from 0 to 2 of a success, got 3": end | {"first_success": 3},
        "of a success, got 1": {"record": "failure", "steps": 2, "first_success": 1},
    }
    for words, message in steps.items():
        reply = robot.ask(message)
        assert isinstance(reply, str) and re.search(words, reply), (words, reply)
        assert len(reply) < 400
    robot.step()
    assert robot.end("success")["state"] == "written" and len(read(folder, name).action_SA) == 3


def test_the_clock_never_goes_back(robot):
    robot.start(time=5.0)
    message = {"record": "step", "step": 1, "action": np.zeros((2, 7)), **robot.look(2)}
    for times in ([4.0, 6.0], [6.0, 5.5]):
        assert "never go back" in robot.ask(message | {"time": times})
    assert robot.say(**message, time=[5.0, 5.0])["steps"] == 2


def test_marking_twice_keeps_the_first_mark(robot, folder):
    name = robot.start()
    robot.step()
    robot.end("success")
    for outcome in ("success", "failure"):
        assert f"the last was {name}: written, outcome success" in robot.ask({"record": outcome, "steps": 1})
    assert "no episode is being recorded" in robot.ask({"record": "discard"})
    assert recordings(folder) == [name] and read(folder, name).success_S.any()


def test_an_episode_without_a_step_cannot_succeed(robot, folder):
    robot.start()
    assert "needs at least one step" in robot.ask({"record": "success", "steps": 0})
    assert robot.say(record="discard")["state"] == "discarded"
    assert recordings(folder) == []


def test_a_task_keeps_its_number(robot, served, folder):
    robot.start("lift it", task=4)
    robot.step()
    robot.end("success")
    for message in ({"prompt": "lift it", "task": 5}, {"prompt": "drop it", "task": 4}):
        reply = robot.ask({"record": "start", **message, **robot.look()})
        assert re.search(r"'task': \d does not fit the recordings that are there: 4: 'lift it'", reply)
    # Another server finds what this one wrote.
    with Served(folder) as other, Robot(other.url) as second:
        for prompt in ("lift it", "drop it"):
            second.start(prompt)
            second.step()
            second.end("failure")
    robot.start("drop it")
    robot.step()
    robot.end("success")
    assert [read(folder, name).task for name in recordings(folder)] == [4, 4, 5, 5]
    disk.merge([folder / name for name in recordings(folder)], folder.parent / "all", meta={})


def test_the_client_of_the_notebooks_records(served, folder, capsys):
    with load_client().Client(served.url) as client:
        rng = np.random.default_rng(1)
        frames, played = [rng.integers(0, 256, FRAME, np.uint8)], []
        client.start(frames[0], "lift it", state=np.zeros(WIDTH), wrist_image=frames[0][:, ::2], layout=3)
        for _ in range(2):
            for action in client.act(frames[-1], "lift it")[:5]:
                frames.append(rng.integers(0, 256, FRAME, np.uint8))
                # A view of a larger picture, as a crop is.
                client.step(frames[-1], action, state=np.ones(WIDTH), wrist_image=frames[-1][:, ::2], person=False)
                played.append(action)
        assert client.end("success") == "written"
        # One that is lost does not stop the robot.
        client.start(frames[0], "lift it")
        client.recorded = {"state": "lost", "why": "the disk is full"}
        client.step(frames[1], played[0])
        assert client.act(frames[0], "lift it").shape == (CHUNK, 7) and client.end("success") == "lost"
    (name,) = recordings(folder)
    episode = read(folder, name)
    np.testing.assert_array_equal(episode.frame_SHWC, frames)
    np.testing.assert_array_equal(episode.wrist_SHWC, np.stack(frames)[:, :, ::2])
    np.testing.assert_array_equal(episode.action_SA, played)
    assert episode.seed == 3 and episode.origin["changed"] == 0


def test_the_client_comes_back_after_the_connection_broke(served, folder, capsys):
    frame = np.zeros(FRAME, np.uint8)
    with load_client().Client(served.url) as client:
        client.start(frame, "lift it")
        client.step(frame, np.zeros(7))
        client._socket.socket.shutdown(socket.SHUT_RDWR)
        client.step(frame, np.zeros(7))
        assert "will not be recorded: the connection broke" in capsys.readouterr().out
        assert client.act(frame, "lift it").shape == (CHUNK, 7) and client.end("success") == "lost"
        client.start(frame, "lift it")
        client.step(frame, np.zeros(7))
        assert client.end("failure") == "written"
    assert len(recordings(folder)) == 1


def test_a_recording_that_cannot_be_read_is_said(robot, folder):
    (folder / "damaged").mkdir()
    (folder / "damaged" / disk.MANIFEST).write_text("{")
    assert "damaged/manifest.json is not JSON" in robot.ask({"record": "start", "prompt": "lift it", **robot.look()})
    with pytest.raises(disk.EpisodesError, match="is not JSON"):
        Recorder(RecordConfig(str(folder)), POLICY)


# The limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "why"),
    [
        ({"max_steps": 5}, "it is longer than 5 steps, the most here"),
        ({"max_bytes": 6 * 84}, "its frames are more than 0 MiB, the most here"),
    ],
)
def test_an_episode_beyond_the_limits_is_lost_and_the_robot_is_served(tmp_path, limits, why):
    with Served(tmp_path, **limits) as running, Robot(running.url) as robot:
        name = robot.start()
        states = [robot.step() for _ in range(8)]
        assert [state["state"] for state in states].count("recording") == 5
        assert states[-1] == {"state": "lost", "name": name, "why": why}
        assert "actions" in robot.ask({"prompt": "lift it", **robot.look()})
        assert robot.end("success") == {"state": "lost", "name": name, "why": why}
        wait_until(lambda: unfinished(tmp_path) == [])
        robot.start()  # and the next episode is another one
        robot.step()
        assert robot.end("success")["state"] == "written"
    assert len(recordings(tmp_path)) == 1


def test_the_robot_does_not_wait_for_a_slow_disk(tmp_path, monkeypatch):
    write, stuck = recorders._write, concurrent.futures.Future()

    def slow(file: Any, data: memoryview) -> None:
        stuck.result(60)
        write(file, data)

    monkeypatch.setattr(recorders, "_write", slow)
    with Served(tmp_path, waiting_bytes=1000) as running, Robot(running.url) as robot, Robot(running.url) as other:
        name, whole = robot.start(), other.start()
        states = [robot.step() for _ in range(12)]
        assert states[0]["state"] == "recording" and re.search("the disk is too slow", states[-1]["why"])
        assert "actions" in robot.ask({"prompt": "lift it", **robot.look()})
        stuck.set_result(None)
        wait_until(lambda: running.recorder._waiting == 0)
        other.step()
        assert robot.end("success")["state"] == "lost" and other.end("success")["state"] == "written"
    assert recordings(tmp_path) == [whole] != [name]
