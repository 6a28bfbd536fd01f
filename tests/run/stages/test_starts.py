"""Start states from outside a run: what fits is numbered as the environment numbers its tasks, the rest is refused."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from data_prep import rlinf_starts
from wovr_jax.core.config import ConfigError
from wovr_jax.data import starts as start_states
from wovr_jax.run.stages.starts import read_starts
from wovr_jax.types import NULL_ACTION

SUITE = ("milk", "apple", "bread")
"""In an order of its own, as LIBERO's suites have."""


def _trajectory(instruction: str, frames: int) -> rlinf_starts.Trajectory:
    frame, action = np.full((frames, 16, 16, 3), ord(instruction[0]), np.uint8), np.tile(NULL_ACTION, (frames, 1))
    return rlinf_starts.Trajectory(instruction, frame, action.astype(np.float32), instruction, 0)


def _released(folder: pathlib.Path, *frames: int) -> str:
    """Start states of three tasks as ``data_prep.rlinf_starts`` writes them, and their folder."""
    files = [_trajectory(instruction, count) for count in frames for instruction in SUITE]
    tasks = rlinf_starts.tasks(files)
    assert tasks == ["apple", "bread", "milk"]
    start_states.save(folder, rlinf_starts.to_starts(files, tasks), meta={"tasks": tasks})
    return str(folder)


def test_released_start_states_get_the_task_numbers_of_the_environment(tmp_path: pathlib.Path) -> None:
    table = read_starts(_released(tmp_path / "goal", 1, 9), 1 / 3, 4, (16, 16), SUITE)
    assert table is not None and (len(table), table.initials) == (6, 3)
    shown = [SUITE[task][0] for task in table.task_K.tolist()]
    assert [chr(level) for level in table.anchor_KHWC[:, 0, 0, 0]] == shown
    assert read_starts("", 1 / 3, 4, (16, 16), SUITE) is None


def test_what_does_not_fit_is_refused_at_once(tmp_path: pathlib.Path) -> None:
    where = _released(tmp_path / "goal", 1)
    with pytest.raises(ConfigError) as refusal:
        read_starts(where, 0.5, 3, (32, 32), ("milk", "apple"))
    for part in (
        "config.start_states: ",
        "expected 3 memory frames, as the world model has (world.memory), got 4",
        "expected frames of (32, 32) pixels, as the environment draws them, got (16, 16)",
        "expected tasks of the environment, got ['bread']",
        "expected keyframes for starts.share=0.5, got episode starts only",
    ):
        assert part in str(refusal.value)
    assert read_starts(where, 0.0, 4, (16, 16), SUITE) is not None
    with pytest.raises(ConfigError, match=r"config\.start_states: no start states at .*nowhere"):
        read_starts(str(tmp_path / "nowhere"), 0.0, 4, (16, 16), SUITE)


def test_a_simulator_can_follow_only_from_states_that_say_where_they_began(tmp_path: pathlib.Path) -> None:
    where = _released(tmp_path / "goal", 1, 9)
    with pytest.raises(ConfigError, match=r"start_states: .*expected initial states.* use evaluate\.closed=0"):
        read_starts(where, 1 / 3, 4, (16, 16), SUITE, followed=True)


def test_a_table_that_names_no_tasks_has_those_of_the_environment(tmp_path: pathlib.Path) -> None:
    table = rlinf_starts.to_starts([_trajectory(instruction, 1) for instruction in SUITE], SUITE)
    start_states.save(tmp_path / "old", table)
    np.testing.assert_array_equal(read_starts(str(tmp_path / "old"), 0.0, 4, (16, 16), SUITE).task_K, [0, 1, 2])
    with pytest.raises(ConfigError, match=r"expected tasks of the environment, got \[2\]"):
        read_starts(str(tmp_path / "old"), 0.0, 4, (16, 16), SUITE[:2])
