"""Which policy, world model, judge and start states of a run are played with, and what is said where some lack."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest

from tests.play.small import EPISODES, KEYFRAMES, SIM, THRESHOLD, make_run
from wovr_jax.core import checkpoint
from wovr_jax.data import starts
from wovr_jax.play.source import PlayError, open_run
from wovr_jax.sim.libero.tasks import LiberoConfig
from wovr_jax.types import Params


@pytest.fixture
def copy(run: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


def leaves_equal(a: Params, b: Params) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b)))


def kept(run: pathlib.Path, stage: str, name: str) -> Params:
    return checkpoint.load(run / "stages" / stage / name)


def test_the_newest_of_everything(run: pathlib.Path) -> None:
    source = open_run(run)
    assert (source.name, source.suite, source.policy_stage, source.world_round) == ("small", "tabletop", "grpo-2", 1)
    assert source.judge is not None and source.judge.threshold == THRESHOLD
    assert len(source.starts) == EPISODES + KEYFRAMES and source.starts.initials == EPISODES
    assert source.sim == SIM and len(source.instructions) == len(source.prompt_KL) == 3
    assert leaves_equal(source.world["dit"], kept(run, "world-1", "dit"))
    assert leaves_equal(source.judge.params, kept(run, "reward-1", "reward"))


def test_a_round_of_the_policy_and_one_of_the_world(run: pathlib.Path) -> None:
    source = open_run(run, 0, 0)
    assert (source.policy_stage, source.world_round) == ("sft", 0)
    assert leaves_equal(source.policy, kept(run, "sft", "policy"))
    assert leaves_equal(source.world["dit"], kept(run, "world-0", "dit"))


def test_a_run_that_is_still_going(copy: pathlib.Path) -> None:
    # In the second round the world model is there; its judge, its start states and the next policy are not.
    for stage in ("reward-1", "starts-1", "grpo-2"):
        (copy / "stages" / stage / "done.json").unlink()
    source = open_run(copy)
    assert (source.policy_stage, source.world_round) == ("grpo-1", 1)
    assert source.judge is not None and leaves_equal(source.judge.params, kept(copy, "reward-0", "reward"))
    # In the first round there is no judge at all, and episodes begin as the demonstrations did.
    for stage in ("reward-0", "starts-0", "grpo-1", "world-1"):
        (copy / "stages" / stage / "done.json").unlink()
    source = open_run(copy)
    assert (source.policy_stage, source.world_round, source.judge) == ("sft", 0, None)
    assert len(source.starts) == source.starts.initials == EPISODES


def test_nothing_in_the_folder_changes(copy: pathlib.Path) -> None:
    def look() -> dict[str, float]:
        return {str(path): path.stat().st_mtime for path in copy.rglob("*")}

    before = look()
    open_run(copy)
    assert look() == before


def test_what_is_not_there_is_said(run: pathlib.Path, copy: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(PlayError, match=r"a policy of round 7, found round 0 \(sft\), round 1 \(grpo-1\), round 2"):
        open_run(run, 7)
    with pytest.raises(PlayError, match="a world model of round 5, found round 0, round 1. Let the run go on"):
        open_run(run, None, 5)
    for mark in copy.glob("stages/world-*/done.json"):
        mark.unlink()
    with pytest.raises(PlayError, match="a finished world model, found none yet"):
        open_run(copy)
    with pytest.raises(PlayError, match="is not a run folder: its config.json cannot be read"):
        open_run(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"title": "something else"}))
    with pytest.raises(PlayError, match="is not the configuration of a run"):
        open_run(tmp_path)


def test_a_run_of_libero_has_the_learned_world_and_no_simulator(tmp_path: pathlib.Path) -> None:
    libero = LiberoConfig(suite="libero_spatial", steps=16, tasks=(0, 1, 2))
    libero = dataclasses.replace(libero, scene=dataclasses.replace(libero.scene, size=16))
    run = make_run(tmp_path / "libero", rounds=1)
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | {"libero": dataclasses.asdict(libero)}))
    # LIBERO need not be installed: what the robot is asked stands beside the start states.
    folder = run / "stages" / "starts-0" / "starts"
    told = ("pick up the black bowl and place it on the plate", "open the drawer", "push the plate")
    starts.save(folder, starts.load(folder), meta={"tasks": list(told)}, overwrite=True)
    source = open_run(run)
    assert source.sim is None and source.suite == "libero_spatial" and source.instructions == told


def test_the_lines_of_the_readme(run: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """What README.md says in Python runs as it stands there, but for the folder."""
    readme = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert '"runs/pace"' in lines
    monkeypatch.chdir(run.parent)
    exec(lines.replace('"runs/pace"', repr(run.name)), {})
    assert capsys.readouterr().out.startswith("(8, 16, 16, 3) [")
