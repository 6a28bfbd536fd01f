"""A number that is not finite: found, named, and what made it kept on disk.

Metrics are looked at where they leave the device for the log, and the state before it is saved: looking costs no step
anything, and no checkpoint holds a NaN.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax.core import checkpoint
from wovr_jax.core.history import History
from wovr_jax.train.step import ReplayableStep, Step, restore

FOLDER = "nonfinite"
"""What a bad update trained on is kept under this name, beside the checkpoints."""


class NonFiniteError(FloatingPointError):
    """A metric or the state became NaN or infinite; the message says where.

    Attributes:
      step: number of the update that did it, counting from 1.
    """

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


def find_in_metrics(
    window: Sequence[Mapping[str, float]], undefined: Collection[str] = ()
) -> tuple[int, str, float] | None:
    """Returns place, name and value of the first metric that is not finite, in consecutive steps; None when all are.

    Those named in ``undefined`` may be NaN.
    """
    # A NaN in the state spoils every later step: the first one is the update that did it.
    for place, metrics in enumerate(window):
        for name, value in metrics.items():
            if not (np.isfinite(value) or (name in undefined and np.isnan(value))):
                return place, name, value
    return None


def find_in_state(state: Any) -> str | None:
    """Returns the path of a leaf that holds a NaN; None when no leaf does."""
    # Counters and keys of random numbers cannot be NaN, and isnan refuses the latter.
    flat = [
        (path, leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
        if jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.inexact)
    ]
    # One program and one transfer for the whole state, not one for each leaf.
    flags = jax.device_get(_have_nan([leaf for _, leaf in flat]))
    bad = [path for (path, _), flag in zip(flat, flags, strict=True) if flag]
    return jax.tree_util.keystr(bad[0], simple=True, separator="/") if bad else None


@jax.jit
def _have_nan(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isnan(leaf).any() for leaf in leaves]


def describe_leaf(leaf: Any) -> Any:
    """Returns enough of an array to restore one like it, when the array itself has been donated."""
    if not isinstance(leaf, jax.Array):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding if leaf.committed else None)


def dump(name: str, history: History | None, like: Any, step: Step, bad: int) -> str:
    """Keeps what update ``bad`` trained on and the state before it; returns a sentence on where, or why not.

    Args:
      name: the stage.
      history: checkpoints of the training; None where it keeps none, and then nothing is kept.
      like: shapes of the state.
      step: the step; only a ``ReplayableStep`` can show its batch.
      bad: number of the update, counting from 1.
    """
    if history is None or not isinstance(step, ReplayableStep):
        return ""
    try:
        # The state that failed is donated or spoiled by now; a checkpoint leads to the one before it.
        state = _state_before(bad, history, like, step)
        if state is None and step.on_policy:
            return "Nothing had been saved, so its rollouts are not kept; the same command meets them again."
        kept = {"batch": step.batch(state, jnp.asarray(bad - 1, jnp.int32)), "state": state}
        path = history.folder.with_name(FOLDER)
        checkpoint.save(path, kept, {"stage": name, "step": bad - 1})
    except checkpoint.CheckpointError as error:  # a full disk, too: the first fault is the one to report
        return f"What this update trained on could not be kept: {error}"
    return f"What this update trained on, and the state before it, are in {path} (checkpoint.load reads them)."


def _state_before(bad: int, history: History, like: Any, step: Step) -> Any:
    """The state of the last checkpoint, led on to update ``bad``; None when nothing had been saved."""
    history.wait()
    restored = restore(history, like)
    if restored is None:
        return None
    state, facts = restored
    # Steps depend on their number alone, so taking them again leads to the very state that was lost.
    for i in range(facts["step"], bad - 1):
        state, _ = step(state, jnp.asarray(i, jnp.int32))
    return state
