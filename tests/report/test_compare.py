"""Several runs on one page, from made-up results: who is best and by how much, what differs, and what is refused."""

from __future__ import annotations

import copy
import json
import pathlib

import numpy as np
import pytest

from tests.report.test_page import Outline, gain, rate, results
from wovr_jax.report import compare
from wovr_jax.report.compare import CompareError, Entry

SETTINGS = {"seed": 3, "sim": {"size": 32}, "relay": None, "libero": None, "learner": {"lr": 5e-4, "clip": 0.2}}


def outcomes(successes: int, n: int = 512) -> list[bool]:
    return [True] * successes + [False] * (n - successes)


def make_results(true: int, greedy: int) -> dict:
    """Results whose final policy has so many true successes of 512."""
    made = copy.deepcopy(results())
    final = {"true_success": rate(true), "greedy": rate(greedy), "outcomes": outcomes(true)}
    final["temperatures"] = [{"temperature": 0.0, "outcomes": outcomes(greedy), **rate(greedy)}]
    made["phases"][-1] |= final
    return made


def make_run(folder: pathlib.Path, true: int = 321, greedy: int = 330, **changes) -> pathlib.Path:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(make_results(true, greedy)))
    (folder / "config.json").write_text(json.dumps(SETTINGS | changes))
    steps = ({"stage": "grpo-1", "step": k, "time": 0.0, "true_success": 0.1 * k, "loss": 7.0} for k in (1, 2, 3))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    return folder


@pytest.fixture
def entries(tmp_path: pathlib.Path) -> list[Entry]:
    slow = {"learner": {"lr": 1e-4, "clip": 0.2}, "seed": 4}
    return compare.read([make_run(tmp_path / "first"), make_run(tmp_path / "slow", 240, 350, **slow)])


def test_the_answer_comes_first(entries: list[Entry]) -> None:
    sampled, greedy, caution = compare.state_findings(entries)
    assert sampled.startswith("Highest true success as it samples: first, 62.7% (after PACE, 512 start states); +15.8")
    assert "over slow (46.9%; 95% +9.7 to +21.7)" in sampled and "paired" not in sampled and "chance" not in sampled
    assert greedy.startswith("Highest true success greedy: slow, 68.4%") and "which may be chance" in greedy
    assert "nothing of another seed" in caution
    page = compare.render(entries)
    assert page.index("Highest true success") < page.index("<h2>")


def test_an_unpaired_difference_is_newcombes(tmp_path: pathlib.Path) -> None:
    """Newcombe 1998, table II, method 10, contrast (a): 56/70 less 48/80 is 0.2 between 0.0524 and 0.3339."""
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=9)
    for folder, won, n in ((first, 56, 70), (second, 48, 80)):
        made = json.loads((folder / "results.json").read_text())
        made["phases"][-1] |= {"true_success": rate(won, n), "outcomes": outcomes(won, n)}
        (folder / "results.json").write_text(json.dumps(made))
    lead, paired = compare._lead_over(*compare.read([first, second]), "true_success")
    assert not paired
    np.testing.assert_allclose([lead["gain"], lead["low"], lead["high"]], [0.2, 0.0524, 0.3339], atol=1e-4)


def test_the_same_layouts_are_paired(tmp_path: pathlib.Path) -> None:
    both = compare.read([make_run(tmp_path / "a", 321, 330), make_run(tmp_path / "b", 301, 330)])
    lead, paired = compare._lead_over(*both, "true_success")
    assert paired and lead == pytest.approx(gain(20, 0) | {"gain": 20 / 512}, abs=0.02)
    assert "paired by layout" in compare.state_findings(both)[0]
    # Other tasks under the same seed are other layouts, and so are other seeds.
    (other,) = compare.read([make_run(tmp_path / "c", 301, 330, sim={"size": 16})])
    assert not compare._lead_over(both[0], other, "true_success")[1]


def test_every_policy_of_every_run_has_a_row(entries: list[Entry]) -> None:
    head, *rows = compare.success_rows(entries)
    assert head == ("run", "policy", "episodes", "sampled", "95%", "greedy", "95%", "imagined")
    assert [row[:2] for row in rows] == [(e.name, p["name"]) for e in entries for p in e.results["phases"]]
    assert rows[-1] == ("slow", "after PACE", "512", "46.9%", "42.6% - 51.2%", "68.4%", "64.2% - 72.2%", "66.0%")


def test_what_was_paid_is_that_of_the_final_policy(entries: list[Entry]) -> None:
    row = compare.closed_rows(entries)[1]
    last = results()["closed_loop"][-1]
    assert row[0] == "first" and row[1].startswith(last["policy"])
    assert (
        row[2] == f"{last['all']['false_success']['rate']:.1%}" and row[-2] == f"{last['all']['precision']['rate']:.1%}"
    )
    silent = Entry("old", {"phases": results()["phases"]}, SETTINGS, [])
    assert len(compare.closed_rows([silent, silent])) == 1
    assert 'id="closed"' not in compare.render([silent, silent])


def test_measuring_is_no_learning(entries: list[Entry]) -> None:
    ledger = {
        "demonstrations": {"episodes": 56, "true_steps": 1344, "seconds": 1.0},
        "evaluate-0": {"episodes": 512, "true_steps": 9999, "seconds": 1.0},
        "collect-0": {"episodes": 192, "true_steps": 4608, "seconds": 1.0},
        "closed-0-in-world-0": {"episodes": 128, "true_steps": 99, "imagined_frames": 30, "seconds": 1.0},
        "grpo-1": {"episodes": 40, "true_steps": 960, "imagined_frames": 1000, "seconds": 61.0},
    }
    row = compare.ledger_rows([Entry("a", {"ledger": ledger}, {}, [])])[1]
    assert row == ("a", "56", "192", "40", "288", "6,912", "640", "1,030", "1 min 05 s")


def test_settings_that_differ(entries: list[Entry]) -> None:
    assert compare.setting_rows(entries)[1:] == [("seed", "3", "4"), ("learner.lr", "0.0005", "0.0001")]
    missing = Entry("old", results(), {"seed": 3}, [])
    assert ("learner.clip", "0.2", "-") in compare.setting_rows([entries[0], missing])
    assert "All settings are equal." in compare.render_text([entries[0], entries[0]])


def test_the_page_holds_all_of_it_and_loads_nothing(entries: list[Entry], tmp_path: pathlib.Path) -> None:
    text = compare.write(entries, tmp_path / "new" / "page.html").read_text()
    outline = Outline(text)
    for words in ("first and slow", "2 runs of tabletop", "Settings that differ", "grpo-1: true success, watched"):
        assert words in outline.text
    assert text.count("<figure>") == 2 and "loss" not in text.split("</style>")[1]
    assert "src=" not in text and "href=" not in text and "<script" not in text
    assert text.count("<tr ") == sum(len(e.results["phases"]) for e in entries) + 2 + 2 + 2
    assert "Highest true success" in compare.render_text(entries)


def test_runs_of_one_name_are_told_apart(tmp_path: pathlib.Path) -> None:
    folders = [make_run(tmp_path / day / "pace") for day in ("mon", "tue")]
    assert [entry.name for entry in compare.read(folders)] == ["mon/pace", "tue/pace"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "results.json").unlink(), "two: holds no results.json; launch/train.py writes it"),
        (lambda folder: (folder / "config.json").unlink(), "two: holds no config.json"),
        (lambda folder: (folder / "results.json").write_text("{"), "results.json: cannot be read"),
        (lambda folder: (folder / "results.json").write_text("[]"), "results.json: expected a map, got list"),
        (
            lambda folder: (folder / "results.json").write_text('{"job": "ladder"}'),
            "two: results of a job 'ladder', which measured no policy's true success",
        ),
        (
            lambda folder: (folder / "config.json").write_text(json.dumps(SETTINGS | {"relay": {"size": 32}})),
            "two: a run of relay, and .*one is one of tabletop",
        ),
        (
            lambda folder: (folder / "config.json").write_text(json.dumps({"libero": {"suite": "libero_spatial"}})),
            "two: a run of libero_spatial",
        ),
    ],
)
def test_what_cannot_be_compared_is_said(tmp_path: pathlib.Path, spoil, words: str) -> None:
    folders = [make_run(tmp_path / name) for name in ("one", "two")]
    spoil(folders[1])
    with pytest.raises(CompareError, match=f"These runs cannot be compared:\n.*{words}"):
        compare.read(folders)


def test_all_that_is_wrong_is_said_at_once(tmp_path: pathlib.Path) -> None:
    one = make_run(tmp_path / "one")
    (tmp_path / "link").symlink_to(one)
    with pytest.raises(CompareError) as refused:
        compare.read([one, tmp_path / "link", tmp_path / "nothing", one])
    assert str(refused.value).splitlines()[1:] == [
        f"{tmp_path / 'link'}: the same run as {one}",
        f"{one}: the same run as {one}",
        f"{tmp_path / 'nothing'}: holds no results.json; launch/train.py writes it when a run is finished",
    ]
