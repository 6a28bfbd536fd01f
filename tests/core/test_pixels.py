"""Pictures as numbers and as bytes, and films that any reader plays."""

from __future__ import annotations

import resource
import subprocess
import sys

import av
import imageio_ffmpeg
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.core import disk, pixels


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
    with av.open(path) as file:
        stream = file.streams.video[0]
        assert (stream.codec.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 5)
        read = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(stream)])
    assert read.shape == (5, 264, 280, 3)
    for wanted, frame in zip(frames, read, strict=True):
        # H.264 has half of the colour's pixels, so brightness is compared.
        assert np.abs(frame[4::8, 4::8].mean(-1) - wanted.mean(-1)).mean() < 4
    assert [file.name for file in path.parent.iterdir()] == ["v.mp4"]


def test_ffmpeg_itself_reads_the_same_frames(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (5, 33, 35, 3), np.uint8)
    path = pixels.video(tmp_path / "v.mp4", frames)
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-v",
        "error",
        "-i",
        str(path),
        "-f",
        "rawvideo",
        "-pix_fmt",
        "gray",
        "-",
    ]
    done = subprocess.run(command, capture_output=True, check=True)
    assert not done.stderr
    theirs = np.frombuffer(done.stdout, np.uint8).reshape(5, 264, 280).astype(int)
    with av.open(path) as file:
        ours = np.stack([frame.to_ndarray(format="gray") for frame in file.decode(video=0)]).astype(int)
    # Two versions of one library decode alike; only the way to grey may round.
    assert np.abs(ours - theirs).max() <= 1


def test_video_is_coded_as_asked(tmp_path):
    data = pixels.video(tmp_path / "v.mp4", np.zeros((3, 32, 32, 3), np.uint8)).read_bytes()
    # x264 writes its settings into the film. Options that nothing takes would be dropped without a word.
    assert b" crf=16.0 " in data and b" threads=1 " in data
    assert data.index(b"moov") < data.index(b"mdat"), "a browser begins to play before it has the whole file"


def test_the_same_frames_give_the_same_bytes(tmp_path):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (12, 33, 33, 3), np.uint8)  # 264 pixels wide, which 256 does not divide
    first = pixels.video(tmp_path / "v.mp4", frames).read_bytes()
    for _ in range(4):
        # What lies in memory that is used again must not get into the film.
        stirred = [rng.integers(0, 255, int(size), np.uint8) for size in rng.integers(1000, 400_000, 40)]
        del stirred[::2]
        assert pixels.video(tmp_path / "w.mp4", frames).read_bytes() == first


def test_an_image_has_every_byte(tmp_path):
    frame = np.random.default_rng(0).integers(0, 256, (33, 65, 3), np.uint8)
    path = pixels.image(tmp_path / "a" / "p.png", frame)
    assert path.read_bytes().startswith(b"\x89PNG") and [file.name for file in path.parent.iterdir()] == ["p.png"]
    with av.open(path) as file:
        (read,) = [each.to_ndarray(format="rgb24") for each in file.decode(video=0)]
    np.testing.assert_array_equal(read, frame.repeat(8, axis=0).repeat(8, axis=1))


def test_a_film_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = pixels.video(tmp_path / "v.mp4", np.zeros((2, 32, 32, 3), np.uint8))
    before = path.read_bytes()
    noise = np.random.default_rng(0).integers(0, 255, (8, 256, 256, 3), np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # as a full disk, to the system's calls
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            pixels.video(path, noise)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the disk is full" in disk.not_written(caught.value, tmp_path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["v.mp4"]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(pixels.processes, "first", lambda: False)
    assert pixels.video(tmp_path / "v.mp4", np.zeros((2, 32, 32, 3), np.uint8)) == tmp_path / "v.mp4"
    assert not list(tmp_path.iterdir())


def test_the_libraries_of_films_are_imported_late():
    line = "import sys, wovr_jax.core.pixels; sys.exit('av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", line], check=False).returncode == 0


def test_video_takes_float_frames_and_refuses_others(tmp_path):
    pixels.video(tmp_path / "v.mp4", np.zeros((2, 32, 32, 3), np.float32))
    with pytest.raises(ValueError, match=r"\(T, H, W, 3\)"):
        pixels.video(tmp_path / "w.mp4", np.zeros((2, 32, 32), np.uint8))
    with pytest.raises(ValueError, match=r"at least one, got \(0, 32, 32, 3\)"):
        pixels.video(tmp_path / "w.mp4", np.zeros((0, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="int64"):
        pixels.video(tmp_path / "w.mp4", np.zeros((2, 32, 32, 3), np.int64))
