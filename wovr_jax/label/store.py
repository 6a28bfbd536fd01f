"""The labels of a folder of recordings while somebody gives them: what there is to label, and ``labels.json``."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import functools
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from wovr_jax.core.disk import not_written, read_json, write_json
from wovr_jax.data.episodes import EpisodeSource, manifest
from wovr_jax.data.recordings import FORMAT, LABELS, OUTCOMES, SCHEMA, Label, find_recordings, read_labels
from wovr_jax.types import Episode

LOCK = ".labels.lock"
KEPT = 4
"""Episodes that stay decoded: the one that is watched, and some before it."""


class LabelError(ValueError):
    """Tells why something cannot be labelled, and what was expected."""


@dataclasses.dataclass(frozen=True)
class Item:
    """An episode that can be labelled.

    Attributes:
      recording, episode: the name of its folder, and its number there.
      steps: how long it is; it has a frame more.
      instruction: what the robot was asked to do.
      actor: who acted.
      won: whether it was recorded as a success.
    """

    recording: str
    episode: int
    steps: int
    instruction: str
    actor: str
    won: bool


class Store:
    """The episodes of a folder and their labels.

    Args:
      folder: a folder of recordings, or one episode folder.
      by: who labels.

    Raises:
      LabelError: no recordings in it.
      EpisodesError: something else in it, or labels that are malformed.
    """

    def __init__(self, folder: str | os.PathLike, by: str):
        self.folder, self.by = pathlib.Path(folder).expanduser().absolute(), by
        self.items: list[Item] = []
        self.labels: dict[tuple[str, int], Label] = {}
        self._places: dict[str, pathlib.Path] = {}
        self.read = functools.lru_cache(KEPT)(self._read)
        self.refresh()
        if not self.items:
            raise LabelError(f"{self.folder}: no recordings in it. launch/serve.py --record FOLDER writes some.")

    def refresh(self) -> None:
        """Finds what was recorded, and labelled by others, meanwhile; items keep their places."""
        self.labels = read_labels(self.folder)
        for path in find_recordings(self.folder):
            if path.name not in self._places:
                self._places[path.name] = path
                self.items += _list_items(path)

    def label_of(self, number: int) -> Label | None:
        """Returns the label of an item."""
        item = self.items[number]
        return self.labels.get((item.recording, item.episode))

    def mark(self, number: int, outcome: str, first_success: int | None, lies_from: int | None) -> Label:
        """Writes a label of an item, and returns it once it is on the disk.

        Raises:
          LabelError: another outcome than there are, or a frame that the episode does not have.
        """
        item = self.items[number]
        if outcome not in OUTCOMES:
            raise LabelError(f"'outcome': expected one of {', '.join(OUTCOMES)}, got {str(outcome)[:40]!r}")
        for name, frame in (("first_success", first_success), ("lies_from", lies_from)):
            if frame is not None and not (type(frame) is int and 0 <= frame <= item.steps):
                raise LabelError(f"{name!r}: expected a frame from 0 to {item.steps}, got {str(frame)[:40]}")
        if first_success is not None and outcome != "success":
            raise LabelError(f"'first_success': a {outcome} has none, got {first_success}")
        now = datetime.datetime.now(datetime.UTC).isoformat()
        label = Label(item.recording, item.episode, outcome, first_success, lies_from, self.by, now)
        with self._change() as entries:
            entries.append(dataclasses.asdict(label))
        return label

    def unmark(self, label: Label) -> None:
        """Takes a label out again; what was said before it counts again.

        Raises:
          LabelError: it is not in the file any more.
        """
        with self._change() as entries:
            try:
                entries.remove(dataclasses.asdict(label))
            except ValueError as error:
                raise LabelError(f"the label of {label.recording} is not in {LABELS} any more") from error

    @contextlib.contextmanager
    def _change(self) -> Iterator[list[dict[str, Any]]]:
        """Gives the entries of the file to change, and replaces it; others who label wait so long."""
        path = self.folder / LABELS
        try:
            with (self.folder / LOCK).open("wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                # Read anew: what somebody else has said meanwhile stays. Malformed labels are not written over.
                read_labels(self.folder)
                entries = read_json(path)["labels"] if path.exists() else []
                yield entries
                write_json(path, {"format": FORMAT, "schema": SCHEMA, "labels": entries}, each=True)
                self.labels = read_labels(self.folder)
        except OSError as error:
            raise LabelError(f"{path} was not written: {not_written(error, self.folder) or error}") from error

    def _read(self, number: int) -> Episode:
        item = self.items[number]
        return EpisodeSource(self._places[item.recording], verify=False)[item.episode]


def disagreement(item: Item, label: Label | None, prob_S: np.ndarray | None, threshold: float) -> float:
    """Returns how much a classifier contradicts an outcome: 0 where it agrees, or nobody asked it.

    A success whose best frame stays below the threshold, or a failure with a frame above it, is contradicted by the
    distance between that frame and the threshold.
    """
    if prob_S is None or (label is not None and label.outcome == "discard"):
        return 0.0
    won = item.won if label is None else label.outcome == "success"
    above = float(np.max(prob_S)) - threshold
    return max(0.0, -above if won else above)


def order(store: Store, probs: Mapping[int, np.ndarray], threshold: float) -> list[int]:
    """Returns the numbers of all items as they are to be looked at.

    Those that the classifier contradicts come first, the most contradicted before the others; then those that nobody
    has labelled; each in the order of their names.
    """

    def rank(number: int) -> tuple[float, bool, int]:
        label = store.label_of(number)
        return -disagreement(store.items[number], label, probs.get(number), threshold), label is not None, number

    return sorted(range(len(store.items)), key=rank)


def _list_items(path: pathlib.Path) -> list[Item]:
    """Returns the items of an episode folder."""
    facts = manifest(path)
    if facts["episodes"] == 1:
        # As a recording is. Its manifest says all of it, so a thousand of them are listed without reading their frames.
        (task,), (actor,) = facts["tasks"].values(), facts["actors"]
        return [Item(path.name, 0, facts["steps"], task["instruction"], actor, bool(facts["successes"]))]
    source, items = EpisodeSource(path, verify=False), []
    for number in range(len(source)):
        head = source.head(number)
        text = facts["tasks"][str(head.task)]["instruction"]
        items.append(Item(path.name, number, head.steps, text, head.actor, head.won))
    return items
