"""How far a training is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time

import tqdm

from wovr_jax.core import processes

LINE_EVERY_S = 20.0
"""Seconds between progress lines when standard error is not a terminal."""
SHOWN = 4
"""Metrics beside the bar or on a line."""


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
        return ", ".join(f"{metric} {value:.4g}" for metric, value in list(self.metrics.items())[:SHOWN])
