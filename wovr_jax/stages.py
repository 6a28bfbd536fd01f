"""The stages of PACE as a dependency graph: ask for a product, and what it needs is made first.

Every method below is one product, made once, kept in the run folder and loaded from there.
Round 0 is the base policy; round k is the policy after k rounds of imagined RL.

    demonstrations -> policy(0) -> collected(0) -> world(0), reward(0), starts(0) -> policy(1)
                                   collected(1) -> world(1), reward(1), starts(1) -> policy(2) ...
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax import assets, checkpoint, evaluate, imagine, learner, loop, metrics, runtime
from wovr_jax.data import batches, normalize
from wovr_jax.data import episodes as disk
from wovr_jax.data import starts as start_states
from wovr_jax.policy import train as sft
from wovr_jax.policy import vla
from wovr_jax.policy.actions import Codec
from wovr_jax.policy.tokenizer import Tokenizer
from wovr_jax.recipe import Recipe
from wovr_jax.reward import classifier
from wovr_jax.reward import train as reward_training
from wovr_jax.run import Run
from wovr_jax.sim import collect, tabletop
from wovr_jax.types import Array, Episode, Imagined, Start, World
from wovr_jax.world import model as world_model
from wovr_jax.world import train as world_training

Params = dict[str, Any]
SPAN = 10_000_000
"""Layout seeds of one run: its demonstrations, collections and evaluation lie in disjoint parts of this range."""


class Stages:
    """The products of one run.

    Args:
      recipe: the settings.
      run: the open run folder.
    """

    def __init__(self, recipe: Recipe, run: Run):
        self.recipe, self.run = recipe, run
        self.prompt_KL = jnp.asarray(Tokenizer.tabletop().prompts(tabletop.INSTRUCTIONS))

    def key(self, *names: str | int) -> Array:
        return runtime.key(self.recipe.seed, *names)

    def layouts(self, purpose: str, count: int) -> np.ndarray:
        """Reset seeds, disjoint between purposes and between runs of different seeds."""
        if purpose == "evaluate":
            low = SPAN - 1_000_000
        elif purpose == "demonstrations":
            low = 0
        else:
            low = 1_000_000 * (1 + int(purpose.removeprefix("collect-")))
        return self.recipe.seed * SPAN + low + np.arange(count, dtype=np.int32)

    # --- data and base policy ---------------------------------------------------------------

    @functools.cached_property
    def demonstrations(self) -> list[Episode]:
        """Scripted episodes, a share of them flawed."""
        cfg = self.recipe

        def make(folder: pathlib.Path) -> dict[str, Any]:
            seeds = self.layouts("demonstrations", cfg.collect.demonstrations)
            made = collect.demonstrations(seeds, self.key("demonstrations"), cfg.expert, cfg.sim)
            facts = disk.write(folder / "episodes", made, meta={"sim": "tabletop"}, overwrite=True)
            return {"episodes": facts["episodes"], "successes": facts["successes"]}

        return self.run.stage("demonstrations", make, lambda folder: disk.read(folder / "episodes"))

    @functools.cached_property
    def codec(self) -> Codec:
        """Between environment actions and tokens, from the demonstrations' statistics."""
        return Codec.from_statistics(normalize.statistics(self.demonstrations, "tabletop")["tabletop"]["action"])

    @functools.cached_property
    def fresh_policy(self) -> Params:
        """Random weights with the pretrained vision towers put in."""
        params = vla.network(self.recipe.policy).init(self.key("policy"))
        return params | {part: assets.load_asset(name)[1] for part, name in zip(("dino", "siglip"), self.recipe.towers)}

    @functools.cache
    def policy(self, round_: int) -> Params:
        """The policy after ``round_`` rounds of imagined RL; 0 is the base policy."""
        make = self._make_base if round_ == 0 else functools.partial(self._make_policy, round_)
        name = "sft" if round_ == 0 else f"grpo-{round_}"
        return self.run.stage(name, make, lambda folder: checkpoint.restore(folder / "policy", self.fresh_policy))

    def _make_base(self, folder: pathlib.Path) -> dict[str, Any]:
        cfg = self.recipe
        chunks = batches.sft_chunks(self.demonstrations, cfg.policy.chunk, prompt_KL=np.asarray(self.prompt_KL))
        data = sft.demonstrations(chunks, self.codec, self.prompt_KL)
        state, step = sft.make(cfg.policy, cfg.sft, self.fresh_policy, data, self.key("sft"))
        state = loop.fit("sft", state, step, cfg.sft.steps, log=self.run.log, folder=folder)
        checkpoint.save(folder / "policy", state.params)
        return {"chunks": len(chunks["task_B"])}

    # --- the true simulator -----------------------------------------------------------------

    @functools.cached_property
    def _live(self) -> Callable[[Params, Array, Array, float], Imagined]:
        """One compiled rollout in the true simulator, for collection and evaluation alike."""
        cfg = self.recipe
        world, chunks = tabletop.world(cfg.sim), cfg.sim.horizon // cfg.policy.chunk

        @functools.partial(jax.jit, static_argnums=3)
        def live(params: Params, seed_B: Array, key: Array, temperature: float) -> Imagined:
            act = vla.policy(cfg.policy, params, self.codec, temperature)
            start = collect.begin(seed_B, self.prompt_KL, cfg.sim, cfg.world.memory)
            return imagine.imagine(act, world, imagine.predicate, start, key, chunks=chunks, video=True)

        return live

    def _rollouts(self, params: Params, seeds: np.ndarray, key: Array, temperature: float) -> Iterator[tuple[np.ndarray, Imagined]]:
        """True rollouts in equal batches; the padding of the last one is for the caller to drop."""
        batch = self.recipe.collect.batch
        for low in range(0, len(seeds), batch):
            part = seeds[low : low + batch]
            yield part, self._live(params, jnp.asarray(np.resize(part, batch)), jax.random.fold_in(key, low), temperature)

    @functools.cache
    def collected(self, round_: int) -> list[Episode]:
        """True rollouts of the policy of ``round_``; the only true steps that training consumes."""
        cfg = self.recipe
        name = f"collect-{round_}"
        actor = "base" if round_ == 0 else f"grpo-{round_}"

        def make(folder: pathlib.Path) -> dict[str, Any]:
            count = cfg.collect.first if round_ == 0 else cfg.collect.again
            rollouts = self._rollouts(self.policy(round_), self.layouts(name, count), self.key(name), cfg.temperature)
            made = (episode for seeds, rollout in rollouts for episode in collect.episodes(rollout, seeds, actor))
            facts = disk.write(folder / "episodes", made, meta={"sim": "tabletop"}, overwrite=True)
            steps = count * cfg.sim.horizon
            return {"episodes": count, "successes": facts["successes"], "true_steps": steps}

        self.policy(round_)
        return self.run.stage(name, make, lambda folder: disk.read(folder / "episodes"))

    def _pool(self, round_: int) -> list[Episode]:
        """Every true rollout so far."""
        return [episode for k in range(round_ + 1) for episode in self.collected(k)]
