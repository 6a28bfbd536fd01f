"""Devices to plan for: what each holds and computes, and descriptions of them that a compiler takes."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from wovr_jax.core.sharding import ShardingError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
      gib: memory in GiB; 0 where it is not known.
      tflops: peak of bfloat16 matrix products, 1e12 operations a second; 0 where it is not known.
    """

    gib: float
    tflops: float


TPUS = {
    "v4": Chip(32.0, 275.0),
    "v5e": Chip(16.0, 197.0),
    "v5p": Chip(95.0, 459.0),
    "v6e": Chip(32.0, 918.0),
}
"""By generation (cloud.google.com/tpu/docs, system architecture)."""
GPUS = {"a100": Chip(80.0, 312.0), "h100": Chip(80.0, 989.0), "h200": Chip(141.0, 989.0), "b200": Chip(180.0, 2250.0)}
"""Dense, without sparsity (vendor's data sheets)."""
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")
SLICES = {"v4": _CUBIC, "v5e": _FLAT, "v5p": _CUBIC, "v6e": _FLAT}
"""Shapes in which they are rented, the smallest first, up to what a full-size run could want."""
STAND_INS = {1: "1x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"}
"""Number of GPUs -> the v5p slice whose compiler is asked in place of theirs."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: as asked for.
      devices: or their descriptions.
      chip: each of them.
      exact: whether the compiler is that of these devices, and not a stand-in.
    """

    name: str
    devices: Sequence[Any]
    chip: Chip
    exact: bool = True


def topology(name: str) -> Topology:
    """Returns the devices of a name: ``v5e:4x4`` and the like, ``h200`` or ``h100:8``, ``here`` for JAX's own.

    TPUs are compiled for with libtpu, which needs no TPU. XLA compiles for a GPU only where there is one: away from
    it, libtpu's v5p stands in, so arguments are exact and temporary memory is an estimate.

    Raises:
      ShardingError: for a topology that is not known, or without libtpu.
    """
    if name == "here":
        devices = jax.devices()
        return Topology(name, devices, _find_chip(devices[0].device_kind))
    kind, _, shape = name.partition(":")
    if kind in TPUS and re.fullmatch(r"\d+(x\d+)+", shape):
        return Topology(name, _describe_slice(name), TPUS[kind])
    # One GPU may be asked for without a number. Only counts that a v5p slice has can be stood in for.
    if kind in GPUS and int(shape or 1 if shape.isdigit() or not shape else 0) in STAND_INS:
        return Topology(name, _describe_slice(f"v5p:{STAND_INS[int(shape or 1)]}"), GPUS[kind], exact=False)
    raise ShardingError(
        f"topology: expected here, <generation>:<shape> of {', '.join(TPUS)}, such as v5e:4x4 or v5p:2x2x4, or one of "
        f"{', '.join(GPUS)} with {', '.join(map(str, STAND_INS))} devices, such as h200 or h100:8; got {name}"
    )


def _describe_slice(name: str) -> Sequence[Any]:
    """Returns descriptions of a slice's devices, by libtpu."""
    chips = math.prod(map(int, name.partition(":")[2].split("x")))
    # A host has four chips, unless it is told otherwise.
    options = {"chips_per_host_bounds": [1, 1, 1]} if chips == 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as error:  # libtpu raises whatever it likes
        if importlib.util.find_spec("libtpu") is None:
            raise ShardingError(
                f"topology: plans for {name} are made by the TPU compiler, which is not installed. It needs no TPU: "
                'pip install "jax[tpu]"'
            ) from error
        raise ShardingError(f"topology: the TPU compiler does not know {name} ({error}).") from error


def _find_chip(kind: str) -> Chip:
    """Returns the chip that calls itself ``kind``, such as NVIDIA H100 80GB HBM3 or TPU v5 lite."""
    # The driver's name for v5p is TPU v5, so the lite ones have to be replaced before it.
    name_of_kind = kind.lower().replace("tpu v5 lite", "v5e").replace("tpu v6 lite", "v6e").replace("tpu v5", "v5p")
    # A device that is not known can still be compiled for: only whether it fits, and how fast it is, stays open.
    return next((chip for name, chip in (GPUS | TPUS).items() if name in name_of_kind), Chip(0.0, 0.0))
