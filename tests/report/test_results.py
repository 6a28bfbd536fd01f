"""What ``results.json`` holds, from made-up facts of stages."""

from __future__ import annotations

import json

import pytest

from wovr_jax.core import stats
from wovr_jax.report import comparisons, results, tables

ABOUT = {"name": "a", "job": "pace", "seed": 3, "rounds": 2, "pace": True, "online": False}
OUTCOMES = {0: [0, 0, 1, 0], 1: [1, 0, 1, 0], 2: [1, 1, 1, 0]}


def evaluation(round_: int) -> dict:
    rate = sum(OUTCOMES[round_]) / 4
    return {"true_success": {"rate": rate}, "greedy": {"rate": rate}, "subgoals": {}, "outcomes": OUTCOMES[round_]}


def comparison(imagined: list[int] | None) -> dict:
    facts = {"verdicts": {"tp": 1, "fp": 2, "fn": 0, "tn": 1}, "psnr": [30.0, 20.0], "videos": ["a.mp4", "b.mp4"]}
    return facts | (
        {} if imagined is None else {"imagined_outcomes": imagined, "imagined_success": 0.75, "dropped": 0.5}
    )


def facts() -> dict:
    """Stages in the order in which a resumed run may meet them."""
    return {
        "evaluate-2": evaluation(2),
        "compare-2-in-world-1": comparison([1, 1, 0, 1]),
        "world-1": {"seconds": 1.0},
        "reward-0": {"threshold": 0.5},
        "starts-0": {"steps": [3], "rules": {"uniform": 1}},
        "starts-1": {"steps": []},
        "grpo-1": {"said": "nothing to learn from"},
        "compare-0-in-world-0": comparison(None),
        "closed-2-in-world-1": {"all": {"tp": 3}, "episode_start": {"tp": 2}, "keyframe": None, "true_steps": 9},
        "evaluate-1": evaluation(1),
        "evaluate-0": evaluation(0),
        "sft": {"said": ""},
        "demonstrations": {},
    }


def ledger() -> dict:
    return {name: {"true_steps": 2, "imagined_frames": 3, "seconds": 0.5} for name in facts()}


def audited() -> dict:
    """The results of a training, and of the audit after it."""
    return comparisons.add_comparisons(results.summarize(ABOUT, facts(), ledger(), 7.0), ABOUT, facts())


def test_stages_come_in_the_order_of_the_loop_whatever_a_run_met_first():
    made = audited()
    order = ["demonstrations", "sft", "evaluate-0", "reward-0", "starts-0", "compare-0-in-world-0"]
    order += ["grpo-1", "evaluate-1", "world-1", "starts-1", "evaluate-2"]
    order += ["compare-2-in-world-1", "closed-2-in-world-1"]
    assert list(made["ledger"]) == order
    assert made["seconds"] == 6.5 and made["seconds_now"] == 7.0
    assert list(made["reward"]) == ["reward-0"] and list(made["keyframes"]) == ["starts-0"], "no steps, no keyframes"
    assert made["remarks"] == ["grpo-1: nothing to learn from"]
    assert json.loads(json.dumps(made)) == made


def test_a_policy_is_held_against_the_base_and_the_world_that_trained_it():
    base, once, twice = audited()["phases"]
    assert "gain" not in base and base["imagined_success"] is None, "an older run did not say what it imagined"
    assert once["imagined_success"] is None and once["gain"] == stats.gain(OUTCOMES[1], OUTCOMES[0])
    assert twice["imagined_success"] == 0.75 and twice["gain"]["gain"] == 0.5


def test_a_closed_loop_is_of_a_policy_in_a_world_by_kind_of_start():
    (made,) = audited()["closed_loop"]
    kinds = {"all": {"tp": 3}, "episode_start": {"tp": 2}, "keyframe": None}
    assert made == {"policy": "after PACE", "world": "world model of round 2"} | kinds


def measured(**outcomes: list[int]) -> dict:
    """An evaluation at T = 1, 0.5 and 0."""
    levels = [
        {"temperature": t, "rate": sum(each) / 4, "outcomes": each}
        for t, each in zip((1.0, 0.5, 0.0), outcomes.values(), strict=True)
    ]
    ends = {"true_success": {"rate": levels[0]["rate"]}, "greedy": {"rate": levels[-1]["rate"]}}
    return ends | {"subgoals": {}, "outcomes": levels[0]["outcomes"], "temperatures": levels}


def test_the_gain_is_said_as_sampled_greedy_and_at_the_temperature_that_suits_each_best():
    stages = {
        "evaluate-0": measured(sampled=[0, 0, 0, 0], half=[1, 0, 0, 1], greedy=[1, 1, 0, 0]),
        "evaluate-2": measured(sampled=[1, 0, 0, 0], half=[1, 0, 1, 0], greedy=[1, 1, 1, 0]),
    }
    base, last = results.summarize(ABOUT, stages, {}, 1.0)["phases"]
    assert "best_gain" not in base and len(last["temperatures"]) == 3
    assert last["gain"] == stats.gain([1, 0, 0, 0], [0, 0, 0, 0])
    assert last["greedy_gain"] == stats.gain([1, 1, 1, 0], [1, 1, 0, 0])
    # Two temperatures suit the base equally well; the higher one is taken, as nothing speaks for the lower.
    assert last["best_gain"] == stats.gain([1, 1, 1, 0], [1, 0, 0, 1])
    old = results.summarize(ABOUT, facts(), {}, 1.0)["phases"][-1]
    assert old["temperatures"] == [] and "best_gain" not in old, "runs of before measured two temperatures"


def test_a_comparison_names_its_films_with_both_outcomes():
    old, new = audited()["comparison"]
    assert new["policy"] == "after PACE" and new["world"] == "world model of round 2"
    # Three of four are imagined successes, one is a true one; both agree on two episodes.
    assert new["bias"] == stats.gain([1, 1, 1, 0], [1, 0, 0, 0]) and new["bias"]["gain"] == 0.5
    assert new["dropped"] == 0.5 and new["open_fingers"] is None
    assert new["videos"][1] == {"path": "stages/compare-2-in-world-1/b.mp4", "true": 1, "imagined": 1}
    assert [film["imagined"] for film in old["videos"]] == [None, None]


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({}, ["base", "after imagined GRPO", "after PACE"]),
        ({"online": True}, ["base", "after online GRPO", "after PACE"]),
        ({"pace": False}, ["base", "after imagined GRPO", "after imagined GRPO without a refresh"]),
        ({"rounds": 3}, ["base", "after imagined GRPO", "after PACE, round 2"]),
    ],
)
def test_policies_have_names_that_readers_know(change, names):
    made = results.summarize(ABOUT | change, facts(), ledger(), 7.0)
    assert [phase["name"] for phase in made["phases"]] == names


def test_without_a_refresh_every_policy_learned_in_the_first_world():
    assert [comparisons.training_world(k, pace=True) for k in range(4)] == [0, 0, 1, 2]
    assert [comparisons.training_world(k, pace=False) for k in range(4)] == [0, 0, 0, 0]


def test_a_run_that_has_finished_nothing_has_a_head_only():
    made = comparisons.add_comparisons(results.summarize(ABOUT, {}, {}, 0.0), ABOUT, {})
    assert not any(
        made[part] for part in ("phases", "comparison", "closed_loop", "reward", "keyframes", "remarks", "ledger")
    )
    assert made | results.describe_run(ABOUT) == made and made["seconds"] == 0.0


def greedy(outcomes: list[int], starts: list[list[int]] | None) -> dict:
    """The evaluation of a robot, which is measured at one temperature."""
    rate = {"rate": sum(outcomes) / 4, "n": 4}
    ends = {"true_success": rate, "greedy": rate, "subgoals": {}, "outcomes": outcomes, "starts": starts}
    return ends | {"temperatures": [{"temperature": 0.0, "outcomes": outcomes, **rate}]}


def test_recorded_evaluations_are_pairs_only_where_both_began_alike():
    begun = {"evaluate-0": [[0, 1], [0, 2]], "evaluate-1": [[0, 1], [0, 2]], "evaluate-2": [[0, 1], [0, 3]]}
    made = facts() | {name: greedy(OUTCOMES[int(name[-1])], starts) for name, starts in begun.items()}
    _, once, twice = results.summarize(ABOUT, made, ledger(), 7.0)["phases"]
    assert once["paired"] and once["gain"] == stats.gain(OUTCOMES[1], OUTCOMES[0])
    assert not twice["paired"] and twice["gain"] == stats.gain(OUTCOMES[2], OUTCOMES[0], paired=False)
    said = tables.state_findings({"phases": [once, twice], "ledger": {}})[0]
    assert said.startswith("True success (greedy) went from 50.0%") and "which were not the same ones" in said
    assert "With its most likely actions" not in said, "there is one temperature"
    assert not tables.temperature_rows([once, twice])


def test_success_that_nobody_measured_is_not_claimed():
    measures = ("evaluate", "compare", "closed")
    unmeasured = {name: fact for name, fact in facts().items() if not name.startswith(measures)}
    made = comparisons.add_comparisons(results.summarize(ABOUT, unmeasured, ledger(), 7.0), ABOUT, unmeasured)
    assert made["phases"] == []
    said = tables.render_text(made)
    assert "True success was not measured (evaluate.episodes=0), so nothing is claimed about it." in said
    assert "true success" not in said, "and there is no table in which imagined success could stand in its place"


def test_a_robots_minutes_are_said_in_the_place_of_simulator_steps():
    minutes = {"demonstrations": 1.5, "collect-0": 2.25, "evaluate-0": 3.0, "grpo-1": 0.0}
    account = {
        name: {"true_steps": 9, "imagined_frames": 70, "robot_minutes": m, "seconds": 1.0}
        for name, m in minutes.items()
    }
    said = tables.state_findings({"ledger": account, "phases": []})[-1]
    assert said.startswith("The robot moved for 6.8 minutes (1.5 in demonstrations, 2.2 in collect, 3.0 in evaluate).")
    assert "simulator" not in said
    head, *rows = tables.cost_rows(account)
    assert [row[head.index("robot minutes")] for row in rows] == ["1.5", "2.25", "3.0", "0.0", "6.75"]
