"""Low-rank adapters (LoRA) on a plain parameter dict: kernel + scale * a @ b, and only a and b are trained.

Any network whose layers are ``nnx.Linear`` takes them, single kernels (in, out) and stacks of layers
(layers, in, out) alike, and so does a single ``nnx.Conv`` (height, width, in, out). The base weights are never
touched; adapters are a dict of their own, so that the optimiser's state, the gradient and the checkpoint hold nothing
else::

    adapters = init(key, params, cfg)
    network = Pure(lambda rngs: adapt(build(rngs), cfg))
    gradient = jax.grad(lambda adapters: objective(network(join(params, adapters), batch)))(adapters)
    merged = merge(params, adapters, cfg)  # runs in the plain network

Two ways to run them, with the same numbers: ``adapt`` puts the two thin products beside the layer's own, and no
gradient of a whole kernel is ever made; ``merge`` folds them into the kernels, for use and for export.
Source: Hu et al. 2021; initialisations as in huggingface/peft:src/peft/tuners/lora/layer.py.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from wovr_jax.core.config import Count, Faults, Positive, checked
from wovr_jax.types import Array, Params

Init = Literal["gaussian", "kaiming"]
DOWN, UP = "lora_a", "lora_b"
"""Names of a and b, in a layer and in the dict of its parameters."""
Keys = tuple[Any, ...]
"""The way to a layer in a parameter dict: names, and numbers in a list of modules."""


@checked
@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Which kernels are adapted, and how. A room that names its layers has presets of its own in a subclass.

    Attributes:
      rank: inner width of the adapters.
      alpha: their product counts alpha / rank.
      targets: shell patterns over the paths of layers, such as ``blocks/self_attn/*`` or ``*``; a ``*`` crosses "/".
      init: of a, "kaiming" (uniform within 1 / sqrt(inputs)) or "gaussian" (deviation 1 / rank); b starts at zero.
    """

    rank: Count = 32
    alpha: Positive = 32.0
    targets: tuple[str, ...] = ("*",)
    init: Init = "kaiming"

    def faults(self) -> Faults:
        """Yields adapters of nothing."""
        if not self.targets:
            yield "targets", "expected the pattern of at least one layer, got none"

    @property
    def scale(self) -> float:
        """How much the product of the adapters counts."""
        return self.alpha / self.rank


def _find_kernels(params: Params) -> dict[str, tuple[Keys, Any]]:
    """Returns the layers that can be adapted: path -> keys and kernel of the layer, in the order of ``params``."""
    leaves = _flatten(params).items()
    # (in, out), (layers, in, out), (height, width, in, out); a causal convolution over time has five axes.
    kernels = [(keys[:-1], leaf) for keys, leaf in leaves if keys[-1] == "kernel" and leaf.ndim in (2, 3, 4)]
    return {"/".join(map(str, keys)): (keys, kernel) for keys, kernel in kernels}


def targets(params: Params, cfg: LoRAConfig) -> list[str]:
    """Returns the paths of the layers that ``cfg.targets`` name, in the order of ``params``.

    Raises:
      ValueError: for patterns that match no layer; the message lists the layers there are.
    """
    known = _find_kernels(params)
    idle = [pattern for pattern in cfg.targets if not fnmatch.filter(known, pattern)]
    if idle:
        raise ValueError(f"LoRA: no layer matches {', '.join(map(repr, idle))}; there are: {', '.join(known)}")
    return [path for path in known if any(fnmatch.fnmatchcase(path, pattern) for pattern in cfg.targets)]


def init(key: Array, params: Params, cfg: LoRAConfig) -> Params:
    """Draws float32 adapters under the paths of their layers; with them the network is what it was.

    Args:
      key: every layer draws from its own fold of it, by its place among the candidates.
      params: the network's, or their shapes.
      cfg: which layers, and how.

    Raises:
      ValueError: as ``targets``.
    """
    adapters, wanted = {}, set(targets(params, cfg))
    # The key is folded by the place among all candidates: a layer draws the same whichever others are adapted.
    for place, (path, (keys, kernel)) in enumerate(sorted(_find_kernels(params).items())):
        if path in wanted:
            down, up = shapes(kernel.shape, cfg.rank)
            # One of the two is zero, so the product is; not both, or neither would have a gradient.
            adapters[*keys, DOWN] = _draw(jax.random.fold_in(key, place), down, cfg)
            adapters[*keys, UP] = jnp.zeros(up, jnp.float32)
    return unflatten_dict(adapters)


def shapes(kernel: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes of a and b beside a kernel. A convolution has its window in a; the window of b is 1 x 1."""
    *layers, inputs, outputs = kernel  # layers: (), (layers,), or the window (height, width) of a convolution
    above = [1] * len(layers) if len(kernel) == 4 else layers
    return (*layers, inputs, rank), (*above, rank, outputs)


def _draw(key: Array, shape: tuple[int, ...], cfg: LoRAConfig) -> Array:
    if cfg.init == "gaussian":
        return jax.random.normal(key, shape) / cfg.rank
    # PEFT's kaiming_uniform with a = sqrt(5): within 1 / sqrt(fan_in), which of a convolution is window times inputs.
    bound = 1.0 / math.sqrt(math.prod(shape[:-1] if len(shape) == 4 else shape[-2:-1]))
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def merge(params: Params, adapters: Params, cfg: LoRAConfig) -> Params:
    """Returns the parameters of the plain network with the adapters folded in; other leaves are passed on.

    What else lies in ``adapters``, layers that were trained whole beside them, takes the place of its own.

    The product and the sum are float32, whatever the dtype of the kernel, and rounded to it once.

    Raises:
      ValueError: when an adapter has no layer, or not its shape.
    """
    _check(params, adapters)
    beside = _flatten(adapters)
    leaves = _flatten(params) | {keys: leaf for keys, leaf in beside.items() if keys[-1] not in (DOWN, UP)}
    for (*above, name), down in beside.items():
        if name == DOWN:
            kernel = leaves[*above, "kernel"]
            # (..., in, rank) @ (..., rank, out) -> (..., in, out); before them the layers, or a convolution's window.
            product = jnp.matmul(down, beside[*above, UP], precision="highest", preferred_element_type=jnp.float32)
            # In bfloat16 a small product would vanish in the sum: half of a kernel's last place is often more than it.
            leaves[*above, "kernel"] = (kernel.astype(jnp.float32) + cfg.scale * product).astype(kernel.dtype)
    return unflatten_dict(leaves)


def join(params: Params, adapters: Params) -> Params:
    """Returns the parameters of the network that ``adapt`` made: each adapter beside the kernel it belongs to.

    Raises:
      ValueError: as ``merge``.
    """
    _check(params, adapters)
    return unflatten_dict(_flatten(params) | _flatten(adapters))


def separate(joined: Params) -> tuple[Params, Params]:
    """Undoes :func:`join`: returns the plain network's parameters, and the adapters."""
    leaves = _flatten(joined)
    plain = {keys: leaf for keys, leaf in leaves.items() if keys[-1] not in (DOWN, UP)}
    adapters = {keys: leaf for keys, leaf in leaves.items() if keys not in plain}
    return unflatten_dict(plain), unflatten_dict(adapters)


def find_frozen(joined: Params) -> frozenset[Keys]:
    """Returns the paths of the network's own parameters in ``join``'s result, beside which the adapters are trained."""
    return frozenset(keys for keys in _flatten(joined) if keys[-1] not in (DOWN, UP))


def adapt(module: nnx.Module, cfg: LoRAConfig) -> nnx.Module:
    """Puts adapters into the layers of ``module`` that ``cfg`` names: for use inside the builder of a ``Pure``.

    Returns:
      ``module`` itself, changed in place.

    Raises:
      ValueError: as ``targets``, or when a target is neither an ``nnx.Linear`` nor an ``nnx.Conv``.
    """
    for path in targets(nnx.to_pure_dict(nnx.state(module)), cfg):
        *above, name = path.split("/")
        holder: Any = module
        for step in above:
            holder = holder[int(step)] if step.isdigit() else getattr(holder, step)
        # A layer is an attribute of its module, or stands in an ``nnx.List`` under its number.
        layer = holder[int(name)] if name.isdigit() else getattr(holder, name)
        if not isinstance(layer, nnx.Linear | nnx.Conv):
            raise ValueError(f"LoRA: {path} is a {type(layer).__name__}; only nnx.Linear and nnx.Conv take adapters")
        adapted = AdaptedLinear(layer, cfg) if isinstance(layer, nnx.Linear) else AdaptedConv(layer, cfg)
        if name.isdigit():
            holder[int(name)] = adapted
        else:
            setattr(holder, name, adapted)
    return module


class _Adapted(nnx.Module):
    """A layer's own variables, and beside them adapters that change nothing; the real ones come with a call."""

    def __init__(self, layer: nnx.Linear | nnx.Conv, cfg: LoRAConfig):
        # The same variables under the same names: parameters of the plain network fit as they are.
        self.kernel, self.bias = layer.kernel, layer.bias
        self.lora_a, self.lora_b = (nnx.Param(jnp.zeros(shape)) for shape in shapes(layer.kernel.shape, cfg.rank))
        self.scale, self.dtype = cfg.scale, layer.dtype


class AdaptedLinear(_Adapted):
    """A linear layer, and beside it two thin ones: x W + bias + scale (x a) b, in the layer's compute dtype."""

    def __call__(self, x: Array) -> Array:
        x = x if self.dtype is None else x.astype(self.dtype)
        # (x a) b and not x (a b): two thin products, and the gradient never has the shape of the kernel.
        thin = (x @ self.lora_a[...].astype(x.dtype)) @ self.lora_b[...].astype(x.dtype)
        y = x @ self.kernel[...].astype(x.dtype) + self.scale * thin
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class AdaptedConv(_Adapted):
    """A convolution with the product of its adapters added to the kernel, which for a patch embedding is small."""

    def __init__(self, layer: nnx.Conv, cfg: LoRAConfig):
        if layer.feature_group_count != 1 or layer.kernel_dilation != 1 or layer.input_dilation != 1:
            raise ValueError("LoRA: expected a convolution without groups and dilation")
        super().__init__(layer, cfg)
        self.strides: Any = layer.strides
        self.padding: Any = layer.padding

    def __call__(self, x: Array) -> Array:
        x = x if self.dtype is None else x.astype(self.dtype)
        # (h, w, in, rank) @ (1, 1, rank, out) -> (h, w, in, out)
        product = jnp.matmul(self.lora_a[...], self.lora_b[...], precision="highest")
        kernel = (self.kernel[...] + self.scale * product).astype(x.dtype)
        axes = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, self.strides, self.padding, dimension_numbers=axes)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def columns(layer: nnx.Module, x: Array, first: int, count: int) -> Array:
    """Computes ``count`` outputs from ``first`` on of a linear layer without bias, adapted or not, and no others."""
    linear: Any = layer
    y = x @ linear.kernel[:, first : first + count].astype(x.dtype)
    if not isinstance(layer, AdaptedLinear):
        return y
    down, up = layer.lora_a[...], layer.lora_b[:, first : first + count]
    return y + layer.scale * ((x @ down.astype(x.dtype)) @ up.astype(x.dtype))


def _flatten(params: Params) -> dict[Keys, Any]:
    return flatten_dict(params)


def _check(params: Params, adapters: Params) -> None:
    known, beside, problems = _find_kernels(params), _flatten(adapters), []
    for (*above, name), down in beside.items():
        if name == DOWN:
            path, shape = "/".join(map(str, above)), (*down.shape[:-1], beside[*above, UP].shape[-1])
            if path not in known:
                problems.append(f"{path} is no layer of the network")
            elif shape != known[path][1].shape:
                problems.append(f"{path} has the kernel {known[path][1].shape}, its adapters are for {shape}")
    if problems:
        raise ValueError("LoRA: " + "; ".join(problems))
