"""Gates, end to end at the smallest size: what they withhold, what they read, and what they leave alone."""

from __future__ import annotations

import json
import pathlib

import pytest

from tests.sizes import fake_reward_train
from tests.small_run import save_parts, small_settings
from wovr_jax.audit import gates
from wovr_jax.core.config import ConfigError, from_dict
from wovr_jax.core.log import read_metrics
from wovr_jax.run.folder import Run
from wovr_jax.run.recipe import DreamConfig, Recipe
from wovr_jax.studies import runner

ROWS = ("full", "familiar", "dropped", "random", "true")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    parts, folder = save_parts(tmp_path_factory.mktemp("assets")), tmp_path_factory.mktemp("study") / "gates"
    # A judge that pays everything: of a judge of four steps nothing else can be relied on.
    judge = fake_reward_train(steps=4, extra=0.25, rule="fixed", threshold=1e-3)
    dream = DreamConfig(groups=4, chunks=2, updates=(1,))
    runner.run("gates", small_settings(parts, job="gates", seeds=(0,), reward_train=judge, dream=dream), folder)
    return folder


def test_every_gate_has_a_row_and_shares_what_it_cannot_change(study: pathlib.Path) -> None:
    results = json.loads((study / "results.json").read_text())
    assert tuple(row["variant"] for row in results["study"]) == ROWS
    for name in ROWS[1:]:
        stages = study / f"{name}-seed0" / "stages"
        assert all((stages / shared).is_symlink() for shared in ("collect-0", "world-0", "reward-0", "starts-0"))
        # What the signs compare with is made anew for each world, and only where signs are read.
        assert (stages / "known-0").exists() == (name in ("familiar", "dropped"))
        assert not (stages / "grpo-1").is_symlink()


def test_half_of_the_payments_are_left(study: pathlib.Path) -> None:
    first = {
        name: next(line for line in read_metrics(study / f"{name}-seed0") if line["stage"] == "grpo-1") for name in ROWS
    }
    # The same first rollouts of the same policy, 16 of them: what differs is what was paid.
    paid = {name: round(16 * line["success"]) for name, line in first.items()}
    assert paid["full"] == 16 and paid["familiar"] == paid["random"] == 8


def test_a_gate_is_refused_where_nothing_is_imagined(tmp_path: pathlib.Path) -> None:
    dream = DreamConfig(groups=4, chunks=2, updates=(1,), world="true", reward="true")
    settings = small_settings(save_parts(tmp_path / "assets"), dream=dream)
    with pytest.raises(ConfigError, match="expected a learned world"):
        gates.prepare(from_dict(Recipe, settings), Run(tmp_path / "run", settings))
