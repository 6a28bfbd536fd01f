"""Pictures as numbers and as bytes, and films that any reader plays."""

from __future__ import annotations

import subprocess

import imageio_ffmpeg
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.core import pixels


def test_bytes_survive_the_way_to_numbers_and_back():
    every = np.arange(256, dtype=np.uint8)
    assert np.array_equal(pixels.to_uint8(pixels.to_float(every)), every)
    assert pixels.to_float(every)[[0, 255]].tolist() == [-1.0, 1.0]
    assert pixels.to_uint8(np.array([-1.2, 0.9999, 1.2])).tolist() == [0, 255, 255], "clipped, and rounded up"


def test_numpy_and_the_device_give_the_same_bytes():
    every = np.arange(256, dtype=np.uint8)
    host = pixels.to_float(every)
    assert isinstance(host, np.ndarray) and host.dtype == np.float32
    for device in (pixels.to_float(jnp.asarray(every)), jax.jit(pixels.to_float)(every)):
        # XLA multiplies by 1 / 127.5 where numpy divides, so the numbers differ by a rounding and the bytes do not.
        assert isinstance(device, jax.Array) and device.dtype == np.float32
        np.testing.assert_allclose(device, host, atol=2e-7)
        assert np.array_equal(pixels.to_uint8(device), every)


def test_two_films_stand_side_by_side_with_a_white_gap():
    left, right = np.zeros((5, 4, 32, 3), np.uint8), np.full((5, 4, 32, 3), 7, np.uint8)
    film = pixels.side_by_side(left, right)
    assert film.shape == (5, 4, 66, 3) and film.dtype == np.uint8
    assert (film[:, :, :32] == 0).all() and (film[:, :, 32:34] == 255).all() and (film[:, :, 34:] == 7).all()


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
