"""The policy server on this machine: latency over loopback, and success when it drives the embedded table.

    python launch/benchmark.py serve runs/pace                    2,000 observations
    python launch/benchmark.py serve robot --requests 200
    python launch/benchmark.py serve runs/pace --table 256        also plays 256 layouts that no run trains on
    python launch/benchmark.py serve runs/pace --record           also asks while it records

Starts launch/serve.py with the policy in a process of its own, as a robot's server runs, and asks for one chunk after
another. Prints the median and the 99th percentile of the whole round trip and of the policy alone; with --table also
the share of episodes that succeed, every chunk played to its end, as evaluation in a run does. With --record it asks
again while every step of the chunks is recorded with two cameras, and says how long the message of a step takes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

from launch.command import ROOT
from launch.flags import positive

if TYPE_CHECKING:
    from websockets.sync.client import ClientConnection

UNMEASURED = 20
"""Requests before the measurement."""
EPISODE = 200
"""Steps of a recorded episode, at least."""
LAYOUTS = 9_000_000
"""First seed of the layouts; runs evaluate there and never train there."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this measurement."""
    parser.add_argument("source", type=pathlib.Path, help="a robot bundle or a run folder")
    parser.add_argument("--requests", type=positive, default=2000, help="observations to send (default 2000)")
    parser.add_argument("--prompt", default="pick up the red block and put it on the plate", help="the instruction")
    parser.add_argument("--record", action="store_true", help="also ask while every step is recorded, in a new folder")
    parser.add_argument("--table", type=int, metavar="N", default=0, help="episodes of the embedded table to play")


def run(args: argparse.Namespace) -> None:
    """Starts the server, measures, prints what came out."""
    from websockets.sync.client import connect

    from wovr_jax.export import wire

    # Port 0 takes a free one, which the server's first line names.
    command = [sys.executable, ROOT / "launch" / "serve.py", args.source, "--port", "0"]
    with contextlib.ExitStack() as held:
        if args.record:
            command += ["--record", held.enter_context(tempfile.TemporaryDirectory())]
        server = held.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        try:
            # Its first line ends in its address; without one it has refused, and said why on stderr.
            line = server.stdout.readline() if server.stdout else ""
            if not line:
                sys.exit("the server did not start")
            print(line.strip())
            with connect(line.split()[-1], compression=None, max_size=None) as connection:
                metadata = wire.unpack(bytes(connection.recv()))
                frame = (metadata["image"]["height"], metadata["image"]["width"], 3)
                latency(connection, frame, args.prompt, args.requests)
                if args.record:
                    latency(connection, frame, args.prompt, args.requests, record=True)
                if args.table:
                    print(f"the table: {play(connection, args.table)} of {args.table} episodes succeed")
        finally:
            server.terminate()


def latency(
    connection: ClientConnection, frame: tuple[int, int, int], prompt: str, requests: int, *, record: bool = False
) -> None:
    """Sends observations one after another and prints percentiles in milliseconds.

    Args:
      connection: to the server.
      frame: (H, W, 3), the shape of a picture.
      prompt: the instruction.
      requests: how many observations.
      record: whether every step of every chunk is recorded, a message each with two pictures.
    """
    import numpy as np

    # Noise: what a frame shows changes nothing in the time that it takes. A few frames are reused.
    frame_KHWC = np.random.default_rng(0).integers(0, 256, (64, *frame), np.uint8)
    taken: dict[str, list[float]] = {"round trip": [], "policy": []} | ({"step": [], "end": []} if record else {})
    steps = 0
    for i in range(UNMEASURED + requests):
        seen = {"image": frame_KHWC[i % 64]}
        if record and steps == 0:
            tell(connection, record="start", prompt=prompt, wrist_image=seen["image"], **seen)
        began = time.perf_counter()
        reply = ask(connection, {"observation/image": seen["image"], "prompt": prompt})
        taken["round trip"].append(1000.0 * (time.perf_counter() - began))
        taken["policy"].append(reply["server_timing"]["infer_ms"])
        for _ in range(len(reply["actions"]) if record else 0):
            steps += 1
            one = frame_KHWC[steps % 64][None]
            taken["step"].append(tell(connection, record="step", step=steps, image=one, wrist_image=one))
        if steps >= EPISODE:
            taken["end"].append(tell(connection, record="success", steps=steps))
            steps = 0
    print(f"{requests} observations of {frame[0]} x {frame[1]}, one after another{', recorded' if record else ''}")
    for name, times in taken.items():
        # An episode may be longer than all that was asked for.
        if measured := times[UNMEASURED:] if name != "end" else times:
            half, most = np.percentile(measured, [50, 99])
            print(f"{name:10s} p50 {half:.2f} ms, p99 {most:.2f} ms")


def play(connection: ClientConnection, episodes: int) -> int:
    """Lets the server drive ``episodes`` of the embedded table; returns how many succeed."""
    import jax
    import numpy as np

    from wovr_jax.core.pixels import to_uint8
    from wovr_jax.sim import embedded
    from wovr_jax.sim.tabletop import table as tabletop

    cfg = tabletop.TabletopConfig()
    render = jax.jit(functools.partial(tabletop.render, cfg=cfg))
    roll = jax.jit(functools.partial(embedded.roll, cfg=cfg))
    succeeded = jax.jit(jax.vmap(functools.partial(tabletop.success, cfg=cfg)))
    states = embedded.reset_batch(LAYOUTS + np.arange(episodes, dtype=np.int32), cfg)
    successes = 0
    for k in range(episodes):
        state = jax.tree.map(lambda leaf: leaf[k], states)  # noqa: B023 (called here)
        task, left, reached = tabletop.INSTRUCTIONS[int(tabletop.task_of(state))], cfg.horizon, False
        # A chunk is played to its end without a look, as evaluation in a run does.
        while left > 0:
            chunk_TA = ask(connection, {"image": to_uint8(render(state)), "prompt": task})["actions"]
            after = roll(state, chunk_TA)
            reached = reached or bool(np.any(succeeded(after)))
            state = jax.tree.map(lambda leaf: leaf[-1], after)  # (steps, ...) -> the last of them
            left -= len(chunk_TA)
        successes += reached
    return successes


def tell(connection: ClientConnection, **message: Any) -> float:
    """Sends a message of a recording; returns the milliseconds until it was answered."""
    began = time.perf_counter()
    state = ask(connection, message)["record"]
    if state["state"] == "lost":
        sys.exit(f"the recording was lost: {state['why']}")
    return 1000.0 * (time.perf_counter() - began)


def ask(connection: ClientConnection, message: dict[str, Any]) -> dict[str, Any]:
    """The server's reply to a message; a refusal ends the program."""
    from wovr_jax.export import wire

    connection.send(wire.pack(message))
    reply = connection.recv(timeout=60)
    return wire.unpack(reply) if isinstance(reply, bytes) else sys.exit(reply)
