"""The parts of a run as programs on random arrays, at the sizes of a recipe; no network is written here.

What acts, imagines and judges comes from the rooms of the package, what trains from the planner's phases, which are the
programs that a run compiles. Weights are random and never zero: a chip multiplies zeros faster. What a run freezes is
in its compute dtype, what it trains in float32, as its optimizer holds it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.benchmarks.arrays import cast, compute_dtypes, fill, last_name, small_ids
from launch.benchmarks.timing import Part
from wovr_jax.core import sharding
from wovr_jax.core.sharding import MeshConfig
from wovr_jax.imagine import imagine
from wovr_jax.nn.functional import Pure
from wovr_jax.plan import phases
from wovr_jax.plan.phases import Placement
from wovr_jax.policy import train as policy_train
from wovr_jax.policy import vla
from wovr_jax.policy.actions import Codec
from wovr_jax.policy.tokenizer import Tokenizer
from wovr_jax.policy.train import SFTObjective, make_rl_policy
from wovr_jax.reward import classifier
from wovr_jax.run.recipe import Recipe
from wovr_jax.sim.embedded import suite_of
from wovr_jax.train import step as train_step
from wovr_jax.types import ACTION_DIM, Array, Start
from wovr_jax.world import flow
from wovr_jax.world import model as world_model
from wovr_jax.world.model import WorldState

PROMPT = 32
"""Tokens of an instruction of LIBERO, about; the embedded environments are asked for theirs."""
CHUNKS = 256
"""Demonstrated chunks from which a step of supervised fine-tuning draws."""


class Maker:
    """Makes the parts of one recipe.

    Args:
      recipe: sizes and settings; its mesh is left aside, one device is measured.
      store: weights by their shapes, shared by recipes whose networks have the same.
      frozen: the dtype of frozen weights, "compute" for that of their layer's products, or "float32".
    """

    def __init__(self, recipe: Recipe, store: dict[Any, Any], frozen: str = "compute"):
        self.recipe = dataclasses.replace(recipe, mesh=MeshConfig())
        self.store, self.frozen = store, frozen
        self.mesh = sharding.mesh(MeshConfig(), jax.devices()[:1])
        self.frame, self.prompt = (*recipe.frame, 3), prompt_length(recipe)

    def make(self, name: str, batch: int | None) -> Part:
        """Returns a part ready to be compiled; ``batch`` is for those of ``BATCHED`` only."""
        with jax.set_mesh(self.mesh):
            return BATCHED[name](self, batch) if name in BATCHED else WHOLE[name](self)

    # ------------------------------------------------------------ weights and inputs

    def weights(self, net: Pure) -> Any:
        """Returns random weights of a network that is not trained here."""
        shapes = cast(net.shapes(), self._dtypes(net))
        leaves, tree = jax.tree.flatten(shapes)
        key = (tree, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves))
        if key not in self.store:
            self.store[key] = fill(shapes)
        return self.store[key]

    @property
    def rl(self) -> policy_train.RLPolicy:
        """The policy as actor and learner run it, with adapters where the learner trains adapters."""
        return make_rl_policy(self.recipe.policy, self.recipe.learner.lora, self.recipe.sft.frozen)

    @property
    def world(self) -> Any:
        """Weights of the world model."""
        dit, vae = world_model.networks(self.recipe.world)
        return {"dit": self.weights(dit), "vae": self.weights(vae)}

    def _dtypes(self, net: Pure) -> dict[tuple[Any, ...], Any]:
        return compute_dtypes(net) if self.frozen == "compute" else {}

    def _frames(self, *lead: int) -> Array:
        return fill({"frame": jax.ShapeDtypeStruct((*lead, *self.frame), jnp.float32)})["frame"]

    def _latents(self, batch: int, frames: int) -> Array:
        shape = (batch, frames, *phases.latent_size(self.recipe), self.recipe.world.dit.channels)
        return fill({"hwc": jax.ShapeDtypeStruct(shape, jnp.float32)})["hwc"]

    def _actions(self, batch: int, steps: int) -> Array:
        return jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (batch, steps, ACTION_DIM)), jnp.float32)

    # ------------------------------------------------------------ what acts, imagines and judges

    def policy(self, batch: int) -> Part:
        """One frame a row in, a chunk of actions sampled."""
        cfg, net, temperature = self.recipe.policy, self.rl.net, self.recipe.temperature

        @jax.jit
        def act(params: Any, frame_BHWC: Array, prompt_BL: Array, key_B: Array) -> Any:
            return vla.policy(cfg, params, Codec(), temperature, net)(frame_BHWC, prompt_BL, key_B)

        prompt_BL = jnp.asarray(small_ids(batch, self.prompt))
        args = (self.weights(net), self._frames(batch), prompt_BL, jax.random.split(jax.random.key(0), batch))
        return Part("policy", batch, act, args, cfg.llm.dtype)

    def encode(self, batch: int) -> Part:
        """Anchor and memory of each row to latents, all rows at once."""
        cfg, (_, vae) = self.recipe.world, world_model.networks(self.recipe.world)
        program = jax.jit(functools.partial(vae, method="encode"))
        return Part("encode", batch, program, (self.weights(vae), self._frames(batch, 1 + cfg.slots)), cfg.vae.dtype)

    def step(self, batch: int) -> Part:
        """One Euler step of the sampler, what depends on the actions alone made before."""
        cfg, (dit, _) = self.recipe.world, world_model.networks(self.recipe.world)
        once = dataclasses.replace(cfg.flow, steps=1)

        @jax.jit
        def step(params: Any, context: Any, known_Bfhwc: Array, noise_Bfhwc: Array) -> Array:
            def velocity(latent_Bfhwc: Array, time_Bf: Array) -> Array:
                return dit(params, latent_Bfhwc, time_Bf, context=context)

            return flow.euler(velocity, known_Bfhwc, noise_Bfhwc, once)

        params = self.weights(dit)
        shapes = jax.eval_shape(functools.partial(dit, method="context"), params, self._actions(batch, cfg.frames))
        known, new = cfg.context_latents, cfg.latents - cfg.context_latents
        args = (params, fill(shapes), self._latents(batch, known), self._latents(batch, new))
        return Part("step", batch, step, args, cfg.dit.dtype)

    def decode(self, batch: int) -> Part:
        """The latents of a window to its frames, all rows at once."""
        cfg, (_, vae) = self.recipe.world, world_model.networks(self.recipe.world)
        program = jax.jit(functools.partial(vae, method="decode"))
        args = (self.weights(vae), self._latents(batch, cfg.latents))
        return Part("decode", batch, program, args, cfg.vae.dtype, frames=batch * cfg.chunk)

    def imagine_chunk(self, batch: int) -> Part:
        """The world model's chunk: encode, sample, decode."""
        cfg = self.recipe.world

        @jax.jit
        def chunk(params: Any, state: WorldState, action_BTA: Array, key_B: Array) -> Array:
            return world_model.chunk(cfg, params, state, action_BTA, key_B)

        state = WorldState(self._frames(batch), self._frames(batch, cfg.slots), self._actions(batch, cfg.slots))
        keys = jax.random.split(jax.random.key(0), batch)
        args = (self.world, state, self._actions(batch, cfg.chunk), keys)
        return Part("world", batch, chunk, args, cfg.dit.dtype, frames=batch * cfg.chunk)

    def reward(self, batch: int) -> Part:
        """The classifier on the frames of a chunk."""
        cfg = self.recipe.reward
        program = jax.jit(lambda params, frames, task_B: classifier.score(cfg, params)(frames, task_B, None))
        frame_BTHWC = self._frames(batch, self.recipe.world.chunk)
        args = (self.weights(classifier.network(cfg)), frame_BTHWC, jnp.zeros(batch, jnp.int32))
        return Part("reward", batch, program, args, cfg.dtype)

    def chunk(self, batch: int) -> Part:
        """A whole chunk as ``imagine`` plays it: policy, world model, classifier."""
        recipe, rl = self.recipe, self.rl

        @jax.jit
        def play(params: Any, start: Start, key: Array) -> Any:
            act = vla.policy(recipe.policy, params["policy"], Codec(), recipe.temperature, rl.net)
            model = world_model.world(recipe.world, params["world"])
            return imagine(act, model, classifier.score(recipe.reward, params["reward"]), start, key, chunks=1)

        slots, zero = recipe.world.slots, jnp.zeros(batch, jnp.int32)
        start = Start(
            anchor_BHWC=self._frames(batch),
            memory_BMHWC=self._frames(batch, slots),
            action_BMA=self._actions(batch, slots),
            prompt_BL=jnp.asarray(small_ids(batch, self.prompt)),
            task_B=zero,
            keyframe_B=zero > 0,
            step_B=zero,
        )
        params = {"policy": self.weights(rl.net), "world": self.world}
        params["reward"] = self.weights(classifier.network(recipe.reward))
        args = (params, start, jax.random.key(0))
        return Part("chunk", batch, play, args, recipe.world.dit.dtype, frames=batch * recipe.world.chunk)

    # ------------------------------------------------------------ whole programs of a run

    def dream(self) -> Part:
        """The rollouts of one iteration of RL."""
        recipe = self.recipe
        phase = phases.dream(recipe, Placement(self.mesh))
        state, parts, start, key = phase.args
        if recipe.learner.lora is not None:
            state = cast(state, self._dtypes(vla.network(recipe.policy)))
        nets: dict[str, Pure] = {"reward": classifier.network(recipe.reward)}
        nets |= dict(zip(("world/dit", "world/vae"), world_model.networks(recipe.world), strict=True))
        parts = cast(parts, self._below(nets))
        frames = recipe.dream.groups * recipe.learner.grpo.group * recipe.dream.chunks * recipe.world.chunk
        args = fill(self._with_prompts((state, parts, start, key)))
        return Part("dream", None, phase.program, args, recipe.world.dit.dtype, frames=frames)

    def update(self) -> Part:
        """The update of the policy on the rollouts of one iteration, all of which count."""
        recipe = self.recipe
        phase = phases.update(recipe, Placement(self.mesh))
        state, rollouts, key, base = phase.args
        if recipe.learner.lora is not None:
            # Only then do the policy's own weights stay as they are, and need no more digits than they are read with.
            dtypes = self._dtypes(vla.network(recipe.policy))
            state, base = state.replace(params=cast(state.params, dtypes)), cast(base, dtypes)
        args = fill(self._with_prompts((state, rollouts, key, base)))
        return Part("update", None, phase.program, args, recipe.policy.llm.dtype, chains=True)

    def world_step(self) -> Part:
        """A step of the world model's training."""
        recipe = self.recipe
        phase = phases.world(recipe, Placement(self.mesh))
        state, number, fixed, data, key = phase.args
        dit, vae = world_model.networks(recipe.world)
        fixed = cast(fixed, self._dtypes(dit))
        # Pixels that are encoded batch by batch bring the VAE, which is frozen; latents made before do not.
        data = tuple(
            part.replace(vae=cast(part.vae, self._dtypes(vae))) if hasattr(part, "vae") else part for part in data
        )
        args = fill((state, number, fixed, data, key))
        return Part("world_step", None, phase.program, args, recipe.world.dit.dtype, chains=True)

    def sft_step(self) -> Part:
        """A step of supervised fine-tuning."""
        recipe = self.recipe
        objective = SFTObjective(recipe.policy, recipe.sft)
        net = vla.network(recipe.policy)

        def split(params: Any) -> Any:
            fixed, trained = objective.split(params, jax.random.key(0))
            return fixed, train_step.create(objective, trained)

        fixed, state = jax.eval_shape(split, net.shapes())
        fixed = cast(fixed, self._dtypes(net))
        acted = (recipe.policy.chunk, recipe.policy.action_dim)
        columns: dict[str, Any] = {
            "frame_BHWC": jax.ShapeDtypeStruct((CHUNKS, *self.frame), jnp.uint8),
            "token_BTA": jax.ShapeDtypeStruct((CHUNKS, *acted), jnp.int32),
            "prompt_BL": jax.ShapeDtypeStruct((CHUNKS, self.prompt), jnp.int32),
        }
        data = policy_train.Demonstrations(**columns)
        number = jax.ShapeDtypeStruct((), jnp.int32)
        key = jax.eval_shape(lambda: jax.random.key(0))
        args = fill((state, number, fixed, data, key))
        program = train_step.compile_programs(objective).step
        return Part("sft_step", None, program, args, recipe.policy.llm.dtype, chains=True)

    def _below(self, nets: dict[str, Pure]) -> dict[tuple[Any, ...], Any]:
        """Returns the dtypes of several networks, each under its place in a larger tree."""
        pairs = ((place.split("/"), self._dtypes(net)) for place, net in nets.items())
        return {(*place, *path): dtype for place, dtypes in pairs for path, dtype in dtypes.items()}

    def _with_prompts(self, tree: Any) -> Any:
        """Gives prompts their length here; the planner's are generous."""

        def change(path: Any, leaf: Any) -> Any:
            if "prompt" not in last_name(path):
                return leaf
            return jax.ShapeDtypeStruct((*leaf.shape[:-1], self.prompt), leaf.dtype)

        return jax.tree_util.tree_map_with_path(change, tree)


BATCHED: dict[str, Callable[[Maker, Any], Part]] = {
    "policy": Maker.policy,
    "encode": Maker.encode,
    "step": Maker.step,
    "decode": Maker.decode,
    "world": Maker.imagine_chunk,
    "reward": Maker.reward,
    "chunk": Maker.chunk,
}
"""Parts that are measured at any batch."""
WHOLE: dict[str, Callable[[Maker], Part]] = {
    "dream": Maker.dream,
    "update": Maker.update,
    "world_step": Maker.world_step,
    "sft_step": Maker.sft_step,
}
"""Programs of a run whose sizes the settings give."""


def prompt_length(recipe: Recipe) -> int:
    """Returns the tokens of an instruction, begin and padding included."""
    if recipe.libero is not None or (recipe.recorded and recipe.recorded.release):
        return PROMPT
    suite, robot = suite_of(recipe.embedded), recipe.recorded
    words, instructions = (robot.words, robot.instructions) if robot else (suite.name, suite.instructions)
    return getattr(Tokenizer, words)().prompts(instructions).shape[1]
