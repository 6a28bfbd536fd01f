"""A run that is given its world model, its classifier and its start states: of another run, or released."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np

from tests.small_run import run_whole, save_parts, small_settings
from wovr_jax import pace
from wovr_jax.core.config import from_dict, to_dict
from wovr_jax.data import starts as start_states
from wovr_jax.run.folder import Run
from wovr_jax.run.recipe import Recipe
from wovr_jax.studies.variants import merge_settings


def _same(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


def test_a_run_whose_imagination_is_given_trains_the_policy_alone(tmp_path: pathlib.Path) -> None:
    parts = save_parts(tmp_path / "assets")
    first = small_settings(parts, pace=False)
    run = Run(tmp_path / "first", first)
    theirs = pace.pace(from_dict(Recipe, first), run, pace.Job("starts-0", ()))
    stages = run.folder / "stages"
    given = {"world_weights": "world-0/dit", "reward_weights": "reward-0/reward", "start_states": "starts-0/starts"}
    settings = merge_settings(
        small_settings(parts, **{name: str(stages / where) for name, where in given.items()}),
        {
            "pace": False,
            "world_train": {"steps": 0},
            "reward_train": {"steps": 0, "rule": "fixed", "threshold": 0.6},
        },
    )
    ledger = run_whole(settings, tmp_path / "run")["ledger"]
    kinds = ("evaluate-{}", "compare-{}-in-world-0", "closed-{}-in-world-0")
    base, once, twice = ([kind.format(policy) for kind in kinds] for policy in range(3))
    assert list(ledger) == ["pretrained", "demonstrations", "sft", *base, "grpo-1", *once, "grpo-2", *twice]
    assert {name for name, account in ledger.items() if account["true_steps"]} == {
        *("demonstrations", *base, *once, *twice)
    }
    steps = settings["sim"]["horizon"]
    assert (ledger["demonstrations"]["episodes"], ledger["demonstrations"]["true_steps"]) == (36, 36 * steps)
    made = pace.pace(from_dict(Recipe, settings), Run(tmp_path / "run", settings))
    assert _same(made.worlds[0].value, theirs.worlds[0].value) and made.rewards[0].value.threshold == 0.6
    assert _same(made.rewards[0].value.params, theirs.rewards[0].value.params)
    assert _same(made.starts[0].value, start_states.load(stages / "starts-0" / "starts"))
    assert not _same(made.policies[0].value, made.policies[2].value)


def test_a_run_that_trains_adapters_everywhere_goes_to_its_end(tmp_path: pathlib.Path) -> None:
    """As one GPU does it (configs/pace.py:one_h100): imitation, world model, refresh and RL, beside given weights."""
    parts = save_parts(tmp_path / "assets")
    first = small_settings(parts, pace=False)
    run = Run(tmp_path / "first", first)
    theirs = pace.pace(from_dict(Recipe, first), run, pace.Job("world-0", ()))
    stages, adapters = run.folder / "stages", {"rank": 2}
    given = {"policy_weights": str(stages / "sft" / "policy"), "world_weights": str(stages / "world-0" / "dit")}
    how = {
        "sft": {"lora": adapters | {"size": "rlinf"}, "frozen": []},
        "world_train": {"lora": adapters | {"size": "wan"}, "lr": 1e-2},
        "learner": {"lora": adapters | {"size": "rlinf"}},
    }
    settings = to_dict(from_dict(Recipe, merge_settings(small_settings(parts, **given), how)))
    results = run_whole(settings, tmp_path / "run")
    assert [phase["name"] for phase in results["phases"]] == ["base", "after imagined GRPO", "after PACE"]
    made = pace.pace(from_dict(Recipe, settings), Run(tmp_path / "run", settings))
    kept = tmp_path / "run" / "stages"
    for name in ("world-0", "world-1"):
        assert (kept / name / "adapters").is_dir() and not (kept / name / "dit").exists()
    assert (kept / "sft" / "adapters").is_dir()
    worlds = [theirs.worlds[0].value["dit"], *(world.value["dit"] for world in made.worlds)]
    policies = [theirs.policies[0].value, *(policy.value for policy in made.policies)]
    for chain in (worlds, policies):  # each begins where the one before came to, and moves
        assert len(chain) >= 3 and not any(_same(a, b) for a, b in zip(chain, chain[1:]))
    # Adapters are of blocks alone, and what they stand beside stays as it was given.
    assert _same(worlds[0]["patch_embedding"], worlds[-1]["patch_embedding"])
    assert not _same(worlds[0]["action_cross"], worlds[1]["action_cross"])
