"""Statistics in OpenVLA's form, and what happens to a dimension that never moves."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from data_prep.convert import save_statistics
from wovr_jax.data import normalize
from wovr_jax.data.normalize import StatisticsError
from wovr_jax.types import Episode


def episodes() -> list[Episode]:
    rng = np.random.default_rng(0)
    made = []
    for seed in range(3):
        label = np.zeros((50, 7), np.float32)
        label[:, :2] = rng.uniform(-0.5, 0.8, (50, 2))
        label[:, 3] = 0.25
        label[:, 6] = np.where(np.arange(50) < 40, -1.0, 1.0)  # open, then closed
        frame = np.zeros((51, 2, 2, 3), np.uint8)
        made.append(Episode(frame, label + 0.1, np.zeros(51, bool), "x", 0, seed, "expert", label))
    return made


def load(path: pathlib.Path, key: str | None = None) -> dict[str, Any]:
    return normalize.entry(normalize.table(path), key, str(path))["action"]


def test_form_and_values(tmp_path):
    table = normalize.statistics(episodes(), "tabletop")
    label = np.concatenate([episode.label_SA for episode in episodes()]).astype(np.float64)
    action = table["tabletop"]["action"]
    assert set(action) == {"mean", "std", "max", "min", "q01", "q99", "mask"}
    assert table["tabletop"]["num_transitions"] == 150 and table["tabletop"]["num_trajectories"] == 3
    assert action["mask"] == [True] * 6 + [False]
    np.testing.assert_allclose(action["q01"][0], np.quantile(label[:, 0], 0.01))
    np.testing.assert_allclose(action["std"][1], label[:, 1].std(ddof=0))
    # The gripper of the file is OpenVLA's: 1 open, 0 closed; four fifths of the steps are open.
    assert action["mean"][6] == pytest.approx(0.8) and (action["min"][6], action["max"][6]) == (0.0, 1.0)
    save_statistics(tmp_path / "a" / "dataset_statistics.json", table)
    assert json.loads((tmp_path / "a" / "dataset_statistics.json").read_text()) == table
    assert normalize.load(tmp_path / "a")["action"] == action


def test_a_motion_that_never_changes_stays_a_constant():
    action = normalize.statistics(episodes(), "t")["t"]["action"]
    assert action["q01"][2:6] == action["q99"][2:6] == [0.0, 0.25, 0.0, 0.0]


def test_keys(tmp_path):
    entry = normalize.statistics(episodes(), "k")["k"]
    path = tmp_path / "dataset_statistics.json"
    save_statistics(path, {"libero_goal_no_noops": entry, "other": entry})
    assert normalize.load(tmp_path, "libero_goal") == entry
    with pytest.raises(
        StatisticsError, match="expected an entry 'libero_10', the file has libero_goal_no_noops, other"
    ):
        normalize.load(tmp_path, "libero_10")
    with pytest.raises(StatisticsError, match="exactly one entry"):
        normalize.load(tmp_path)


def test_malformed(tmp_path):
    with pytest.raises(StatisticsError, match="cannot be read"):
        normalize.table(tmp_path / "nothing.json")
    action = normalize.statistics(episodes(), "k")["k"]["action"]
    with pytest.raises(StatisticsError, match="lack q99"):
        save_statistics(tmp_path / "x.json", {"k": {"action": {k: v for k, v in action.items() if k != "q99"}}})
    with pytest.raises(StatisticsError, match="unequal length"):
        normalize.check(action | {"mask": [True]}, "x")
    with pytest.raises(StatisticsError, match="q01 <= q99"):
        normalize.check(action | {"q01": [2.0] * 7}, "x")
    with pytest.raises(StatisticsError, match="no episodes"):
        normalize.statistics([], "k")
