"""One train step for every network: world model, policy, classifier, VAE and towers.

A network brings an ``Objective``: its loss, how a batch is drawn, its optimizer. The step is the same for all::

    batch  = draw(fold_in(key, i), data)
    g      = gradient of loss(params, fixed, batch) in params
    params = params + optimizer(g)                      the optimizer clips g first
    ema    = keep * ema + (1 - keep) * params           where an average is asked for

``params`` are what is trained: a whole network, some parts of it, or adapters. What is not trained travels beside
them as ``fixed``. Data, key and ``fixed`` are arguments of the compiled program, so programs are kept by the settings
of their objective, and a second training of the same shapes compiles nothing.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from wovr_jax.core import sharding
from wovr_jax.core.sharding import WHOLE, Axes
from wovr_jax.types import Array, Params

Metrics = dict[str, Array]
Step = Callable[[Any, Array], tuple[Any, dict[str, Any]]]
"""``step(state, i) -> (state, metrics)``; ``i`` is an int32 scalar array, metrics are scalars."""
Feed = Callable[[Array], tuple[Any, dict[str, float]]]
"""``feed(i)``: what the batch of step ``i`` is drawn from, and metrics of the host."""

PROGRAMS = 16
"""Compiled programs that are kept: more than the trainings of one round."""


@struct.dataclass
class TrainState:
    """What changes during a training; its checkpoint holds nothing else.

    Attributes:
      params: what is trained.
      opt_state: of the optimizer.
      ema: exponential moving average of ``params``; None without one.
    """

    params: Params
    opt_state: Any
    ema: Params | None = None

    @property
    def result(self) -> Params:
        """What the training is for: the average where there is one, else the parameters."""
        return self.params if self.ema is None else self.ema


class Objective(abc.ABC):
    """What a network brings to its training.

    Subclasses are frozen dataclasses of settings: compiled programs are kept by their value.

    Attributes:
      axes: of the network, for the mesh in use (``core.sharding``).
      train: how it is trained, most often a ``TrainingConfig``.
    """

    axes: ClassVar[Axes] = WHOLE
    train: Any

    @property
    def decay(self) -> float:
        """Decay of the moving average; 0 for none."""
        return getattr(self.train, "ema", 0.0)

    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer, its clipping of the gradient included."""
        return self.train.transform()

    @abc.abstractmethod
    def draw(self, key: Array, data: Any) -> tuple[Any, Array]:
        """Returns a batch, cut over the devices, and the key for what the loss draws."""

    @abc.abstractmethod
    def loss(self, params: Params, fixed: Any, batch: Any, key: Array) -> tuple[Any, ...]:
        """Returns the loss and further metrics; a network with running statistics returns as a third value its
        parameters as the forward pass left them."""

    def is_statistic(self, path: tuple[Any, ...]) -> bool:
        """Whether the parameter at a path is a running statistic, which follows the data and not the gradient."""
        del path
        return False


@dataclasses.dataclass(frozen=True)
class ReplayableStep:
    """A step that can show what it trained on, for when an update goes wrong and has to be looked at.

    Attributes:
      step: see ``Step``.
      batch: ``batch(state, i)`` gives the arrays that ``step(state, i)`` would train on.
      on_policy: whether the batch depends on the state, as rollouts of a policy do.
    """

    step: Step
    batch: Callable[[Any, Array], Any]
    on_policy: bool = False

    def __call__(self, state: Any, i: Array) -> tuple[Any, dict[str, Any]]:
        return self.step(state, i)


def make(
    objective: Objective, params: Params, feed: Feed, key: Array, *, fixed: Any = None
) -> tuple[TrainState, ReplayableStep]:
    """Returns the first state of a training and its step, jitted; the step donates the state.

    Args:
      objective: what to train for.
      params: what is trained, at its start; copied.
      feed: gives what batches are drawn from; see ``resident`` for data that stay on the devices.
      key: the batch of step ``i`` depends on ``fold_in(key, i)`` only, so a resumed run is the uninterrupted one.
      fixed: what the loss needs besides and no step changes.
    """
    programs = compile_programs(objective)
    fixed = sharding.place(fixed, objective.axes)

    def step(state: TrainState, i: Array) -> tuple[TrainState, dict[str, Any]]:
        # Streams hand over another batch at each step; resident data are the same arrays, and nothing is copied.
        data, host_metrics = feed(i)
        state, metrics = programs.step(state, i, fixed, data, key)
        # Floats of the host beside what the device has yet to compute: reading those would wait for it.
        return state, metrics | host_metrics

    return create(objective, params), ReplayableStep(step, lambda _, i: programs.draw(i, feed(i)[0], key))


def resident(data: Any) -> Feed:
    """Returns the feed of data that lie on the devices and are the same at every step."""
    data = sharding.whole(data)
    return lambda i: (data, {})


def create(objective: Objective, params: Params) -> TrainState:
    """Returns the state before the first step. ``params`` are copied, because the step donates the state."""
    params = jax.tree.map(jnp.copy, params)
    # A copy of its own: one buffer cannot be donated twice.
    ema = jax.tree.map(jnp.copy, params) if objective.decay else None
    return sharding.place(TrainState(params, objective.optimizer().init(params), ema), objective.axes)


class CompiledPrograms(NamedTuple):
    """The jitted programs of one objective.

    Attributes:
      step: ``step(state, i, fixed, data, key) -> (state, metrics)``; ``state`` is donated.
      draw: ``draw(i, data, key)``, the batch of that step and the key of its loss.
    """

    step: Any
    draw: Any


@functools.lru_cache(maxsize=PROGRAMS)
def compile_programs(objective: Objective) -> CompiledPrograms:
    """Returns the programs of an objective, the same ones each time for objectives that are equal."""

    # A batch depends on the number of its step alone, so steps can be resumed anywhere and drawn again.
    def draw(i: Array, data: Any, key: Array) -> tuple[Any, Array]:
        return objective.draw(jax.random.fold_in(key, i), data)

    def step(state: TrainState, i: Array, fixed: Any, data: Any, key: Array) -> tuple[TrainState, Metrics]:
        batch, k_loss = draw(i, data, key)
        return advance(objective, state, batch, k_loss, i, fixed)

    # The old state's memory becomes the new one's: two states of a large network would not fit.
    return CompiledPrograms(jax.jit(step, donate_argnums=0), jax.jit(draw))


def advance(
    objective: Objective, state: TrainState, batch: Any, key: Array, i: Array, fixed: Any = None
) -> tuple[TrainState, Metrics]:
    """One update on a batch, to be used under ``jit``.

    Returns:
      The state after it, and metrics: ``loss`` and ``grad_norm`` (before clipping) of every network, and its own.
    """

    def loss_fn(params: Params) -> tuple[Array, tuple[Metrics, list[Params]]]:
        loss, metrics, *left = objective.loss(params, fixed, batch, key)
        return loss, (metrics, left)

    (loss, (metrics, left)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    # Clipping is the first link of the optimizer's chain; the gradient itself is reported as it came.
    updates, opt_state = objective.optimizer().update(grads, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    for seen in left:
        # A running statistic is an average over batches: the forward pass has updated it already.
        params = jax.tree_util.tree_map_with_path(
            lambda path, new, average: average if objective.is_statistic(path) else new, params, seen
        )
    # Left to choose, XLA might cut the new state otherwise than the old one, and the next step would compile anew.
    new = sharding.keep(TrainState(params, opt_state, _average(state.ema, params, objective.decay, i)), objective.axes)
    return new, {"loss": loss, **metrics, "grad_norm": optax.tree.norm(grads)}


def _average(ema: Params | None, params: Params, decay: float, i: Array) -> Params | None:
    if ema is None:
        return None
    # Early weights are far from where training ends, so the average begins short and forgets them quickly.
    keep = jnp.minimum(decay, (1.0 + i) / (10.0 + i))
    return jax.tree.map(lambda old, new: keep * old + (1.0 - keep) * new, ema, params)
