"""The tool that draws a ranking for the documentation."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from launch.tools import ranking_chart
from wovr_jax.evaluate import summarize_outcomes


def trust() -> dict:
    def rate(successes: int) -> dict:
        return summarize_outcomes([1] * successes + [0] * (10 - successes))

    rates = {"true": rate(3), "imagined": [rate(5), rate(4)]}
    policies = [
        {"name": name, "ladder": name != "base", "sampled": rates, "greedy": rates} for name in ("base", "half")
    ]
    worlds = [{"name": f"world model of round {k}"} for k in (1, 2)]
    return {"levels": {"sampled": "sampled, T = 1", "greedy": "greedy"}, "policies": policies, "worlds": worlds}


def test_every_policy_stands_where_its_rates_are(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"trust": trust()}), encoding="utf-8")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures: list = []
    close = pyplot.close

    def keep(figure: Any) -> None:
        figures.append(figure)
        close(figure)

    monkeypatch.setattr(pyplot, "close", keep)
    monkeypatch.setattr(sys, "argv", ["chart", str(tmp_path / "results.json"), "--out", str(tmp_path / "chart.png")])
    ranking_chart.main()
    assert (tmp_path / "chart.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not pyplot.get_fignums()  # Nothing stays open for whoever counts figures next.
    panels = figures[0].axes
    assert [panel.get_title() for panel in panels] == ["sampled, T = 1", "greedy"]
    dots = {(line.get_xdata()[0], line.get_ydata()[0]) for line in panels[0].lines if line.get_marker() == "o"}
    assert dots == {(0.3, 0.5), (0.3, 0.4)} and "round 2" in panels[0].get_ylabel()


def test_a_run_that_was_not_asked_is_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "results.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["chart", str(tmp_path / "results.json"), "--out", str(tmp_path / "chart.png")])
    with pytest.raises(SystemExit, match="holds no ranking; launch/audit.py .* --rank makes one"):
        ranking_chart.main()
