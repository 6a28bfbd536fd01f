"""The stages of PACE as a dependency graph: ask for a product, and what it needs is made first.

Every method below is one product, made once, kept in the run folder and loaded from there.
Round 0 is the base policy; round k is the policy after k rounds of imagined RL.

    demonstrations -> policy(0) -> collected(0) -> world(0), reward(0), starts(0) -> policy(1)
                                   collected(1) -> world(1), reward(1), starts(1) -> policy(2) ...
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax import evaluate, learner
from wovr_jax.core import checkpoint, keys, pixels, processes, sharding
from wovr_jax.core.log import read_metrics
from wovr_jax.data import batches, normalize
from wovr_jax.data import episodes as disk
from wovr_jax.data import starts as start_states
from wovr_jax.nn import lora
from wovr_jax.policy import fit as policy_fit
from wovr_jax.policy import vla
from wovr_jax.policy.actions import Codec
from wovr_jax.reward import classifier
from wovr_jax.reward import fit as reward_fit
from wovr_jax.run.folder import Run
from wovr_jax.run.programs import Programs
from wovr_jax.run.recipe import Recipe
from wovr_jax.sim.arena import Actor, Arena, in_turn
from wovr_jax.sim.tabletop.arena import Tabletop
from wovr_jax.train import loop
from wovr_jax.types import NULL_ACTION, Array, Episode, Imagined, Params
from wovr_jax.weights import native
from wovr_jax.world import dit
from wovr_jax.world import fit as world_fit
from wovr_jax.world import model as world_model
from wovr_jax.world.model import WorldConfig
from wovr_jax.world.vae import fit as vae_fit


def arena_of(recipe: Recipe) -> Arena:
    """The true environment of a recipe. LIBERO's is looked up by name: whoever runs on the table need not read it."""
    if recipe.libero is None:
        return Tabletop(recipe)
    return importlib.import_module("wovr_jax.sim.libero.arena").Libero(recipe)


class Stages:
    """The products of one run.

    Args:
      recipe: the settings.
      run: the open run folder.
    """

    def __init__(self, recipe: Recipe, run: Run):
        self.recipe, self.run = recipe, run
        for setting in ("policy_weights", "world_weights"):
            if where := getattr(recipe, setting):
                native.check_weights(setting, where)
        if recipe.vae:
            native.describe(self._assets / f"{recipe.vae}.json")
        self.arena = arena_of(recipe)
        self.prompt_KL = jnp.asarray(self.arena.prompt_KL)
        # Episodes that training streams stay on disk for every other stage too.
        self._read = functools.partial(in_turn, lazily=recipe.world_train.latents == "stream")

    def key(self, *names: str | int) -> Array:
        return keys.key(self.recipe.seed, *names)

    # --- data and base policy ---------------------------------------------------------------

    @property
    def demonstrations(self) -> Sequence[Episode]:
        """Scripted episodes, a share of them flawed."""
        return self._scripted()[0]

    def _scripted(self) -> tuple[Sequence[Episode], Sequence[Episode]]:
        """Demonstrations, and more of them to judge imitation on; none where the base policy comes from elsewhere."""
        if not self.recipe.collect.demonstrations:
            return [], []
        make = functools.partial(self.arena.demonstrate, key=self.key("demonstrations"))
        read = lambda folder: (self._read(folder / "episodes"), self._read(folder / "validation"))  # noqa: E731
        return self.run.stage("demonstrations", make, read)

    @functools.cached_property
    def codec(self) -> Codec:
        """Between environment actions and tokens: a released policy's own, or from the demonstrations' statistics."""
        if self.arena.codec:
            return self.arena.codec
        return Codec.from_statistics(
            normalize.statistics(self.demonstrations, self.arena.name)[self.arena.name]["action"]
        )

    @functools.cached_property
    def fresh_policy(self) -> Params:
        """Where the policy starts: ``recipe.policy_weights``, or random weights with the recipe's vision towers."""
        network = vla.network(self.recipe.policy)
        if self.recipe.policy_weights:
            return native.load_weights("policy_weights", self.recipe.policy_weights, network.shapes(), vla.AXES)
        params = network.init(self.key("policy"))
        named = zip(("dino", "siglip"), self.recipe.towers, strict=True) if self.recipe.towers else ()
        towers = {part: self._asset(name)[1] for part, name in named}
        return sharding.place(jax.tree.map(jnp.asarray, params | towers), vla.AXES)

    @functools.cached_property
    def fresh_world(self) -> Params:
        """Where the transformer of the world model starts: random weights, or those of ``recipe.world_weights``."""
        network = world_model.networks(self.vae[0])[0]
        if self.recipe.world_weights:
            return native.load_weights("world_weights", self.recipe.world_weights, network.shapes(), dit.AXES)
        return sharding.place(network.init(self.key("world")), dit.AXES)

    @functools.cached_property
    def fresh_reward(self) -> Params:
        """Random weights of the success classifier."""
        return sharding.whole(classifier.network(self.recipe.reward).init(self.key("reward")))

    @property
    def _assets(self) -> pathlib.Path:
        return pathlib.Path(self.recipe.assets) if self.recipe.assets else native.FOLDER

    def _asset(self, name: str) -> tuple[Any, Params]:
        return native.load_asset(name, self._assets)

    def policy(self, round_: int) -> Params:
        """The policy after ``round_`` rounds of imagined RL; 0 is the base policy."""
        if round_ == 0 and not self.recipe.sft.steps:
            return self.fresh_policy
        make = self._make_base if round_ == 0 else functools.partial(self._make_policy, round_)
        name = "sft" if round_ == 0 else f"grpo-{round_}"
        return self.run.stage(name, make, lambda folder: checkpoint.restore(folder / "policy", self.fresh_policy))

    def _make_base(self, folder: pathlib.Path) -> dict[str, Any]:
        cfg, about = self.recipe, (self.codec, self.prompt_KL, self.key("sft"))
        given = (self.fresh_policy, *self._scripted(), *about)
        params, facts = policy_fit.fit(cfg.policy, cfg.sft, *given, log=self.run.log, folder=folder)
        checkpoint.save(folder / "policy", params)
        return facts

    @functools.cached_property
    def programs(self) -> Programs:
        """The compiled rollouts of this run."""
        return Programs(self.recipe, self.codec, lambda: self.vae[0], self.prompt_KL)

    # --- the true simulator -----------------------------------------------------------------

    def collected(self, round_: int) -> Sequence[Episode]:
        """True rollouts of the policy of ``round_``; the only true steps that training consumes."""
        cfg, name = self.recipe.collect, f"collect-{round_}"
        count = cfg.first if round_ == 0 else cfg.again

        def make(folder: pathlib.Path) -> dict[str, Any]:
            return self.arena.collect(folder / "episodes", name, count, self._actor(round_, name))

        self.policy(round_)  # first, so that the seconds of each stage are its own
        return self.run.stage(name, make, lambda folder: self._read(folder / "episodes"))

    def _actor(self, round_: int, purpose: str, temperature: float | None = None) -> Actor:
        """The policy of a round, sampling as in training unless told otherwise."""
        heat = self.recipe.temperature if temperature is None else temperature
        name = "base" if round_ == 0 else f"grpo-{round_}"
        return Actor(self.programs, self.policy(round_), self.key(purpose), heat, name)

    def _pool(self, round_: int) -> Sequence[Episode]:
        """Every true rollout so far."""
        return disk.joined(self.collected(k) for k in range(round_ + 1))

    # --- the learned simulator --------------------------------------------------------------

    @functools.cached_property
    def vae(self) -> tuple[WorldConfig, Params]:
        """The world model's settings with the VAE's statistics, and its weights: pretrained, or trained here."""
        config, params = self._asset(self.recipe.vae) if self.recipe.vae else self._own_vae()
        return dataclasses.replace(self.recipe.world, vae=config), sharding.whole(params)

    def _own_vae(self) -> tuple[Any, Params]:
        def make(folder: pathlib.Path) -> dict[str, Any]:
            cfg, train = self.recipe.world, self.recipe.vae_train
            return vae_fit.fit(cfg, train, self.demonstrations, folder, log=self.run.log)

        return self.run.stage("vae", make, vae_fit.load)

    def world(self, round_: int) -> Params:
        """World model of a round: trained from nothing in round 0, refreshed after that (PACE)."""
        cfg, vae_params = self.vae
        name, train = f"world-{round_}", self.recipe.world_train
        train = dataclasses.replace(train, **dataclasses.asdict(self.recipe.refresh)) if round_ else train
        begin = self.world(round_ - 1) if round_ else {"dit": self.fresh_world, "vae": vae_params}

        def make(folder: pathlib.Path) -> dict[str, Any]:
            new = disk.joined([self.collected(round_), self.demonstrations if round_ == 0 else []])
            old, cache = self._pool(round_ - 1) if round_ else [], self.run.folder / "latents"
            key, log = self.key(name), self.run.log
            return world_fit.fit(cfg, train, begin, new, key, folder, old=old, cache=cache, name=name, log=log)

        weights = self.run.stage(name, make, lambda folder: world_fit.load(train, begin["dit"], folder))
        return {"dit": weights, "vae": vae_params}

    def _retold(self, round_: int, episodes: list[Episode]) -> list[Episode]:
        """The same actions in the learned world: imagined frames under the true labels.

        A classifier that sees them learns how far imagination is to be believed, not only what
        success looks like.
        """
        batch, chunk, steps = self.recipe.collect.batch, self.recipe.policy.chunk, self.arena.steps
        table = start_states.initial(episodes, memory=self.recipe.world.slots)
        told = []
        for low in range(0, len(episodes), batch):
            row_B = np.resize(np.arange(low, min(low + batch, len(episodes))), batch)
            action_BSA = np.tile(np.asarray(NULL_ACTION, np.float32), (batch, steps, 1))
            for b, row in enumerate(row_B):
                action_BSA[b, : len(episodes[row].action_SA)] = episodes[row].action_SA
            action_BNTA = jnp.asarray(action_BSA.reshape(batch, -1, chunk, action_BSA.shape[-1]))
            start = start_states.gather(table, jnp.asarray(row_B), self.prompt_KL)
            key = self.key("retold", round_, low)
            dream = sharding.host(self.programs.replay(self.world(round_), self.fresh_reward, start, action_BNTA, key))
            video_BSHWC = pixels.to_uint8(dream.video_BNTHWC).reshape(batch, -1, *dream.frame_BNHWC.shape[2:])
            for row, video_SHWC in list(zip(row_B, video_BSHWC, strict=True))[: len(episodes) - low]:
                length = len(episodes[row].action_SA)
                frames = np.concatenate([episodes[row].frame_SHWC[:1], video_SHWC[:length]])
                told.append(dataclasses.replace(episodes[row], frame_SHWC=frames, actor="imagination"))
        return told

    def reward(self, round_: int) -> tuple[Params, float]:
        """Success classifier of a round and its threshold, both judged on held-out episodes."""
        cfg = self.recipe
        name = f"reward-{round_}"

        def make(folder: pathlib.Path) -> dict[str, Any]:
            demos = self.demonstrations
            newest = self._pool(round_)[-cfg.collect.retold :]
            # A better policy fails less: held-out episodes of earlier rounds bring failures to choose the threshold on.
            before = self._pool(round_ - 1) if round_ else []
            aside_E = batches.split(disk.heads(before), reward_fit.HELD_OUT)
            held = [before[e] for e in np.flatnonzero(aside_E).tolist()]
            told = self._retold(round_, [*newest, *demos[: len(newest) // 3], *held])
            real = disk.joined([self._pool(round_), demos])
            params, facts = reward_fit.fit(
                cfg.reward, cfg.reward_train, self.fresh_reward, real, told, self.key(name),
                name=name, log=self.run.log, folder=folder,
            )  # fmt: skip
            checkpoint.save(folder / "reward", params)
            return facts | {"imagined_frames": sum(len(episode.action_SA) for episode in told)}

        self.world(round_)
        params = self.run.stage(name, make, lambda folder: checkpoint.restore(folder / "reward", self.fresh_reward))
        return params, self.run.facts[name]["threshold"]

    # --- reinforcement learning in imagination ----------------------------------------------

    def starts(self, round_: int) -> start_states.Starts:
        """Where imagined rollouts of a round begin: episode starts, and keyframes before failures."""
        cfg = self.recipe.starts
        name = f"starts-{round_}"
        # Online RL without keyframes needs layouts only; its whole budget is for the learner.
        online = self.recipe.dream.world == "true" and not cfg.share

        def make(folder: pathlib.Path) -> dict[str, Any]:
            slots = self.recipe.world.slots
            table = start_states.initial(self.demonstrations if online else self._pool(round_), memory=slots)
            if cfg.share:
                rng = np.random.default_rng([self.recipe.seed, round_])
                how = {"each": cfg.each, "least": cfg.least, "event": cfg.event, "memory": slots}
                keys = start_states.keyframes(self.collected(round_), cfg.rule, cfg.before, rng, **how)
                table = start_states.join(table, keys)
            start_states.save(folder / "starts", table, overwrite=True)
            steps = np.asarray(table.step_K[table.initials :])
            rules = np.asarray(table.rule_K[table.initials :])
            counts = {rule: int((rules == i).sum()) for i, rule in enumerate(start_states.RULES) if (rules == i).any()}
            return {"initials": table.initials, "steps": steps.tolist(), "rules": counts}

        if not online:
            self.collected(round_)
        return self.run.stage(name, make, lambda folder: start_states.load(folder / "starts"))

    def _make_policy(self, round_: int, folder: pathlib.Path) -> dict[str, Any]:
        """Imagined masked GRPO from the policy, world, reward and starts of the round before."""
        cfg = self.recipe
        updates = cfg.dream.updates[round_ - 1]
        name = f"grpo-{round_}"
        state, step = self.dream(round_ - 1, self.key(name))
        state = loop.fit(name, state, step, updates, log=self.run.log, folder=folder, log_every=1)
        checkpoint.save(folder / "policy", self.programs.tuned.plain(state.params))
        curve = [line for line in read_metrics(self.run.folder) if line["stage"] == name]
        if said := learner.idle(curve):
            processes.say(f"{name}: {said}")
        steps = updates * cfg.dream.groups * cfg.learner.grpo.group * cfg.dream.chunks * cfg.policy.chunk
        counted = "imagined_frames" if cfg.dream.world == "learned" else "true_steps"
        if cfg.libero and counted == "true_steps" and curve:  # episodes end at their first success
            steps = round(steps * cfg.libero.scene.hold * sum(line["length"] for line in curve) / len(curve))
        return {counted: steps, "skipped": sum(line["skipped"] for line in curve), "said": said}

    def dream(self, round_: int, key: Array) -> tuple[learner.PolicyState, Callable]:
        """First learner state and ``step(state, i)``: draw starts, roll, score, update, all on the device."""
        cfg, explore = self.recipe, self.arena.explore if self.recipe.dream.world == "true" else None
        parts = {} if explore else self._dream_parts(round_ if cfg.pace else 0)
        tuned, rollout = self.programs.tuned, self.programs.dream
        params = tuned.begin(self.policy(round_), self.key("adapters", round_))
        base = tuned.begin(self.policy(0), self.key("adapters", 0)) if cfg.learner.grpo.kl else None
        update = learner.make_update(cfg.learner, tuned.net, base, vla.AXES)

        def rolled(state: learner.PolicyState, i: Array) -> tuple[Imagined, Array]:
            k_dream, k_update = jax.random.split(jax.random.fold_in(key, i))
            if explore:
                return explore(int(i), Actor(self.programs, state.params, k_dream, cfg.temperature)), k_update
            return rollout(state.params, parts, k_dream), k_update

        def step(state: learner.PolicyState, i: Array) -> tuple[learner.PolicyState, dict[str, Array]]:
            return update(state, *rolled(state, i))

        trained = learner.all_but(*cfg.sft.frozen) if cfg.sft.frozen else None
        rate = cfg.dream.rates[min(round_, len(cfg.dream.rates) - 1)]
        mask = lora.mask if cfg.learner.lora else trained
        state = learner.create(cfg.learner, params, mask, rate, vla.AXES)
        return state, loop.Shown(step, rolled, of_state=True)

    def _dream_parts(self, round_: int) -> dict[str, Any]:
        """What a rollout reads besides the policy; arguments of the compiled program, not constants in it."""
        cfg = self.recipe.dream
        table = sharding.whole(jax.device_put(self.starts(round_)))
        parts: dict[str, Any] = {"starts": table, "threshold": jnp.float32(0.5)}
        if cfg.world != "true":
            parts["world"] = self.world(round_)
        if cfg.reward == "learned":
            params, threshold = self.reward(round_)
            parts |= {"reward": params, "threshold": jnp.float32(threshold)}
        if cfg.world != "learned":
            parts["sim"] = self.programs.states(table)
        return parts

    # --- the truth --------------------------------------------------------------------------

    def evaluated(self, round_: int) -> dict[str, Any]:
        """True success of the policy of a round on layouts that no stage trains on."""
        cfg = self.recipe
        name = f"evaluate-{round_}"

        def make(folder: pathlib.Path) -> dict[str, Any]:
            heats = {"sampled": cfg.temperature, "greedy": 0.0}
            sampled, greedy = (
                self.arena.measure(folder / how, cfg.evaluate.episodes, self._actor(round_, "evaluate", heat))
                for how, heat in heats.items()
            )
            return {
                "true_success": evaluate.summarize_outcomes(sampled.success_B),
                "greedy": evaluate.summarize_outcomes(greedy.success_B),
                "subgoals": sampled.subgoals,
                "outcomes": sampled.success_B.astype(int).tolist(),
                "true_steps": sampled.steps + greedy.steps,
            }

        self.policy(round_)  # first, so that the seconds of each stage are its own
        return self.run.stage(name, make, lambda folder: self.run.facts[name])

    def compared(self, round_: int, world_round: int) -> dict[str, Any]:
        """The world model's verdict on true rollouts of a policy, against what really happened."""
        cfg = self.recipe
        name = f"compare-{round_}-in-world-{world_round}"

        def make(folder: pathlib.Path) -> dict[str, Any]:
            count, (reward, threshold) = cfg.evaluate.compare, self.reward(world_round)
            pairs, loose = [], collections.defaultdict(list)
            for played in self.arena.play(count, self._actor(round_, "evaluate")):
                replay = functools.partial(self.programs.replay, self.world(world_round), reward, played.start)
                action_BNTA = jnp.asarray(played.rollout.action_BNTA)
                pairs.append(sharding.host((played.rollout, replay(action_BNTA, self.key(name)))))
                for how, action_BNTA in evaluate.loosen_gripper(played.rollout).items():
                    loose[how].append(sharding.host(replay(action_BNTA, self.key(name)).prob_BNT))
            true, dream = (evaluate.join(side, count) for side in zip(*pairs, strict=True))
            films = [f"episode-{i}.mp4" for i in range(min(cfg.evaluate.videos, count))]
            for i, film in enumerate(films):
                pixels.video(folder / film, evaluate.draw_film(true, dream, i), fps=6)
            frames = count * self.arena.steps
            said = {how: np.concatenate(parts)[:count] for how, parts in loose.items()}
            return evaluate.compare_verdicts(true, dream, said, threshold) | {
                "videos": films,
                "true_steps": frames,
                "imagined_frames": 3 * frames,
            }

        self.policy(round_)
        self.reward(world_round)
        return self.run.stage(name, make, lambda folder: self.run.facts[name])
