"""What an optimizer moves, and how: frozen parameters, schedules, and a clip of the gradient before AdamW or Muon.

Muon orthogonalises the momentum of every matrix (Jordan et al. 2024; optax.contrib.muon). At the
embedded run's sizes it needs fewer steps than AdamW (docs/log.md). Its extra cost per step does not grow
with the batch.

Each schedule comes from its source, and its rounding is part of what was reported: ``warmup_cosine`` (world model,
fine-tuning, VAE, towers), ``warmup_constant`` (the published recipe of the 5B world model) and ``ramp_cosine``
(classifier; without its fall the learner of RL).

What is frozen has no gradient, no optimizer state and no update: it is taken out of the tree before the gradient is
asked for, instead of being multiplied by zero afterwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax.typing import ArrayLike
from optax.contrib import MuonDimensionNumbers, muon

from wovr_jax.core.config import Count, Decay, Natural, NonNegative, Positive
from wovr_jax.types import Array, Params

Path = tuple[Any, ...]
"""The keys that lead to a parameter."""

Name = Literal["adamw", "muon"]
NEWTON_SCHULZ_STEPS = 4
"""Steps of Muon's orthogonalisation in every run reported with it; optax's default is five."""


def warmup_cosine(lr: float, warmup: int, steps: int) -> optax.Schedule:
    """Rises from 0 to ``lr`` in ``warmup`` steps (half of a shorter run), then falls as a cosine to 0 at ``steps``."""
    # A short run would spend all its steps on the rise, and optax wants at least one step of each part.
    return optax.warmup_cosine_decay_schedule(0.0, lr, min(warmup, max(steps // 2, 1)), max(steps, 2))


def warmup_constant(lr: float, warmup: int) -> optax.Schedule:
    """Rises linearly from ``lr / warmup`` at the first step to ``lr`` at step ``warmup``, and stays there."""
    # The first step has a rate above 0: with five steps of warm-up, one at 0 would be a fifth of them lost.
    return optax.linear_schedule(lr / max(warmup, 1), lr, max(warmup - 1, 1))


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """What trainings by a schedule have in common.

    Attributes:
      steps, batch: optimizer steps, and samples in each.
      lr, warmup, schedule: peak learning rate, steps to reach it, then "cosine" to zero or "constant".
      optimizer, weight_decay, b1, b2, clip: see :func:`build`.
      ema: decay of the averaged weights that are used in the end; 0 for none.
    """

    steps: Natural = 1000
    batch: Count = 32
    lr: Positive = 1e-3
    warmup: Natural = 50
    schedule: Literal["cosine", "constant"] = "cosine"
    optimizer: Name = "adamw"
    weight_decay: NonNegative = 0.01
    b1: Decay = 0.9
    b2: Decay = 0.999
    clip: Positive = 1.0
    ema: Decay = 0.0

    def transform(self) -> optax.GradientTransformation:
        """Makes the optimizer, the clip of the gradient included."""
        rise = (self.lr, self.warmup)
        rate = warmup_cosine(*rise, self.steps) if self.schedule == "cosine" else warmup_constant(*rise)
        return build(self.optimizer, rate, clip=self.clip, b1=self.b1, b2=self.b2, decay=self.weight_decay)


def ramp_cosine(lr: float, warmup: int, steps: int = 0) -> optax.Schedule:
    """The rise of ``warmup_constant`` times a cosine that falls from the first step on and is 0 at ``steps``.

    Args:
      lr: peak learning rate.
      warmup: steps of the rise, the first one included; 0 begins at the peak.
      steps: length of the cosine; 0 stays at the peak.
    """

    def rate(count: ArrayLike) -> Array:
        done = jnp.asarray(count, jnp.float32)
        # Counts begin at 0, so that ``done + 1`` is the number of the step.
        rise = jnp.minimum(1.0, (done + 1.0) / max(warmup, 1))
        fall = 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.minimum(done / steps, 1.0))) if steps else 1.0
        return lr * rise * fall

    return rate


def build(
    name: str,
    rate: optax.ScalarOrSchedule,
    *,
    clip: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    decay: float = 0.0,
    moves: Callable[[tuple[Any, ...]], bool] | None = None,
) -> optax.GradientTransformation:
    """A clip of the gradient by its global norm, then the optimizer.

    Args:
      name: "adamw", or "muon": kernels are moved by Muon, everything else by AdamW with ``b1``, ``b2``.
        Muon's updates have the root mean square of Adam's, so one learning rate serves both.
      rate: learning rate or schedule.
      clip: largest global norm of a gradient; 0 is off.
      b1, b2, eps: of AdamW.
      decay: weight decay of every parameter.
      moves: which parameters it moves, by their paths (of ``jax.tree_util``); by default all. The others have no
        moments, do not count in the norm, and their gradient is passed on as it is.

    Raises:
      ValueError: for another name.
    """
    if name == "adamw":
        # Decay is decoupled: it shrinks the weights by rate * decay, whatever the gradient's size.
        update = optax.adamw(rate, b1, b2, eps=eps, weight_decay=decay)
    elif name == "muon":
        # optax accepts a function of the parameters here; its annotation lets no checker see that.
        how: Any = {"muon_weight_dimension_numbers": _matrices, "consistent_rms": 0.2, "ns_steps": NEWTON_SCHULZ_STEPS}
        update = muon(rate, eps=eps, adam_b1=b1, adam_b2=b2, weight_decay=decay, adam_weight_decay=decay, **how)
    else:
        raise ValueError(f"optimizer: expected 'adamw' or 'muon', got {name!r}")
    # First the clip: moments are averages of clipped gradients, so that one wild batch is not remembered.
    chain = optax.chain(optax.clip_by_global_norm(clip) if clip else optax.identity(), update)
    if moves is None:
        return chain
    return optax.masked(chain, lambda params: jax.tree_util.tree_map_with_path(lambda path, _: moves(path), params))


def _matrices(params: Params) -> Any:
    """For each kernel which axes are its inputs and outputs; None for what is not a kernel."""

    def matrix(path: tuple[Any, ...], leaf: Any) -> MuonDimensionNumbers | None:
        if getattr(path[-1], "key", None) != "kernel" or leaf.ndim < 2:
            return None
        # Three axes: the kernels of a stack of layers. More: a convolution, whose taps belong to the inputs.
        first = 1 if leaf.ndim == 3 else 0
        return MuonDimensionNumbers(tuple(range(first, leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(matrix, params)


# ---------------------------------------------------------------- what stays as it is


def find_frozen(params: Params, *names: str) -> frozenset[Path]:
    """Returns the paths of all parameters in the named subtrees, e.g. ``find_frozen(params, "vision/dino")``.

    Raises:
      ValueError: for a name of nothing.
    """
    # The slash at the end keeps "dino" from freezing "dino_head" as well.
    flat = {"/".join(map(str, path)) + "/": path for path in traverse_util.flatten_dict(params)}
    inside = {name: [path for text, path in flat.items() if text.startswith(f"{name}/")] for name in names}
    if empty := [name for name, paths in inside.items() if not paths]:
        raise ValueError(f"frozen: no parameter under {empty[0]!r}; the top level has {sorted(map(str, params))}")
    return frozenset(path for paths in inside.values() for path in paths)


def split_frozen(params: Params, frozen: frozenset[Path]) -> tuple[Params, dict[Path, Array]]:
    """Returns the trained parameters as a nested dict without the frozen ones, and the frozen ones by path."""
    # The frozen part stays flat: unflattened it would look like a tree of parameters, which half of one is not.
    flat: dict[Path, Any] = traverse_util.flatten_dict(params)
    trained = {path: leaf for path, leaf in flat.items() if path not in frozen}
    return traverse_util.unflatten_dict(trained), {path: flat[path] for path in flat if path in frozen}


def merge_frozen(trained: Params, frozen: dict[Path, Array]) -> Params:
    """Undoes :func:`split_frozen`."""
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(trained) | frozen)
