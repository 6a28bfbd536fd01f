"""The progress bar of the doors that move weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def bar(name: str, size: int | None = None) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar over bytes on stderr; gives the function that moves it on."""
    from tqdm import tqdm

    # Twice a second: a bar that is drawn for every tensor fills the log of a scheduler.
    with tqdm(total=size, desc=name, unit="B", unit_scale=True, mininterval=0.5) as progress:

        def advance(size: int) -> None:
            progress.update(size)

        yield advance
