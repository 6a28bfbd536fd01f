"""Runs a study, many trainings that differ in one thing; or asks a trained world model whether it obeys.

    python launch/study.py --config=configs/ladder.py                         at which part does learning break?
    python launch/study.py --config=configs/ablations.py --config.seeds=0,1   what does each part of WoVR contribute?
    python launch/study.py --config=configs/world_study.py:strolls            and each part of the world model?
    python launch/study.py probe --run=runs/pace                              does the last world model of a run obey?
    python launch/study.py probe --run=runs/pace --stage=world-0              a named one
    python launch/study.py probe --run=runs/world_study --stage=cross-seed1   one of the study

The same command continues a study that was interrupted, and its results can be read meanwhile; flags and exit statuses
are those of launch/train.py.

probe gives one command at a time, from one frame, beside the true simulator. It prints how well the predicted gripper
goes where it is sent, axis by axis, over start frames that no stage trained on. Numbers, and a picture of one start
frame under every command, go to <run>/probe/. In it amber rows are true, blue ones imagined.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Mapping, Sequence

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from launch import command

COLUMNS = {
    "sign": "goes as told",
    "slope": "distance / true",
    "correlation": "correlation",
    "across": "strays, pixels",
    "lost": "gripper lost",
}
"""A number of the probe -> its head in the table."""


def main() -> None:
    """Runs a study, or the probe where the first word says so."""
    # By hand, not as a subcommand of argparse: a study has flags and no name, as launch/train.py has.
    words = sys.argv[1:]
    if words[:1] == ["probe"]:
        probe(words[1:])
    else:
        study(words)


def study(words: Sequence[str]) -> None:
    """Reads the settings, runs the study that they name, prints its table."""
    parser = command.Parser(__doc__)
    command.add_config(parser)
    command.add_change(parser)
    request = command.read(parser, words, door="study")
    settings, run = request.settings, request.run
    with command.explain_errors(f"Stopped. {run} is kept up to here; the same command continues it."):
        # Only now: importing jax takes seconds, a misspelt flag none.
        from wovr_jax.core import processes

        # Joined only to be refused by each of them in the same words: a study runs in one process.
        with processes.join():
            from wovr_jax.report import tables
            from wovr_jax.studies import runner

            results = runner.run(settings["job"], settings, run, allow_change=request.options.allow_config_change)
    print(f"{tables.render_text(results)}\n\n{run / 'report.html'}")


def probe(words: Sequence[str]) -> None:
    """Asks a world model of a run and prints its table."""
    parser = command.Parser(__doc__, prog="study.py probe")
    parser.add_argument("--run", type=pathlib.Path, required=True, metavar="FOLDER", help="a run folder")
    parser.add_argument("--stage", help="which of its world models; default: the last finished one")
    parser.add_argument("--starts", type=int, default=64, help="start frames to average over (default 64)")
    options = parser.parse_args(words)
    if options.starts < 2:  # the correlation of one start frame means nothing
        parser.error("--starts is at least 2")
    run = options.run
    with command.explain_errors("Stopped. Nothing was written."):
        from wovr_jax.studies import runner

        stage, numbers, picture = runner.probe(run, options.stage, options.starts)
    print(f"{run}, {stage}, {options.starts} start frames\n")
    print(probe_table(numbers))
    print(f"\n{picture}")


def probe_table(numbers: Mapping[str, Mapping[str, float]]) -> str:
    """Renders the numbers of a probe: axes down, numbers across."""
    lines = ["".join([" " * 6, *(f"{words:>17}" for words in COLUMNS.values())])]
    for axis, row in numbers.items():
        # Not every number has a meaning for every axis: jaws do not stray.
        cells = [f"{row[name]:17.3f}" if name in row else f"{'-':>17}" for name in COLUMNS]
        lines.append("".join([f"{axis:6}", *cells]))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
