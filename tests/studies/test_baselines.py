"""The baselines, end to end at the smallest size: every row comes from a run, and runs share what they can."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from tests.small_run import save_parts, small_settings
from wovr_jax.core.config import ConfigError, from_dict, to_dict
from wovr_jax.data import episodes as disk
from wovr_jax.data import starts
from wovr_jax.run import bind
from wovr_jax.run.folder import Product, Run
from wovr_jax.run.recipe import Recipe
from wovr_jax.run.stages.episodes import Demonstrations
from wovr_jax.run.stages.policy import load_policy
from wovr_jax.sim.arena import layouts
from wovr_jax.sim.embedded import begin_episodes
from wovr_jax.sim.tabletop.table import TabletopConfig
from wovr_jax.studies import outcomes, runner, variants
from wovr_jax.studies.imitation import add_successes, imitate
from wovr_jax.types import Episode

ROWS = ("full", "sft_more", "imitation", "imagined", "wmpo", "rise", "online", "vla_rl")


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
    episodes = {name: row["episodes"] for name, row in rows.items()}
    assert episodes == {name: [16] for name in ROWS} | {"sft_more": [0], "imagined": [8]}
    for row in rows.values():
        for how in ("sampled", "greedy", "best"):
            assert row[how]["gain"]["n"] == 1 and row[how]["gain"]["low"] is None
    bases = [row["sampled"]["base"] for row in rows.values()]
    assert bases == bases[:1] * len(ROWS), "all are held against the base that the loop began with"
    page = (folder / "report.html").read_text()
    assert "imitation of its own successes" in page and "no interval over seeds" in page
    assert json.loads((folder / "results.json").read_text())["study"] == results["study"]


def test_what_was_measured_here_can_be_counted_elsewhere(study: tuple[dict, pathlib.Path]) -> None:
    results, folder = study
    settings = to_dict(from_dict(Recipe, json.loads((folder / "config.json").read_text()) | {"seeds": [5]}))
    joined = outcomes.read([str(folder / outcomes.NAME)], "baselines", settings)
    there = variants.summarize([variants.Variant(name, "", {}) for name in ROWS], joined)["study"]
    for row, other in zip(results["study"], there, strict=True):
        assert row | {"says": ""} == other


def test_runs_share_what_a_variant_cannot_change(study: tuple[dict, pathlib.Path]) -> None:
    _, folder = study
    made = {
        run.name: sorted(path.name for path in (run / "stages").iterdir() if not path.is_symlink())
        for run in folder.glob("*-seed0")
    }
    assert made["sft_more-seed0"] == ["evaluate-0", "sft"]
    assert made["imitation-seed0"] == ["collect-0", "evaluate-1", "imitate-1"]
    assert made["online-seed0"] == made["vla_rl-seed0"] == ["evaluate-1", "grpo-1", "starts-0"]
    # A frozen world of its own, and a model of progress where there is no judge.
    assert "world-1" not in made["wmpo-seed0"] + made["rise-seed0"]
    assert "progress-0" in made["rise-seed0"] and "progress-0" not in made["wmpo-seed0"]
    assert "imagined-seed0" not in made and "evaluate-1" in made["full-seed0"]


def test_online_rl_begins_in_layouts_of_its_own_however_few_the_demonstrations_are(
    study: tuple[dict, pathlib.Path],
) -> None:
    _, folder = study
    table = starts.load(folder / "online-seed0" / "stages" / "starts-0" / "starts")
    # One update of four groups: a layout for each.
    assert table.seed_K.tolist() == layouts(0, "online", 4).tolist()
    # The same layout looks the same, whether it was demonstrated or has only begun.
    demonstrated = disk.read(folder / "full-seed0" / "stages" / "demonstrations" / "episodes")[:2]
    begun = begin_episodes(np.array([each.seed for each in demonstrated]), TabletopConfig.fake())
    for ours, its in zip(begun, demonstrated, strict=True):
        np.testing.assert_array_equal(ours.frame_SHWC[0], its.frame_SHWC[0])
        assert (ours.task, ours.seed, ours.instruction) == (its.task, its.seed, its.instruction)


def episode(seed: int, success: bool) -> Episode:
    frame, action = np.zeros((3, 16, 16, 3), np.uint8), np.zeros((2, 7), np.float32)
    return Episode(frame, action, np.array([False, False, success]), "", 0, seed, "base", action)


def test_imitation_takes_the_successes_and_every_demonstration() -> None:
    demonstrations = Demonstrations([episode(0, False)], [episode(1, True)])
    train, held_out = add_successes(demonstrations, [episode(2, True), episode(3, False), episode(4, True)])
    assert [each.seed for each in train] == [0, 2, 4], "a demonstration is imitated whatever came of it"
    assert [each.seed for each in held_out] == [1]


def test_imitation_begins_with_the_base(study: tuple[dict, pathlib.Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = study
    run = Run(folder / "imitation-seed0", json.loads((folder / "imitation-seed0" / "config.json").read_text()))
    # The stage is done; what it would begin with, were it not, is asked for by hand.
    begun: list[tuple[str, Any]] = []

    def fine_tune(run: Run, cfg: Any, train: Any, start: Any, *inputs: Any, name: str = "sft") -> Product:
        begun.append((name, start))
        return real(run, cfg, train, start, *inputs, name=name)

    real = bind.fine_tune
    monkeypatch.setattr(bind, "fine_tune", fine_tune)
    recipe = from_dict(Recipe, run.settings)
    imitate(recipe, run)
    assert [name for name, _ in begun] == ["sft", "imitate-1"]
    base = load_policy(recipe.policy, folder / "full-seed0" / "stages" / "sft")
    for ours, its in zip(jax.tree.leaves(begun[1][1]()), jax.tree.leaves(base), strict=True):
        np.testing.assert_array_equal(ours, its)


def test_a_rival_that_needs_an_embedded_simulator_is_refused_before_anything_runs(tmp_path: pathlib.Path) -> None:
    settings = small_settings(save_parts(tmp_path / "assets"), job="baselines", seeds=(0,))
    reward = {**settings["reward"], "tasks": 10}
    recipe = from_dict(Recipe, settings | {"libero": {}, "reward": reward})
    with pytest.raises(ConfigError, match=r"vla_rl is paid by the sub-goals .*--config.variants=sft_more,imitation,"):
        variants.study("baselines", recipe, tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_imitation_needs_steps_to_learn_by(tmp_path: pathlib.Path) -> None:
    settings = small_settings(tmp_path) | {"policy_weights": "somewhere"}
    settings["sft"]["steps"] = 0
    with pytest.raises(ConfigError, match=r"config\.sft\.steps: expected at least 1, by which"):
        imitate(from_dict(Recipe, settings), Run(tmp_path / "run", settings))
