"""The compiled programs of a run, each made once for its settings and used in every round.

Weights, start states, prompts and thresholds are arguments, never constants in a program, so a refreshed world model
or an evolved policy runs in the program that is already there. ``plan`` lowers the same programs for devices that need
not be there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax import learner
from wovr_jax.core import sharding
from wovr_jax.core.pixels import to_float, to_uint8
from wovr_jax.data import starts as start_states
from wovr_jax.data.starts import Starts
from wovr_jax.imagine import imagine, predicate, shadow
from wovr_jax.learner import LearnerConfig
from wovr_jax.nn.functional import Pure
from wovr_jax.policy import vla
from wovr_jax.policy.actions import Codec
from wovr_jax.policy.train import RLPolicy, make_rl_policy
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.reward import classifier
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.run.recipe import DreamConfig
from wovr_jax.sim import embedded
from wovr_jax.sim.arena import Acting
from wovr_jax.sim.embedded import Simulator
from wovr_jax.types import NULL_ACTION, Array, Episode, Imagined, Params, Start
from wovr_jax.world import model as world_model
from wovr_jax.world.model import WorldConfig

# ---------------------------------------------------------------- a policy that acts


def acting(
    cfg: VLAConfig,
    net: Pure,
    codec: Callable[[], Codec],
    prompt_KL: Array,
    temperature: float,
    sim: Simulator,
    memory: int,
) -> Acting:
    """The policy as plain functions of its weights, for an arena.

    Args:
      cfg: the policy.
      net: the network that online RL trains, which may have adapters in it.
      codec: gives the codec between actions and tokens; asked when somebody acts.
      prompt_KL: (tasks, L) prompt tokens of every task.
      temperature: of training.
      sim: the embedded simulator, for ``roll``.
      memory: M, memory frames of a start state.
    """

    # The codec is asked for when somebody acts, because it may come from demonstrations that are not collected yet.
    def choose(
        params: Params, frame_BHWC: Array, prompt_BL: Array, key: Array, seed_B: Array, temperature: float
    ) -> Array:
        return sample_on_host(cfg, None, codec(), temperature)(params, frame_BHWC, prompt_BL, key, seed_B)[2]

    def sample(params: Params, frame_BHWC: Array, prompt_BL: Array, key: Array, seed_B: Array) -> Any:
        return sample_on_host(cfg, net, codec(), temperature)(params, frame_BHWC, prompt_BL, key, seed_B)

    def roll(params: Params, seed_B: Array, key: Array, temperature: float) -> Imagined:
        return roll_in_simulator(cfg, codec(), temperature, sim, memory)(params, seed_B, prompt_KL, key)

    return Acting(choose, sample, roll, vla.AXES)


@functools.cache
def roll_in_simulator(cfg: VLAConfig, codec: Codec, temperature: float, sim: Simulator, memory: int) -> Callable:
    """``live(params, seed_B, prompt_KL, key) -> Imagined``: a policy in the true simulator, with video."""
    world, chunks = embedded.world(sim), sim.horizon // cfg.chunk

    @jax.jit
    def live(params: Params, seed_B: Array, prompt_KL: Array, key: Array) -> Imagined:
        # The true simulator is a world like the learned one, so the same scan plays both.
        act = vla.policy(cfg, params, codec, temperature)
        start = embedded.make_starts(seed_B, prompt_KL, sim, memory)
        return imagine(act, world, predicate, start, key, chunks=chunks, video=True)

    return live


@functools.cache
def sample_on_host(cfg: VLAConfig, net: Pure | None, codec: Codec, temperature: float) -> Callable:
    """``sample(params, frame_BHWC, prompt_BL, key, seed_B)``: tokens, their log-probabilities and the actions.

    Frames are uint8; see ``sim.arena.Acting``. Without ``net`` the weights are plain, without adapters.
    """

    @jax.jit
    def sample(params: Params, frame_BHWC: Array, prompt_BL: Array, key: Array, seed_B: Array) -> Any:
        choose = vla.policy(cfg, params, codec, temperature, net)
        # A key for each row: what a trial draws does not depend on the batch that it happens to be in.
        key_B = jax.vmap(lambda seed: jax.random.fold_in(key, seed))(seed_B)
        return choose(to_float(frame_BHWC), prompt_BL, key_B)

    return sample


# ---------------------------------------------------------------- imagination


@dataclasses.dataclass(frozen=True)
class Improvement:
    """Settings of reinforcement learning.

    Attributes:
      dream: one iteration, and the world and the judge it happens in.
      learner: how rollouts become optimizer steps.
      share: of the groups that begin at keyframes.
      temperature: of the policy's sampling.
      frozen: parts of the policy that stay as they are.
      policy: the policy's network.
      reward: the classifier's network.
      sim: the embedded simulator, for worlds that are the truth or know it.
      steps: of a true episode, at whose end a rollout's successes end too; None where a keyframe has a whole budget.
    """

    dream: DreamConfig
    learner: LearnerConfig
    share: float
    temperature: float
    frozen: tuple[str, ...]
    policy: VLAConfig
    reward: RewardConfig
    sim: Simulator
    steps: int | None

    @property
    def network(self) -> RLPolicy:
        """The policy as actor and learner run it, with adapters where the learner trains adapters."""
        return make_rl_policy(self.policy, self.learner.lora, self.frozen)


@functools.partial(jax.jit, static_argnums=0)
def begin(cfg: Improvement, starts: Starts, prompt_KL: Array, sim: Any, key: Array) -> tuple[Array, Start]:
    """Draws the rows of the table that an iteration of RL begins from, (B,), and gathers their start states.

    ``sim`` holds the simulator's states of the table, or is None. It is a program of its own because its shapes depend
    on the table, which is another one in each round; those of :func:`dream` do not, so that is compiled once.
    """
    row_B = start_states.draw(starts, key, cfg.dream.groups, cfg.learner.grpo.group, share=cfg.share)
    start = start_states.gather(starts, row_B, prompt_KL)
    # The simulator begins in the very state that the frames of the start show.
    return row_B, sharding.batch(dataclasses.replace(start, sim=jax.tree.map(lambda leaf: leaf[row_B], sim)))


@functools.cache
def dream(
    cfg: Improvement, codec: Codec, world: WorldConfig | None, video: bool = False
) -> Callable[[Params, dict[str, Any], Start, Array], Imagined]:
    """``dream(policy, parts, start, key)``: the rollouts of one iteration of RL.

    ``parts`` holds ``threshold`` and, as ``cfg.dream`` asks for them, the weights ``world`` and ``reward``.

    Args:
      cfg: settings; of the learner's only the size of a group matters here.
      codec: between actions and tokens.
      world: the learned world, its VAE's statistics filled in; None where ``cfg.dream.world`` is "true".
      video: whether every frame is kept, for whoever looks at them before the policy is paid.
    """
    net = cfg.network.net

    # One program: neither frames nor tokens leave the device between two chunks.
    @jax.jit
    def dream(policy_params: Params, parts: dict[str, Any], start: Start, key: Array) -> Imagined:
        act = vla.policy(cfg.policy, policy_params, codec, cfg.temperature, net)
        # The predicate looks into the simulator, so it needs a world that has one.
        score = classifier.score(cfg.reward, parts["reward"]) if cfg.dream.reward == "learned" else predicate
        if world is None:
            simulator = embedded.world(cfg.sim)
        else:
            model = world_model.world(world, parts["world"])
            simulator = model if cfg.dream.world == "learned" else shadow(model, embedded.world(cfg.sim))
        how = {"chunks": cfg.dream.chunks, "threshold": parts["threshold"], "steps": cfg.steps, "video": video}
        return imagine(act, simulator, score, start, key, **how)

    return dream


@functools.cache
def update(cfg: LearnerConfig, net: Pure, temperature: float) -> learner.Update:
    """The update of the policy on the rollouts of an iteration, see ``learner.make_update``."""
    return learner.make_update(cfg, net, temperature, vla.AXES)


def true_states(starts: Starts, sim: Simulator) -> Any:
    """The simulator's own states at start states, for worlds that are the truth."""
    seed_K, played_KSA, step_K = map(jnp.asarray, (starts.seed_K, starts.played_KSA, starts.step_K))
    # A state is not stored but played again: seed and actions are small, and other versions can read them.
    return embedded.replay(seed_K, played_KSA, step_K, sim)


# ---------------------------------------------------------------- recorded actions


@functools.cache
def replay(world: WorldConfig, reward: RewardConfig | None = None) -> Callable[..., Imagined]:
    """``replay(world, reward, start, action_BNTA, key)``: recorded actions in the learned world, with video.

    Without a classifier (``reward`` None, and None for its weights) the success probabilities are zero.
    """

    @jax.jit
    def replay(params: Params, reward_params: Params | None, start: Start, action_BNTA: Array, key: Array) -> Imagined:
        # Zeros for the films of a world model's training, before which there is no judge.
        judge = classifier.score(reward, reward_params) if reward and reward_params else None
        score = judge or (lambda frame_BTHWC, *_: jnp.zeros(frame_BTHWC.shape[:2]))
        model = world_model.world(world, params)
        return imagine(action_BNTA, model, score, start, key, chunks=action_BNTA.shape[1], video=True)

    return replay


def replay_episodes(
    cfg: WorldConfig,
    params: Params,
    episodes: Sequence[Episode],
    prompt_KL: Array,
    key: Array,
    *,
    batch: int = 32,
    steps: int = 0,
    judge: tuple[RewardConfig | None, Params | None] = (None, None),
) -> Iterator[np.ndarray]:
    """Plays the actions of episodes from their first frames in a learned world, and gives the frames they led to.

    Args:
      cfg, params: the world.
      episodes: to play.
      prompt_KL: (tasks, L) prompt tokens of every task.
      key: of the noise.
      batch: episodes played at once; the last batch is filled up with some again, so that one program does.
      steps: of every rollout, a multiple of a chunk; 0 for as many as the longest episode needs. After its end an
        episode does nothing.
      judge: classifier and weights of the program to play in, as of :func:`replay`; its scores are not looked at.

    Yields:
      (S + 1, H, W, 3) uint8 of each episode, its own first frame included.
    """
    steps = steps or -(-max(len(episode.action_SA) for episode in episodes) // cfg.chunk) * cfg.chunk
    starts = start_states.initial(episodes, memory=cfg.slots, intervened=True)  # a row for each
    for low in range(0, len(episodes), batch):
        # The last batch is filled up with its own rows: another size would be another program, compiled for one batch.
        rows = np.resize(np.arange(low, min(low + batch, len(episodes))), batch).tolist()
        # After the end of an episode the arm rests; those frames are cut off below.
        action_BSA = np.tile(np.asarray(NULL_ACTION, np.float32), (batch, steps, 1))
        for b, row in enumerate(rows):
            action_BSA[b, : len(episodes[row].action_SA)] = episodes[row].action_SA
        # (B, S, A) -> (B, N, T, A): the spine counts in chunks.
        action_BNTA = jnp.asarray(action_BSA.reshape(batch, -1, cfg.chunk, action_BSA.shape[-1]))
        start = start_states.gather(starts, jnp.asarray(rows), prompt_KL)
        # To the host batch by batch: the films of a whole collection would not fit on the device.
        played = replay(cfg, judge[0])(params, judge[1], start, action_BNTA, jax.random.fold_in(key, low))
        rollout = sharding.host(played)
        video_BSHWC = to_uint8(rollout.video_BNTHWC).reshape(batch, -1, *rollout.frame_BNHWC.shape[2:])
        for row, video_SHWC in list(zip(rows, video_BSHWC, strict=True))[: len(episodes) - low]:
            length = len(episodes[row].action_SA)
            yield np.concatenate([episodes[row].frame_SHWC[:1], video_SHWC[:length]])
