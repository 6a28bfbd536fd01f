"""One page and the socket behind it: what the servers of pages share.

A page is one file with everything in it. Only that page itself may open the socket: the Origin header has to name the
very host that was asked, and that host has to be an address or a name of this machine, so that no page from elsewhere
can come in, not even one whose name was made to point here.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import hashlib
import http
import ipaddress
import logging
import pathlib
import socket
import string
import urllib.parse
from collections.abc import Callable, Collection, Sequence
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.http11 import Request, Response

from wovr_jax.export import wire
from wovr_jax.export.wire import WireError

LOG = logging.getLogger(__name__)

WIRE = pathlib.Path(__file__).parent / "wire.js"
"""The messages of ``export.wire`` for the script of a page."""


def build(html: pathlib.Path, style: pathlib.Path, scripts: Sequence[pathlib.Path]) -> tuple[str, str]:
    """Returns a page, and its Content-Security-Policy without the addresses that it may connect to.

    Args:
      html: the page, with ``$style`` and ``$script`` where these go.
      style, scripts: the files; one after another the scripts are one.
    """
    script = "\n".join(path.read_text(encoding="utf-8") for path in scripts)
    parts = {"style": style.read_text(encoding="utf-8"), "script": script}
    whole = string.Template(html.read_text(encoding="utf-8")).substitute(parts)
    allowed = " ".join(f"{kind}-src '{_digest(text)}'" + ";" for kind, text in parts.items())
    # Nothing is loaded from anywhere, and no script but this one runs, whatever instructions and names say.
    return whole, f"default-src 'none'; {allowed} img-src data: blob:; base-uri 'none'; frame-ancestors 'none'"


class Front:
    """What a server of one page answers before a socket opens, and who may open one.

    Args:
      page: the page and its policy, of :func:`build`.
      host: on which the server listens.
      programs: paths of sockets that programs may open, which send no Origin, and no page may.
    """

    def __init__(self, page: tuple[str, str], host: str, programs: Collection[str] = ()):
        (self._page, self._policy), self._programs = page, programs
        self._names = {host.lower(), "localhost", socket.gethostname().lower()}

    def admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answers with the page, and refuses strangers; None goes on to the handshake."""
        host = _only(request.headers.get_all("Host"))
        if not self._is_ours(host):
            words = "Expected an address or a name of this machine in the header Host.\n"
            return connection.respond(http.HTTPStatus.FORBIDDEN, words)
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if path == "/":
            return self._show_page(connection, host)
        if path in self._programs:
            # A page cannot leave the header out.
            if request.headers.get_all("Origin"):
                return connection.respond(http.HTTPStatus.FORBIDDEN, "This path is for programs, not for pages.\n")
            return None
        if path != "/ws":
            return connection.respond(http.HTTPStatus.NOT_FOUND, "There is one page here: /\n")
        origin = urllib.parse.urlsplit(_only(request.headers.get_all("Origin")))
        if origin.scheme not in ("http", "https") or origin.netloc.lower() != host.lower():
            words = "Expected the page of this very server: a header Origin that names the host of the request.\n"
            return connection.respond(http.HTTPStatus.FORBIDDEN, words)
        return None

    def _is_ours(self, host: str) -> bool:
        """Whether the name in a Host header is this machine's: an address, or a name that nobody else can own."""
        try:
            name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        except ValueError:  # brackets without an address in them
            return False
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _show_page(self, connection: ServerConnection, host: str) -> Response:
        response = connection.respond(http.HTTPStatus.OK, self._page)
        del response.headers["Content-Type"]
        response.headers["Content-Type"] = "text/html; charset=utf-8"
        response.headers["Content-Security-Policy"] = f"{self._policy}; connect-src ws://{host} wss://{host}"
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cache-Control"] = "no-store"
        return response


async def answer(
    data: bytes | str,
    follow: Callable[[Any], dict[str, Any]],
    thread: Callable[[Any], concurrent.futures.Executor | None],
    *refusals: type[Exception],
) -> bytes | str:
    """Returns the reply to a message: a map as bytes, or text that says what was wrong.

    Args:
      data: what came.
      follow: from an unpacked message to its reply.
      thread: where a message is followed; None is one of the loop's own threads.
      refusals: what ``follow`` raises for a message that is not as expected.
    """

    def work(message: Any) -> bytes:
        return wire.pack(follow(message))

    try:
        if isinstance(data, str):
            raise WireError("expected a binary message, one msgpack map; got text")
        message = wire.unpack(data)
        return await asyncio.get_running_loop().run_in_executor(thread(message), work, message)
    except (WireError, *refusals) as error:
        return str(error)
    except Exception:
        # Whatever one request meets, the next one is answered.
        LOG.exception("a request could not be answered")
        return "this request could not be answered; the server's log says why"


def _only(values: Sequence[str]) -> str:
    """Returns the one value of a header; empty where there is none, or several that a reader could choose from."""
    return values[0] if len(values) == 1 else ""


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
