"""A learned world as a vector environment: a client of ``launch/play.py RUN --rows N`` with Gymnasium's vector API.

    env = WorldEnv("ws://127.0.0.1:8100/world")
    observation, info = env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step(actions)  # (N, T, A), a chunk of T actions each

With ``/truth`` in the place of ``/world`` the same client drives the true simulator, on the layouts of the evaluation:
that is for measuring what was learned. It needs numpy, msgpack and websockets, and neither jax nor Gymnasium; this file
and ``wire.py`` can be copied. ``gym_env`` makes a ``gymnasium.vector.VectorEnv`` of it.

A step is a chunk. An observation is the last frame (N, H, W, 3) uint8, the reward is 1 in the chunk in which the judge
first calls a frame a success, and an episode is as long as one of the run: from a keyframe, as long as what is left of
it. As in Gymnasium's default, a row that has ended begins again in the next step, whose action it ignores.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
from websockets.sync.client import connect

from wovr_jax.export import wire


class WorldEnvError(RuntimeError):
    """What the server says of a request that it cannot follow."""


class WorldEnv:
    """N rollouts in the learned world of a run, or in its true simulator.

    Attributes:
      world: which one: ``world-2``, the one of that round, or ``truth``.
      num_envs: N.
      starts: how many start states there are.
      steps: of an episode from its first frame.
      action_shape, observation_shape: of one row, (T, A) and (H, W, 3).
      instructions: by task index.
      threshold: a frame whose probability is above it counts as a success.
      rng: of the rows and the noise that a reset draws.

    Args:
      url: where the server listens.
      timeout: seconds to wait for an answer.

    Raises:
      OSError: nobody listens there.
    """

    def __init__(self, url: str, *, timeout: float = 60.0):
        self._timeout = timeout
        self._open = contextlib.ExitStack()
        self._connection = self._open.enter_context(connect(url, compression=None, max_size=None, open_timeout=timeout))
        hello = self._receive()
        self.num_envs, *action = hello["action"]
        self.action_shape, self.observation_shape = tuple(action), tuple(hello["frame"])
        self.instructions, self.threshold = tuple(hello["instructions"]), hello["threshold"]
        self.world, self.starts, self.steps = hello["world"], hello["starts"], hello["steps"]
        self.rng = np.random.default_rng()
        self._ended_N = np.ones(self.num_envs, bool)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins every row: at ``options["rows"]`` (N,), start states of the run, or at some drawn from ``seed``.

        Returns:
          observation, and info: the ``task`` (N,) of each row and its ``instruction``.
        """
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        rows = None if options is None else options.get("rows")
        return self._begin(np.ones(self.num_envs, bool), rows)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Plays a chunk (N, T, A) of environment actions, in [-1, 1].

        Returns:
          observation, reward (N,), terminated (N,), truncated (N,), and info: every ``frame`` (N, T, H, W, 3) and its
          ``prob`` (N, T), ``task`` and ``instruction`` as of ``reset``.
        """
        again_N = self._ended_N.copy()
        told = self._ask({"do": "step", "action": np.ascontiguousarray(actions, np.float32)})
        observation = told["frame"][:, -1].copy()
        steps = told["prob"].shape[1]
        # Success counts up to the end of the true episode, which may lie within a chunk.
        live_NT = self._step_N[:, None] + np.arange(steps) < self.steps
        terminated = ((told["prob"] > self.threshold) & live_NT).any(axis=1) & ~again_N
        self._step_N = self._step_N + steps
        truncated = (self._step_N >= self.steps) & ~terminated & ~again_N
        self._ended_N = terminated | truncated
        if again_N.any():
            begun, _ = self._begin(again_N, None)
            observation[again_N] = begun[again_N]
        info = {"frame": told["frame"], "prob": told["prob"]} | self._name_tasks()
        return observation, terminated.astype(np.float32), terminated, truncated, info

    def close(self) -> None:
        """Leaves."""
        self._open.close()

    def __enter__(self) -> WorldEnv:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, where_N: np.ndarray, rows: Any) -> tuple[np.ndarray, dict[str, Any]]:
        drawn_N = self.rng.integers(self.starts, size=self.num_envs)
        row_N = np.asarray(drawn_N if rows is None else rows, np.int32)
        noise_N = self.rng.integers(2**31 - 1, size=self.num_envs).astype(np.int32)
        told = self._ask({"do": "reset", "where": where_N, "row": row_N, "noise": noise_N})
        step_N = told["step"].astype(int)
        self._step_N = step_N if where_N.all() else np.where(where_N, step_N, self._step_N)
        self._ended_N, self._task_N = self._ended_N & ~where_N, told["task"]
        return told["frame"], self._name_tasks()

    def _name_tasks(self) -> dict[str, Any]:
        return {"task": self._task_N.copy(), "instruction": [self.instructions[task] for task in self._task_N]}

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        self._connection.send(wire.pack(message))
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        reply = self._connection.recv(timeout=self._timeout)
        if isinstance(reply, str):
            raise WorldEnvError(f"the server says: {reply}")
        # What is unpacked is a view of the message, which nobody may write to.
        return {name: x.copy() if isinstance(x, np.ndarray) else x for name, x in wire.unpack(reply).items()}
