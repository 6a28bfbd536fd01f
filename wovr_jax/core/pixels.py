"""Pictures and videos."""

from __future__ import annotations

import os
import pathlib
import subprocess

import imageio_ffmpeg
import numpy as np

from wovr_jax.core import processes

VIDEO_PIXELS = 256
"""Videos and grids are enlarged until their shorter side has at least this many pixels."""


def video(path: str | os.PathLike, frame_THWC: np.ndarray, fps: int = 10) -> pathlib.Path:
    """Writes an mp4 (H.264), enlarged by whole pixels so that small frames stay sharp.

    Args:
      path: the file; parents are made.
      frame_THWC: (T, H, W, 3) uint8, or float in [-1, 1].
      fps: frames in a second.
    """
    # Rate factor 16: large flat squares cost little, and blur here would be blamed on the model.
    coded = "-codec:v libx264 -crf 16 -pix_fmt yuv420p -movflags +faststart"
    return _ffmpeg(pathlib.Path(path), _enlarge(_as_uint8(frame_THWC)), f"-framerate {fps}", coded)


def image(path: str | os.PathLike, frame_HWC: np.ndarray) -> pathlib.Path:
    """Writes a PNG of (H, W, 3), uint8 or float in [-1, 1], enlarged as :func:`video` does."""
    return _ffmpeg(pathlib.Path(path), _enlarge(_as_uint8(np.asarray(frame_HWC)[None])), "", "-frames:v 1 -codec:v png")


def _ffmpeg(path: pathlib.Path, frame_THWC: np.ndarray, rate: str, coded: str) -> pathlib.Path:
    if not processes.first():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.stem}.new{path.suffix}")
    _, height, width, _ = frame_THWC.shape
    raw = f"-f rawvideo -pixel_format rgb24 -video_size {width}x{height} {rate} -i -"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", *raw.split(), *coded.split(), str(fresh)]
    # Not through imageio's writer: it forks from Python, which JAX's threads do not survive safely.
    done = subprocess.run(command, input=frame_THWC.tobytes(), capture_output=True, start_new_session=True)
    if done.returncode:
        raise RuntimeError(f"ffmpeg could not write {path}: {done.stderr.decode(errors='replace').strip()}")
    fresh.replace(path)
    return path


def _as_uint8(frame: np.ndarray) -> np.ndarray:
    frame = np.asarray(frame)
    if frame.ndim != 4 or frame.shape[-1] != 3:
        raise ValueError(f"expected frames of shape (T, H, W, 3), got {frame.shape}.")
    if frame.dtype == np.uint8:
        return frame
    if not np.issubdtype(frame.dtype, np.floating):
        raise ValueError(f"expected frames as uint8 or as float in [-1, 1], got {frame.dtype}.")
    return np.clip(np.round((frame + 1.0) * 127.5), 0, 255).astype(np.uint8)


def _enlarge(frame_THWC: np.ndarray) -> np.ndarray:
    factor = max(1, -(-VIDEO_PIXELS // min(frame_THWC.shape[1:3])))
    frame_THWC = frame_THWC.repeat(factor, axis=1).repeat(factor, axis=2)
    # H.264 halves the colour planes: both sides must be even.
    odd = [(0, side % 2) for side in frame_THWC.shape[1:3]]
    return np.pad(frame_THWC, [(0, 0), *odd, (0, 0)], mode="edge")
