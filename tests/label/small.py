"""Recordings of tiny frames, and a server of the page of their labels."""

from __future__ import annotations

import asyncio
import pathlib
import threading

import numpy as np

from wovr_jax.data import episodes as disk
from wovr_jax.label.messages import Scores
from wovr_jax.label.server import LabelConfig, LabelServer
from wovr_jax.label.store import Store
from wovr_jax.types import Episode

PATIENCE = 60
STEPS = 6


def episode(number: int, *, size: int = 8, steps: int = STEPS, won: bool = True, wrist: bool = True) -> Episode:
    """An episode whose frames are told apart by their brightness: ten times the step, and the number."""
    frame_SHWC = np.zeros((steps + 1, size, size, 3), np.uint8)
    frame_SHWC += (10 * np.arange(steps + 1, dtype=np.uint8) + number)[:, None, None, None]
    action_SA = np.zeros((steps, 7), np.float32)
    success_S = np.arange(steps + 1) >= (steps if won else steps + 1)
    wrist_SHWC = frame_SHWC[:, : size // 2, : size // 2] if wrist else None
    text = f"task {number % 2}"
    return Episode(frame_SHWC, action_SA, success_S, text, number % 2, number, "pace, grpo-1", action_SA, wrist_SHWC)


def record(folder: pathlib.Path, count: int) -> list[str]:
    """Writes so many recordings, every other one a failure; returns their names."""
    names = [f"20261130T0852{number:02d}-000000-{number:05d}-3fa9c1" for number in range(count)]
    for number, name in enumerate(names):
        disk.write(folder / name, [episode(number, won=number % 2 == 0)])
    return names


class Served:
    """A server in a thread of its own, on a free port."""

    def __init__(self, folder: pathlib.Path, scores: Scores | None = None):
        self.store = Store(folder, "ada")
        self.server = LabelServer(self.store, LabelConfig(port=0), scores)
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
