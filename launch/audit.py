"""Holds imagination against the truth in a finished run; every run of the whole loop ends with it.

    python launch/audit.py runs/pace                          what is missing is made, the tables are printed
    python launch/audit.py runs/pace --config.mesh.data=4     over other devices than the run began on

Each policy meets the world model that taught it, and the one that was refreshed for it. Its recorded actions are
replayed there (stages compare-*, with films); and in a closed loop it plays there as it does when it learns, while the
true simulator follows the actions that it chose (closed-*). How many rollouts, the settings of the run say:
evaluate.compare, evaluate.videos, evaluate.closed. The tables go to results.json and the page. What is there already is
not made again, and the same command continues an audit that was interrupted. A run by several processes is audited by
several, started as those of launch/train.py.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

# Python puts this file's folder first on the path; the packages lie one above it.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from launch import command


def main() -> None:
    """Audits the run, then has its page made again."""
    parser = command.Parser(__doc__)
    parser.add_argument("run", type=pathlib.Path, help="the run folder")
    settings: dict[str, Any] = {}
    changes, rest = command.split_changes(sys.argv[1:])
    for path, text in changes:
        if not path.startswith("mesh."):
            parser.error(f"--config.{path}: a finished run keeps its settings; only --config.mesh.* may be others")
        command.put(settings, path, text)
    run = parser.parse_args(rest).run
    with command.explain_errors(f"Stopped. {run} is kept up to here; the same command continues it.", place=run):
        # Only now: importing jax takes seconds, a misspelt flag none.
        from wovr_jax.core import processes

        with processes.join():
            # After the processes have met: some of these modules hold arrays.
            from wovr_jax.audit import runner

            runner.audit(run, settings.get("mesh"))
            first = processes.first()  # asked here: outside, every process is on its own again
    if first:
        command.become("tools/report.py", run)


if __name__ == "__main__":
    main()
