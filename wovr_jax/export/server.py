"""Serves a policy over a WebSocket, in openpi's protocol (openpi: src/openpi/serving/websocket_policy_server.py).

    client                                  server
    GET /healthz                        ->  200 OK
    connect                             ->  metadata, a msgpack map
    observation, a msgpack map          ->  {actions (T, A) float32, server_timing: {infer_ms, prev_total_ms}}
    {record: ...}, see ``recording``    ->  {record: {state, ...}}, where the server records
    anything else                       ->  a text frame that says what was expected; the connection stays open

Messages are ``export.wire``, observations ``export.observation``. The policy acts in one thread of its own, one
observation after another, while the event loop answers pings and health checks, and a third thread writes what is
recorded. Requests from web pages, which carry an Origin header, are refused: a page in a browser on this machine could
otherwise drive the robot.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import hmac
import http
import itertools
import logging
import socket
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from wovr_jax.core.config import Between, Count, NonNegative, Seed, checked
from wovr_jax.data.senses import read_senses
from wovr_jax.export import observation, wire
from wovr_jax.export.listen import listen, reserve, run_until_signal
from wovr_jax.export.observation import ObservationError
from wovr_jax.export.record_messages import KINDS
from wovr_jax.export.recorder import Recorder, RecordError
from wovr_jax.export.recording import Recording
from wovr_jax.export.robot import BundleError, Robot
from wovr_jax.export.wire import WireError
from wovr_jax.types import ACTION_DIM

LOG = logging.getLogger(__name__)


@checked
@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """How to serve.

    Attributes:
      host, port: the address to listen on; port 0 takes a free one.
      api_key: the key that clients send as ``Authorization: Api-Key <key>``; None for no key.
      temperature: temperature of the sampling; 0 takes the likeliest actions.
      seed: seed of the first sampled answer; each later one takes the next.
      max_bytes: bytes of the longest message; a longer one closes its connection with code 1009.
      connections: most clients at once.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Between(0, 65_535)] = 8000
    api_key: str | None = None
    temperature: NonNegative = 0.0
    seed: Seed = 0
    max_bytes: Count = 8 * 2**20
    connections: Count = 16


class PolicyServer:
    """A server of one policy.

    Args:
      robot: the policy.
      cfg: how to serve it.
      sockets: of ``listen.reserve``; by default they are bound when it serves.
      recorder: writes what clients record; it is closed when the serving ends. None records nothing.

    Raises:
      BundleError: for a recorder and a policy whose actions do not fit into episodes.
    """

    def __init__(
        self,
        robot: Robot,
        cfg: ServerConfig,
        sockets: Sequence[socket.socket] = (),
        recorder: Recorder | None = None,
    ):
        if recorder and robot.chunk_shape[1] != ACTION_DIM:
            raise BundleError(f"episodes have {ACTION_DIM} numbers an action, this policy's {robot.chunk_shape[1]}.")
        self.robot, self.cfg, self.sockets, self.recorder = robot, cfg, sockets, recorder
        self._metadata = wire.pack(metadata(robot, cfg.temperature) | {"record": list(KINDS) if recorder else None})
        self._senses, self._seeds = read_senses(robot.recipe), itertools.count(cfg.seed)
        # One thread: the accelerator serves one observation at a time, and the event loop stays free.
        self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="policy")
        self._clients = 0

    def run(self, ready: Callable[[int], None]) -> None:
        """Serves until the process gets SIGINT or SIGTERM.

        Args:
          ready: called with the port once clients can connect.
        """
        run_until_signal(lambda stop: self.serve(stop, ready))

    async def serve(self, stop: asyncio.Event, ready: Callable[[int], None]) -> None:
        """Serves until ``stop`` is set.

        Raises:
          ServerError: see ``listen.reserve``.
          OSError: when another process has begun to listen on the port meanwhile.
        """
        # Compiled before the first client comes, whose robot would wait for it.
        self.robot.warm()
        sockets = self.sockets or reserve(self.cfg.host, self.cfg.port)
        options = {
            # None stands for a request without an Origin header, as programs send it.
            "origins": [None],
            "max_size": self.cfg.max_bytes,
            "max_queue": 2,  # a client that sends faster than the policy acts is slowed down, not buffered
            "process_request": self._admit,
            # A robot that stands still (a debugger, a simulator that starts) comes back minutes later. Pings go on:
            # where no machine is any more that receives them, the system ends the connection.
            "ping_timeout": None,
        }
        try:
            await listen(sockets, self._converse, stop, ready, **options)
        finally:
            self._thread.shutdown()
            if self.recorder:
                self.recorder.close()

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answers health checks and refuses strangers and too many clients; None goes on to the handshake."""
        # Before the key: whatever watches the server need not know it.
        if request.path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        keys = request.headers.get_all("Authorization")
        # compare_digest takes as long for a nearly right key as for a wrong one, so time tells a stranger nothing.
        if self.cfg.api_key is not None and not (
            len(keys) == 1 and hmac.compare_digest(keys[0].encode(), f"Api-Key {self.cfg.api_key}".encode())
        ):
            return connection.respond(
                http.HTTPStatus.UNAUTHORIZED, "Expected the header Authorization: Api-Key <key>.\n"
            )
        if self._clients >= self.cfg.connections:
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "Too many clients.\n")
        return None

    async def _converse(self, connection: ServerConnection) -> None:
        """Answers one client's messages until it leaves."""
        self._clients += 1
        previous, recording = None, Recording(self.recorder, self.robot.camera_shape) if self.recorder else None
        try:
            await connection.send(self._metadata)
            async for message in connection:
                began = time.perf_counter()
                await connection.send(await self._answer(message, recording, previous))
                previous = 1000.0 * (time.perf_counter() - began)
        except ConnectionClosed:
            pass  # it left without a goodbye, or sent more than max_bytes
        finally:
            self._clients -= 1
            if recording:
                recording.leave()

    async def _answer(self, data: bytes | str, recording: Recording | None, previous: float | None) -> bytes | str:
        """Returns the reply to a message: a map as bytes, or text that says what was wrong."""
        try:
            if isinstance(data, str):
                raise WireError("expected a binary message, one msgpack map; got text")
            message = wire.unpack(data)
            if isinstance(message, dict) and "record" in message:
                if recording is None:
                    raise RecordError("this server records nothing; start it with --record FOLDER")
                return wire.pack(await recording.follow(message))
            # In the thread of the policy, so that pings are answered while it acts.
            reply = await asyncio.get_running_loop().run_in_executor(self._thread, self._act, message, previous)
            if recording:
                recording.propose(reply["actions"])
            return wire.pack(reply)
        except (WireError, ObservationError, BundleError, RecordError) as error:
            return str(error)
        except Exception:
            # Whatever one request meets, the next one is answered.
            LOG.exception("the policy failed on an observation")
            return "the policy failed on this observation; the server's log says how"

    def _act(self, message: Any, previous: float | None) -> dict[str, Any]:
        """Returns the reply to an observation."""
        observed = observation.read(message, self.robot.camera_shape, self._senses)
        began = time.perf_counter()
        seed = next(self._seeds) % 2**32 if observed.seed is None else observed.seed
        answer = self.robot.act(
            observed.frame_HWC[None], [observed.instruction], seeds=[seed], temperature=self.cfg.temperature
        )
        timing = {"infer_ms": 1000.0 * (time.perf_counter() - began)}
        # openpi's clients report how long the whole of their last request took here.
        if previous is not None:
            timing["prev_total_ms"] = previous
        return {"actions": answer.action_BTA[0], "server_timing": timing}


def metadata(robot: Robot, temperature: float) -> dict[str, Any]:
    """Returns what a client is told when it connects."""
    action, (steps, dim) = robot.recipe["action"], robot.chunk_shape
    return {
        "policy": robot.about["policy"],
        "observation": observation.describe(robot.camera_shape, read_senses(robot.recipe)),
        "image": robot.recipe["image"],
        "chunk": steps,
        "action_dim": dim,
        "action_convention": action["convention"],
        "unnorm_key": action["key"],
        "temperature": temperature,
    }
