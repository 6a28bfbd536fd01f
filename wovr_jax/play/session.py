"""One player's episode in two worlds: the same actions happen in the true simulator and in the imagined one.

A session knows no socket. It holds one episode, of bounded length, and nothing of it outlives a new beginning.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from typing import Literal

import numpy as np

from wovr_jax.core import pixels
from wovr_jax.core.pixels import to_uint8
from wovr_jax.play.programs import Programs
from wovr_jax.types import Start

APART = 0.02
"""Imagination has left the truth where more than this share of a picture shows something else, see
:func:`measure_distance`. Of the embedded table's 1024 pixels that is 20: a gripper, or half of a
block. Rollouts that go well in both worlds stay below it."""
SIMILAR = 0.15
"""Colours are similar that differ by at most this share of the range, in red, green and blue each."""
SLACK = 1 / 32
"""How far beside its place a colour may be, as a share of the picture: an edge imagined a pixel off is no lie."""
EPISODE_BYTES = 24 * 2**20
"""Of the frames of one episode, both worlds together."""
MOST_CHUNKS = 64
FILM_FPS = 10

Eye = Literal["imagined", "true"]


class SessionError(ValueError):
    """Tells a player why a request cannot be followed."""


@dataclasses.dataclass(frozen=True)
class Begun:
    """How an episode begins.

    Attributes:
      instruction: what the robot is asked to do.
      imagined_HWC, true_HWC: uint8, the first picture; the true one is None where there is no simulator.
      step: steps of the true episode that are over.
      keyframe: whether it is the middle of an episode.
      closed: whether the fingers were last told to close; whoever goes on with a thing in them has to keep them so.
      action_NTA: actions to play again, chunk by chunk; empty for a new episode.
    """

    instruction: str
    imagined_HWC: np.ndarray
    true_HWC: np.ndarray | None
    step: int
    keyframe: bool
    closed: bool
    action_NTA: np.ndarray


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Eight actions and what they led to.

    Attributes:
      n: number of the chunk in its episode.
      action_TA: float32, the actions.
      imagined_THWC, true_THWC: uint8 frames; the true ones are None where there is no simulator.
      prob_T: success probability of each imagined frame; None where there is no judge yet.
      truth_T: whether the goal holds in each true frame; None where there is no simulator.
      apart_T: share of the picture that differs, see ``measure_distance``; None where there is one picture only.
      left: the first step of the episode, from 0, after which more than ``APART`` did; None so far.
      room: chunks that may still follow.
    """

    n: int
    action_TA: np.ndarray
    imagined_THWC: np.ndarray
    true_THWC: np.ndarray | None
    prob_T: np.ndarray | None
    truth_T: np.ndarray | None
    apart_T: np.ndarray | None
    left: int | None
    room: int


class Session:
    """An episode that is played chunk by chunk; it begins on a layout, or a row of the start states.

    Args:
      programs: the compiled steps.
    """

    def __init__(self, programs: Programs):
        self.programs = programs
        self._start: Start | None = None
        self._chunks: list[Chunk] = []

    @property
    def most_chunks(self) -> int:
        """Chunks of the longest episode."""
        side = self.programs.source.starts.anchor_KHWC.shape[1:]
        return max(1, min(MOST_CHUNKS, EPISODE_BYTES // (2 * self.programs.chunk * int(np.prod(side)))))

    def begin(self, row: int | None, layout: int, noise: int) -> Begun:
        """Begins at row ``row`` of the start states, or, without one, on the layout of a seed.

        Args:
          row: of the table.
          layout: seed of a layout, in the true simulator only.
          noise: seed of what the world model and a sampling policy draw.

        Raises:
          SessionError: no such row, or a layout where there is no simulator that could draw it.
        """
        source = self.programs.source
        if row is None and source.sim is None:
            raise SessionError(f"layouts are drawn by the true simulator, which {source.suite} has not; choose a start")
        if row is not None and not 0 <= row < len(source.starts):
            raise SessionError(f"'row': expected 0 to {len(source.starts) - 1}, a start state of the run, got {row}")
        self._start = self.programs.begin_layout(layout) if row is None else self.programs.begin_row(row)
        return self._rewind(noise, [])

    def again(self, noise: int) -> Begun:
        """Goes back to where the episode began; the actions so far come along, to be played under other noise.

        Raises:
          SessionError: nothing has begun.
        """
        self._check_begun()
        return self._rewind(noise, [chunk.action_TA for chunk in self._chunks])

    def step(self, action_TA: np.ndarray) -> Chunk:
        """Plays eight actions in both worlds.

        Raises:
          SessionError: nothing has begun, or the episode is full.
        """
        start, source = self._check_begun(), self.programs.source
        if len(self._chunks) >= self.most_chunks:
            raise SessionError(f"this episode has its {self.most_chunks} chunks, and more are not kept; begin again")
        n = len(self._chunks)
        self._world, frame_1THWC, prob_1T = self.programs.imagine(self._world, action_TA, start.task_B, self._noise, n)
        imagined_THWC, true_THWC, truth_T, apart_T = to_uint8(frame_1THWC)[0], None, None, None
        if source.sim is not None:
            self._sim, true_1THWC, truth_1T = self.programs.step(self._sim, action_TA)
            self._seen = true_1THWC[:, -1]
            true_THWC, truth_T = to_uint8(true_1THWC)[0], np.asarray(truth_1T)[0]
            apart_T = measure_distance(imagined_THWC, true_THWC)
            over_T = np.flatnonzero(apart_T > APART)
            if self._left is None and len(over_T):
                self._left = n * self.programs.chunk + int(over_T[0])
        prob_T = None if prob_1T is None else np.asarray(prob_1T)[0]
        room = self.most_chunks - n - 1
        chunk = Chunk(n, action_TA, imagined_THWC, true_THWC, prob_T, truth_T, apart_T, self._left, room)
        self._chunks.append(chunk)
        return chunk

    def act(self, sees: Eye, temperature: float) -> Chunk:
        """Lets the policy choose the next chunk at the newest frame of one of the worlds, and plays it in both.

        Raises:
          SessionError: as :meth:`step`, and true frames where there is no simulator.
        """
        start = self._check_begun()
        if sees == "true" and self.programs.source.sim is None:
            raise SessionError("the policy cannot look at true frames: there is no true simulator here")
        frame_1HWC = self._world.memory_BMHWC[:, -1] if sees == "imagined" else self._seen
        chosen = self.programs.act(frame_1HWC, start.prompt_BL, temperature, self._noise, len(self._chunks))
        return self.step(chosen)

    def film(self) -> bytes:
        """Returns the episode so far as an mp4: the truth on the left, imagination on the right.

        Raises:
          SessionError: no chunk has been played.
        """
        if not self._chunks:
            raise SessionError("there is nothing to film yet; play a chunk first")
        first = self._first
        films = [np.concatenate([first.imagined_HWC[None], *(chunk.imagined_THWC for chunk in self._chunks)])]
        if first.true_HWC is not None:
            true = [chunk.true_THWC for chunk in self._chunks if chunk.true_THWC is not None]
            films.insert(0, np.concatenate([first.true_HWC[None], *true]))
        with tempfile.TemporaryDirectory() as folder:
            film = films[0] if len(films) == 1 else pixels.side_by_side(*films)
            return pixels.video(pathlib.Path(folder) / "episode.mp4", film, fps=FILM_FPS).read_bytes()

    def _check_begun(self) -> Start:
        if self._start is None:
            raise SessionError("no episode has begun; begin one first")
        return self._start

    def _rewind(self, noise: int, action_NTA: list[np.ndarray]) -> Begun:
        start, source = self._check_begun(), self.programs.source
        self._noise, self._chunks, self._left = noise, [], None
        # ``_seen``: what the true camera shows; it begins with the frame that imagination begins with.
        self._world, self._sim, self._seen = self.programs.begin_world(start), start.sim, start.memory_BMHWC[:, -1]
        picture_HWC = to_uint8(self._seen)[0]
        shape = (0, self.programs.chunk, start.action_BMA.shape[-1])
        self._first = Begun(
            instruction=source.instructions[int(start.task_B[0])],
            imagined_HWC=picture_HWC,
            true_HWC=None if source.sim is None else picture_HWC,
            step=int(start.step_B[0]),
            keyframe=bool(start.keyframe_B[0]),
            closed=bool(start.action_BMA[0, -1, -1] > 0.0),
            action_NTA=np.stack(action_NTA) if action_NTA else np.zeros(shape, np.float32),
        )
        return self._first


def measure_distance(imagined_THWC: np.ndarray, true_THWC: np.ndarray) -> np.ndarray:
    """Returns how far two uint8 films are apart, frame by frame: the share of the pixels that show something else.

    A pixel does where the other picture has no similar colour in its place or next to it. It is counted in both
    directions, and the larger share is taken: a thing that is missing and one that is made up are both seen. The mean
    square of the difference, and so a PSNR, would be ruled by edges that are half a pixel off.
    """
    imagined, true = imagined_THWC.astype(np.int16), true_THWC.astype(np.int16)
    return np.maximum(_share_unmatched(imagined, true), _share_unmatched(true, imagined))


def _share_unmatched(film_THWC: np.ndarray, other_THWC: np.ndarray) -> np.ndarray:
    """Returns (T,) shares of the pixels of a film for which the other one has no similar colour nearby."""
    _, height, width, _ = film_THWC.shape
    reach = max(1, round(SLACK * min(height, width)))
    padded = np.pad(other_THWC, [(0, 0), (reach, reach), (reach, reach), (0, 0)], mode="edge")
    matched_THW = np.zeros(film_THWC.shape[:3], bool)
    for y in range(2 * reach + 1):
        for x in range(2 * reach + 1):
            gap_THWC = np.abs(film_THWC - padded[:, y : y + height, x : x + width])
            matched_THW |= (gap_THWC <= 255 * SIMILAR).all(axis=-1)
    return 1.0 - matched_THW.mean(axis=(1, 2))
