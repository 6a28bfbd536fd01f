"""The world model as a simulator: a start state and eight actions in, eight frames out.

A window of 13 frames is 1 anchor (the first frame of the episode), 4 memory frames and 8
new ones; the VAE makes 4 latent frames of it: anchor, memory, future, future. A chunk
encodes the first five frames, samples the two future latents with a few Euler steps of the
transformer and decodes. The frames it gives become the memory of the next chunk.

Named departures from the reference environment (RLinf:rlinf/envs/world_model/
world_model_wan_env.py), each with a switch back:

* frames stay float between chunks; it cuts them to 8 bits (``eight_bit="floor"``; its
  second cut of the same frame, on the way to memory, is not reproduced);
* noise differs between chunks; it uses the same in each (``noise="fixed"``).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from wovr_jax.core import pixels
from wovr_jax.core.config import Count, Faults, Natural, checked
from wovr_jax.nn.functional import Pure, narrow
from wovr_jax.types import NULL_ACTION, Array, Params, Start, World
from wovr_jax.world import dit, flow
from wovr_jax.world.dit import DiT, DiTConfig
from wovr_jax.world.flow import FlowConfig
from wovr_jax.world.vae.net import VAE, VAEConfig

AXES = (*((f"dit/{pattern}", names) for pattern, names in dit.AXES), ("vae/*", ()))
"""What the axes of the parameters mean (``sharding``). The VAE, 1.4 GB in bfloat16, sits whole on every device."""
STATE_SCALE = 2.0
"""Of a state in [-1, 1] among latents of deviation 1: what is small among them drowns in the noise of sampling."""


@checked
@dataclasses.dataclass(frozen=True)
class WorldConfig:
    """Everything about the world model.

    Attributes:
      dit, vae, flow: its parts.
      chunk: new frames T of a window.
      memory: how many of the last frames are remembered, at most ``slots``. With fewer, the
        remaining (older) memory slots repeat the oldest remembered one under the null action.
      anchor: whether slot 0 holds the first frame of the episode. Without, it holds the oldest
        remembered frame.
      noisy_context: whether training puts noise on the memory latent.
      eight_bit: rounding of generated frames to 256 levels, "none", "round" or "floor".
      noise: "folded": fresh for every trajectory and chunk, from its own key. "fixed": the
        same in every chunk, by row of the batch.
      views, state: what a frame shows, if it is a mosaic (``core.pixels``): V square views, and R numbers of the
        robot's state, which the model then imagines together, as further latents beside those of the first view.
      vae_rows: trajectories of a rollout that the VAE takes at once, 0 for all; its activations are most of the memory.
        Best a multiple of the devices along data and fsdp: pieces that these do not divide are gathered.
    """

    dit: DiTConfig = dataclasses.field(default_factory=DiTConfig)
    vae: VAEConfig = dataclasses.field(default_factory=VAEConfig)
    flow: FlowConfig = dataclasses.field(default_factory=FlowConfig)
    chunk: Count = 8
    memory: Count = 4
    anchor: bool = True
    noisy_context: bool = True
    eight_bit: Literal["none", "round", "floor"] = "none"
    noise: Literal["folded", "fixed"] = "folded"
    views: Count = 1
    state: Natural = 0
    vae_rows: Natural = 0

    def faults(self) -> Faults:
        """Yields what the parts of a world model have to share and do not."""
        if self.dit.channels != self.vae.z_dim:
            yield "dit.channels", f"expected the VAE's z_dim, {self.vae.z_dim}, got {self.dit.channels}"
        if self.dit.frames_per_latent != self.vae.time:
            yield "dit.frames_per_latent", f"expected the VAE's, {self.vae.time}, got {self.dit.frames_per_latent}"
        if self.chunk % self.vae.time:
            yield "chunk", f"expected a multiple of a latent's {self.vae.time} frames, got {self.chunk}"
        if self.memory > self.slots:
            yield "memory", f"expected at most the {self.slots} slots of a window, got {self.memory}"

    @property
    def slots(self) -> int:
        """Memory slots M of a window: the frames of one latent."""
        return self.vae.time

    @property
    def frames(self) -> int:
        """Frames F of a window."""
        return 1 + self.slots + self.chunk

    @property
    def context_latents(self) -> int:
        """Latent frames that are given: anchor and memory."""
        return self.vae.latent_frames(1 + self.slots)

    @property
    def latents(self) -> int:
        """Latent frames f of a window."""
        return self.vae.latent_frames(self.frames)

    @classmethod
    def wan(cls, **changes) -> WorldConfig:
        """Wan2.2-TI2V-5B with actions, numerics of the paper."""
        parts = {"dit": DiTConfig.ti2v_5b(), "vae": dataclasses.replace(VAEConfig.wan2_2(), dtype="bfloat16")}
        return cls(**parts | changes)

    @classmethod
    def tabletop(cls, **changes) -> WorldConfig:
        """The embedded run: 32 x 32 frames."""
        return cls(**{"dit": DiTConfig.tabletop(), "vae": VAEConfig.tabletop()} | changes)

    @classmethod
    def libero_small(cls, **changes) -> WorldConfig:
        """A run on LIBERO from nothing: 64 x 64 frames."""
        return cls(**{"dit": DiTConfig.libero_small(), "vae": VAEConfig.libero_small()} | changes)

    @classmethod
    def fake(cls, **changes) -> WorldConfig:
        """For tests: 16 x 16 frames are enough."""
        return cls(**{"dit": DiTConfig.fake(), "vae": VAEConfig.fake(), "flow": FlowConfig(steps=2)} | changes)


@struct.dataclass
class WorldState:
    """What a trajectory carries from chunk to chunk.

    Attributes:
      anchor_BHWC: first frame of the episode.
      memory_BMHWC: the last M frames.
      action_BMA: the actions that produced them.
    """

    anchor_BHWC: Array
    memory_BMHWC: Array
    action_BMA: Array


@functools.cache
def networks(cfg: WorldConfig) -> tuple[Pure, Pure]:
    """Returns the transformer and the VAE, without weights."""
    # Cached: a program is compiled for these very objects, and new ones would compile it anew.
    mosaic = cfg.views > 1 or cfg.state
    vae = Pure(lambda rngs: MosaicVAE(cfg, rngs=rngs) if mosaic else VAE(cfg.vae, rngs=rngs))
    return Pure(lambda rngs: DiT(cfg.dit, rngs=rngs)), vae


class MosaicVAE(VAE):
    """The VAE before mosaics (``core.pixels``), with the same weights.

    Each view is encoded and decoded by itself, as the network has learned to, and their latents stand side by side. The
    robot's state is no picture: beside the views its numbers, times ``STATE_SCALE``, fill latent columns of their own,
    exactly, each as often as there is room (as Cosmos Policy does it, arXiv 2601.16163).
    """

    def __init__(self, cfg: WorldConfig, *, rngs: nnx.Rngs):
        super().__init__(cfg.vae, rngs=rngs)
        self.views, self.state = cfg.views, cfg.state

    def encode(self, frame_BFHWC: Array) -> Array:
        """Encodes (B, 1 + 4n, H, V * H + strip, 3) to (B, 1 + n, h, V * h + columns, c), float32."""
        view_BVFHHC = pixels.split_views(frame_BFHWC, self.views).swapaxes(1, 2)
        # (B, V, F, H, H, 3) -> (B * V, F, H, H, 3) -> (B, V, f, h, h, c)
        latent = super().encode(view_BVFHHC.reshape(-1, *view_BVFHHC.shape[2:]))
        latent = latent.reshape(*view_BVFHHC.shape[:2], *latent.shape[1:])
        latents = [latent[:, v] for v in range(self.views)]
        if self.state:
            B, f, h, _, c = latents[0].shape
            columns = frame_BFHWC.shape[3] // self.cfg.space - self.views * h
            state_BFR = STATE_SCALE * pixels.read_state(frame_BFHWC, self.views, self.state)
            # The first latent frame is of one frame, every other one of ``time`` of them.
            state_BFR = jnp.concatenate([jnp.repeat(state_BFR[:, :1], self.cfg.time - 1, axis=1), state_BFR], axis=1)
            column = state_BFR.reshape(B, f, -1)[..., self._slots(h * columns * c)]
            latents.append(column.reshape(B, f, h, columns, c))
        return jnp.concatenate(latents, axis=3)

    def decode(self, latent_Bfhwc: Array) -> Array:
        """Decodes what :meth:`encode` gives; a number of the state is the mean over its copies."""
        B, f, h, w, c = latent_Bfhwc.shape
        # (B, f, h, V * h, c) -> (B * V, f, h, h, c) -> (B, V, F, H, H, 3)
        view_BVfhhc = jnp.moveaxis(latent_Bfhwc[:, :, :, : self.views * h].reshape(B, f, h, self.views, h, c), 3, 1)
        frame = super().decode(view_BVfhhc.reshape(-1, f, h, h, c))
        frame_BVFHHC = frame.reshape(B, self.views, *frame.shape[1:])
        views, columns = [frame_BVFHHC[:, v] for v in range(self.views)], w - self.views * h
        if not self.state:
            return pixels.make_mosaic(views)
        slot_S, copies_BfS = self._slots(h * columns * c), latent_Bfhwc[:, :, :, self.views * h :].reshape(B, f, -1)
        total = jnp.zeros((B, f, self.cfg.time * self.state)).at[..., slot_S].add(copies_BfS)
        state_BFR = (total / np.bincount(slot_S)).reshape(B, f * self.cfg.time, self.state)
        # The first latent frame holds its only frame ``time`` times.
        return pixels.make_mosaic(views, state_BFR[:, self.cfg.time - 1 :] / STATE_SCALE, columns * self.cfg.space)

    def _slots(self, room: int) -> np.ndarray:
        """Returns which of a latent frame's numbers, ``time`` states of them, each of ``room`` latent ones holds."""
        if room < (numbers := self.cfg.time * self.state):
            raise ValueError(f"VAE: a state of {self.state} numbers needs {numbers} latent ones, the strip has {room}")
        return np.arange(room) % numbers


def for_use(cfg: WorldConfig, params: Params) -> Params:
    """Makes of the weights of :func:`world` what is best held where nothing trains them; see ``functional.narrow``."""
    return {"dit": narrow(params["dit"], cfg.dit.dtype, dit.ISLANDS), "vae": narrow(params["vae"], cfg.vae.dtype)}


def world(cfg: WorldConfig, params: Params) -> World:
    """Returns the world model with weights ``{"dit": ..., "vae": ...}``, to be used under ``jit``.

    Frames go in and out as float32 in [-1, 1]. ``step`` knows no truth: its third result is None.

    Raises:
      AssertionError: by ``begin`` and ``step``, for memory or actions of another length, rank, dtype or width.
    """
    memory, actions = cfg.slots, cfg.dit.action_dim

    def begin(start: Start) -> WorldState:
        # Looked at while the program is traced, and no part of it.
        chex.assert_rank(start.anchor_BHWC, 4, custom_message="world model: start.anchor_BHWC")
        batch, *picture = start.anchor_BHWC.shape
        chex.assert_shape(start.memory_BMHWC, (batch, memory, *picture), custom_message="world model: memory_BMHWC")
        chex.assert_shape(start.action_BMA, (batch, memory, actions), custom_message="world model: action_BMA")
        frames = [start.anchor_BHWC, start.memory_BMHWC]
        chex.assert_type(frames, float, custom_message="world model: frames as float in [-1, 1], not as bytes")
        return WorldState(start.anchor_BHWC, start.memory_BMHWC, start.action_BMA)

    def step(state: WorldState, action_BTA: Array, key_B: Array) -> tuple[WorldState, Array, None]:
        batch = len(state.anchor_BHWC)
        chex.assert_shape(action_BTA, (batch, cfg.chunk, actions), custom_message="world model: action_BTA")
        chex.assert_axis_dimension(key_B, 0, batch, custom_message="world model: key_B, one key a trajectory")
        frame_BTHWC = chunk(cfg, params, state, action_BTA, key_B)
        # The anchor stays, the memory slides: the last M frames and the actions that produced them, seen or imagined.
        state = WorldState(
            anchor_BHWC=state.anchor_BHWC,
            memory_BMHWC=jnp.concatenate([state.memory_BMHWC, frame_BTHWC], axis=1)[:, -cfg.slots :],
            action_BMA=jnp.concatenate([state.action_BMA, action_BTA], axis=1)[:, -cfg.slots :],
        )
        return state, frame_BTHWC, None

    return World(begin=begin, step=step)


def chunk(cfg: WorldConfig, params: Params, state: WorldState, action_BTA: Array, key_B: Array) -> Array:
    """Imagines the T frames that follow ``state`` under ``action_BTA``: encode, sample, decode."""
    _, net = networks(cfg)
    # The context, (B, 1 + M, H, W, C), and the actions of the whole window, (B, 1 + M + T, A): slot i holds the action
    # that produced frame i, and nothing produced the anchor.
    frame_BFHWC = jnp.concatenate([state.anchor_BHWC[:, None], state.memory_BMHWC], axis=1)
    null_B1A = jnp.broadcast_to(jnp.asarray(NULL_ACTION), (len(action_BTA), 1, len(NULL_ACTION)))
    action_BFA = jnp.concatenate([null_B1A, state.action_BMA, action_BTA], axis=1)

    encode = functools.partial(net, params["vae"], method="encode")
    decode = functools.partial(net, params["vae"], method="decode")
    # The VAE is causal: the latents of five frames alone are those that the whole window would begin with.
    context_Bfhwc = _piecewise(cfg, encode, arrange_frames(frame_BFHWC, cfg))
    # Two new latent frames, from noise of their own shape; the context is never noised at use.
    noise_Bfhwc = draw_noise(cfg, key_B, context_Bfhwc.shape[2:])
    new_Bfhwc = sample(cfg, params["dit"], context_Bfhwc, arrange_actions(action_BFA, cfg), noise_Bfhwc)
    # Decoded behind the context, which the causal decoder looks back to, and which is then dropped.
    latent_Bfhwc = jnp.concatenate([context_Bfhwc, new_Bfhwc], axis=1)
    decoded_BFHWC = _piecewise(cfg, decode, latent_Bfhwc)
    # The decoder overshoots, and what leaves here is looked at again: by policy, scorer and, as memory, by the world.
    return quantise(jnp.clip(decoded_BFHWC[:, -cfg.chunk :], -1.0, 1.0), cfg.eight_bit)


def _piecewise(cfg: WorldConfig, run: Callable[[Array], Array], x_B: Array) -> Any:
    """Calls ``run`` on at most ``vae_rows`` rows at a time."""
    rows = len(x_B)
    # The fewest pieces of equal size that are small enough; rows // rows = 1 always is.
    pieces = next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= (cfg.vae_rows or rows))
    if pieces == 1:
        return run(x_B)
    # (rows, ...) -> (rows / n, n, ...) -> (n, rows / n, ...): piece k holds rows k, k + n, k + 2n, ..., so that every
    # device has its share of every piece.
    y_NB = jax.lax.map(run, x_B.reshape(rows // pieces, pieces, *x_B.shape[1:]).swapaxes(0, 1))
    return y_NB.swapaxes(0, 1).reshape(rows, *y_NB.shape[2:])


def sample(cfg: WorldConfig, dit_params: Params, context_Bfhwc: Array, action_BFA: Array, noise_Bfhwc: Array) -> Array:
    """Samples the new latent frames behind a clean context, from noise, by Euler steps."""
    net, _ = networks(cfg)
    context = net(dit_params, action_BFA, method="context")  # once for all steps

    def velocity(latent_Bfhwc: Array, time_Bf: Array) -> Array:
        return net(dit_params, latent_Bfhwc, time_Bf, context=context)

    return flow.euler(velocity, context_Bfhwc, noise_Bfhwc, cfg.flow)


def draw_noise(cfg: WorldConfig, key_B: Array, size: tuple[int, int, int]) -> Array:
    """Draws (B, new latent frames, h, w, c) noise; row b depends on ``key_B[b]`` only, or on b only when fixed."""
    shape = (cfg.latents - cfg.context_latents, *size)
    if cfg.noise == "fixed":  # as in the reference environment: every chunk begins from the same noise
        key_B = jax.vmap(lambda b: jax.random.fold_in(jax.random.key(0), b))(jnp.arange(len(key_B)))
    return jax.vmap(lambda key: jax.random.normal(key, shape))(key_B)


def arrange_frames(frame_BFHWC: Array, cfg: WorldConfig) -> Array:
    """Applies ``anchor`` and ``memory`` to the frames of a window, or of its context alone.

    In: (B, F, ...) with the first frame of the episode in slot 0 and the last M frames after
    it. Training and imagination both come through here.
    """
    # For each slot the slot whose frame it shows: (0, 1, 2, 3, 4, ...), or with a memory of 1 (0, 4, 4, 4, 4, ...). The
    # window keeps its length, and what is not remembered is the oldest remembered frame standing still.
    oldest = 1 + cfg.slots - cfg.memory
    source = np.arange(frame_BFHWC.shape[1])
    source[1 : 1 + cfg.slots] = np.maximum(np.arange(1, 1 + cfg.slots), oldest)
    source[0] = 0 if cfg.anchor else oldest
    return frame_BFHWC[:, source]


def arrange_actions(action_BFA: Array, cfg: WorldConfig) -> Array:
    """Returns the actions that belong to the arranged frames: slot 0 and repeated frames get the null action."""
    # Slots up to slots - memory repeat a frame or begin the window: no motion leads to them. With the full memory that
    # is slot 0 alone.
    held_F = np.arange(action_BFA.shape[1]) > cfg.slots - cfg.memory
    return jnp.where(held_F[None, :, None], action_BFA, jnp.asarray(NULL_ACTION)[None, None])


def quantise(frame: Array, eight_bit: str) -> Array:
    """Returns frames in [-1, 1] on the 256 levels of a byte, or untouched."""
    if eight_bit == "none":
        return frame
    level = (frame + 1.0) * 127.5  # [-1, 1] -> [0, 255]
    level = jnp.round(level) if eight_bit == "round" else jnp.floor(level)
    return level / 127.5 - 1.0
