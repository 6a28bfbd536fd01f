"""Describes the programs of a run and the shapes of what they are given, on a mesh; no number is computed.

They are those that run, taken from where the run takes them (``train.step``, ``run.programs``) and lowered for shapes:
the step that fine-tunes the base policy, the step that trains the world model, the imagination of one iteration of RL,
the update of the policy on it. The size of data sets on the devices follows from the settings: as many episodes as are
collected, each as long as it may be.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wovr_jax import learner
from wovr_jax.core import sharding
from wovr_jax.core.sharding import BATCH, Axes
from wovr_jax.data.batches import HELD_OUT, Layout
from wovr_jax.data.starts import Starts
from wovr_jax.nn import lora
from wovr_jax.nn.functional import narrow
from wovr_jax.policy import vla
from wovr_jax.policy.actions import Codec
from wovr_jax.policy.train import Demonstrations, RLPolicy, SFTObjective, make_rl_policy
from wovr_jax.reward import classifier
from wovr_jax.run import programs
from wovr_jax.run.bind import improvement
from wovr_jax.run.recipe import Recipe
from wovr_jax.train import optimizers
from wovr_jax.train import step as train_step
from wovr_jax.types import ACTION_DIM, Imagined, Params
from wovr_jax.world import dit
from wovr_jax.world import model as world_model
from wovr_jax.world import train as world_train
from wovr_jax.world.latents import HostBatch, Latents
from wovr_jax.world.train import WorldObjective

PROMPT = 64
"""Tokens of a prompt, generously."""


class Phase(NamedTuple):
    """A jitted program and the shapes of what is in memory while it runs.

    Attributes:
      program: of ``args``.
      args: shapes, each with its place on the mesh.
      held: name -> the part of ``args`` that goes by it.
      beside: name -> what the run keeps meanwhile and this program does not read.
      times: how often a whole run runs it.
      chains: whether the program takes its first argument's place with its first result, as a training step does.
    """

    program: Any
    args: tuple[Any, ...]
    held: dict[str, Any]
    beside: dict[str, Any]
    times: int
    chains: bool = True


class Placement:
    """Shapes of what lies on a mesh."""

    def __init__(self, over: Mesh):
        self._over = over

    def place(self, tree: Any, axes: Axes) -> Any:
        """Returns parameters and states, cut as ``axes`` say."""
        where = sharding.shardings(tree, axes, self._over)
        return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), tree, where)

    def rows(self, *shape: int, dtype: Any = jnp.float32) -> Any:
        """Returns a batch, cut along its first axis."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self._over, PartitionSpec(BATCH)))

    def whole(self, tree: Any) -> Any:
        """Returns a copy on every device."""
        return self.place(tree, sharding.WHOLE)

    def key(self) -> Any:
        """Returns a random key."""
        return self.whole(jax.eval_shape(lambda: jax.random.key(0)))


def sft(recipe: Recipe, on: Placement) -> Phase:
    """Describes a step of the base policy's imitation, on every step of the demonstrations."""
    cfg, train = recipe.policy, recipe.sft
    objective = SFTObjective(cfg, train)

    def begin(plain: Params) -> tuple[Params, train_step.TrainState]:
        fixed, trained = objective.split(plain, jax.random.key(0))
        return fixed, train_step.create(objective, trained)

    fixed, state = on.place(jax.eval_shape(begin, vla.network(cfg).shapes()), vla.AXES)
    # A sample begins at every step, and those of the first half chunk are there several times.
    count = recipe.collect.demonstrations * (recipe.steps + (train.early - 1) * cfg.chunk // 2)
    columns = (((*recipe.frame, 3), jnp.uint8), ((cfg.chunk, ACTION_DIM), jnp.int32), ((PROMPT,), jnp.int32))
    data = Demonstrations(*(on.whole(jax.ShapeDtypeStruct((count, *shape), dtype)) for shape, dtype in columns))
    number = on.whole(jax.ShapeDtypeStruct((), jnp.int32))
    held = {"parameters": (state.params, state.ema, fixed), "optimizer": state.opt_state, "data": data}
    program = train_step.compile_programs(objective).step
    return Phase(program, (state, number, fixed, data, on.key()), held, {}, train.steps)


def world(recipe: Recipe, on: Placement) -> Phase:
    """Describes a step of training, on windows of the first collection and the demonstrations."""
    cfg, train = recipe.world, recipe.world_train
    plain = world_model.networks(cfg)[0].shapes()
    objective = WorldObjective(cfg, train, (train.batch,))

    def begin(plain: Params) -> train_step.TrainState:
        return train_step.create(objective, world_train.pick_trained(train, plain, jax.random.key(0)))

    # Shapes alone: the parameters of a full-size network would not fit in the memory of the machine that plans.
    state = on.place(jax.eval_shape(begin, plain), dit.AXES)
    # Adapters learn beside weights that stay, and that the step reads too.
    fixed = None if train.lora is None else on.place(plain, dit.AXES)
    data = _windows(recipe, on)
    number = on.whole(jax.ShapeDtypeStruct((), jnp.int32))
    # Every round after the first refreshes the world model, where the run does at all.
    times = train.steps + recipe.refresh.steps * (recipe.rounds - 1 if recipe.pace and train.steps else 0)
    held = {"parameters": (state.params, state.ema, fixed), "optimizer": state.opt_state, "data": data}
    program = train_step.compile_programs(objective).step
    return Phase(program, (state, number, fixed, (data,), on.key()), held, {}, times)


def dream(recipe: Recipe, on: Placement) -> Phase:
    """Describes the rollouts of one iteration of RL."""
    _, state = _policy(recipe, on)
    parts, table = _parts(recipe, on), _starts(recipe, on)
    world = None if recipe.dream.world == "true" else recipe.world
    rl = improvement(recipe)
    program = programs.dream(rl, Codec(), world)
    _, start = jax.eval_shape(functools.partial(programs.begin, rl), *table.values(), jax.random.key(0))
    start = jax.tree.map(lambda leaf: on.rows(*leaf.shape, dtype=leaf.dtype), start)
    held = {"policy": state.params, **{name: parts[name] for name in sorted(parts)}, "start": start}
    args = (state.params, parts, start, on.key())
    # The optimizer's state waits on the devices for the update that follows, the table for the next iteration.
    beside = {"optimizer": state.opt_state} | table
    return Phase(program, args, held, beside, sum(recipe.dream.updates), chains=False)


def update(recipe: Recipe, on: Placement) -> Phase:
    """Describes the update of the policy on the rollouts of one iteration."""
    cfg = recipe.learner
    network, state = _policy(recipe, on)
    count, chunks = recipe.dream.groups * cfg.grpo.group, recipe.dream.chunks
    acted = (count, chunks, recipe.policy.chunk, ACTION_DIM)
    rollouts = Imagined(
        frame_BNHWC=on.rows(count, chunks, *recipe.frame, 3),
        prompt_BL=on.rows(count, PROMPT, dtype=jnp.int32),
        task_B=on.rows(count, dtype=jnp.int32),
        token_BNTA=on.rows(*acted, dtype=jnp.int32),
        logp_BNTA=on.rows(*acted),
        action_BNTA=on.rows(*acted),
        prob_BNT=on.rows(*acted[:3]),
        success_BNT=on.rows(*acted[:3], dtype=bool),
        # Without a deadline, which leaves the most work.
        keyframe_B=on.rows(count, dtype=bool),
    )
    # The regulariser holds the policy to the base policy, which is then a second set of parameters.
    base = (
        on.place(jax.eval_shape(network.begin, _for_use(recipe), jax.random.key(0)), vla.AXES) if cfg.grpo.kl else None
    )
    program = programs.update(cfg, network.net, recipe.temperature)
    held = {"policy": (state.params, base), "optimizer": state.opt_state, "rollouts": rollouts}
    # World model, judge and start states stay for the next iteration's imagination.
    beside = _parts(recipe, on) | _starts(recipe, on)
    return Phase(program, (state, rollouts, on.key(), base), held, beside, sum(recipe.dream.updates))


PHASES: dict[str, Callable[[Recipe, Placement], Phase]] = {
    "sft": sft,
    "world": world,
    "imagine": dream,
    "update": update,
}


def list_phases(recipe: Recipe) -> list[str]:
    """Returns the names of the phases that a run of this recipe has: what is given is not trained."""
    idle = {"sft": not recipe.sft.steps, "world": not recipe.world_train.steps}
    return [name for name in PHASES if not idle.get(name)]


def _policy(recipe: Recipe, on: Placement) -> tuple[RLPolicy, learner.PolicyState]:
    """Returns the policy as RL runs it, and its state."""
    cfg, frozen = recipe.learner, recipe.sft.frozen
    network = make_rl_policy(recipe.policy, cfg.lora, frozen)

    def begin(plain: Params) -> learner.PolicyState:
        params = network.begin(plain, jax.random.key(0))
        # What is not trained has no moments in the optimizer, which are twice the size of what is.
        fixed = lora.find_frozen(params) if cfg.lora else optimizers.find_frozen(params, *frozen)
        return learner.create(cfg, params, fixed, axes=vla.AXES)

    return network, on.place(jax.eval_shape(begin, vla.network(recipe.policy).shapes()), vla.AXES)


def _for_use(recipe: Recipe) -> Params:
    """Returns the policy as it is held where nothing trains it."""
    return jax.eval_shape(vla.for_use(recipe.policy), vla.network(recipe.policy).shapes())


def _windows(recipe: Recipe, on: Placement) -> Any:
    """Returns what the batches of a first training of the world model are drawn from."""
    cfg, train = recipe.world, recipe.world_train
    vae = world_model.networks(cfg)[1]
    if train.latents in ("fly", "stream"):
        # Held or streamed, pixels are encoded batch by batch; the data set itself stays out of this account.
        frames = on.rows(train.batch, cfg.frames, *recipe.frame, 3, dtype=jnp.uint8)
        held = jax.eval_shape(lambda params: narrow(params, cfg.vae.dtype), vae.shapes())
        return HostBatch(frames, on.rows(train.batch, cfg.frames, ACTION_DIM), on.whole(held), cfg)
    episodes = recipe.collect.first + recipe.collect.demonstrations
    # As the stage cuts them: held-out episodes are no windows to learn from.
    learned = episodes - round(episodes * HELD_OUT)
    starts = Layout(cfg.slots, cfg.chunk, train.start_cap or None, train.stride, partial=True).later(recipe.steps)
    # A window at the start of each episode, and those behind it.
    count, latent = learned * (1 + len(starts)), (cfg.latents, *latent_size(recipe), cfg.dit.channels)

    def whole(*shape: int, dtype: Any = jnp.float32) -> Any:
        return on.whole(jax.ShapeDtypeStruct(shape, dtype))

    columns = (whole(count, *latent), whole(count, cfg.frames, ACTION_DIM), whole(count, dtype=jnp.int32))
    return Latents(*columns, whole(episodes, *latent), learned)


def _starts(recipe: Recipe, on: Placement) -> dict[str, Any]:
    """Returns what the start of an iteration is drawn from, in the order in which ``programs.begin`` takes it."""
    cfg = recipe.world
    # At most as many keyframes as are wanted of every episode of the first collection.
    count = recipe.collect.first * (1 + (recipe.starts.each if recipe.starts.share else 0))

    def column(*shape: int, dtype: Any = jnp.int32) -> Any:
        return on.whole(jax.ShapeDtypeStruct((count, *shape), dtype))

    starts = Starts(
        anchor_KHWC=column(*recipe.frame, 3, dtype=jnp.uint8),
        memory_KMHWC=column(cfg.slots, *recipe.frame, 3, dtype=jnp.uint8),
        action_KMA=column(cfg.slots, ACTION_DIM, dtype=jnp.float32),
        played_KSA=column(recipe.steps, ACTION_DIM, dtype=jnp.float32),
        task_K=column(),
        step_K=column(),
        seed_K=column(),
        init_K=column(),
        episode_K=column(),
        rule_K=column(),
        initials=recipe.collect.first,
    )
    prompts = on.whole(jax.ShapeDtypeStruct((recipe.reward.tasks, PROMPT), jnp.int32))
    states = None
    if recipe.dream.world != "learned":
        states = on.whole(jax.eval_shape(lambda table: programs.true_states(table, recipe.embedded), starts))
    return {"starts": starts, "prompt_KL": prompts, "sim": states}


def _parts(recipe: Recipe, on: Placement) -> dict[str, Any]:
    """Returns what imagination reads besides the policy and its start."""
    cfg = recipe.world
    parts: dict[str, Any] = {"threshold": on.whole(jax.ShapeDtypeStruct((), jnp.float32))}
    # As ``improve`` packs them: only what this world and this judge read.
    if recipe.dream.world != "true":
        transformer, vae = world_model.networks(cfg)
        weights = {"dit": transformer.shapes(), "vae": vae.shapes()}
        held = jax.eval_shape(functools.partial(world_model.for_use, cfg), weights)
        parts["world"] = on.place(held, world_model.AXES)
    if recipe.dream.reward == "learned":
        parts["reward"] = on.whole(classifier.network(recipe.reward).shapes())
    return parts


def latent_size(recipe: Recipe) -> tuple[int, int]:
    """Returns height and width of a frame's latents."""
    vae = world_model.networks(recipe.world)[1]
    pixel_B1HWC = jax.ShapeDtypeStruct((1, 1, *recipe.frame, 3), jnp.float32)
    latent = jax.eval_shape(lambda params, frames: vae(params, frames, method="encode"), vae.shapes(), pixel_B1HWC)
    return latent.shape[2:4]
