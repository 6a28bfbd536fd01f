"""The one train step, by hand on a line, and in each of the five networks that use it."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.compiles import count_compiles
from tests.sizes import fake_reward_train, fake_sft, fake_world_train
from wovr_jax.core import checkpoint
from wovr_jax.core.history import CheckpointConfig, History
from wovr_jax.policy import towers_train, vla
from wovr_jax.policy import train as sft
from wovr_jax.policy.actions import Codec
from wovr_jax.policy.backbones import TowerConfig
from wovr_jax.policy.tokenizer import Tokenizer
from wovr_jax.policy.towers_train import Scenes, TowerTraining
from wovr_jax.reward import classifier
from wovr_jax.reward import train as reward_train
from wovr_jax.train import loop
from wovr_jax.train import step as train_step
from wovr_jax.train.step import Objective, ReplayableStep, TrainState
from wovr_jax.world import model
from wovr_jax.world import train as world_train
from wovr_jax.world.latents import Latents
from wovr_jax.world.vae import train as vae_train
from wovr_jax.world.vae.net import VAEConfig

KEY = jax.random.key(3)
STEPS = 4
Made = tuple[TrainState, ReplayableStep]

# --- by hand: a line through points -----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Line(Objective):
    """y = w x + offset; ``offset`` is fixed, and a running mean of x is kept."""

    lr: float = 0.1
    average: float = 0.0

    @property
    def decay(self) -> float:
        return self.average

    def optimizer(self) -> optax.GradientTransformation:
        return optax.masked(optax.sgd(self.lr), {"w": True, "mean": False})

    def draw(self, key: jax.Array, data: jax.Array) -> tuple[jax.Array, jax.Array]:
        return data[jax.random.randint(key, (2,), 0, len(data))], key

    def loss(self, params: Any, fixed: jax.Array, batch: jax.Array, key: jax.Array) -> tuple:
        error = params["w"] * batch + fixed
        return jnp.square(error).mean(), {"error": error.mean()}, params | {"mean": batch.mean()}

    def is_statistic(self, path: tuple) -> bool:
        return path[-1].key == "mean"


def line(objective: Line, data: float = 2.0) -> Made:
    feed = train_step.resident(jnp.full(3, data))
    params = {"w": jnp.float32(1.0), "mean": jnp.float32(0.0)}
    return train_step.make(objective, params, feed, KEY, fixed=jnp.float32(1.0))


def test_an_update_by_hand() -> None:
    state, step = line(Line())
    state, metrics = step(state, jnp.int32(0))
    # x = 2: the error is 1 * 2 + 1 = 3, its slope in w is 2 * 3 * 2 = 12, and w moves by a tenth of that.
    assert {name: float(value) for name, value in metrics.items()} == {"loss": 9.0, "error": 3.0, "grad_norm": 12.0}
    np.testing.assert_allclose(state.params["w"], 1.0 - 1.2, rtol=1e-6)
    assert state.params["mean"] == 2.0  # what the forward pass left, not what a gradient moved
    assert state.ema is None and state.result is state.params


def test_the_average_forgets_early_weights() -> None:
    state, step = line(Line(average=0.5))
    for i in range(3):
        before = state.ema["w"].item()
        state, _ = step(state, jnp.int32(i))
        keep = min(0.5, (1 + i) / (10 + i))
        np.testing.assert_allclose(state.ema["w"], keep * before + (1 - keep) * state.params["w"], rtol=1e-6)
    assert state.result is state.ema


def test_other_data_keys_and_weights_run_in_the_program_that_is_there() -> None:
    step = line(Line(lr=0.3))[1]
    step(line(Line(lr=0.3))[0], jnp.int32(0))
    with count_compiles() as compiles:
        state, step = line(Line(lr=0.3), data=5.0)
        _, metrics = step(state, jnp.int32(0))
    assert compiles["step"] == 0
    assert metrics["loss"] == 36.0  # of its own data: a constant in the program would have given 9


# --- the five networks ------------------------------------------------------------------------


def world() -> Made:
    rng, count = np.random.default_rng(0), 12
    latent, still = (jnp.asarray(rng.normal(size=(n, 4, 2, 2, 4)), jnp.float32) for n in (count, 3))
    action = jnp.asarray(rng.uniform(-1, 1, (count, 13, 7)), jnp.float32)
    data = Latents(latent, action, jnp.arange(count) % 3, still, 3)
    cfg, train = model.WorldConfig.fake(), fake_world_train(steps=STEPS, ema=0.9)
    return world_train.make(cfg, train, model.networks(cfg)[0].init(KEY), data, KEY)


def policy() -> Made:
    rng, cfg = np.random.default_rng(0), vla.VLAConfig.fake()
    label, frame = rng.uniform(-1, 1, (3, 8, 7)).astype(np.float32), rng.integers(0, 256, (3, 16, 16, 3), np.uint8)
    prompts = Tokenizer.tabletop().prompts(["pick up the red block"])
    arrays = {"frame_BHWC": frame, "label_BTA": label, "task_B": np.zeros(3, int)}
    data = sft.demonstrations(arrays, Codec(), prompts)
    return sft.make(cfg, fake_sft(), vla.network(cfg).init(KEY), data, KEY)


def reward() -> Made:
    rng, cfg = np.random.default_rng(0), classifier.RewardConfig.fake()
    frame, label = rng.integers(0, 256, (64, 16, 16, 3), np.uint8), rng.random(64) < 0.5
    data = reward_train.dataset(frame, label, np.zeros(64, np.int32))
    return reward_train.make(cfg, fake_reward_train(), classifier.network(cfg).init(KEY), data, KEY)


def grey(key: jax.Array, batch: int) -> jax.Array:
    return jax.random.uniform(key, (batch, 5, 1, 1, 1)) * jnp.ones((16, 16, 3))


def vae() -> Made:
    training = vae_train.VAETraining(steps=STEPS, batch=2, warmup=1, optimizer="adamw")
    return vae_train.make(VAEConfig.fake(), training, grey)


def scenes(key: jax.Array, batch: int) -> Scenes:
    k_frame, k_place = jax.random.split(key)
    present, attribute = jnp.ones((batch, 5), bool), jnp.ones((batch, 7), bool)
    frame, place = jax.random.normal(k_frame, (batch, 16, 16, 3)), jax.random.uniform(k_place, (batch, 5, 2))
    return Scenes(frame, place, present, attribute, jnp.full(5, 0.1))


def tower() -> Made:
    return towers_train.make(TowerConfig.fake(), TowerTraining("where", steps=STEPS, batch=2), scenes, KEY)


FIVE = {make.__name__: make for make in (world, policy, reward, vae, tower)}


@pytest.fixture(params=FIVE)
def network(request: pytest.FixtureRequest) -> tuple[str, Callable[[], Made]]:
    return request.param, FIVE[request.param]


def equal(one: Any, other: Any) -> None:
    def raw(leaf: Any) -> Any:
        return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

    jax.tree.map(lambda a, b: np.testing.assert_array_equal(raw(a), raw(b)), one, other)


def test_a_nan_is_dumped_with_the_state_and_the_batch_that_made_it(network, tmp_path: pathlib.Path) -> None:
    name, make = network
    state, step = make()
    loop.fit(name, state, step, 2, folder=tmp_path)
    # As if step 3 had gone wrong in a weight and nobody had looked.
    history = History(tmp_path / "fit", CheckpointConfig())
    restored = history.restore(make()[0])
    assert restored is not None
    leaves, tree = jax.tree.flatten(restored[0].params)
    bad = restored[0].replace(params=jax.tree.unflatten(tree, [jnp.full_like(leaf, jnp.nan) for leaf in leaves]))
    history.save(3, bad, restored[1] | {"step": 3})
    history.wait()

    with pytest.raises(loop.NonFiniteError, match=r"is nan at step 4 of 4\..*nonfinite") as caught:
        loop.fit(name, make()[0], step, STEPS, folder=tmp_path)
    assert caught.value.step == 4
    # The key of the loss is kept with the batch, so that noise and dropout can be drawn again.
    wanted = {"batch": step.batch(bad, jnp.int32(3)), "state": bad}
    equal(checkpoint.restore(tmp_path / "nonfinite", wanted), wanted)
    assert len(jax.tree.leaves(checkpoint.load(tmp_path / "nonfinite")["batch"])) >= 2
    assert checkpoint.meta(tmp_path / "nonfinite") == {"stage": name, "step": 3}


def test_a_state_of_another_size_is_refused(tmp_path: pathlib.Path) -> None:
    state, _ = line(Line())
    history = History(tmp_path / "fit", CheckpointConfig())
    history.save(1, state.replace(params=state.params | {"w": jnp.zeros(3)}), {"step": 1})
    history.wait()
    with pytest.raises(checkpoint.CheckpointError, match=r"params/w: expected float32\[\], got float32\[3\]"):
        history.restore(state)
