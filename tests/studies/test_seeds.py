"""Intervals over seeds, by hand, and how a study says them."""

from __future__ import annotations

import json

import pytest

from wovr_jax.report import page
from wovr_jax.report import tables as text
from wovr_jax.studies import seeds
from wovr_jax.studies.seeds import Ends

FULL, NO_PACE, BASE = (403, 437, 403), (291, 408, 351), (146, 165, 154)
"""Successes of 512 layouts on seeds 3, 4 and 5, as docs/tabletop.md has them as rates."""


def outcomes(successes: int, n: int = 512) -> list[int]:
    return [1] * successes + [0] * (n - successes)


def ends(finals: tuple[int, ...], episodes: int = 1152, greedy: bool = True) -> list[Ends]:
    def levels(successes: int, likely: int) -> dict[str, list[int]]:
        lower = {"greedy": outcomes(likely), "best": outcomes(max(successes, likely))} if greedy else {}
        return {"sampled": outcomes(successes)} | lower

    trainings = zip((3, 4, 5), BASE, finals)
    return [Ends(seed, episodes, levels(base, 460), levels(final, 480)) for seed, base, final in trainings]


def rows(greedy: bool = True) -> list[dict]:
    full = ends(FULL)
    return [
        seeds.summarize("full", "all of WoVR", full, None),
        seeds.summarize("no_pace", "no refresh", ends(NO_PACE, 768, greedy), full),
    ]


def test_an_interval_over_seeds_is_that_of_student() -> None:
    # No refresh against all of WoVR, seed by seed: -21.9, -5.7, -10.2 points.
    against = rows()[1]["sampled"]["against"]
    assert [round(100 * difference, 1) for difference in against["seeds"]] == [-21.9, -5.7, -10.2]
    assert [round(100 * against[end], 1) for end in ("mean", "low", "high")] == [-12.6, -33.4, 8.2]
    # Pooled over layouts the same three trainings look like a certain loss, of these trainings.
    assert against["layouts"][1] < 0
    gain = rows()[0]["sampled"]["gain"]
    assert [round(100 * gain[end], 1) for end in ("mean", "low", "high")] == [50.7, 45.0, 56.3]


@pytest.mark.parametrize(
    ("values", "half"),
    [
        ([0.0, 1.0], 12.706 * 0.5),  # deviation sqrt(1/2) over sqrt(2)
        ([1.0, 2.0, 3.0, 4.0, 5.0], 2.776 * (2.5 / 5) ** 0.5),
        ([0.0, 1.0] * 40, 2.042 * (20 / 79 / 80) ** 0.5),  # beyond the list its last quantile
    ],
)
def test_student_by_hand(values: list[float], half: float) -> None:
    found = seeds.student(values)
    mean = sum(values) / len(values)
    assert (found["mean"], found["n"]) == (mean, len(values))
    assert found["low"] == pytest.approx(mean - half) and found["high"] == pytest.approx(mean + half)


def test_one_seed_has_no_interval_and_says_so() -> None:
    full = ends(FULL)[:1]
    alone = [
        seeds.summarize("full", "all of WoVR", full, None),
        seeds.summarize("no_pace", "no refresh", ends(NO_PACE)[:1], full),
    ]
    assert (alone[1]["sampled"]["against"]["low"], alone[1]["sampled"]["gain"]["high"]) == (None, None)
    said = " ".join(seeds.state(alone))
    assert "no interval over seeds" in said and "spread over seeds: none" in said
    assert any("-21.9 [one seed]" in cell for row in seeds.tables(alone)[1]["rows"] for cell in row)


def test_greedy_is_left_out_where_a_run_of_before_did_not_keep_its_outcomes() -> None:
    full, old = rows(greedy=False)
    assert old["greedy"] is None and old["sampled"]["against"]["n"] == 3 and full["greedy"]
    assert seeds.read_outcomes({"outcomes": [1, 0]}) == {"sampled": [1, 0]}
    measured = ((1.0, [1, 0]), (0.5, [1, 1]), (0.0, [0, 0]))
    kept = [{"temperature": t, "rate": sum(each) / 2, "outcomes": each} for t, each in measured]
    found = seeds.read_outcomes({"outcomes": [1, 0], "temperatures": kept})
    assert found == {"sampled": [1, 0], "greedy": [0, 0], "best": [1, 1]}
    assert seeds.tables([full, old])[0]["rows"][2][3] == "-"


def test_tables_and_sentences_of_a_study() -> None:
    results = {"tables": seeds.tables(rows()), "remarks": seeds.state(rows()), "study": rows()}
    assert json.loads(json.dumps(results))
    said = text.render_text(results)
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert "As sampled in training: all of WoVR gained most over the base, +50.7 [+45.0, +56.3] points." in " ".join(
        lines
    )
    assert "no refresh 768 68.4% 93.8% 93.8% +38.1 [+14.3, +61.9] +3.9 [+3.9, +3.9] +3.9 [+3.9, +3.9]" in lines
    assert any(line.endswith("-21.9 -5.7 -10.2 -12.6 [-33.4, +8.2] -14.2 to -10.9") for line in lines)
    shown = page.render(results)
    assert shown.count("<h2>") == 4 and seeds.LAYOUTS in shown
    assert 'class="hollow"' in shown and 'title="50.7, 95% between 45.0 and 56.3"' in shown


def test_a_curve_lies_over_true_episodes() -> None:
    few, many = ends(NO_PACE, 96), ends(FULL, 768)
    points = [seeds.summarize("full", "768", many, None), seeds.summarize("a", "96", few, many)]
    sampled, greedy = seeds.curves(points, {"full": "imagined GRPO", "a": "imagined GRPO"})
    (name, line), *more = sampled["lines"]
    assert name == "imagined GRPO" and not more and [x for x, *_ in line] == [96.0, 768.0]
    assert line[1][1] == pytest.approx(sum(FULL) / 3 / 512)
    drawn = page.render({"tables": [sampled, greedy]})
    assert drawn.count('class="dot series s0"') == 4
    assert seeds.curves(points, {}) == []
