"""Watching a learned world while a policy learns in it, and choosing the policy of a round by it."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest

from tests.small_run import save_parts, small_settings
from wovr_jax import evaluate, pace
from wovr_jax.core.config import from_dict
from wovr_jax.core.log import read_metrics
from wovr_jax.run.folder import MARK, Run
from wovr_jax.run.recipe import Recipe
from wovr_jax.run.stages import improve as stage
from wovr_jax.studies.variants import merge_settings
from wovr_jax.train import loop
from wovr_jax.types import Params

UNTIL = pace.Job("grpo-1", ())


@dataclasses.dataclass(frozen=True)
class Base:
    """A run up to its first round of RL, as the settings have it by themselves: watched, and ended with the last."""

    settings: dict[str, Any]
    folder: pathlib.Path
    policies: list[Params]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    settings, folder = small_settings(save_parts(tmp_path_factory.mktemp("assets"))), tmp_path_factory.mktemp("base")
    made = pace.pace(from_dict(Recipe, settings), Run(folder / "run", settings), UNTIL)
    return Base(settings, folder / "run", [product.value for product in made.policies])


def same(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


def improve_again(
    base: Base, folder: pathlib.Path, dream: dict[str, Any], threshold: float | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]], Any]:
    """Facts, curve and policy of the first round with other settings of ``dream``, from what the base made."""
    settings, stages = merge_settings(base.settings, {"dream": dream}), folder / "stages"
    if not stages.exists():
        for name in ("demonstrations", "sft", "collect-0", "world-0", "reward-0", "starts-0"):
            shutil.copytree(base.folder / "stages" / name, stages / name)
        if threshold is not None:
            facts = json.loads((stages / "reward-0" / MARK).read_text())
            (stages / "reward-0" / MARK).write_text(json.dumps(facts | {"threshold": threshold}))
        (folder / "config.json").write_text(json.dumps(settings))
    recipe, run = from_dict(Recipe, settings), Run(folder, settings)
    made = pace.pace(recipe, run, UNTIL)
    curve = [line for line in read_metrics(folder) if line["stage"] == "grpo-1"]
    return run.facts["grpo-1"], curve, made.policies[1].value


def test_watching_costs_true_steps_of_its_own_and_changes_not_a_bit(base: Base, tmp_path: pathlib.Path) -> None:
    watched = [line for line in read_metrics(base.folder) if line["stage"] == "grpo-1"]
    facts, curve, policy = improve_again(base, tmp_path / "run", {"watch": 0})
    assert facts.get("watched_steps", 0) == facts.get("true_steps", 0) == 0
    assert same(policy, base.policies[1])
    assert set(evaluate.WATCHED) <= set(watched[0]) and not set(evaluate.WATCHED) & set(curve[0])
    for line, other in zip(watched, curve, strict=True):
        plain = {name: value for name, value in line.items() if name not in evaluate.WATCHED}
        assert plain | {"time": 0} == other | {"time": 0}


def test_a_policy_whose_failures_are_all_paid_is_not_kept(base: Base, tmp_path: pathlib.Path) -> None:
    facts, curve, policy = improve_again(base, tmp_path / "run", {"select": "closed_loop"}, threshold=-1.0)
    assert [line["false_success"] for line in curve] == [1.0, 1.0], "a random policy fails somewhere"
    assert facts["good"] is None and "the policy is the one from before this round" in facts["said"]
    assert same(policy, base.policies[0])
    # The last policy acts once more, to be judged; who chooses by the simulator has used it.
    assert facts["true_steps"] == facts["imagined_frames"] == 3 * 16 * 16 and "watched_steps" not in facts


def test_the_last_good_policy_is_kept_through_kills(
    base: Base, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def is_good(shares: list[float | None], most: float) -> bool:
        asked.append(len(shares))
        return len(shares) == 2  # the policy after one update

    facts, _, _ = improve_again(base, tmp_path / "none", {"select": "closed_loop"}, threshold=2.0)
    assert facts["good"] == 2 and not facts["said"].startswith("Kept"), "nothing is paid: every policy is good"
    monkeypatch.setattr(stage, "is_good", is_good)
    facts, _, kept = improve_again(base, tmp_path / "whole", {"select": "closed_loop"})
    assert facts["good"] == 1 and facts["said"].startswith("Kept is the policy after 1 of 2 updates")
    assert asked == [1, 2, 3] and not same(kept, base.policies[1])
    once = improve_again(base, tmp_path / "once", {"updates": (1, 1)})[2]
    assert same(kept, once), "the policy that was judged, not the one that its update made"

    # Killed after the second policy was kept, before any checkpoint of the training: what was logged is there twice.
    fit = loop.fit

    def die(*args: Any, **options: Any) -> Any:
        def on_step(done: int, state: Any) -> None:
            if done == 2:
                raise RuntimeError("killed")

        return fit(*args, on_step=on_step, **options)

    monkeypatch.setattr(loop, "fit", die)
    with pytest.raises(RuntimeError, match="killed"):
        improve_again(base, tmp_path / "killed", {"select": "closed_loop"})
    monkeypatch.setattr(loop, "fit", fit)
    again = improve_again(base, tmp_path / "killed", {"select": "closed_loop"})
    assert asked[3:] == [1, 2, 1, 2, 3]
    assert same(again[2], kept) and again[0] | {"seconds": 0} == facts | {"seconds": 0}


def test_some_rollouts_of_every_group_are_followed(base: Base, tmp_path: pathlib.Path) -> None:
    whole = [line for line in read_metrics(base.folder) if line["stage"] == "grpo-1"]
    facts, curve, policy = improve_again(base, tmp_path / "run", {"watch": 8})
    # Of 16 rollouts in groups of four every other one: two of each group.
    assert facts["watched_steps"] * 2 == facts["imagined_frames"] == 2 * 16 * 16
    assert same(policy, base.policies[1]), "whoever is watched learns the same"
    assert [line["success"] for line in curve] == [line["success"] for line in whole]


def test_a_round_hands_its_updates_on_when_its_world_is_not_to_be_trusted(
    base: Base, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "is_good", lambda shares, most: len(shares) <= 2)
    how = {"select": "triggered", "updates": (4, 1)}
    facts, curve, policy = improve_again(base, tmp_path / "run", how)
    # The base policy and the one after an update are good, the one after two is not: it has acted and learns no more.
    assert (facts["good"], facts["left"], len(curve)) == (1, 3, 2)
    assert facts["imagined_frames"] == 3 * 16 * 16 and facts["episodes"] == 3 * 16
    assert same(policy, improve_again(base, tmp_path / "once", {"updates": (1, 1)})[2])
    monkeypatch.undo()
    recipe = from_dict(Recipe, merge_settings(base.settings, {"dream": how}))
    run = Run(tmp_path / "run", json.loads((tmp_path / "run" / "config.json").read_text()))
    pace.pace(recipe, run, pace.Job("grpo-2", ()))
    assert len([line for line in read_metrics(run.folder) if line["stage"] == "grpo-2"]) == 1 + 3


def test_single_iterations_do_not_decide() -> None:
    assert stage.is_good([], 0.3) and stage.is_good([None], 0.0), "no failure, none paid"
    assert not stage.is_good([1.0, 0.0], 0.3) and stage.is_good([1.0, None, 0.0, 0.0], 0.3)
    assert stage.is_good([0.1, 0.5], 0.3) and not stage.is_good([0.1, 0.5, 0.5], 0.3)
