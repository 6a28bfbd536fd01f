"""The recipe taken apart: every stage gets its own settings, and nothing else of it. Nothing is computed here."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace

from wovr_jax.core import keys
from wovr_jax.data.starts import Starts
from wovr_jax.learner import PolicyState
from wovr_jax.policy import vla
from wovr_jax.policy.actions import Codec
from wovr_jax.run import environment, programs
from wovr_jax.run.environment import Environment
from wovr_jax.run.folder import Product, Run
from wovr_jax.run.recipe import Recipe
from wovr_jax.run.stages.episodes import Demonstrations, collect, demonstrate, no_demonstrations
from wovr_jax.run.stages.improve import Imagination, Improvement, begin, improve
from wovr_jax.run.stages.policy import choose_codec, fine_tune, start_policy
from wovr_jax.run.stages.reward import Judge, fit_reward
from wovr_jax.run.stages.starts import choose_starts
from wovr_jax.run.stages.truth import compare, measure
from wovr_jax.run.stages.vae import VAE, open_vae
from wovr_jax.run.stages.world import fit_world, start_world
from wovr_jax.sim.arena import Actor
from wovr_jax.types import Array, Episode, Params
from wovr_jax.weights import native
from wovr_jax.world import model as world_model


@dataclasses.dataclass
class Products:
    """What the loop has made so far. Lists go by rounds; ``policies[0]`` is the base policy."""

    demonstrations: Product[Demonstrations] = dataclasses.field(default_factory=no_demonstrations)
    vae: Product[VAE] | None = None
    policies: list[Product[Params]] = dataclasses.field(default_factory=list)
    rollouts: list[Product[Sequence[Episode]]] = dataclasses.field(default_factory=list)
    worlds: list[Product[Params]] = dataclasses.field(default_factory=list)
    rewards: list[Product[Judge]] = dataclasses.field(default_factory=list)
    starts: list[Product[Starts]] = dataclasses.field(default_factory=list)


def bind_stages(recipe: Recipe, run: Run, made: Products) -> SimpleNamespace:
    """Gives every stage its own settings, and nothing else of the recipe; nothing is computed."""
    check_weights(recipe)
    env, key = open_environment(recipe), functools.partial(keys.key, recipe.seed)
    arena, prompt_KL, memory = env.arena, env.prompt_KL, recipe.world.slots
    folder, lazily = assets_folder(recipe), recipe.world_train.latents == "stream"
    codec = functools.cache(lambda: choose_codec(env, made.demonstrations))
    start = functools.partial(start_policy, recipe.policy, recipe.policy_weights, recipe.towers, folder, key)
    start_dit = functools.partial(start_world, recipe.world, recipe.world_weights, key)
    rl = choose_improvement(recipe)
    acting = programs.acting(recipe.policy, rl.network.net, codec, prompt_KL, recipe.temperature, recipe.sim, memory)

    def act(round_: int, purpose: str, temperature: float = recipe.temperature) -> Actor:
        """The policy of a round on its way to the true environment; it samples as in training unless told otherwise."""
        name = f"grpo-{round_}" if round_ else "base"
        return Actor(acting, lambda: made.policies[round_].value, key(purpose), temperature, name)

    def measure_policy(round_: int) -> Product[None]:
        return measure(run, round_, arena, recipe.evaluate, act(round_, "evaluate"), act(round_, "evaluate", 0.0))

    def compare_policy(round_: int) -> Product[None]:
        """In the newest world: the one that taught the policy, or the one that was refreshed for it."""
        assert made.vae is not None
        learned = (made.vae, made.worlds[-1], made.rewards[-1])
        where = (arena, recipe.evaluate, act(round_, "evaluate"), recipe.reward)
        return compare(run, round_, len(made.worlds) - 1, *where, *learned, key)

    def improve_policy(round_: int) -> Product[Params]:
        imagination = newest_imagination(recipe, made, prompt_KL, codec)
        return improve(run, round_, rl, made.policies, imagination, arena, acting, key)

    def begin_round(round_: int, round_key: Array) -> tuple[PolicyState, Callable]:
        """The learner's first state and step of a round, for whoever takes the steps by hand."""
        imagination = newest_imagination(recipe, made, prompt_KL, codec)
        return begin(round_, rl, made.policies, imagination, arena, acting, round_key, key)

    return SimpleNamespace(
        environment=env,
        codec=codec,
        act=act,
        explore=arena.explore if recipe.dream.world == "true" else None,
        demonstrate=functools.partial(demonstrate, run, arena, recipe.collect, key, lazily=lazily),
        fine_tune=functools.partial(fine_tune, run, recipe.policy, recipe.sft, start, codec, prompt_KL, key),
        collect=functools.partial(collect, run, arena, recipe.collect, lazily=lazily),
        open_vae=functools.partial(open_vae, run, recipe.world, recipe.vae, folder, recipe.vae_train),
        fit_world=functools.partial(fit_world, run, recipe.world_train, recipe.refresh, start_dit, prompt_KL, key),
        fit_reward=functools.partial(
            fit_reward, run, recipe.reward, recipe.reward_train, recipe.collect, prompt_KL, arena.steps, key
        ),
        choose_starts=functools.partial(choose_starts, run, recipe.starts, memory, recipe.seed),
        measure=measure_policy,
        compare=compare_policy,
        improve=improve_policy,
        begin=begin_round,
    )


def choose_improvement(recipe: Recipe) -> Improvement:
    """The settings of reinforcement learning."""
    return Improvement(
        recipe.dream,
        recipe.learner,
        recipe.starts.share,
        recipe.temperature,
        recipe.sft.frozen,
        recipe.policy,
        recipe.reward,
        recipe.sim,
    )


def newest_imagination(recipe: Recipe, made: Products, prompt_KL: Array, codec: Callable[[], Codec]) -> Imagination:
    """What rollouts are made of: the newest of each product; what a true world does not need is left out."""
    reads_world, reads_reward = recipe.dream.world != "true", recipe.dream.reward == "learned"
    return Imagination(
        prompt_KL,
        codec,
        starts=made.starts[-1] if made.starts else None,
        vae=made.vae if reads_world else None,
        world=made.worlds[-1] if reads_world else None,
        reward=made.rewards[-1] if reads_reward else None,
    )


def open_environment(recipe: Recipe) -> Environment:
    """The true environment of a recipe."""
    how = {"seed": recipe.seed, "batch": recipe.collect.batch, "memory": recipe.world.slots}
    if recipe.libero is None:
        return environment.open_table(recipe.sim, recipe.expert, **how)
    return environment.open_libero(recipe.libero, recipe.policy, **how)


def assets_folder(recipe: Recipe) -> pathlib.Path:
    """Where the pretrained parts lie."""
    return pathlib.Path(recipe.assets) if recipe.assets else native.FOLDER


def check_weights(recipe: Recipe) -> None:
    """Misses weights that are not there before hours are spent on the way to them.

    Raises:
      ConfigError: weights to start from are missing.
      FileError: there is no such pretrained VAE.
    """
    networks = {"policy_weights": vla.network(recipe.policy), "world_weights": world_model.networks(recipe.world)[0]}
    for setting, network in networks.items():
        if where := getattr(recipe, setting):
            native.check_weights(setting, where, network.shapes())
    if recipe.vae:
        native.describe(assets_folder(recipe) / f"{recipe.vae}.json")
