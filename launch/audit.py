"""Holds imagination against the truth in a finished run, or in rollouts of another program's world model.

    python launch/audit.py runs/pace                          what is missing is made, the tables are printed
    python launch/audit.py runs/pace --config.mesh.data=4     over other devices than the run began on
    python launch/audit.py runs/pace --rank                   do its worlds rank its policies, and how far do they go?
    python launch/audit.py runs/pace --ladder                 the same, with policies of a part of its data too
    python launch/audit.py runs/pace --signs                  and what tells where they lie, before the truth is known?
    python launch/audit.py runs/pace --twins                  the same, and each world model is trained a second time
    python launch/audit.py --foreign rollouts                 rollouts that any program wrote: docs/trust.md

Every run of the whole loop ends with the first of these. Each policy meets the world model that taught it, and the one
that was refreshed for it. Its recorded actions are replayed there (stages compare-*, with films); and in a closed loop
it plays there as it does when it learns, while the true simulator follows the actions that it chose (closed-*). How
many rollouts, the settings of the run say: evaluate.compare, evaluate.videos, evaluate.closed. The tables go to
results.json and the page. What is there already is not made again, and the same command continues an audit that was
interrupted. A run by several processes is audited by several, started as those of launch/train.py.

--rank, --ladder, --signs and --twins are asked for, because they take minutes: their stages lie in <run>/trust/ and
their answers in results.json and on the page. docs/trust.md says how to read them.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

# Python puts this file's folder first on the path; the packages lie one above it.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from launch import command, flags


def main() -> None:
    """Audits a run, then has its page made again; or audits a folder of rollouts."""
    parser = command.Parser(__doc__)
    parser.add_argument("run", type=pathlib.Path, nargs="?", help="the run folder")
    parser.add_argument("--rank", action="store_true", help="try every policy of the run in every world of it")
    parser.add_argument("--ladder", action="store_true", help="and policies that imitate a part of its demonstrations")
    parser.add_argument("--signs", action="store_true", help="and look for signs by which a lie is known")
    parser.add_argument("--twins", action="store_true", help="and train every world model a second time, and ask that")
    words = "start states of each policy for --rank, --ladder, --signs and --twins (default 256)"
    parser.add_argument("--episodes", type=flags.positive, help=words)
    words = "percent of the demonstrations for --ladder (default 10,20,30,50,100)"
    parser.add_argument("--shares", type=read_shares, help=words)
    parser.add_argument("--foreign", type=pathlib.Path, metavar="FOLDER", help="rollouts to audit in place of a run")
    parser.add_argument("--out", type=pathlib.Path, help="where the page of --foreign goes (default FOLDER/audit)")
    parser.add_argument("--chunk", type=flags.positive, help="steps of a chunk for --foreign (default 8)")
    changes, rest = command.split_changes(sys.argv[1:])
    options = parser.parse_args(rest)
    if (options.run is None) == (options.foreign is None):
        parser.error("the following arguments are required: run, or --foreign FOLDER, and not both")
    mesh: dict[str, Any] = {}
    for path, text in changes:
        if options.foreign or not path.startswith("mesh."):
            parser.error(f"--config.{path}: a finished run keeps its settings; only --config.mesh.* may be others")
        command.put(mesh, path, text)
    check_flags(parser, options)
    if options.foreign:
        audit_rollouts(options)
    else:
        audit_run(options, mesh.get("mesh"))


def read_shares(text: str) -> list[float]:
    """Returns 10,20 as shares, [0.1, 0.2]."""
    try:
        shares = [float(word) / 100 for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected percents with commas between them, got {text}") from None
    if not (all(0 < share <= 1 for share in shares) and shares == sorted(set(shares))):
        raise argparse.ArgumentTypeError(f"expected percents above 0, at most 100, in ascending order, got {text}")
    return shares


def check_flags(parser: command.Parser, options: Any) -> None:
    """Refuses flags that belong to another question."""
    of_run, of_rollouts = ("rank", "ladder", "signs", "twins", "episodes", "shares"), ("out", "chunk")
    for name in of_run if options.foreign else of_rollouts:
        if getattr(options, name):
            parser.error(f"--{name} is of {'a run' if options.foreign else '--foreign FOLDER'}")
    if options.episodes and not is_asked(options):
        parser.error("--episodes is of --rank, --ladder, --signs and --twins")
    if options.shares and not options.ladder:
        parser.error("--shares is of --ladder")


def is_asked(options: Any) -> bool:
    """Whether more is asked than the audit that every run ends with."""
    return options.rank or options.ladder or options.signs or options.twins


def audit_run(options: Any, mesh: dict[str, int] | None) -> None:
    """Audits a run and becomes the program that makes its page."""
    run = options.run
    asked = {name: value for name in ("episodes", "shares") if (value := getattr(options, name)) is not None}
    with command.explain_errors(f"Stopped. {run} is kept up to here; the same command continues it.", place=run):
        # Only now: importing jax takes seconds, a misspelt flag none.
        from wovr_jax.core import processes

        with processes.join():
            # After the processes have met: some of these modules hold arrays.
            from wovr_jax.audit import runner
            from wovr_jax.audit.trust import TrustConfig
            from wovr_jax.core import config

            wanted = config.from_dict(TrustConfig, asked) if is_asked(options) else None
            runner.audit(run, mesh, wanted, ladder=options.ladder, signs=options.signs, twins=options.twins)
            first = processes.first()  # asked here: outside, every process is on its own again
    if first:
        command.become("tools/report.py", run)


def audit_rollouts(options: Any) -> None:
    """Audits a folder of rollouts, writes its page and prints the answers."""
    out = options.out or options.foreign / "audit"
    with command.explain_errors("Stopped. Nothing was written.", place=options.foreign):
        from wovr_jax.audit import foreign
        from wovr_jax.report import trust

        results, page = foreign.audit(options.foreign, out, options.chunk or foreign.CHUNK)
        print(f"{trust.render_text(results['trust'])}\n\n{page}")


if __name__ == "__main__":
    main()
