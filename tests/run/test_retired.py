"""Run folders that an earlier version of the settings made: they go on, and what differs is said."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from configs import pace as presets
from tests.run.asked import changed
from wovr_jax.core import config
from wovr_jax.core.config import ConfigError
from wovr_jax.run.folder import Run, RunError
from wovr_jax.run.reader import read_recipe
from wovr_jax.run.recipe import Recipe


def _old(**changes: Any) -> dict[str, Any]:
    """``config.json`` as it was when the temperature stood in it twice, without a setting that is new since."""
    settings = changed(**changes)
    settings["learner"]["temperature"] = settings["temperature"]
    settings["evaluate"]["batch"] = 128
    del settings["world_train"]["validate_every"], settings["learner"]["lora"]
    return settings


def _folder(tmp_path: pathlib.Path, settings: dict[str, Any]) -> pathlib.Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    return tmp_path / "run"


OLD = pathlib.Path(__file__).with_name("old_config.json")
"""Written by ``--config=configs/pace.py:tiny --config.seed=3`` before settings had ranges."""


def test_a_run_of_before_goes_on(tmp_path: pathlib.Path) -> None:
    old = json.loads(OLD.read_text())
    assert old["learner"]["temperature"] == 1.0 and old["evaluate"]["batch"] == 128
    today = config.from_dict(Recipe, json.loads(presets.get_config("tiny").to_json()) | {"seed": 3, "temperature": 1.0})
    today = dataclasses.replace(today, evaluate=dataclasses.replace(today.evaluate, temperatures=(0.5, 0.3)))
    folder = _folder(tmp_path, old)
    # What it did before it could be said is not what a new run does, and is not changed half way without a word.
    with pytest.raises(RunError, match=r"\(4 settings differ\)(?s:.*)starts\.rule: 'last_event' there") as refused:
        Run(folder, config.to_dict(today))
    assert "starts.deadline: False there, True asked" in str(refused.value)
    assert f"starts.room: 0 there, {today.starts.room} asked" in str(refused.value)
    former = dataclasses.replace(today.starts, rule="last_event", deadline=False, room=0, share=0.5)
    asked = dataclasses.replace(today, starts=former)
    Run(folder, config.to_dict(asked))
    assert json.loads((folder / "config.json").read_text()) == old  # and stays as it was written
    assert read_recipe(old) == asked


def test_settings_that_are_new_count_at_their_default_only(tmp_path: pathlib.Path) -> None:
    folder = _folder(tmp_path, _old())
    Run(folder, changed())
    with pytest.raises(RunError, match=r"\(1 settings differ\)(?s:.*)world_train\.validate_every: 0 there, 9 asked"):
        Run(folder, changed(world_train__validate_every=9))


def test_a_retired_setting_that_contradicts_is_a_difference(tmp_path: pathlib.Path) -> None:
    folder = _folder(tmp_path, _old(temperature=1.6))
    with pytest.raises(RunError, match=r"\(2 settings differ\)(?s:.*)learner\.temperature: 1\.6 there, 1\.0 asked"):
        Run(folder, changed(temperature=1.0))
    with pytest.raises(ConfigError, match=r"config\.learner\.temperature: 1\.6 contradicts temperature=1\.0"):
        read_recipe(_old(temperature=1.6) | {"temperature": 1.0})


def test_a_folder_whose_seed_would_be_refused_now_can_be_read(tmp_path: pathlib.Path) -> None:
    folder = _folder(tmp_path, _old(seed=500))
    with pytest.raises(RunError, match=r"\(1 settings differ\)(?s:.*)seed: 500 there, 0 asked"):
        Run(folder, changed())
