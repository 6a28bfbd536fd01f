"""What a page asks of its session, and what it is told: msgpack maps of ``export.wire``.

    {do: starts, low, count}           ->  {told: starts, row (K,), frame (K, h, w, 3), instruction, step, keyframe}
    {do: begin, row or layout, noise}  ->  {told: begun, instruction, imagined, true, step, keyframe, closed, action}
    {do: again, noise}                 ->  the same; action (N, T, A) is what was played so far, else nothing
    {do: step, action (T, A)}          ->  {told: chunk, n, action, imagined, true, prob, truth, apart, left, room, ms}
    {do: act, sees, temperature}       ->  the same: the policy chose the actions
    {do: film}                         ->  {told: film, mp4}

What a page sends is not trusted: every field is checked before anything is computed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from wovr_jax.play.session import APART, Begun, Chunk, Session, SessionError
from wovr_jax.play.source import Source
from wovr_jax.types import NULL_ACTION

SEEDS = 2**31 - 1
HOTTEST = 5.0
THUMBNAILS = 24
"""Most start states in one answer."""
THUMBNAIL_PIXELS = 64
"""Pictures in a list of start states are thinned to this many pixels on a side."""
SPEED = 0.75
"""Of a command to move, as a share of the fastest: closing fingers take a thing only when they do not rush past it."""


def describe(source: Source, most_chunks: int) -> dict[str, Any]:
    """Returns what a page is told when it connects."""
    size, judge = source.starts.anchor_KHWC.shape[1:], source.judge
    return {
        "told": "hello",
        "run": source.name,
        "suite": source.suite,
        "policy": source.policy_stage,
        "world": source.world_name,
        "threshold": None if judge is None else judge.threshold,
        "apart": APART,
        "chunk": source.world_cfg.chunk,
        "most_chunks": most_chunks,
        "frame": list(size),
        "simulator": source.sim is not None,
        "steps": source.recipe.steps,
        "temperature": source.recipe.temperature,
        "hottest": HOTTEST,
        "starts": len(source.starts),
        "initials": source.starts.initials,
        "rest": list(NULL_ACTION),
        "moves": _list_moves(source),
    }


def _list_moves(source: Source) -> dict[str, list[float]]:
    """Returns the action that moves the hand in each direction of the picture; the fingers are the last number."""
    # LIBERO's camera faces the robot: away from its base is down in the picture, and to its left is right.
    table = source.suite in ("tabletop", "relay")  # which may stand in for a robot, too
    axes = {"right": 0, "down": 1} if table else {"right": 1, "down": 0, "up_high": 2}
    opposite = {"right": "left", "down": "up", "up_high": "down_low"}
    moves = {}
    for name, axis in axes.items():
        vector = np.eye(len(NULL_ACTION))[axis] * SPEED
        moves |= {name: vector.tolist(), opposite[name]: (-vector).tolist()}
    return moves


def answer(session: Session, message: Any) -> dict[str, Any]:
    """Does what a message asks, and returns the answer.

    Raises:
      SessionError: a message that is not as expected, or that cannot be followed now; the session is as it was.
    """
    if not isinstance(message, dict):
        raise SessionError(f"expected a map with 'do', got {type(message).__name__}")
    asked = message.get("do")
    # By identity of type: a list has no place in a dictionary's keys.
    if not isinstance(asked, str) or asked not in REQUESTS:
        raise SessionError(f"'do': expected one of {', '.join(REQUESTS)}, got {_show(asked)}")
    fields, follow = REQUESTS[asked]
    if unknown := [name for name in message if name not in ("do", *fields)]:
        raise SessionError(f"{asked}: expected the fields {', '.join(fields) or '(none)'}, got {_show(unknown[0])} too")
    began = time.perf_counter()
    told = follow(session, message)
    return told | {"ms": 1000.0 * (time.perf_counter() - began)}


def is_film(message: Any) -> bool:
    """Whether a message asks for a film, which needs no network and is slow: it is not made in the model's thread."""
    return isinstance(message, dict) and message.get("do") == "film"


def _starts(session: Session, message: dict[str, Any]) -> dict[str, Any]:
    source = session.programs.source
    table = source.starts
    low = _whole(message, "low", len(table) - 1)
    rows = np.arange(low, min(low + _whole(message, "count", THUMBNAILS, default=THUMBNAILS), len(table)))
    frame_KHWC = np.asarray(table.memory_KMHWC)[rows, -1]
    thin = -(-max(frame_KHWC.shape[1:3]) // THUMBNAIL_PIXELS)
    return {
        "told": "starts",
        "row": rows.astype(np.int32),
        "frame": np.ascontiguousarray(frame_KHWC[:, ::thin, ::thin]),
        "instruction": [source.instructions[task] for task in np.asarray(table.task_K)[rows]],
        "step": np.asarray(table.step_K)[rows],
        "keyframe": [bool(row >= table.initials) for row in rows],
    }


def _begin(session: Session, message: dict[str, Any]) -> dict[str, Any]:
    # Which rows there are, the session knows.
    row = None if message.get("row") is None else _whole(message, "row", SEEDS)
    layout, noise = (_whole(message, name, SEEDS, default=0) for name in ("layout", "noise"))
    return _tell_begun(session.begin(row, layout, noise))


def _again(session: Session, message: dict[str, Any]) -> dict[str, Any]:
    return _tell_begun(session.again(_whole(message, "noise", SEEDS)))


def _step(session: Session, message: dict[str, Any]) -> dict[str, Any]:
    action, want = message.get("action"), (session.programs.chunk, len(NULL_ACTION))
    if not (isinstance(action, np.ndarray) and action.dtype == np.float32 and action.shape == want):
        got = f"{action.dtype} {list(action.shape)}" if isinstance(action, np.ndarray) else _show(action)
        raise SessionError(f"'action': expected float32 {list(want)}, got {got}")
    if not (np.isfinite(action).all() and np.abs(action).max() <= 1.0):
        raise SessionError("'action': expected finite numbers from -1 to 1")
    return _tell_chunk(session.step(action.copy()))


def _act(session: Session, message: dict[str, Any]) -> dict[str, Any]:
    sees, temperature = message.get("sees", "imagined"), message.get("temperature", 0.0)
    if sees not in ("imagined", "true"):
        raise SessionError(f"'sees': expected 'imagined' or 'true', got {_show(sees)}")
    is_number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if not (is_number and math.isfinite(temperature) and 0.0 <= temperature <= HOTTEST):
        raise SessionError(f"'temperature': expected a number from 0 to {HOTTEST:g}, got {_show(temperature)}")
    return _tell_chunk(session.act(sees, float(temperature)))


def _film(session: Session, message: dict[str, Any]) -> dict[str, Any]:
    del message
    return {"told": "film", "mp4": session.film()}


REQUESTS: dict[str, tuple[tuple[str, ...], Callable[[Session, dict[str, Any]], dict[str, Any]]]] = {
    "starts": (("low", "count"), _starts),
    "begin": (("row", "layout", "noise"), _begin),
    "again": (("noise",), _again),
    "step": (("action",), _step),
    "act": (("sees", "temperature"), _act),
    "film": ((), _film),
}
"""What can be asked: its fields, and who follows it."""


def _tell_begun(begun: Begun) -> dict[str, Any]:
    return {
        "told": "begun",
        "instruction": begun.instruction,
        "imagined": begun.imagined_HWC,
        "true": begun.true_HWC,
        "step": begun.step,
        "keyframe": begun.keyframe,
        "closed": begun.closed,
        "action": begun.action_NTA,
    }


def _tell_chunk(chunk: Chunk) -> dict[str, Any]:
    return {
        "told": "chunk",
        "n": chunk.n,
        "action": chunk.action_TA,
        "imagined": chunk.imagined_THWC,
        "true": chunk.true_THWC,
        "prob": _floats(chunk.prob_T),
        "truth": None if chunk.truth_T is None else chunk.truth_T.astype(bool),
        "apart": _floats(chunk.apart_T),
        "left": chunk.left,
        "room": chunk.room,
    }


def _floats(values: Iterable[float] | None) -> np.ndarray | None:
    return None if values is None else np.asarray(values, np.float32)


def _whole(message: dict[str, Any], name: str, most: int, default: int | None = None) -> int:
    """Reads a whole number from 0 to ``most``."""
    value = message.get(name, default)
    if type(value) is not int or not 0 <= value <= most:  # True is an int too
        raise SessionError(f"{_show(name)}: expected a whole number from 0 to {most}, got {_show(value)}")
    return value


def _show(value: Any) -> str:
    """Returns a value in a few words, however large it is."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
