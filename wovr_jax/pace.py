"""PACE: the policy and the world model co-evolve (WoVR, Algorithm 1 and section 4.3).

::

    demonstrations -> base policy
    each round:  collect true episodes -> world model -> success classifier -> start states
                 -> improve the policy in imagination -> ask the truth

:func:`pace` is the algorithm, in the order in which it happens. Each call is a stage of ``run/stages/``: made once,
kept in the run folder, and passed over when the same command goes on. A product is loaded when it is first used, so
a run that is resumed does not read what it does not need.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from wovr_jax.core import config, history, keys, machine, processes, sharding
from wovr_jax.core.disk import write_json
from wovr_jax.data.starts import Starts
from wovr_jax.policy import vla
from wovr_jax.report import page
from wovr_jax.report.results import Results, summarize
from wovr_jax.run import environment, programs
from wovr_jax.run.environment import Environment
from wovr_jax.run.folder import Product, Run
from wovr_jax.run.recipe import Recipe
from wovr_jax.run.stages.episodes import Demonstrations, collect, demonstrate, no_demonstrations
from wovr_jax.run.stages.improve import Imagination, Improvement, improve
from wovr_jax.run.stages.policy import choose_codec, fine_tune, start_policy
from wovr_jax.run.stages.reward import Judge, fit_reward
from wovr_jax.run.stages.starts import choose_starts
from wovr_jax.run.stages.truth import compare, measure
from wovr_jax.run.stages.vae import VAE, open_vae
from wovr_jax.run.stages.world import fit_world, start_world
from wovr_jax.sim.arena import Actor
from wovr_jax.types import Episode, Params
from wovr_jax.weights import native
from wovr_jax.world import model as world_model


@dataclasses.dataclass(frozen=True)
class Job:
    """How far a run goes, and what it measures on the way.

    Attributes:
      until: the last stage; empty for all of them.
      measured: policies whose true success is measured, by their round; None for every one.
      compares: whether each policy is played in the world model too.
    """

    until: str = ""
    measured: tuple[int, ...] | None = None
    compares: bool = True


JOBS = {
    "pace": Job(),
    "sft": Job("evaluate-0", compares=False),
    "collect": Job("collect-0", (), compares=False),
    "world_model": Job("world-0", (), compares=False),
    "reward": Job("reward-0", (), compares=False),
    "grpo": Job("evaluate-1", compares=False),
    "online_grpo": Job("evaluate-1", compares=False),
}


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


def pace(recipe: Recipe, run: Run, job: Job = JOBS["pace"]) -> Products:
    """Runs Algorithm 1 and returns what it made.

    Args:
      recipe: the settings of all stages.
      run: the open run folder.
      job: how far to go, and what to measure on the way.

    Raises:
      ConfigError: weights that are not there, or of another network.
      RunError: a job whose last stage these settings do not have.
    """
    made = Products()
    do = bind_stages(recipe, run, made)
    # Online RL needs no learned world, unless the policy is to be seen in it; without keyframes it needs layouts only,
    # and its whole budget is for the learner.
    online = recipe.dream.world == "true" and not recipe.starts.share
    judges = job.compares or recipe.dream.reward == "learned"
    imagines = judges or recipe.dream.world != "true"

    with run.stop_after(job.until):
        made.demonstrations = do.demonstrate()
        made.policies += [do.fine_tune(made.demonstrations)]
        if job.measured is None or 0 in job.measured:
            do.measure(0)

        for round_ in range(recipe.rounds):
            # The policy shows where it is now, and what imagination is made of catches up with it.
            if round_ == 0 or recipe.pace:
                if imagines or not online:
                    made.rollouts += [do.collect(round_, do.act(round_, f"collect-{round_}"))]
                if imagines:
                    made.vae = made.vae or do.open_vae(made.demonstrations)
                    made.worlds += [do.fit_world(round_, made.vae, made.worlds, made.rollouts, made.demonstrations)]
                if judges:
                    learned = (made.vae, made.worlds[-1])
                    made.rewards += [do.fit_reward(round_, *learned, made.rollouts, made.demonstrations)]
                if do.explore is None:
                    made.starts += [do.choose_starts(round_, [] if online else made.rollouts, made.demonstrations)]
                if job.compares:
                    do.compare(round_)

            # Imagine from the newest start states in the newest world, update the policy, and again.
            made.policies += [do.improve(round_)]

            # Ask the truth how good it is now, and whether the world that taught it was honest.
            if job.measured is None or round_ + 1 in job.measured:
                do.measure(round_ + 1)
            if job.compares:
                do.compare(round_ + 1)
    return made


def bind_stages(recipe: Recipe, run: Run, made: Products) -> SimpleNamespace:
    """Gives every stage its own settings, and nothing else of the recipe; nothing is computed."""
    check_weights(recipe)
    env, key = open_environment(recipe), functools.partial(keys.key, recipe.seed)
    arena, prompt_KL, memory = env.arena, env.prompt_KL, recipe.world.slots
    folder, lazily = assets_folder(recipe), recipe.world_train.latents == "stream"
    codec = functools.cache(lambda: choose_codec(env, made.demonstrations))
    start = functools.partial(start_policy, recipe.policy, recipe.policy_weights, recipe.towers, folder, key)
    start_dit = functools.partial(start_world, recipe.world, recipe.world_weights, key)
    rl = Improvement(
        recipe.dream,
        recipe.learner,
        recipe.starts.share,
        recipe.temperature,
        recipe.sft.frozen,
        recipe.policy,
        recipe.reward,
        recipe.sim,
    )
    acting = programs.acting(recipe.policy, rl.tuned.net, codec, prompt_KL, recipe.temperature, recipe.sim, memory)

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
        """With what is newest; what a true world does not need is left out."""
        reads_world, reads_reward = recipe.dream.world != "true", recipe.dream.reward == "learned"
        imagination = Imagination(
            prompt_KL,
            codec,
            starts=made.starts[-1] if made.starts else None,
            vae=made.vae if reads_world else None,
            world=made.worlds[-1] if reads_world else None,
            reward=made.rewards[-1] if reads_reward else None,
        )
        return improve(run, round_, rl, made.policies, imagination, arena, acting, key)

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


def run(job: str, settings: Mapping[str, Any], folder: str | os.PathLike, *, allow_change: bool = False) -> Results:
    """Runs a job in a run folder and returns ``results.json``.

    Args:
      job: a name in ``JOBS``.
      settings: a plain dictionary, see ``run.recipe.Recipe``.
      folder: the run folder; the same settings continue what is there.
      allow_change: whether other settings may go on in it, see ``run.folder.Run``.

    Raises:
      ConfigError: settings that do not fit, an unknown job.
      RunError: a folder that holds something else.
      ShardingError: a mesh that the devices cannot form, or on which a network cannot lie.
    """
    if job not in JOBS:
        raise config.ConfigError(f"config.job: expected one of {', '.join(JOBS)}, got {job!r}.")
    recipe, begin = config.from_dict(Recipe, settings), time.perf_counter()
    with sharding.use(recipe.mesh), history.use(recipe.checkpoints):
        opened = Run(folder, config.to_dict(recipe), allow_change=allow_change)
        machine.enable_compile_cache(opened.folder.parent / ".jax_cache")
        pace(recipe, opened, JOBS[job])
        results = summarize_run(recipe, opened, time.perf_counter() - begin)
    opened.log.close()
    write_json(opened.folder / "results.json", results)
    if processes.first():
        page.write(opened.folder)
    return results


def summarize_run(recipe: Recipe, run: Run, seconds: float) -> Results:
    """``results.json``: phases in order, verdicts, rewards, keyframes, ledger, machine."""
    about = {name: getattr(recipe, name) for name in ("name", "job", "seed", "rounds", "pace")}
    return summarize(about | {"online": recipe.dream.world == "true"}, run.facts, run.ledger().to_dict(), seconds)
