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
import typing
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from wovr_jax.core.config import Count, Faults, Positive, checked
from wovr_jax.types import Array, Params

Init = Literal["gaussian", "kaiming"]
INITS = typing.get_args(Init)
DOWN, UP = "lora_a", "lora_b"
Keys = tuple[Any, ...]
"""The way to a node in a parameter dict: names, and numbers in a list of modules."""


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


def candidates(params: Params) -> dict[str, tuple[int, ...]]:
    """Returns the layers that can be adapted: path -> shape of the kernel, one of those above."""
    return {_path(keys): layer["kernel"].shape for keys, layer in _layers(params)}


def targets(params: Params, cfg: LoRAConfig) -> list[str]:
    """Returns the paths of the layers that ``cfg.targets`` name, in the order of ``params``.

    Raises:
      ValueError: for patterns that match no layer; the message lists the layers there are.
    """
    known = candidates(params)
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
    adapters: Params = {}
    wanted = set(targets(params, cfg))
    # The key is folded by the place among all candidates: a layer draws the same whichever others are adapted.
    for place, (keys, layer) in enumerate(sorted(_layers(params), key=lambda pair: _path(pair[0]))):
        if _path(keys) not in wanted:
            continue
        down, up = shapes(layer["kernel"].shape, cfg.rank)
        node = adapters
        for name in keys:
            node = node.setdefault(name, {})
        # One of the two is zero, so the product is; not both, or neither would have a gradient.
        node |= {DOWN: _draw(jax.random.fold_in(key, place), down, cfg), UP: jnp.zeros(up, jnp.float32)}
    return adapters


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

    The product and the sum are float32, whatever the dtype of the kernel, and rounded to it once.

    Raises:
      ValueError: when an adapter has no layer, or not its shape.
    """
    _check(params, adapters)

    def fold(node: Params, beside: Params) -> Params:
        if DOWN not in beside:
            return node | {name: fold(node[name], below) for name, below in beside.items()}
        kernel = node["kernel"]
        # (..., in, rank) @ (..., rank, out) -> (..., in, out); before them the layers, or a convolution's window.
        product = jnp.matmul(beside[DOWN], beside[UP], precision="highest", preferred_element_type=jnp.float32)
        # In bfloat16 a small product would vanish in the sum: half of a kernel's last place is often more than it.
        return node | {"kernel": (kernel.astype(jnp.float32) + cfg.scale * product).astype(kernel.dtype)}

    return fold(params, adapters)


def join(params: Params, adapters: Params) -> Params:
    """Returns the parameters of the network that ``adapt`` made: each adapter beside the kernel it belongs to.

    Raises:
      ValueError: as ``merge``.
    """
    _check(params, adapters)

    def lay(node: Params, beside: Params) -> Params:
        return node | {name: lay(node[name], x) if isinstance(x, dict) else x for name, x in beside.items()}

    return lay(params, adapters)


def separate(joined: Params) -> tuple[Params, Params]:
    """Undoes :func:`join`: returns the plain network's parameters, and the adapters."""
    plain: Params = {}
    adapters: Params = {}
    for name, node in joined.items():
        if not isinstance(node, dict):
            (adapters if name in (DOWN, UP) else plain)[name] = node
            continue
        plain[name], below = separate(node)
        if below:  # layers without adapters leave no empty dict, so that the result equals what ``init`` made
            adapters[name] = below
    return plain, adapters


def mask(joined: Params) -> Params:
    """Returns True for every leaf of an adapter and False for the network's: what is trained of ``join``'s result."""
    return {name: mask(node) if isinstance(node, dict) else name in (DOWN, UP) for name, node in joined.items()}


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
        if name.isdigit():
            holder[int(name)] = _wrap(layer, path, cfg)
        else:
            setattr(holder, name, _wrap(layer, path, cfg))
    return module


def _wrap(layer: Any, path: str, cfg: LoRAConfig) -> nnx.Module:
    if isinstance(layer, nnx.Linear):
        return AdaptedLinear(layer, cfg)
    if isinstance(layer, nnx.Conv):
        return AdaptedConv(layer, cfg)
    raise ValueError(f"LoRA: {path} is a {type(layer).__name__}; only nnx.Linear and nnx.Conv take adapters")


class AdaptedLinear(nnx.Module):
    """A linear layer, and beside it two thin ones: x W + bias + scale (x a) b, in the layer's compute dtype."""

    def __init__(self, layer: nnx.Linear, cfg: LoRAConfig):
        # The same variables under the same names: parameters of the plain network fit as they are.
        self.kernel, self.bias = layer.kernel, layer.bias
        _set_zeros(self, layer, cfg)
        self.scale, self.dtype = cfg.scale, layer.dtype

    def __call__(self, x: Array) -> Array:
        x = x if self.dtype is None else x.astype(self.dtype)
        # (x a) b and not x (a b): two thin products, and the gradient never has the shape of the kernel.
        thin = (x @ getattr(self, DOWN)[...].astype(x.dtype)) @ getattr(self, UP)[...].astype(x.dtype)
        y = x @ self.kernel[...].astype(x.dtype) + self.scale * thin
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class AdaptedConv(nnx.Module):
    """A convolution with the product of its adapters added to the kernel, which for a patch embedding is small."""

    def __init__(self, layer: nnx.Conv, cfg: LoRAConfig):
        if layer.feature_group_count != 1 or layer.kernel_dilation != 1 or layer.input_dilation != 1:
            raise ValueError("LoRA: expected a convolution without groups and dilation")
        self.kernel, self.bias = layer.kernel, layer.bias
        _set_zeros(self, layer, cfg)
        self.scale, self.dtype = cfg.scale, layer.dtype
        self.strides: Any = layer.strides
        self.padding: Any = layer.padding

    def __call__(self, x: Array) -> Array:
        x = x if self.dtype is None else x.astype(self.dtype)
        # (h, w, in, rank) @ (1, 1, rank, out) -> (h, w, in, out)
        product = jnp.matmul(getattr(self, DOWN)[...], getattr(self, UP)[...], precision="highest")
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
    down, up = getattr(layer, DOWN)[...], getattr(layer, UP)[:, first : first + count]
    return y + layer.scale * ((x @ down.astype(x.dtype)) @ up.astype(x.dtype))


def _set_zeros(adapted: nnx.Module, layer: nnx.Linear | nnx.Conv, cfg: LoRAConfig) -> None:
    """Gives a wrapped layer adapters that change nothing; the real ones come with the parameters of a call."""
    for name, shape in zip((DOWN, UP), shapes(layer.kernel.shape, cfg.rank), strict=True):
        setattr(adapted, name, nnx.Param(jnp.zeros(shape, jnp.float32)))


def _layers(params: Params, above: Keys = ()) -> Iterator[tuple[Keys, Params]]:
    """Yields keys and leaves of every layer with a kernel that can be adapted."""
    for name, node in params.items():
        if isinstance(node, dict):
            # (in, out), (layers, in, out), (height, width, in, out); a causal convolution over time has five axes.
            if getattr(node.get("kernel"), "ndim", 0) in (2, 3, 4):
                yield (*above, name), node
            yield from _layers(node, (*above, name))


def _adapters(adapters: Params, above: Keys = ()) -> Iterator[tuple[Keys, Params]]:
    for name, node in adapters.items():
        if DOWN in node:
            yield (*above, name), node
        else:
            yield from _adapters(node, (*above, name))


def _check(params: Params, adapters: Params) -> None:
    known, problems = candidates(params), []
    for keys, pair in _adapters(adapters):
        path, shape = _path(keys), (*pair[DOWN].shape[:-1], pair[UP].shape[-1])
        if path not in known:
            problems.append(f"{path} is no layer of the network")
        elif shape != known[path]:
            problems.append(f"{path} has the kernel {known[path]}, its adapters are for {shape}")
    if problems:
        raise ValueError("LoRA: " + "; ".join(problems))


def _path(keys: Keys) -> str:
    return "/".join(map(str, keys))
