"""Outcomes of a study: what is written is what is read, and nothing is counted that does not belong in the table."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

from wovr_jax.core.config import ConfigError
from wovr_jax.studies import outcomes
from wovr_jax.studies.seeds import Ends

BASE = {"sampled": [0, 1, 0], "greedy": [0, 0, 1]}
SETTINGS: dict[str, Any] = {"seed": 3, "seeds": [3], "dream": {"groups": 12}}


def ends(*seeds: int) -> dict[str, list[Ends]]:
    return {"full": [Ends(seed, 96, BASE, {"sampled": [1, 1, 0], "greedy": [1, 1, 1]}) for seed in seeds]}


def save(folder: pathlib.Path, *seeds: int, study: str = "baselines", **settings: Any) -> str:
    folder.mkdir()
    outcomes.write(folder, study, SETTINGS | settings, ends(*seeds))
    return str(folder / outcomes.NAME)


def test_seeds_of_two_machines_are_joined(tmp_path: pathlib.Path) -> None:
    files = [save(tmp_path / "a", 3), save(tmp_path / "b", 5, 4, seed=4, seeds=[5, 4], variants=["no_kir"])]
    assert outcomes.read(files, "baselines", SETTINGS) == ends(3, 5, 4)
    assert outcomes.read([], "baselines", SETTINGS) == {}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"study": "budget"}, "of the study 'budget', expected 'baselines'"),
        ({"dream": {"groups": 48}}, "1 other setting, such as dream.groups=48, here 12"),
    ],
)
def test_what_belongs_to_another_table_is_refused(tmp_path: pathlib.Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        outcomes.read([save(tmp_path / "a", 3, **change)], "baselines", SETTINGS)


def test_a_seed_counts_once(tmp_path: pathlib.Path) -> None:
    files = [save(tmp_path / "a", 3), save(tmp_path / "b", 3)]
    with pytest.raises(ConfigError, match="seed 3 of 'full' a second time"):
        outcomes.read(files, "baselines", SETTINGS)


def test_what_is_no_file_of_outcomes_is_refused_by_name(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.outcomes: .*missing\.json cannot be read"):
        outcomes.read([str(tmp_path / "missing.json")], "baselines", SETTINGS)
    for text, says in (
        ("{", "cannot be read"),
        (json.dumps({"study": []}), "is not the outcomes.json"),
        ("[1]", "not"),
    ):
        (tmp_path / "other.json").write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=says):
            outcomes.read([str(tmp_path / "other.json")], "baselines", SETTINGS)
