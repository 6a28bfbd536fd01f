"""Names of data sets come from the folder that says what is in it, not from the last one."""

from __future__ import annotations

import pytest

from wovr_jax.data.naming import name_of, says_nothing, statistics_key

COMMIT = "6ce6aaaaabdbe590b1eef5cd29c0d33f14a08551"


@pytest.mark.parametrize(
    "path, name",
    [
        ("/sets/modified_libero_rlds/libero_spatial_no_noops/1.0.0", "libero_spatial_no_noops"),
        ("/cache/datasets--openvla--bridge_orig/snapshots/" + COMMIT, "bridge_orig"),
        ("/cache/models--moojink--openvla-7b-oft/snapshots/" + COMMIT + "/data", "openvla-7b-oft"),
        ("/sets/pick_cubes/v2.1/data", "pick_cubes"),
        ("/sets/pick_cubes/a1b2c3d", "pick_cubes"),
        ("/runs/spatial/checkpoints_best/global_step_120", "checkpoints_best"),
        ("/sets/libero_10", "libero_10"),
        ("/sets/cafe", "cafe"),  # hexadecimal by chance
    ],
)
def test_the_nearest_folder_that_says_something(path, name):
    assert name_of(path) == name


def test_a_link_keeps_the_name_it_was_given(tmp_path, monkeypatch):
    (tmp_path / "volume" / "x71").mkdir(parents=True)
    (tmp_path / "libero_goal").symlink_to(tmp_path / "volume" / "x71")
    assert name_of(tmp_path / "libero_goal") == "libero_goal"
    (tmp_path / "drawers" / "1.0.0").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "drawers" / "1.0.0")
    assert name_of(".") == "drawers"


def test_statistics_have_the_name_that_users_look_for():
    assert statistics_key("/sets/libero_goal/1.0.0") == "libero_goal_no_noops"
    assert statistics_key("/sets/libero_goal_no_noops/1.0.0") == "libero_goal_no_noops"
    assert statistics_key("/sets/libero_goal/1.0.0", has_noops=True) == "libero_goal"


def test_a_path_that_says_nothing_is_refused():
    with pytest.raises(ValueError, match="give its name with --key"):
        name_of("/data/1.0.0")
    assert says_nothing("1.0.0") and not says_nothing("libero_90")
