"""The recipe taken apart: every stage gets its own settings, and nothing else of it. Nothing is computed here."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

from wovr_jax.core import keys
from wovr_jax.core.config import ConfigError
from wovr_jax.data import normalize
from wovr_jax.data.starts import Starts
from wovr_jax.policy import vla
from wovr_jax.policy.actions import Codec
from wovr_jax.policy.tokenizer import ReleaseTokenizer, Tokenizer
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.reward import classifier
from wovr_jax.run import programs
from wovr_jax.run.folder import Product, Run
from wovr_jax.run.programs import Improvement
from wovr_jax.run.recipe import DreamConfig, Recipe
from wovr_jax.run.stages.episodes import Demonstrations, collect, demonstrate, measure, no_demonstrations
from wovr_jax.run.stages.improve import Gate, Imagination, improve
from wovr_jax.run.stages.policy import fine_tune, fit_codec, start_policy
from wovr_jax.run.stages.reward import Judge, fit_reward, start_reward
from wovr_jax.run.stages.starts import choose_starts, read_starts
from wovr_jax.run.stages.vae import VAE, count_pretraining, open_vae
from wovr_jax.run.stages.world import fit_world, start_world
from wovr_jax.sim.arena import Acting, Actor, Arena, layouts
from wovr_jax.sim.embedded import Embedded, begin_episodes, suite_of
from wovr_jax.sim.recorded.arena import Recorded
from wovr_jax.types import Array, Episode, Params
from wovr_jax.weights import native
from wovr_jax.world import model as world_model


@dataclasses.dataclass(frozen=True)
class Environment:
    """The true environment and what a policy has to know of it.

    Attributes:
      arena: the environment.
      prompt_KL: (tasks, L) int32 prompt tokens of every instruction, on the device.
      codec: of a released policy; None where the demonstrations' statistics say what actions are like.
    """

    arena: Arena
    prompt_KL: Array
    codec: Codec | None


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

    def release(self) -> None:
        """Gives up the networks that were read: each stage reads its own anew, and no idle one lies on the devices."""
        for product in (*self.policies, *self.worlds, *self.rewards):
            product.release()


OpenGate = Callable[[Products], Gate] | None
"""``gate(made)``: what looks at the rollouts of the newest world before the policy is paid for them; None: nothing."""


def bind_stages(recipe: Recipe, run: Run, made: Products, gate: OpenGate = None) -> SimpleNamespace:
    """Gives every stage its own settings, and nothing else of the recipe; nothing is computed.

    What a caller still has to say is what the loop decides: the round, and the products that a stage begins with.
    """
    # Missing weights are told of here, hours before the stage that would read them.
    check_weights(recipe)
    # Every draw of a run has a key of its own, by name and not by turn: a stage that is passed over, because it is
    # finished, must not shift what the stages after it draw.
    env, key = open_environment(recipe, run.folder), functools.partial(keys.key, recipe.seed)
    arena, prompt_KL, memory = env.arena, env.prompt_KL, recipe.world.slots
    # Episodes that a training streams are larger than memory, so no other stage may take them there either.
    folder, lazily = assets_folder(recipe), recipe.world_train.latents == "stream"
    # Its statistics are read off the demonstrations, which need not be loaded before somebody acts.
    codec = functools.cache(lambda: env.codec or fit_codec(arena.name, made.demonstrations))
    start = functools.partial(start_policy, recipe.policy, recipe.policy_weights, recipe.towers, folder, key)
    start_dit = functools.partial(start_world, recipe.world, recipe.world_weights, key)
    # Read once, for every round scores with it where it is not trained.
    start_judge = functools.cache(
        functools.partial(start_reward, recipe.reward, recipe.reward_weights, arena.instructions, key)
    )
    judge = (recipe.reward, recipe.reward_train, start_judge)
    # Both now, hours before the first rollout: whether they fit is known when they are read.
    given = open_starts(recipe, arena)
    if recipe.reward_weights:
        start_judge()
    rl = improvement(recipe)
    acting = programs.acting(
        recipe.policy, rl.network.net, codec, prompt_KL, recipe.temperature, recipe.embedded, memory
    )
    imagination = functools.partial(newest, recipe.dream, made, env, codec, acting, gate)

    # What follows asks ``made`` when it is called: the loop goes on adding to it.
    def act(round_: int, purpose: str, temperature: float = recipe.temperature) -> Actor:
        """The policy of a round on its way to the true environment; it samples as in training unless told otherwise."""
        # Episodes remember who acted, and the report tells policies apart by it.
        name = f"grpo-{round_}" if round_ else "base"
        return Actor(acting, lambda: made.policies[round_].value, key(purpose), temperature, name)

    return SimpleNamespace(
        env=env,
        codec=codec,
        act=act,
        count_pretraining=functools.partial(count_pretraining, run, list_given(recipe)),
        begin=functools.partial(begin_online, recipe),
        explore=arena.explore if recipe.dream.world == "true" else None,
        demonstrate=functools.partial(demonstrate, run, arena, recipe.collect, key, lazily=lazily),
        fine_tune=functools.partial(fine_tune, run, recipe.policy, recipe.sft, start, codec, prompt_KL, key),
        collect=functools.partial(collect, run, arena, recipe.collect, lazily=lazily),
        open_vae=functools.partial(open_vae, run, recipe.world, recipe.vae, folder, recipe.vae_train),
        fit_world=functools.partial(fit_world, run, recipe.world_train, recipe.refresh, start_dit, prompt_KL, key),
        fit_reward=functools.partial(fit_reward, run, *judge, recipe.collect, prompt_KL, arena.steps, key),
        choose_starts=functools.partial(
            choose_starts, run, recipe.starts, given, memory, arena.steps, recipe.seed, arena.instructions
        ),
        # A robot is measured greedily alone, as it is used: its episodes are a person's time.
        measure=functools.partial(
            measure, run, arena, recipe.evaluate, 0.0 if recipe.recorded else recipe.temperature, act
        ),
        improve=functools.partial(improve, run, rl, made.policies, imagination, key),
    )


def list_given(recipe: Recipe) -> list[pathlib.Path]:
    """Where the networks that a run begins with lie: pretrained parts, and weights from outside."""
    # A policy that begins with weights of its own brings its towers.
    parts = filter(None, [recipe.vae, *(() if recipe.policy_weights else recipe.towers)])
    weights = filter(None, [recipe.policy_weights, recipe.world_weights, recipe.reward_weights])
    return [*(assets_folder(recipe) / f"{part}.json" for part in parts), *map(native.locate, weights)]


def open_starts(recipe: Recipe, arena: Arena) -> Starts | None:
    """The start states from outside that a recipe names, if it does; see ``run.stages.starts.read_starts``."""
    fits = (recipe.starts.share, recipe.world.slots, recipe.frame, arena.instructions)
    return read_starts(recipe.start_states, *fits, followed=bool(recipe.libero and recipe.evaluate.closed))


def begin_online(recipe: Recipe) -> Product[Sequence[Episode]]:
    """Layouts for online RL, as many as it has groups: demonstrations are few where a base policy is to fail."""
    seeds = layouts(recipe.seed, "online", max(sum(recipe.dream.updates), 1) * recipe.dream.groups)
    return Product(lambda: begin_episodes(seeds, recipe.embedded))


def improvement(recipe: Recipe) -> Improvement:
    """What reinforcement learning has to know of a recipe."""
    return Improvement(
        # Whatever steps on the host, or nowhere, cannot follow a compiled program.
        dataclasses.replace(recipe.dream, watch=0) if recipe.outside else recipe.dream,
        recipe.learner,
        recipe.starts.share,
        recipe.temperature,
        recipe.sft.frozen,
        recipe.policy,
        recipe.reward,
        recipe.embedded,
        recipe.steps if recipe.starts.deadline else None,
    )


def newest(
    dream: DreamConfig, made: Products, env: Environment, codec: Callable[[], Codec], acting: Acting, gate: OpenGate
) -> Imagination:
    """The newest of what imagination is made of; what a true world does not need is left out."""
    # A product that is left out is never loaded: online RL holds no world model in memory.
    reads_world, reads_reward = dream.world != "true", dream.reward == "learned"
    return Imagination(
        env.arena,
        acting,
        env.prompt_KL,
        codec,
        starts=made.starts[-1] if made.starts else None,
        vae=made.vae if reads_world else None,
        world=made.worlds[-1] if reads_world else None,
        reward=made.rewards[-1] if reads_reward else None,
        gate=gate and gate(made),
    )


def assets_folder(recipe: Recipe) -> pathlib.Path:
    """Where the pretrained parts lie."""
    return pathlib.Path(recipe.assets).expanduser() if recipe.assets else native.FOLDER


def open_environment(recipe: Recipe, folder: pathlib.Path = pathlib.Path()) -> Environment:
    """Opens the true environment of a recipe: an embedded simulator, LIBERO, or what is recorded of a robot.

    Args:
      recipe: the settings.
      folder: of the run, into which policies for a robot are exported.

    Raises:
      LiberoError: LIBERO is not installed, or a task that the suite does not have.
      ConfigError: a policy whose vocabulary is not that of the instructions.
      ShardingError: several processes whose devices do not suit simulators of their own, see ``sim.libero.actors``.
    """
    cfg, policy, robot = recipe.libero, recipe.policy, recipe.recorded
    how = {"seed": recipe.seed, "batch": recipe.collect.batch, "memory": recipe.world.slots}
    if cfg is None:
        suite = suite_of(recipe.embedded)
        asked = (robot.words, robot.instructions, robot.release) if robot else (suite.name, suite.instructions, "")
        prompt_KL = jnp.asarray(read_words(policy, *asked))
        if robot:
            return Environment(Recorded(robot, folder), prompt_KL, None)
        return Environment(Embedded(recipe.embedded, recipe.expert, **how, prompt_KL=prompt_KL), prompt_KL, None)
    # Imported here, so that whoever runs an embedded one need not have LIBERO.
    from wovr_jax.sim.libero import actors
    from wovr_jax.sim.libero import arena as libero

    prompt_KL = read_words(policy, "libero", libero.instructions(cfg.suite), cfg.release)
    arena = libero.Libero(cfg, chunk=policy.chunk, prompt_KL=prompt_KL, **how)
    # What would end the run hours later: trials that are not distinct, and a mesh that does not allow each process to
    # step simulators of its own.
    arena.check_evaluation(recipe.evaluate.episodes)
    actors.check_mesh(vla.network(policy).shapes(), vla.AXES)
    # A released policy knows what its actions are like.
    scale = normalize.load(cfg.release, cfg.suite)["action"] if cfg.release else None
    return Environment(arena, jnp.asarray(prompt_KL), scale and Codec.from_statistics(scale))


def read_words(policy: VLAConfig, name: str, instructions: Sequence[str], release: str = "") -> np.ndarray:
    """Prompts in the words of a released policy's folder, or else in the package's own of that name.

    Raises:
      ConfigError: a policy that reads other words.
    """
    if release:
        words = ReleaseTokenizer(release, policy.vocab_size, stop=policy.stop, pad=policy.pad)
        # RLinf pads to 128 tokens, which the network masks: a fifth of its work for nothing.
        words.length = max(len(words.encode(text)) for text in instructions)
        return words.prompts(tuple(instructions))
    words, own = getattr(Tokenizer, name)(), "'libero_small', or name its tokenizer's folder: libero/recorded.release"
    if (policy.vocab_size, policy.pad) != (words.vocab_size, words.pad):
        raise ConfigError(
            f"config.policy: vocab_size {policy.vocab_size} and pad {policy.pad} are not those of the environment's "
            f"words, {words.vocab_size} and {words.pad}; use size={own if name == 'libero' else repr(name)}"
        )
    return words.prompts(tuple(instructions))


def check_weights(recipe: Recipe) -> None:
    """Misses weights that are not there before hours are spent on the way to them.

    Raises:
      ConfigError: weights to start from are missing.
      FileError: there is no such pretrained VAE.
    """
    # By shapes alone: no weights are read, and no network is made.
    networks = {
        "policy_weights": vla.network(recipe.policy),
        "world_weights": world_model.networks(recipe.world)[0],
        "reward_weights": classifier.network(recipe.reward),
    }
    for setting, network in networks.items():
        if where := getattr(recipe, setting):
            native.check_weights(setting, where, network.shapes())
    if recipe.vae:
        native.describe(assets_folder(recipe) / f"{recipe.vae}.json")
