"""How fast are the parts of a run here? Each part at the sizes of a config, on random weights, without a checkpoint.

    python launch/benchmark.py parts                                       the embedded table's, batch 8
    python launch/benchmark.py parts --config=configs/pace.py:libero_spatial,lora --batches=1,8,32 --parts=world,chunk
    python launch/benchmark.py parts --parts=decode,world --compare=world.vae.conv=native,fold
    python launch/benchmark.py parts --compare=world.dit.kernel=xla,cudnn --compare=world.flow.steps=5,2 --parts=chunk
    python launch/benchmark.py parts --config.dream.groups=4 --parts=dream,update

policy: a chunk of actions from a frame. encode, step, decode: the world model's VAE and one Euler step of its
transformer; world: its chunk of eight frames. reward: the classifier on them. chunk: all of these as imagination plays
them. dream: the rollouts of an iteration of RL; update: GRPO on them; world_step, sft_step: a step of training; the
last four take their sizes from the settings. Rates count the matrix products and convolutions of the program, and are
held against the best matrix product that is measured first. One device is measured. --compare times two values of a
setting in turn, A B A B, and prints the ratio with its spread; weights=float32,compute compares how frozen weights are
held. parts.json, parts.md and parts.html (the plot) are written after every part.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from launch import command
from launch.flags import positive

BATCHED = ("policy", "encode", "step", "decode", "world", "reward", "chunk")
WHOLE = ("dream", "update", "world_step", "sft_step")
PARTS = (*BATCHED, *WHOLE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this measurement."""
    add_settings(parser, "configs/pace.py")
    parser.add_argument("--batches", type=numbers, default=[8], metavar="N,N", help="rows at once; default 8")
    parser.add_argument("--parts", type=names, default=list(PARTS), metavar="NAME,NAME", help="default all")
    parser.add_argument("--repeats", type=positive, default=5, help="measurements of each part (default 5)")
    parser.add_argument(
        "--seconds", type=positive, default=20, help="after so many a part is not repeated (default 20)"
    )
    parser.add_argument(
        "--compare", type=pair, action="append", default=[], metavar="SETTING=A,B", help="two values of a setting"
    )
    parser.add_argument(
        "--weights", choices=("compute", "float32"), default="compute", help="dtype of frozen weights (default compute)"
    )
    parser.add_argument("--out", type=pathlib.Path, default=command.ROOT / "runs" / "benchmark", help="folder")


def add_settings(parser: argparse.ArgumentParser, config: str) -> None:
    """Adds ``--config``; ``settings`` reads it."""
    parser.add_argument(
        "--config",
        default=config,
        metavar="FILE[:PRESET]",
        help=f"settings, default {config}; --config.a.b=value changes one of them",
    )


def run(args: argparse.Namespace) -> None:
    """Measures the matrix rate, then part after part or pair after pair."""
    settings = read_settings(args)
    # Only now: importing jax takes seconds, a misspelt flag none.
    from launch.benchmarks import rendering
    from launch.benchmarks.session import Session

    title = command_line("parts")
    how = {"repeats": args.repeats, "seconds": args.seconds, "frozen": args.weights}
    session = Session(settings, args.out, title=title, **how)
    # Every pair before the first measurement: a value that does not fit is told at once.
    makers = [session.maker()]
    for setting, values in args.compare:
        makers += [session.maker({setting: value}) for value in values]
    wanted = list_wanted(args.parts, args.batches)
    print(f"{session.results['device']}, load {session.results['load']:.1f}", flush=True)
    session.measure_matrix()
    if args.compare:
        for setting, values in args.compare:
            session.compare(setting, values, wanted)
    else:
        print(f"\n{rendering.head_line()}", flush=True)
        session.measure(makers[0], wanted)
    print(f"\n{args.out / 'parts.md'}, with parts.json and the plot parts.html beside it")


def list_wanted(parts: Sequence[str], batches: Sequence[int]) -> list[tuple[str, int | None]]:
    """Returns every part with every batch; those whose sizes the settings give stand there once."""
    pairs = [(part, batch) for part in parts if part in BATCHED for batch in batches]
    return [*pairs, *((part, None) for part in parts if part in WHOLE)]


def read_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings that ``--config`` names, with the changes of the command line."""
    file, _, preset = args.config.partition(":")
    # From another directory too: the default is a file of this repository.
    path = file if pathlib.Path(file).is_file() else str(command.ROOT / file)
    settings = command.load_config(path if pathlib.Path(path).is_file() else file, preset)
    for name, text in args.changes:
        command.put(settings, name, text)
    return settings


def command_line(name: str) -> str:
    """Returns how this was started, without the folder of the results, which says nothing to others."""
    words, kept = iter(sys.argv[1:]), []
    for word in words:
        if word == "--out":
            next(words, None)
        elif not word.startswith("--out=") and word != name:
            kept.append(word)
    return " ".join(["launch/benchmark.py", name, *kept])


def numbers(text: str) -> list[int]:
    """Reads ``"1,8"`` as numbers of rows."""
    return [positive(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """Reads ``"policy,decode"`` as parts of a run, in the order of ``PARTS``."""
    asked = text.split(",")
    if unknown := [name for name in asked if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(PARTS)}, got {', '.join(unknown)}")
    return [name for name in PARTS if name in asked]


def pair(text: str) -> tuple[str, tuple[Any, Any]]:
    """Reads ``"world.vae.conv=native,fold"`` as a setting and two values of it."""
    setting, _, values = text.partition("=")
    both = tuple(command.parse_value(value) for value in values.split(","))
    if not setting or len(both) != 2 or both[0] == both[1] or "" in both:
        raise argparse.ArgumentTypeError(
            f"expected a setting and two values of it, such as world.vae.conv=native,fold, got {text}"
        )
    if setting == "weights" and not set(both) <= {"compute", "float32"}:
        raise argparse.ArgumentTypeError(f"expected weights=float32,compute, got {text}")
    return setting.removeprefix("config."), (both[0], both[1])
