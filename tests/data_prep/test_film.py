"""Films: many episodes of one cost one decoding of it, and an episode is in memory once."""

from __future__ import annotations

import tracemalloc
from fractions import Fraction

import av
import av.logging
import numpy as np
import pytest

pytest.importorskip("pyarrow")

from data_prep import film, lerobot, to_lerobot
from data_prep.demos import Conventions, Demo, SourceError, Stream
from data_prep.demos import to_episode as make_episode
from tests.data_prep import test_lerobot as sets
from wovr_jax.core import pixels
from wovr_jax.data import episodes as disk
from wovr_jax.types import Episode


def write_film(path, count, size, fps=20):
    shade_T = (np.arange(count) % 50 * 4).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    to_lerobot.film(path, np.broadcast_to(shade_T[:, None, None, None], (count, size, size, 3)), fps)


def test_many_episodes_of_one_film_cost_one_decoding(tmp_path, monkeypatch):
    counts = {"opened": 0, "decoded": 0}
    real_open, real_pull = film.Film._open, film.Film._pull

    def count_open(self, *arguments):
        counts["opened"] += 1
        real_open(self, *arguments)

    def count_pull(self, *arguments):
        frame = real_pull(self, *arguments)
        counts["decoded"] += frame is not None
        return frame

    monkeypatch.setattr(film.Film, "_open", count_open)
    monkeypatch.setattr(film.Film, "_pull", count_pull)
    episodes, steps = 120, 4
    made = [make_film_episode(number, steps) for number in range(episodes)]
    disk.write(tmp_path / "ours", made)
    monkeypatch.setattr(to_lerobot, "EACH", episodes)
    to_lerobot.write(disk.EpisodeSource(tmp_path / "ours"), tmp_path / "set", video=True)
    sets.run(monkeypatch, tmp_path / "set", "--out", tmp_path / "back", "--keep-noops")
    back = disk.read(tmp_path / "back")
    assert len(back) == episodes and counts == {"opened": 1, "decoded": episodes * steps}
    for before, after in zip(made, back, strict=True):
        assert np.abs(before.frame_SHWC[:-1].astype(int) - after.frame_SHWC[:-1]).max() <= 4


def make_film_episode(number, steps, size=32):
    shade_S = 2 * (number + np.arange(steps + 1)) % 250
    frame_SHWC = np.broadcast_to(shade_S[:, None, None, None], (steps + 1, size, size, 3)).astype(np.uint8)
    action_SA = np.random.default_rng(number).uniform(-0.5, 0.5, (steps, 7)).astype(np.float32)
    action_SA[:, 6] = np.where(np.arange(steps) < 2, -1, 1)
    success_S = np.arange(steps + 1) == steps
    return Episode(frame_SHWC, action_SA, success_S, "open the drawer", 0, number, "expert", action_SA)


def test_a_film_is_jumped_over_and_gone_back_in(tmp_path):
    write_film(tmp_path / "a.mp4", 700, 16)
    opened = film.Film(tmp_path / "a.mp4", 20)
    for first in (650, 3, 4, 300, 299):
        frames = list(opened.read(first / 20, 5, "here"))
        assert [round(float(frame.mean()) / 4) for frame in frames] == [(first + i) % 50 for i in range(5)]
    # Backwards and far forwards by a key frame, which is never far; not from the beginning.
    assert opened.decoded < 40
    opened.close()
    assert lerobot.video_frames(tmp_path / "a.mp4", 690, 10, "here").shape == (10, 16, 16, 3)
    with pytest.raises(SourceError, match=r"here: a.mp4 ends after 10 of its 11 frames"):
        lerobot.video_frames(tmp_path / "a.mp4", 690, 11, "here")


def test_a_film_of_another_rate_is_said(tmp_path):
    write_film(tmp_path / "a.mp4", 60, 16, fps=30)
    odd = []
    opened = film.Film(tmp_path / "a.mp4", 20)
    assert len(list(opened.read(0.0, 60, "here", odd))) == 60
    assert odd == ["its film takes 1.97 s for what is 2.95 s of rows"]
    with pytest.raises(SourceError, match=r"ends after 0 of its 5 frames"):
        list(opened.read(9.0, 5, "here"))


def test_an_episode_is_in_memory_once(tmp_path, monkeypatch):
    monkeypatch.setattr(to_lerobot, "EACH", 3)
    steps, size = 40, 256
    disk.write(tmp_path / "ours", [make_film_episode(number, steps, size) for number in range(3)])
    to_lerobot.write(disk.EpisodeSource(tmp_path / "ours"), tmp_path / "set", video=True)
    sets.run(monkeypatch, tmp_path / "set", "--out", tmp_path / "warm")  # what is imported late
    tracemalloc.start()
    try:
        sets.run(monkeypatch, tmp_path / "set", "--out", tmp_path / "back")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.3 * (steps + 1) * size * size * 3


def test_frames_of_dropped_steps_are_never_stored():
    action_TA = np.zeros((6, 7))
    action_TA[[1, 4], 0], action_TA[:, 6] = 0.5, -1
    frames = Stream(6, lambda: (np.full((2, 2, 3), t, np.uint8) for t in range(6)))
    episode = make_episode(Demo("here", frames, action_TA, np.zeros(6, bool), "x"), 0, 0, Conventions())
    assert episode.frame_SHWC[:, 0, 0, 0].tolist() == [1, 4, 5]
    short = Stream(6, lambda: iter([np.zeros((2, 2, 3), np.uint8)]))
    with pytest.raises(SourceError, match="0 of its 3 frames are there"):
        make_episode(Demo("here", short, action_TA, np.zeros(6, bool), "x"), 0, 0, Conventions())


def noise(count, size=64):
    """Blocks that a codec keeps, with a mark in a corner."""
    frame_THWC = np.random.default_rng(0).integers(0, 255, (count, size // 8, size // 4, 3), np.uint8)
    frame_THWC[:, 0, 0] = (255, 0, 0)
    return frame_THWC.repeat(8, axis=1).repeat(8, axis=2)


def encode(path, frame_THWC, times=None, codec="libx264", matrix=None, fps=20, **options):
    """Writes a film whose frames are shown at ``times``, in milliseconds; by default ``1 / fps`` apart."""
    with av.open(path, "w", container_options=options) as file:
        stream = file.add_stream(codec, fps, options, time_base=Fraction(1, 1000), pix_fmt="yuv420p")
        stream.height, stream.width = frame_THWC.shape[1:3]
        stream.codec_context.thread_count = 1
        if matrix:
            stream.set_display_matrix(matrix)
        for number, frame_HWC in enumerate(frame_THWC):
            frame = av.VideoFrame.from_ndarray(frame_HWC)
            frame.pts, frame.time_base = times[number] if times else 1000 * number // fps, Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def read(path, begins, count, odd=None, fps=20):
    opened = film.Film(path, fps)
    try:
        return np.stack(list(opened.read(begins, count, "here", odd)))
    finally:
        opened.close()


def packets(path):
    with av.open(path) as file:
        return [(packet.pos, packet.size) for packet in file.demux(video=0) if packet.size]


def is_close(frame, wanted):
    """Whether frames are the same but for what a codec loses; other frames of noise are 80 levels apart."""
    return np.abs(frame.astype(int) - wanted).mean() < 12


def test_a_film_that_is_smeared_is_said(tmp_path):
    frames, odd = noise(30), []
    path = encode(tmp_path / "a.mp4", frames, g="10")
    begins, size = packets(path)[4]
    data = bytearray(path.read_bytes())
    data[begins + size // 2 : begins + size] = bytes(size - size // 2)
    path.write_bytes(data)
    opened = film.Film(path, 20)
    # The same damage twice is said twice, and the episode that has none is as it was.
    for begins, said in ((0.0, 1), (0.5, 0), (0.0, 1)):
        odd.clear()
        read_10HWC = np.stack(list(opened.read(begins, 10, "here", odd)))
        assert len(odd) == said and all("its film may be damaged, ffmpeg says '" in line for line in odd), odd
        assert said or is_close(read_10HWC, frames[10:20])
    opened.close()


def test_a_packet_that_is_no_packet_costs_its_frame(tmp_path):
    path = encode(tmp_path / "a.mp4", noise(30), g="1")
    begins, size = packets(path)[20]
    data = bytearray(path.read_bytes())
    data[begins : begins + size] = b"\xff" * size
    path.write_bytes(data)
    odd = []
    assert is_close(read(path, 0.0, 20, odd), noise(30)[:20]) and not odd
    with pytest.raises(SourceError, match=r"here: a.mp4 has no frame at 1.000 s; the next is at 1.050 s"):
        read(path, 1.0, 5)
    with pytest.raises(SourceError, match=r"here: a.mp4 ends after 29 of its 30 frames \(.+\)"):
        read(path, 0.0, 30)


def test_a_film_that_was_cut_gives_what_it_has(tmp_path):
    path = encode(tmp_path / "a.mp4", noise(30), movflags="faststart", bf="0")
    begins, size = packets(path)[12]
    path.write_bytes(path.read_bytes()[: begins + size // 2])
    assert is_close(read(path, 0.0, 12), noise(30)[:12])
    with pytest.raises(SourceError, match=r"here: a.mp4 ends after 1[23] of its 30 frames \(.+\)"):
        read(path, 0.0, 30)
    with pytest.raises(SourceError, match=r"here: a.mp4 ends after 0 of its 5 frames"):
        read(path, 1.0, 5)


def test_a_file_that_is_no_film_is_named(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(bytes(range(256)) * 20)
    for reads in (lambda: read(path, 0.0, 5), lambda: film.rate(path, "here")):
        with pytest.raises(SourceError, match=r"here: a.mp4 is damaged \(.+\)"):
            reads()
    with av.open(path, "w") as file:
        sound = file.add_stream("aac", 16000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), "fltp", "mono")
        silence.sample_rate = 16000
        file.mux(sound.encode(silence))
        file.mux(sound.encode())
    with pytest.raises(SourceError, match="here: a.mp4 cannot be decoded: no stream of pictures"):
        film.rate(path, "here")


def test_a_frame_is_known_by_its_time(tmp_path):
    frames, odd = noise(12), []
    times = [0, 50, 100, 160, 195, 250, 300, 350, 900, 950, 1000, 1050]
    path = encode(tmp_path / "a.mp4", frames, times)
    assert is_close(read(path, 0.1, 6, odd), frames[2:8]) and not odd, "a few milliseconds are no other time"
    assert is_close(read(path, 0.9, 4, odd), frames[8:]) and not odd
    assert is_close(read(path, 0.25, 6, odd), frames[5:11])
    assert odd == ["its film takes 0.75 s for what is 0.25 s of rows"]
    with pytest.raises(SourceError, match="has no frame at 0.500 s; the next is at 0.900 s"):
        read(path, 0.5, 2)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_film_may_begin_late(tmp_path, suffix):
    frames = noise(40)
    late = [1000 + 50 * number for number in range(40)]
    path = encode(tmp_path / f"a.{suffix}", frames, late, **({"use_editlist": "0"} if suffix == "mp4" else {}))
    assert is_close(read(path, 0.0, 5), frames[:5]) and is_close(read(path, 1.5, 10), frames[30:])


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_frames_with_b_frames_between_them_come_in_their_order(tmp_path, suffix):
    frames = noise(120)
    opened = film.Film(encode(tmp_path / f"a.{suffix}", frames, g="40", bf="3"), 20)
    for first in (0, 10, 100, 41, 40, 39, 80, 3):
        assert is_close(np.stack(list(opened.read(first / 20, 5, "here"))), frames[first : first + 5])
    opened.close()


def test_a_film_of_av1_is_read(tmp_path):
    if "libsvtav1" not in av.codecs_available:
        pytest.skip("this build of PyAV writes no AV1")
    frames = noise(24)
    # As LeRobot writes its films.
    path = encode(tmp_path / "a.mp4", frames, codec="libsvtav1", crf="10", g="2", preset="10")
    assert is_close(read(path, 0.0, 24), frames) and is_close(read(path, 0.75, 9), frames[15:])
    assert film.rate(path, "here") == 20


ONE = 2**16
TURNS = {
    "counter-clockwise": ((0, -ONE, 0, ONE, 0, 0), lambda frame: np.rot90(frame)),
    "clockwise": ((0, ONE, 0, -ONE, 0, 0), lambda frame: np.rot90(frame, -1)),
    "half": ((-ONE, 0, 0, 0, -ONE, 0), lambda frame: np.rot90(frame, 2)),
    "mirrored": ((-ONE, 0, 0, 0, ONE, 0), lambda frame: frame[:, ::-1]),
    "upside down": ((ONE, 0, 0, 0, -ONE, 0), lambda frame: frame[::-1]),
    "mirrored and turned": ((0, ONE, 0, ONE, 0, 0), lambda frame: frame.swapaxes(0, 1)),
}


@pytest.mark.parametrize("turn", TURNS)
def test_a_film_is_shown_as_its_camera_was_held(tmp_path, turn):
    matrix, turned = TURNS[turn]
    plain = read(encode(tmp_path / "a.mp4", noise(4)), 0.0, 4)
    path = encode(tmp_path / "b.mp4", noise(4), matrix=(*matrix, 0, 0, 2**30))
    np.testing.assert_array_equal(read(path, 0.0, 4), np.stack([turned(frame) for frame in plain]))


def test_a_film_that_is_held_askew_is_refused(tmp_path):
    half = int(ONE / 2**0.5)
    path = encode(tmp_path / "a.mp4", noise(4), matrix=(half, half, 0, -half, half, 0, 0, 0, 2**30))
    with pytest.raises(SourceError, match=r"here: a.mp4 is to be turned by other than right angles"):
        read(path, 0.0, 4)


def test_a_film_may_change_its_size(tmp_path):
    small, large = noise(5, 64), noise(5, 128)
    parts = [encode(tmp_path / "a.ts", small), encode(tmp_path / "b.ts", large, [250 + 50 * n for n in range(5)])]
    path = tmp_path / "c.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    opened = film.Film(path, 20)
    sizes = [frame.shape for frame in opened.read(0.0, 10, "here")]
    opened.close()
    assert sizes == [(64, 128, 3)] * 5 + [(128, 256, 3)] * 5


def test_the_rate_is_told_exactly(tmp_path):
    path = pixels.encode(tmp_path / "a.mp4", noise(4), "libx264", "yuv420p", Fraction(30000, 1001), {})
    assert film.rate(path, "here") == pytest.approx(29.97002997)


def test_what_is_said_of_films_stays_with_them(tmp_path):
    before = av.logging.get_level(), av.logging.get_skip_repeated()
    read(encode(tmp_path / "a.mp4", noise(4)), 0.0, 4)
    assert (av.logging.get_level(), av.logging.get_skip_repeated()) == before
