"""Pictures: as numbers on the device, as bytes on the disk, as films for people.

On the device pixels are float32 in [-1, 1], on the disk and in films uint8; the first pair of functions here is the
only way from one to the other.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
from typing import Any

import imageio_ffmpeg
import numpy as np

from wovr_jax.core import processes
from wovr_jax.core.disk import replace_file

VIDEO_PIXELS = 256
"""Videos and grids are enlarged until their shorter side has at least this many pixels."""


def to_float(frame: Any) -> Any:
    """Returns uint8 pixels as float32 in [-1, 1]; numpy gives numpy, and arrays of the device stay there.

    The two differ by a rounding: compilers multiply by 1 / 127.5, numpy divides.
    """
    return frame.astype(np.float32) / 127.5 - 1.0


def to_uint8(frame: Any) -> np.ndarray:
    """Returns pixels in [-1, 1] as uint8 on the host: clipped, and rounded, for cutting off would darken them."""
    return np.clip(np.round((np.asarray(frame, np.float32) + 1.0) * 127.5), 0, 255).astype(np.uint8)


def side_by_side(left_SHWC: np.ndarray, right_SHWC: np.ndarray) -> np.ndarray:
    """Joins two uint8 films (S, H, W, C) into one (S, H, 2 W + gap, C), with a white gap of W / 16 between them."""
    gap = np.full((*left_SHWC.shape[:2], max(1, left_SHWC.shape[2] // 16), 3), 255, np.uint8)
    return np.concatenate([left_SHWC, gap, right_SHWC], axis=2)


def video(path: str | os.PathLike, frame_THWC: np.ndarray, fps: int = 10) -> pathlib.Path:
    """Writes an mp4 (H.264), enlarged by whole pixels so that small frames stay sharp.

    Args:
      path: the file; parents are made.
      frame_THWC: (T, H, W, 3) uint8, or float in [-1, 1].
      fps: frames in a second.
    """
    # Rate factor 16: large flat squares cost little, and blur here would be blamed on the model.
    coded = "-codec:v libx264 -crf 16 -pix_fmt yuv420p -movflags +faststart"
    return _ffmpeg(pathlib.Path(path), _enlarge(_check(frame_THWC)), f"-framerate {fps}", coded)


def image(path: str | os.PathLike, frame_HWC: np.ndarray) -> pathlib.Path:
    """Writes a PNG of (H, W, 3), uint8 or float in [-1, 1], enlarged as :func:`video` does."""
    return _ffmpeg(pathlib.Path(path), _enlarge(_check(np.asarray(frame_HWC)[None])), "", "-frames:v 1 -codec:v png")


def _ffmpeg(path: pathlib.Path, frame_THWC: np.ndarray, rate: str, coded: str) -> pathlib.Path:
    """Hands frames to ffmpeg, which codes them into ``path``; of several processes the first one does."""
    # All processes have the same frames; two that write one file would spoil it.
    if not processes.first():
        return path
    _, height, width, _ = frame_THWC.shape
    raw = f"-f rawvideo -pixel_format rgb24 -video_size {width}x{height} {rate} -i -"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", *raw.split(), *coded.split()]
    # The suffix stays, for ffmpeg reads from it what to write.
    with replace_file(path, keep_suffix=True) as fresh:
        # Not through imageio's writer: it forks from Python, which JAX's threads do not survive safely.
        done = subprocess.run(
            [*command, str(fresh)], input=frame_THWC.tobytes(), capture_output=True, start_new_session=True
        )
        if done.returncode:
            raise RuntimeError(f"ffmpeg could not write {path}: {done.stderr.decode(errors='replace').strip()}")
    return path


def _check(frame: np.ndarray) -> np.ndarray:
    """Returns (T, H, W, 3) frames as uint8, and refuses what is neither that nor float."""
    frame = np.asarray(frame)
    if frame.ndim != 4 or frame.shape[-1] != 3:
        raise ValueError(f"expected frames of shape (T, H, W, 3), got {frame.shape}.")
    if frame.dtype == np.uint8:
        return frame
    # Other integers could mean anything: bytes, or levels of some other depth.
    if not np.issubdtype(frame.dtype, np.floating):
        raise ValueError(f"expected frames as uint8 or as float in [-1, 1], got {frame.dtype}.")
    return to_uint8(frame)


def _enlarge(frame_THWC: np.ndarray) -> np.ndarray:
    factor = max(1, -(-VIDEO_PIXELS // min(frame_THWC.shape[1:3])))
    frame_THWC = frame_THWC.repeat(factor, axis=1).repeat(factor, axis=2)
    # H.264 halves the colour planes: both sides must be even.
    odd = [(0, side % 2) for side in frame_THWC.shape[1:3]]
    return np.pad(frame_THWC, [(0, 0), *odd, (0, 0)], mode="edge")
