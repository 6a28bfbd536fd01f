"""Random keys by name, the same in every process."""

from __future__ import annotations

import hashlib

import jax


def key(seed: int, *names: str | int | jax.Array) -> jax.Array:
    """A typed PRNG key for ``seed`` and a path of names, e.g. ``key(0, "grpo", round, "noise")``.

    Names are folded in one after another; a string by the first 32 bits of its SHA-256, so
    the same call gives the same key in every process (Python's ``hash`` would not).
    Integers may be traced.
    """
    found = jax.random.key(seed)
    for name in names:
        found = jax.random.fold_in(found, _fold(name))
    return found


def _fold(name: str | int | jax.Array) -> int | jax.Array:
    if isinstance(name, str):
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return name & 0xFFFFFFFF if isinstance(name, int) else name
