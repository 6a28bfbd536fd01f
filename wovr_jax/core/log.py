"""Scalars of a run: one line of JSON for each call, and TensorBoard events."""

from __future__ import annotations

import json
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from wovr_jax.core import processes

RESERVED = ("stage", "step", "time")


class Log:
    """Scalars of a run, in ``metrics.jsonl`` (one line per call) and as TensorBoard events, written by process 0."""

    def __init__(self, folder: str | os.PathLike, tensorboard: bool = True):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._writes = processes.first()
        self.path = self.folder / "metrics.jsonl"
        self._tensorboard = tensorboard
        self._events: Any = None

    def scalars(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Writes ``values`` (numbers or scalar arrays) of ``stage`` at ``step``; NaN is written as null."""
        taken = [name for name in values if name in RESERVED]
        if taken:
            raise ValueError(f"metric names {taken} are reserved: every line has {', '.join(RESERVED)} of its own.")
        if not self._writes:
            return
        numbers = {name: float(value) for name, value in values.items()}
        shown = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        line = {"stage": stage, "step": int(step), "time": round(time.time(), 3), **shown}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self._tensorboard:
            for name, value in numbers.items():
                self._writer().add_scalar(f"{stage}/{name}", value, int(step))

    def rewind(self, stage: str, step: int) -> None:
        """Forgets lines of ``stage`` beyond ``step``: a resumed run writes them again."""
        if not self._writes:
            return
        lines = read_metrics(self.folder)
        kept = [line for line in lines if line["stage"] != stage or line["step"] <= step]
        if len(kept) == len(lines):
            return
        fresh = self.path.with_suffix(".new")
        fresh.write_text("".join(json.dumps(line) + "\n" for line in kept))
        fresh.replace(self.path)

    def close(self) -> None:
        """Flushes the TensorBoard events. ``metrics.jsonl`` is complete at any time."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _writer(self) -> Any:
        if self._events is None:
            from tensorboardX import SummaryWriter  # only when a scalar is written: it starts a thread

            self._events = SummaryWriter(str(self.folder / "tensorboard"))
        return self._events


def read_metrics(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` in ``folder``; a last line that a killed run cut short is left out."""
    path = pathlib.Path(folder) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
