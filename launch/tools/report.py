"""Makes the page of a run from what lies in its folder, also while the run goes on; every training ends with it.

    python launch/tools/report.py runs/pace
    python launch/tools/report.py runs/pace --json     results.json and the page's path for a program, no tables

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
    parser.add_argument("run", type=pathlib.Path, help="the run folder")
    parser.add_argument("--json", action="store_true", help="for a program: nothing but JSON on stdout")
    options = parser.parse_args()
    run = options.run
    if not (run / "results.json").is_file():
        command.refuse(f"{run} holds no results.json; a report is made of what launch/train.py has written there.")
    with command.explain_errors("Stopped.", place=run):
        from wovr_jax.core.disk import read_json
        from wovr_jax.report import page, tables, trust

        path, results = page.write(run), read_json(run / "results.json")
        if options.json:
            terminal.print_json({"page": str(path), "results": results})
            return
        parts = [tables.render_text(results)]
        if "trust" in results:  # asked for on request
            parts.append(trust.render_text(results["trust"]))
        print("\n\n".join([*parts, str(path)]))


if __name__ == "__main__":
    main()
