"""The policy with low-rank adapters beside its layers, for fine-tuning and for RL alike."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from wovr_jax.nn import lora
from wovr_jax.nn.functional import Pure
from wovr_jax.nn.lora import LoRAConfig
from wovr_jax.policy.vla import VLA, VLAConfig, network
from wovr_jax.types import Array, Params


def resolved(cfg: VLAConfig, own: LoRAConfig, frozen: Sequence[str] = ()) -> LoRAConfig:
    """``own`` with the paths of the layers that it adapts; ``frozen`` parts of the policy have none.

    Raises:
      ValueError: when no layer is left, or a target is no layer.
    """
    paths = lora.targets(network(cfg).shapes(), own)
    return dataclasses.replace(own, targets=tuple(path for path in paths if path.split("/")[0] not in frozen))


@functools.cache
def adapted(cfg: VLAConfig, own: LoRAConfig) -> Pure:
    """The policy with adapters, as a pure function of what ``lora.join`` makes."""
    return Pure(lambda rngs: lora.adapt(VLA(cfg, rngs=rngs), own))


class Tuned(NamedTuple):
    """A policy as RL runs it: by itself, or with adapters beside it.

    Attributes:
      net: the network, for actor and learner alike; rounded otherwise in one of them, the ratios would not begin at 1.
      begin: ``begin(params, key)``: the plain network's parameters -> those of ``net``, which does the same with them.
      plain: the way back; adapters are folded in, in float32.
    """

    net: Pure
    begin: Callable[[Params, Array], Params]
    plain: Callable[[Params], Params]


def tuned(cfg: VLAConfig, own: LoRAConfig | None, frozen: Sequence[str] = ()) -> Tuned:
    """The policy with adapters ``own``, if any, except in its ``frozen`` parts.

    Raises:
      ValueError: as :func:`resolved`.
    """
    if own is None:
        return Tuned(network(cfg), lambda params, key: params, lambda params: params)
    found = resolved(cfg, own, frozen)
    begin = lambda params, key: lora.join(params, lora.init(key, params, found))  # noqa: E731
    return Tuned(adapted(cfg, found), begin, jax.jit(lambda joined: lora.merge(*lora.separate(joined), found)))
