"""The tables of a run or a study as files for a paper: CSV for programs, LaTeX for pages.

A LaTeX table is a ``tabular`` with the rules of the package booktabs, to be put between ``\\\\begin{table}`` and a
caption of one's own.
"""

from __future__ import annotations

import csv
import io
import os
import pathlib
import re

from wovr_jax.core.disk import replace_file
from wovr_jax.report import tables, trust
from wovr_jax.report.results import Results
from wovr_jax.report.tables import Rows

ESCAPED = {char: f"\\{char}" for char in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
"""A character that LaTeX reads as a command -> how it is written."""


class NoTableError(ValueError):
    """Results in which nothing was measured yet."""


def collect_tables(results: Results) -> dict[str, Rows]:
    """Returns every table that the page of these results shows and that has a row, by the name of its file."""
    phases, answers = results.get("phases") or (), results.get("trust") or {}
    found = {
        "policies": tables.policy_rows(phases),
        "temperatures": tables.temperature_rows(phases) if phases else [],
        "subgoals": tables.subgoal_rows(phases) if phases else [],
        "closed_loop": tables.closed_rows(results.get("closed_loop") or ()),
        "replay": tables.world_rows(results.get("comparison") or ()),
        "cost": tables.cost_rows(results.get("ledger") or {}),
    }
    if answers:
        found |= {
            "trust_policies": trust.policy_rows(answers),
            "trust_ranking": trust.ranking_rows(answers),
            "trust_horizon": trust.horizon_rows(answers),
            "trust_signs": trust.sign_rows(answers),
        }
    # Those of a study have a title, of which the file gets its name.
    found |= {_name_file(table["title"]): table["rows"] for table in results.get("tables") or ()}
    return {name: rows for name, rows in found.items() if len(rows) > 1}


def write(results: Results, folder: str | os.PathLike) -> list[pathlib.Path]:
    """Writes ``<name>.csv`` and ``<name>.tex`` of every table into ``folder``, which is made; returns their paths.

    Raises:
      NoTableError: results without a table.
    """
    found, written = collect_tables(results), []
    if not found:
        raise NoTableError(
            "--tables: expected results with at least one table, got none: nothing was measured in this run yet. "
            "Let it go on with the command that began it."
        )
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    for name, rows in found.items():
        for ending, text in (("csv", render_csv(rows)), ("tex", render_latex(rows))):
            path = pathlib.Path(folder) / f"{name}.{ending}"
            with replace_file(path) as fresh:
                fresh.write_text(text, encoding="utf-8")
            written.append(path)
    return written


def render_csv(rows: Rows) -> str:
    """Returns rows as CSV, the head first; cells are written as the page shows them."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def render_latex(rows: Rows) -> str:
    """Returns rows as a ``tabular``: words left, everything else right, a rule under the head."""
    head, *body = ([_escape(cell) for cell in row] for row in rows)
    lines = [" & ".join(row) + r" \\" for row in body]
    return "\n".join(
        [
            r"\begin{tabular}{l" + "r" * (len(head) - 1) + "}",
            r"\toprule",
            " & ".join(head) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _escape(cell: str) -> str:
    text = "".join(ESCAPED.get(char, char) for char in cell)
    # Behind the end of a row a bracket would be read as the space to leave there.
    return "{}" + text if text.startswith("[") else text


def _name_file(title: str) -> str:
    return re.sub(r"\W+", "_", title.lower()).strip("_")
