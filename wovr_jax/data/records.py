"""One episode as the bytes of a record, and back.

A record is ``MAGIC``, the header's length (4 bytes, little-endian), a JSON header, and one zlib
stream of, in this order: frames as uint8 differences to the frame before (modulo 256, hence
lossless; a still background becomes zeros), ``action_SA`` and ``label_SA`` as little-endian
float32, ``success_S`` as bytes; then, where the header gives their shapes, ``wrist_SHWC`` as
differences and ``state_SD`` as little-endian float32 (schema 2; records of schema 1 have
neither). No pickle anywhere.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from wovr_jax.types import ACTION_DIM, Episode

MAGIC = b"WEP1"


class EpisodesError(ValueError):
    """An episode folder, shard or record that cannot be used; the message names it."""


class Head(NamedTuple):
    """What decides how an episode is used: its length, the start layout that it may share, who acted, how it ended."""

    steps: int
    task: int
    seed: int
    actor: str
    won: bool


def check(episode: Episode, where: str) -> None:
    """Raises an EpisodesError naming ``where`` unless shapes, dtypes and ranges are those of ``Episode``."""
    steps = len(episode.action_SA)
    if episode.action_SA.ndim != 2 or episode.action_SA.shape[1] != ACTION_DIM:
        raise EpisodesError(f"{where}: expected actions of shape (steps, {ACTION_DIM}), got {episode.action_SA.shape}.")
    expected = {
        "action_SA": ((steps, ACTION_DIM), np.float32),
        "label_SA": ((steps, ACTION_DIM), np.float32),
        "success_S": ((steps + 1,), np.bool_),
        "frame_SHWC": ((steps + 1, *episode.frame_SHWC.shape[1:3], 3), np.uint8),
    }
    if episode.wrist_SHWC is not None:
        expected["wrist_SHWC"] = ((steps + 1, *episode.wrist_SHWC.shape[1:3], 3), np.uint8)
    if episode.state_SD is not None:
        expected["state_SD"] = ((steps + 1, *episode.state_SD.shape[1:2]), np.float32)
    for name, (shape, dtype) in expected.items():
        array = getattr(episode, name)
        if array.shape != shape or array.dtype != dtype:
            raise EpisodesError(
                f"{where}: expected {name} of shape {shape} and type {np.dtype(dtype).name} "
                f"for {steps} steps, got {array.shape} and {array.dtype}."
            )
    # No step and one frame would be a start, which has a table of its own.
    if not steps:
        raise EpisodesError(f"{where}: an episode needs at least one step.")
    for name in ("action_SA", "label_SA", "state_SD"):
        array = getattr(episode, name)
        # One such number becomes a loss that is not finite, thousands of steps later.
        if array is not None and not np.isfinite(array).all():
            raise EpisodesError(f"{where}: {name} holds NaN or infinity.")


def encode(episode: Episode) -> bytes:
    """Returns one episode as the bytes of a record; :func:`decode` gives it back bit by bit."""
    # JSON and not pickle: whoever opens a folder from elsewhere runs nothing.
    header = {name: getattr(episode, name) for name in ("instruction", "actor")}
    header |= {"task": int(episode.task), "seed": int(episode.seed), "won": bool(episode.success_S.any())}
    header |= {"frame": list(episode.frame_SHWC.shape), "action": list(episode.action_SA.shape)}
    # The type of the disk is named, so that a machine of the other byte order writes the same file.
    small = [episode.action_SA.astype("<f4"), episode.label_SA.astype("<f4"), episode.success_S]
    parts: list[Iterable[np.ndarray]] = [_changes(episode.frame_SHWC), small]
    if episode.wrist_SHWC is not None:
        header["wrist"] = list(episode.wrist_SHWC.shape)
        parts.append(_changes(episode.wrist_SHWC))
    if episode.state_SD is not None:
        header["state"] = list(episode.state_SD.shape)
        parts.append([episode.state_SD.astype("<f4")])
    header["origin"] = dict(episode.origin)
    # The header stays readable on its own, so that choosing episodes does not decompress them.
    text = json.dumps(header).encode()
    # Frame by frame: the pixels of a long film are in memory once and not three times.
    packer = zlib.compressobj(level=6)
    body = [packer.compress(array.tobytes()) for array in itertools.chain(*parts)]
    return b"".join([MAGIC, struct.pack("<I", len(text)), text, *body, packer.flush()])


def decode(record: bytes, where: str = "record") -> Episode:
    """Returns the episode in the bytes of a record.

    Raises:
      EpisodesError: naming ``where``, when the bytes are damaged or another format.
    """
    with _damage(where):
        header, rest = split_record(record)
        episode = _unpack(header, zlib.decompress(rest))
    check(episode, where)
    return episode


def peek(record: bytes, where: str = "record") -> Head:
    """Returns the head of the episode in a record; its arrays are not decoded, but in records of before.

    Raises:
      EpisodesError: as :func:`decode`.
    """
    with _damage(where):
        header, body = split_record(record)
        won = header["won"] if "won" in header else _unpack(header, zlib.decompress(body)).success_S.any()
        return Head(header["action"][0], header["task"], header["seed"], header["actor"], bool(won))


@contextlib.contextmanager
def _damage(where: str) -> Iterator[None]:
    """Turns what goes wrong inside into an EpisodesError that speaks of damage and says where."""
    try:
        yield
    except EpisodesError:
        raise
    except (ValueError, KeyError, TypeError, struct.error, zlib.error) as error:
        raise EpisodesError(f"{where}: damaged record ({type(error).__name__}: {error}).") from error


def split_record(record: bytes) -> tuple[dict[str, Any], bytes]:
    """Returns what a record says before its arrays, and the compressed arrays."""
    if record[:4] != MAGIC:
        raise ValueError(f"begins with {record[:4]!r}, not {MAGIC!r}: not an episode")
    (length,) = struct.unpack("<I", record[4:8])
    return json.loads(record[8 : 8 + length]), record[8 + length :]


def _unpack(header: dict[str, Any], body: bytes) -> Episode:
    frames, actions = header["frame"], header["action"]
    # In the order in which ``encode`` wrote them; the last two are not in every record.
    layout = [(frames, np.uint8), (actions, "<f4"), (actions, "<f4"), (frames[:1], np.bool_)]
    layout += [(header[name], kind) for name, kind in (("wrist", np.uint8), ("state", "<f4")) if name in header]
    # The header tells where each array ends; there is nothing between them.
    sizes = [int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in layout]
    # np.frombuffer would read a body that is too long without a word.
    if sum(sizes) != len(body):
        raise ValueError(f"expected {sum(sizes)} bytes of arrays, got {len(body)}")
    ends = np.cumsum([0, *sizes])
    change_SHWC, action_SA, label_SA, success_S, *more = (
        np.frombuffer(body[low:high], dtype).reshape(shape)
        for (shape, dtype), low, high in zip(layout, ends, ends[1:], strict=False)
    )
    return Episode(
        frame_SHWC=_sums(change_SHWC),
        action_SA=action_SA.astype(np.float32),
        label_SA=label_SA.astype(np.float32),
        success_S=success_S.copy(),  # an array over the bytes cannot be written to
        wrist_SHWC=_sums(more.pop(0)) if "wrist" in header else None,
        state_SD=more.pop(0).astype(np.float32) if "state" in header else None,
        origin=header.get("origin", {}),
        **{name: header[name] for name in ("instruction", "task", "seed", "actor")},
    )


def _changes(frame_SHWC: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the first frame as it is, then the differences of each to the frame before, modulo 256."""
    yield frame_SHWC[0]
    yield from (after - before for before, after in itertools.pairwise(frame_SHWC))


def _sums(change_SHWC: np.ndarray) -> np.ndarray:
    """Returns the frames whose differences ``_changes`` gave."""
    # Frame by frame: np.cumsum over the first axis takes sixty times as long.
    frame_SHWC = np.empty_like(change_SHWC)
    frame_SHWC[:1] = change_SHWC[:1]
    for step in range(1, len(change_SHWC)):
        np.add(frame_SHWC[step - 1], change_SHWC[step], out=frame_SHWC[step])
    return frame_SHWC
