"""What a run says while it goes on: scalars, and how far a training has come.

Scalars go to ``metrics.jsonl``, one line of JSON for each call, which the report reads and which is whole after a
crash but for its last line; and to TensorBoard, which people watch meanwhile.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import tqdm

from wovr_jax.core import processes
from wovr_jax.core.disk import replace_file

RESERVED = ("stage", "step", "time")
"""What every line says of itself, so no metric may have such a name."""
LINE_EVERY_S = 20.0
"""Seconds between progress lines when standard error is not a terminal."""
SHOWN = 3
"""Metrics beside the bar or on a line."""


class Log:
    """Writes the scalars of a run to ``metrics.jsonl`` and to TensorBoard.

    Of several processes the first one writes; the others may call everything all the same.

    Args:
      folder: the run folder; made when missing.
      tensorboard: whether to write TensorBoard events too, in a folder of their own.
    """

    def __init__(self, folder: str | os.PathLike, tensorboard: bool = True):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._writes = processes.first()
        self.path = self.folder / "metrics.jsonl"
        self._tensorboard = tensorboard
        self._events: Any = None

    def scalars(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Writes ``values`` (numbers or scalar arrays) of ``stage`` at ``step``; NaN is written as null.

        Raises:
          ValueError: for a name in ``RESERVED``.
        """
        if taken := [name for name in values if name in RESERVED]:
            raise ValueError(f"metric names {taken} are reserved: every line has {', '.join(RESERVED)} of its own.")
        if not self._writes:
            return
        # Here the host waits for the device: callers log every so many steps, not every step.
        numbers = {name: float(value) for name, value in values.items()}
        # JSON has no word for NaN or infinity; readers other than Python's would stop at one.
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        line = {"stage": stage, "step": int(step), "time": round(time.time(), 3), **finite}
        # Opened anew for each line, so that every line is with the system before the next step begins.
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._tensorboard:
            for name, value in finite.items():
                if value is not None:  # TensorBoard would complain on the terminal at each of them
                    self._writer().add_scalar(f"{stage}/{name}", value, int(step))

    def rewind(self, stage: str, step: int) -> None:
        """Forgets the lines of ``stage`` beyond ``step``: a run that resumes there writes them again."""
        if not self._writes:
            return
        lines = read_metrics(self.folder)
        kept = [line for line in lines if line["stage"] != stage or line["step"] <= step]
        # Mostly there is nothing beyond, and a long file need not be written anew for that.
        if len(kept) == len(lines):
            return
        with replace_file(self.path) as fresh:
            fresh.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def close(self) -> None:
        """Flushes the TensorBoard events. ``metrics.jsonl`` is complete at any time."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def _writer(self) -> Any:
        if self._events is None:
            from tensorboardX import SummaryWriter  # only when a scalar is written: it starts a thread

            self._events = SummaryWriter(str(self.folder / "tensorboard"))
        return self._events


def read_metrics(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the lines of ``metrics.jsonl`` in ``folder``; one that a killed run cut short is left out."""
    path = pathlib.Path(folder) / "metrics.jsonl"
    if not path.exists():
        return []
    # Every whole line ends in a newline, so what comes after the last one is empty or cut short.
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


class Progress:
    """A bar on a terminal, a line every LINE_EVERY_S seconds elsewhere; both on standard error.

    Attributes:
      metrics: the latest means, set by the loop.
    """

    def __init__(self, name: str, done: int, steps: int):
        self.name, self.first, self.steps = name, done, steps
        self.metrics: dict[str, float] = {}
        self._begin = self._line = time.monotonic()
        # Of several processes one draws: their bars would overwrite each other.
        visible = sys.stderr.isatty() and processes.first()
        self._bar = tqdm.tqdm(
            total=steps, initial=done, desc=name, file=sys.stderr, disable=not visible, dynamic_ncols=True
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, done: int) -> None:
        """Shows that ``done`` steps are taken."""
        if not self._bar.disable:
            # Drawn once, by the update that follows.
            self._bar.set_postfix_str(self._metrics_text(), refresh=False)
            self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._line > LINE_EVERY_S:
            self._line = time.monotonic()
            # Only steps of this process: those before a resumption took none of its time.
            rate = (done - self.first) / (self._line - self._begin)
            left = tqdm.tqdm.format_interval((self.steps - done) / rate)
            processes.say(f"{self.name} {done}/{self.steps}, {rate:.2f} steps/s, {left} left, {self._metrics_text()}")

    def _metrics_text(self) -> str:
        # What a reader looks for comes first; the others as they are.
        names = sorted(self.metrics, key=lambda name: name not in ("success", "true_success", "loss"))
        return ", ".join(f"{name} {self.metrics[name]:.4g}" for name in names[:SHOWN])
