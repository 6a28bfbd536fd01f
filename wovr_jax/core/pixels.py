"""Pictures: as numbers on the device, as bytes on the disk, as films for people.

On the device pixels are float32 in [-1, 1], on the disk and in films uint8; the first pair of functions here is the
only way from one to the other.

A robot with several senses is one wide picture everywhere in a run, a mosaic: its V square views side by side, then a
strip that shows the R numbers of its state as R grey bands, one below another. So whatever takes a picture takes all of
it: episodes, start states, films, the judge. World model and policy take it apart again (``split_views``,
``read_state``).
"""

from __future__ import annotations

import os
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import numpy as np

from wovr_jax.core import processes
from wovr_jax.core.disk import replace_file

VIDEO_PIXELS = 256
"""Videos and grids are enlarged until their shorter side has at least this many pixels."""
# Rate factor 16: large flat squares cost little, and blur here would be blamed on the model. What x264 has for AVX-512
# reads past its rows where 256 does not divide the width, so that the same frames give other bytes each time.
X264 = {"crf": "16", "movflags": "faststart", "x264-params": "asm=sse4.2" if platform.machine() == "x86_64" else ""}
"""How films are coded, in words of FFmpeg."""


def to_float(frame: Any) -> Any:
    """Returns uint8 pixels as float32 in [-1, 1]; numpy gives numpy, and arrays of the device stay there.

    The two differ by a rounding: compilers multiply by 1 / 127.5, numpy divides.
    """
    return frame.astype(np.float32) / 127.5 - 1.0


def to_uint8(frame: Any) -> np.ndarray:
    """Returns pixels in [-1, 1] as uint8 on the host: clipped, and rounded, for cutting off would darken them."""
    return np.clip(np.round((np.asarray(frame, np.float32) + 1.0) * 127.5), 0, 255).astype(np.uint8)


def make_mosaic(views: Sequence[Any], state_R: Any = None, strip: int = 0) -> Any:
    """Joins square views (..., H, H, 3) in [-1, 1] to a mosaic (..., H, V * H + strip, 3).

    Args:
      views: V of them.
      state_R: (..., R) numbers in [-1, 1], at most H; a picture of bytes holds each to 1/255 of its range, as an action
        token does.
      strip: pixels of their strip's width; 0 shows no state.
    """
    xp, height = views[0].__array_namespace__(), views[0].shape[-3]
    if not strip:
        return xp.concatenate(views, axis=-2)
    band_RH = xp.repeat(xp.clip(state_R, -1.0, 1.0), height // state_R.shape[-1], axis=-1)
    rest = [(0, 0)] * (band_RH.ndim - 1) + [(0, height - band_RH.shape[-1])]
    strip_HWC = xp.broadcast_to(xp.pad(band_RH, rest)[..., None, None], (*band_RH.shape[:-1], height, strip, 3))
    return xp.concatenate([*views, strip_HWC], axis=-2)


def split_views(frame: Any, views: int) -> Any:
    """Returns the views of mosaics (..., H, W, 3) as (..., V, H, H, 3)."""
    height = frame.shape[-3]
    apart = frame[..., : views * height, :].reshape(*frame.shape[:-2], views, height, 3)
    return apart.swapaxes(-4, -3)  # (..., H, V, H, 3) -> (..., V, H, H, 3)


def read_state(frame: Any, views: int, numbers: int) -> Any:
    """Returns the state that mosaics (..., H, W, 3) in [-1, 1] show, (..., R): the mean of each band."""
    height = frame.shape[-3]
    band = frame[..., : height // numbers * numbers, views * height :, :]
    return band.reshape(*frame.shape[:-3], numbers, -1).mean(axis=-1)


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
    return encode(path, _enlarge(_check(frame_THWC)), "libx264", "yuv420p", fps, X264)


def image(path: str | os.PathLike, frame_HWC: np.ndarray) -> pathlib.Path:
    """Writes a PNG of (H, W, 3), uint8 or float in [-1, 1], enlarged as :func:`video` does."""
    return encode(path, _enlarge(_check(np.asarray(frame_HWC)[None])), "png", "rgb24", 1, {})


def encode(path: Any, frame_THWC: np.ndarray, codec: str, colours: str, fps: int, options: dict) -> pathlib.Path:
    """Writes frames into ``path`` as they are; of several processes the first one does.

    Args:
      path: the file; its suffix says the format, its parents are made.
      frame_THWC: (T, H, W, 3) uint8.
      codec: FFmpeg's name of the encoder, ``"libx264"`` or ``"png"``.
      colours: FFmpeg's name of what it codes, ``"yuv420p"`` (both sides even) or ``"rgb24"``.
      fps: frames in a second.
      options: of codec and format; what neither knows is ignored by both.

    Raises:
      OSError: the disk is full or closed to us.
      av.FFmpegError: FFmpeg's libraries cannot; with their words.
    """
    # All processes have the same frames; two that write one file would spoil it.
    if not processes.first():
        return pathlib.Path(path)
    # Late: only who makes a film or a picture waits for the libraries.
    import av

    # The suffix stays, for the format of the file is read from it. File and codec take what is theirs of the options.
    with replace_file(path, keep_suffix=True) as fresh, av.open(fresh, "w", container_options=options) as file:
        # More threads would take the cores of those who compute, and each number of them has other bytes.
        stream: Any = file.add_stream(codec, fps, options, pix_fmt=colours, thread_count=1)
        stream.height, stream.width = frame_THWC.shape[1:3]
        for frame_HWC in frame_THWC:
            frame = av.VideoFrame.from_ndarray(frame_HWC).reformat(format=colours, interpolation="BICUBIC", threads=1)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return pathlib.Path(path)


def _check(frame: np.ndarray) -> np.ndarray:
    """Returns (T, H, W, 3) frames as uint8, and refuses what is neither that nor float."""
    frame = np.asarray(frame)
    if frame.ndim != 4 or frame.shape[-1] != 3 or not frame.size:
        raise ValueError(f"expected frames of shape (T, H, W, 3), at least one, got {frame.shape}.")
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
