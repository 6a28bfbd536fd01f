"""Scalars of a run, videos, intervals for success rates, PSNR and SSIM."""

from __future__ import annotations

import json
import math
import os
import pathlib
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

import imageio_ffmpeg
import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax import processes

RESERVED = ("stage", "step", "time")
VIDEO_PIXELS = 256
"""Videos and grids are enlarged until their shorter side has at least this many pixels."""


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


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval (low, high) of a success rate; (0, 1) for no trials."""
    if not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n, got {successes} of {n}.")
    if n == 0:
        return 0.0, 1.0
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # At 0 and n of n one end is exact; rounding must not move it.
    return (0.0 if successes == 0 else max(0.0, centre - half)), (1.0 if successes == n else min(1.0, centre + half))


def difference(successes: int, n: int, base_successes: int, base_n: int, z: float = 1.96) -> tuple[float, float, float]:
    """Gain in success rate over independent trials of a base: (gain, low, high).

    Newcombe's hybrid score interval (Statistics in Medicine 17:873, 1998, method 10).
    """
    if not n or not base_n:
        return 0.0, -1.0, 1.0
    ends, base_ends = wilson(successes, n, z), wilson(base_successes, base_n, z)
    return _hybrid(successes / n, ends, base_successes / base_n, base_ends, 0.0)


def paired_difference(
    success: Sequence[bool] | np.ndarray, base: Sequence[bool] | np.ndarray, z: float = 1.96
) -> tuple[float, float, float]:
    """Gain in success rate over a base that ran from the same start states: (gain, low, high).

    ``success[i]`` and ``base[i]`` are outcomes of the same start. Newcombe's hybrid score
    interval for paired proportions (Statistics in Medicine 17:2635, 1998, method 10): the
    correlation of the outcomes narrows the interval of :func:`difference`.
    """
    won, base_won = np.asarray(success, bool), np.asarray(base, bool)
    if won.shape != base_won.shape or won.ndim != 1:
        raise ValueError(f"expected two equal lists of outcomes, got shapes {won.shape} and {base_won.shape}.")
    n = len(won)
    if n == 0:
        return 0.0, -1.0, 1.0
    both, neither = int((won & base_won).sum()), int((~won & ~base_won).sum())
    gained, lost = int((won & ~base_won).sum()), int((~won & base_won).sum())
    margins = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    excess = both * neither - gained * lost
    # Newcombe's continuity correction, applied to a positive correlation only.
    excess = max(excess - n / 2, 0.0) if excess > 0 else excess
    correlation = excess / math.sqrt(margins) if margins else 0.0
    ours, theirs = both + gained, both + lost
    return _hybrid(ours / n, wilson(ours, n, z), theirs / n, wilson(theirs, n, z), correlation)


def gain(success: Sequence[bool] | np.ndarray, base: Sequence[bool] | np.ndarray) -> dict[str, float]:
    """``paired_difference`` as results keep it: ``gain``, and ``low`` and ``high`` of its 95 % interval."""
    return dict(zip(("gain", "low", "high"), paired_difference(success, base), strict=True))


def _hybrid(
    rate: float, ends: tuple[float, float], base_rate: float, base_ends: tuple[float, float], correlation: float
) -> tuple[float, float, float]:
    def reach(ours: float, theirs: float) -> float:
        return math.sqrt(max(0.0, ours**2 - 2 * correlation * ours * theirs + theirs**2))

    gain = rate - base_rate
    down = reach(rate - ends[0], base_ends[1] - base_rate)
    up = reach(ends[1] - rate, base_rate - base_ends[0])
    return gain, max(-1.0, gain - down), min(1.0, gain + up)


def psnr(frame: jax.Array, reference: jax.Array, span: float = 2.0) -> jax.Array:
    """Peak signal to noise ratio in dB of (..., H, W, C) frames, one value for each frame.

    ``span`` is the range of the pixels, 2 for [-1, 1]. Equal frames give 100 dB, not infinity.
    """
    error = jnp.mean(jnp.square(frame - reference), axis=(-3, -2, -1))
    return 10.0 * jnp.log10(span**2 / jnp.maximum(error, span**2 * 1e-10))


def ssim(frame: jax.Array, reference: jax.Array, span: float = 2.0) -> jax.Array:
    """Structural similarity of (..., H, W, C) frames, one value for each frame.

    Wang et al. 2004: Gaussian window of 11 x 11 pixels and sigma 1.5, K1 0.01, K2 0.03, mean
    over full windows and channels. Frames need at least 11 pixels on each side.
    """
    if min(frame.shape[-3:-1]) < 11:
        raise ValueError(f"SSIM needs frames of at least 11 x 11 pixels, got {frame.shape[-3:-1]}.")
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    mean_a, mean_b = _blur(frame), _blur(reference)
    # Mean of the product minus product of the means cancels: shift the pixels to the frame's mean first.
    offset = jnp.mean(reference, axis=(-3, -2), keepdims=True)
    a, b = frame - offset, reference - offset
    var_a = _blur(a * a) - jnp.square(mean_a - offset)
    var_b = _blur(b * b) - jnp.square(mean_b - offset)
    covariance = _blur(a * b) - (mean_a - offset) * (mean_b - offset)
    # The formula is for pixels that begin at 0.
    mean_a, mean_b = mean_a + span / 2, mean_b + span / 2
    light = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return jnp.mean(light * (2 * covariance + c2) / (var_a + var_b + c2), axis=(-3, -2, -1))


def _blur(frame: jax.Array) -> jax.Array:
    """Gaussian mean over each full 11 x 11 window, as two banded matrix products."""
    rows, columns = _band(frame.shape[-3]), _band(frame.shape[-2])
    return jnp.einsum("ph,...hwc,qw->...pqc", rows, frame, columns, precision="highest")


def _band(size: int) -> jax.Array:
    weight = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    weight /= weight.sum()
    return jnp.asarray(sum(np.eye(size - 10, size, k) * weight[k] for k in range(11)), jnp.float32)
