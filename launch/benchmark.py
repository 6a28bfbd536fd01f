"""How fast is this machine? Six measurements, each with a help of its own.

python launch/benchmark.py parts                                      every part of a run, at the sizes of a config
python launch/benchmark.py gpu                                        full size on one H100 or H200, in 8 minutes
python launch/benchmark.py import --folder=/tmp/import                weights of full size in, out and back
python launch/benchmark.py input --episodes=data/spatial_expert       from disk to device, for the world model
python launch/benchmark.py libero --workers=1,4                       control steps of the real LIBERO
python launch/benchmark.py serve runs/pace                            the policy server's latency
python launch/benchmark.py import --help                              what one of them measures, and its flags
"""

from __future__ import annotations

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from launch import command
from launch.benchmarks import data, gpu, libero, parts, server, weights

BENCHMARKS = {
    "parts": parts,
    "gpu": gpu,
    "import": weights,
    "input": data,
    "libero": libero,
    "serve": server,
}


def main() -> None:
    """Runs the measurement that the command line names and prints what came out."""
    parser = command.Parser(__doc__)
    choices = parser.add_subparsers(dest="benchmark", required=True, metavar=f"{{{','.join(BENCHMARKS)}}}")
    for name, module in BENCHMARKS.items():
        module.add_arguments(choices.add_parser(name, doc=module.__doc__))
    # Settings are split off first: argparse would have to know the name of each of them.
    changes, rest = command.split_changes(sys.argv[1:])
    options = parser.parse_args(rest)
    if changes and not hasattr(options, "config"):
        parser.error(f"--config.{changes[0][0]}: {options.benchmark} takes no settings; parts and gpu do")
    options.changes = changes
    # An OSError of a disk or a socket names no benchmark by itself.
    with command.explain_errors("Stopped.", place=options.benchmark):
        BENCHMARKS[options.benchmark].run(options)


if __name__ == "__main__":
    main()
