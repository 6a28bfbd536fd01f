"""One policy in truth and in every learned world of a run, from the same first frames.

In a learned world the policy plays as it does when it learns: in a closed loop, on imagined frames, before the learned
judge. What comes of it is a success rate, to be held against the true one.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from wovr_jax.audit.closed_loop import roll_in_world
from wovr_jax.audit.verdicts import read_verdict
from wovr_jax.core import sharding
from wovr_jax.policy.actions import Codec
from wovr_jax.run.folder import Product, Run
from wovr_jax.run.programs import Improvement
from wovr_jax.run.stages.episodes import Keys
from wovr_jax.run.stages.reward import Judge
from wovr_jax.sim.arena import Actor
from wovr_jax.sim.witness import Witness
from wovr_jax.types import Params
from wovr_jax.world.model import WorldConfig


def try_policy(
    run: Run,
    name: str,
    witness: Witness,
    count: int,
    act: Callable[[float], Actor],
    cfg: Improvement,
    codec: Callable[[], Codec],
    vae: Product[tuple[WorldConfig, Params]],
    worlds: Sequence[Product[Params]],
    rewards: Sequence[Product[Judge]],
    key: Keys,
) -> Product[None]:
    """A policy's outcomes on start states that no stage trains on, as sampled in training and greedily.

    The worlds begin at the very frames that the true episodes begin at, and an imagined rollout is as long as a true
    one. All policies meet a world under the same noise.

    Args:
      run: the folder that the stage ``trial-<name>`` is kept in.
      name: of the policy.
      witness: the true environment.
      count: start states, the first of the evaluation.
      act: gives the policy at a temperature.
      cfg: the policy's and the judge's networks, and the temperature of training.
      codec: gives the codec between actions and tokens.
      vae: the world models' settings, and their VAE.
      worlds, rewards: every learned world of the run, and the judge of each.
      key: of the run, by name.
    """

    def try_at(temperature: float, chunks: int) -> dict[str, Any]:
        actor = act(temperature)
        dream = dataclasses.replace(cfg.dream, chunks=chunks)
        roll = roll_in_world(dataclasses.replace(cfg, temperature=temperature, dream=dream), codec(), vae.value[0])
        true, begun = [], []
        for played in witness.play(count, actor):
            true.append(np.any(sharding.host(read_verdict(played.rollout)), axis=(1, 2))[: played.count])
            # On the host: the first frames of all episodes need not lie beside the networks.
            begun.append((sharding.host(played.start), played.count))
        imagined = []
        for w, (world, reward) in enumerate(zip(worlds, rewards, strict=True)):
            judge, won = reward.value, []
            for i, (start, live) in enumerate(begun):
                rollout = roll(actor.params, world.value, judge.params, start, key(f"trial-in-world-{w}", i))
                won.append(np.any(sharding.host(rollout.prob_BNT) > judge.threshold, axis=(1, 2))[:live])
            imagined.append(np.concatenate(won).astype(int).tolist())
        return {"temperature": temperature, "true": np.concatenate(true).astype(int).tolist(), "imagined": imagined}

    def make(folder: pathlib.Path) -> dict[str, Any]:
        del folder  # outcomes alone, which are facts
        chunks = witness.steps // cfg.policy.chunk
        levels = [try_at(t, chunks) for t in (cfg.temperature, 0.0)]
        return {
            "levels": levels,
            "episodes": count * len(levels),
            "true_steps": count * len(levels) * witness.steps * witness.hold,
            "imagined_frames": count * len(levels) * len(worlds) * witness.steps,
        }

    return run.stage(f"trial-{name}", make, lambda folder: None)
