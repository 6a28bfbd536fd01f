"""Tables as files: what the page shows, read back from CSV, and characters that LaTeX takes for commands."""

from __future__ import annotations

import csv
import pathlib

import pytest

from wovr_jax.report import paper

ROWS = [("variant", "gain, 95%"), ("50% of R&D_1", "+1.0 [0.5, 1.5]"), ("[base]", "-")]
STUDY = {"tables": [{"title": "Success, greedy: seed by seed", "rows": ROWS}, {"title": "empty", "rows": []}]}


def test_every_table_becomes_two_files_that_say_the_same(tmp_path: pathlib.Path) -> None:
    rate = {"rate": 0.5, "n": 4, "low": 0.1, "high": 0.9}
    phase = {"name": "base", "true_success": rate, "greedy": rate, "imagined_success": None, "subgoals": {}}
    results = STUDY | {"phases": [phase]}
    written = paper.write(results, tmp_path / "deep" / "tables")
    assert [path.name for path in written] == [
        *("policies.csv", "policies.tex"),
        *("success_greedy_seed_by_seed.csv", "success_greedy_seed_by_seed.tex"),
    ]
    with written[2].open(newline="", encoding="utf-8") as file:
        assert [tuple(row) for row in csv.reader(file)] == ROWS
    assert "base & 50.0\\%" in written[1].read_text(encoding="utf-8")


def test_latex_reads_cells_as_text() -> None:
    lines = paper.render_latex(ROWS).splitlines()
    assert lines[0] == r"\begin{tabular}{lr}" and lines[-1] == r"\end{tabular}"
    assert lines[2] == r"variant & gain, 95\% \\"
    assert lines[4] == r"50\% of R\&D\_1 & +1.0 [0.5, 1.5] \\"
    # At the beginning of a row a bracket would belong to the end of the one before.
    assert lines[5] == r"{}[base] & - \\"
    assert paper.render_latex([("a\\b", "c~d")]).splitlines()[2] == r"a\textbackslash{}b & c\textasciitilde{}d \\"


def test_nothing_measured_is_said_and_nothing_written(tmp_path: pathlib.Path) -> None:
    with pytest.raises(paper.NoTableError, match="at least one table, got none"):
        paper.write({"phases": []}, tmp_path / "tables")
    assert not (tmp_path / "tables").exists()
