"""Films, decoded forwards: the frames of many episodes out of one film cost one decoding of it.

A film stays open from one episode to the next. Where the next one begins before the place that has been reached, or far
behind it, decoding goes on from a key frame before that place. A frame is known by its time in the film, which its
container tells, so that nothing depends on where a seek lands.
"""

from __future__ import annotations

import contextlib
import math
import pathlib
import struct
from collections.abc import Generator, Iterator

import av
import av.logging
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError

from data_prep import files
from data_prep.demos import SourceError

FAR = 10.0
"""Seconds of film that are rather decoded than jumped over: a jump decodes from the key frame before its aim, and films
with one in 250 frames are common."""


class Film:
    """An open film.

    Args:
      path: of the film.
      fps: frames in a second, by which the place of an episode is known: half a frame is its tolerance.

    Attributes:
      decoded: frames that were decoded up to now, those before an episode that a jump had to pass included.
    """

    def __init__(self, path: pathlib.Path, fps: float):
        self.path, self.fps, self.decoded = path, fps, 0
        self._file: InputContainer | None = None
        self._waiting: av.VideoFrame | None = None
        self._said: list[str] = []

    def read(self, begins: float, count: int, name: str, odd: list[str] | None = None) -> Iterator[np.ndarray]:
        """Yields ``count`` frames, (H, W, 3) uint8, beginning with the one at ``begins`` seconds.

        Args:
          begins: seconds from the beginning of the film.
          count: frames of the episode.
          name: of the episode, for messages.
          odd: takes a sentence where the frames are not ``1 / fps`` apart, and one where the film is damaged.

        Raises:
          SourceError: no such film, no frame at that time, or fewer frames.
        """
        half = 0.5 / self.fps
        if self._file is None:
            self._open(name)
        if not begins - FAR < self._last < begins - half:
            self._seek(begins - half, name)
        taken, first = 0, math.nan
        while taken < count and (frame := self._pull(name)) is not None:
            if self._last < begins - half:
                continue
            if not taken and begins > half and self._last > begins + half:
                raise SourceError(
                    f"{name}: {self.path.name} has no frame at {begins:.3f} s; the next is at {self._last:.3f} s."
                )
            first = self._last if not taken else first
            taken += 1
            yield _pixels(frame, f"{name}: {self.path.name}")
        if taken < count:
            raise SourceError(f"{name}: {self.path.name} {self._why_ended(taken, count)}.")
        # Counted frame by frame the pictures belong to their rows; but the film says that time went by otherwise.
        if odd is not None and count > 1 and abs(self._last - first - (count - 1) / self.fps) > half + 1e-6:
            odd.append(f"its film takes {self._last - first:.2f} s for what is {(count - 1) / self.fps:.2f} s of rows")
        # A damaged film is decoded on, with smeared pictures.
        if odd is not None and self._said:
            odd.append(f"its film may be damaged, ffmpeg says {self._said[0]!r} about here")
            self._said.clear()

    def close(self) -> None:
        """Closes the film."""
        if self._file is not None:
            self._frames.close()
            self._file.close()
            self._file = None

    def _open(self, name: str) -> None:
        """Opens the film at its beginning."""
        self._said.clear()
        file, self._stream = _open(self.path, name, self._said)
        self._file = file
        # With one thread an error belongs to its frame, and what is said of it can be heard.
        self._stream.codec_context.thread_count = 1
        # A recorder may have begun to count before its first frame.
        self._began = (file.start_time or 0) / av.time_base
        self._frames, self._last, self._waiting = self._decode(file), -math.inf, None

    def _seek(self, seconds: float, name: str) -> None:
        """Goes to a key frame at ``seconds`` or before it."""
        assert self._file is not None
        back = 0.0
        while seconds > 0 or self._last > -math.inf:
            aim = max(seconds - back, 0.0)
            self._frames.close()
            try:
                with _listen(self._said):
                    self._file.seek(math.floor((self._began + aim) * av.time_base))
            except FFmpegError:  # a film without an index
                self.close()
                self._open(name)
                return
            self._frames, self._waiting = self._decode(self._file), None
            self._waiting = self._pull(name)
            # Some formats are searched by the time of decoding, and B-frames are shown before what was decoded first.
            if self._waiting is None or self._last <= seconds or aim == 0:
                return
            back = 2 * back or 1.0

    def _pull(self, name: str) -> av.VideoFrame | None:
        """Returns the next frame and notes its time; None at the end of the film."""
        if self._waiting is not None:
            frame, self._waiting = self._waiting, None
            return frame
        with _listen(self._said):
            frame = next(self._frames, None)
        if frame is None:
            return None
        self.decoded += 1
        if frame.pts is None or self._stream.time_base is None:
            raise SourceError(
                f"{name}: {self.path.name}: frame {self.decoded - 1} has no time; AVI keeps none for H.264, mp4 does."
            )
        self._last = float(frame.pts * self._stream.time_base) - self._began
        return frame

    def _decode(self, file: InputContainer) -> Generator[av.VideoFrame]:
        """Yields the frames from here on; what cannot be decoded is left out, and said."""
        for packet in self._packets(file):
            try:
                yield from self._stream.decode(packet)
            except FFmpegError as error:
                self._said.append(str(error.strerror))

    def _packets(self, file: InputContainer) -> Iterator[av.Packet | None]:
        """Yields what is to be decoded, at last an empty one for which the decoder gives the frames that it holds."""
        try:
            yield from file.demux(self._stream)
        except FFmpegError as error:
            self._said.append(str(error.strerror))
            yield None

    def _why_ended(self, taken: int, count: int) -> str:
        """Returns whether a film that ended too early is short or damaged."""
        said = self._said[0] if self._said else ""
        self.close()
        if said and not self.decoded:
            return f"is damaged ({said})"
        return f"ends after {taken} of its {count} frames" + (f" ({said})" if said else "")


def rate(path: pathlib.Path, name: str) -> float:
    """Returns the frames in a second that a film's header tells.

    Raises:
      SourceError: no film.
    """
    file, stream = _open(path, name, [])
    with file:
        told = float(stream.average_rate or 0)
    if not told > 0:
        raise SourceError(f"{name}: {path.name} does not tell how many frames it has in a second.")
    return told


def _open(path: pathlib.Path, name: str, said: list[str]) -> tuple[InputContainer, av.VideoStream]:
    """Opens a film and its first stream of pictures.

    Raises:
      SourceError: no film, or one that cannot be decoded here.
    """
    try:
        files.check(path, "a film")
    except SourceError as error:
        raise SourceError(f"{name}: {error}") from error
    try:
        with _listen(said):
            file = av.open(path, metadata_errors="replace")
    except FFmpegError as error:
        raise SourceError(f"{name}: {path.name} is damaged ({said[0] if said else error.strerror}).") from error
    stream = next(iter(file.streams.video), None)
    if stream is not None and stream.codec_context is not None:
        return file, stream
    file.close()
    lacks = "no stream of pictures in it" if stream is None else "a codec that PyAV's libraries do not have"
    raise SourceError(f"{name}: {path.name} cannot be decoded: {lacks}.")


@contextlib.contextmanager
def _listen(said: list[str]) -> Iterator[None]:
    """Puts into ``said`` which errors FFmpeg's libraries tell of, before those that were put there meanwhile."""
    begins, level, skips = len(said), av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    # Two films may be damaged in the same way.
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture() as lines:
            yield
    finally:
        said[begins:begins] = [message.strip() for _, _, message in lines]
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skips)


def _pixels(frame: av.VideoFrame, film: str) -> np.ndarray:
    """Returns the pixels of a frame, (H, W, 3) uint8, turned and mirrored as the film says that it is to be shown."""
    try:
        frame_HWC = frame.to_ndarray(format="rgb24", threads=1)
    except FFmpegError as error:  # colours of a kind that is reserved, say
        raise SourceError(f"{film} cannot be turned into RGB: {error.strerror}.") from error
    if (matrix := frame.side_data.get("DISPLAYMATRIX")) is None:
        return frame_HWC
    # Where x and y of the picture go, in fixed point: x' = a x + c y, y' = b x + d y.
    a, b, _, c, d = (round(number / 2**16) for number in struct.unpack("=9i", bytes(matrix))[:5])
    if sorted((abs(a * d), abs(b * c))) != [0, 1]:
        raise SourceError(f"{film} is to be turned by other than right angles; turn its pixels and write it anew.")
    across, down = (a, d) if a else (c, b)
    frame_HWC = frame_HWC if a else frame_HWC.swapaxes(0, 1)
    return np.ascontiguousarray(frame_HWC[::down, ::across])
