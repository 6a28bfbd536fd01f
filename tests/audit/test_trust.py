"""The three questions to a finished run: which policies are tried where, and what is said of it."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.audit.test_lies import make as told
from tests.audit.test_runner import OUTCOMES
from tests.small_run import save_parts, small_settings
from wovr_jax import pace
from wovr_jax.audit import detection, ladder, lies, runner, trust
from wovr_jax.audit.horizon import summarize_horizon
from wovr_jax.audit.trust import TrustConfig
from wovr_jax.core.config import ConfigError, from_dict
from wovr_jax.core.disk import read_json, write_json
from wovr_jax.report import page
from wovr_jax.report import trust as words
from wovr_jax.run.folder import MARK, Run, RunError
from wovr_jax.run.recipe import Recipe

TRUE = {"ladder-20": 1, "ladder-50": 2, "ladder-100": 4, "base": 4, "grpo-1": 6, "grpo-2": 8}
"""Successes of twenty, in truth; the first world sees two more of each, the second the order upside down."""


def outcomes(successes: int) -> list[int]:
    return [1] * successes + [0] * (20 - successes)


def pretend(name: str) -> dict[str, Any]:
    """Facts of a stage of the question."""
    if name.startswith("horizon"):
        error = np.zeros((4, 16))
        error[:2, 8:] = 1.0
        made = summarize_horizon(error, np.full_like(error, 0.1), 1 - error, np.full(4, 16), 8)
        return made | {"latent": [0.1, 0.2], "psnr_vae": [36.5, 31.0]}
    if name.startswith("trial"):
        true = TRUE[name.removeprefix("trial-")]
        level = {"true": outcomes(true), "imagined": [outcomes(true + 2), outcomes(10 - true)]}
        return {"levels": [level | {"temperature": 1.0}, level | {"temperature": 0.0}]}
    return {}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return save_parts(tmp_path_factory.mktemp("assets"))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages are marked as done and make nothing; their names, in the order in which they would be made."""
    names: list[str] = []

    def mark(run: Run, name: str, make: Callable, folder: pathlib.Path) -> None:
        names.append(name)
        folder.mkdir(parents=True, exist_ok=True)
        if name.startswith("lies-"):
            told(seed=int(name.removesuffix("-with-twin")[-1])).save(folder / lies.FILE)
        facts = pretend(name) if run.folder.name == trust.FOLDER else OUTCOMES.get(name.split("-")[0], {})
        write_json(folder / MARK, facts | {"seconds": 1.0})

    monkeypatch.setattr(Run, "_make", mark)
    return names


@pytest.fixture
def finished(made: list[str], parts: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A run of two rounds, audited."""
    settings = small_settings(parts)
    pace.pace(from_dict(Recipe, settings), Run(tmp_path / "run", settings), pace.JOBS["pace"])
    runner.audit(tmp_path / "run")
    made.clear()
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals of fewer resamples, which are as good for what is asked here."""
    monkeypatch.setattr(detection, "DRAWS", 50)


ASKED = TrustConfig(episodes=20, shares=(0.2, 0.5, 1.0))


def test_a_plain_audit_asks_nothing_and_what_was_asked_once_is_kept(finished: pathlib.Path, made: list[str]) -> None:
    runner.audit(finished)
    assert not made and "trust" not in read_json(finished / "results.json")
    assert not (finished / trust.FOLDER).exists()
    runner.audit(finished, asked=ASKED)
    answers = read_json(finished / "results.json")["trust"]
    runner.audit(finished)
    assert read_json(finished / "results.json")["trust"] == answers


def test_every_policy_is_tried_once_and_every_world_followed(finished: pathlib.Path, made: list[str]) -> None:
    runner.audit(finished, asked=ASKED)
    run_alone = ["trial-base", "trial-grpo-1", "trial-grpo-2", "horizon-in-world-0", "horizon-in-world-1"]
    assert made == run_alone
    runner.audit(finished, asked=ASKED, ladder=True)
    rungs = ["ladder-20", "ladder-50", "ladder-100"]
    assert made[5:] == [*rungs, *(f"trial-{rung}" for rung in rungs)], "and nothing of what is there"
    # The stages of the run are as they were, and its ledger knows nothing of the ladder.
    assert not list((finished / "stages").glob("ladder*"))
    assert not any("ladder" in stage for stage in read_json(finished / "results.json")["ledger"])


def test_the_answers_stand_in_the_results_and_on_the_page(finished: pathlib.Path, made: list[str]) -> None:
    runner.audit(finished, asked=ASKED, ladder=True)
    answers = read_json(finished / "results.json")["trust"]
    # From the least to the most data, then the rounds; of 32 demonstrations.
    assert [policy["name"].split(" (")[0] for policy in answers["policies"]] == [
        *(f"imitation of {percent} %" for percent in (20, 50, 100)),
        *("base", "after imagined GRPO", "after PACE"),
    ]
    assert answers["policies"][0]["name"].endswith("(6 demonstrations)")
    first, second = (world["ranking"]["sampled"] for world in answers["worlds"])
    assert first["spearman"]["value"] == 1.0 and first["gap"]["value"] == pytest.approx(0.1)
    assert second["spearman"]["value"] == -1.0 and second["inverted"]["value"] == pytest.approx(14 / 15)
    # Of the fifteen pairs one is equal; 1 and 2 of twenty are the only others nearer than a tenth: 2 and 4 are not.
    assert (second["tied"], second["close"]) == (1, {"within": 0.1, "pairs": 1, "inverted": 1})
    assert answers["worlds"][1]["horizon"]["horizon"] == 1 and answers["ledger"]["trial-base"]
    said = words.state_answers(answers)
    assert said[0].startswith("Can it rank policies? Not shown. Of 6 policies (sampled, T = 1) Spearman's rho is -1.00")
    assert "14 of 15 pairs stand the wrong way round, 1 of the 1 that differ by less than 10 points" in said[0]
    assert said[1].startswith("Can it pay them? Not asked")  # the pretended closed loop has no rollouts
    assert said[2].startswith("Up to which horizon? 1 of 2 chunks (8 steps)")
    text = page.render({"name": "run", "trust": answers})
    section = text[text.index('id="trust"') : text.index("MMRV is SIMPLER's")]
    assert section.count("<svg") == 5, "a scatter for each world and temperature, and a curve"
    assert "after PACE: 40.0% across" in section and "36.5" in section


def test_signs_are_read_world_by_world_and_kept(finished: pathlib.Path, made: list[str]) -> None:
    runner.audit(finished, asked=ASKED, signs=True)
    assert made[5:] == ["known-0", "lies-1-in-world-0", "known-1", "lies-2-in-world-1"]
    answers = read_json(finished / "results.json")["trust"]
    first, second = (world["lies"] for world in answers["worlds"])
    assert (first["paid"], first["lies"]) == (100, 40) and first["signs"]["loud"]["paid"]["value"] > 0.9
    assert "mix_before" in second["signs"] and "mix_before" not in first["signs"]
    # Asked less, nothing is forgotten; asked for a twin too, what has one says more.
    runner.audit(finished, asked=ASKED)
    assert read_json(finished / "results.json")["trust"]["worlds"][1]["lies"] == second
    del made[:]
    runner.audit(finished, asked=ASKED, twins=True)
    assert made == ["world-0", "world-1", "lies-1-in-world-0-with-twin", "lies-2-in-world-1-with-twin"]


def test_what_tells_a_lie_is_said_and_shown(
    finished: pathlib.Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "SIGNS", words.SIGNS | {"loud": "a loud sign", "quiet": "a quiet sign"})
    runner.audit(finished, asked=ASKED, signs=True)
    answers = read_json(finished / "results.json")["trust"]
    said = words.state_answers(answers)[3]
    assert said.startswith("Does anything tell a lie before the truth is known? Yes. Of 100 paid rollouts 40 fail")
    assert "(a loud sign)" in said and "and not 60.0%." in said
    rows = words.sign_rows(answers)
    assert rows[1][:4] == ("world 1, all", f"{answers['worlds'][0]['lies']['astray']} of 550", "40 of 100", "60.0%")
    assert [row[0] for row in rows].count("world 2, the mix of the world before") == 1
    assert all(row[1] == "-" for row in rows if row[0].endswith("how sure the judge is"))
    section = page.render({"name": "run", "trust": answers})
    assert "world 2, a loud sign" in section and "Does anything tell a lie" in section
    lies = answers["worlds"][-1]["lies"]
    for value, low, verdict in ((0.9, 0.8, "Yes"), (0.7, 0.6, "Partly"), (0.6, 0.45, "No")):
        lies["signs"]["mix"]["paid"] = {"value": value, "low": low, "high": 0.95}
        assert f"is known? {verdict}." in words.state_answers(answers)[3]
    del lies["signs"]["mix"]
    assert words.state_answers(answers)[3].endswith("Not known: of 100 paid rollouts 40 fail, too few of one kind.")


def test_another_question_is_refused_in_words(finished: pathlib.Path, made: list[str]) -> None:
    runner.audit(finished, asked=ASKED)
    with pytest.raises(RunError, match=r"another question \(episodes: 20 there, 21 asked\). Ask with the same"):
        runner.audit(finished, asked=TrustConfig(episodes=21, shares=ASKED.shares))


def test_what_a_world_pays_is_said_with_what_counts_as_paying(finished: pathlib.Path, made: list[str]) -> None:
    runner.audit(finished, asked=ASKED)
    answers = read_json(finished / "results.json")["trust"]
    for rate, verdict in ((0.2, "Yes"), (0.3, "Partly"), (0.6, "No")):
        false = {"rate": rate, "n": 40, "low": 0.1, "high": 0.7}
        paid = {"policy": "base", "false_success": false, "precision": {"rate": 0.8}}
        answers["worlds"][-1]["paid"] = paid
        said = words.state_answers(answers)[1]
        assert said.startswith(f"Can it pay them? {verdict}.") and "and 80.0% of what it pays is true" in said


def test_shares_are_nested_whole_and_none_comes_twice() -> None:
    assert ladder.choose_counts(24, (0.1, 0.2, 0.3, 0.5, 1.0)) == [(0.1, 2), (0.2, 5), (0.3, 7), (0.5, 12), (1.0, 24)]
    assert ladder.choose_counts(3, (0.1, 0.2, 0.3, 1.0)) == [(0.1, 1), (1.0, 3)]
    with pytest.raises(ConfigError, match="shares: expected some in ascending order"):
        TrustConfig(shares=(0.5, 0.1))
    with pytest.raises(ConfigError, match="shares"):
        TrustConfig(shares=(0.0, 0.1))


def test_a_world_model_that_was_given_has_no_twin(parts: pathlib.Path, tmp_path: pathlib.Path) -> None:
    settings = small_settings(parts)
    recipe = from_dict(Recipe, settings | {"world_train": settings["world_train"] | {"steps": 0}, "world_weights": "w"})
    with pytest.raises(ConfigError, match="was given its world model and trained none .* ask with --signs"):
        trust.train_twins(recipe, None, tmp_path / "twins")
    assert not (tmp_path / "twins").exists()


def test_a_ladder_needs_demonstrations(parts: pathlib.Path) -> None:
    weights = small_settings(parts) | {"policy_weights": "policy", "sft": {"steps": 0}}
    recipe = from_dict(Recipe, weights)
    with pytest.raises(ConfigError, match="32 of them and 0 steps of imitation; rank the policies that it has: --rank"):
        ladder.climb(recipe, None, None, (0.5,))
