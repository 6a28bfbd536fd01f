"""Many rollouts in the learned world for a program that drives them: one compiled step for all rows of a batch.

What a program asks and is told over a socket (``server``), in maps of ``export.wire``; B rows of T steps::

    {do: reset, where (B,), row (B,), noise (B,)}  ->  {told: begun, frame (B, H, W, 3), task (B,), step (B,)}
    {do: step, action (B, T, A)}                   ->  {told: chunk, frame (B, T, H, W, 3), prob (B, T)}

A reset begins only the rows that ``where`` names; the others stay as they are. ``export.world_env`` is a client.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax.core.pixels import to_uint8
from wovr_jax.data import starts as start_states
from wovr_jax.play.programs import fold_keys
from wovr_jax.play.session import SessionError
from wovr_jax.play.source import PlayError, Source
from wovr_jax.reward import classifier
from wovr_jax.types import Array, Params
from wovr_jax.world import model as world_model
from wovr_jax.world.model import WorldState


class Rollouts:
    """The compiled step of B rollouts at once.

    Args:
      source: what is played with.
      rows: B.

    Raises:
      PlayError: a run whose judge is not trained yet; rollouts without a reward are of no use to a learner.
    """

    def __init__(self, source: Source, rows: int):
        if source.judge is None:
            raise PlayError(f"{source.name}: --rows needs a success classifier, and none is trained yet.")
        self.source, self.rows, self._judge = source, rows, source.judge
        self._step = jax.jit(self._step_rows)
        self._merge = jax.jit(
            lambda where_B, new, old: jax.tree.map(
                lambda a, b: jnp.where(where_B.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old
            )
        )

    def gather(self, row_B: np.ndarray) -> tuple[WorldState, Array, Array]:
        """Returns what the world carries at start states, and their tasks and steps."""
        start = start_states.gather(self.source.starts, jnp.asarray(row_B), jnp.asarray(self.source.prompt_KL))
        return WorldState(start.anchor_BHWC, start.memory_BMHWC, start.action_BMA), start.task_B, start.step_B

    def merge(self, where_B: np.ndarray, new: Any, old: Any) -> Any:
        """Returns ``new`` in the rows that are named, ``old`` in the others."""
        return self._merge(jnp.asarray(where_B), new, old)

    def step(
        self, state: WorldState, action_BTA: np.ndarray, task_B: Array, noise_B: np.ndarray, n_B: np.ndarray
    ) -> tuple[WorldState, Array, Array]:
        """Imagines a chunk of every row, the ``n_B``-th of its rollout: state, frame_BTHWC, prob_BT."""
        drawn = (jnp.asarray(noise_B), jnp.asarray(n_B))
        return self._step(self.source.world, self._judge.params, state, jnp.asarray(action_BTA), task_B, *drawn)

    def warm(self) -> None:
        """Compiles everything."""
        batch = Batch(self)
        every = {"where": np.ones(self.rows, bool)} | {name: np.zeros(self.rows, np.int32) for name in ("row", "noise")}
        batch.answer({"do": "reset", **every})
        batch.answer({"do": "step", "action": np.zeros(batch.action_shape, np.float32)})

    def _step_rows(
        self,
        world_params: Params,
        reward_params: Params,
        state: WorldState,
        action_BTA: Array,
        task_B: Array,
        noise_B: Array,
        n_B: Array,
    ) -> tuple[WorldState, Array, Array]:
        # Row by row the keys of a session of its own: what a row imagines does not depend on the batch.
        keys_B2 = jax.vmap(fold_keys)(noise_B, n_B)
        world = world_model.world(self.source.world_cfg, world_params)
        state, frame_BTHWC, _ = world.step(state, action_BTA, keys_B2[:, 1])
        return state, frame_BTHWC, classifier.score(self.source.recipe.reward, reward_params)(frame_BTHWC, task_B, None)


class Batch:
    """The rollouts of one program."""

    def __init__(self, rollouts: Rollouts):
        self.rollouts = rollouts
        self._begun_B = np.zeros(rollouts.rows, bool)
        self._noise_B, self._n_B = (np.zeros(rollouts.rows, np.int32) for _ in range(2))

    @property
    def action_shape(self) -> tuple[int, int, int]:
        """(B, T, A)."""
        source = self.rollouts.source
        return self.rollouts.rows, source.world_cfg.chunk, source.starts.action_KMA.shape[-1]

    def answer(self, message: Any) -> dict[str, Any]:
        """Does what a message asks, and returns the answer.

        Raises:
          SessionError: a message that is not as expected; the rollouts are as they were.
        """
        asked = message.get("do") if isinstance(message, dict) else None
        if asked not in ("reset", "step"):
            raise SessionError("expected a map with 'do', reset or step")
        began = time.perf_counter()
        told = self._reset(message) if asked == "reset" else self._step(message)
        return told | {"ms": 1000.0 * (time.perf_counter() - began)}

    def _reset(self, message: dict[str, Any]) -> dict[str, Any]:
        rows, most = (self.rollouts.rows,), len(self.rollouts.source.starts) - 1
        where_B = _read(message, "where", np.bool_, rows)
        row_B, noise_B = (_read(message, name, np.int32, rows) for name in ("row", "noise"))
        if (row_B < 0).any() or (row_B > most).any() or (noise_B < 0).any():
            raise SessionError(f"'row': expected 0 to {most}, start states of the run, and 'noise' at least 0")
        if not (where_B | self._begun_B).all():
            raise SessionError("'where': expected every row that has not begun yet")
        new = self.rollouts.gather(row_B)
        held = new if where_B.all() else self.rollouts.merge(where_B, new, (self._world, self._task_B, self._step_B))
        self._world, self._task_B, self._step_B = held
        self._noise_B = np.where(where_B, noise_B, self._noise_B)
        self._n_B, self._begun_B = np.where(where_B, np.int32(0), self._n_B), where_B | self._begun_B
        task_B, step_B = (np.asarray(x, np.int32) for x in (self._task_B, self._step_B))
        return {"told": "begun", "frame": to_uint8(self._world.memory_BMHWC[:, -1]), "task": task_B, "step": step_B}

    def _step(self, message: dict[str, Any]) -> dict[str, Any]:
        action_BTA = _read(message, "action", np.float32, self.action_shape)
        if not (np.isfinite(action_BTA).all() and np.abs(action_BTA).max() <= 1.0):
            raise SessionError("'action': expected finite numbers from -1 to 1")
        if not self._begun_B.all():
            raise SessionError("no rollout has begun; reset first")
        self._world, frame_BTHWC, prob_BT = self.rollouts.step(
            self._world, action_BTA, self._task_B, self._noise_B, self._n_B
        )
        self._n_B = self._n_B + np.int32(1)
        return {"told": "chunk", "frame": to_uint8(frame_BTHWC), "prob": np.asarray(prob_BT, np.float32)}


def describe(rollouts: Rollouts) -> dict[str, Any]:
    """Returns what a program is told when it connects."""
    source = rollouts.source
    facts = {"told": "hello", "run": source.name, "suite": source.suite, "world": f"world-{source.world_round}"}
    shapes = {"action": list(Batch(rollouts).action_shape), "frame": list(source.starts.anchor_KHWC.shape[1:])}
    limits = {"steps": source.recipe.steps, "starts": len(source.starts), "initials": source.starts.initials}
    judge = {"threshold": float(rollouts._judge.threshold), "instructions": list(source.instructions)}
    return facts | shapes | limits | judge


def _read(message: dict[str, Any], name: str, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    value, want = message.get(name), f"{np.dtype(dtype)} {list(shape)}"
    if not (isinstance(value, np.ndarray) and value.dtype == dtype and value.shape == shape):
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
        raise SessionError(f"'{name}': expected {want}, got {got}")
    return value
