"""The tool that draws a study for the documentation."""

from __future__ import annotations

import json
import pathlib
import sys

import pytest

pytest.importorskip("matplotlib")

from launch.tools import study_chart

MEASURED = pathlib.Path(__file__).parents[2] / "docs" / "results" / "baselines.json"


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["study_chart.py", *map(str, words)])
    study_chart.main()


def test_what_is_drawn_is_what_was_measured(tmp_path, monkeypatch, capsys) -> None:
    run(monkeypatch, MEASURED, "--out", tmp_path / "chart.png", "--join", tmp_path / "all.json")
    assert (tmp_path / "chart.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    facts = json.loads(MEASURED.read_text(encoding="utf-8"))
    assert json.loads((tmp_path / "all.json").read_text(encoding="utf-8")) == facts
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    rows = {cells[0]: cells for cells in lines if len(cells) == 8}
    ends = facts["runs"]["full"]
    rates = [end["final"]["greedy"].count("1") / len(end["final"]["greedy"]) for end in ends]
    assert rows["PACE"][1] == str(len(ends)) and rows["PACE"][4] == f"{sum(rates) / len(rates):.3f}"
    assert rows["base"][2] == "0" and list(rows)[-1] == "PACE"
    # Reference minus row, on the seeds that both have.
    against = {cells[0]: cells for cells in lines if len(cells) == 5}
    other = {end["seed"]: end["final"]["sampled"] for end in facts["runs"]["online"]}
    pairs = [(end["final"]["sampled"], other[end["seed"]]) for end in ends if end["seed"] in other]
    gaps = [(mine.count("1") - theirs.count("1")) / len(mine) for mine, theirs in pairs]
    assert against["online GRPO, same true budget"][1] == str(len(gaps))
    assert against["online GRPO, same true budget"][2].startswith(f"{100 * sum(gaps) / len(gaps):+.1f} [")


def test_what_has_not_run_yet_is_left_out(tmp_path, monkeypatch, capsys) -> None:
    facts = json.loads(MEASURED.read_text(encoding="utf-8"))
    facts["runs"]["online_4"] = []
    facts["settings"]["variants"] = ["online"]
    (tmp_path / "some.json").write_text(json.dumps(facts), encoding="utf-8")
    run(monkeypatch, tmp_path / "some.json", "--out", tmp_path / "chart.png")
    assert "four times" not in capsys.readouterr().out and (tmp_path / "chart.png").exists()


def test_seeds_of_other_settings_are_refused(tmp_path, monkeypatch) -> None:
    facts = json.loads(MEASURED.read_text(encoding="utf-8"))
    facts["settings"]["temperature"] = 9.0
    (tmp_path / "other.json").write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(SystemExit, match="1 other setting, such as temperature=9"):
        run(monkeypatch, MEASURED, tmp_path / "other.json", "--out", tmp_path / "chart.png")
    assert not (tmp_path / "chart.png").exists()
