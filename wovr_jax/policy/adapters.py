"""The policy with low-rank adapters beside its layers, for fine-tuning and for RL alike."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from wovr_jax.nn import lora
from wovr_jax.nn.functional import Pure
from wovr_jax.nn.lora import LoRAConfig
from wovr_jax.policy.vla import VLA, VLAConfig, network


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
