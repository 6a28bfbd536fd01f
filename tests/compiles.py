"""Counts what JAX compiles, for tests that say how often a program is made."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator

import jax

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
"""What JAX reports once for each program it compiles or takes from the compile cache."""


@contextlib.contextmanager
def count_compiles() -> Iterator[collections.Counter[str]]:
    """Counts the programs that JAX compiles inside the block, by the name of the jitted function.

    >>> with count_compiles() as compiles:
    ...     train_step(state, i)
    >>> compiles["train_step"]  # doctest: +SKIP
    1

    A program taken from the persistent cache counts as compiled. Array operations outside
    jit appear under their own names, so look a stage up by its function.
    """
    counted: collections.Counter[str] = collections.Counter()

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILE_EVENT:
            counted[_plain(str(kwargs.get("fun_name", "?")))] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield counted
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _plain(name: str) -> str:
    """Returns ``train_step`` for ``jit(train_step)`` or ``jit_train_step``."""
    # Versions of JAX differ in how they name a program.
    if name.startswith("jit(") and name.endswith(")"):
        return name[4:-1]
    return name.removeprefix("jit_")
