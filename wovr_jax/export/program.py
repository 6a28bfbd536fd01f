"""The policy as one program: pixels of the camera in, environment actions out.

Weights and statistics are arguments, so the program is small and a bundle's files are each what they say.
Image processing, network, sampling and action codec are inside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import export as jax_export

from wovr_jax.export.robot import BundleError, Program, Robot
from wovr_jax.export.source import Policy
from wovr_jax.policy import actions, processing, vla
from wovr_jax.policy.actions import Codec
from wovr_jax.policy.processing import Processing
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.types import Array
from wovr_jax.weights import native

PLATFORMS = ("cpu", "cuda", "tpu")


def make(cfg: VLAConfig, image: Processing, gripper: int) -> Program:
    """``program(weights, statistics, frame_BHWC, prompt_BL, seed_B, temperature) -> {action, token, logp}``.

    Args of the program:
      weights: dotted path -> leaf.
      statistics: ``q01``, ``q99`` (A,) float32 and ``mask`` (A,) bool.
      frame_BHWC: uint8 camera frames.
      prompt_BL: int32 prompt tokens.
      seed_B: uint32; a row's tokens depend on its own seed only.
      temperature: float32; 0 takes the likeliest tokens, and logp is then of temperature 1.

    Args:
      cfg: the network.
      image: what is done to a camera frame before the network.
      gripper: index of the gripper dimension, -1 for none.

    Raises:
      BundleError: a policy of several pictures or with the robot's state.
    """
    if cfg.images != 1 or cfg.proprio:
        raise BundleError(
            f"this policy takes {cfg.images} pictures and {cfg.proprio} numbers of the robot's state; bundle and "
            "server are for one picture and no state. Export it to torch instead."
        )
    net = vla.network(cfg)

    def program(
        weights: Mapping[str, Array],
        statistics: Mapping[str, Array],
        frame_BHWC: Array,
        prompt_BL: Array,
        seed_B: Array,
        temperature: Array,
    ) -> dict[str, Array]:
        params = native.unflatten({name.replace(".", "/"): leaf for name, leaf in weights.items()})
        logits = net(params, processing.frames(image, frame_BHWC), prompt_BL)
        warm = temperature > 0.0
        scale: Any = jnp.where(warm, temperature, 1.0)
        drawn = actions.sample(logits, jax.vmap(jax.random.key)(seed_B), scale)
        token = jnp.where(warm, drawn, actions.greedy(logits))
        codec: Any = Codec(statistics["q01"], statistics["q99"], statistics["mask"], gripper)  # type: ignore[arg-type]
        return {"action": codec.decode(token), "token": token, "logp": actions.log_prob(logits, token, scale)}

    return program


def serialise(
    program: Program,
    weights: Mapping[str, Any],
    *,
    frame: tuple[int, int, int],
    length: int,
    dim: int,
    platforms: tuple[str, ...] = PLATFORMS,
) -> bytes:
    """The program for any batch size as bytes of jax.export, lowered for every platform without having it.

    Args:
      program: from :func:`make`.
      weights: dotted path -> anything with shape and dtype.
      frame: (H, W, 3) of the camera.
      length: prompt tokens L.
      dim: action dimensions A.
      platforms: to lower for.
    """
    (batch,) = jax_export.symbolic_shape("batch")
    of = jax.ShapeDtypeStruct
    leaves = {name: of(leaf.shape, leaf.dtype) for name, leaf in weights.items()}
    statistics = {"q01": of((dim,), jnp.float32), "q99": of((dim,), jnp.float32), "mask": of((dim,), jnp.bool_)}
    observed = of((batch, *frame), jnp.uint8), of((batch, length), jnp.int32), of((batch,), jnp.uint32)
    with _file_names_only():
        exported = jax_export.export(jax.jit(program), platforms=platforms)(
            leaves, statistics, *observed, of((), jnp.float32)
        )
    return bytes(exported.serialize())


@contextlib.contextmanager
def _file_names_only() -> Iterator[None]:
    """What is lowered here refers to source files by their names, not by folders of this machine."""
    setting = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, setting)
    jax.config.update(setting, ".*/")
    try:
        yield
    finally:
        jax.config.update(setting, before)


def live(policy: Policy) -> Robot:
    """A policy that acts without a bundle, from its run folder or imported weights."""
    program = make(policy.cfg, policy.image, policy.codec.gripper)
    return Robot(program, policy.weights(), policy.statistics, policy.recipe(), {"policy": policy.name})
