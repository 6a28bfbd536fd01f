"""Settles on behalf of a run what LIBERO needs of this machine; people ask launch/doctor.py.

    python launch/tools/settle_libero.py settle --draw             renderer, assets, environment of the workers
    python launch/tools/settle_libero.py fingerprint --renderer=egl

A run calls this program before it starts workers, and before it records episodes. It answers with JSON and exit status
0, or with a refusal in words and status 1. Assets that are not there are downloaded.
"""

from __future__ import annotations

import json
import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[2])

from launch import called, command


def main() -> None:
    """Settles it, or says what is missing."""
    parser = command.Parser(__doc__)
    parser.add_argument("what", choices=("settle", "fingerprint"))
    parser.add_argument("--draw", action="store_true", help="look for a renderer too")
    parser.add_argument("--renderer", help="for the fingerprint; empty where nothing is drawn")
    args = parser.parse_args()
    with called.answer_run():
        from wovr_jax.sim.libero import machine

        answer = machine.settle(args.draw) if args.what == "settle" else machine.fingerprint(args.renderer or None)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
