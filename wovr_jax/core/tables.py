"""Tables of text and bars over bytes, for a terminal; training does not import this file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from tqdm import tqdm


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


@contextlib.contextmanager
def progress_bar(name: str, size: int | None = None) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar over bytes on stderr; gives the function that moves it on."""
    # Twice a second: a bar that is drawn for every tensor fills the log of a scheduler.
    with tqdm(total=size, desc=name, unit="B", unit_scale=True, mininterval=0.5) as progress:

        def advance(size: int) -> None:
            progress.update(size)

        yield advance
