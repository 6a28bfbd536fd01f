"""Trains: settings in, a run folder out.

    python launch/train.py --config=configs/pace.py                    the whole loop on the embedded table
    python launch/train.py --config=configs/pace.py:libero_spatial     a preset of the same file
    python launch/train.py --config=configs/sft.py --config.seed=1     one stage, one setting changed
    python launch/train.py --config=... --run=runs/mine                another run folder

The whole loop ends with launch/audit.py, which holds imagination against the truth, and every job with its page. The
same command continues a run that was interrupted. Ctrl-C and SIGTERM (a scheduler that takes the machine away) save
first; the exit status is then 130 or 143, 128 and the signal's number. A run folder belongs to the settings that made
it: other settings are refused, so that no result mixes two experiments, unless --allow_config_change says that this is
wanted; finished stages then stay as they are. Studies (configs/baselines.py, budget.py, refreshes.py, gates.py,
ladder.py, ablations.py, world_study.py) have a door of their own, launch/study.py. Works without installation, from any
directory.
"""

from __future__ import annotations

import pathlib
import sys

# Python puts this file's folder first on the path; the packages lie one above it.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from launch import command


def main() -> None:
    """Reads the settings, runs the job they name, prints one table."""
    parser = command.Parser(__doc__)
    command.add_config(parser)
    command.add_change(parser)
    request = command.read(parser, door="train")
    settings, run = request.settings, request.run
    with command.explain_errors(f"Stopped. {run} is kept up to here; the same command continues it."):
        # Only now: importing jax takes seconds, a misspelt flag none.
        from wovr_jax.core import processes

        with processes.join():
            # After the processes have met: some of these modules hold arrays.
            from wovr_jax import pace

            pace.run(settings["job"], settings, run, allow_change=request.options.allow_config_change)
            first = processes.first()  # asked here: outside, every process is on its own again
    if settings["job"] == "pace":
        # By name, or the audit would take the mesh on which the run began.
        mesh = {"data": 1} | settings.get("mesh", {})
        command.become("audit.py", run, *(f"--config.mesh.{axis}={size}" for axis, size in mesh.items()))
    # All processes end with the same results; one of them tells.
    if first:
        command.become("tools/report.py", run)


if __name__ == "__main__":
    main()
