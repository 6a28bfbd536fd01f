"""Serves a policy to robots over a WebSocket, in openpi's protocol.

    python launch/serve.py robot                     a bundle (launch/export.py --to jax)
    python launch/serve.py runs/pace                 a run folder: its last policy
    python launch/serve.py robot --host 0.0.0.0 --api-key-file key.txt
    python launch/serve.py robot --record recordings      and writes the episodes that clients record there

Clients: openpi's own (pip install openpi-client), or notebooks/robot_client.py, which needs no JAX. They send
observation/image (uint8, of the size that the server tells) and prompt, and get actions (steps, 7).
Only this machine can connect unless --host says otherwise; GET /healthz answers OK. See docs/robot.md, and for
--record docs/recording.md.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import sys
from typing import TYPE_CHECKING

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from launch import command, flags

if TYPE_CHECKING:
    from wovr_jax.export.robot import Robot

LOCAL = ("127.0.0.1", "localhost", "::1")


def main() -> None:
    """Opens the policy, serves it until Ctrl-C."""
    args = parse()

    # Ctrl-C and SIGTERM in a server that runs end it well, with status 0; in one that still loads they end here.
    with command.explain_errors("stopped", place=f"{args.host}:{args.port}"):
        # Only now: importing jax takes seconds, a misspelt flag none.
        from wovr_jax.core import config
        from wovr_jax.export.listen import reserve
        from wovr_jax.export.recorder import RecordConfig, Recorder
        from wovr_jax.export.server import PolicyServer, ServerConfig

        key = read_key(args.api_key_file)
        # Nothing is refused here: in a robot's own network an open server may be what is wanted.
        if args.host not in LOCAL and key is None:
            warning = f"warning: whoever reaches {args.host} can use this policy; --api-key-file sets a key"
            print(warning, file=sys.stderr)
        flags = {"host": args.host, "port": args.port, "temperature": args.temperature, "seed": args.seed}
        limits = {"max_bytes": int(args.max_mb * 2**20), "connections": args.clients}
        cfg = config.from_dict(ServerConfig, flags | limits | {"api_key": key}, "server")
        # Before the policy, whose opening takes minutes: a port that is taken is said at once.
        sockets = reserve(cfg.host, cfg.port)
        if args.record:
            args.record.mkdir(parents=True, exist_ok=True)
        robot, recorder = open_policy(args.source, args.round), None
        if args.record:
            facts = {"policy": robot.about["policy"], "weights": robot.hash_weights(), "temperature": args.temperature}
            to_user = functools.partial(print, file=sys.stderr, flush=True)
            recorder = Recorder(config.from_dict(RecordConfig, {"folder": str(args.record)}, "record"), facts, to_user)
        # An IPv6 address stands in brackets in a URL.
        name, host = robot.about["policy"], f"[{args.host}]" if ":" in args.host else args.host
        server = PolicyServer(robot, cfg, sockets, recorder)
        server.run(lambda port: print(f"serving {name} at ws://{host}:{port}", flush=True))
    print("stopped", file=sys.stderr)


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = command.Parser(__doc__)
    parser.add_argument("source", type=pathlib.Path, help="a robot bundle or a run folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default 8000)")
    parser.add_argument("--api-key-file", type=pathlib.Path, metavar="FILE", help="its first line is the clients' key")
    parser.add_argument("--round", type=int, metavar="K", help="of a run: 0 is the base policy; default the last")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="of the sampling; 0, the default, takes the likeliest actions"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--record", type=pathlib.Path, metavar="FOLDER", help="write what clients record, see above")
    parser.add_argument("--max-mb", type=float, default=8.0, help="longest message, MiB (default 8)")
    parser.add_argument("--clients", type=flags.positive, default=16, help="most clients at once (default 16)")
    args = parser.parse_args()
    if args.max_mb <= 0 or args.temperature < 0 or not 0 <= args.port <= 65535:
        parser.error("--max-mb is above 0, --temperature at least 0, --port from 0 to 65535")
    return args


def open_policy(source: pathlib.Path, round_: int | None) -> Robot:
    """Opens the policy of a bundle, or of a round of a run folder."""
    from wovr_jax.export import program
    from wovr_jax.export import source as sources
    from wovr_jax.export.robot import MANIFEST, BundleError, Robot

    # A bundle holds a compiled program and a run folder weights, but what serves them is the same Robot.
    if (source / MANIFEST).is_file():
        if round_ is not None:
            raise BundleError(f"{source} is a bundle, which has one policy; --round is for run folders.")
        return Robot.load(source)
    return program.make_robot(sources.from_run(source, round_))


def read_key(file: pathlib.Path | None) -> str | None:
    """Returns the first line of a file, None without a file."""
    if file is None:
        return None
    # An editor ends the file with a newline, which is not part of the key.
    key = (file.read_text(encoding="utf-8").splitlines() or [""])[0].strip()
    return key or command.refuse(f"{file} is empty; its first line is the key")


if __name__ == "__main__":
    main()
