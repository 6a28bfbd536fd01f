"""The whole loop on mosaics: two cameras and the robot's state in every stage, and the audit of it."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest

from tests.small_run import run_whole, save_parts, small_settings
from wovr_jax.core.disk import read_json
from wovr_jax.data import episodes as disk
from wovr_jax.export import program, source
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.sim.tabletop.table import TabletopConfig
from wovr_jax.world.model import WorldConfig


@pytest.mark.slow
def test_the_loop_runs_on_mosaics_to_a_policy_for_the_robot(tmp_path: pathlib.Path) -> None:
    settings = small_settings(
        save_parts(tmp_path / "parts"),
        policy=dataclasses.replace(VLAConfig.fake(), images=2, proprio=3),
        world=WorldConfig.fake(views=2, state=3),
        sim=dataclasses.replace(TabletopConfig.fake(), wrist=True, strip=16),
    )
    run = tmp_path / "run"
    results = run_whole(settings, run)
    assert [phase["true_success"]["n"] for phase in results["phases"]] == [8, 8, 8]
    assert disk.manifest(run / "stages" / "collect-1" / "episodes")["frame"] == [16, 48, 3]
    assert read_json(run / "stages" / "world-1" / "done.json")
    robot = program.make_robot(source.from_run(run))
    assert robot.camera_shape == (16, 16, 3) and robot.frame_shape == (16, 48, 3)
