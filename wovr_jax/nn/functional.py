"""From an nnx module to a pure function of a plain nested dict of arrays, and back.

Networks are authored in ``flax.nnx``; everywhere else travel plain parameter dicts. This
file is the only door between the two.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from wovr_jax.core import sharding
from wovr_jax.types import Params


class Pure:
    """A network without its weights.

    ``Pure(build)`` traces ``build(rngs) -> nnx.Module`` abstractly (nothing is allocated).
    ``pure.init(key)`` gives the parameters, a nested dict of arrays; ``pure(params, *args)``
    calls the module; ``pure(params, *args, method="encode")`` calls a method by its name.
    Every nnx variable is in the dict, batch statistics included; ``pure.mutate`` also
    returns the dict as the call left it.
    """

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module]):
        self._build = build
        abstract = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
        self._graph, self._state = nnx.split(abstract)

    def init(self, key: jax.Array) -> Params:
        """Returns fresh parameters from a PRNG key. Every call traces and compiles: keep what it returns."""

        # In one compiled program: run one by one, the draws of a large network would each be compiled and dispatched.
        @jax.jit
        def init(key: jax.Array) -> Params:
            return nnx.to_pure_dict(nnx.state(self._build(nnx.Rngs(key))))

        return init(key)

    def shapes(self) -> Params:
        """Returns the parameters as ``jax.ShapeDtypeStruct`` leaves."""
        return nnx.to_pure_dict(self._state)

    def module(self, params: Params) -> nnx.Module:
        """Returns the live module that holds ``params``."""
        # A copy of the tree, since the next line writes into it: one Pure serves many programs at once.
        state = jax.tree.map(lambda leaf: leaf, self._state)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self._graph, state)

    def __call__(self, params: Params, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        """Calls the module, or the ``method`` of it, with ``params`` as its variables."""
        return getattr(self.module(params), method)(*args, **kwargs)

    def mutate(self, params: Params, *args: Any, method: str = "__call__", **kwargs: Any) -> tuple[Any, Params]:
        """Returns ``(output, params)`` of a call, with the variables as the call left them."""
        module = self.module(params)
        output = getattr(module, method)(*args, **kwargs)
        return output, nnx.to_pure_dict(nnx.state(module))


def narrow(params: Params, dtype: str, islands: Sequence[str] = ("*norm*",)) -> Params:
    """Returns parameters in the dtype that their network computes in: it gives the same bits, from fewer bytes.

    Args:
      params: nested dict of arrays.
      dtype: to which the network rounds them at each use.
      islands: patterns of the paths, joined by "/", of parameters that it uses as they are.
    """

    def cast(path: tuple[Any, ...], leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf if any(fnmatch.fnmatchcase(name, island) for island in islands) else leaf.astype(jnp.dtype(dtype))

    return jax.tree_util.tree_map_with_path(cast, params)


def stack(build: Callable[[nnx.Rngs], nnx.Module], length: int, rngs: nnx.Rngs) -> nnx.Module:
    """Returns ``length`` equal blocks as one module whose variables have a leading layer axis."""

    # Each layer draws from its own key, and the compiler sees one block however deep the network is.
    @nnx.split_rngs(splits=length)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs: nnx.Rngs) -> nnx.Module:
        return build(rngs)

    return make(rngs)


def scan_blocks(blocks: nnx.Module, carry: jax.Array, *args: Any, layered: tuple = (), remat: bool = True) -> jax.Array:
    """Runs ``carry = block(carry, *slices, *args)`` over the layer axis of a stacked module.

    ``args`` are the same for every layer; ``slices`` are the layer's part of ``layered``, whose
    arrays have a leading layer axis. With ``remat`` the backward pass recomputes each block
    from its input.
    """
    graph, state = nnx.split(blocks)

    @jax.named_scope(type(blocks).__name__)  # so that a profile shows which network a block belongs to
    def run(carry: jax.Array, layer: tuple, args: tuple) -> jax.Array:
        # The layout is stated anew after every block, or the partitioner may gather the stream of activations whole.
        return sharding.batch(nnx.merge(graph, layer[0])(carry, *layer[1], *args), even=False)

    def scan(carry: jax.Array, layers: tuple, args: tuple) -> jax.Array:
        # Remat inside the scan keeps one carry a layer for the backward pass, and nothing from within the blocks.
        step = jax.checkpoint(run) if remat else run
        return jax.lax.scan(lambda carry, layer: (step(carry, layer, args), None), carry, layers)[0]

    def scan_narrow(carry: jax.Array, layers: tuple, args: tuple) -> jax.Array:
        # XLA:CPU multiplies in float32 and moves the wider copy of weights that no pass of the loop changes out of it:
        # of all layers at once, twice their own memory. The barrier makes them look as if each pass changed them.
        def body(index: jax.Array, carry: jax.Array) -> jax.Array:
            carry, held = jax.lax.optimization_barrier((carry, layers))
            layer = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), held)
            return run(carry, layer, args)

        return jax.lax.fori_loop(0, len(jax.tree.leaves(layers)[0]), body, carry)

    @jax.custom_vjp
    def forward(carry: jax.Array, layers: tuple, args: tuple) -> jax.Array:
        return jax.lax.platform_dependent(carry, layers, args, cpu=scan_narrow, default=scan)

    # A gradient would add up whole stacks, a layer at a time: where one is asked for, the plain scan runs.
    forward.defvjp(lambda *operands: jax.vjp(scan, *operands), lambda pull, gradient: pull(gradient))
    is_narrow = any(leaf.dtype.itemsize < 4 for leaf in jax.tree.leaves(state))
    return (forward if is_narrow else scan)(sharding.batch(carry, even=False), (state, layered), args)
