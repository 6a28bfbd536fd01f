"""Windows of episodes that no memory holds: read and decoded by Grain while the device computes.

An episode is one compressed record, so a window costs the decoding of its whole episode. A visit decodes it once
and cuts several windows, each for another batch: ``visit`` batches in a row come from the same episodes, and every
batch has as many visits as windows.

A batch is a function of seed and step, whoever reads it: row r of step i is window ``i % visit`` of visit
(i // visit, r). So a resumed run is the uninterrupted one with no reader's state to keep, and each of several processes
reads its own rows of the same batches, however many there are.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from grain import experimental

from wovr_jax.core import sharding
from wovr_jax.core.config import Count, Natural, checked
from wovr_jax.data.batches import Layout, NoDataError, shift_frames
from wovr_jax.types import NULL_ACTION, Array, Episode

Host = dict[str, np.ndarray]
"""``frame`` (..., F, H, W, 3) uint8 and ``action`` (..., F, A) float32; F = 1 + memory + new."""


@checked
@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """How windows are read.

    Attributes:
      visit: windows cut from an episode when it is decoded, one for each of so many batches.
      threads: reading threads, of each worker where there are some.
      workers: reading processes; 0 reads in this one. Decompression lets other threads run, so
        they are worth their start only where one process is not enough.
      ahead: batches that wait on the device.
    """

    visit: Count = 8
    threads: Count = 8
    workers: Natural = 0
    ahead: Count = 2


class Stream:
    """Cuts windows from some episodes of ``source``, each decoded when its turn comes.

    Args:
      source: episodes, decoded when asked for: an ``EpisodeSource``, or a list.
      steps_E: (E,) steps of each.
      use_E: (E,) bool, those to read. Episodes shorter than ``layout.new`` give no window.
      layout: of the windows.
      cfg: of the reading.

    Raises:
      NoDataError: when there is no window.
    """

    def __init__(
        self, source: Sequence[Episode], steps_E: np.ndarray, use_E: np.ndarray, layout: Layout, cfg: StreamConfig
    ):
        self.source, self.layout, self.cfg = source, layout, cfg
        self.steps_E = steps_E
        windows_E = [1 + len(layout.later(steps)) if steps >= layout.new else 0 for steps in steps_E]
        # Windows up to and with each episode: the place of a number in it is an episode, drawn by its windows.
        self._until_E = np.cumsum(np.where(use_E, windows_E, 0))
        # Said here and not at the first batch, which a training asks for after minutes of building.
        if not self.count:
            raise NoDataError(
                f"no world-model window: a window needs {layout.new} steps, the longest of {int(use_E.sum())} episodes "
                f"has {int(max(steps_E[use_E], default=0))}."
            )

    @property
    def count(self) -> int:
        """How many windows there are."""
        return int(self._until_E[-1])

    def visit(self, seed: tuple[int, ...], group: int, row: int) -> Host:
        """Returns ``cfg.visit`` windows of one episode; an episode comes as often as it has windows."""
        # A generator of the visit's own: whoever reads it, and from where on, it draws the same.
        rng = np.random.default_rng([*seed, group, row])
        index = int(np.searchsorted(self._until_E, rng.integers(self.count), side="right"))
        later = self.layout.later(int(self.steps_E[index]))
        first, share = self.layout.first, self.layout.start_share if later else 1.0
        # The share is drawn for every window: one visit may begin its episode several times, or never.
        begins_K = rng.random(self.cfg.visit) < share
        starts_K = [first if begins else int(rng.choice(later)) for begins in begins_K]
        episode = self.source[index]
        frames, actions = zip(*(window(episode, start, self.layout) for start in starts_K), strict=True)
        if shift := self.layout.shift:
            frames = [shift_frames(frame_FHWC, rng.integers(-shift, shift + 1, 2)) for frame_FHWC in frames]
        return {"frame": np.stack(frames), "action": np.stack(actions)}

    def read(self, seed: tuple[int, ...], rows: np.ndarray, step: int, steps: int) -> Any:
        """Returns a Grain dataset of the given rows of the batches of ``step`` and after, up to ``steps``."""
        # A visit serves ``cfg.visit`` batches, so the first one may begin before ``step``; ``Feed`` skips those.
        first, last = step // self.cfg.visit, -(-steps // self.cfg.visit)
        visits = grain.MapDataset.range(first * len(rows), last * len(rows))
        visits = visits.map(lambda n: self.visit(seed, n // len(rows), int(rows[n % len(rows)])))
        threads = self.cfg.threads
        # Threads suffice for most: decompression lets go of the interpreter's lock.
        visits = visits.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
        if self.cfg.workers:
            # Grain's reading processes ask for its flags, and nobody parses a command line for them.
            flags.FLAGS.mark_as_parsed()
            visits = visits.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.cfg.workers))
        return experimental.FlatMapIterDataset(visits.batch(len(rows)), _Deal(self.cfg.visit))


class Feed:
    """Puts batches of a stream onto the devices, ahead of the step that asks for them.

    Args:
      stream: the windows.
      size: of a batch, over all processes.
      seed: of the draws.
      steps: of the whole training.

    Attributes:
      waited: seconds for which the last call waited: above zero, reading is the bottleneck.
    """

    def __init__(self, stream: Stream, size: int, seed: tuple[int, ...], steps: int):
        self._stream, self._seed, self._steps = stream, seed, steps
        # Which rows of a batch this process reads, and how they become its part of the global array.
        self._rows, self._onto = sharding.rows(size)
        self._next, self._batches = -1, iter(())
        self.waited = 0.0

    def __call__(self, step: int) -> dict[str, Array]:
        """Returns the batch of a step; steps in their order are read ahead.

        Raises:
          EpisodesError: naming the record that cannot be read.
        """
        # The first step of all, or of a resumed run. Steps in their order never get here again.
        if step != self._next:
            self._batches = self._open(step)
        begin = time.perf_counter()
        batch = next(self._batches)
        self._next = step + 1
        self.waited = time.perf_counter() - begin
        return batch

    def _open(self, step: int) -> Iterator[dict[str, Array]]:
        read = self._stream.read(self._seed, self._rows, step, self._steps).map(self._onto)
        batches = iter(experimental.ThreadPrefetchIterDataset(read, prefetch_buffer_size=self._stream.cfg.ahead))
        # The visit of this step has served the batches before it already.
        for _ in range(step % self._stream.cfg.visit):
            next(batches)
        return batches


class _Deal(experimental.FlatMapTransform):
    """Deals the windows (R, K, ...) of R visits out to K batches of R windows."""

    def __init__(self, visit: int):
        self.max_fan_out = visit

    def flat_map(self, element: Host) -> list[Host]:
        # Contiguous, or a batch that waits would hold on to the memory of all K.
        return [{name: np.ascontiguousarray(a[:, k]) for name, a in element.items()} for k in range(self.max_fan_out)]


def window(episode: Episode, start: int, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Returns the frames (F, H, W, 3) uint8 and actions (F, A) of the window that begins at ``start``.

    The same window as ``batches.gather_windows`` cuts on the device: frame 0, then consecutive frames; action slot i
    holds the action that produced frame i, the null action where none did.
    """
    # Frame 0 is the anchor; steps before the episode are negative and show it too.
    step_F = np.concatenate([[0], start + np.arange(layout.memory + layout.new)])
    # Frame i was produced by action i - 1, and the first frame by none.
    action_FA = episode.action_SA[np.maximum(step_F - 1, 0)]
    action_FA = np.where(step_F[:, None] > 0, action_FA, np.asarray(NULL_ACTION, np.float32))
    return episode.frame_SHWC[np.maximum(step_F, 0)], action_FA
