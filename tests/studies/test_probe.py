"""The action probe: what it says of a perfect world, of one that mirrors, and of one that stands still."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.sim import embedded
from wovr_jax.sim.tabletop import eye
from wovr_jax.sim.tabletop import table as tabletop
from wovr_jax.sim.tabletop.table import TabletopConfig
from wovr_jax.studies import open_loop, probe
from wovr_jax.world.model import WorldConfig

SIM = TabletopConfig()
CFG = WorldConfig.tabletop()
SEEDS = np.arange(6)
ROOT = pathlib.Path(__file__).parents[2]


def true_world(cfg, params, frame_BHWC, action_BNTA, key):
    """The simulator in the place of the learned world; the layouts are those the probe drew."""
    seed_B = jnp.asarray(np.resize(SEEDS, len(frame_BHWC)), jnp.int32)
    return probe.true_frames(seed_B, action_BNTA[:, 0], SIM)[1][:, None]


def measured(monkeypatch: pytest.MonkeyPatch, play) -> dict:
    monkeypatch.setattr(open_loop, "play", play)
    return probe.probe(CFG, {}, SIM, SEEDS, jax.random.key(0))


def test_the_eye_finds_the_gripper_anywhere_open_and_closed() -> None:
    state = embedded.reset_batch(jnp.arange(32), SIM)
    place = jax.random.uniform(jax.random.key(0), (32, 2), minval=0.1, maxval=0.9)
    for closed in (False, True):
        shown = state.replace(gripper=place, closed=jnp.full(32, closed))
        seen = eye.locate_gripper(jax.vmap(lambda s: tabletop.render(s, SIM))(shown))
        assert float(jnp.abs(seen.xy - place).max() * SIM.size) < 0.5  # pixels
        assert float(jnp.abs(seen.closed - closed).max()) < 0.1
        assert float(seen.area.min()) > 0.0015  # a third of the disc or more, whatever lies below it
    empty = eye.locate_gripper(jax.vmap(lambda s: tabletop.render(s, SIM))(state.replace(gripper=place + 5.0)))
    assert float(empty.area.max()) < 0.0005


def test_a_perfect_world_follows_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(monkeypatch, true_world)
    for axis in ("x", "y"):
        assert found[axis] == pytest.approx({"sign": 1, "slope": 1, "correlation": 1, "across": 0, "lost": 0}, abs=1e-4)
    assert found["jaws"] == pytest.approx({"sign": 1, "slope": 1, "lost": 0}, abs=1e-4)


def test_a_world_that_turns_every_command_around_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(monkeypatch, lambda cfg, params, frame, action, key: true_world(cfg, params, frame, -action, key))
    assert found["x"]["sign"] < 0.1
    assert found["x"]["slope"] < -0.5
    assert found["jaws"]["sign"] == 0.0
    assert found["jaws"]["slope"] == pytest.approx(-1.0, abs=1e-3)


def test_a_world_that_stands_still_follows_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def still(cfg, params, frame, action, key):
        return jnp.repeat(frame[:, None, None], 8, axis=2)

    found = measured(monkeypatch, still)
    assert found["x"]["sign"] == found["y"]["sign"] == 0.0
    assert abs(found["x"]["slope"]) < 1e-6
    assert found["jaws"]["slope"] == pytest.approx(0.0, abs=1e-6)


def test_a_world_that_loses_the_gripper_is_not_credited(monkeypatch: pytest.MonkeyPatch) -> None:
    def blank(cfg, params, frame, action, key):
        return jnp.full((len(frame), 1, 8, 32, 32, 3), 0.2)

    found = measured(monkeypatch, blank)
    assert found["y"]["lost"] == found["jaws"]["lost"] == 1.0
    assert found["y"]["sign"] == found["jaws"]["sign"] == 0.0


def test_the_picture_shows_true_above_imagined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_loop, "play", lambda *args: -true_world(*args))
    monkeypatch.setattr(sys.modules[__name__], "SEEDS", np.array([4]))
    drawn = probe.sheet(CFG, {}, SIM, 4, jax.random.key(0))
    assert drawn.dtype == np.uint8 and drawn.shape == (3 * 76, 2 * (12 + 32 + 3 + 5 * 32), 3)
    true, imagined = drawn[6:38, 6 + 35 + 32 : 6 + 35 + 64].astype(int), drawn[38:70, 6 + 35 + 32 : 6 + 35 + 64]
    np.testing.assert_allclose(true + imagined, 255, atol=1)
    np.testing.assert_array_equal(drawn[10, 6 + 32], probe.TRUE_RGB)
    np.testing.assert_array_equal(drawn[50, 6 + 32], probe.IMAGINED_RGB)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--run", "nowhere"], "nowhere is not a run folder: there is no config.json in it."),
        (["--run", "young"], "young holds no finished world model yet"),
        (["--run", "old", "--stage", "world-7"], "old has no finished world model world-7; it has world-0."),
    ],
)
def test_the_door_says_what_is_wrong(tmp_path: pathlib.Path, arguments: list[str], says: str) -> None:
    for name in ("young", "old"):
        (tmp_path / name).mkdir()
        settings = {"job": "pace", "policy": {"size": "fake"}, "world": {"size": "fake"}, "reward": {"size": "fake"}}
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
    (tmp_path / "old" / "stages" / "world-0" / "dit").mkdir(parents=True)
    (tmp_path / "old" / "stages" / "world-0" / "done.json").write_text("{}")
    command = [sys.executable, ROOT / "launch" / "study.py", "probe", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr
