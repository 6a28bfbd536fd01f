"""The page and its socket: who may come in, what is answered, and that nothing stays when a player leaves."""

from __future__ import annotations

import asyncio
import gc
import http.client
import pickle
import re
import threading
import time
import weakref

import jax
import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.play.small import EPISODES, KEYFRAMES, THRESHOLD
from wovr_jax.export import wire
from wovr_jax.play import server as servers
from wovr_jax.play.programs import Programs
from wovr_jax.play.server import PlayConfig, PlayServer

PATIENCE = 120
PUSH = np.tile(np.asarray([-0.75, 0, 0, 0, 0, 0, -1], np.float32), (8, 1))


class Served:
    """A server in a thread of its own, on a free port."""

    def __init__(self, programs: Programs, **settings: object):
        self.server = PlayServer(programs, PlayConfig(port=0, **settings))  # pyright: ignore
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        await self.server.serve(self._stop, self._at)

    def _at(self, port: int) -> None:
        self.port = port
        self._ready.set()

    def __enter__(self) -> Served:
        self._thread.start()
        assert self._ready.wait(PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    def get(self, path: str, host: str | None = None) -> tuple[int, dict[str, str], str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request("GET", path, headers={"Host": host or f"127.0.0.1:{self.port}"})
        reply = connection.getresponse()
        return reply.status, dict(reply.getheaders()), reply.read().decode()

    def connect(self, origin: str | None = "", **more: object) -> ClientConnection:
        origin = f"http://127.0.0.1:{self.port}" if origin == "" else origin
        return connect(f"ws://127.0.0.1:{self.port}/ws", compression=None, origin=origin, **more)  # pyright: ignore


@pytest.fixture(scope="module")
def served(programs: Programs):
    with Served(programs) as running:
        yield running


def listen(connection: ClientConnection) -> dict:
    reply = connection.recv(timeout=PATIENCE)
    assert isinstance(reply, bytes), reply
    return wire.unpack(reply)


def ask(connection: ClientConnection, **message: object) -> dict:
    connection.send(wire.pack(message))
    return listen(connection)


def refused(connection: ClientConnection, message: bytes | str | dict) -> str:
    connection.send(wire.pack(message) if isinstance(message, dict) else message)
    reply = connection.recv(timeout=PATIENCE)
    assert isinstance(reply, str), wire.unpack(reply)
    assert 0 < len(reply) < 400 and "Traceback" not in reply
    return reply


# The page ------------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_and_loads_nothing(served: Served) -> None:
    status, headers, text = served.get("/")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert not re.findall(r"""(?:src|href)=["'](?!data:)[^"']""", text) and "@import" not in text and "url(" not in text
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and f"connect-src ws://127.0.0.1:{served.port} " in policy
    assert "unsafe" not in policy
    assert served.get("/?from=elsewhere")[0] == 200 and served.get("/healthz")[2] == "OK\n"
    assert served.get("/etc/passwd")[0] == served.get("/page.js")[0] == 404
    assert served.get("/ws")[0] == 403  # no page asks this way


def test_only_the_page_itself_may_connect(served: Served) -> None:
    for origin in (None, "http://somewhere.example", f"http://localhost:{served.port}", "null", "file://"):
        with pytest.raises(InvalidStatus, match="403"), served.connect(origin):
            pass
    with served.connect() as connection:
        assert listen(connection)["told"] == "hello"


def test_a_name_that_was_made_to_point_here_is_refused(served: Served) -> None:
    for host in ("attacker.example", f"attacker.example:{served.port}", "", "[", "localhost.attacker.example"):
        assert served.get("/", host or " ")[0] == 403, host
    # Through a tunnel the port is another one.
    for host in ("localhost:9999", "127.0.0.1", "[::1]:8100", "192.168.0.7:8100"):
        assert served.get("/", host)[0] == 200, host


# Playing -------------------------------------------------------------------------------------------------------


def test_an_episode_over_the_wire(served: Served) -> None:
    with served.connect() as connection:
        hello = listen(connection)
        assert hello["threshold"] == THRESHOLD and hello["frame"] == [16, 16, 3] and hello["chunk"] == 8
        assert (hello["policy"], hello["world"], hello["simulator"]) == ("grpo-2", "world-1", True)
        page = ask(connection, do="starts", low=4, count=5)
        assert page["row"].tolist() == [4, 5, 6, 7, 8] and page["keyframe"] == [False, False, True, True, True]
        assert page["frame"].shape == (5, 16, 16, 3) and page["frame"].dtype == np.uint8
        begun = ask(connection, do="begin", row=6, noise=1)
        np.testing.assert_array_equal(begun["imagined"], page["frame"][2])
        assert begun["step"] == page["step"][2] and begun["instruction"] == page["instruction"][2]
        chunk = ask(connection, do="step", action=PUSH)
        assert chunk["true"].shape == chunk["imagined"].shape == (8, 16, 16, 3)
        assert chunk["prob"].shape == chunk["apart"].shape == chunk["truth"].shape == (8,)
        np.testing.assert_array_equal(chunk["action"], PUSH)
        chosen = ask(connection, do="act", sees="true", temperature=0.5)
        assert chosen["n"] == 1 and chosen["action"].shape == (8, 7) and chosen["ms"] > 0
        again = ask(connection, do="again", noise=2)
        np.testing.assert_array_equal(again["action"], [PUSH, chosen["action"]])
        ask(connection, do="step", action=PUSH)
        assert ask(connection, do="film")["mp4"][4:8] == b"ftyp"


def test_players_do_not_meet(served: Served) -> None:
    with served.connect() as one, served.connect() as two:
        for player in (one, two):
            listen(player)
            ask(player, do="begin", row=0, noise=1)
        ask(two, do="step", action=-PUSH * np.float32([1, 1, 1, 1, 1, 1, -1]))
        first, other = ask(one, do="step", action=PUSH), ask(two, do="step", action=PUSH)
    assert (first["n"], other["n"]) == (0, 1)
    with served.connect() as alone:
        listen(alone)
        ask(alone, do="begin", row=0, noise=1)
        np.testing.assert_array_equal(ask(alone, do="step", action=PUSH)["imagined"], first["imagined"])


def test_wrong_messages_are_answered_in_words(served: Served) -> None:
    wrong = {
        "text": "expected a binary message",
        b"\xc1": "expected one whole msgpack map",
        pickle.dumps({"do": "film"}): "expected one whole msgpack map",
        msgpack.packb([1, 2]): "expected a map with 'do', got list",
        msgpack.packb({"do": ["step"]}): r"'do': expected one of starts, begin, .*, got \['step'\]",
    }
    fields = {
        "'action': expected float32 \\[8, 7\\], got nothing": {"do": "step"},
        "'action': expected float32 \\[8, 7\\], got float64 \\[8, 7\\]": {"do": "step", "action": PUSH.astype(float)},
        "'action': expected float32 \\[8, 7\\], got float32 \\[7\\]": {"do": "step", "action": PUSH[0]},
        "finite numbers from -1 to 1": {"do": "step", "action": PUSH * np.float32("nan")},
        "numbers from -1 to 1": {"do": "step", "action": PUSH * 2},
        "'sees': expected 'imagined' or 'true', got 'both'": {"do": "act", "sees": "both"},
        "'temperature': expected a number from 0 to 5, got 9": {"do": "act", "temperature": 9},
        "'temperature': .*, got True": {"do": "act", "temperature": True},
        "'noise': expected a whole number from 0 to 2147483647, got -1": {"do": "begin", "row": 0, "noise": -1},
        "'row': expected a whole number": {"do": "begin", "row": 0.5},
        f"'row': expected 0 to {EPISODES + KEYFRAMES - 1}": {"do": "begin", "row": 1000},
        "begin: expected the fields row, layout, noise, got 'seed' too": {"do": "begin", "seed": 1},
        "'low': expected a whole number from 0 to 17, got 18": {"do": "starts", "low": 18},
        "'count': expected a whole number from 0 to 24": {"do": "starts", "low": 0, "count": 10**9},
        "nothing to film yet": {"do": "film"},
    }
    with served.connect() as connection:
        listen(connection)
        ask(connection, do="begin", row=0, noise=1)
        for message, words in wrong.items():
            assert re.search(words, refused(connection, message))
        for words, message in fields.items():
            assert re.search(words, refused(connection, message)), (words, message)
        assert ask(connection, do="step", action=PUSH)["n"] == 0  # as if nothing had been


def test_messages_that_are_too_long_end_their_connection_only(served: Served) -> None:
    with served.connect() as connection:
        listen(connection)
        connection.send(bytes(64 * 2**10 + 1))
        with pytest.raises(ConnectionClosed, match="1009"):
            connection.recv(timeout=PATIENCE)
    with served.connect() as connection:
        assert listen(connection)["told"] == "hello"


def test_a_failure_of_a_program_is_told_and_logged(programs: Programs, monkeypatch, caplog) -> None:
    with Served(programs) as running, running.connect() as connection:
        listen(connection)
        ask(connection, do="begin", row=0, noise=1)
        with monkeypatch.context() as broken:
            broken.setattr(programs, "imagine", lambda *_: 1 / 0)
            assert "the server's log says why" in refused(connection, {"do": "step", "action": PUSH})
        assert "ZeroDivisionError" in caplog.text
        assert ask(connection, do="step", action=PUSH)["n"] == 0


# Places --------------------------------------------------------------------------------------------------------


def test_more_players_than_places(programs: Programs) -> None:
    with Served(programs, sessions=1) as running:
        with running.connect() as connection:
            listen(connection)
            with running.connect() as late, pytest.raises(ConnectionClosed, match="1013.*all 1 places are taken"):
                late.recv(timeout=PATIENCE)
            assert ask(connection, do="begin", row=0, noise=1)["told"] == "begun"
        wait_until(lambda: running.server.players == 0)
        with running.connect() as connection:
            assert listen(connection)["told"] == "hello"


def test_who_is_away_for_long_gives_the_place_back(programs: Programs) -> None:
    with Served(programs, idle_s=0.2) as running, running.connect() as connection:
        listen(connection)
        with pytest.raises(ConnectionClosed, match="4000.*nothing was done for 0.2 s"):
            connection.recv(timeout=PATIENCE)
        wait_until(lambda: running.server.players == 0)


def test_a_hundred_players_one_after_the_other_leave_nothing(programs: Programs, monkeypatch) -> None:
    born: list[weakref.ref] = []

    class Counted(servers.Session):
        def __init__(self, programs: Programs):
            super().__init__(programs)
            born.append(weakref.ref(self))

    monkeypatch.setattr(servers, "Session", Counted)
    with Served(programs, sessions=2) as running:
        held = []
        for i in range(100):
            with running.connect() as connection:
                listen(connection)
                ask(connection, do="begin", row=i % EPISODES, noise=i)
                ask(connection, do="step", action=PUSH)
                if i % 3 == 0:  # gone in the middle of an answer, without a goodbye
                    connection.send(wire.pack({"do": "step", "action": PUSH}))
                    connection.socket.close()
            wait_until(lambda: running.server.players == 0)
            if i in (9, 99):
                gc.collect()
                held.append(len(jax.live_arrays()))
        assert held[0] == held[1], "arrays on the device grow with the number of players"
        wait_until(lambda: gc.collect() >= 0 and not [ref for ref in born if ref() is not None])
    assert len(born) == 101  # the server itself asks one how long an episode may be


def wait_until(holds) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)
