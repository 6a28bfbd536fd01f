"""The baselines, end to end at the smallest size: every row comes from a run, and runs share what they can."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from tests.small_run import save_parts, small_settings
from wovr_jax.core.config import ConfigError, from_dict
from wovr_jax.run import bind
from wovr_jax.run.bind import Products
from wovr_jax.run.folder import Product, Run
from wovr_jax.run.recipe import DreamConfig, Recipe
from wovr_jax.run.stages.episodes import Demonstrations
from wovr_jax.studies import runner
from wovr_jax.types import Episode

ROWS = ("full", "sft_more", "imitation", "imagined", "online")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, pathlib.Path]:
    parts = save_parts(tmp_path_factory.mktemp("assets"))
    settings = small_settings(parts, job="baselines", seeds=(0,), variants=ROWS[1:])
    folder = tmp_path_factory.mktemp("study") / "baselines"
    return runner.run("baselines", settings, folder), folder


def test_every_row_says_what_it_took_and_what_came_of_it(study: tuple[dict, pathlib.Path]) -> None:
    results, folder = study
    rows = {row["variant"]: row for row in results["study"]}
    assert tuple(rows) == ROWS
    # Collections of 8 and 8; the learner of online RL gets the same 16 episodes, an iteration.
    assert [row["episodes"] for row in rows.values()] == [[16], [0], [16], [8], [16]]
    for row in rows.values():
        for how in ("sampled", "greedy", "best"):
            assert row[how]["gain"]["n"] == 1 and row[how]["gain"]["low"] is None
    bases = [row["sampled"]["base"] for row in rows.values()]
    assert bases == bases[:1] * 5, "all are held against the base that the loop began with"
    page = (folder / "report.html").read_text()
    assert "imitation of its own successes" in page and "no interval over seeds" in page
    assert json.loads((folder / "results.json").read_text())["study"] == results["study"]


def test_runs_share_what_a_variant_cannot_change(study: tuple[dict, pathlib.Path]) -> None:
    _, folder = study
    made = {
        run.name: sorted(path.name for path in (run / "stages").iterdir() if not path.is_symlink())
        for run in folder.glob("*-seed0")
    }
    assert made["sft_more-seed0"] == ["evaluate-0", "sft"]
    assert made["imitation-seed0"] == ["collect-0", "evaluate-1", "imitate-1"]
    assert made["online-seed0"] == ["evaluate-1", "grpo-1", "starts-0"]
    assert "imagined-seed0" not in made and "evaluate-1" in made["full-seed0"]


def episode(seed: int, success: bool) -> Episode:
    frame, action = np.zeros((3, 16, 16, 3), np.uint8), np.zeros((2, 7), np.float32)
    return Episode(frame, action, np.array([False, False, success]), "", 0, seed, "base", action)


def test_imitation_begins_with_the_base_and_takes_the_successes_of_every_round(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small_settings(save_parts(tmp_path), dream=DreamConfig(learn="imitation", updates=(1, 1)))
    asked: list[tuple] = []
    monkeypatch.setattr(bind, "fine_tune", lambda *inputs: asked.append(inputs))
    made = Products()
    do = bind.bind_stages(from_dict(Recipe, settings), Run(tmp_path / "run", settings), made)
    demonstration, held_out = episode(0, False), episode(1, True)
    first, second = [episode(2, True), episode(3, False)], [episode(4, False), episode(5, True)]
    made.demonstrations = Product(lambda: Demonstrations([demonstration], [held_out]))
    made.policies = [Product(lambda: "the base"), Product(lambda: "the policy of round 1")]
    made.rollouts = [Product(lambda: first), Product(lambda: second)]
    do.improve(1)
    *_, start, _, _, _, episodes, name = asked[-1]
    assert (start(), name) == ("the base", "imitate-2")
    assert [each.seed for each in episodes.value.train] == [0, 2, 5], "a demonstration is imitated whatever came of it"
    assert [each.seed for each in episodes.value.held_out] == [1]


def test_imitation_needs_a_rate_to_learn_by_and_no_true_world() -> None:
    with pytest.raises(ConfigError, match="expected 'learned' with dream.learn='imitation'"):
        DreamConfig(learn="imitation", world="true")
    settings = small_settings(pathlib.Path(), dream=DreamConfig(learn="imitation", updates=(1,)))
    settings["sft"]["steps"], settings["policy_weights"] = 0, "somewhere"
    with pytest.raises(ConfigError, match=r"sft\.steps: expected at least 1, by which dream\.learn='imitation'"):
        from_dict(Recipe, settings)
