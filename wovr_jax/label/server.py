"""Serves the page on which a person watches recordings and says what came of them.

    browser                            server
    GET /                          ->  the page, one file with everything in it
    GET /healthz                   ->  200 OK
    GET /ws, a WebSocket           ->  {told: list, ...}, a msgpack map of ``export.wire``
    a message of ``messages``      ->  its answer
    anything else                  ->  a text frame that says what was expected; the connection stays open

Only the page itself may connect (``export.pages``). Labels are written in one thread, one after another.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import pathlib
import socket
from collections.abc import Callable, Sequence
from typing import Annotated

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from wovr_jax.core.config import Between, Count, checked
from wovr_jax.data.records import EpisodesError
from wovr_jax.export import pages, wire
from wovr_jax.export.listen import listen, reserve, run_until_signal
from wovr_jax.export.pages import Front
from wovr_jax.label.messages import Scores, Session
from wovr_jax.label.store import LabelError, Store

FOLDER = pathlib.Path(__file__).parent


@checked
@dataclasses.dataclass(frozen=True)
class LabelConfig:
    """How to serve.

    Attributes:
      host, port: the address to listen on; port 0 takes a free one.
      max_bytes: bytes of the longest message; a longer one closes its connection with code 1009.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Between(0, 65_535)] = 8200
    max_bytes: Count = 64 * 2**10


class LabelServer:
    """A server of one folder.

    Args:
      store: its labels.
      cfg: how to serve it.
      scores: of a classifier, None without.
      sockets: of ``listen.reserve``; by default they are bound when it serves.
    """

    def __init__(
        self, store: Store, cfg: LabelConfig, scores: Scores | None = None, sockets: Sequence[socket.socket] = ()
    ):
        self.store, self.cfg, self.scores, self.sockets = store, cfg, scores, sockets
        self._front = Front(build(), cfg.host)
        self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="labels")

    def run(self, ready: Callable[[int], None]) -> None:
        """Serves until the process gets SIGINT or SIGTERM; ``ready`` is called with the port."""
        run_until_signal(lambda stop: self.serve(stop, ready))

    async def serve(self, stop: asyncio.Event, ready: Callable[[int], None]) -> None:
        """Serves until ``stop`` is set.

        Raises:
          ServerError: see ``listen.reserve``.
          OSError: when another process has begun to listen on the port meanwhile.
        """
        sockets = self.sockets or reserve(self.cfg.host, self.cfg.port)
        options = {"max_size": self.cfg.max_bytes, "max_queue": 2, "process_request": self._front.admit}
        # Browsers open sockets ahead of need and say nothing on them; Ctrl-C would wait for each of them so long.
        options["open_timeout"] = 3
        try:
            await listen(sockets, self._converse, stop, ready, **options)
        finally:
            self._thread.shutdown()

    async def _converse(self, connection: ServerConnection) -> None:
        """Answers one page until it is closed."""
        session = Session(self.store, self.scores)

        async def answer(message: bytes | str) -> bytes | str:
            return await pages.answer(message, session.answer, lambda _: self._thread, LabelError, EpisodesError)

        try:
            # The server speaks first, as the others here do.
            await connection.send(await answer(wire.pack({"do": "list"})))
            async for message in connection:
                await connection.send(await answer(message))
        except ConnectionClosed:
            pass  # it left, or sent more than max_bytes


def build() -> tuple[str, str]:
    """Returns the page, and what a browser may do with it (``export.pages``)."""
    return pages.build(FOLDER / "page.html", FOLDER / "page.css", (pages.WIRE, FOLDER / "page.js"))
