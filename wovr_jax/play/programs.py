"""The compiled steps of play: eight actions in, eight frames out, in the true world and in the learned one.

They are the bodies of the scan of ``imagine``, called one at a time, because a person's next actions are not known
yet. Keys are folded as there, so a course of actions gives the very frames that ``run.programs.replay`` gives for it.
Each is compiled once, for one trajectory; weights, thresholds, chunk numbers and temperatures are arguments.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax.data import starts as start_states
from wovr_jax.play.source import Source
from wovr_jax.policy import actions, vla
from wovr_jax.reward import classifier
from wovr_jax.sim import embedded
from wovr_jax.types import Array, Params, Start
from wovr_jax.world import model as world_model
from wovr_jax.world.model import WorldState

COLDEST = 1e-3
"""The lowest temperature that is divided by; at 0 the likeliest tokens are taken, and nothing is divided."""


class Programs:
    """The steps of a source, for trajectories of batch 1.

    Args:
      source: what is played with.
    """

    def __init__(self, source: Source):
        self.source = source
        self.chunk, self.memory = source.world_cfg.chunk, source.world_cfg.slots
        # The weights go in as arguments: constants in a program would be copied into it.
        self._imagine = jax.jit(self._imagine_chunk)
        self._act = jax.jit(self._act_chunk)
        if source.sim is not None:
            # Nothing is drawn in the simulator.
            sim, world, no_key = source.sim, embedded.world(source.sim), jax.random.split(jax.random.key(0), 1)
            self._step = jax.jit(lambda state, action_1TA: world.step(state, action_1TA, no_key))
            self._reset = jax.jit(lambda seed_1, prompt_KL: embedded.make_starts(seed_1, prompt_KL, sim, self.memory))
            self._replay = jax.jit(lambda seed_1, action_1SA, step_1: embedded.replay(seed_1, action_1SA, step_1, sim))

    def begin_row(self, row: int) -> Start:
        """Returns a start state of the table; with the simulator's state where there is a simulator."""
        table = self.source.starts
        start = start_states.gather(table, jnp.asarray([row]), jnp.asarray(self.source.prompt_KL))
        if self.source.sim is None:
            return start
        # A state is not stored but played again, from its seed and the actions before it.
        played = (jnp.asarray(column[row : row + 1]) for column in (table.seed_K, table.played_KSA, table.step_K))
        return dataclasses.replace(start, sim=self._replay(*played))

    def begin_layout(self, seed: int) -> Start:
        """Returns the start of an episode on the layout of a seed."""
        return self._reset(jnp.asarray([seed], jnp.int32), jnp.asarray(self.source.prompt_KL))

    def begin_world(self, start: Start) -> WorldState:
        """Returns what the learned world carries at a start."""
        return WorldState(start.anchor_BHWC, start.memory_BMHWC, start.action_BMA)

    def imagine(
        self, state: WorldState, action_TA: np.ndarray, task_1: Array, noise: int, n: int
    ) -> tuple[WorldState, Array, Array | None]:
        """Imagines chunk ``n`` of an episode whose noise comes from a seed: state, frame_1THWC, prob_1T or None."""
        judge = self.source.judge
        params = (self.source.world, None if judge is None else judge.params)
        return self._imagine(*params, state, jnp.asarray(action_TA)[None], task_1, noise, n)

    def step(self, state: Any, action_TA: np.ndarray) -> tuple[Any, Array, Array]:
        """Takes the same steps in the true simulator: state, frame_1THWC, truth_1T."""
        return self._step(state, jnp.asarray(action_TA)[None])

    def act(self, frame_1HWC: Array, prompt_1L: Array, temperature: float, noise: int, n: int) -> np.ndarray:
        """Returns the chunk (T, A) that the policy chooses at a frame; at temperature 0 its likeliest one."""
        action_1TA = self._act(self.source.policy, frame_1HWC, prompt_1L, jnp.float32(temperature), noise, n)
        return np.asarray(action_1TA)[0]

    def warm(self) -> None:
        """Compiles every step, so that nobody waits for it while playing."""
        start = self.begin_row(0)
        if self.source.sim is not None:
            start = self.begin_layout(0)
            self.step(start.sim, np.zeros((self.chunk, start.action_BMA.shape[-1]), np.float32))
        action_TA = self.act(start.memory_BMHWC[:, -1], start.prompt_BL, 0.0, 0, 0)
        jax.block_until_ready(self.imagine(self.begin_world(start), action_TA, start.task_B, 0, 0))

    def _imagine_chunk(
        self,
        world_params: Params,
        reward_params: Params | None,
        state: WorldState,
        action_1TA: Array,
        task_1: Array,
        noise: Array,
        n: Array,
    ) -> tuple[WorldState, Array, Array | None]:
        world = world_model.world(self.source.world_cfg, world_params)
        state, frame_1THWC, _ = world.step(state, action_1TA, fold_keys(noise, n)[None][:, 1])
        if reward_params is None:
            return state, frame_1THWC, None
        score = classifier.score(self.source.recipe.reward, reward_params)
        return state, frame_1THWC, score(frame_1THWC, task_1, None)

    def _act_chunk(
        self, params: Params, frame_1HWC: Array, prompt_1L: Array, temperature: Array, noise: Array, n: Array
    ) -> Array:
        logits_1TAK = vla.network(self.source.recipe.policy)(params, frame_1HWC, prompt_1L)
        # Both ways in one program: a slider that moves must not compile.
        drawn = actions.sample(logits_1TAK, fold_keys(noise, n)[None][:, 0], jnp.maximum(temperature, COLDEST))  # pyright: ignore
        token_1TA = jnp.where(temperature > 0.0, drawn, actions.greedy(logits_1TAK))
        return self.source.codec.decode(token_1TA)


def fold_keys(noise: Array, n: Array) -> Array:
    """Returns two keys, of the policy and of the world, for chunk ``n`` of the one rollout of a batch."""
    key = jax.random.fold_in(jax.random.key(noise), 0)
    return jax.random.split(jax.random.fold_in(key, n))
