"""The structs that travel along the spine, and the key of shape letters.

Shape letters, used as name suffixes everywhere::

    B  trajectories (batch)          S  simulator steps of an episode (frames: S + 1)
    N  chunks of a trajectory        T  steps of a chunk (8)
    G  members of a group            A  action dimensions (7)
    H W C  pixels                    F  frames of a world-model window (1 + 4 + 8)
    M  memory frames (4)             f h w c  latent frames, rows, columns, channels
    L  tokens of a sequence          D  width of a network
    K  action bins (256)

Conventions that hold on the whole spine:

* pixels are float32 in [-1, 1] on the device and uint8 on the disk;
* actions are environment actions in LIBERO's convention: six end-effector deltas in
  [-1, 1], then the gripper, -1 open and +1 closed;
* ``action_SA[i]`` leads from frame ``i`` to frame ``i + 1``; in a world-model window slot
  ``i`` holds the action that *produced* frame ``i`` (the null action for the anchor);
* layout is (B, N, T): time-major exists only inside a scan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import struct

# jax's own type: numpy arrays pass the programs as well, but what comes out of one is this.
Array = jax.Array

Params = dict[Any, Any]
"""Parameters of a network by path: nested dictionaries whose leaves are arrays."""

# Three shifts of the hand, three turns of it, the gripper.
ACTION_DIM = 7
NULL_ACTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
"""No motion, gripper open: the action of the anchor slot and of padding."""


@dataclasses.dataclass(frozen=True)
class Episode:
    """One trajectory of the true simulator, as it lies on disk (numpy, host).

    Attributes:
      frame_SHWC: (S + 1, H, W, 3) uint8; frame 0 is the observation after reset.
      action_SA: (S, 7) float32 executed environment actions.
      success_S: (S + 1,) bool, whether the goal holds in each frame.
      instruction: what the robot was asked to do.
      task: index of the instruction among the tasks of the simulator.
      seed: seed of the reset; with ``action_SA`` it replays the episode exactly.
      actor: who acted, e.g. ``"expert"``, ``"base"``, ``"grpo-1"``.
      label_SA: (S, 7) float32 actions to imitate; equals ``action_SA`` unless the actor
        executed them with noise.
      wrist_SHWC: (S + 1, H, W, 3) uint8, the camera in the hand, or None.
      state_SD: (S + 1, D) float32 proprioception, or None; LIBERO's has D = 8: hand position (3, metres),
        its rotation as axis times angle (3), two finger joints.
      origin: JSON facts about where it comes from, e.g. suite, initial state and protocol.
    """

    # One more frame and success than actions: S steps lie between S + 1 moments.
    frame_SHWC: np.ndarray
    action_SA: np.ndarray
    success_S: np.ndarray
    instruction: str
    task: int
    seed: int
    actor: str
    label_SA: np.ndarray
    # What only some simulators have, and only some policies take.
    wrist_SHWC: np.ndarray | None = None
    state_SD: np.ndarray | None = None
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@struct.dataclass
class Start:
    """A batch of moments at which an imagined rollout may begin.

    Attributes:
      anchor_BHWC: float32 in [-1, 1], first frame of the episode.
      memory_BMHWC: float32, the last M frames; copies of the anchor at an episode start.
      action_BMA: float32, the actions that produced the memory frames (null at a start).
      prompt_BL: int32 prompt tokens.
      task_B: int32 task index.
      keyframe_B: bool, True for a keyframe-initialised rollout (KIR).
      step_B: int32, simulator steps taken before this moment.
      sim: state of the true simulator at this moment, or None. Only the ladder, the
        evaluation and online RL read it; the learner inside imagination never does.
    """

    anchor_BHWC: Array
    memory_BMHWC: Array
    action_BMA: Array
    prompt_BL: Array
    task_B: Array
    # Not seen by policy or world: which starts a share of the rollouts came from, and how late in the episode they are.
    keyframe_B: Array
    step_B: Array
    # Known to who plays in the true environment; what is imagined must not depend on it.
    sim: Any = None


@struct.dataclass
class Imagined:
    """A batch of rollouts, imagined or (ladder, online RL, collection) true.

    Attributes:
      frame_BNHWC: float32, what the policy saw before each chunk.
      prompt_BL: int32 prompt tokens.
      task_B: int32 task index.
      token_BNTA: int32 in [0, 256), sampled action tokens (slice coordinates).
      logp_BNTA: float32, their log-probability under the policy that acted.
      action_BNTA: float32, the environment actions they decode to.
      prob_BNT: float32, success probability of each new frame.
      success_BNT: bool, ``prob_BNT`` above the threshold, before the deadline.
      truth_BNT: bool, the true predicate where the world knows it, else None.
      video_BNTHWC: float32, the new frames, or None when not asked for.
      live_BNT: bool, steps before the deadline, which is the end of the true episode; None where all of them are.
      keyframe_B: bool, which rollouts began at a keyframe; None where nobody says.
      advantage_BN: float32, what each chunk is worth where a gate says so (``audit.gates``); None: its return against
        that of its group.
    """

    frame_BNHWC: Array
    prompt_BL: Array
    task_B: Array
    token_BNTA: Array
    logp_BNTA: Array
    action_BNTA: Array
    # Of every new frame, also of those after the first success: who counts rewards cuts there.
    prob_BNT: Array
    success_BNT: Array
    truth_BNT: Array | None = None
    video_BNTHWC: Array | None = None
    live_BNT: Array | None = None
    keyframe_B: Array | None = None
    advantage_BN: Array | None = None


class World(NamedTuple):
    """Something that turns actions into frames: the learned model or the true simulator.

    Attributes:
      begin: ``begin(start: Start) -> state`` (any pytree, leading axis B).
      step: ``step(state, action_BTA, key_B) -> (state, frame_BTHWC, truth_BT or None)``;
        ``key_B`` is one PRNG key for each trajectory, so a rollout does not depend on the
        batch it is computed in.
    """

    # Two functions and no class: both are pure, and the state goes through a scan as a pytree.
    begin: Callable[..., Any]
    step: Callable[..., Any]
