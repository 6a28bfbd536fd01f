"""Serves a page in which a person drives the gripper in the true simulator and in the world model at once.

    browser                            server
    GET /                          ->  the page, one file with everything in it
    GET /healthz                   ->  200 OK
    GET /ws, a WebSocket           ->  {told: hello, ...}, a msgpack map of ``export.wire``
    a message of ``messages``      ->  its answer
    GET /world, a WebSocket        ->  the same for programs, where it is asked for: messages of ``rollouts``
    GET /truth, a WebSocket        ->  the same in the true simulator, where there is one
    anything else                  ->  a text frame that says what was expected; the connection stays open

Each connection is a session of its own, which ends with it. The networks run in one thread, one chunk after another,
while the event loop answers everybody else. Only the page itself may connect (``export.pages``). Programs, which send
no Origin, have a path of their own, and no page may take it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import functools
import socket
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from wovr_jax.core.config import Between, Count, Positive, checked
from wovr_jax.export import pages, wire
from wovr_jax.export.listen import listen, reserve, run_until_signal
from wovr_jax.export.pages import Front
from wovr_jax.play import messages, page, rollouts
from wovr_jax.play.programs import Programs
from wovr_jax.play.rollouts import Batch, Rollouts, TrueRollouts, Worlds
from wovr_jax.play.session import Session, SessionError

FULL, IDLE = 1013, 4000
"""Codes with which a connection is closed: all places are taken (as in RFC 6455), and nothing came for too long."""


@checked
@dataclasses.dataclass(frozen=True)
class PlayConfig:
    """How to serve.

    Attributes:
      host, port: the address to listen on; port 0 takes a free one.
      sessions: most players at once.
      max_bytes: bytes of the longest message; a longer one closes its connection with code 1009.
      rows: rollouts of each program that drives the learned world or the true one; 0 lets no program in.
      idle_s: seconds without a message after which a player's place is given to others.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Between(0, 65_535)] = 8100
    sessions: Count = 8
    max_bytes: Count = 64 * 2**10
    rows: Annotated[int, Between(0, 256)] = 0
    idle_s: Positive = 1800.0


class PlayServer:
    """A server of one source.

    Args:
      programs: the compiled steps of it.
      cfg: how to serve it.
      sockets: of ``listen.reserve``; by default they are bound when it serves.
    """

    def __init__(self, programs: Programs, cfg: PlayConfig, sockets: Sequence[socket.socket] = ()):
        self.programs, self.cfg, self.sockets = programs, cfg, sockets
        self._hello = wire.pack(messages.describe(programs.source, Session(programs).most_chunks))
        self._worlds: dict[str, Worlds] = {}  # by path
        if cfg.rows:
            self._worlds["/world"] = Rollouts(programs.source, cfg.rows)
            if programs.source.sim is not None:
                self._worlds["/truth"] = TrueRollouts(programs.source, cfg.rows)
        self._front = Front(page.build(), cfg.host, self._worlds)
        # One thread: a device computes one chunk at a time, and the event loop stays free.
        self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="worlds")
        self.players = 0

    def run(self, ready: Callable[[int], None]) -> None:
        """Serves until the process gets SIGINT or SIGTERM; ``ready`` is called with the port."""
        run_until_signal(lambda stop: self.serve(stop, ready))

    async def serve(self, stop: asyncio.Event, ready: Callable[[int], None]) -> None:
        """Serves until ``stop`` is set.

        Raises:
          ServerError: see ``listen.reserve``.
          OSError: when another process has begun to listen on the port meanwhile.
        """
        self.programs.warm()
        for worlds in self._worlds.values():
            rollouts.warm(worlds)
        sockets = self.sockets or reserve(self.cfg.host, self.cfg.port)
        # A page that sends faster than the worlds turn is slowed down, not buffered.
        options = {"max_size": self.cfg.max_bytes, "max_queue": 2, "process_request": self._front.admit}
        try:
            await listen(sockets, self._converse, stop, ready, **options)
        finally:
            self._thread.shutdown()

    async def _converse(self, connection: ServerConnection) -> None:
        """Plays with one client until it leaves."""
        # A page cannot read why a handshake was refused, so it is let in and told.
        if self.players >= self.cfg.sessions:
            await connection.close(FULL, f"all {self.cfg.sessions} places are taken")
            return
        self.players += 1
        path = connection.request.path.partition("?")[0] if connection.request else ""
        hello, follow = self._hello, functools.partial(messages.answer, Session(self.programs))
        if worlds := self._worlds.get(path):
            hello, follow = wire.pack(rollouts.describe(worlds)), Batch(worlds).answer
        try:
            await connection.send(hello)
            while True:
                message = await asyncio.wait_for(connection.recv(), self.cfg.idle_s)
                # A film is coded beside the worlds, and they go on for the other players.
                await connection.send(await pages.answer(message, follow, self._choose_thread, SessionError))
        except TimeoutError:
            await connection.close(IDLE, f"nothing was done for {self.cfg.idle_s:g} s")
        except ConnectionClosed:
            pass  # it left, or sent more than max_bytes
        finally:
            self.players -= 1

    def _choose_thread(self, message: Any) -> concurrent.futures.Executor | None:
        return None if messages.is_film(message) else self._thread
