"""Makes the page of a run from what lies in its folder; every training ends with it.

    python launch/tools/report.py runs/pace
    python launch/tools/report.py runs/pace --json     results.json and the page's path for a program, no tables
    python launch/tools/report.py runs/study --tables tables         every table as CSV and LaTeX, for a paper
    python launch/tools/report.py runs/pace runs/second runs/third     compares runs on one page, comparison.html
    python launch/tools/report.py runs/pace runs/second --out page.html

It reads results.json, metrics.jsonl and the videos, writes report.html beside them, and prints the tables. It is a
program of its own, so that a page that cannot be made costs no results, and whoever reads how training works need
not read how pages are drawn.
"""

from __future__ import annotations

import pathlib
import sys

# Python puts this file's folder first on the path; the packages lie two above it.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[2])

from launch import command, terminal


def main() -> None:
    """Writes the page and prints its tables."""
    parser = command.Parser(__doc__)
    parser.add_argument("runs", type=pathlib.Path, nargs="+", metavar="run", help="a run folder; several are compared")
    parser.add_argument("--out", type=pathlib.Path, help="page of a comparison (default: comparison.html, here)")
    parser.add_argument("--json", action="store_true", help="of one run, for a program: nothing but JSON on stdout")
    parser.add_argument("--tables", type=pathlib.Path, metavar="FOLDER", help="of one run: write its tables there")
    options = parser.parse_args()
    runs = options.runs
    if len(runs) > 1:
        if options.json or options.tables:
            flag = "--json" if options.json else "--tables"
            parser.error(f"{flag} is for one run; what several have is in the results.json of each")
        compare_runs(runs, options.out or pathlib.Path("comparison.html"))
        return
    (run,) = runs
    if options.out:
        parser.error(f"--out is for several runs; the page of one lies in its folder, {run / 'report.html'}")
    if not (run / "results.json").is_file():
        command.refuse(f"{run} holds no results.json; a report is made of what launch/train.py has written there.")
    with command.explain_errors("Stopped.", place=run):
        from wovr_jax.core.disk import read_json
        from wovr_jax.report import page, paper, tables, trust

        path, results = page.write(run), read_json(run / "results.json")
        written = paper.write(results, options.tables) if options.tables else []
        if options.json:
            terminal.print_json({"page": str(path), "tables": [*map(str, written)], "results": results})
            return
        parts = [tables.render_text(results)]
        if "trust" in results:  # asked for on request
            parts.append(trust.render_text(results["trust"]))
        print("\n\n".join([*parts, "\n".join(map(str, [*written, path]))]))


def compare_runs(runs: list[pathlib.Path], out: pathlib.Path) -> None:
    """Writes the page of several runs and prints its tables."""
    with command.explain_errors("Stopped.", place=out):
        from wovr_jax.report import compare

        entries = compare.read(runs)
        print(f"{compare.render_text(entries)}\n\n{compare.write(entries, out)}")


if __name__ == "__main__":
    main()
