"""Many rollouts for a program that drives them, in the learned world or the true one: one compiled step for all rows.

What a program asks and is told over a socket (``server``), in maps of ``export.wire``; B rows of T steps::

    {do: reset, where (B,), row (B,), noise (B,)}  ->  {told: begun, frame (B, H, W, 3), task (B,), step (B,)}
    {do: step, action (B, T, A)}                   ->  {told: chunk, frame (B, T, H, W, 3), prob (B, T)}

A reset begins only the rows that ``where`` names; the others stay as they are. ``export.world_env`` is a client.

In the learned world ``row`` counts the run's start states. In the true simulator it counts the layouts on which the
run's policies are evaluated, which no training has seen, and ``prob`` is 1 where the goal holds and 0 elsewhere: so the
client that trains in imagination measures true success too, and gets the report's figures for the report's policies.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax.core.pixels import to_uint8
from wovr_jax.data import starts as start_states
from wovr_jax.play.programs import fold_keys
from wovr_jax.play.session import SessionError
from wovr_jax.play.source import PlayError, Source
from wovr_jax.reward import classifier
from wovr_jax.sim import embedded
from wovr_jax.sim.arena import layouts
from wovr_jax.types import Array, Params
from wovr_jax.world import model as world_model
from wovr_jax.world.model import WorldState

TRUE_THRESHOLD = 0.5
"""Between the 0 and the 1 of the true simulator."""


class Held(NamedTuple):
    """What a program's rollouts are at: what their world carries, frame_BHWC, task_B, and step_B of their start."""

    state: Any
    frame_BHWC: Array
    task_B: Array
    step_B: Array


class Worlds(Protocol):
    """B worlds that turn at once.

    Attributes:
      source: what is played with.
      name: of the world, for whoever connects.
      rows: B.
      starts: how many start states there are.
      threshold: a frame whose ``prob`` is above it counts as a success.
    """

    source: Source
    name: str
    rows: int
    starts: int
    threshold: float

    def begin(self, row_B: np.ndarray) -> Held:
        """Begins every row at a start state."""
        ...

    def step(
        self, state: Any, action_BTA: np.ndarray, task_B: Array, noise_B: np.ndarray, n_B: np.ndarray
    ) -> tuple[Any, Array, Array]:
        """Plays a chunk of every row, the ``n_B``-th of its rollout: state, frame_BTHWC, prob_BT."""
        ...


class Rollouts:
    """B rollouts in the learned world of a run; see ``Worlds``.

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
        self.name, self.starts = source.world_name, len(source.starts)
        self.threshold = float(source.judge.threshold)
        self._step = jax.jit(self._step_rows)

    def begin(self, row_B: np.ndarray) -> Held:
        """Begins at start states of the run, keyframes among them."""
        start = start_states.gather(self.source.starts, jnp.asarray(row_B), jnp.asarray(self.source.prompt_KL))
        world = WorldState(start.anchor_BHWC, start.memory_BMHWC, start.action_BMA)
        return Held(world, start.memory_BMHWC[:, -1], start.task_B, start.step_B)

    def step(
        self, state: WorldState, action_BTA: np.ndarray, task_B: Array, noise_B: np.ndarray, n_B: np.ndarray
    ) -> tuple[WorldState, Array, Array]:
        """Imagines a chunk of every row, the ``n_B``-th of its rollout: state, frame_BTHWC, prob_BT."""
        drawn = (jnp.asarray(noise_B), jnp.asarray(n_B))
        return self._step(self.source.world, self._judge.params, state, jnp.asarray(action_BTA), task_B, *drawn)

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


class TrueRollouts:
    """B rollouts in the true simulator of a run; see ``Worlds``.

    Args:
      source: what is played with.
      rows: B.

    Raises:
      PlayError: a suite whose simulator is no compiled program.
    """

    threshold = TRUE_THRESHOLD
    name = "truth"

    def __init__(self, source: Source, rows: int):
        if source.sim is None:
            raise PlayError(f"{source.name}: {source.suite} has no true simulator that can be played here.")
        sim, memory = source.sim, source.world_cfg.slots
        self.source, self.rows, self.starts = source, rows, source.recipe.evaluate.episodes
        self._seed_K = layouts(source.recipe.seed, "evaluate", self.starts)
        self._reset = jax.jit(lambda seed_B, prompt_KL: embedded.make_starts(seed_B, prompt_KL, sim, memory))
        # Nothing is drawn in the simulator.
        world, keys_B = embedded.world(sim), jax.random.split(jax.random.key(0), rows)
        self._step = jax.jit(lambda state, action_BTA: world.step(state, action_BTA, keys_B))

    def begin(self, row_B: np.ndarray) -> Held:
        """Begins at layouts of the evaluation."""
        start = self._reset(jnp.asarray(self._seed_K[row_B]), jnp.asarray(self.source.prompt_KL))
        return Held(start.sim, start.memory_BMHWC[:, -1], start.task_B, start.step_B)

    def step(
        self, state: Any, action_BTA: np.ndarray, task_B: Array, noise_B: np.ndarray, n_B: np.ndarray
    ) -> tuple[Any, Array, Array]:
        """Plays a chunk of every row: state, frame_BTHWC, prob_BT."""
        state, frame_BTHWC, truth_BT = self._step(state, jnp.asarray(action_BTA))
        return state, frame_BTHWC, truth_BT.astype(jnp.float32)


class Batch:
    """The rollouts of one program."""

    def __init__(self, worlds: Worlds):
        self.worlds = worlds
        self._held: Held | None = None
        self._begun_B = np.zeros(worlds.rows, bool)
        self._noise_B, self._n_B = (np.zeros(worlds.rows, np.int32) for _ in range(2))

    @property
    def action_shape(self) -> tuple[int, int, int]:
        """(B, T, A)."""
        source = self.worlds.source
        return self.worlds.rows, source.world_cfg.chunk, source.starts.action_KMA.shape[-1]

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
        rows, most = (self.worlds.rows,), self.worlds.starts - 1
        where_B = _read(message, "where", np.bool_, rows)
        row_B, noise_B = (_read(message, name, np.int32, rows) for name in ("row", "noise"))
        if (row_B < 0).any() or (row_B > most).any() or (noise_B < 0).any():
            raise SessionError(f"'row': expected 0 to {most}, start states of the run, and 'noise' at least 0")
        if not (where_B | self._begun_B).all():
            raise SessionError("'where': expected every row that has not begun yet")
        new = self.worlds.begin(row_B)
        held = new if where_B.all() else _merge(jnp.asarray(where_B), new, self._held)
        self._held, self._noise_B = held, np.where(where_B, noise_B, self._noise_B)
        self._n_B, self._begun_B = np.where(where_B, np.int32(0), self._n_B), where_B | self._begun_B
        task_B, step_B = (np.asarray(x, np.int32) for x in (held.task_B, held.step_B))
        return {"told": "begun", "frame": to_uint8(held.frame_BHWC), "task": task_B, "step": step_B}

    def _step(self, message: dict[str, Any]) -> dict[str, Any]:
        action_BTA = _read(message, "action", np.float32, self.action_shape)
        if not (np.isfinite(action_BTA).all() and np.abs(action_BTA).max() <= 1.0):
            raise SessionError("'action': expected finite numbers from -1 to 1")
        held = self._held
        if held is None:
            raise SessionError("no rollout has begun; reset first")
        state, frame_BTHWC, prob_BT = self.worlds.step(held.state, action_BTA, held.task_B, self._noise_B, self._n_B)
        self._held = held._replace(state=state, frame_BHWC=frame_BTHWC[:, -1])
        self._n_B = self._n_B + np.int32(1)
        return {"told": "chunk", "frame": to_uint8(frame_BTHWC), "prob": np.asarray(prob_BT, np.float32)}


def warm(worlds: Worlds) -> None:
    """Compiles everything, so that no program waits for it."""
    batch = Batch(worlds)
    zeros = {name: np.zeros(worlds.rows, np.int32) for name in ("row", "noise")}
    batch.answer({"do": "reset", "where": np.ones(worlds.rows, bool)} | zeros)
    batch.answer({"do": "step", "action": np.zeros(batch.action_shape, np.float32)})
    batch.answer({"do": "reset", "where": np.arange(worlds.rows) == 0} | zeros)


def describe(worlds: Worlds) -> dict[str, Any]:
    """Returns what a program is told when it connects."""
    source = worlds.source
    facts = {"told": "hello", "run": source.name, "suite": source.suite, "world": worlds.name}
    shapes = {"action": list(Batch(worlds).action_shape), "frame": list(source.starts.anchor_KHWC.shape[1:])}
    limits = {"steps": source.recipe.steps, "starts": worlds.starts}
    judge = {"threshold": worlds.threshold, "instructions": list(source.instructions)}
    return facts | shapes | limits | judge


@jax.jit
def _merge(where_B: Array, new: Held, old: Held) -> Held:
    """Returns ``new`` in the rows that are named, ``old`` in the others."""
    return jax.tree.map(lambda a, b: jnp.where(where_B.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


def _read(message: dict[str, Any], name: str, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    value, want = message.get(name), f"{np.dtype(dtype)} {list(shape)}"
    if not (isinstance(value, np.ndarray) and value.dtype == dtype and value.shape == shape):
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
        raise SessionError(f"'{name}': expected {want}, got {got}")
    return value
