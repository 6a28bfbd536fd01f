"""How far imagination strays when it plays recorded actions from the first frame (open loop).

Only the first frame is given; every later chunk is imagined from imagined frames. Chunk 1 shows what
one prediction is worth, chunk 16 what is left when errors feed on themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from wovr_jax.core.pixels import to_float
from wovr_jax.run import programs
from wovr_jax.types import NULL_ACTION, Array, Episode, Params, Start
from wovr_jax.world.model import WorldConfig


def stack_episodes(episodes: Sequence[Episode], chunk: int) -> tuple[Array, Array, Array]:
    """Stacks episodes of one length: first frames (B, H, W, C), actions (B, N, T, A), true frames (B, N, T, H, W, C).

    Raises:
      ValueError: when their length is no whole number of chunks, or differs.
    """
    lengths = {len(episode.action_SA) for episode in episodes}
    if len(lengths) != 1 or min(lengths) % chunk:
        raise ValueError(f"replay: expected episodes of one length, a multiple of {chunk} steps, got {sorted(lengths)}")
    frame_BSHWC = to_float(jnp.asarray(np.stack([episode.frame_SHWC for episode in episodes])))
    action_BSA = jnp.asarray(np.stack([episode.action_SA for episode in episodes]))
    # (B, S, ...) -> (B, N, T, ...)
    action_BNTA, frame_BNTHWC = (
        x.reshape(len(episodes), -1, chunk, *x.shape[2:]) for x in (action_BSA, frame_BSHWC[:, 1:])
    )
    return frame_BSHWC[:, 0], action_BNTA, frame_BNTHWC


def play(cfg: WorldConfig, params: Params, frame_BHWC: Array, action_BNTA: Array, key: Array) -> Array:
    """Returns the frames (B, N, T, H, W, C) of actions from first frames, in the world with weights ``params``."""
    batch = len(frame_BHWC)
    none_B = jnp.zeros(batch, jnp.int32)
    # As at the reset of an episode: the memory is the first frame, held still under the null action.
    start = Start(
        anchor_BHWC=frame_BHWC,
        memory_BMHWC=jnp.repeat(frame_BHWC[:, None], cfg.slots, axis=1),
        action_BMA=jnp.broadcast_to(jnp.asarray(NULL_ACTION), (batch, cfg.slots, len(NULL_ACTION))),
        prompt_BL=none_B[:, None],  # nobody reads it: the actions are recorded
        task_B=none_B,
        keyframe_B=none_B > 0,
        step_B=none_B,
    )
    video_BNTHWC = programs.replay(cfg)(params, None, start, action_BNTA, key).video_BNTHWC
    assert video_BNTHWC is not None
    return video_BNTHWC
