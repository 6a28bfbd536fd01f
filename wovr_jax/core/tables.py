"""Tables of text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Returns rows as lines with columns of equal width and a rule under the first row, which is the head.

    Args:
      rows: equally many cells each.
      left: columns that begin at the left, as words do; the others end at the right, as numbers do.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if len(widths) - 1 in left:
        widths[-1] = 0  # words at the end of a line need no padding
    lines = [
        "  ".join(cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
