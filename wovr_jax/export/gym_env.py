"""A learned world as a ``gymnasium.vector.VectorEnv``: what ``world_env`` does, with spaces and in Gymnasium's types.

    env = GymWorldEnv("ws://127.0.0.1:8100/world")
    observation, info = env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step(env.action_space.sample())

An observation is a map of ``frame`` (N, H, W, 3) uint8 and ``task`` (N,), since a policy that obeys an instruction has
to see it; ``env.instructions`` has its words. It needs Gymnasium, which nothing else here does, and no jax.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from wovr_jax.export.world_env import WorldEnv


class GymWorldEnv(VectorEnv):
    """N rollouts in the learned world of a run, or in its true simulator.

    Attributes:
      world: the client that it is made of.
      instructions: by task index.

    Args:
      url: where the server listens, with the path ``/world`` or ``/truth``.
      timeout: seconds to wait for an answer.

    Raises:
      OSError: nobody listens there.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012  (as Gymnasium declares it)

    def __init__(self, url: str, *, timeout: float = 60.0):
        self.world = WorldEnv(url, timeout=timeout)
        self.num_envs, self.instructions = self.world.num_envs, self.world.instructions
        frame = spaces.Box(0, 255, self.world.observation_shape, np.uint8)
        task = spaces.Discrete(len(self.instructions))
        self.single_observation_space: gymnasium.Space = spaces.Dict({"frame": frame, "task": task})
        self.single_action_space: gymnasium.Space = spaces.Box(-1.0, 1.0, self.world.action_shape, np.float32)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begins every row, as ``WorldEnv.reset``."""
        super().reset(seed=seed)
        self.world.rng = self.np_random
        frame, info = self.world.reset(options=options)
        return _observe(frame, info), self._mask(info)

    def step(
        self, actions: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Plays a chunk of every row, as ``WorldEnv.step``."""
        frame, reward, terminated, truncated, info = self.world.step(actions)
        return _observe(frame, info), reward, terminated, truncated, self._mask(info)

    def close_extras(self, **kwargs: Any) -> None:
        """Leaves the server."""
        self.world.close()

    def _mask(self, info: dict[str, Any]) -> dict[str, Any]:
        """Returns arrays and, as Gymnasium has it, which rows each of them is of: all."""
        known = {name: np.asarray(x, object if name == "instruction" else None) for name, x in info.items()}
        return known | {f"_{name}": np.ones(self.num_envs, bool) for name in known}


def _observe(frame: np.ndarray, info: dict[str, Any]) -> dict[str, np.ndarray]:
    return {"frame": frame, "task": info["task"].astype(np.int64)}
