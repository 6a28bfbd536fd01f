"""Films, decoded forwards: the frames of many episodes out of one film cost one decoding of it.

A film stays open from one episode to the next. Where the next one begins before the place that has been reached, or far
behind it, the film is opened anew at a key frame before that place. A frame is known by its time in the film, which
ffmpeg reports with each frame, so that nothing depends on where a seek lands.
"""

from __future__ import annotations

import math
import os
import pathlib
import re
import subprocess
import tempfile
import time
import weakref
from collections.abc import Iterator
from typing import IO, Any

import imageio_ffmpeg
import numpy as np

from data_prep import files
from data_prep.demos import SourceError

FAR = 10.0
"""Seconds of film that are rather decoded than jumped over; a jump starts a process."""


class Film:
    """An open film.

    Args:
      path: of the film.
      fps: frames in a second, by which the place of an episode is known: half a frame is its tolerance.

    Attributes:
      decoded: frames that were decoded up to now.
    """

    def __init__(self, path: pathlib.Path, fps: float):
        self.path, self.fps, self.decoded = path, fps, 0
        self._process: subprocess.Popen[bytes] | None = None

    def read(self, begins: float, count: int, name: str, odd: list[str] | None = None) -> Iterator[np.ndarray]:
        """Yields ``count`` frames, (H, W, 3) uint8, beginning with the one at ``begins`` seconds.

        Args:
          begins: seconds from the beginning of the film.
          count: frames of the episode.
          name: of the episode, for messages.
          odd: takes a sentence where the frames are not ``1 / fps`` apart.

        Raises:
          SourceError: no such film, no frame at that time, or fewer frames.
        """
        half = 0.5 / self.fps
        if self._process is None or not begins - FAR < self._last < begins - half:
            self._open(name, max(begins - half, 0.0))
        taken, first = 0, math.nan
        while taken < count and (frame_HWC := self._pull(name)) is not None:
            if self._last < begins - half:
                continue
            if not taken and begins > half and self._last > begins + half:
                raise SourceError(
                    f"{name}: {self.path.name} has no frame at {begins:.3f} s; the next is at {self._last:.3f} s."
                )
            first = self._last if not taken else first
            taken += 1
            yield frame_HWC
        if taken < count:
            raise SourceError(f"{name}: {self.path.name} {self._why_ended(taken, count)}.")
        # Counted frame by frame the pictures belong to their rows; but the film says that time went by otherwise.
        if odd is not None and count > 1 and abs(self._last - first - (count - 1) / self.fps) > half + 1e-6:
            odd.append(f"its film takes {self._last - first:.2f} s for what is {(count - 1) / self.fps:.2f} s of rows")
        # A damaged film is decoded on, with smeared pictures; read without moving the place where ffmpeg writes.
        said = os.pread(self._errors.fileno(), 4096, self._heard) if odd is not None and self._process else b""
        if odd is not None and said:
            self._heard = os.fstat(self._errors.fileno()).st_size
            line = re.sub(r"^(\[[^]]*\]\s*)+", "", said.decode(errors="replace").splitlines()[0])
            odd.append(f"its film may be damaged, ffmpeg says {line!r} about here")

    def close(self) -> None:
        """Ends the decoder."""
        if self._process is not None:
            self._end()
            self._process = None

    def _open(self, name: str, seconds: float) -> None:
        """Starts a decoder whose first frame is the first one from ``seconds`` on."""
        self.close()
        try:
            files.check(self.path, "a film")
        except SourceError as error:
            raise SourceError(f"{name}: {error}") from error
        self._began, self._last, self._heard = seconds, -math.inf, 0
        # Open as long as the decoder is.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._times = tempfile.NamedTemporaryFile("r", encoding="ascii")  # noqa: SIM115
        seek = ["-ss", f"{seconds:.6f}"] if seconds else []
        # PPM: three lines of text with the size, then the pixels; films that are turned or change their size need no
        # care. The time of each frame goes to a file of its own, which ffmpeg writes before the frame.
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-y", "-v", "error", *seek, "-i", str(self.path)]
        command += ["-map", "0:v:0", "-fps_mode", "passthrough", "-stats_enc_pre", self._times.name]
        command += ["-stats_enc_pre_fmt", "{ti}", "-f", "image2pipe", "-c:v", "ppm", "-"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._errors)
        self._end = weakref.finalize(self, _end, self._process, self._errors, self._times)

    def _pull(self, name: str) -> np.ndarray | None:
        """Returns the next frame and notes its time; None at the end of the film."""
        assert self._process is not None and self._process.stdout is not None
        # The header is read line by line: the pixels behind it may hold any byte.
        kind, size, _ = (self._process.stdout.readline() for _ in range(3))
        if not kind:
            return None
        width, height = map(int, size.split())
        pixels = self._process.stdout.read(height * width * 3)
        if len(pixels) < height * width * 3:
            return None
        self.decoded += 1
        self._last = self._began + self._time(name)
        return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)

    def _time(self, name: str) -> float:
        """Returns the time of the frame that was pulled, in seconds from where the decoder began."""
        text = ""
        for _ in range(2000):  # a few seconds, should the system be slow to show the line to us
            text += self._times.readline()
            if text.endswith("\n"):
                try:
                    return float(text)
                except ValueError:
                    break
            time.sleep(0.005)
        raise SourceError(f"{name}: {self.path.name}: frame {self.decoded - 1} has no time ({text.strip()!r}).")

    def _why_ended(self, taken: int, count: int) -> str:
        """Returns whether a film that ended too early is short or damaged."""
        assert self._process is not None
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        self.close()
        if status and not taken:
            return f"is damaged ({lines[-1] if lines else f'exit status {status}'})"
        return f"ends after {taken} of its {count} frames" + (f" ({lines[-1]})" if lines else "")


def rate(path: pathlib.Path, name: str) -> float:
    """Returns the frames in a second that a film's header tells.

    Raises:
      SourceError: no film.
    """
    try:
        files.check(path, "a film")
    except SourceError as error:
        raise SourceError(f"{name}: {error}") from error
    # Without an output ffmpeg only says what it was given, and ends with an error.
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-i", str(path)]
    said = subprocess.run(command, capture_output=True, check=False).stderr.decode(errors="replace")
    match = re.search(r"Video:.*?([\d.]+) fps", said)
    if match is None:
        lines = said.strip().splitlines()
        raise SourceError(f"{name}: {path.name} is damaged ({lines[-1] if lines else 'no stream of pictures in it'}).")
    told = float(match[1])
    if not told > 0:
        raise SourceError(f"{name}: {path.name} does not tell how many frames it has in a second.")
    return told


def _end(process: subprocess.Popen[bytes], *opened: IO[Any]) -> None:
    process.kill()
    process.wait()
    for file in (process.stdout, *opened):
        if file:
            file.close()
