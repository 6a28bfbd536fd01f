"""Recordings: episodes that somebody recorded on a robot, and the labels that lie beside them.

::

    collect-0/
      20261130T085213-104233-00000-3fa9c1/   a recording: an episode folder (data/episodes.py), mostly of one episode
      20261130T085421-000871-00001-3fa9c1/
      labels.json                            what people said of them, oldest first

``labels.json`` is ``{"format": "wovr_jax labels", "schema": 1, "labels": [...]}``. A label names its ``recording`` (the
folder's name) and ``episode`` (its number there); ``outcome`` is success, failure or discard; ``first_success`` is the
first frame that shows the success, ``lies_from`` the first one that an imagined film gets wrong (each a number or
null); ``by`` and ``at`` say who and when. Of several labels of one episode the last counts. An episode without one is
as it was recorded.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

import numpy as np

from wovr_jax.core.disk import read_json
from wovr_jax.data.episodes import MANIFEST, EpisodeSource
from wovr_jax.data.records import EpisodesError, split_record
from wovr_jax.types import Episode

LABELS = "labels.json"
FORMAT, SCHEMA = "wovr_jax labels", 1
OUTCOMES = ("success", "failure", "discard")
HALF = (".new", ".old")
"""How folders end that are being written or replaced (``core.disk``)."""


@dataclasses.dataclass(frozen=True)
class Label:
    """What somebody said of an episode.

    Attributes:
      recording, episode: which: the folder's name, and the number in it.
      outcome: one of ``OUTCOMES``.
      first_success: the first frame that shows the success; frame 0 is the one before any action. None: not said.
      lies_from: the first frame that is not true, of an imagined film; None where none is, or of a true episode.
      by, at: who, and when (ISO 8601).
    """

    recording: str
    episode: int
    outcome: str
    first_success: int | None = None
    lies_from: int | None = None
    by: str = ""
    at: str = ""


class Place(NamedTuple):
    """An episode that is not decoded.

    Attributes:
      folder: the recording.
      number: of the episode in it.
      header: what its record says before its arrays (``data.records``), ``origin`` among it.
      label: what somebody said of it, or None.
    """

    folder: pathlib.Path
    number: int
    header: Mapping[str, Any]
    label: Label | None

    @property
    def steps(self) -> int:
        """How long it is."""
        return self.header["action"][0]

    @property
    def won(self) -> bool:
        """Whether it is a success, by its label or else as it was recorded."""
        return self.label.outcome == "success" if self.label else bool(self.header["won"])

    @property
    def task(self) -> str:
        """Its instruction, in lower case with single spaces."""
        return plain(self.header["instruction"])


class Recordings(Sequence[Episode]):
    """The episodes of a folder of recordings, each decoded and labelled when it is asked for.

    Args:
      places: where each lies.
      last: frames that show the success where a label calls an episode a success and names no frame.
    """

    def __init__(self, places: Sequence[Place], last: int):
        self.places, self.last = tuple(places), last

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Episode: ...
    @overload
    def __getitem__(self, index: slice) -> Recordings: ...
    def __getitem__(self, index: int | slice) -> Episode | Recordings:
        if isinstance(index, slice):
            return Recordings(self.places[index], self.last)
        place = self.places[index]
        # Opened anew each time: thousands of recordings are more files than a process may hold open.
        return apply_label(EpisodeSource(place.folder)[place.number], place.label, self.last)

    def __iter__(self) -> Iterator[Episode]:
        return (self[index] for index in range(len(self)))


def read_recordings(
    folder: str | os.PathLike, *, last: int = 1, instructions: Sequence[str] | None = None
) -> Recordings:
    """Finds the recorded episodes of a folder, without those that a label discards.

    Args:
      folder: an episode folder, or a folder of episode folders; a missing or empty one has no episodes.
      last: see ``Recordings``.
      instructions: those that may occur; None allows any.

    Returns:
      The episodes, by the names of their recordings. None is decoded yet.

    Raises:
      EpisodesError: something in the folder that is no recording, labels that are malformed or of an episode that is
        not there, recordings that do not belong together, or an instruction that may not occur.
    """
    folder = pathlib.Path(folder).expanduser().absolute()
    labels, places = read_labels(folder), []
    for recording in find_recordings(folder):
        source = EpisodeSource(recording)
        for number in range(len(source)):
            header = split_record(source.record(number))[0]
            places.append(Place(recording, number, header, labels.pop((recording.name, number), None)))
    if labels:
        name, number = next(iter(labels))
        raise EpisodesError(
            f"{folder / LABELS}: a label is of episode {number} of {name!r}, which is not there. Bring the recording "
            "back, or take the label out."
        )
    kept = [place for place in places if not (place.label and place.label.outcome == "discard")]
    _check_together(kept, folder, instructions)
    return Recordings(kept, last)


def find_recordings(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the episode folders in ``folder``, or itself where it is one; those that are half written are left out.

    Raises:
      EpisodesError: another folder is among them.
    """
    if (folder / MANIFEST).is_file() or not folder.is_dir():
        return [folder] if folder.is_dir() else []
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] != "."]
    whole = [path for path in inside if path.suffix not in HALF]
    if strange := [path for path in whole if not (path / MANIFEST).is_file()]:
        raise EpisodesError(
            f"{strange[0]} is no recording: {MANIFEST} is missing in it. Only recordings belong into {folder}; move it "
            "elsewhere."
        )
    return whole


def read_labels(folder: pathlib.Path) -> dict[tuple[str, int], Label]:
    """Returns the labels in ``folder``, by recording and episode; none where there is no ``labels.json``.

    Raises:
      EpisodesError: the file, or a label in it, is not as expected; it says which and what was expected.
    """
    path = folder / LABELS
    if not path.exists():
        return {}
    try:
        table = read_json(path)
    except ValueError as error:
        raise EpisodesError(f"{path} is not JSON: {error}") from error
    if not isinstance(table, dict) or table.get("format") != FORMAT or not isinstance(table.get("labels"), list):
        raise EpisodesError(f"{path} does not hold labels: expected format {FORMAT!r} and a list of labels.")
    if not isinstance(table.get("schema"), int) or table["schema"] > SCHEMA:
        raise EpisodesError(f"{path} has schema {table.get('schema')!r}; this code reads up to {SCHEMA}.")
    labels = [_read_label(entry, f"{path}, label {number}") for number, entry in enumerate(table["labels"])]
    # In their order: whoever looks again says it again, and the last word counts.
    return {(label.recording, label.episode): label for label in labels}


def _read_label(entry: Any, where: str) -> Label:
    known = {field.name: field for field in dataclasses.fields(Label)}
    if not isinstance(entry, dict) or not {"recording", "episode", "outcome"} <= entry.keys() <= known.keys():
        raise EpisodesError(f"{where}: expected an object of {', '.join(known)}; got {str(entry)[:200]}.")
    label = Label(**entry)
    numbers = {"episode": label.episode, "first_success": label.first_success, "lies_from": label.lies_from}
    for name, number in numbers.items():
        # True is a whole number to Python.
        if not (number is None and name != "episode") and (type(number) is not int or number < 0):
            raise EpisodesError(f"{where}: {name}: expected a number from 0 on, got {number!r}.")
    if label.outcome not in OUTCOMES:
        raise EpisodesError(f"{where}: outcome: expected one of {', '.join(OUTCOMES)}, got {label.outcome!r}.")
    if label.first_success is not None and label.outcome != "success":
        raise EpisodesError(f"{where}: a {label.outcome} has no first_success, got {label.first_success}.")
    for name in ("recording", "by", "at"):
        if not isinstance(getattr(label, name), str):
            raise EpisodesError(f"{where}: {name}: expected text, got {getattr(label, name)!r}.")
    return label


def apply_label(episode: Episode, label: Label | None, last: int = 1) -> Episode:
    """Returns the episode as a label has it: success in every frame from the marked one on, or in none.

    Args:
      episode: as it was recorded.
      label: what somebody said; None leaves it as it is.
      last: frames from the end that show a success whose first frame nobody marked.

    Raises:
      EpisodesError: the marked frame is behind the last one.
    """
    if label is None:
        return episode
    success_S = np.zeros(len(episode.success_S), bool)
    if label.first_success is not None and label.first_success >= len(success_S):
        raise EpisodesError(
            f"{LABELS}: episode {label.episode} of {label.recording!r} has frames 0 to {len(success_S) - 1}, and "
            f"first_success is {label.first_success}."
        )
    if label.outcome == "success":
        success_S[-last if label.first_success is None else label.first_success :] = True
    return dataclasses.replace(episode, success_S=success_S)


def plain(instruction: str) -> str:
    """Returns an instruction as it is compared: in lower case, with single spaces."""
    return " ".join(instruction.lower().split())


def _check_together(places: Sequence[Place], folder: pathlib.Path, instructions: Sequence[str] | None) -> None:
    """Refuses recordings that no training can use together, and instructions that nobody knows."""
    known = None if instructions is None else {plain(text) for text in instructions}
    tasks: dict[int, Place] = {}
    for place in places:
        where, first = f"{place.folder}, episode {place.number}", places[0]
        for name in ("frame", "wrist", "state"):
            # Without their lengths: how large a picture is, and how many numbers a state has.
            kind, before = (one.header.get(name, [0])[1:] for one in (place, first))
            if kind != before:
                raise EpisodesError(f"{where}: {name} is {kind or 'missing'}, in {first.folder} {before or 'missing'}.")
        if known is not None and place.task not in known:
            listed = "; ".join(sorted(known))
            raise EpisodesError(f"{where}: the run does not know {place.header['instruction']!r}; it knows: {listed}.")
        # Who gives instructions numbers them itself, whatever each recording calls them.
        other = tasks.setdefault(place.header["task"], place)
        if known is None and other.task != place.task:
            raise EpisodesError(
                f"{where}: task {place.header['task']} is {place.header['instruction']!r}, in {other.folder} "
                f"{other.header['instruction']!r}; the recordings number their tasks differently."
            )
