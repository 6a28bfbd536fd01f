"""The log, videos, and numbers with known answers."""

from __future__ import annotations

import subprocess

import imageio_ffmpeg
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.core import pixels, stats
from wovr_jax.core.log import Log, read_metrics


def test_log_writes_lines_and_rewinds(tmp_path):
    with Log(tmp_path) as log:
        for step in (10, 20, 30):
            log.scalars("sft", step, {"loss": jnp.float32(1 / step), "rate": float("nan")})
        log.scalars("grpo", 30, {"loss": 2})
        log.rewind("sft", 20)
    lines = read_metrics(tmp_path)
    assert [(line["stage"], line["step"]) for line in lines] == [("sft", 10), ("sft", 20), ("grpo", 30)]
    assert lines[0]["loss"] == pytest.approx(0.1) and lines[0]["rate"] is None
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    log = Log(tmp_path, tensorboard=False)
    log.scalars("sft", 1, {"loss": 1})
    with log.path.open("a") as file:
        file.write('{"stage": "sft", "st')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    log.rewind("sft", 0)
    assert read_metrics(tmp_path) == []


def test_reserved_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="reserved"):
        Log(tmp_path, tensorboard=False).scalars("sft", 1, {"step": 3})


def test_video_is_enlarged_and_readable(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (5, 33, 35, 3), np.uint8)
    path = pixels.video(tmp_path / "a" / "v.mp4", frames, fps=5)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert b"264x280" in done.stderr.replace(b"280x264", b"264x280") and b"5 fps" in done.stderr
    read = np.frombuffer(done.stdout, np.uint8).reshape(5, 264, 280, 3)
    np.testing.assert_allclose(read[2, 4::8, 4::8].mean(), frames[2].mean(), atol=6)
    assert [file.name for file in path.parent.iterdir()] == ["v.mp4"]


def test_video_takes_float_frames_and_refuses_others(tmp_path):
    pixels.video(tmp_path / "v.mp4", np.zeros((2, 32, 32, 3), np.float32))
    with pytest.raises(ValueError, match=r"\(T, H, W, 3\)"):
        pixels.video(tmp_path / "w.mp4", np.zeros((2, 32, 32), np.uint8))
    with pytest.raises(ValueError, match="int64"):
        pixels.video(tmp_path / "w.mp4", np.zeros((2, 32, 32, 3), np.int64))


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_published_values(successes, n, low, high):
    assert stats.wilson(successes, n, 1.959964) == pytest.approx((low, high), abs=5e-5)


def test_wilson_edges():
    assert stats.wilson(0, 0) == (0.0, 1.0)
    assert stats.wilson(5, 5)[1] == 1.0
    with pytest.raises(ValueError, match="got 6 of 5"):
        stats.wilson(6, 5)


def test_difference_published_value():
    # Newcombe 1998, Statistics in Medicine 17:873, table II: 56/70 against 48/80, method 10.
    assert stats.difference(56, 70, 48, 80, 1.959964) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_pairing_narrows_and_covers():
    rng = np.random.default_rng(0)
    covered, narrower = 0, 0
    for _ in range(400):
        hardness = rng.uniform(size=60)
        base, ours = hardness < 0.4, (hardness < 0.5) ^ (rng.uniform(size=60) < 0.1)
        gain, low, high = stats.paired_difference(ours, base)
        assert low <= gain <= high and gain == pytest.approx(ours.mean() - base.mean())
        _, wide_low, wide_high = stats.difference(int(ours.sum()), 60, int(base.sum()), 60)
        narrower += high - low < wide_high - wide_low
        covered += low <= 0.1 <= high  # 0.5 + 0.1 (1 - 2 * 0.5) - 0.4
    assert narrower == 400
    assert 0.92 < covered / 400 <= 1.0


def test_paired_difference_edges():
    assert stats.paired_difference([], []) == (0.0, -1.0, 1.0)
    gain, low, high = stats.paired_difference([True] * 20, [False] * 20)
    assert gain == 1.0 and 0.6 < low < 1.0 and high == 1.0
    with pytest.raises(ValueError, match="two equal lists"):
        stats.paired_difference([True], [True, False])


def test_psnr_by_hand():
    a = jnp.zeros((2, 4, 4, 3))
    b = a.at[1].set(0.2)  # error 0.04 against a span of 2: 10 log10(4 / 0.04) = 20 dB
    np.testing.assert_allclose(stats.psnr(b, a), [100.0, 20.0], rtol=1e-5)


def test_ssim_against_a_window_by_window_computation():
    key = jax.random.key(0)
    a = jax.random.uniform(key, (2, 14, 12, 3), minval=-1)
    b = jnp.clip(a + 0.3 * jax.random.normal(key, a.shape), -1, 1)
    x, y = (np.asarray(frame, np.float64) / 2 + 0.5 for frame in (a, b))
    weight = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    weight = np.outer(weight, weight) / weight.sum() ** 2
    expected = np.zeros((2, 4, 2, 3))
    for n, i, j, c in np.ndindex(expected.shape):
        p, q = x[n, i : i + 11, j : j + 11, c], y[n, i : i + 11, j : j + 11, c]
        mp, mq = (weight * p).sum(), (weight * q).sum()
        vp, vq, cov = (
            (weight * (p - mp) ** 2).sum(),
            (weight * (q - mq) ** 2).sum(),
            (weight * (p - mp) * (q - mq)).sum(),
        )
        expected[n, i, j, c] = (2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4))
    np.testing.assert_allclose(stats.ssim(a, b), expected.mean((1, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(stats.ssim(a, a), [1, 1], atol=1e-5)
    with pytest.raises(ValueError, match="11 x 11"):
        stats.ssim(a[:, :10], a[:, :10])
