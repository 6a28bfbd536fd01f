"""Run by test_sharding.py in a process of its own: training steps and imagination, on every mesh it is told.

    python tests/core/mesh_cases.py world,grpo 1x1x1 2x2x2      prints one line of JSON: mesh -> case -> numbers

JAX makes forced CPU devices only as it starts: XLA_FLAGS holds --xla_force_host_platform_device_count=8.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from tests import joined  # noqa: F401  # before anything is computed
from tests.sizes import draw_world, fake_reward_train
from wovr_jax import learner
from wovr_jax.core import sharding
from wovr_jax.data import stream
from wovr_jax.data.batches import Layout
from wovr_jax.imagine import imagine
from wovr_jax.policy import train as sft
from wovr_jax.policy import vla
from wovr_jax.policy.actions import Codec
from wovr_jax.policy.tokenizer import Tokenizer
from wovr_jax.reward import classifier
from wovr_jax.reward import train as reward_train
from wovr_jax.types import NULL_ACTION, Episode, Imagined, Start
from wovr_jax.world import latents as world_latents
from wovr_jax.world import model as world_model
from wovr_jax.world import train as world_train
from wovr_jax.world.dit import DiTConfig

STEPS, BATCH = 5, 16
KEY = jax.random.key(0)
# Heads, widths and layers that four devices divide.
WORLD = world_model.WorldConfig.fake(dit=DiTConfig.fake(dim=48, heads=4, ffn=64))
POLICY = vla.VLAConfig.fake()
REWARD = classifier.RewardConfig.fake()


def world() -> list[float]:
    """Losses of the world model's training."""
    rng = np.random.default_rng(0)
    windows, size = 64, (WORLD.latents, 2, 2, WORLD.dit.channels)
    latent, still = (jnp.asarray(rng.normal(size=(count, *size)), jnp.float32) for count in (windows, 4))
    action = jnp.asarray(rng.normal(size=(windows, WORLD.frames, 7)), jnp.float32)
    data = world_latents.Latents(latent, action, jnp.zeros(windows, jnp.int32), still, 16)
    how = world_train.WorldTrainConfig(steps=STEPS, batch=BATCH, lr=1e-2, warmup=1)
    params = world_model.networks(WORLD)[0].init(KEY)
    return _losses(*world_train.make(WORLD, how, params, data, KEY))


def read() -> list[float]:
    """Batches that are read from episodes: each row lies in its place, cut over the devices."""
    rng, steps = np.random.default_rng(0), np.full(4, 24)
    frame, action = rng.integers(0, 256, (4, 25, 4, 4, 3), np.uint8), rng.normal(size=(4, 24, 7)).astype(np.float32)
    made = [Episode(frame[e], action[e], np.zeros(25, bool), "reach", 0, e, "base", action[e]) for e in range(4)]
    reader = stream.Stream(made, steps, np.ones(4, bool), Layout(), stream.StreamConfig(visit=2))
    feed = stream.Feed(reader, BATCH, (1,), STEPS)
    found = [feed(i)["action"] for i in range(STEPS)]
    _spread(found)
    return [float((np.asarray(batch).sum((1, 2)) * np.arange(BATCH)).sum()) for batch in found]


def policy() -> list[float]:
    """Losses of supervised fine-tuning, the towers frozen."""
    rng = np.random.default_rng(0)
    label = rng.uniform(-1, 1, (BATCH, 8, 7)).astype(np.float32)
    frame = rng.integers(0, 256, (BATCH, 16, 16, 3), np.uint8)
    prompts = Tokenizer.tabletop().prompts(["pick up the red block", "pick up the blue block"])
    arrays = {"frame_BHWC": frame, "label_BTA": label, "task_B": np.arange(BATCH) % 2}
    data = sft.demonstrations(arrays, Codec(), prompts)
    how = sft.SFTConfig(steps=STEPS, batch=BATCH, warmup=1)
    return _losses(*sft.make(POLICY, how, vla.network(POLICY).init(KEY), data, KEY))


def reward() -> list[float]:
    """Losses of the success classifier; its batch statistics are of the whole batch."""
    rng = np.random.default_rng(0)
    frame, label = rng.integers(0, 256, (64, 16, 16, 3), np.uint8), rng.random(64) < 0.5
    data = reward_train.dataset(frame, label, np.zeros(64, np.int32))
    how = fake_reward_train(batch=BATCH)
    return _losses(*reward_train.make(REWARD, how, classifier.network(REWARD).init(KEY), data, KEY))


def dream() -> list[float]:
    """Imagination by policy, world model and classifier: sums over each chunk of what it showed and did."""
    out = _dream()
    frames = jnp.abs(out.frame_BNHWC).sum((0, 2, 3, 4)) / 1000
    return [*frames.tolist(), *out.action_BNTA.sum((0, 2, 3)).tolist(), *out.prob_BNT.sum((0, 2)).tolist()]


def grpo() -> list[float]:
    """The learner on an imagined batch: loss and size of the gradient of each update."""
    out = _dream()
    success = jnp.asarray(np.random.default_rng(0).random(out.success_BNT.shape) < 0.1)
    out = dataclasses.replace(out, success_BNT=success)
    # With Adam's usual eps the sign of a gradient that is all rounding would move a weight by the whole rate.
    how = learner.LearnerConfig(lr=1e-3, eps=1e-3, minibatches=2, microbatch=8)
    update = learner.make_update(how, vla.network(POLICY), 1.0, vla.AXES)
    state, found = learner.create(how, vla.network(POLICY).init(KEY), axes=vla.AXES), []
    for i in range(STEPS):
        state, metrics = update(state, out, jax.random.fold_in(KEY, i))
        found += [float(metrics["loss"]), float(metrics["grad_norm"])]
    _spread(state)
    return found


def _dream() -> Imagined:
    frame = jax.random.uniform(KEY, (BATCH, 16, 16, 3), minval=-1.0)
    memory = jnp.repeat(frame[:, None], WORLD.slots, axis=1)
    null = jnp.broadcast_to(jnp.asarray(NULL_ACTION), (BATCH, WORLD.slots, 7))
    prompt = jnp.asarray(Tokenizer.tabletop().prompts(["pick up the red block"]))[jnp.zeros(BATCH, jnp.int32)]
    start = Start(
        anchor_BHWC=frame,
        memory_BMHWC=memory,
        action_BMA=null,
        prompt_BL=prompt,
        task_B=jnp.zeros(BATCH, jnp.int32),
        keyframe_B=jnp.zeros(BATCH, bool),
        step_B=jnp.zeros(BATCH, jnp.int32),
    )
    params = {
        "policy": sharding.place(vla.network(POLICY).init(KEY), vla.AXES),
        "world": sharding.place(draw_world(WORLD, KEY), world_model.AXES),
        "reward": sharding.whole(classifier.network(REWARD).init(KEY)),
    }

    @jax.jit
    def roll(params: dict, start: Start) -> Imagined:
        act = vla.policy(POLICY, params["policy"], Codec())
        score = classifier.score(REWARD, params["reward"])
        return imagine(act, world_model.world(WORLD, params["world"]), score, start, KEY, chunks=2)

    return roll(params, start)


def _losses(state, step) -> list[float]:
    found = []
    for i in range(STEPS):
        state, metrics = step(state, jnp.int32(i))
        found.append(float(metrics["loss"]))
    _spread(state)
    return found


def _spread(state) -> None:
    """Every array of the state is on every device of the mesh, none on one of them alone."""
    over = sharding.current()
    wanted = 1 if over is None else over.size
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        assert len(leaf.sharding.device_set) == wanted, (jax.tree_util.keystr(path), leaf.sharding)


CASES = {case.__name__: case for case in (world, read, policy, reward, dream, grpo)}


def main(cases: str, *names: str) -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    found = {}
    for name in names:
        with sharding.use(sharding.MeshConfig(*map(int, name.split("x")))):
            found[name] = {}
            for case in cases.split(","):
                found[name][case] = CASES[case]()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
