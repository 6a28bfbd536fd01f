"""Conversions by a weight table, checked as a whole first and then done tensor by tensor.

Nothing is guessed and nothing is nearly right: :func:`plan_import` and :func:`plan_export` compare names, shapes and
dtypes and raise one :class:`KeymapError` with everything that does not fit. Data move only
after that, one tensor at a time: :meth:`Plan.leaves` fills one leaf, hands it out and forgets
it, :meth:`Plan.tensors` does the same the other way round.

Numpy only; any dtype that numpy knows, bfloat16 included.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from wovr_jax.weights.safetensors import Fact
from wovr_jax.weights.table import Row, Table
from wovr_jax.weights.transforms import Shape, Transform

FLOATS = ("float32", "bfloat16", "float16")
"""Dtypes a weight may have. A file has mostly one of them, and may have float32 beside it."""
ASIDE_DTYPE = np.dtype(np.int64)
"""Dtype of the numbers that only travel aside: torch counts in it."""
SHOWN = 12
"""Problems of one kind that an error spells out; the rest are counted."""


class KeymapError(ValueError):
    """Weights that do not fit a table; ``problems`` maps each kind of misfit to all its cases."""

    def __init__(self, what: str, problems: Mapping[str, list[str]]):
        self.problems = {kind: cases for kind, cases in problems.items() if cases}
        count = sum(map(len, self.problems.values()))
        lines = [f"{what}: {count} {'problem' if count == 1 else 'problems'}; nothing was converted."]
        for kind, cases in self.problems.items():
            rest = [f"    ... and {len(cases) - SHOWN} more"] if len(cases) > SHOWN else []
            lines += [f"  {kind} ({len(cases)})", *(f"    {case}" for case in cases[:SHOWN]), *rest]
        super().__init__("\n".join(lines))


class Link(NamedTuple):
    """One tensor of theirs and the leaf, or the layer or slice of a leaf, that it is here.

    Attributes:
      theirs: name of the tensor.
      ours: path of the leaf.
      layer: None for the whole leaf, a number for a layer of a stacked one, slices for a part of axis 1.
      transform: change of layout between the two.
      shape: shape of their tensor.
    """

    theirs: str
    ours: str
    layer: int | tuple[slice, slice] | None
    transform: Transform
    shape: Shape

    @property
    def place(self) -> str:
        """The place in our tree, for messages."""
        if isinstance(self.layer, tuple):
            return f"{self.ours}[:,{self.layer[1].start}:{self.layer[1].stop}]"
        return self.ours if self.layer is None else f"{self.ours}[{self.layer}]"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A conversion that was checked and can only fail by reading or writing.

    Attributes:
      table: by which it goes.
      links: our path -> its links, layers in order.
      leaf: our path -> shape and dtype, fresh leaves excluded.
      tensor: their name -> shape and dtype, dropped and kept tensors excluded.
      dropped: their name -> why.
      fresh: our path -> why.
      kept: their name -> shape and dtype; they are no concern of :meth:`leaves` and :meth:`tensors`.
    """

    table: Table
    links: Mapping[str, tuple[Link, ...]]
    leaf: Mapping[str, Fact]
    tensor: Mapping[str, Fact]
    dropped: Mapping[str, str]
    fresh: Mapping[str, str]
    kept: Mapping[str, Fact] = dataclasses.field(default_factory=dict)

    def leaves(self, read: Callable[[str], np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        """Yields path and value of our leaves, from ``read(their name)``; holds one leaf and one tensor."""
        for path, links in self.links.items():
            leaf = np.empty(self.leaf[path].shape, self.leaf[path].dtype)
            for link in links:
                # A view: what is copied into it lands in the leaf.
                place = leaf if link.layer is None else leaf[link.layer]
                tensor = _check(read(link.theirs), self.tensor[link.theirs], link)
                np.copyto(place, link.transform.forward(tensor))
                del tensor  # before the next one is read
            yield path, leaf
            del leaf, place  # before the next leaf is made: the one handed out is the caller's

    def tensors(
        self, read: Callable[[str], np.ndarray], aside: Mapping[str, int] | None = None
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yields name and value of their tensors, from ``read(our path)``; holds one leaf and one tensor."""
        for path, links in self.links.items():
            # Layer after layer of one leaf, so that it is read once; a file does not care about the order.
            leaf = read(path)
            for link in links:
                part = leaf if link.layer is None else leaf[link.layer]
                tensor = np.ascontiguousarray(link.transform.backward(part))
                yield link.theirs, _check(tensor, self.tensor[link.theirs], link)
            del leaf, part
        for name, default in self.table.aside.items():
            yield name, np.array((aside or {}).get(name, default), ASIDE_DTYPE)


def _check(tensor: np.ndarray, fact: Fact, link: Link) -> np.ndarray:
    # A source that breaks its own promise would otherwise be broadcast or cast without a word.
    if (tensor.shape, tensor.dtype) != fact:
        raise ValueError(f"{link.theirs}: {fact} was promised, {tensor.dtype.name}{list(tensor.shape)} was read")
    return tensor


# ---------------------------------------------------------------- planning


def plan_import(
    what: str, table: Table, theirs: Mapping[str, Fact], ours: Mapping[str, Shape], doubled: Iterable[str] = ()
) -> Plan:
    """Checks an import of the tensors ``theirs`` into the leaves ``ours``.

    Args:
      what: the file, for messages.
      table: how names and layouts correspond.
      theirs: what the file holds.
      ours: shape of every leaf of the network.
      doubled: names that the file holds more than once.

    Raises:
      KeymapError: with every name that is missing, left over or doubled, every shape and
        dtype that is not as expected, and every leaf that the table does not describe.
    """
    # Every check adds to one list: a user who mends a file wants all its faults at once, not one at each attempt.
    links, fresh, problems = _links(table, ours)
    wanted = {link.theirs: link for link in links} | dict.fromkeys((*table.aside, *table.kept))
    # What a leaf wants is never dropped, whatever the patterns say.
    dropped = {name: why for name in theirs if name not in wanted and (why := _reason(name, table.dropped))}
    problems["missing in the file"] = [f"{name}{_for(link)}" for name, link in wanted.items() if name not in theirs]
    problems["not in the table"] = [
        f"{name} {fact}" for name, fact in theirs.items() if name not in wanted and name not in dropped
    ]
    problems["more than once in the file"] = sorted(doubled)
    present = [link for link in links if link.theirs in theirs]
    problems["shape"] += [text for link in present if (text := _misshapen(link, theirs[link.theirs]))]
    kept = {name: theirs[name] for name in table.kept if name in theirs}
    problems["shape"] += _unkept(table, kept)
    problems["dtype"] = _mistyped(present, theirs) + [
        f"{name}: expected {ASIDE_DTYPE}, got {theirs[name]}"
        for name in table.aside
        if name in theirs and theirs[name] != Fact((), ASIDE_DTYPE)
    ]
    if any(problems.values()):
        raise KeymapError(f"{what} does not fit {table.name}", problems)
    grouped = _grouped(links)
    # All tensors of a leaf have one dtype (see _mistyped), so the first one's is the leaf's.
    leaf = {path: Fact(ours[path], theirs[group[0].theirs].dtype) for path, group in grouped.items()}
    tensor = {name: theirs[name] for name in wanted if name not in kept}
    return Plan(table, grouped, leaf, tensor, dropped, fresh, kept)


def plan_export(what: str, table: Table, ours: Mapping[str, Fact], kept: Mapping[str, Fact] | None = None) -> Plan:
    """Checks an export of the leaves ``ours``; every one of them must have its place in the format.

    Args:
      what: our weights, for messages.
      table: how names and layouts correspond.
      ours: shape and dtype of every leaf.
      kept: what an import kept of the tensors that the table wants kept.

    Raises:
      KeymapError: as for :func:`plan_import`.
    """
    # On the way in a leaf may be made new; on the way out it would be lost, so no leaf is excused.
    closed = dataclasses.replace(table, fresh={})
    links, _, problems = _links(closed, {path: fact.shape for path, fact in ours.items()})
    problems["dtype"] = [
        f"{path}: expected one of {', '.join(FLOATS)}, got {fact}"
        for path, fact in ours.items()
        if fact.dtype.name not in FLOATS
    ]
    kept = dict(kept or {})
    problems["kept tensors that are missing"] = [name for name in table.kept if name not in kept]
    problems["kept tensors that are not in the table"] = [name for name in kept if name not in table.kept]
    problems["shape"] += _unkept(table, {name: kept[name] for name in table.kept if name in kept})
    if any(problems.values()):
        raise KeymapError(f"{what} cannot be written as {table.name}", problems)
    tensor = {link.theirs: Fact(link.shape, ours[link.ours].dtype) for link in links}
    tensor |= {name: Fact((), ASIDE_DTYPE) for name in table.aside}
    return Plan(table, _grouped(links), dict(ours), tensor, {}, {}, kept)


def _links(table: Table, ours: Mapping[str, Shape]) -> tuple[list[Link], dict[str, str], dict[str, list[str]]]:
    """Returns every tensor that the leaves want, the leaves that want none, and what the table cannot say.

    It goes from our leaves to their names, never the other way: our shapes say how many layers a stacked leaf has,
    while a name with a number in it says nothing about the others.
    """
    links: list[Link] = []
    fresh: dict[str, str] = {}
    problems: dict[str, list[str]] = collections.defaultdict(list)
    patterns = [(row, _pattern(row.ours)) for row in table.rows]
    for path, shape in ours.items():
        matches = [(row, match.groupdict()) for row, pattern in patterns if (match := pattern.fullmatch(path))]
        why = _reason(path, table.fresh)
        parts = [row.part for row, _ in matches if row.part]
        if why and not matches:
            fresh[path] = why
        elif parts and len(parts) == len(matches) and not why and _in_a_row(parts):
            # Several of theirs lie one after another in this leaf.
            for row, numbers in matches:
                links += _part(row, numbers, path, shape)
        elif len(matches) != 1 or parts or why:
            # Two rows would write over each other, and a row for a leaf that is to be made new is a contradiction.
            kind = "our leaves with two rows" if matches else "our leaves without a row"
            problems[kind].append(f"{path} {list(shape)}")
        else:
            try:
                links += _expand(*matches[0], path, shape)
            except ValueError as error:  # the transform has no such shape on their side
                problems["shape"].append(f"{path}: {error}")
    counts = collections.Counter(link.theirs for link in links)
    problems["wanted by two leaves"] = [name for name, count in counts.items() if count > 1]
    return links, fresh, problems


def _expand(row: Row, numbers: Mapping[str, str], path: str, shape: Shape) -> Iterator[Link]:
    """Yields the link of a leaf, or one for each layer of a stacked leaf."""
    if row.layer is None:
        yield Link(_fill(row.theirs, numbers), path, None, row.transform, row.transform.theirs(shape))
        return
    for layer in range(shape[0]):  # (layers, ...) here, a tensor for each layer there
        name = _fill(row.theirs, {**numbers, row.layer: str(layer)})
        yield Link(name, path, layer, row.transform, row.transform.theirs(shape[1:]))


def _in_a_row(parts: list[tuple[int, int | None]]) -> bool:
    """Returns whether each part begins where the one before it ends, and the last goes to the end."""
    stops = [stop for _, stop in parts]
    return [start for start, _ in parts] == [0, *stops[:-1]] and stops[-1] is None


def _part(row: Row, numbers: Mapping[str, str], path: str, shape: Shape) -> Iterator[Link]:
    """Yields the link of a tensor that is a slice of axis 1."""
    assert row.part is not None
    start, stop = row.part[0], shape[1] if row.part[1] is None else row.part[1]
    theirs = row.transform.theirs((shape[0], stop - start, *shape[2:]))
    yield Link(_fill(row.theirs, numbers), path, (slice(None), slice(start, stop)), row.transform, theirs)


def _pattern(text: str) -> re.Pattern[str]:
    """Returns a regular expression for names such as ``encoder/down/<d>/conv``, ``*`` standing for any end."""
    escaped = re.escape(text).replace(r"\*", ".*")
    return re.compile(re.sub(r"<(\w+)>", r"(?P<\1>\\d+)", escaped))


def _fill(text: str, numbers: Mapping[str, str]) -> str:
    return re.sub(r"<(\w+)>", lambda match: numbers[match[1]], text)


def _reason(name: str, patterns: Mapping[str, str]) -> str | None:
    return next((why for pattern, why in patterns.items() if _pattern(pattern).fullmatch(name)), None)


def _grouped(links: Iterable[Link]) -> dict[str, tuple[Link, ...]]:
    grouped: dict[str, list[Link]] = {}
    for link in links:
        grouped.setdefault(link.ours, []).append(link)
    return {path: tuple(group) for path, group in grouped.items()}


# ---------------------------------------------------------------- problems in words


def _for(link: Link | None) -> str:
    return "" if link is None else f" {list(link.shape)}, for {link.place}"


def _misshapen(link: Link, got: Fact) -> str | None:
    if got.shape == link.shape:
        return None
    # The usual mistake with a file that came from another framework; a square matrix cannot be told from its mirror.
    hint = ""
    if len(link.shape) > 1 and got.shape == (link.shape[1], link.shape[0], *link.shape[2:]):
        hint = "; it is transposed"
    return f"{link.theirs}: expected {list(link.shape)}, got {list(got.shape)}{hint} (for {link.place})"


def _unkept(table: Table, kept: Mapping[str, Fact]) -> list[str]:
    """Lists the kept tensors of another shape, or that are no weights."""
    return [
        f"{name}: expected {list(table.kept[name])} of {', '.join(FLOATS)}, got {fact} (kept for export)"
        for name, fact in kept.items()
        if fact.shape != table.kept[name] or fact.dtype.name not in FLOATS
    ]


def _mistyped(links: list[Link], theirs: Mapping[str, Fact]) -> list[str]:
    """Lists the weights that are no floats, not of the file's dtype, or of another dtype than the layers beside them.

    float32 is let pass everywhere: releases in bfloat16 keep some norms and embeddings so.
    """
    names = collections.Counter(theirs[link.theirs].dtype.name for link in links)
    usual = max((name for name in names if name in FLOATS), key=names.__getitem__, default=FLOATS[0])
    wrong = [
        f"{link.theirs}: expected {usual}, got {theirs[link.theirs]} (for {link.place})"
        for link in links
        if theirs[link.theirs].dtype.name not in {FLOATS[0], usual}
    ]
    for path, group in _grouped(links).items():
        # A stacked leaf is one array and has one dtype: layers of two would be cast, and bits would change.
        kinds = {theirs[link.theirs].dtype.name for link in group}
        if len(kinds) > 1 and kinds == {FLOATS[0], usual}:
            wrong.append(f"{group[0].theirs} and its like: layers of {path} are partly {usual}, partly {FLOATS[0]}")
    return wrong
