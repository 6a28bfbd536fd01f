"""The optimizers of training from nothing: clip, then AdamW or Muon, with warm-up and a cosine to zero.

Muon orthogonalises the momentum of every matrix (Jordan et al. 2024; optax.contrib.muon). At the
embedded run's sizes it needs fewer steps than AdamW (docs/tabletop.md). Its extra cost per step does not grow
with the batch.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from wovr_jax.types import Params

Name = Literal["adamw", "muon"]
NEWTON_SCHULZ_STEPS = 4
"""Of Muon's orthogonalisation, in every run reported with it; optax's default is five."""


def warmup_cosine(lr: float, warmup: int, steps: int) -> optax.Schedule:
    """From 0 to ``lr`` in ``warmup`` steps (half of a shorter run), then a cosine to 0 at ``steps``."""
    return optax.warmup_cosine_decay_schedule(0.0, lr, min(warmup, max(steps // 2, 1)), max(steps, 2))


def clipped(
    name: str, rate: optax.ScalarOrSchedule, *, clip: float, b1: float = 0.9, b2: float = 0.999, decay: float = 0.0
) -> optax.GradientTransformation:
    """A global clip of the gradient, then the optimizer.

    Args:
      name: "adamw", or "muon": kernels are moved by Muon, everything else by AdamW with ``b1``, ``b2``.
        Muon's updates have the root mean square of Adam's, so one learning rate serves both.
      rate: learning rate or schedule.
      clip: largest global norm of a gradient.
      decay: weight decay of every parameter.

    Raises:
      ValueError: another name.
    """
    if name == "adamw":
        moves = optax.adamw(rate, b1, b2, weight_decay=decay)
    elif name == "muon":
        # optax accepts a function of the parameters here; its annotation lets no checker see that.
        how: Any = {"muon_weight_dimension_numbers": _matrices, "consistent_rms": 0.2}
        moves = muon(
            rate,
            ns_steps=NEWTON_SCHULZ_STEPS,
            adam_b1=b1,
            adam_b2=b2,
            weight_decay=decay,
            adam_weight_decay=decay,
            **how,
        )
    else:
        raise ValueError(f"optimizer: expected 'adamw' or 'muon', got {name!r}")
    return optax.chain(optax.clip_by_global_norm(clip), moves)


def _matrices(params: Params) -> Any:
    """For each kernel which axes are its inputs and outputs; None for what is not a kernel."""

    def matrix(path: tuple[Any, ...], leaf: Any) -> MuonDimensionNumbers | None:
        if getattr(path[-1], "key", None) != "kernel" or leaf.ndim < 2:
            return None
        # Three axes: the kernels of a stack of layers. More: a convolution, whose taps belong to the inputs.
        first = 1 if leaf.ndim == 3 else 0
        return MuonDimensionNumbers(tuple(range(first, leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(matrix, params)
