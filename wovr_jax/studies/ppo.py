"""A baseline of online RL with a critic and a reward on the way: PPO in the true simulator. (VLA-RL.)

As in VLA-RL (arXiv 2505.18719) the policy acts in the true simulator, a success pays 1, what it achieves on the way
pays as well, and a value network says what each chunk was worth, by generalised advantage estimation (Schulman et al.,
arXiv 1506.02438)::

    delta_n = r_n + V(o_{n+1}) - V(o_n),    A_n = sum_k (LAMBDA^k) delta_{n+k}

over the chunks of an episode, undiscounted, for episodes are short. What is not VLA-RL's: the milestones are the
simulator's own sub-goals and no vision-language model's guess; the critic is a network as small as the judge, fitted
anew on each iteration's rollouts, and values only those that it was not fitted on; there is no curriculum over tasks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from wovr_jax.core import keys
from wovr_jax.core.config import ConfigError
from wovr_jax.reward import classifier
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.reward.train import RewardObjective, RewardTrainConfig
from wovr_jax.run.bind import OpenGate
from wovr_jax.run.folder import Run
from wovr_jax.run.recipe import Recipe
from wovr_jax.sim import embedded
from wovr_jax.sim.embedded import Simulator
from wovr_jax.train import step as train_step
from wovr_jax.types import Array, Imagined, Params, Start

LAMBDA = 0.95
CRITIC = RewardTrainConfig(steps=100, batch=64, lr=2e-3, warmup=10)
"""Of a critic, which is fitted twice an iteration, on each half of the rollouts."""
MISTAKES = ("wrong_object",)
"""Sub-goals of the embedded suites that nobody wants."""


@struct.dataclass
class Chunks:
    """What a critic learns from: X chunks that count, what was seen before each, and the return from there on."""

    frame_XHWC: Array
    task_X: Array
    return_X: Array


@dataclasses.dataclass(frozen=True)
class CriticObjective(RewardObjective):
    """The squared error of the return; optimizer and running statistics as the judge's."""

    def draw(self, key: Array, data: Chunks) -> tuple[Chunks, Array]:
        """Chunks drawn uniformly."""
        k_draw, k_dropout = jax.random.split(key)
        row_B = jax.random.randint(k_draw, (self.train.batch,), 0, len(data.return_X))
        return jax.tree.map(lambda leaf: leaf[row_B], data), k_dropout

    def loss(self, params: Params, fixed: None, batch: Chunks, key: Array) -> tuple[Array, dict[str, Array], Params]:
        """See the class; the value is the network's logit itself, for returns lie around 0 and 1."""
        del fixed
        net = classifier.network(self.cfg)
        value_B, seen = net.mutate(params, batch.frame_XHWC, batch.task_X, train=True, key=key)
        return jnp.square(value_B - batch.return_X).mean(), {}, seen


def prepare(recipe: Recipe, run: Run) -> OpenGate:
    """Returns what gives the advantages of true rollouts.

    Raises:
      ConfigError: a run that learns in a learned world, or whose simulator is not an embedded one.
    """
    del run  # nothing is kept: a critic is made of the rollouts of its iteration
    if recipe.dream.world != "true" or recipe.outside:
        raise ConfigError(
            "config.dream.world: expected 'true', with an embedded simulator, whose sub-goals pay the policy; got "
            f"{recipe.dream.world!r}" + (", and a simulator outside" if recipe.outside else "")
        )
    sim, cfg, key = recipe.embedded, recipe.reward, functools.partial(keys.key, recipe.seed, "critic")
    first = classifier.network(cfg).init(key("weights"))

    def gate(parts: Mapping[str, Any], start: Start, imagined: Imagined, k_roll: Array) -> Imagined:
        del parts
        reward_BN, counts_BN = pay_milestones(sim, start, imagined)
        return_BN = sum_returns(reward_BN, counts_BN)
        # Every other group: all rollouts of a group begin alike, and the half that is valued begins elsewhere.
        half_B = np.arange(len(return_BN)) // recipe.learner.grpo.group % 2
        value_BN = np.zeros(return_BN.shape, np.float32)
        for half in (0, 1):
            params = fit_critic(cfg, first, imagined, return_BN, counts_BN & (half_B == half)[:, None], k_roll)
            value_BN[half_B != half] = _value(cfg, params, imagined)[half_B != half]
        advantage_BN = jnp.asarray(estimate_advantages(reward_BN, value_BN, counts_BN))
        return dataclasses.replace(imagined, advantage_BN=advantage_BN, video_BNTHWC=None)

    return lambda made: gate


def pay_milestones(sim: Simulator, start: Start, imagined: Imagined) -> tuple[np.ndarray, np.ndarray]:
    """Returns (B, N) what each chunk earned, and whether it counts: up to and with the first success, before the end.

    Each sub-goal that is reached for the first time pays its share of 1, and the success another 1.
    """
    reached_BN = np.asarray(_count_milestones(sim, start.sim, imagined.action_BNTA))
    success_BN = np.asarray(imagined.success_BNT.any(axis=2))
    counts_BN = np.cumsum(success_BN, axis=1) - success_BN == 0
    if imagined.live_BNT is not None:
        counts_BN &= np.asarray(imagined.live_BNT.any(axis=2))
    reward_BN = np.diff(reached_BN, axis=1, prepend=0.0) + success_BN
    return np.where(counts_BN, reward_BN, 0.0).astype(np.float32), counts_BN


@functools.partial(jax.jit, static_argnums=0)
def _count_milestones(sim: Simulator, state: Any, action_BNTA: Array) -> Array:
    """Returns (B, N), the share of the sub-goals that was reached up to the end of each chunk."""
    batch, chunks, steps = action_BNTA.shape[:3]
    action_BSA = action_BNTA.reshape(batch, chunks * steps, -1)
    states_BS = jax.vmap(lambda first, action_SA: embedded.roll(first, action_SA, sim))(state, action_BSA)

    def count(states_S: Any) -> Array:
        reached = embedded.suite_of(sim).subgoals(states_S, sim)
        return jnp.stack([flag for name, flag in reached.items() if name not in MISTAKES]).mean()

    ends = [jax.tree.map(lambda leaf, end=n * steps: leaf[:, :end], states_BS) for n in range(1, chunks + 1)]
    return jnp.stack([jax.vmap(count)(states) for states in ends], axis=1)


def sum_returns(reward_BN: np.ndarray, counts_BN: np.ndarray) -> np.ndarray:
    """Returns (B, N) what is earned from each chunk on; 0 where a chunk does not count."""
    total_BN = np.cumsum(reward_BN[:, ::-1], axis=1)[:, ::-1]
    return np.where(counts_BN, total_BN, 0.0).astype(np.float32)


def fit_critic(
    cfg: RewardConfig, first: Params, imagined: Imagined, return_BN: np.ndarray, rows_BN: np.ndarray, key: Array
) -> Params:
    """Returns a critic of the chunks ``rows_BN``; drawn as many times as there are chunks, so that one program does."""
    index_X = np.resize(np.flatnonzero(rows_BN), rows_BN.size)
    frame_XHWC = imagined.frame_BNHWC.reshape(-1, *imagined.frame_BNHWC.shape[2:])[index_X]
    task_X = jnp.repeat(imagined.task_B, rows_BN.shape[1])[index_X]
    data = Chunks(frame_XHWC, task_X, jnp.asarray(return_BN.reshape(-1)[index_X]))
    state, step = train_step.make(CriticObjective(cfg, CRITIC), first, train_step.resident(data), key)
    for i in range(CRITIC.steps):
        state, _ = step(state, jnp.asarray(i, jnp.int32))
    return state.params


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(cfg: RewardConfig, params: Params, imagined: Imagined) -> Array:
    frame_XHWC = imagined.frame_BNHWC.reshape(-1, *imagined.frame_BNHWC.shape[2:])
    task_X = jnp.repeat(imagined.task_B, imagined.frame_BNHWC.shape[1])
    return classifier.network(cfg)(params, frame_XHWC, task_X).reshape(imagined.frame_BNHWC.shape[:2])


def _value(cfg: RewardConfig, params: Params, imagined: Imagined) -> np.ndarray:
    return np.asarray(_evaluate(cfg, params, imagined))


def estimate_advantages(reward_BN: np.ndarray, value_BN: np.ndarray, counts_BN: np.ndarray) -> np.ndarray:
    """Returns (B, N) float32 advantages, in deviations over the chunks that count; 0 elsewhere.

    After the last chunk that counts an episode is over, and is worth nothing more.
    """
    value_BN = np.where(counts_BN, value_BN, 0.0)
    delta_BN = reward_BN + np.pad(value_BN[:, 1:], ((0, 0), (0, 1))) - value_BN
    advantage_BN, later_B = np.zeros_like(delta_BN), np.zeros(len(delta_BN))
    for n in reversed(range(delta_BN.shape[1])):
        later_B = np.where(counts_BN[:, n], delta_BN[:, n] + LAMBDA * later_B, 0.0)
        advantage_BN[:, n] = later_B
    counted = advantage_BN[counts_BN]
    return np.where(counts_BN, (advantage_BN - counted.mean()) / (counted.std() + 1e-6), 0.0).astype(np.float32)
