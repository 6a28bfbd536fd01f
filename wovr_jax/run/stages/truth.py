"""The stages that ask the true environment: how good a policy is, and what a learned world pays it for."""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax import evaluate
from wovr_jax.core import pixels, sharding
from wovr_jax.data import starts as start_states
from wovr_jax.data.starts import Starts
from wovr_jax.policy.actions import Codec
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.run import programs
from wovr_jax.run.folder import Product, Run
from wovr_jax.run.programs import Improvement
from wovr_jax.run.recipe import EvaluateConfig
from wovr_jax.run.stages.episodes import Keys
from wovr_jax.run.stages.reward import Judge
from wovr_jax.sim.arena import Actor, Arena, Measured
from wovr_jax.types import Array, Imagined, Params, Start
from wovr_jax.world.model import WorldConfig

FILM_FPS = 6


def measure(
    run: Run, round_: int, arena: Arena, cfg: EvaluateConfig, temperature: float, act: Callable[[float], Actor]
) -> Product[None]:
    """True success of the policy of a round on start states that no stage trains on, temperature by temperature.

    Args:
      run: the run.
      round_: the round.
      arena: the true environment.
      cfg: how many episodes, and at which temperatures besides that of training and 0.
      temperature: of training.
      act: gives the policy at a temperature.
    """

    def make(folder: pathlib.Path) -> dict[str, Any]:
        # As it was trained, which is what RL improves, and greedy, as a robot would run it.
        names = {temperature: "sampled", 0.0: "greedy"}
        levels = sorted({*names, *cfg.temperatures}, reverse=True)
        names = {t: names.get(t, f"at-{t:g}") for t in levels}
        found = {t: arena.measure(folder / names[t], cfg.episodes, act(t)) for t in levels}
        rates = {t: evaluate.summarize_outcomes(measured.success_B) for t, measured in found.items()}
        outcomes = {t: measured.success_B.astype(int).tolist() for t, measured in found.items()}
        return {
            "true_success": rates[temperature],
            "greedy": rates[0.0],
            "subgoals": found[temperature].subgoals,
            "outcomes": outcomes[temperature],
            "temperatures": [{"temperature": t, **rates[t], "outcomes": outcomes[t]} for t in levels],
            "episodes": cfg.episodes * len(levels),
            "true_steps": sum(measured.steps for measured in found.values()),
            "kinds": summarize_kinds({names[t]: measured for t, measured in found.items()}),
        }

    return run.stage(f"evaluate-{round_}", make, lambda folder: None)


def summarize_kinds(found: Mapping[str, Measured]) -> dict[str, dict[str, Any]]:
    """Returns by kind of start state, and by the entries of ``found``, the success rates; nothing without kinds."""
    kinds = np.array(next(iter(found.values())).kind_B)
    return {
        str(kind): {how: evaluate.summarize_outcomes(one.success_B[kinds == kind]) for how, one in found.items()}
        for kind in dict.fromkeys(kinds)
    }


def compare(
    run: Run,
    round_: int,
    world_round: int,
    arena: Arena,
    cfg: EvaluateConfig,
    actor: Actor,
    reward_cfg: RewardConfig,
    vae: Product[tuple[WorldConfig, Params]],
    world: Product[Params],
    reward: Product[Judge],
    key: Keys,
) -> Product[None]:
    """The world model's verdict on true rollouts of a policy, whose recorded actions it replays.

    It says how well the world follows what is done in truth, and nothing about what a policy finds in it: those actions
    were not chosen on imagined frames. That is for :func:`close_loop`.

    Args:
      run: the run.
      round_, world_round: rounds of the policy and of the world model.
      arena: the true environment.
      cfg: how many episodes, and films of them.
      actor: the policy.
      reward_cfg: the classifier's network.
      vae: the world model's settings, and its VAE.
      world, reward: the learned world and its judge.
      key: of the run, by name.
    """
    name = f"compare-{round_}-in-world-{world_round}"

    def make(folder: pathlib.Path) -> dict[str, Any]:
        judge, replay = reward.value, programs.replay(vae.value[0], reward_cfg)
        pairs, loose = [], collections.defaultdict(list)
        # True rollouts first, then the same actions in the learned world: only the world differs.
        for played in arena.play(cfg.compare, actor):

            def imagine(action_BNTA: Any, start: Start = played.start) -> Imagined:
                return replay(world.value, judge.params, start, jnp.asarray(action_BNTA), key(name))

            # On the host, for the frames of all episodes together are too many for the device.
            pairs.append(sharding.host((played.rollout, imagine(played.rollout.action_BNTA))))
            # A world model that shows success whatever the fingers do has learned the films and not the physics.
            for how, action_BNTA in evaluate.loosen_gripper(played.rollout).items():
                loose[how].append(sharding.host(imagine(action_BNTA).prob_BNT))
        # Batches are padded to one size; the padding is cut off here, before anything is counted.
        true, imagined = (evaluate.join(side, cfg.compare) for side in zip(*pairs, strict=True))
        films = [f"episode-{i}.mp4" for i in range(min(cfg.videos, cfg.compare))]
        for i, film in enumerate(films):
            pixels.video(folder / film, evaluate.draw_film(true, imagined, i), fps=FILM_FPS)
        frames = cfg.compare * arena.steps
        loose_BNT = {how: np.concatenate(parts)[: cfg.compare] for how, parts in loose.items()}
        return evaluate.compare_verdicts(true, imagined, loose_BNT, judge.threshold) | {
            "videos": films,
            "episodes": cfg.compare,
            "true_steps": frames,
            "imagined_frames": 3 * frames,  # as played, and with the two ways of loosening
        }

    return run.stage(name, make, lambda folder: None)


def close_loop(
    run: Run,
    round_: int,
    world_round: int,
    arena: Arena,
    count: int,
    batch: int,
    cfg: Improvement,
    codec: Callable[[], Codec],
    prompt_KL: Array,
    policy: Product[Params],
    starts: Product[Starts],
    vae: Product[tuple[WorldConfig, Params]],
    world: Product[Params],
    reward: Product[Judge],
    key: Keys,
) -> Product[None]:
    """What a policy is paid for in the learned world, against what the same actions do in truth.

    The policy plays in the learned world as it does when it learns; the true simulator then follows the actions that it
    chose there, from the same states. Success in either world counts up to the end of the true episode.

    Args:
      run: the run.
      round_, world_round: rounds of the policy and of the world model.
      arena: the true environment.
      count: rollouts from episode starts, and from keyframes, each from another one; fewer where there are fewer.
      batch: rollouts at once.
      cfg: the policy and the judge, chunks of a rollout and temperature; the learned world and the learned reward are
        used whatever the policy learns in.
      codec: gives the codec between actions and tokens.
      prompt_KL: (tasks, L) prompt tokens of every task.
      policy: plain weights.
      starts: where rollouts begin.
      vae: the world model's settings, and its VAE.
      world, reward: the learned world and its judge.
      key: of the run, by name.
    """
    name = f"closed-{round_}-in-world-{world_round}"

    def make(folder: pathlib.Path) -> dict[str, Any]:
        del folder  # a few numbers, which are facts
        table, judge = starts.value, reward.value
        roll = programs.roll_in_world(cfg, codec(), vae.value[0])
        # By the world and not by the policy: all that meet in one world begin alike.
        row_K = _draw_distinct(table, key(f"closed-in-world-{world_round}"), count)
        parts = []
        for low in range(0, len(row_K), batch):
            # The last batch is filled up with its own rows, so that one program does.
            row_B = np.resize(row_K[low : low + batch], batch)
            start = start_states.gather(table, jnp.asarray(row_B), prompt_KL)
            parts.append(roll(policy.value, world.value, judge.params, start, key(name, low)))
        rollout = evaluate.join(parts, len(row_K))
        # (K, N, T, ...) -> (K, S, ...)
        action_KSA, prob_KS = (x.reshape(len(row_K), -1, *x.shape[3:]) for x in (rollout.action_BNTA, rollout.prob_BNT))
        left_K = arena.steps - np.asarray(table.step_K)[row_K]
        live_KS = np.arange(prob_KS.shape[1]) < left_K[:, None]
        true_KS = arena.follow(table, row_K, np.asarray(action_KSA))
        imagined_K, true_K = (np.any(won & live_KS, axis=1) for won in (prob_KS > judge.threshold, true_KS))
        # Those that brought the simulator to a keyframe are true steps too; those after the end of an episode are none.
        steps = int((arena.steps - left_K + live_KS.sum(axis=1)).sum())
        return evaluate.summarize_closed_loop(imagined_K, true_K, row_K >= table.initials) | {
            "episodes": len(row_K),
            "true_steps": steps * arena.hold,
            "imagined_frames": prob_KS.size,
        }

    return run.stage(name, make, lambda folder: None)


def _draw_distinct(table: Starts, key: Array, count: int) -> np.ndarray:
    """Draws ``count`` rows that are episode starts and as many that are keyframes, or all there are, none twice."""
    places = ((0, table.initials), (table.initials, len(table)))
    keys = jax.random.split(key)
    rows = [low + np.asarray(jax.random.permutation(k, high - low))[:count] for k, (low, high) in zip(keys, places)]
    return np.concatenate(rows)
