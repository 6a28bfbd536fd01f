"""How far each job of ``pace`` goes, and which stages it passes on the way."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from configs import pace as presets
from configs import robot as robots
from tests.small_run import save_parts, small_settings
from wovr_jax import pace
from wovr_jax.core.config import from_dict
from wovr_jax.core.disk import write_json
from wovr_jax.run.folder import MARK, Run, RunError
from wovr_jax.run.recipe import DreamConfig, Recipe, StartsConfig

BASE = ("pretrained", "demonstrations", "sft")
LEARNED = ("collect-0", "world-0", "reward-0")
ONLINE = {"dream": DreamConfig(updates=(2, 1), world="true", reward="true"), "starts": StartsConfig(share=0.0)}
ROUND_1 = ("evaluate-0", *LEARNED, "starts-0", "grpo-1", "evaluate-1")
ROUND_2 = ("collect-1", "world-1", "reward-1", "starts-1")

WAYS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("pace", {}, (*BASE, *ROUND_1, *ROUND_2, "grpo-2", "evaluate-2")),
    ("pace", {"pace": False}, (*BASE, *ROUND_1, "grpo-2", "evaluate-2")),
    (
        "pace",
        ONLINE,  # nobody learns in a world model, so none is made
        (*BASE, "evaluate-0", "starts-0", "grpo-1", "evaluate-1", "starts-1", "grpo-2", "evaluate-2"),
    ),
    ("sft", {}, (*BASE, "evaluate-0")),
    ("collect", {}, (*BASE, "collect-0")),
    ("collect", ONLINE, (*BASE, "collect-0")),
    ("collect", {"vae": ""}, (*BASE, "collect-0")),
    ("world_model", {}, (*BASE, "collect-0", "world-0")),
    ("world_model", ONLINE, (*BASE, "collect-0", "world-0")),
    ("world_model", {"vae": ""}, (*BASE, "collect-0", "vae", "world-0")),
    ("reward", {}, (*BASE, *LEARNED)),
    ("reward", ONLINE, (*BASE, *LEARNED)),
    ("grpo", {}, (*BASE, "evaluate-0", *LEARNED, "starts-0", "grpo-1", "evaluate-1")),
    (
        "grpo",
        {"dream": DreamConfig(updates=(2,), world="shadow", reward="true")},
        (*BASE, "evaluate-0", "collect-0", "world-0", "starts-0", "grpo-1", "evaluate-1"),
    ),
    ("online_grpo", ONLINE, (*BASE, "evaluate-0", "starts-0", "grpo-1", "evaluate-1")),
    (
        "online_grpo",
        ONLINE | {"starts": StartsConfig(share=0.5)},  # keyframes are of collected episodes
        (*BASE, "evaluate-0", "collect-0", "starts-0", "grpo-1", "evaluate-1"),
    ),
    (
        "online_grpo",
        ONLINE | {"dream": DreamConfig(updates=(2,), world="true", reward="learned")},
        (*BASE, "evaluate-0", *LEARNED, "starts-0", "grpo-1", "evaluate-1"),
    ),
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return save_parts(tmp_path_factory.mktemp("assets"))


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages are marked as done and make nothing."""

    def mark(run: Run, name: str, make: Callable, folder: pathlib.Path) -> None:
        folder.mkdir(parents=True)
        write_json(folder / MARK, {"seconds": 0.0})

    monkeypatch.setattr(Run, "_make", mark)


@pytest.mark.parametrize(("job", "changes", "stages"), WAYS)
def test_a_job_ends_at_its_stage_and_runs_none_that_it_does_not_need(
    pretended: None,
    parts: pathlib.Path,
    tmp_path: pathlib.Path,
    job: str,
    changes: dict[str, Any],
    stages: tuple[str, ...],
) -> None:
    settings = small_settings(parts, **changes)
    run = Run(tmp_path / "run", settings)
    pace.pace(from_dict(Recipe, settings), run, pace.JOBS[job])
    assert tuple(run.facts) == stages


def test_every_job_is_tried() -> None:
    assert {job for job, *_ in WAYS} == set(pace.JOBS)


def test_a_job_whose_last_stage_these_settings_do_not_have_is_refused(
    pretended: None, parts: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    settings = small_settings(parts, pace=False)
    with pytest.raises(RunError, match="with these settings no stage is called 'world-1', which should be last"):
        pace.pace(from_dict(Recipe, settings), Run(tmp_path / "run", settings), pace.Job("world-1", ()))


@pytest.mark.parametrize("stage", ["world-0", "reward-0"])
def test_a_job_that_waits_for_a_part_that_is_given_is_refused_before_its_first_stage(
    pretended: None, parts: pathlib.Path, tmp_path: pathlib.Path, stage: str
) -> None:
    """It would run the whole loop and only then find that there is no such stage."""
    settings = presets.get_config("pretrained").to_dict()
    run = Run(tmp_path / "run", settings)
    with pytest.raises(RunError, match=f"no stage is called '{stage}', which should be last"):
        pace.pace(from_dict(Recipe, settings), run, pace.Job(stage, ()))
    assert not run.facts


def test_a_job_that_ends_with_a_measurement_nobody_asked_for_is_refused(
    pretended: None, tmp_path: pathlib.Path
) -> None:
    """A robot may be left unmeasured, and then its imitation ends with no evaluation."""
    settings = robots.get_config("tabletop").to_dict()
    settings["evaluate"] |= {"episodes": 0, "compare": 0}
    run = Run(tmp_path / "run", settings)
    with pytest.raises(RunError, match="no stage is called 'evaluate-0'"):
        pace.pace(from_dict(Recipe, settings), run, pace.JOBS["sft"])
    assert not run.facts
