"""Listens on an address for WebSockets: what the servers of this package share."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from websockets.asyncio.server import ServerConnection, serve

# The library logs a traceback for every stranger's broken handshake; those are no faults of a server.
_QUIET = logging.getLogger(f"{__name__}.websockets")
_QUIET.setLevel(logging.CRITICAL)


class ServerError(ValueError):
    """An address that cannot be served on; the message says why."""


def run_until_signal(serve: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Runs ``serve(stop)``, which serves until ``stop`` is set: when the process gets SIGINT or SIGTERM."""

    async def until_signal() -> None:
        # Not KeyboardInterrupt: it would come in the middle of whatever the loop does.
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await serve(stop)

    asyncio.run(until_signal())


async def listen(
    sockets: Sequence[socket.socket],
    converse: Callable[[ServerConnection], Awaitable[None]],
    stop: asyncio.Event,
    ready: Callable[[int], None],
    **options: Any,
) -> None:
    """Serves on the sockets of :func:`reserve` until ``stop`` is set, and closes them.

    Args:
      sockets: bound to one port.
      converse: talks with a client until it leaves.
      stop: ends it.
      ready: called with the port once clients can connect.
      options: of ``websockets.asyncio.server.serve``.

    Raises:
      OSError: when another process has begun to listen on the port meanwhile.
    """
    # Frames of a camera hardly shrink, and deflating them takes milliseconds.
    shared = {"compression": None, "server_header": None, "logger": _QUIET}
    async with contextlib.AsyncExitStack() as open_until_stopped:
        for listener in sockets:
            # Or connections that have just ended would keep the next server from the port.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            await open_until_stopped.enter_async_context(serve(converse, sock=listener, **shared, **options))
        ready(sockets[0].getsockname()[1])
        await stop.wait()


def reserve(host: str, port: int) -> list[socket.socket]:
    """Returns a bound socket for each address of ``host``, so that no network is loaded for a port that is taken.

    Args:
      host: a name or an address of this machine.
      port: 0 takes a free one.

    Raises:
      ServerError: when the port is taken, or the host is not an address of this machine.
    """
    where, sockets = f"{host}:{port}", []
    try:
        for family, kind, number, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            if sockets and port == 0:  # the free one that the first address took
                address = (address[0], sockets[0].getsockname()[1], *address[2:])
            try:
                sockets.append(socket.socket(family, kind, number))
            except OSError:  # a machine without IPv6 may know the address
                continue
            sockets[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sockets[-1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sockets[-1].bind(address)
            # Until it listens, another server that loads meanwhile would get the port too.
            sockets[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except OSError as error:
        for each in sockets:
            each.close()
        what = "the port is in use; stop the other server, or choose another --port (0: a free one)"
        if error.errno != errno.EADDRINUSE:
            what = f"{error.strerror or error}; expected an address of this machine and a port that may be opened"
        raise ServerError(f"{where}: {what}") from error
    return sockets
