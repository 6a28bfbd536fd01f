"""Weights as they are held where nothing trains them: fewer bytes, and not one bit of what a network says is another.

Bits would be equal by chance on a small network, so the programs are read as well: a parameter that is held narrow has
to be rounded to that dtype wherever it is used, and one that is held in float32 has to be used as it is somewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from wovr_jax.policy import vla
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.world import model
from wovr_jax.world.model import WorldConfig

MOVES = ("reshape", "transpose", "squeeze", "slice", "dynamic_slice", "gather", "broadcast_in_dim", "copy")
"""What only takes a part of an array or lays it out anew."""
AS_IT_IS = "as it is"


def inner(equation: Any) -> Iterator[tuple[Jaxpr, int]]:
    """The programs inside of an equation, and the place of the equation's first operand among theirs."""
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else [value]:
            program = part.jaxpr if isinstance(part, ClosedJaxpr) else part
            if isinstance(program, Jaxpr):
                yield program, len(program.invars) - len(equation.invars)


def uses(program: Jaxpr, variable: Any) -> set[str]:
    """What becomes of a variable: the dtypes that it is cast to, and ``AS_IT_IS`` where it is used so."""
    found = {AS_IT_IS} if any(out is variable for out in program.outvars) else set()
    for equation in program.eqns:
        for place in [k for k, operand in enumerate(equation.invars) if operand is variable]:
            name, programs = equation.primitive.name, list(inner(equation))
            if name == "convert_element_type":
                found.add(str(equation.params["new_dtype"]))
            elif name in MOVES and not place:
                found |= uses(program, equation.outvars[0])
            elif programs:
                for within, shift in programs:
                    found |= uses(within, within.invars[place + shift])
            else:
                found.add(AS_IT_IS)
    return found


def check(call: Any, plain: Any, held: Any, *inputs: Any) -> None:
    """``plain`` and ``held`` are the shapes of the same parameters before and after."""
    program = jax.make_jaxpr(call)(plain, *inputs).jaxpr
    leaves = jax.tree_util.tree_flatten_with_path(plain)[0]
    for (path, _), leaf, variable in zip(leaves, jax.tree.leaves(held), program.invars, strict=False):
        found, name = uses(program, variable), jax.tree_util.keystr(path, simple=True, separator="/")
        if leaf.dtype == jnp.float32:
            assert AS_IT_IS in found or not found, f"{name} is held in float32, and only ever cast: {found}"
        else:
            assert found <= {str(leaf.dtype)}, f"{name} is held in {leaf.dtype}, and used as {found}"


def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def half_world(**dit: Any) -> WorldConfig:
    cfg = WorldConfig.fake()
    return dataclasses.replace(
        cfg,
        dit=dataclasses.replace(cfg.dit, dtype="bfloat16", **dit),
        vae=dataclasses.replace(cfg.vae, dtype="bfloat16"),
    )


def half_policy() -> VLAConfig:
    cfg, half = VLAConfig.fake(), {"dtype": "bfloat16"}
    parts = {name: dataclasses.replace(getattr(cfg, name), **half) for name in ("dino", "siglip", "llm")}
    return dataclasses.replace(cfg, **parts)


def lively(shapes: Any) -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32), shapes)


def world_shapes(cfg: WorldConfig) -> Any:
    return dict(zip(("dit", "vae"), (net.shapes() for net in model.networks(cfg)), strict=True))


@pytest.mark.parametrize("residual", ["bfloat16", "float32"])
def test_the_transformer_rounds_what_is_held_narrow(residual: str) -> None:
    cfg = half_world(residual_dtype=residual)
    net, plain = model.networks(cfg)[0], world_shapes(cfg)
    held = jax.eval_shape(lambda params: model.for_use(cfg, params), plain)
    inputs = shape(1, 2, 4, 4, cfg.dit.channels), shape(1, 2), shape(1, 5, 7)
    check(lambda params, *args: net(params, *args), plain["dit"], held["dit"], *inputs)


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_the_vae_rounds_what_is_held_narrow(method: str) -> None:
    cfg = half_world()
    net, plain = model.networks(cfg)[1], world_shapes(cfg)
    held = jax.eval_shape(lambda params: model.for_use(cfg, params), plain)
    x = shape(1, 5, 16, 16, 3) if method == "encode" else shape(1, 2, 4, 4, cfg.vae.z_dim)
    check(lambda params, x: net(params, x, method=method), plain["vae"], held["vae"], x)


def test_the_policy_rounds_what_is_held_narrow() -> None:
    cfg = half_policy()
    net, side = vla.network(cfg), cfg.dino.image
    held = jax.eval_shape(vla.for_use(cfg), net.shapes())
    inputs = shape(1, side, side, 3), shape(1, 6, dtype=jnp.int32)
    check(lambda params, *args: net(params, *args), net.shapes(), held, *inputs)


def test_frames_and_logits_keep_every_bit() -> None:
    cfg = half_world()
    params = lively(world_shapes(cfg))
    state = model.WorldState(*lively((shape(2, 16, 16, 3), shape(2, cfg.slots, 16, 16, 3), shape(2, cfg.slots, 7))))
    action, keys = lively(shape(2, cfg.chunk, 7)), jax.random.split(jax.random.key(0), 2)
    chunk = jax.jit(lambda params: model.chunk(cfg, params, state, action, keys))
    np.testing.assert_array_equal(chunk(params), chunk(model.for_use(cfg, params)))

    policy = half_policy()
    net, side = vla.network(policy), policy.dino.image
    weights, frame, prompt = lively(net.shapes()), lively(shape(2, side, side, 3)), jnp.ones((2, 6), jnp.int32)
    logits = jax.jit(lambda params: net(params, frame, prompt))
    np.testing.assert_array_equal(logits(weights), logits(vla.for_use(policy)(weights)))


def test_most_bytes_are_halved_and_float32_networks_stay_as_they_are() -> None:
    def count(tree: Any) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    cfg = WorldConfig.wan()
    plain = world_shapes(cfg)
    held = jax.eval_shape(lambda params: model.for_use(cfg, params), plain)
    assert count(held) < 0.52 * count(plain), "of the full-size world model"
    policy = VLAConfig.openvla_7b()
    shapes = vla.network(policy).shapes()
    assert count(jax.eval_shape(vla.for_use(policy), shapes)) < 0.501 * count(shapes), "of the full-size policy"
    fake = WorldConfig.fake()
    params = lively(world_shapes(fake))
    jax.tree.map(np.testing.assert_array_equal, model.for_use(fake, params), params)
