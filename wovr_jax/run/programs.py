"""The compiled programs of a run: three rollouts, each compiled once and used in every round.

Weights, start states and thresholds are arguments, never constants in a program, so a
refreshed world model or an evolved policy runs in the program that is already there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax.core import pixels
from wovr_jax.data import starts as start_states
from wovr_jax.data.starts import Starts
from wovr_jax.imagine import imagine, predicate, shadowed
from wovr_jax.policy import adapters, vla
from wovr_jax.policy.actions import Codec
from wovr_jax.policy.adapters import Tuned
from wovr_jax.reward import classifier
from wovr_jax.run.recipe import Recipe
from wovr_jax.sim.tabletop import collect
from wovr_jax.sim.tabletop import table as tabletop
from wovr_jax.types import Array, Imagined, Params, Start, World
from wovr_jax.world import model as world_model
from wovr_jax.world.model import WorldConfig


class Programs:
    """Rollouts of one recipe.

    Args:
      recipe: the settings.
      codec: between actions and tokens.
      world: gives the world model's settings, its VAE's statistics filled in; asked when something is imagined.
      prompt_KL: (tasks, L) prompt tokens of every task.
    """

    def __init__(self, recipe: Recipe, codec: Codec, world: Callable[[], WorldConfig], prompt_KL: Array):
        self.recipe, self.codec, self._world_config, self.prompt_KL = recipe, codec, world, prompt_KL

    @functools.cached_property
    def tuned(self) -> Tuned:
        """The policy as ``dream`` and the learner run it."""
        return adapters.tuned(self.recipe.policy, self.recipe.learner.lora, self.recipe.sft.frozen)

    @functools.cached_property
    def live(self) -> Callable[[Params, Array, Array, float], Imagined]:
        """``live(policy, seed_B, key, temperature)``: a policy in the true simulator, with video."""
        cfg = self.recipe
        world, chunks = tabletop.world(cfg.sim), cfg.sim.horizon // cfg.policy.chunk

        @functools.partial(jax.jit, static_argnums=3)
        def live(policy: Params, seed_B: Array, key: Array, temperature: float) -> Imagined:
            act = vla.policy(cfg.policy, policy, self.codec, temperature)
            start = collect.begin(seed_B, self.prompt_KL, cfg.sim, cfg.world.slots)
            return imagine(act, world, predicate, start, key, chunks=chunks, video=True)

        return live

    def live_batches(
        self, policy: Params, seeds: np.ndarray, key: Array, temperature: float
    ) -> Iterator[tuple[np.ndarray, Imagined]]:
        """``live`` in equal batches of seeds; rows beyond the seeds of a batch are padding."""
        batch = self.recipe.collect.batch
        for low in range(0, len(seeds), batch):
            part = seeds[low : low + batch]
            padded = jnp.asarray(np.resize(part, batch))
            yield part, self.live(policy, padded, jax.random.fold_in(key, low), temperature)

    @functools.cached_property
    def act(self) -> Callable[[Params, Array, Array, Array, Array, float], Array]:
        """``act(policy, frame_BHWC, prompt_BL, key, seed_B, temperature)``: a chunk, for a simulator on the host.

        Frames are uint8. The draws of a row depend on ``key`` and its seed (uint32), not on the batch it is in.
        """
        cfg = self.recipe

        @functools.partial(jax.jit, static_argnums=5)
        def act(policy: Params, frame_BHWC: Array, prompt_BL: Array, key: Array, seed_B: Array, heat: float) -> Array:
            choose = vla.policy(cfg.policy, policy, self.codec, heat)
            return choose(pixels.to_float(frame_BHWC), prompt_BL, _folded(key, seed_B))[2]

        return act

    @functools.cached_property
    def sample(self) -> Callable[[Params, Array, Array, Array, Array], tuple[Array, Array, Array]]:
        """``sample(policy, frame_BHWC, prompt_BL, key, seed_B)``: tokens, log-probabilities and actions of a chunk.

        As ``act`` at the recipe's temperature, for online RL on the host; ``policy`` is of ``tuned.net``.
        """

        @jax.jit
        def sample(policy: Params, frame_BHWC: Array, prompt_BL: Array, key: Array, seed_B: Array) -> Any:
            choose = vla.policy(self.recipe.policy, policy, self.codec, self.recipe.temperature, self.tuned.net)
            return choose(pixels.to_float(frame_BHWC), prompt_BL, _folded(key, seed_B))

        return sample

    @functools.cached_property
    def replay(self) -> Callable[[Params, Params, Start, Array, Array], Imagined]:
        """``replay(world, reward, start, action_BNTA, key)``: recorded actions in the learned world, with video."""

        world_config = self._world_config()  # it may be read from a file, which tracing does not

        @jax.jit
        def replay(world: Params, reward: Params, start: Start, action_BNTA: Array, key: Array) -> Imagined:
            model = world_model.world(world_config, world)
            score = classifier.score(self.recipe.reward, reward)
            return imagine(action_BNTA, model, score, start, key, chunks=action_BNTA.shape[1], video=True)

        return replay

    @functools.cached_property
    def dream(self) -> Callable[[Params, Params, Array], Imagined]:
        """``dream(policy, parts, key)``: the rollouts of one iteration of RL; ``policy`` is of ``tuned.net``.

        ``parts`` holds ``starts``, ``threshold`` and, as ``recipe.dream`` asks for them, the weights
        ``world`` and ``reward`` and the simulator states ``sim`` of the starts.
        """
        cfg = self.recipe
        world_config = None if cfg.dream.world == "true" else self._world_config()

        @jax.jit
        def dream(policy: Params, parts: Params, key: Array) -> Imagined:
            k_draw, k_roll = jax.random.split(key)
            table = parts["starts"]
            row_B = start_states.draw(table, k_draw, cfg.dream.groups, cfg.learner.grpo.group, share=cfg.starts.share)
            start = start_states.gather(table, row_B, self.prompt_KL)
            if "sim" in parts:
                start = dataclasses.replace(start, sim=jax.tree.map(lambda leaf: leaf[row_B], parts["sim"]))
            act = vla.policy(cfg.policy, policy, self.codec, cfg.temperature, self.tuned.net)
            score = classifier.score(cfg.reward, parts["reward"]) if cfg.dream.reward == "learned" else predicate
            world, chunks, threshold = self._world(world_config, parts), cfg.dream.chunks, parts["threshold"]
            return imagine(act, world, score, start, k_roll, chunks=chunks, threshold=threshold)

        return dream

    def states(self, table: Starts) -> Any:
        """The table's own states at start states, for worlds that are the truth."""
        seed_K, played_KSA, step_K = map(jnp.asarray, (table.seed_K, table.played_KSA, table.step_K))
        return tabletop.replay(seed_K, played_KSA, step_K, self.recipe.sim)

    def _world(self, world_config: WorldConfig | None, parts: Params) -> World:
        """The world of ``recipe.dream.world``; without a configuration the true one."""
        true = tabletop.world(self.recipe.sim)
        if world_config is None:
            return true
        model = world_model.world(world_config, parts["world"])
        return model if self.recipe.dream.world == "learned" else shadowed(model, true)


def _folded(key: Array, seed_B: Array) -> Array:
    """A key for each row."""
    return jax.vmap(lambda seed: jax.random.fold_in(key, seed))(seed_B)
