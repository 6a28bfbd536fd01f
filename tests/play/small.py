"""A run folder as training leaves it, at the smallest size: random networks, a few demonstrations, start states."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from tests.small_run import save_parts, small_settings
from wovr_jax.core import checkpoint
from wovr_jax.core.disk import write_json
from wovr_jax.data import episodes as disk
from wovr_jax.data import starts
from wovr_jax.data.starts import StartsConfig
from wovr_jax.policy import vla
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.reward import classifier
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.run.folder import MARK
from wovr_jax.sim import embedded
from wovr_jax.sim.embedded import Simulator
from wovr_jax.sim.tabletop.expert import ExpertConfig
from wovr_jax.sim.tabletop.table import TabletopConfig
from wovr_jax.types import Episode
from wovr_jax.world.model import WorldConfig, networks

SIM, POLICY = TabletopConfig.fake(), VLAConfig.fake()
EPISODES, KEYFRAMES = 6, 12
THRESHOLD = 0.25


def make_run(
    folder: pathlib.Path, *, rounds: int = 2, sim: Simulator = SIM, policy: VLAConfig = POLICY, **changes: Any
) -> pathlib.Path:
    """Writes the stages of a run of ``rounds`` rounds in a simulator; ``changes`` are settings."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", small_settings(save_parts(folder / "parts"), policy=policy, **changes))
    episodes = play_episodes(sim)
    disk.write(_done(folder, "demonstrations") / "episodes", iter(episodes))
    checkpoint.save(_done(folder, "sft") / "policy", spread(vla.network(policy), 10))
    for k in range(rounds):
        checkpoint.save(_done(folder, f"world-{k}") / "dit", spread(networks(WorldConfig.fake())[0], 20 + k))
        reward = spread(classifier.network(RewardConfig.fake()), 30 + k)
        checkpoint.save(_done(folder, f"reward-{k}", threshold=THRESHOLD) / "reward", reward)
        starts.save(_done(folder, f"starts-{k}") / "starts", choose_starts(episodes, sim))
        checkpoint.save(_done(folder, f"grpo-{k + 1}") / "policy", spread(vla.network(policy), 40 + k))
    return folder


def play_episodes(sim: Simulator) -> list[Episode]:
    """The expert's episodes."""
    expert = ExpertConfig(flaw="none")
    return list(embedded.play_demonstrations(range(EPISODES), jax.random.key(0), expert, sim, batch=EPISODES))


def choose_starts(episodes: list[Episode], sim: Simulator) -> starts.Starts:
    """A start at each episode, and two keyframes of each."""
    failed = [dataclasses.replace(episode, success_S=np.zeros_like(episode.success_S)) for episode in episodes]
    how = StartsConfig(rule="uniform", each=KEYFRAMES // EPISODES, room=0)
    return starts.join(starts.initial(episodes), starts.keyframes(failed, how, steps=sim.horizon))


def spread(network: Any, seed: int) -> Any:
    """Random weights, none of them zero: what a network begins with may not listen to its input yet."""
    made = jax.device_get(network.init(jax.random.key(seed)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (leaf + 0.1 * rng.standard_normal(leaf.shape)).astype(leaf.dtype), made)


def _done(folder: pathlib.Path, stage: str, **facts: Any) -> pathlib.Path:
    where = folder / "stages" / stage
    where.mkdir(parents=True)
    write_json(where / MARK, facts | {"seconds": 1.0})
    return where
