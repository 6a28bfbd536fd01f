"""From disk to device: how many windows a second the world model's training can be given, and what holds them up.

    python launch/benchmark.py input --episodes data/spatial_expert
    python launch/benchmark.py input --episodes data/spatial_expert --batch 8 --step_s 0.5 --visit 16 --threads 16

First each stage by itself, on one thread: CPU time to read a record, to decode it, to cut its windows, to put a batch
onto the device. CPU time says more than wall time on a machine with other work. Then the pipeline as training runs it,
as fast as it goes. With --step_s, the seconds of a training step on your device, also whether it keeps up. The
settings are those of ``config.world_train.stream``.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

from launch import flags

MEMORY, NEW = 4, 8
"""Frames of a window beside the anchor, as in the released model."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this measurement."""
    parser.add_argument("--episodes", type=pathlib.Path, required=True, metavar="FOLDER", help="an episode folder")
    parser.add_argument("--batch", type=flags.positive, default=8, help="windows in a training step (default 8)")
    parser.add_argument(
        "--visit", type=flags.positive, default=8, help="windows cut from a decoded episode (default 8)"
    )
    parser.add_argument("--threads", type=flags.positive, default=8, help="reading threads (default 8)")
    parser.add_argument("--workers", type=int, default=0, help="reading processes; default 0, in this one")
    parser.add_argument("--steps", type=flags.positive, default=64, help="batches to read (default 64)")
    parser.add_argument("--step_s", type=float, help="seconds of a training step, to hold reading against")


def run(args: argparse.Namespace) -> None:
    """Measures the stages one by one, then all together."""
    import jax
    import numpy as np

    from wovr_jax.core import config
    from wovr_jax.data import episodes as disk
    from wovr_jax.data.batches import Layout
    from wovr_jax.data.records import decode
    from wovr_jax.data.stream import Feed, Stream, StreamConfig

    source = disk.EpisodeSource(args.episodes, verify=False)
    heads = disk.heads(source)
    steps_E, layout = np.array([head.steps for head in heads]), Layout(MEMORY, NEW, partial=True)
    flags = {"visit": args.visit, "threads": args.threads, "workers": args.workers}
    cfg = config.from_dict(StreamConfig, flags, "stream")
    stream = Stream(source, steps_E, np.ones(len(heads), bool), layout, cfg)
    frames = 1 + MEMORY + NEW

    # Enough episodes for a mean, few enough to be in memory decoded.
    sample = range(min(len(source), 16))
    records = [source.record(e) for e in sample]
    decoded = [decode(record) for record in records]
    raw = np.mean([episode.frame_SHWC.nbytes for episode in decoded]) / 1e6
    print(f"{len(source)} episodes of {steps_E.mean():.0f} steps, frames {decoded[0].frame_SHWC.shape[1:3]},", end=" ")
    print(f"{raw:.1f} MB of pixels each, {np.mean([len(record) for record in records]) / 1e6:.1f} MB on disk\n")

    dataset = stream.read((0,), np.arange(args.batch), 0, args.visit)
    batch = next(iter(dataset))
    # The same stream over episodes that are decoded already, so that only the cutting is left.
    cut = Stream(decoded, steps_E[: len(sample)], np.ones(len(sample), bool), layout, cfg)
    # Seconds of CPU for one call of a stage, and the windows that come of it.
    stages = {
        "read": (cpu_seconds(lambda e: source.record(e), sample), args.visit),
        "decode": (cpu_seconds(lambda e: decode(records[e]), sample), args.visit),
        "cut": (cpu_seconds(lambda e: cut.visit((0,), e, 0), sample), args.visit),
        "onto the device": (cpu_seconds(lambda _: jax.block_until_ready(jax.device_put(batch)), range(8)), args.batch),
    }
    print("stage              CPU ms a window")
    for name, (seconds, count) in stages.items():
        print(f"{name:18s} {1e3 * seconds / count:15.2f}")
    # By CPU time a window: the stage that more threads, or fewer pixels, would help most.
    slowest = max(stages, key=lambda name: stages[name][0] / stages[name][1])
    total = sum(seconds / count for seconds, count in stages.values())
    print(f"{'all':18s} {1e3 * total:15.2f}   most of it: {slowest}\n")

    # The first batch waits for the threads to start, and is not counted.
    feed = Feed(stream, args.batch, (0,), args.steps)
    feed(0)
    begin, begin_cpu = time.perf_counter(), time.process_time()
    for step in range(1, args.steps):
        jax.block_until_ready(feed(step))  # or it would be timed how fast copies are asked for
    wall, used = time.perf_counter() - begin, time.process_time() - begin_cpu
    rate = (args.steps - 1) * args.batch / wall
    busy = f"{used / wall:.1f} of {os.cpu_count()} cores busy"
    print(f"pipeline: {rate:.1f} windows/s, {rate * frames:.0f} frames/s, {busy}")
    if args.step_s:
        need = args.batch / args.step_s  # windows a second that the training consumes
        verdict = "reading keeps up" if rate > need else f"reading holds it up, most of all {slowest}"
        print(f"a step of {args.step_s} s needs {need:.1f} windows/s, {need * total:.2f} cores: {verdict}")


def cpu_seconds(function: Callable[[int], Any], over: range) -> float:
    """Returns the mean of this thread's CPU time over the calls."""
    begin = time.thread_time()
    for item in over:
        function(item)
    return (time.thread_time() - begin) / len(over)
