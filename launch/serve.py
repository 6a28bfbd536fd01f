"""Serves a policy to robots over a WebSocket, in openpi's protocol.

    python launch/serve.py robot                     a bundle (launch/export_robot.py --to jax)
    python launch/serve.py runs/pace                 a run folder: its last policy
    python launch/serve.py robot --host 0.0.0.0 --api-key-file key.txt

Clients: openpi's own (pip install openpi-client), or notebooks/robot_client.py, which needs no JAX. They send
``observation/image`` (uint8, of the size that the server tells) and ``prompt``, and get ``actions`` (steps, 7).
Only this machine can connect unless --host says otherwise; GET /healthz answers OK. See docs/robot.md.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import TYPE_CHECKING

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

if TYPE_CHECKING:
    from wovr_jax.export.robot import Robot

LOCAL = ("127.0.0.1", "localhost", "::1")


def main() -> None:
    """Opens the policy, serves it until Ctrl-C."""
    args = parse()

    # Only now: importing jax takes seconds, a misspelt flag none.
    from wovr_jax.export.server import PolicyServer, ServerConfig

    try:
        key = read_key(args.api_key_file)
        if args.host not in LOCAL and key is None:
            print(
                f"warning: whoever reaches {args.host} can use this policy; --api-key-file sets a key", file=sys.stderr
            )
        robot = opened(args.source, args.round)
        cfg = ServerConfig(
            args.host, args.port, key, args.temperature, args.seed, int(args.max_mb * 2**20), args.clients
        )
        name, host = robot.about["policy"], f"[{args.host}]" if ":" in args.host else args.host
        PolicyServer(robot, cfg).run(lambda port: print(f"serving {name} at ws://{host}:{port}", flush=True))
    except ValueError as error:  # every refusal of the package is one, and says what to do
        if not type(error).__module__.startswith("wovr_jax."):
            raise
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"{error.filename or f'{args.host}:{args.port}'}: {error.strerror or error}")
    print("stopped", file=sys.stderr)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=pathlib.Path, help="a robot bundle or a run folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default 8000)")
    parser.add_argument("--api-key-file", type=pathlib.Path, metavar="FILE", help="its first line is the clients' key")
    parser.add_argument("--round", type=int, metavar="K", help="of a run: 0 is the base policy; default the last")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="of the sampling; 0, the default, takes the likeliest actions"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--max-mb", type=float, default=8.0, help="longest message, MiB (default 8)")
    parser.add_argument("--clients", type=int, default=16, help="most clients at once (default 16)")
    args = parser.parse_args()
    if args.max_mb <= 0 or args.clients < 1 or args.temperature < 0:
        parser.error("--max-mb is above 0, --clients at least 1, --temperature at least 0")
    return args


def opened(source: pathlib.Path, round_: int | None) -> Robot:
    """The policy of a bundle or of a run folder."""
    from wovr_jax.export import program
    from wovr_jax.export import source as sources
    from wovr_jax.export.robot import MANIFEST, BundleError, Robot

    if (source / MANIFEST).is_file():
        if round_ is not None:
            raise BundleError(f"{source} is a bundle, which has one policy; --round is for run folders.")
        return Robot.load(source)
    return program.make_robot(sources.from_run(source, round_))


def read_key(file: pathlib.Path | None) -> str | None:
    """The first line of a file."""
    if file is None:
        return None
    key = (file.read_text().splitlines() or [""])[0].strip()
    return key or sys.exit(f"{file} is empty; its first line is the key")


if __name__ == "__main__":
    main()
