"""Training of the transformer: what the network is shown, what is scored, exact resumption."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiles import count_compiles
from tests.sizes import fake_world_train
from wovr_jax.nn import lora
from wovr_jax.types import NULL_ACTION
from wovr_jax.world import flow, model, train
from wovr_jax.world.dit import DiTLoRA
from wovr_jax.world.latents import Batch, Latents
from wovr_jax.world.model import WorldConfig
from wovr_jax.world.train import WorldTrainConfig

CFG = WorldConfig.fake()
TRAIN = fake_world_train()


def latents(episodes=3, each=4, seed=0):
    """Encoded windows without a VAE: smooth latents that move with the actions."""
    rng = np.random.default_rng(seed)
    count = episodes * each
    action = rng.uniform(-1, 1, (count, 13, 7)).astype(np.float32)
    base = rng.standard_normal((count, 1, 2, 2, 4)).astype(np.float32)
    move = action.mean(axis=(1, 2))[:, None, None, None, None] * np.arange(4).reshape(1, 4, 1, 1, 1)
    return Latents(
        latent_Ifhwc=jnp.asarray(base + move, jnp.float32),
        action_IFA=jnp.asarray(action),
        episode_I=jnp.asarray(np.arange(count) % episodes, jnp.int32),
        static_Efhwc=jnp.asarray(
            100.0 + np.arange(episodes).reshape(-1, 1, 1, 1, 1) * np.ones((1, 4, 2, 2, 4)), jnp.float32
        ),
        starts=episodes,
    )


@pytest.fixture(scope="module")
def dit_params():
    return model.networks(CFG)[0].init(jax.random.key(0))


class Spy:
    """Stands for the transformer: keeps what it is shown, answers with ``velocity``."""

    def __init__(self, velocity):
        self.velocity, self.seen = velocity, []

    def __call__(self, params, latent, time, action):
        self.seen.append((latent, time, action))
        return self.velocity


def spied_loss(monkeypatch, cfg, settings, batch, velocity, key=None):
    spy = Spy(velocity)
    monkeypatch.setattr(train, "networks", lambda cfg: (spy, None))
    total, metrics = train.loss(cfg, settings, {}, batch, jax.random.key(1) if key is None else key)
    return total, metrics, *spy.seen[0]


def first_batch(size=3):
    data = latents()
    return Batch(data.latent_Ifhwc[:size], data.action_IFA[:size])


def test_context_is_shown_at_time_zero_with_noisy_memory(monkeypatch):
    batch = first_batch()
    clean = batch.latent_Bfhwc
    _, _, shown, time, _ = spied_loss(monkeypatch, CFG, TRAIN, batch, jnp.zeros_like(clean))
    noise = jax.random.normal(jax.random.split(jax.random.key(1))[1], clean.shape)
    sigma = time[:, 2] / 1000
    np.testing.assert_array_equal(time[:, :2], 0.0)
    np.testing.assert_array_equal(time[:, 2], time[:, 3])
    np.testing.assert_array_equal(shown[:, 0], clean[:, 0])
    np.testing.assert_allclose(shown[:, 1], (19 * clean[:, 1] + 5 * noise[:, 1]) / 24, atol=1e-5)
    level = sigma[:, None, None, None, None]
    np.testing.assert_allclose(shown[:, 2:], (1 - level) * clean[:, 2:] + level * noise[:, 2:], atol=1e-5)

    quiet = dataclasses.replace(CFG, noisy_context=False)
    _, _, shown, _, _ = spied_loss(monkeypatch, quiet, TRAIN, batch, jnp.zeros_like(clean))
    np.testing.assert_array_equal(shown[:, :2], clean[:, :2])


def test_only_future_latents_are_scored_and_weighted(monkeypatch):
    batch = first_batch()
    noise = jax.random.normal(jax.random.split(jax.random.key(1))[1], batch.latent_Bfhwc.shape)
    perfect = noise - batch.latent_Bfhwc
    wrong_context = perfect.at[:, :2].add(1e3)
    total, *_ = spied_loss(monkeypatch, CFG, TRAIN, batch, wrong_context)
    assert total < 1e-10
    # Off by one everywhere: squared error 1 a window, times its weight. Data minus noise would not give this.
    total, metrics, _, time, _ = spied_loss(monkeypatch, CFG, TRAIN, batch, perfect + 1.0)
    np.testing.assert_allclose(total, flow.weight(time[:, 2], CFG.flow).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["velocity_mse"], 1.0, rtol=1e-5)
    uniform = dataclasses.replace(TRAIN, weighting="uniform")
    assert spied_loss(monkeypatch, CFG, uniform, batch, perfect + 1.0)[0] == pytest.approx(1.0, rel=1e-5)


def test_static_clips_replace_latents_and_actions_of_their_episode():
    data = latents()
    always = dataclasses.replace(TRAIN, static_share=1.0)
    batch = train.draw(jax.random.key(0), data, 16, always)
    assert set(np.unique(batch.latent_Bfhwc)) <= {100.0, 101.0, 102.0}
    np.testing.assert_array_equal(batch.action_BFA, np.broadcast_to(np.float32(NULL_ACTION), (16, 13, 7)))
    never = dataclasses.replace(TRAIN, static_share=0.0)
    assert train.draw(jax.random.key(0), data, 16, never).latent_Bfhwc.max() < 100.0


def test_share_of_episode_starts():
    data = latents()
    chosen = dataclasses.replace(TRAIN, static_share=0.0, start_share=1.0)
    batch = train.draw(jax.random.key(0), data, 32, chosen)
    starts = {float(x) for x in data.latent_Ifhwc[: data.starts, 0, 0, 0, 0]}
    assert {float(x) for x in batch.latent_Bfhwc[:, 0, 0, 0, 0]} <= starts


def test_training_learns_and_resumes_bit_for_bit(dit_params):
    settings = fake_world_train(steps=40, batch=8, lr=3e-3, static_share=0.0, ema=0.9)
    data, key = latents(), jax.random.key(5)
    state, step = train.make(CFG, settings, dit_params, data, key)
    with count_compiles() as compiles:
        seen = []
        for i in range(40):
            state, metrics = step(state, jnp.asarray(i, jnp.int32))
            seen.append(float(metrics["velocity_mse"]))
            if i == 29:
                kept = jax.device_get(state)
    assert np.mean(seen[-10:]) < 0.8 * np.mean(seen[:5])
    assert compiles["step"] == 1
    assert np.isfinite(float(metrics["grad_norm"]))

    again, step = train.make(CFG, settings, dit_params, data, key)
    again = jax.tree.map(jnp.asarray, kept)
    for i in range(30, 40):
        again, _ = step(again, jnp.asarray(i, jnp.int32))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), jax.device_get(state))

    averaged, last = jax.tree.leaves(state.result), jax.tree.leaves(state.params)
    assert any(not np.array_equal(a, b) for a, b in zip(averaged, last, strict=True))


def test_the_caller_keeps_its_parameters(dit_params):
    state, step = train.make(CFG, TRAIN, dit_params, latents(), jax.random.key(0))
    step(state, jnp.asarray(0, jnp.int32))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(dit_params))  # donated ones could not be read


def test_a_refresh_mixes_old_and_new(dit_params):
    new, old = latents(), latents(seed=1)
    old = old.replace(latent_Ifhwc=old.latent_Ifhwc + 50.0)
    settings = fake_world_train(batch=8, replay_share=0.25, static_share=0.0)
    state, step = train.make(CFG, settings, dit_params, new, jax.random.key(0), replay=old)
    batch, _ = step.batch(state, jnp.asarray(0, jnp.int32))
    assert (batch.latent_Bfhwc.mean(axis=(1, 2, 3, 4)) > 25).tolist() == [False] * 6 + [True] * 2


def test_validation_is_repeatable_and_knows_the_copy(dit_params):
    data = latents()
    measure = train.validation(CFG, TRAIN, data, jax.random.key(0), windows=5)
    first, second = measure(dit_params), measure(dit_params)
    assert first == second
    chosen = data.latent_Ifhwc[np.array([0, 2, 5, 8, 11])]
    np.testing.assert_allclose(first["val_copy_mse"], jnp.square(chosen[:, 1:2] - chosen[:, 2:]).mean(), rtol=1e-5)
    assert {name: float(value) > 0 for name, value in first.items()} == dict.fromkeys(
        ("val_loss", "val_sample_mse", "val_copy_mse"), True
    )


def test_refuses_what_cannot_be_trained_on(dit_params):
    empty = jax.tree.map(lambda leaf: leaf[:0], latents())
    with pytest.raises(ValueError, match="set of windows is empty"):
        train.make(CFG, TRAIN, dit_params, empty, jax.random.key(0))
    with pytest.raises(ValueError, match="no held-out window"):
        train.validation(CFG, TRAIN, empty, jax.random.key(0))
    with pytest.raises(ValueError, match="schedule"):
        WorldTrainConfig(schedule="linear")


# --- adapters -------------------------------------------------------------------------------


def test_only_adapters_are_trained_and_kept_and_folded_in_for_use():
    params = model.networks(CFG)[0].init(jax.random.key(0))
    # A network that was trained: its zero-initialised head would let no gradient through to the adapters.
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    settings = fake_world_train(steps=30, batch=8, lr=1e-2, static_share=0.0, lora=DiTLoRA.wan(rank=4))
    before, data, key = jax.device_get(params), latents(), jax.random.key(5)
    state, step = train.make(CFG, settings, params, data, key)
    held = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]}
    # Adapters, and the layers that read actions: a video model brings none, and nothing else is held.
    assert all("lora_" in name or "'action_" in name for name in held if "kernel" in name or "bias" in name)
    assert {name for name in params if name.startswith("action_")} == {"action_cross", "action_adaln"} < {*state.params}
    held_blocks = sum(leaf.size for leaf in jax.tree.leaves(state.params["blocks"]))
    assert held_blocks < 0.3 * sum(leaf.size for leaf in jax.tree.leaves(params["blocks"]))

    seen = []
    for i in range(30):
        state, metrics = step(state, jnp.asarray(i, jnp.int32))
        seen.append(float(metrics["velocity_mse"]))
    assert np.mean(seen[-8:]) < 0.95 * np.mean(seen[:5])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), before)

    merged = train.merge_weights(settings, state.result, params)
    batch, k_loss = first_batch(), jax.random.key(9)
    beside = train.loss(CFG, settings, lora.join(params, state.params), batch, k_loss)[0]
    plain = dataclasses.replace(settings, lora=None)
    folded, old = (train.loss(CFG, plain, one, batch, k_loss)[0] for one in (merged, params))
    np.testing.assert_allclose(folded, beside, rtol=1e-4)
    assert abs(float(folded - old)) > 1e-3 * float(old)  # what was learned is in the merged weights
    for name in ("action_cross", "action_adaln"):
        jax.tree.map(np.testing.assert_array_equal, merged[name], state.result[name])
        assert not np.array_equal(merged[name]["inner"]["kernel"], before[name]["inner"]["kernel"])


def test_beside_adapters_a_transformer_learns_to_read_actions_that_it_never_saw():
    """Fresh action layers beside released weights: with frozen ones the actions of a window would mean nothing."""
    params = model.networks(CFG)[0].init(jax.random.key(0))
    noise = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    # Whatever the action, the same comes out of layers that end in zeros.
    zeros = {name: jax.tree.map(jnp.zeros_like, noise[name]["outer"]) for name in ("action_cross", "action_adaln")}
    blind = noise | {name: noise[name] | {"outer": last} for name, last in zeros.items()}
    settings = fake_world_train(steps=20, batch=8, lr=1e-2, static_share=0.0, lora=DiTLoRA.wan(rank=4))
    state, step = train.make(CFG, settings, blind, latents(), jax.random.key(5))
    for i in range(20):
        state, _ = step(state, jnp.asarray(i, jnp.int32))
    batch, plain = first_batch(), dataclasses.replace(settings, lora=None)
    other = dataclasses.replace(batch, action_BFA=-batch.action_BFA)

    def differs(params):
        ours, theirs = (train.loss(CFG, plain, params, one, jax.random.key(9))[0] for one in (batch, other))
        return abs(float(ours - theirs))

    assert differs(blind) == 0.0
    assert differs(train.merge_weights(settings, state.result, blind)) > 1e-4


def test_adapters_of_every_layer_go_together_with_layers_that_are_trained_whole(dit_params):
    settings = fake_world_train(steps=2, batch=8, lr=1e-2, lora=DiTLoRA(rank=2, targets=("action_*", "head")))
    state, step = train.make(CFG, settings, dit_params, latents(), jax.random.key(5))
    state, metrics = step(state, jnp.asarray(0, jnp.int32))
    assert np.isfinite(float(metrics["loss"]))
    assert {"kernel", "bias", "lora_a", "lora_b"} == set(state.params["action_cross"]["inner"])
    merged = train.merge_weights(settings, state.result, dit_params)
    batch, plain = first_batch(), dataclasses.replace(settings, lora=None)
    beside = train.loss(CFG, settings, lora.join(dit_params, state.params), batch, jax.random.key(9))[0]
    np.testing.assert_allclose(train.loss(CFG, plain, merged, batch, jax.random.key(9))[0], beside, rtol=1e-4)


def test_adapters_without_a_layer_are_refused(dit_params):
    settings = fake_world_train(lora=DiTLoRA(targets=("blocks/selfattn/*",)))
    with pytest.raises(ValueError, match=r"no layer matches 'blocks/selfattn/\*'; there are: .*blocks/self_attn/q"):
        train.make(CFG, settings, dit_params, latents(), jax.random.key(0))
