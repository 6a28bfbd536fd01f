"""Takes a policy to the robot: as a folder for PyTorch, or as a self-contained bundle for JAX.

    python launch/export.py --run runs/pace --to jax --out robot           the run's last policy
    python launch/export.py --run runs/pace --round 0 --to jax --out base  its base policy
    python launch/export.py --policy weights/goal/policy.json --to torch --out robot
    python launch/export.py --policy weights/goal/policy.json --to jax --out robot \\
        --episodes data/goal --key libero_goal

--to torch writes the folder that OpenVLA-OFT's own code loads: weights and index new, every other file of the release
byte for byte. It needs a policy that was imported from a release (launch/import_weights.py); for a run that began
with one, name both: --run runs/mine --policy weights/goal/policy.json.

--to jax writes weights, action statistics, processing recipe, prompt tokens and the policy as one program for CPU, CUDA
and TPU. It runs with jax, numpy, safetensors and flatbuffers alone, and launch/serve.py serves it.

Nothing is put in its place before it was checked: a bundle replays recorded frames and has to act as the policy does in
every slot, a folder for torch is read again and compared bit for bit.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from collections.abc import Callable
from typing import NoReturn

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from launch import command


def main() -> None:
    """Exports what the command line names; everything wrong ends in one message on stderr."""
    args = parse()

    # Only now: importing jax takes seconds, a misspelt flag none.
    from wovr_jax.core.machine import peak_rss_gb

    began = time.perf_counter()
    stopped = "Stopped. Nothing was put in place."
    with command.explain_errors(stopped, place=args.out, kept="Nothing was left half written."):
        to_torch(args) if args.to == "torch" else to_jax(args)
    print(f"{time.perf_counter() - began:.1f} s, peak memory {peak_rss_gb():.2f} GiB")


def parse() -> argparse.Namespace:
    """Reads the command line; combinations that mean nothing are refused."""
    parser = command.Parser(__doc__)
    parser.add_argument("--run", type=pathlib.Path, metavar="FOLDER", help="a run folder; its last policy is exported")
    parser.add_argument("--policy", type=pathlib.Path, metavar="JSON", help="policy.json of an imported policy")
    parser.add_argument("--to", choices=("torch", "jax"), required=True, help="what to write")
    parser.add_argument("--out", type=pathlib.Path, metavar="FOLDER", required=True, help="where; made, or --overwrite")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument("--round", type=int, metavar="K", help="of a run: 0 is the base policy; default the last")
    parser.add_argument("--shard-gb", type=float, metavar="GB", help="to torch: largest weight file (default 5)")
    parser.add_argument("--frames", type=int, default=64, metavar="N", help="to jax: frames to replay (default 64)")
    parser.add_argument(
        "--episodes", type=pathlib.Path, metavar="FOLDER", help="to jax: episodes to replay; default the run's own"
    )
    parser.add_argument("--key", help="of the release's action statistics, where it has several (--policy)")
    besides = "an instruction besides those of the episodes (--policy); again for more"
    parser.add_argument("--instruction", action="append", default=[], metavar="TEXT", help=besides)
    args = parser.parse_args()
    check(args, parser.error)
    return args


def check(args: argparse.Namespace, refuse: Callable[[str], NoReturn]) -> None:
    """Refuses flags that do not go together."""
    # Here and not where they are used: a full-size export takes minutes before it would come to them.
    if not (args.run or args.policy):
        refuse("say what to export: --run FOLDER or --policy JSON")
    if args.to == "torch" and not args.policy:
        refuse("--to torch needs --policy JSON: an import that kept the release's other files")
    if args.to == "jax" and args.run and args.policy:
        refuse("--to jax takes --run or --policy, not both")
    if args.to == "jax" and args.policy and not args.episodes:
        refuse("--policy has no recorded frames of its own: name episodes of its robot with --episodes FOLDER")
    if args.round is not None and not args.run:
        refuse("--round is of a --run")
    if (args.key or args.instruction) and (args.run or args.to == "torch"):
        refuse("--key and --instruction go with --policy and --to jax; a run has its own")
    if args.shard_gb is not None and (args.to != "torch" or args.shard_gb <= 0):
        refuse("--shard-gb is a size above 0, for --to torch")
    if args.frames < 1:
        refuse("--frames is a number above 0")


def to_torch(args: argparse.Namespace) -> None:
    """Writes the folder for PyTorch."""
    from wovr_jax.core.tables import progress_bar
    from wovr_jax.export import source, torch_folder

    # A run gives the numbers; the import that it began with gives the release's names and its other files.
    trained = source.from_run(args.run, args.round) if args.run else None
    most = None if args.shard_gb is None else int(args.shard_gb * 1e9)
    with progress_bar("to torch") as progress:
        files = torch_folder.write(
            args.policy, args.out, trained=trained, shard_bytes=most, overwrite=args.overwrite, progress=progress
        )
    print("\n".join(map(str, files)))


def to_jax(args: argparse.Namespace) -> None:
    """Writes the bundle and says what the contract found."""
    from wovr_jax.core.tables import progress_bar
    from wovr_jax.export import bundle, source

    # A run knows its episodes, statistics and instructions; an import has none of them.
    if args.run:
        policy = source.from_run(args.run, args.round, episodes=args.episodes)
    else:
        policy = source.from_import(args.policy, args.episodes, key=args.key, instructions=args.instruction)
    with progress_bar("to jax", bundle.size(policy)) as progress:
        manifest = bundle.write(policy, args.out, frames=args.frames, overwrite=args.overwrite, progress=progress)
    print(f"{args.out}: {manifest['policy']}, {manifest['parameters']:,} parameters")
    for name, facts in manifest["files"].items():
        print(f"  {name:24s} {facts['bytes']:>14,} bytes")
    contract = manifest["contract"]
    for slot, largest in contract["differences"].items():
        far = f"largest difference {largest['action']:.1e}"
        print(f"{contract['frames']} recorded frames, {slot}: every action equal ({far})")


if __name__ == "__main__":
    main()
