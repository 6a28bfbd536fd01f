"""Makes the policy one program: pixels of the camera go in, environment actions come out.

Weights and statistics are arguments, so the program is small and each of a bundle's files is what its name says.
Image processing, network, sampling and action codec are inside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct
from jax import export as jax_export

from wovr_jax.core.pixels import read_state, split_views, to_float
from wovr_jax.export.robot import Program, Robot
from wovr_jax.export.source import Policy
from wovr_jax.policy import actions, processing, vla
from wovr_jax.policy.actions import Codec
from wovr_jax.policy.processing import Processing
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.types import Array
from wovr_jax.weights import native

PLATFORMS = ("cpu", "cuda", "tpu")
"""What a bundle's program is lowered for."""


def make(cfg: VLAConfig, image: Processing, gripper: int) -> Program:
    """Returns ``program(weights, statistics, frame_BHWC, prompt_BL, seed_B, temperature) -> {action, token, logp}``.

    The program's arguments:
      weights: dotted path -> leaf.
      statistics: ``q01``, ``q99`` (A,) float32 and ``mask`` (A,) bool.
      frame_BHWC: uint8 camera frames, or mosaics of several (``core.pixels``).
      prompt_BL: int32 prompt tokens.
      seed_B: uint32; a row's tokens depend on its own seed only.
      temperature: float32; 0 takes the likeliest tokens, and logp is then of temperature 1.

    Its results are (B, T, A): float32 environment actions, int32 tokens, and float32 log-probabilities of the tokens.

    Args:
      cfg: the network.
      image: what is done to a camera frame before the network.
      gripper: index of the gripper dimension, -1 for none.
    """
    # A network of plain functions: the parameters come in with each call.
    net = vla.network(cfg)

    def program(
        weights: Mapping[str, Array],
        statistics: Mapping[str, Array],
        frame_BHWC: Array,
        prompt_BL: Array,
        seed_B: Array,
        temperature: Array,
    ) -> dict[str, Array]:
        # Flat names keep the program's signature a plain dictionary, which needs no class of this package to be called.
        params = native.unflatten({name.replace(".", "/"): leaf for name, leaf in weights.items()})
        seen, state_BR = look(cfg, image, frame_BHWC)
        logits = net(params, seen, prompt_BL, state_BR)
        # The temperature is an argument, so both branches are computed and one is chosen: one program does for all
        # temperatures, and greedy decoding does not divide by zero.
        sampling = temperature > 0.0
        scale: Any = jnp.where(sampling, temperature, 1.0)
        sampled = actions.sample(logits, jax.vmap(jax.random.key)(seed_B), scale)
        token = jnp.where(sampling, sampled, actions.greedy(logits))
        codec: Any = Codec(statistics["q01"], statistics["q99"], statistics["mask"], gripper)  # type: ignore[arg-type]
        return {"action": codec.decode(token), "token": token, "logp": actions.log_prob(logits, token, scale)}

    return program


def look(cfg: VLAConfig, image: Processing, frame_BHWC: Array) -> tuple[Array, Array | None]:
    """Returns what the network takes of uint8 frames: processed pictures, (B, V, H, W, 3) of several, and the state."""
    if cfg.images == 1 and not cfg.proprio:
        return processing.frames(image, frame_BHWC), None
    view_BVHWC = processing.frames(image, split_views(frame_BHWC, cfg.images))
    state_BR = read_state(to_float(frame_BHWC), cfg.images, cfg.proprio) if cfg.proprio else None
    return view_BVHWC if cfg.images > 1 else view_BVHWC[:, 0], state_BR


def serialise(
    program: Program,
    weights: Mapping[str, Any],
    *,
    frame: tuple[int, int, int],
    length: int,
    dim: int,
    platforms: tuple[str, ...] = PLATFORMS,
) -> bytes:
    """Returns the program for any batch size as bytes of jax.export, lowered for platforms that need not be here.

    Args:
      program: from :func:`make`.
      weights: dotted path -> anything with shape and dtype.
      frame: (H, W, 3), the shape of the camera's frames.
      length: prompt tokens, L.
      dim: action dimensions, A.
      platforms: the platforms to lower for.
    """
    # A symbolic batch: a robot asks for one frame, an evaluation for as many as it has environments.
    (batch,) = jax_export.symbolic_shape("batch")
    leaves = {name: ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in weights.items()}
    quantile = ShapeDtypeStruct((dim,), jnp.float32)
    arguments = (
        leaves,
        {"q01": quantile, "q99": quantile, "mask": ShapeDtypeStruct((dim,), jnp.bool_)},
        ShapeDtypeStruct((batch, *frame), jnp.uint8),
        ShapeDtypeStruct((batch, length), jnp.int32),
        ShapeDtypeStruct((batch,), jnp.uint32),
        ShapeDtypeStruct((), jnp.float32),
    )
    with _file_names_only():
        exported = jax_export.export(jax.jit(program), platforms=platforms)(*arguments)
    return bytes(exported.serialize())


@contextlib.contextmanager
def _file_names_only() -> Iterator[None]:
    """Makes what is lowered inside refer to source files by their names alone."""
    # A bundle goes to other people; the folders of this machine, with a user's name in them, are none of its content.
    setting = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, setting)
    jax.config.update(setting, ".*/")
    try:
        yield
    finally:
        jax.config.update(setting, before)


def make_robot(policy: Policy) -> Robot:
    """Returns a robot that acts without a bundle, from a run folder or imported weights."""
    program = make(policy.cfg, policy.image, policy.codec.gripper)
    return Robot(program, policy.weights(), policy.statistics, policy.recipe(), {"policy": policy.name})
