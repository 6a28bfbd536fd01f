"""Weight tables: how the tensors of somebody else's file become the leaves of our tree, and back.

A row of a table is ``(their name, our path, transform)``:

    Row("blocks.<i>.ffn.0.weight", "blocks/ffn/inner/kernel", KERNEL)

``<i>`` stands for a number. A number that our path has as well is carried over; one that it
lacks counts the layers of a stacked leaf, whose leading axis is that number. The table is read
forwards to import and backwards to export (``plan``), and says what is left over: their tensors that are
``dropped`` or ``kept`` for the way back, our leaves that stay ``fresh``, and numbers that only
travel ``aside``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from wovr_jax.weights.transforms import KEEP, Shape, Transform


class Row(NamedTuple):
    """A line of a table.

    Attributes:
      theirs: name of their tensor.
      ours: path of our leaf, joined by ``/``.
      transform: the change of layout between the two.
      part: where several of theirs lie one after another on axis 1 of one leaf: from where to where, None for the
        end. All rows of such a leaf have it, and together they fill the axis.
    """

    theirs: str
    ours: str
    transform: Transform = KEEP
    part: tuple[int, int | None] | None = None

    @property
    def layer(self) -> str | None:
        """The name of the number that counts the layers of a stacked leaf, or None for a leaf that is none."""
        # What only their name counts must be an axis here.
        extra = set(re.findall(r"<(\w+)>", self.theirs)) - set(re.findall(r"<(\w+)>", self.ours))
        if len(extra) > 1:
            raise ValueError(f"{self.theirs}: numbers {sorted(extra)} are missing in {self.ours}; one may be")
        return extra.pop() if extra else None


@dataclasses.dataclass(frozen=True)
class Table:
    """All rows between one format of file and one network.

    Attributes:
      name: of the format and network, for messages.
      rows: see the module's docstring.
      dropped: pattern of their names -> why no leaf takes it.
      fresh: pattern of our paths -> why the file has nothing for it.
      aside: their name -> the integer that an export writes when the import kept none.
      kept: their name -> shape of a tensor that no leaf takes and the format cannot be without:
        it is kept as it is, and an export writes it back.
    """

    name: str
    rows: tuple[Row, ...]
    dropped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fresh: Mapping[str, str] = dataclasses.field(default_factory=dict)
    aside: Mapping[str, int] = dataclasses.field(default_factory=dict)
    kept: Mapping[str, Shape] = dataclasses.field(default_factory=dict)


def require(what: str, facts: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuses a config whose facts, where it gives them, differ from ``expected``: another kind of network.

    Raises:
      ValueError: naming every fact that differs.
    """
    # A fact that config.json leaves out has the default of the code that wrote it, which is the expected one.
    wrong = [
        f"{name} {facts[name]!r} instead of {want!r}"
        for name, want in expected.items()
        if facts.get(name, want) != want
    ]
    if wrong:
        raise ValueError(f"config.json describes a network that differs from {what} in kind: {', '.join(wrong)}")
