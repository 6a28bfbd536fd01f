"""A policy that costs nothing, its server with a recorder, and a client that remembers what it sent."""

from __future__ import annotations

import asyncio
import pathlib
import threading
import time
from collections.abc import Callable

import numpy as np
from websockets.sync.client import ClientConnection, connect

from wovr_jax.data import episodes as disk
from wovr_jax.export import wire
from wovr_jax.export.recorder import UNFINISHED, RecordConfig, Recorder
from wovr_jax.export.robot import Answer
from wovr_jax.export.server import PolicyServer, ServerConfig
from wovr_jax.types import Episode

PATIENCE = 60
FRAME, CHUNK, WIDTH = (4, 6, 3), 8, 3
POLICY = {"policy": "pace, grpo-1", "weights": "ab12", "temperature": 0.0}


class FakeRobot:
    """Acts by the mean of the picture and nothing else."""

    frame_shape, camera_shape, chunk_shape = FRAME, FRAME, (CHUNK, 7)
    about = {"policy": POLICY["policy"]}  # noqa: RUF012
    recipe = {  # noqa: RUF012
        "image": {"height": FRAME[0], "width": FRAME[1], "dtype": "uint8"},
        "action": {"convention": "environment", "key": "table"},
    }

    def warm(self) -> None:
        pass

    def act(self, frame_BHWC: np.ndarray, *_: object, **__: object) -> Answer:
        ramp = np.linspace(-0.5, 0.5, CHUNK * 7, dtype=np.float32).reshape(1, CHUNK, 7)
        action = ramp + np.float32(frame_BHWC.mean() / 1000)
        return Answer(action, np.zeros(action.shape, np.int32), action)


class Served:
    """A server that records, in a thread of its own."""

    def __init__(self, folder: pathlib.Path, tell: Callable[[str], None] = lambda _: None, **limits: int):
        self.recorder = Recorder(RecordConfig(str(folder), **limits), POLICY, tell)
        self.server = PolicyServer(FakeRobot(), ServerConfig(port=0), recorder=self.recorder)  # pyright: ignore
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        await self.server.serve(self._stop, self._at)

    def _at(self, port: int) -> None:
        self.url = f"ws://127.0.0.1:{port}"
        self._ready.set()

    def __enter__(self) -> Served:
        self._thread.start()
        assert self._ready.wait(PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


class Robot:
    """A client that records, and keeps what it sent."""

    def __init__(self, url: str, seed: int = 0, *, wrist: bool = True):
        self.rng, self.url, self.wrist = np.random.default_rng(seed), url, wrist

    def __enter__(self) -> Robot:
        self._open = connect(self.url, compression=None)
        self.socket: ClientConnection = self._open.__enter__()
        self.metadata = wire.unpack(bytes(self.socket.recv(timeout=PATIENCE)))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.__exit__(None, None, None)

    def ask(self, message: dict | bytes) -> dict | str:
        self.socket.send(message if isinstance(message, bytes) else wire.pack(message))
        reply = self.socket.recv(timeout=PATIENCE)
        return reply if isinstance(reply, str) else wire.unpack(reply)

    def say(self, **message: object) -> dict:
        """Follows with a message of the recording, which has to be taken."""
        reply = self.ask(message)
        assert isinstance(reply, dict), reply
        return reply["record"]

    def look(self, count: int | None = None) -> dict:
        """What the robot sees, once or ``count`` times."""
        some = () if count is None else (count,)
        seen = {"observation/image": self.rng.integers(0, 255, (*some, *FRAME), np.uint8)}
        if self.wrist:
            seen["observation/wrist_image"] = self.rng.integers(0, 255, (*some, 2, 2, 3), np.uint8)
            seen["observation/state"] = self.rng.normal(size=(*some, WIDTH)).astype(np.float32)
        return seen

    def start(self, prompt: str = "lift it", **more: object) -> str:
        seen = self.look()
        self.seen, self.executed = [{name: value[None] for name, value in seen.items()}], []
        state = self.say(record="start", prompt=prompt, **seen, **more)
        assert state["state"] == "recording" and state["steps"] == 0
        return state["name"]

    def step(self, count: int = 1, **more: object) -> dict:
        seen, action = self.look(count), self.rng.uniform(-1, 1, (count, 7)).astype(np.float32)
        state = self.say(**{"record": "step", "step": self.steps + 1, "action": action, **seen, **more})
        self.seen.append(seen)
        self.executed.append(action)
        return state

    @property
    def steps(self) -> int:
        return sum(map(len, self.executed))

    def end(self, outcome: str, **more: object) -> dict:
        return self.say(record=outcome, steps=self.steps, **more)

    def sent(self, name: str) -> np.ndarray:
        return np.concatenate([seen[f"observation/{name}"] for seen in self.seen])


def recordings(folder: pathlib.Path) -> list[str]:
    """Everything in the folder but what a living server keeps to itself."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(UNFINISHED))


def unfinished(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.glob(f"{UNFINISHED}*/*") if path.name != "lock")


def read(folder: pathlib.Path, name: str) -> Episode:
    (episode,) = disk.read(folder / name)
    return episode


def wait_until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)
