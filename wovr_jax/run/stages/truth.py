"""The stages that ask the true environment: how good a policy is, and how honest a world model."""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from wovr_jax import evaluate
from wovr_jax.core import pixels, sharding
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.run import programs
from wovr_jax.run.folder import Product, Run
from wovr_jax.run.recipe import EvaluateConfig
from wovr_jax.run.stages.episodes import Keys
from wovr_jax.run.stages.reward import Judge
from wovr_jax.sim.arena import Actor, Arena, Measured
from wovr_jax.types import Imagined, Params, Start
from wovr_jax.world.model import WorldConfig

FILM_FPS = 6


def measure(run: Run, round_: int, arena: Arena, cfg: EvaluateConfig, sampled: Actor, greedy: Actor) -> Product[None]:
    """True success of the policy of a round on start states that no stage trains on, sampled and greedy.

    Args:
      run: the run.
      round_: the round.
      arena: the true environment.
      cfg: how many episodes.
      sampled, greedy: the policy at the temperature of training, and at 0.
    """

    def make(folder: pathlib.Path) -> dict[str, Any]:
        # As it was trained, which is what RL improves, and greedy, as a robot would run it.
        ways = {"sampled": sampled, "greedy": greedy}
        found = {how: arena.measure(folder / how, cfg.episodes, actor) for how, actor in ways.items()}
        return {
            "true_success": evaluate.summarize_outcomes(found["sampled"].success_B),
            "greedy": evaluate.summarize_outcomes(found["greedy"].success_B),
            "subgoals": found["sampled"].subgoals,
            "outcomes": found["sampled"].success_B.astype(int).tolist(),
            "true_steps": sum(measured.steps for measured in found.values()),
            "kinds": summarize_kinds(found),
        }

    return run.stage(f"evaluate-{round_}", make, lambda folder: None)


def summarize_kinds(found: Mapping[str, Measured]) -> dict[str, dict[str, Any]]:
    """Returns by kind of start state, and by the entries of ``found``, the success rate; nothing without kinds."""
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
    """The world model's verdict on true rollouts of a policy, against what really happened.

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
            "true_steps": frames,
            "imagined_frames": 3 * frames,  # as played, and with the two ways of loosening
        }

    return run.stage(name, make, lambda folder: None)
