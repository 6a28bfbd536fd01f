"""The policy server answers clients, outlives everything else, and touches no file while it does."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import functools
import importlib.util
import os
import pathlib
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.sync.client import connect

from tests.export.robots import TASKS, fake_run
from wovr_jax.export import listen, program, source, wire
from wovr_jax.export.server import PolicyServer, ServerConfig

ROOT = pathlib.Path(__file__).resolve().parents[2]
CLIENT = ROOT / "notebooks" / "robot_client.py"
IMAGE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
PATIENCE = 60
"""Seconds after which a test gives up waiting."""


class Served:
    """A server in a thread of its own, on a free port."""

    def __init__(self, robot, sockets=(), **settings):
        self.server = PolicyServer(robot, ServerConfig(port=0, **settings), sockets)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self):
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        await self.server.serve(self._stop, self._at)

    def _at(self, port):
        self.port, self.url = port, f"ws://127.0.0.1:{port}"
        self._ready.set()

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(PATIENCE)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    def connect(self, key=None, **more):
        header = {"Authorization": f"Api-Key {key}"} if key else None
        return connect(self.url, compression=None, additional_headers=header, **more)

    def healthy(self):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/healthz", timeout=PATIENCE) as reply:
            return reply.status == 200 and reply.read() == b"OK\n"


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return source.from_run(fake_run(tmp_path_factory.mktemp("runs") / "mine"))


@pytest.fixture(scope="module")
def robot(policy):
    return program.make_robot(policy)


@pytest.fixture(scope="module")
def served(robot):
    with Served(robot, max_bytes=20_000) as running:
        yield running


def observation(**change):
    return {"observation/image": IMAGE, "prompt": TASKS[0]} | change


def ask(connection, message):
    """The reply: a map, or the text of a refusal."""
    connection.send(message if isinstance(message, str | bytes) else wire.pack(message))
    reply = connection.recv(timeout=PATIENCE)
    return reply if isinstance(reply, str) else wire.unpack(reply)


# Answers ------------------------------------------------------------------------------------------------------


def test_a_client_is_told_what_the_policy_takes_and_gets_its_actions(served, robot):
    want = robot.act(IMAGE[None], TASKS[:1]).action_BTA[0]
    with served.connect() as connection:
        told = wire.unpack(connection.recv(timeout=PATIENCE))
        assert told["chunk"] == 8 and told["action_dim"] == 7 and told["unnorm_key"] == "tabletop"
        assert (told["image"]["height"], told["image"]["width"], told["image"]["dtype"]) == (16, 16, "uint8")
        assert "'observation/image' (uint8 [16, 16, 3])" in told["observation"]
        first, second = (ask(connection, observation()) for _ in range(2))
    assert first["actions"].dtype == np.float32 and first["actions"].shape == (8, 7)
    np.testing.assert_array_equal(first["actions"], want)
    np.testing.assert_array_equal(second["actions"], want)
    assert first["server_timing"].keys() == {"infer_ms"} and first["server_timing"]["infer_ms"] > 0
    assert second["server_timing"]["prev_total_ms"] >= first["server_timing"]["infer_ms"]


def test_instructions_and_frames_reach_the_policy(served):
    with served.connect() as connection:
        connection.recv(timeout=PATIENCE)
        replies = [
            ask(connection, observation(**change))["actions"]
            for change in ({}, {"prompt": TASKS[1]}, {"observation/image": 255 - IMAGE})
        ]
    assert (replies[0] != replies[1]).any() and (replies[0] != replies[2]).any()


def test_several_clients_at_once(served):
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(served.connect()) for _ in range(4)]
        for connection in connections:
            connection.recv(timeout=PATIENCE)
            connection.send(wire.pack(observation()))
        replies = [wire.unpack(connection.recv(timeout=PATIENCE))["actions"] for connection in connections]
    assert all((reply == replies[0]).all() for reply in replies)


def test_sampled_actions_follow_the_seed(robot):
    with Served(robot, temperature=1.6, seed=5) as running, running.connect() as connection:
        assert wire.unpack(connection.recv(timeout=PATIENCE))["temperature"] == 1.6
        a, b = (ask(connection, observation())["actions"] for _ in range(2))
        c, d = (ask(connection, observation(seed=5))["actions"] for _ in range(2))
    assert (a != b).any()  # each answer is drawn anew
    np.testing.assert_array_equal(c, d)
    np.testing.assert_array_equal(a, c)  # the first seed is the server's own


def load_client():
    spec = importlib.util.spec_from_file_location("robot_client", CLIENT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_client_of_the_notebooks(served, robot):
    text = CLIENT.read_text()
    assert len(text.splitlines()) < 160
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imported - set(sys.stdlib_module_names) == {"numpy", "websockets", "msgpack"}
    with load_client().Client(served.url) as client:
        got = client.act(IMAGE, TASKS[0])
        np.testing.assert_array_equal(got, robot.act(IMAGE[None], TASKS[:1]).action_BTA[0])
        assert client.timing["infer_ms"] > 0 and client.metadata["chunk"] == 8
        with pytest.raises(RuntimeError, match=r"the policy server says: 'observation/image': expected uint8"):
            client.act(IMAGE[:4], TASKS[0])
        np.testing.assert_array_equal(client.act(IMAGE, TASKS[0]), got)


OPENPI = """
import sys
import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy
given = np.load(sys.argv[2])
client = WebsocketClientPolicy("127.0.0.1", int(sys.argv[1]), api_key="opensesame")
assert client.get_server_metadata()["chunk"] == 8, client.get_server_metadata()
observation = {"observation/image": given["image"], "observation/wrist_image": given["image"],
               "observation/state": np.zeros(8), "prompt": str(given["prompt"])}
reply = client.infer(observation)
assert reply["server_timing"]["infer_ms"] > 0
try:
    client.infer({"prompt": "nothing to see"})
except RuntimeError as error:
    assert "no 'observation/image'" in str(error), error
np.savez(sys.argv[3], first=reply["actions"], second=client.infer(observation)["actions"])
"""


@pytest.fixture
def openpi(tmp_path):
    """A Python that has openpi's client, which wants an older numpy: ``OPENPI_PYTHON``, or an environment made here."""
    if "OPENPI_PYTHON" in os.environ:
        return os.environ["OPENPI_PYTHON"]
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True, timeout=PATIENCE)
    # The client imports typing_extensions and does not ask for it.
    wanted = ["openpi-client==0.1.2", "typing_extensions"]
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return python if done.returncode == 0 else pytest.skip(f"openpi-client cannot be installed here: {done.stderr}")


@pytest.mark.slow
def test_the_published_client_of_openpi(robot, openpi, tmp_path):
    np.savez(tmp_path / "given.npz", image=IMAGE, prompt=TASKS[0])
    with Served(robot, api_key="opensesame") as running:
        files = [tmp_path / "given.npz", tmp_path / "got.npz"]
        command = [openpi, "-c", OPENPI, str(running.port), *map(str, files)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    got = np.load(tmp_path / "got.npz")
    want = robot.act(IMAGE[None], TASKS[:1]).action_BTA[0]
    for name in ("first", "second"):
        assert got[name].dtype == np.float32
        np.testing.assert_array_equal(got[name], want)


# Who may come in ------------------------------------------------------------------------------------------------


def test_the_api_key(robot):
    with Served(robot, api_key="opensesame") as running:
        for key in (None, "sesame", "opensesame1"):
            with pytest.raises(InvalidStatus, match="401"), running.connect(key):
                pass
        with running.connect("opensesame") as connection:
            connection.recv(timeout=PATIENCE)
            assert "actions" in ask(connection, observation())
        assert running.healthy()


def test_a_web_page_is_refused(served):
    with pytest.raises(InvalidStatus, match="403"), served.connect(origin="http://somewhere.example"):
        pass


def test_more_clients_than_places(robot):
    with Served(robot, connections=1) as running:
        with running.connect() as connection:
            connection.recv(timeout=PATIENCE)
            with pytest.raises(InvalidStatus, match="503"), running.connect():
                pass
            assert "actions" in ask(connection, observation()) and running.healthy()
        for _ in range(100):  # the place is free once the server has seen the goodbye
            try:
                with running.connect():
                    break
            except InvalidStatus:
                time.sleep(0.05)
        else:
            pytest.fail("the place was not given back")


def test_health_and_other_paths(served):
    assert served.healthy()
    with pytest.raises(urllib.error.HTTPError, match="426"):
        urllib.request.urlopen(f"http://127.0.0.1:{served.port}/", timeout=PATIENCE)


def test_it_listens_on_this_machine_only_unless_asked():
    assert ServerConfig().host == "127.0.0.1"


# What it outlives -------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("pwned",)


def hostile(rng):
    """One message that no policy can act on, of a kind drawn at random."""
    right = wire.pack(observation())

    def packed_image(**change):
        image = {"__ndarray__": True, "data": IMAGE.tobytes(), "dtype": "|u1", "shape": [16, 16, 3]} | change
        image = {key.encode(): value for key, value in image.items()}
        return msgpack.packb(observation(**{"observation/image": image}))

    kinds = (
        lambda: right[: rng.integers(1, len(right))],
        lambda: right + rng.bytes(rng.integers(1, 50)),
        lambda: rng.bytes(rng.integers(0, 300)),
        lambda: "text " * rng.integers(1, 100),
        lambda: pickle.dumps(Bomb()),
        lambda: msgpack.packb({"observation/image": pickle.dumps(Bomb()), "prompt": TASKS[0]}),
        lambda: b"\x91" * rng.integers(100, 5000) + b"\xc0",
        lambda: b"\x81\xa1a" * rng.integers(100, 5000) + b"\xc0",
        lambda: rng.choice([b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9"]) + b"\xff\xff\xff\xff" + rng.bytes(8),
        lambda: wire.pack(observation(**{"observation/image": IMAGE.astype(rng.choice(["f4", "i8", "?", ">u2"]))})),
        lambda: wire.pack(observation(**{"observation/image": IMAGE[: rng.integers(0, 16)]})),
        lambda: packed_image(dtype=str(rng.choice(["O", "|O", "|V1", "<U4", "u1,u1"]))),
        lambda: packed_image(shape=[int(rng.integers(1, 2**62))] * rng.integers(1, 9)),
        lambda: wire.pack(observation(prompt=rng.choice([None, 7, b"\xff\xfe", {"a": []}, "x" * 5000], 1)[0])),
        lambda: wire.pack(observation(prompt="juggle the chainsaws")),
        lambda: wire.pack(observation(seed=rng.choice([-1, 2**40, 0.5]).item())),
        lambda: wire.pack({f"key{rng.integers(9)}": IMAGE, "prompt": TASKS[0]}),
        lambda: wire.pack({}),
        lambda: msgpack.packb([[1, 2], [TASKS[0]]]),
    )
    return kinds[rng.integers(len(kinds))]()


WATCHED = re.compile(r"open|os\.(?!putenv)|shutil|subprocess|pickle|import|ctypes|glob|tempfile|exec|compile|marshal")
EVENTS, WATCHING = [], threading.Event()
sys.addaudithook(
    lambda event, details: (
        EVENTS.append((event, str(details)[:200])) if WATCHING.is_set() and WATCHED.match(event) else None
    )
)


@pytest.fixture
def watched():
    """What this process did to files, and with code, while the test ran."""
    EVENTS.clear()
    WATCHING.set()
    yield EVENTS
    WATCHING.clear()


def test_the_watch_sees(watched, tmp_path):
    (tmp_path / "file").write_text("")
    pickle.loads(pickle.dumps(np.float32))
    assert {"open", "pickle.find_class"} <= {event for event, _ in watched}


def test_a_thousand_hostile_messages_and_no_file(served, robot, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(3)
    with served.connect() as connection:  # what is imported only when first needed, is
        connection.recv(timeout=PATIENCE)
        want = ask(connection, observation())["actions"]
        for _ in range(100):
            ask(connection, hostile(rng))
    watched = request.getfixturevalue("watched")
    refusals = set()
    with served.connect() as connection:
        connection.recv(timeout=PATIENCE)
        for i in range(1000):
            reply = ask(connection, hostile(rng))
            assert isinstance(reply, str) and 0 < len(reply) < 1000 and "Traceback" not in reply, reply
            refusals.add(reply[:12])
            if i % 100 == 0:
                np.testing.assert_array_equal(ask(connection, observation())["actions"], want)
        np.testing.assert_array_equal(ask(connection, observation())["actions"], want)
    WATCHING.clear()
    assert watched == []
    assert len(refusals) > 8  # they were refused for different reasons
    assert not list(tmp_path.iterdir()) and served.healthy()


def test_messages_too_long_and_connections_that_break(served):
    for _ in range(3):
        with served.connect() as connection:
            connection.recv(timeout=PATIENCE)
            with pytest.raises(ConnectionClosedError, match="1009"):
                ask(connection, bytes(20_001))
    for data in (b"\x16\x03\x01 not http at all\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"", b"\x00" * 4000):
        with socket.create_connection(("127.0.0.1", served.port), timeout=PATIENCE) as raw:
            raw.sendall(data)
    with served.connect() as left:
        left.recv(timeout=PATIENCE)
        left.send(wire.pack(observation()))
        left.socket.shutdown(socket.SHUT_RDWR)  # gone before the answer
    with served.connect() as connection:
        connection.recv(timeout=PATIENCE)
        assert "actions" in ask(connection, observation())


def test_a_failure_of_the_policy_itself_is_told_and_logged(robot, monkeypatch, caplog):
    with Served(robot) as running, running.connect() as connection:
        connection.recv(timeout=PATIENCE)
        with monkeypatch.context() as broken:
            broken.setattr(robot, "act", lambda *_, **__: 1 / 0)
            assert ask(connection, observation()) == (
                "the policy failed on this observation; the server's log says how"
            )
        assert "ZeroDivisionError" in caplog.text
        assert "actions" in ask(connection, observation())


# Where a server listens, and who comes back ---------------------------------------------------------------------------


@pytest.fixture
def taken():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        yield held.getsockname()[1]


def test_a_port_that_is_taken_is_said_before_the_policy_is_opened(opened, tmp_path, taken):
    # The run folder is not there: whoever opened it first would say so.
    status, out, _ = opened("serve.py", tmp_path / "run", "--port", taken)
    assert f"127.0.0.1:{taken}: the port is in use" in status and "another --port" in status and not out


def test_two_servers_that_load_at_once_do_not_get_one_port():
    first = listen.reserve("127.0.0.1", 0)
    with pytest.raises(listen.ServerError, match="is in use"):
        listen.reserve("127.0.0.1", first[0].getsockname()[1])
    first[0].close()


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7"])
def test_a_host_that_is_not_this_machine_is_said_before_the_policy_is_opened(opened, tmp_path, host):
    status, _, _ = opened("serve.py", tmp_path / "run", "--host", host, "--port", 0)
    assert f"{host}:0: " in status and "expected an address of this machine" in status


def test_every_address_of_a_host_is_served_on_one_port(robot):
    with Served(robot, host="localhost") as served:
        for *_, address in socket.getaddrinfo("localhost", served.port, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError) if ":" in address[0] else contextlib.nullcontext():
                socket.create_connection(address[:2], timeout=PATIENCE).close()


PAUSED = f"""
import sys; sys.path.insert(0, {str(CLIENT.parent)!r})
import numpy as np; from robot_client import Client
places = set()
with Client(sys.argv[1]) as client:
    for turn in range(2):
        client.act(np.zeros((16, 16, 3), np.uint8), {TASKS[0]!r})
        places.add(client._socket.local_address)
        print(turn, flush=True)
        sys.stdin.readline()
    print(len(places))
"""


def test_a_client_that_stands_still_is_answered_on_the_same_connection(robot, monkeypatch):
    # As if the pings of a minute were missed; the server says itself how long it waits for an answer.
    hasty = functools.partial(listen.serve, ping_interval=0.1, ping_timeout=0.3)
    monkeypatch.setattr(listen, "serve", hasty)
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with (
        Served(robot) as served,
        subprocess.Popen([sys.executable, "-c", PAUSED, served.url], text=True, **pipes) as client,
    ):
        assert client.stdout.readline() == "0\n"
        client.send_signal(signal.SIGSTOP)
        time.sleep(2)
        client.send_signal(signal.SIGCONT)
        said, errors = client.communicate("\n\n", timeout=PATIENCE)
        assert said.split() == ["1", "1"], errors


def test_a_client_comes_back_to_a_server_that_began_anew(robot):
    module = load_client()
    with contextlib.ExitStack() as until_it_ends:
        with Served(robot) as before:
            client = until_it_ends.enter_context(module.Client(before.url))
            got = client.act(IMAGE, TASKS[0])
        with Served(robot, sockets=listen.reserve("127.0.0.1", before.port)):
            np.testing.assert_array_equal(client.act(IMAGE, TASKS[0]), got)
