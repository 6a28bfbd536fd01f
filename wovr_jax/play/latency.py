"""How long a chunk takes on this machine, from the command to the frames of both worlds."""

from __future__ import annotations

import time

import numpy as np

from wovr_jax.play.programs import Programs
from wovr_jax.play.session import Session


def measure(programs: Programs, chunks: int) -> np.ndarray:
    """Plays (chunks,) chunks of a person who goes round in circles, and returns the seconds that each took.

    Compiling is not counted. What is left out is the way through the socket, a millisecond on one machine.
    """
    programs.warm()
    session, taken = Session(programs), []
    angle_T = np.linspace(0.0, 2.0 * np.pi, programs.chunk, endpoint=False)
    action_TA = np.zeros((programs.chunk, programs.source.starts.action_KMA.shape[-1]), np.float32)
    action_TA[:, :2], action_TA[:, -1] = 0.5 * np.stack([np.cos(angle_T), np.sin(angle_T)], axis=1), -1.0
    for n in range(chunks):
        if n % session.most_chunks == 0:
            session.begin(0, 0, n)
        began = time.perf_counter()
        session.step(action_TA)
        taken.append(time.perf_counter() - began)
    return np.array(taken)


def describe(seconds: np.ndarray, chunk: int) -> str:
    """Returns median and 95th percentile of :func:`measure` in a line, and the frames in a second of the median."""
    median, p95 = np.percentile(seconds, [50, 95])
    rate = f"{chunk / median:.0f} frames a second"
    return f"a chunk of {chunk} frames: median {1e3 * median:.1f} ms, p95 {1e3 * p95:.1f} ms ({len(seconds)}); {rate}"
