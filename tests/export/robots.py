"""A run folder as PACE leaves it, with a tiny policy and made-up episodes, and a bundle made from it."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np

from wovr_jax import checkpoint, config
from wovr_jax.data import episodes as disk
from wovr_jax.policy import vla
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.types import Episode

CFG = VLAConfig.fake()
TASKS = ("pick up the red block and put it on the plate", "open the top drawer")


@functools.cache
def params(seed=0):
    """Random weights under which the actions depend on frame, instruction and slot."""
    made = jax.device_get(vla.network(CFG).init(jax.random.key(seed)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (leaf + 0.15 * rng.standard_normal(leaf.shape)).astype(np.float32), made)


def episode(i, steps=16):
    rng = np.random.default_rng(i)
    action = rng.uniform(-1, 1, (steps, 7)).astype(np.float32) * np.float32([1, 0.8, 0.6, 0.4, 0.2, 0.1, 1])
    action[:, 6] = np.where(action[:, 6] < 0, -1, 1)
    frame = rng.integers(0, 256, (steps + 1, CFG.dino.image, CFG.dino.image, 3), np.uint8)
    success = np.zeros(steps + 1, bool)
    return Episode(frame, action, success, TASKS[i % 2], i % 2, i, "expert", action)


def fake_run(folder, rounds=1):
    """Base policy, demonstrations, one collection, and a policy for each round."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"policy": config.to_dict(CFG), "temperature": 1.6}))
    for stage, seeds in (("demonstrations", range(6)), ("collect-0", range(10, 14))):
        disk.write(folder / "stages" / stage / "episodes", map(episode, seeds))
    for k in range(rounds + 1):
        checkpoint.save(folder / "stages" / (f"grpo-{k}" if k else "sft") / "policy", params(k))
    for stage in (folder / "stages").iterdir():
        (stage / "done.json").write_text('{"seconds": 1.0}')
    return folder
