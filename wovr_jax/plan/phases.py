"""The programs of a run and the shapes of what they are given, on a mesh; no number is computed.

They are those that run: the step that trains the world model, the imagination of one iteration of RL, the update of the
policy on it. Data sets that lie on the devices too (encoded windows, start states) are left out: their size is
the collection's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wovr_jax import learner
from wovr_jax.core import sharding
from wovr_jax.core.sharding import BATCH, Axes
from wovr_jax.imagine import imagine
from wovr_jax.nn import lora
from wovr_jax.policy import vla
from wovr_jax.policy.actions import Codec
from wovr_jax.policy.train import RLPolicy, make_rl_policy
from wovr_jax.reward import classifier
from wovr_jax.run.recipe import Recipe
from wovr_jax.train import freeze
from wovr_jax.train import step as train_step
from wovr_jax.types import ACTION_DIM, Imagined, Params, Start
from wovr_jax.world import dit
from wovr_jax.world import model as world_model
from wovr_jax.world import train as world_train
from wovr_jax.world.latents import Batch, HostBatch

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


class On:
    """Shapes of what lies on a mesh."""

    def __init__(self, over: Mesh):
        self._over = over

    def placed(self, tree: Any, axes: Axes) -> Any:
        """Parameters and states, cut as ``axes`` say."""
        where = sharding.shardings(tree, axes, self._over)
        return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), tree, where)

    def rows(self, *shape: int, dtype: Any = jnp.float32) -> Any:
        """A batch, cut along its first axis."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self._over, PartitionSpec(BATCH)))

    def whole(self, tree: Any) -> Any:
        """A copy on every device."""
        return self.placed(tree, sharding.WHOLE)

    def key(self) -> Any:
        """A random key."""
        return self.whole(jax.eval_shape(lambda: jax.random.key(0)))


def world(recipe: Recipe, on: On) -> Phase:
    """A step of training; frames come in as pixels where the run encodes them step by step."""
    cfg, train = recipe.world, recipe.world_train
    network, vae = world_model.networks(cfg)
    plain, side, size = network.shapes(), pixels(recipe), train.batch
    objective = world_train.WorldObjective(cfg, train, (size,))
    trained = jax.eval_shape(lambda plain: world_train.pick_trained(train, plain, jax.random.key(0)), plain)
    state = on.placed(jax.eval_shape(lambda params: train_step.create(objective, params), trained), dit.AXES)
    frozen = None if train.lora is None else on.placed(plain, dit.AXES)
    action = on.rows(size, cfg.frames, ACTION_DIM)
    if train.latents in ("fly", "stream"):
        frames = on.rows(size, cfg.frames, side, side, 3, dtype=jnp.uint8)
        given: Any = HostBatch(frames, action, on.whole(vae.shapes()), cfg)
    else:
        given = Batch(on.rows(size, cfg.latents, *latent_size(recipe), cfg.dit.channels), action)

    def step(state: Any, given: Any, frozen: Params | None, key: Any, i: Any) -> Any:
        still = jnp.zeros(size, bool)
        batch = sharding.batch(given.take(jnp.arange(size), still)) if isinstance(given, HostBatch) else given
        return train_step.advance(objective, state, batch, key, i, frozen)

    number = on.whole(jax.ShapeDtypeStruct((), jnp.int32))
    times = train.steps + recipe.refresh.steps * (recipe.rounds - 1 if recipe.pace else 0)
    held = {"parameters": (state.params, state.ema, frozen), "optimizer": state.opt_state, "batch": given}
    return Phase(jax.jit(step, donate_argnums=0), (state, given, frozen, on.key(), number), held, {}, times)


def dream(recipe: Recipe, on: On) -> Phase:
    """The rollouts of one iteration of RL."""
    cfg, side, parts = recipe.world, pixels(recipe), _parts(recipe, on)
    tuned, state = _policy(recipe, on)
    count = recipe.dream.groups * recipe.learner.grpo.group
    start = Start(
        anchor_BHWC=on.rows(count, side, side, 3),
        memory_BMHWC=on.rows(count, cfg.slots, side, side, 3),
        action_BMA=on.rows(count, cfg.slots, ACTION_DIM),
        prompt_BL=on.rows(count, PROMPT, dtype=jnp.int32),
        task_B=on.rows(count, dtype=jnp.int32),
        keyframe_B=on.rows(count, dtype=bool),
        step_B=on.rows(count, dtype=jnp.int32),
    )

    def roll(policy: Params, parts: dict[str, Params], start: Start, key: Any) -> Imagined:
        act = vla.policy(recipe.policy, policy, Codec(), recipe.temperature, tuned.net)
        score = classifier.score(recipe.reward, parts["reward"])
        return imagine(act, world_model.world(cfg, parts["world"]), score, start, key, chunks=recipe.dream.chunks)

    held, beside = {"policy": state.params, **parts, "starts": start}, {"optimizer": state.opt_state}
    return Phase(
        jax.jit(roll), (state.params, parts, start, on.key()), held, beside, sum(recipe.dream.updates), chains=False
    )


def update(recipe: Recipe, on: On) -> Phase:
    """The update of the policy on the rollouts of one iteration."""
    cfg, side = recipe.learner, pixels(recipe)
    tuned, state = _policy(recipe, on)
    count, chunks = recipe.dream.groups * cfg.grpo.group, recipe.dream.chunks
    acted = (count, chunks, recipe.policy.chunk, ACTION_DIM)
    rollouts = Imagined(
        frame_BNHWC=on.rows(count, chunks, side, side, 3),
        prompt_BL=on.rows(count, PROMPT, dtype=jnp.int32),
        task_B=on.rows(count, dtype=jnp.int32),
        token_BNTA=on.rows(*acted, dtype=jnp.int32),
        logp_BNTA=on.rows(*acted),
        action_BNTA=on.rows(*acted),
        prob_BNT=on.rows(*acted[:3]),
        success_BNT=on.rows(*acted[:3], dtype=bool),
    )
    base = state.params if cfg.grpo.kl else None
    program = learner.make_update(cfg, tuned.net, recipe.temperature, vla.AXES)
    held = {"policy": (state.params, base), "optimizer": state.opt_state, "rollouts": rollouts}
    return Phase(program, (state, rollouts, on.key(), base), held, _parts(recipe, on), sum(recipe.dream.updates))


PHASES: dict[str, Callable[[Recipe, On], Phase]] = {"world": world, "imagine": dream, "update": update}


def _policy(recipe: Recipe, on: On) -> tuple[RLPolicy, learner.PolicyState]:
    """The policy as RL runs it, and its state."""
    cfg, frozen = recipe.learner, recipe.sft.frozen
    tuned = make_rl_policy(recipe.policy, cfg.lora, frozen)
    mask = lora.mask if cfg.lora else freeze.all_but(*frozen) if frozen else None

    def begin(plain: Params) -> learner.PolicyState:
        return learner.create(cfg, tuned.begin(plain, jax.random.key(0)), mask, axes=vla.AXES)

    return tuned, on.placed(jax.eval_shape(begin, vla.network(recipe.policy).shapes()), vla.AXES)


def _parts(recipe: Recipe, on: On) -> dict[str, Params]:
    """What imagination reads besides the policy."""
    shapes = jax.eval_shape(lambda: world_model.init(recipe.world, jax.random.key(0)))
    reward = classifier.network(recipe.reward).shapes()
    return {"world": on.placed(shapes, world_model.AXES), "reward": on.whole(reward)}


def latent_size(recipe: Recipe) -> tuple[int, int]:
    """Height and width of a frame's latents."""
    side, vae = pixels(recipe), world_model.networks(recipe.world)[1]
    encode = lambda params: vae(params, jnp.zeros((1, 1, side, side, 3)), method="encode")  # noqa: E731
    return jax.eval_shape(encode, vae.shapes()).shape[2:4]


def pixels(recipe: Recipe) -> int:
    """Height and width of a frame."""
    return recipe.sim.size if recipe.libero is None else recipe.libero.scene.size
