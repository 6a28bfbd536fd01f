"""Which parameters are trained: masks over a tree of parameters, and the tree in two parts.

What is frozen has no gradient, no optimizer state and no update: it is taken out of the tree before the gradient is
asked for, instead of being multiplied by zero afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import traverse_util

from wovr_jax.types import Array, Params

Path = tuple[Any, ...]
"""The keys that lead to a parameter."""

Mask = Params | Callable[[Params], Params]
"""Booleans in the structure of the parameters, or a function that makes them from the parameters; False freezes."""


def all_but(*names: str) -> Callable[[Params], Params]:
    """Makes a mask that freezes the subtrees at these paths, e.g. ``all_but("vision/dino")``.

    Raises (when the mask is made): ValueError for a path that names nothing.
    """

    def mask(params: Params) -> Params:
        # The slash at the end keeps "dino" from freezing "dino_head" as well.
        flat = traverse_util.flatten_dict(params)
        inside = {name: [path for path in flat if f"{_slashed(path)}/".startswith(f"{name}/")] for name in names}
        for name, paths in inside.items():
            if not paths:
                raise ValueError(f"all_but: no parameter under {name!r}; the top level has {sorted(map(str, params))}")
        frozen = {path for paths in inside.values() for path in paths}
        return traverse_util.unflatten_dict({path: path not in frozen for path in flat})

    return mask


def frozen_paths(params: Params, trainable: Mask | None) -> frozenset[Path]:
    """Returns the paths that ``trainable`` freezes; without a mask none.

    Raises:
      ValueError: a mask of another structure, or one that leaves nothing to train.
    """
    if trainable is None:
        return frozenset()
    mask = trainable(params) if callable(trainable) else trainable
    # By path, because a mask may be a plain dict where the parameters are another kind of mapping.
    flat, flags = traverse_util.flatten_dict(params), traverse_util.flatten_dict(mask)
    if set(flat) != set(flags):
        odd = sorted(_slashed(path) for path in set(flat) ^ set(flags))
        raise ValueError(f"trainable: expected one boolean for each parameter; the mask and params differ at {odd[:5]}")
    frozen = frozenset(path for path, trained in flags.items() if not trained)
    if len(frozen) == len(flat):
        raise ValueError(f"trainable: all {len(flat)} parameters are frozen, so there is nothing to train")
    return frozen


def split(params: Params, frozen: frozenset[Path]) -> tuple[Params, dict[Path, Array]]:
    """Returns the trained parameters as a nested dict without the frozen ones, and the frozen ones by path."""
    # The frozen part stays flat: unflattened it would look like a tree of parameters, which half of one is not.
    flat: dict[Path, Any] = traverse_util.flatten_dict(params)
    trained = {path: leaf for path, leaf in flat.items() if path not in frozen}
    return traverse_util.unflatten_dict(trained), {path: flat[path] for path in flat if path in frozen}


def merge(trained: Params, frozen: dict[Path, Array]) -> Params:
    """Undoes :func:`split`."""
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(trained) | frozen)


def _slashed(path: Path) -> str:
    return "/".join(map(str, path))
