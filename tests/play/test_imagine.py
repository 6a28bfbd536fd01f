"""launch/tools/imagine.py: films of recorded actions in a run's world model, as recordings that a person can label."""

from __future__ import annotations

import pathlib

import numpy as np

from tests.label.small import record
from tests.play.small import THRESHOLD
from wovr_jax.data import episodes as disk
from wovr_jax.label.store import Store
from wovr_jax.play.programs import Programs
from wovr_jax.play.session import Session


def test_films_begin_with_the_recording_and_follow_its_actions(
    opened, run: pathlib.Path, programs: Programs, tmp_path: pathlib.Path
) -> None:
    source = disk.EpisodeSource(run / "stages" / "demonstrations" / "episodes")
    for number in range(3):
        disk.write(tmp_path / "recordings" / f"2026-{number}", [source[number]])
    Store(tmp_path / "recordings", "ada").mark(1, "discard", None, None)
    status, out, _ = opened("tools/imagine.py", run, tmp_path / "recordings", "--out", tmp_path / "films", "--seed", 3)
    assert status == 0 and [pathlib.Path(line).name for line in out.split()] == ["2026-0", "2026-2"]
    (film,) = disk.read(tmp_path / "films" / "2026-2")
    before = source[2]
    steps = len(before.action_SA) // programs.chunk * programs.chunk
    np.testing.assert_array_equal(film.action_SA, before.action_SA[:steps])
    np.testing.assert_array_equal(film.frame_SHWC[0], before.frame_SHWC[0])
    assert film.origin == {"imagined": "2026-2", "run": "small", "world": 1, "noise": 3}
    # The same as a person would see who played these actions.
    session = Session(programs)
    session.begin(2, 0, 3)
    np.testing.assert_array_equal(programs.source.starts.anchor_KHWC[2], before.frame_SHWC[0])
    chunk = session.step(before.action_SA[: programs.chunk])
    # Another program, whose last digits may round to the next of 256 levels.
    apart = film.frame_SHWC[1 : programs.chunk + 1].astype(int) - chunk.imagined_THWC
    assert np.abs(apart).max() <= 1 and (apart != 0).mean() < 0.01
    assert chunk.prob_T is not None
    np.testing.assert_array_equal(film.success_S[1 : programs.chunk + 1], chunk.prob_T > THRESHOLD)
    # And a person says from where it lies.
    store = Store(tmp_path / "films", "ada")
    assert store.mark(1, "failure", None, 4).lies_from == 4


def test_what_it_cannot_imagine_is_said(opened, run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    status, _, _ = opened("tools/imagine.py", run, tmp_path / "none", "--out", tmp_path / "films")
    assert "no recordings in it" in status
    source = disk.EpisodeSource(run / "stages" / "demonstrations" / "episodes")
    record(tmp_path / "recordings", 1)
    status, _, _ = opened("tools/imagine.py", run, tmp_path / "recordings", "--out", tmp_path / "films")
    size = list(source[0].frame_SHWC.shape[1:])
    assert f"expected frames of {size} and at least 8 steps, got [8, 8, 3] and 6" in status
    assert not (tmp_path / "films").exists()
