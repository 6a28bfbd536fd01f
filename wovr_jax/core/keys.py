"""Random keys by name, the same in every process."""

from __future__ import annotations

import hashlib

import jax


def key(seed: int, *names: str | int | jax.Array) -> jax.Array:
    """Returns a typed PRNG key for ``seed`` and a path of names, e.g. ``key(0, "grpo", round, "noise")``.

    Names are folded in one after another; a string by the first 32 bits of its SHA-256, so
    the same call gives the same key in every process (Python's ``hash`` would not).
    Integers may be traced.
    """
    derived = jax.random.key(seed)
    # One fold a name, so that a path is not another path with its names joined or swapped.
    for name in names:
        derived = jax.random.fold_in(derived, _fold(name))
    return derived


def _fold(name: str | int | jax.Array) -> int | jax.Array:
    if isinstance(name, str):
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    # fold_in takes 32 bits; a negative number keeps its two's complement.
    return name & 0xFFFFFFFF if isinstance(name, int) else name
