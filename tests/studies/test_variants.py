"""Studies: what a variant changes, and what it shares."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest

from wovr_jax.core import config
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.run.folder import MARK
from wovr_jax.run.recipe import CollectConfig, DreamConfig, Recipe
from wovr_jax.studies import variants as studies
from wovr_jax.studies.seeds import Ends
from wovr_jax.studies.variants import Variant
from wovr_jax.world.model import WorldConfig

RECIPE = Recipe(
    policy=VLAConfig.fake(),
    world=WorldConfig.fake(),
    reward=RewardConfig.fake(),
    collect=CollectConfig(first=300, again=100),
    dream=DreamConfig(groups=5, updates=(4, 3)),
)


@pytest.mark.parametrize("name", studies.STUDIES)
def test_every_variant_is_a_valid_recipe(name: str) -> None:
    settings = config.to_dict(RECIPE)
    for variant in studies.variants(name, RECIPE):
        config.from_dict(Recipe, studies.merge_settings(settings, variant.change))


def test_online_rl_gets_the_true_budget_of_the_loop_and_no_more() -> None:
    # 300 + 100 trajectories; an iteration rolls 5 groups of 8: ten iterations, not 11 and not the loop's 7.
    online = next(one for one in studies.variants("ablations", RECIPE) if one.name == "online")
    assert online.change["dream"]["updates"] == [10]


def test_online_rl_has_iterations_of_its_own_size_and_the_same_budget() -> None:
    some = dataclasses.replace(RECIPE, online_groups=2, budgets=(32, 64))
    online = next(one for one in studies.variants("ablations", some) if one.name == "online")
    assert online.change["dream"] | studies.TRUE == {"groups": 2, "updates": [25]} | studies.TRUE  # 25 x 2 x 8 = 400
    points = {one.name: one.change["dream"] for one in studies.variants("budget", some) if one.curve == "online GRPO"}
    assert {name: (dream["updates"], dream["groups"]) for name, dream in points.items()} == {
        "online_32": ([2], 2),
        "online_64": ([4], 2),
    }


def test_without_a_refresh_the_number_of_updates_is_the_same() -> None:
    frozen = next(one for one in studies.variants("ablations", RECIPE) if one.name == "no_pace")
    assert frozen.change == {"pace": False}  # the rounds stay, and with them updates and their rates
    assert "grpo-1" in frozen.share  # the first round is the same


def test_named_variants_run_beside_the_full_one_that_they_are_held_against() -> None:
    some = dataclasses.replace(RECIPE, variants=("no_mask", "no_kir"))
    assert [one.name for one in studies.variants("ablations", some)] == [studies.REFERENCE, "no_kir", "no_mask"]
    wrong = dataclasses.replace(RECIPE, variants=("no_mask", "no_maks"))
    with pytest.raises(config.ConfigError, match=r"config\.variants: .*no_mask.*; got no_maks"):
        studies.variants("ablations", wrong)


def test_a_change_is_laid_over_group_by_group_and_leaves_the_original_alone() -> None:
    settings = {"a": {"x": 1, "y": 2}, "b": 3}
    assert studies.merge_settings(settings, {"a": {"y": 5}}) == {"a": {"x": 1, "y": 5}, "b": 3}
    assert settings["a"]["y"] == 2


def test_only_finished_shared_stages_are_linked(tmp_path: pathlib.Path) -> None:
    for name, done in (("sft", True), ("world-0", False), ("starts-0", True)):
        folder = tmp_path / "full" / "stages" / name
        folder.mkdir(parents=True)
        if done:
            (folder / MARK).write_text("{}")
    studies.link_stages(Variant("v", "", {}, ("sft", "world-0")), tmp_path / "full", tmp_path / "v")
    assert [path.name for path in (tmp_path / "v" / "stages").iterdir()] == ["sft"]
    assert (tmp_path / "v" / "stages" / "sft" / MARK).read_text() == "{}"


def levels(sampled: list[int], greedy: list[int]) -> dict[str, list[int]]:
    return {"sampled": sampled, "greedy": greedy, "best": greedy}


def test_a_row_is_held_against_the_reference_on_the_seeds_that_both_have() -> None:
    rows = [Variant(studies.REFERENCE, "all", {}), Variant("v", "without", {}), Variant("late", "not run yet", {})]
    base = levels([0, 0, 0, 0], [0, 0, 0, 1])
    ends = {
        studies.REFERENCE: [
            Ends(3, 96, base, levels([1, 1, 1, 0], [1, 1, 1, 1])),
            Ends(4, 96, base, levels([1, 1, 0, 0], [1, 1, 0, 0])),
        ],
        "v": [Ends(4, 64, base, levels([1, 0, 0, 0], [0, 0, 0, 0]))],
        "late": [],
    }
    full, without = studies.summarize(rows, ends)["study"]
    assert full["sampled"]["rate"]["mean"] == 5 / 8 and full["sampled"]["against"] is None
    assert (without["seeds"], without["episodes"]) == ([4], [64])
    assert (without["sampled"]["gain"]["mean"], without["greedy"]["gain"]["mean"]) == (0.25, -0.25)
    against = without["sampled"]["against"]
    assert against["seeds"] == [-0.25], "seed 4 against seed 4, and not one seed against two"
    assert against["low"] is None and against["layouts"][0] < -0.25 < against["layouts"][1]


def test_true_episodes_are_those_that_training_took() -> None:
    facts = {"collect-0": {"episodes": 300}, "collect-1": {"episodes": 100}, "evaluate-0": {"true_steps": 9999}}
    assert studies.count_episodes(facts, 2) == 400
    assert studies.count_episodes(facts, 1) == 300, "after the first round the second collection is to come"
    assert studies.count_episodes({}, 0) == 0
    assert studies.count_episodes(facts | {"grpo-1": {"watched_steps": 9}}, 1) == 300, "who watches decides nothing"
    assert studies.count_episodes(facts | {"grpo-1": {"episodes": 80}, "grpo-2": {"episodes": 40}}, 2) == 520


def test_online_rl_is_given_what_choosing_by_the_truth_costs_the_loop() -> None:
    dream = DreamConfig(groups=6, updates=(4, 3), select="closed_loop", watch=16)
    chosen = dataclasses.replace(RECIPE, dream=dream)
    online = next(one for one in studies.variants("ablations", chosen) if one.name == "online")
    # 400 collected; of 48 rollouts every third is followed, in seven iterations and after each of two rounds.
    assert online.change["dream"]["updates"] == [(400 + 9 * 16) // 48]


def test_baselines_get_the_true_budget_of_the_loop_or_a_multiple_of_it() -> None:
    rows = {one.name: one for one in studies.variants("baselines", RECIPE)}
    updates = [rows[name].change["dream"]["updates"] for name in ("online", "online_2", "online_4")]
    assert updates == [[10], [20], [40]], "400, 800 and 1,600 trajectories, 40 an iteration"
    assert rows["imitation"].change["collect"] == rows["at_once"].change["collect"] == {"first": 400}
    steps = RECIPE.world_train.steps + (RECIPE.rounds - 1) * RECIPE.refresh.steps
    assert rows["at_once"].change["pace"] is False and rows["at_once"].change["world_train"] == {"steps": steps}
    # The rivals with a frozen world get it in the same way, and as many imagined frames.
    for rival in ("wmpo", "rise"):
        assert {name: rows[rival].change[name] for name in rows["at_once"].change} == rows["at_once"].change
    rise, dream = rows["rise"].change["dream"], RECIPE.dream
    assert rise["groups"] * rise["chunks"] == dream.groups * dream.chunks and rise["chunks"] == 1
    assert rows["sft_more"].change == {"sft": {"steps": 2 * RECIPE.sft.steps, "patience": 0}}
    assert rows["sft_more"].after == 0
    assert (rows["imagined"].of, rows["imagined"].after) == (studies.REFERENCE, 1)


def test_refreshes_differ_in_how_often_and_not_in_what_they_spend() -> None:
    rows = {one.name: one for one in studies.variants("refreshes", RECIPE)}
    assert list(rows) == ["at_once", studies.REFERENCE, "refresh_2", "refresh_3", "triggered"]
    for name, variant in rows.items():
        recipe = config.from_dict(Recipe, studies.merge_settings(config.to_dict(RECIPE), variant.change))
        again = (recipe.rounds - 1) * recipe.pace
        assert abs(recipe.collect.first + again * recipe.collect.again - 400) < 4, name
        steps = RECIPE.world_train.steps + RECIPE.refresh.steps
        assert abs(recipe.world_train.steps + again * recipe.refresh.steps - steps) < 4, name
        assert sum(recipe.dream.updates) == 7, name
    assert rows["refresh_3"].change["dream"]["updates"] == [1, 2, 2, 2]
    once = dataclasses.replace(RECIPE, dream=DreamConfig(updates=(4,)))
    with pytest.raises(config.ConfigError, match="two rounds at least"):
        studies.variants("refreshes", once)
    many = dataclasses.replace(RECIPE, dream=DreamConfig(updates=(1,) * 6))
    assert studies.variants("refreshes", many)[-2].says == "5 refreshes"


def test_a_budget_has_a_point_of_both_curves_where_both_can_spend_it() -> None:
    some = dataclasses.replace(RECIPE, budgets=(20, 40, 80))
    rows = {one.name: one for one in studies.variants("budget", some)}
    assert list(rows) == ["imagined_20", "imagined_40", studies.REFERENCE, "online_40", "online_80"]
    assert [one.change["collect"]["first"] for one in rows.values() if "collect" in one.change] == [20, 40, 80]
    assert [rows[f"online_{n}"].change["dream"]["updates"] for n in (40, 80)] == [[1], [2]]
    assert {one.curve for one in rows.values()} == {"imagined GRPO", "online GRPO"}
