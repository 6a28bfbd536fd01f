"""What the page of labels asks, and what it is answered.

{do: list}                                                ->  {told: list, items, order, ...}
{do: frames, item, low, count}                            ->  {told: frames, frame (n, H, W, 3), wrist or nil}
{do: mark, item, outcome, first_success, lies_from}       ->  {told: marked, item, label}, when it is on the disk
{do: undo}                                                ->  {told: undone, item, label}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from wovr_jax.data.recordings import Label
from wovr_jax.label.store import LabelError, Store, disagreement, order

FIELDS: dict[str, tuple[str, ...]] = {
    "list": (),
    "frames": ("item", "low", "count"),
    "mark": ("item", "outcome", "first_success", "lies_from"),
    "undo": (),
}
MOST_BYTES = 4 * 2**20
"""Bytes of frames in an answer, where more than one is asked for."""


@dataclasses.dataclass
class Scores:
    """What a success classifier says of the frames.

    Attributes:
      name: of the run that trained it.
      threshold: above which it calls a frame a success.
      probs: number of an item -> (S + 1,) float32, its probability of success in each frame.
    """

    name: str
    threshold: float
    probs: Mapping[int, np.ndarray]


class Session:
    """One page that is open: it can undo what was marked on it.

    Args:
      store: the labels.
      scores: of a classifier, None without.
    """

    def __init__(self, store: Store, scores: Scores | None = None):
        self.store, self.scores = store, scores
        self._marked: list[tuple[int, Label]] = []

    def answer(self, message: Any) -> dict[str, Any]:
        """Returns the answer to a message.

        Raises:
          LabelError: it is not as expected; nothing has changed.
        """
        what = message.get("do") if isinstance(message, dict) else None
        if not isinstance(what, str) or what not in FIELDS:
            raise LabelError(f"'do': expected one of {', '.join(FIELDS)}, got {str(what)[:40]!r}")
        if unknown := [str(key)[:40] for key in message if key not in ("do", *FIELDS[what])]:
            raise LabelError(f"{what}: expected the fields {', '.join(FIELDS[what]) or 'none'}, got {unknown[0]!r} too")
        if what == "list":
            return self.describe()
        if what == "undo":
            return self._undo()
        number = _read_count(message, "item", len(self.store.items) - 1)
        if what == "frames":
            return self._show(number, message)
        label = self.store.mark(
            number, str(message.get("outcome")), message.get("first_success"), message.get("lies_from")
        )
        self._marked.append((number, label))
        return {"told": "marked", "item": number, "label": dataclasses.asdict(label)}

    def describe(self) -> dict[str, Any]:
        """Returns everything but the frames."""
        self.store.refresh()
        probs = {} if self.scores is None else self.scores.probs
        threshold = 1.0 if self.scores is None else self.scores.threshold
        items = []
        for number, item in enumerate(self.store.items):
            label, prob_S = self.store.label_of(number), probs.get(number)
            items.append(
                dataclasses.asdict(item)
                | {"label": None if label is None else dataclasses.asdict(label)}
                | {"against": disagreement(item, label, prob_S, threshold)}
                | {"prob": None if prob_S is None else np.asarray(prob_S, np.float32)}
            )
        return {
            "told": "list",
            "folder": self.store.folder.name,
            "by": self.store.by,
            "judge": None if self.scores is None else self.scores.name,
            "threshold": None if self.scores is None else self.scores.threshold,
            "items": items,
            "order": order(self.store, probs, threshold),
        }

    def _show(self, number: int, message: dict[str, Any]) -> dict[str, Any]:
        """Returns frames of an item; as many as are asked for, or fewer where they are large."""
        item = self.store.items[number]
        low = _read_count(message, "low", item.steps)
        count = _read_count(message, "count", item.steps + 1 - low)
        episode = self.store.read(number)
        one = episode.frame_SHWC[0].nbytes + (0 if episode.wrist_SHWC is None else episode.wrist_SHWC[0].nbytes)
        high = low + max(1, min(count, MOST_BYTES // one))
        wrist_SHWC = episode.wrist_SHWC
        return {
            "told": "frames",
            "item": number,
            "low": low,
            "frame": episode.frame_SHWC[low:high],
            "wrist": None if wrist_SHWC is None else wrist_SHWC[low:high],
        }

    def _undo(self) -> dict[str, Any]:
        if not self._marked:
            raise LabelError("nothing to undo: nothing was marked on this page since it was opened")
        number, label = self._marked.pop()
        self.store.unmark(label)
        before = self.store.label_of(number)
        return {"told": "undone", "item": number, "label": None if before is None else dataclasses.asdict(before)}


def _read_count(message: dict[str, Any], name: str, most: int) -> int:
    value = message.get(name)
    # True is a whole number to Python.
    if type(value) is not int or not 0 <= value <= most:
        raise LabelError(f"{name!r}: expected a whole number from 0 to {most}, got {str(value)[:40]}")
    return value
