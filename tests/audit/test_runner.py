"""Which policies meet which worlds, and which runs are audited at all."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from tests.small_run import save_parts, small_settings
from wovr_jax import pace
from wovr_jax.audit import runner
from wovr_jax.core.config import from_dict
from wovr_jax.core.disk import read_json, write_json
from wovr_jax.run.folder import MARK, Run, RunError
from wovr_jax.run.recipe import DreamConfig, EvaluateConfig, Recipe, StartsConfig

ONLINE = {"dream": DreamConfig(updates=(2, 1), world="true", reward="true"), "starts": StartsConfig(share=0.0)}
OUTCOMES = {
    "evaluate": {"true_success": {}, "greedy": {}, "subgoals": {}, "outcomes": [1, 0]},
    "compare": {"verdicts": dict.fromkeys(("tp", "fp", "fn", "tn"), 1), "psnr": [], "videos": []},
    "closed": dict.fromkeys(("all", "episode_start", "keyframe")),
    "starts": {"steps": []},
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return save_parts(tmp_path_factory.mktemp("assets"))


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages are marked as done and make nothing."""

    def mark(run: Run, name: str, make: Callable, folder: pathlib.Path) -> None:
        folder.mkdir(parents=True)
        write_json(folder / MARK, OUTCOMES.get(name.split("-")[0], {}) | {"seconds": 1.0})

    monkeypatch.setattr(Run, "_make", mark)


def run_to(settings: Mapping[str, Any], folder: pathlib.Path, job: pace.Job) -> None:
    pace.pace(from_dict(Recipe, settings), Run(folder, settings), job)


BASE = ("compare-0-in-world-0", "closed-0-in-world-0", "compare-1-in-world-0", "closed-1-in-world-0")
REFRESHED = ("compare-1-in-world-1", "closed-1-in-world-1", "compare-2-in-world-1", "closed-2-in-world-1")


@pytest.mark.parametrize(
    ("job", "changes", "stages"),
    [
        ("pace", {}, (*BASE, *REFRESHED)),
        ("pace", {"pace": False}, (*BASE, "compare-2-in-world-0", "closed-2-in-world-0")),
        ("pace", {"evaluate": EvaluateConfig(episodes=8, compare=8, closed=0)}, (*BASE, *REFRESHED)[::2]),
        ("grpo", {}, BASE),
    ],
)
def test_each_policy_meets_the_world_that_taught_it_and_the_one_refreshed_for_it(
    pretended: None,
    parts: pathlib.Path,
    tmp_path: pathlib.Path,
    job: str,
    changes: dict[str, Any],
    stages: tuple[str, ...],
) -> None:
    settings = small_settings(parts, job=job, **changes)
    run_to(settings, tmp_path / "run", pace.JOBS[job])
    assert tuple(runner.audit(tmp_path / "run")) == stages
    results = read_json(tmp_path / "run" / "results.json")
    pairs = [(row["policy"], row["world"]) for row in results["comparison"]]
    assert len(pairs) == len(set(pairs)) == sum(name.startswith("compare") for name in stages)
    assert {*stages} < {*results["ledger"]}


def test_the_memory_that_the_training_took_is_kept(
    pretended: None, parts: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    settings = small_settings(parts)
    run_to(settings, tmp_path / "run", pace.JOBS["pace"])
    write_json(tmp_path / "run" / "results.json", {"peak_rss_gb": 1e6})
    runner.audit(tmp_path / "run")
    assert read_json(tmp_path / "run" / "results.json")["peak_rss_gb"] == 1e6


def test_a_policy_that_was_not_measured_is_left_out_and_named(
    pretended: None, parts: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_to(small_settings(parts), tmp_path / "run", pace.Job(measured=(0, 2)))
    assert tuple(runner.audit(tmp_path / "run")) == (*BASE[:2], *REFRESHED[2:])
    assert "Left out are the policies of rounds [1]" in capsys.readouterr().err


def test_a_run_without_a_learned_world_has_nothing_to_audit(
    pretended: None, parts: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_to(small_settings(parts, **ONLINE), tmp_path / "run", pace.JOBS["pace"])
    assert runner.audit(tmp_path / "run") == {}
    assert capsys.readouterr().err.count("nothing to audit") == 1
    assert not (tmp_path / "run" / "results.json").exists()


def test_an_unfinished_run_is_refused_and_nothing_of_it_is_made(
    pretended: None, parts: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run_to(small_settings(parts), tmp_path / "run", pace.Job("reward-0"))
    before = sorted((tmp_path / "run" / "stages").iterdir())
    with pytest.raises(RunError, match="starts-0 is not finished, and an audit trains nothing; go on with the command"):
        runner.audit(tmp_path / "run")
    assert sorted((tmp_path / "run" / "stages").iterdir()) == before


def test_what_is_no_run_of_the_loop_is_refused(parts: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(RunError, match="there is no config.json in it"):
        runner.audit(tmp_path)
    write_json(tmp_path / "config.json", small_settings(parts, job="ladder"))
    with pytest.raises(RunError, match="expected a run of launch/train.py, got one of job 'ladder'"):
        runner.audit(tmp_path)


def test_the_mesh_in_use_may_be_another(pretended: None, parts: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A run that lost its machine goes on with fewer devices; config.json says those that it began on."""
    settings = small_settings(parts)
    run_to(settings, tmp_path / "run", pace.JOBS["pace"])
    config = read_json(tmp_path / "run" / "config.json")
    write_json(tmp_path / "run" / "config.json", config | {"mesh": {"data": 1, "fsdp": 1, "tensor": 64}})
    with pytest.raises(ValueError, match="64"):
        runner.audit(tmp_path / "run")
    assert runner.audit(tmp_path / "run", {"data": 1})
