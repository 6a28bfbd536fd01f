"""Latency of the policy server on this machine: a client asks for one chunk after another over loopback.

    python launch/benchmark_serve.py runs/pace                    2,000 observations
    python launch/benchmark_serve.py robot --requests 200

Starts launch/serve.py with the policy in a process of its own, as a robot's server runs, and prints the median and the
99th percentile of the whole round trip and of the policy alone.
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import numpy as np
from websockets.sync.client import connect

from wovr_jax.export import wire

UNMEASURED = 20
"""Requests before the measurement."""


def main() -> None:
    """Starts the server, measures, prints two lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=pathlib.Path, help="a robot bundle or a run folder")
    parser.add_argument("--requests", type=int, default=2000, help="observations to send (default 2000)")
    parser.add_argument("--prompt", default="pick up the red block and put it on the plate", help="the instruction")
    args = parser.parse_args()
    command = [sys.executable, ROOT / "launch" / "serve.py", args.source, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            said = server.stdout.readline() if server.stdout else ""
            if not said:
                sys.exit("the server did not start")
            print(said.strip())
            measure(said.split()[-1], args.prompt, args.requests)
        finally:
            server.terminate()


def measure(url: str, prompt: str, requests: int) -> None:
    """Sends observations one after another and prints percentiles in milliseconds."""
    rng = np.random.default_rng(0)
    with connect(url, compression=None, max_size=None) as connection:
        told = wire.unpack(bytes(connection.recv()))
        shape = told["image"]["height"], told["image"]["width"], 3
        frame_KHWC = rng.integers(0, 256, (64, *shape), np.uint8)
        whole, policy = [], []
        for i in range(UNMEASURED + requests):
            began = time.perf_counter()
            connection.send(wire.pack({"observation/image": frame_KHWC[i % 64], "prompt": prompt}))
            reply = connection.recv()
            whole.append(1000.0 * (time.perf_counter() - began))
            if isinstance(reply, str):
                sys.exit(reply)
            policy.append(wire.unpack(reply)["server_timing"]["infer_ms"])
    print(f"{requests} observations of {shape[0]} x {shape[1]}, {told['chunk']} x {told['action_dim']} actions each")
    for name, taken in (("round trip", whole), ("policy", policy)):
        half, most = np.percentile(taken[UNMEASURED:], [50, 99])
        print(f"{name:10s} p50 {half:.2f} ms, p99 {most:.2f} ms")


if __name__ == "__main__":
    main()
