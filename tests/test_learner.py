"""The learner against what it should do by arithmetic, by loops and by optax alone."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.compiles import count_compiles
from tests.sizes import fake_learner
from tests.surrogate import surrogate
from wovr_jax import grpo, learner
from wovr_jax.core import checkpoint
from wovr_jax.grpo import GRPOConfig
from wovr_jax.learner import LearnerConfig
from wovr_jax.train.optimizers import find_frozen
from wovr_jax.types import Imagined

B, N, T, A, K = 8, 3, 2, 2, 5
KEY = jax.random.key(0)


def logits_fn(params, frame_BHWC, prompt_BL):
    """A linear policy with a frozen-able eye and a word table."""
    seen_BD = frame_BHWC.reshape(frame_BHWC.shape[0], -1) @ params["vision"]["eye"]
    seen_BD = jnp.tanh(seen_BD + jnp.sum(params["word"][prompt_BL], axis=1))
    return (seen_BD @ params["head"]).reshape(-1, T, A, K)


def make_params(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "vision": {"eye": 0.5 * jax.random.normal(keys[0], (12, 6))},
        "word": 0.5 * jax.random.normal(keys[1], (7, 6)),
        "head": 0.5 * jax.random.normal(keys[2], (6, T * A * K)),
    }


def log_probs_of(params, frame, prompt, token, temperature):
    logits = jax.vmap(logits_fn, (None, 1, None), 1)(params, frame, prompt)
    return jnp.take_along_axis(jax.nn.log_softmax(logits / temperature), token[..., None], -1)[..., 0]


def make_imagined(params, temperature=1.0, success=None, seed=0):
    """Rollouts whose log-probabilities are those of ``params``."""
    rng = np.random.default_rng(seed)
    frame = jnp.asarray(rng.uniform(-1, 1, (B, N, 2, 2, 3)), jnp.float32)
    prompt = jnp.asarray(rng.integers(0, 7, (B, 3)), jnp.int32)
    token = jnp.asarray(rng.integers(0, K, (B, N, T, A)), jnp.int32)
    if success is None:
        success = rng.random((B, N, T)) < 0.2
        success[:4] &= np.arange(4)[:, None, None] % 2 == 0  # so that the first groups of two and of four differ
        success[0, 0, 1] = True
    logp = log_probs_of(params, frame, prompt, token, temperature)
    success = jnp.asarray(success)
    return Imagined(
        frame_BNHWC=frame,
        prompt_BL=prompt,
        task_B=jnp.zeros(B, jnp.int32),
        token_BNTA=token,
        logp_BNTA=logp,
        action_BNTA=jnp.zeros((B, N, T, A)),
        prob_BNT=success.astype(jnp.float32),
        success_BNT=success,
    )


def run(cfg, params=None, imagined=None, frozen=(), ref_params=None, key=KEY, updates=1, temperature=1.0):
    params = make_params() if params is None else params
    imagined = make_imagined(params, temperature) if imagined is None else imagined
    state = learner.create(cfg, params, find_frozen(params, *frozen))
    update = learner.make_update(cfg, logits_fn, temperature)
    for _ in range(updates):
        state, metrics = update(state, imagined, key, ref_params)
    return state, metrics


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# ------------------------------------------------------------------ direction and size of a step


def bandit(params, frame_BHWC, prompt_BL):
    """One parameter, two tokens."""
    return jnp.broadcast_to(jnp.stack([params["theta"], jnp.zeros(())]), (frame_BHWC.shape[0], 1, 1, 2))


def pull_both():
    """Two rollouts of the bandit at even odds: token 0 succeeds and token 1 fails."""
    return Imagined(
        frame_BNHWC=jnp.zeros((2, 1, 1, 1, 1)),
        prompt_BL=jnp.zeros((2, 1), jnp.int32),
        task_B=jnp.zeros(2, jnp.int32),
        token_BNTA=jnp.array([0, 1]).reshape(2, 1, 1, 1),
        logp_BNTA=jnp.full((2, 1, 1, 1), jnp.log(0.5)),
        action_BNTA=jnp.zeros((2, 1, 1, 1)),
        prob_BNT=jnp.array([1.0, 0.0]).reshape(2, 1, 1),
        success_BNT=jnp.array([True, False]).reshape(2, 1, 1),
    )


def test_bandit_learns_the_rewarded_token():
    """One parameter, two tokens, one step: token 0 succeeds and token 1 fails."""
    imagined = pull_both()
    cfg = fake_learner()
    state, metrics = learner.make_update(cfg, bandit, 1.0)(learner.create(cfg, {"theta": jnp.zeros(())}), imagined, KEY)
    # advantages 0.5 and -0.5, d log p / d theta = 0.5 and -0.5: gradient of the loss -(0.25 + 0.25) / 2 = -0.25.
    # A first Adam step has the size of the rate: theta = 0.1. With the sign lost it would be -0.1,
    # and without the group mean token 1 would have no gradient: -0.125.
    np.testing.assert_allclose(metrics["grad_norm"], 0.25, rtol=1e-6)
    np.testing.assert_allclose(state.params["theta"], 0.1, rtol=1e-3)
    assert jax.nn.sigmoid(state.params["theta"]) > 0.52
    np.testing.assert_allclose(metrics["ratio_mean"], 1.0)


@pytest.mark.parametrize("preset", [GRPOConfig.paper(group=4), GRPOConfig.rlinf(group=4)], ids=["paper", "rlinf"])
def test_one_step_is_adamw_on_the_surrogate(preset):
    cfg = fake_learner(grpo=preset, weight_decay=0.1, clip_norm=0.01)
    params = make_params()
    imagined = make_imagined(params, 1.6)
    signal = grpo.signal(imagined.success_BNT, preset)

    def loss(params):
        logits = jax.vmap(logits_fn, (None, 1, None), 1)(params, imagined.frame_BNHWC, imagined.prompt_BL)
        all_logp = jax.nn.log_softmax(logits / 1.6)
        logp = jnp.take_along_axis(all_logp, imagined.token_BNTA[..., None], -1)[..., 0]
        return surrogate(logp, imagined.logp_BNTA, signal.advantage_B, signal.valid_BNT, signal.keep_B, preset)[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    transform = optax.chain(optax.clip_by_global_norm(0.01), optax.adamw(0.1, 0.9, 0.999, 1e-5, weight_decay=0.1))
    updates, _ = transform.update(grads, transform.init(params), params)
    state, metrics = run(cfg, params, imagined, temperature=1.6)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-4)
    assert optax.tree.norm(grads) > 0.01
    expected = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), state.params, expected)


def test_loss_and_metrics_equal_numpy():
    """An old policy that differs from the trained one, so that ratios are not 1; everything again with loops."""
    cfg = fake_learner(minibatches=1, grpo=GRPOConfig.fake(clip_high=0.28, kl=0.05, entropy=0.02))
    params, old, ref = make_params(0), make_params(1), make_params(2)
    imagined = make_imagined(old, 1.3)
    _, metrics = run(cfg, params, imagined, ref_params=ref, temperature=1.3)

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    def numpy_policy(p, frame, prompt):
        seen = np.tanh(frame.reshape(-1) @ p["vision"]["eye"] + p["word"][prompt].sum(0))
        return log_softmax((seen @ p["head"]).reshape(T, A, K) / 1.3)

    host, params, ref = jax.tree.map(np.asarray, (imagined, params, ref))
    success = host.success_BNT.reshape(B, -1)
    ends = [int(row.argmax()) + 1 if row.any() else N * T for row in success]
    reward = success.any(1).astype(float)
    ratios, total, clipped = [], 0.0, 0
    for i in range(B):
        advantage = reward[i] - reward[i - i % 2 : i - i % 2 + 2].mean()
        for t in range(ends[i]):
            n, s = divmod(t, T)
            logp = numpy_policy(params, host.frame_BNHWC[i, n], host.prompt_BL[i])[s]
            ref_logp = numpy_policy(ref, host.frame_BNHWC[i, n], host.prompt_BL[i])[s]
            for a in range(A):
                ratio = np.exp(logp[a, host.token_BNTA[i, n, s, a]] - host.logp_BNTA[i, n, s, a])
                objective = min(ratio * advantage, np.clip(ratio, 0.8, 1.28) * advantage)
                kl = (np.exp(logp[a]) * (logp[a] - ref_logp[a])).sum()
                entropy = -(np.exp(logp[a]) * logp[a]).sum()
                total += (-objective + 0.05 * kl - 0.02 * entropy) / (A * ends[i] * B)
                ratios.append(ratio)
                clipped += objective != ratio * advantage
    assert 0 < clipped < len(ratios)
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-4)
    np.testing.assert_allclose(metrics["ratio_mean"], np.mean(ratios), rtol=1e-4)
    np.testing.assert_allclose(metrics["ratio_max"], np.max(ratios), rtol=1e-4)
    np.testing.assert_allclose(metrics["clip_fraction"], clipped / len(ratios), rtol=1e-4)
    np.testing.assert_allclose(metrics["ratio_gap"], np.abs(np.log(ratios)).max(), rtol=1e-4)
    np.testing.assert_allclose(metrics["return_mean"], reward.mean())
    np.testing.assert_allclose(metrics["length"], np.mean(ends) / (N * T), rtol=1e-6)


def test_a_gate_may_say_what_each_chunk_is_worth():
    params, cfg = make_params(), fake_learner(grpo=GRPOConfig(group=4))
    imagined = make_imagined(params)
    worth_B = grpo.signal(imagined.success_BNT, cfg.grpo).advantage_B
    same = dataclasses.replace(imagined, advantage_BN=jnp.repeat(worth_B[:, None], N, axis=1))
    assert_same(run(cfg, imagined=same)[0].params, run(cfg, imagined=imagined)[0].params)
    # Of rollouts that are worth nothing by their groups, one chunk alone is learned from, in both directions.
    lost = make_imagined(params, success=np.zeros((B, N, T), bool))
    told = {sign: np.zeros((B, N), np.float32) for sign in (1, -1)}
    before = log_probs_of(params, lost.frame_BNHWC, lost.prompt_BL, lost.token_BNTA, 1.0)[2, 1].sum()
    for sign, advantage_BN in told.items():
        advantage_BN[2, 1] = sign
        state, metrics = run(cfg, imagined=dataclasses.replace(lost, advantage_BN=jnp.asarray(advantage_BN)))
        after = log_probs_of(state.params, lost.frame_BNHWC, lost.prompt_BL, lost.token_BNTA, 1.0)[2, 1].sum()
        assert metrics["skipped"] == 0 and sign * (after - before) > 0


def test_temperature_must_be_the_actors():
    params = make_params()
    imagined = make_imagined(params, temperature=1.6)
    _, right = run(fake_learner(), params, imagined, temperature=1.6)
    _, wrong = run(fake_learner(), params, imagined, temperature=1.0)
    assert right["ratio_gap"] < 1e-5
    assert wrong["ratio_gap"] > 0.05


def test_kl_pulls_back_to_the_reference():
    params, ref = make_params(0), make_params(1)
    nobody = np.zeros((B, N, T), bool)  # no advantage: the reference alone moves the policy
    cfg = fake_learner(lr=0.02, grpo=GRPOConfig.fake(kl=1.0))
    imagined = make_imagined(params, success=nobody)
    _, before = run(cfg, params, imagined, ref_params=ref)
    _, after = run(cfg, params, imagined, ref_params=ref, updates=8)
    assert after["kl"] < 0.8 * before["kl"]
    with pytest.raises(ValueError, match="update needs ref_params"):
        run(cfg, params, imagined)


def test_kl_of_an_update_is_of_the_policy_before_against_after():
    """The bandit again, whose two rollouts hold both tokens once: the mean over the samples is the exact KL.

    Its only step is taken at ratio 1, so anything measured in that step is 0.
    """
    part = pull_both()
    for cfg in (fake_learner(lr=0.5), fake_learner(lr=0.5, epochs=3)):
        update = learner.make_update(cfg, bandit, 1.0)
        state, metrics = update(learner.create(cfg, {"theta": jnp.zeros(())}), part, KEY)
        theta = float(state.params["theta"])
        q = 1 / (1 + np.exp(-theta))
        exact = 0.5 * np.log(0.5 / q) + 0.5 * np.log(0.5 / (1 - q))
        assert exact > 0.02  # 0.5 * 0.5 / 8 for a step of half a unit
        np.testing.assert_allclose(metrics["kl_step"], exact, rtol=1e-5)
    # Nothing that counts, nothing moved.
    idle = part.replace(success_BNT=jnp.ones((2, 1, 1), bool))
    assert update(learner.create(cfg, {"theta": jnp.zeros(())}), idle, KEY)[1]["kl_step"] == 0


def test_kl_of_an_update_counts_valid_tokens_once():
    """Several microbatches, padding among them, masked steps and two passes, against the whole batch at once."""
    cfg = fake_learner(microbatch=5, minibatches=2, epochs=2)
    params, temperature = make_params(), 1.3
    imagined = make_imagined(params, temperature)
    state, metrics = run(cfg, params, imagined, temperature=temperature)
    signal = grpo.signal(imagined.success_BNT, cfg.grpo)
    asked = (imagined.frame_BNHWC, imagined.prompt_BL, imagined.token_BNTA)
    counts = np.asarray(signal.valid_BNT & (signal.advantage_B != 0)[:, None, None])
    log_ratio = np.asarray(log_probs_of(state.params, *asked, temperature) - imagined.logp_BNTA)[counts]
    assert 0 < counts.sum() < counts.size
    np.testing.assert_allclose(metrics["kl_step"], np.mean(np.expm1(log_ratio) - log_ratio), rtol=1e-4)
    assert "approx_kl" not in metrics


# ------------------------------------------------------------------ kinds of start


def test_success_and_groups_are_told_apart_by_kind_of_start():
    """Groups of two: from starts one mixed and one won, from keyframes two lost; half of the rollouts by hand."""
    won = np.array([True, False, True, True, False, False, False, False])
    success = np.zeros((B, N, T), bool)
    success[won, 1, 0] = True
    imagined = make_imagined(make_params(), success=success).replace(keyframe_B=jnp.arange(B) >= 4)
    _, metrics = run(fake_learner(), imagined=imagined)
    expected = {"success": 3 / 8, "success_start": 3 / 4, "mixed_start": 0.5, "lost_start": 0, "won_start": 0.5}
    expected |= {"success_keyframe": 0, "mixed_keyframe": 0, "lost_keyframe": 1, "won_keyframe": 0}
    assert {name: float(metrics[name]) for name in expected} == pytest.approx(expected)
    # Rollouts that do not say where they began are not told apart.
    assert not [name for name in run(fake_learner())[1] if name.endswith(("_start", "_keyframe"))]


def test_the_learner_keeps_to_the_deadline():
    """Tokens after it, and a success after it, are as if they had never been."""
    success = np.zeros((B, N, T), bool)
    success[0::2, 2, 1] = True
    live = np.ones((B, N, T), bool)
    live[:4, 2] = False
    imagined = make_imagined(make_params(), success=success)
    late, metrics = run(fake_learner(), imagined=imagined.replace(live_BNT=jnp.asarray(live)))
    np.testing.assert_allclose(metrics["return_mean"], 2 / 8)
    np.testing.assert_allclose(metrics["length"], (4 * 2 + 4 * 3) / 24)
    other = imagined.replace(token_BNTA=imagined.token_BNTA.at[:4, 2].set(0), live_BNT=jnp.asarray(live))
    assert_same(late.params, run(fake_learner(), imagined=other)[0].params)


# ------------------------------------------------------------------ minibatches


@pytest.mark.parametrize("microbatch", [1, 7, 1000])
def test_gradient_accumulation_equals_the_full_batch(microbatch):
    """24 samples; 7 does not divide them: the padding repeats sample 0, which counted again would show."""
    cfg = fake_learner(minibatches=1, microbatch=24, lr=1e-2)
    whole, expected = run(cfg)
    parts, metrics = run(dataclasses.replace(cfg, microbatch=microbatch))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), parts.params, whole.params)
    for name in expected:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("minibatches", "microbatch", "alive"), [(4, 2, 9), (5, 3, 24), (1, 4, 0), (3, 100, 4)])
def test_deal_gives_active_samples_first_and_evenly(minibatches, microbatch, alive):
    active = np.random.default_rng(0).permutation(np.arange(24) < alive)
    cfg = fake_learner(minibatches=minibatches, microbatch=microbatch, epochs=2)
    index, counts = jax.tree.map(np.asarray, learner._deal(jnp.asarray(active), KEY, cfg))
    assert index.shape == counts.shape and index.shape[0] == 2 * minibatches
    epochs = index.reshape(2, -1), counts.reshape(2, -1)
    for epoch_index, epoch_counts in zip(*epochs, strict=True):
        assert sorted(epoch_index[epoch_counts]) == list(np.flatnonzero(active))  # each once
        assert set(epoch_index) == set(range(24))
    assert alive == 0 or not np.array_equal(epochs[0][0], epochs[0][1])  # shuffled again
    per_step = counts.reshape(2 * minibatches, -1)
    assert np.ptp(per_step.sum(1)) <= 1
    assert (np.diff(per_step.astype(int), axis=1) <= 0).all()  # in front


def test_masked_chunks_are_not_computed():
    calls = []

    def counted(params, frame_BHWC, prompt_BL):
        jax.debug.callback(lambda: calls.append(frame_BHWC.shape[0]))
        return logits_fn(params, frame_BHWC, prompt_BL)

    success = np.zeros((B, N, T), bool)
    success[0::2, 0, 0] = True  # 4 rollouts of 1 valid chunk, 4 of 3: 16 of 24 samples
    params = make_params()
    cfg = fake_learner(microbatch=4)
    update, imagined = learner.make_update(cfg, counted, 1.0), make_imagined(params, success=success)
    state, metrics = update(learner.create(cfg, params), imagined, KEY)
    jax.block_until_ready(state)
    jax.effects_barrier()
    assert calls == [4] * 8  # for the step, and once more for what it moved; all of them would be 12
    np.testing.assert_allclose(metrics["length"], (4 * 1 + 4 * 6) / 48)


def test_steps_are_counted_over_epochs():
    cfg = fake_learner(epochs=3, minibatches=2)
    state, metrics = run(cfg)
    assert int(state.step) == 6 and metrics["steps"] == 6 and metrics["skipped"] == 0
    again, _ = run(cfg)
    assert_same(state, again)  # the key alone decides the order
    other, _ = run(cfg, key=jax.random.key(1))
    assert not np.array_equal(other.params["head"], state.params["head"])


def test_warmup_starts_above_zero():
    cfg = fake_learner(warmup=4, epochs=1)
    plain, _ = run(dataclasses.replace(cfg, warmup=0))
    first, _ = run(cfg)
    start = make_params()["head"]
    np.testing.assert_allclose(first.params["head"] - start, (plain.params["head"] - start) / 4, atol=1e-6)


def test_rate_scales_every_step_without_compiling_again():
    cfg, params = fake_learner(), make_params()
    update = learner.make_update(cfg, logits_fn, 1.0)
    ends = []
    with count_compiles() as compiles:
        for rate in (1.0, 0.25):
            ends.append(update(learner.create(cfg, params, rate=rate), make_imagined(params), KEY)[0].params["head"])
    np.testing.assert_allclose(ends[1] - params["head"], (ends[0] - params["head"]) / 4, atol=1e-6)
    assert compiles["update"] <= 1


# ------------------------------------------------------------------ what must not move


@pytest.mark.parametrize("grpo_cfg", [GRPOConfig.rlinf(group=2), GRPOConfig.paper(group=2)], ids=["rlinf", "paper"])
def test_groups_that_all_agree_leave_everything_untouched(grpo_cfg):
    cfg = fake_learner(grpo=grpo_cfg, weight_decay=0.1, minibatches=2)
    params = make_params()
    update = learner.make_update(cfg, logits_fn, 1.0)
    state, _ = update(learner.create(cfg, params), make_imagined(params), KEY)
    before = jax.tree.map(np.array, state)  # with momentum, which alone would move the parameters
    for outcome in (False, True):
        state, metrics = update(state, make_imagined(params, success=np.full((B, N, T), outcome)), KEY)
        assert_same(state, before)
        assert metrics["skipped"] == 1 and metrics["steps"] == 0
        assert metrics["kept_groups"] == (0 if grpo_cfg.filter else B // 2)
        assert metrics["ratio_mean"] == 1 and all(np.isfinite(value) for value in metrics.values())


def test_frozen_leaves_stay_bit_identical():
    cfg = fake_learner(epochs=2, weight_decay=0.1)
    params = make_params()
    state, _ = run(cfg, params, frozen=("vision",), updates=2)
    np.testing.assert_array_equal(state.params["vision"]["eye"], params["vision"]["eye"])
    assert not np.array_equal(state.params["head"], params["head"])
    assert not np.array_equal(state.params["word"], params["word"])
    # no optimizer state either: moments for two leaves, not three (and Adam's and the schedule's counts)
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(state.opt_state))
    assert shapes == sorted([(), ()] + 2 * [params["head"].shape, params["word"].shape])


def test_frozen_equals_training_the_rest():
    """Freezing is only leaving out: without clipping, the others move as they would beside a trained eye."""
    cfg = fake_learner(clip_norm=0.0)
    free, _ = run(cfg)
    held, _ = run(cfg, frozen=("vision/eye",))
    np.testing.assert_allclose(held.params["head"], free.params["head"], atol=1e-6)


def test_what_cannot_be_frozen_is_refused():
    params, cfg = make_params(), fake_learner()
    for name in ("visoin", "vis", "vision/ey"):
        with pytest.raises(ValueError, match=rf"no parameter under '{name}'.*'head', 'vision', 'word'"):
            find_frozen(params, name)
    assert find_frozen(params, "vision") == find_frozen(params, "vision/eye") == {("vision", "eye")}
    with pytest.raises(ValueError, match="nothing to train"):
        learner.create(cfg, params, find_frozen(params, "vision", "word", "head"))


def test_donation_spares_the_callers_parameters():
    params = make_params()
    run(fake_learner(grpo=GRPOConfig.fake(kl=0.1)), params, ref_params=params, updates=2)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(params))


def test_second_call_does_not_compile():
    cfg = fake_learner(minibatches=2)
    params = make_params()
    state = learner.create(cfg, params)
    update = learner.make_update(cfg, logits_fn, 1.0)
    for seed in range(3):  # other rollouts, other numbers of valid chunks
        state, _ = update(state, make_imagined(params, seed=seed), jax.random.fold_in(KEY, seed))
    assert update._cache_size() == 1


def test_state_goes_through_a_checkpoint(tmp_path):
    cfg = fake_learner()
    state, _ = run(cfg, frozen=("vision",))
    checkpoint.save(tmp_path / "policy", state)
    like = learner.create(cfg, make_params(3), find_frozen(make_params(), "vision"))
    assert_same(checkpoint.restore(tmp_path / "policy", like), state)


def test_misshapen_rollouts_are_refused():
    params = make_params()
    imagined = make_imagined(params)
    cfg = fake_learner()
    with pytest.raises(ValueError, match="token_BNTA and logp_BNTA should both be"):
        learner.make_update(cfg, logits_fn, 1.0)(
            learner.create(cfg, params), imagined.replace(success_BNT=imagined.success_BNT[:, :2]), KEY
        )
    with pytest.raises(ValueError, match="multiple of group=3"):
        bad = dataclasses.replace(cfg, grpo=GRPOConfig(group=3))
        learner.make_update(bad, logits_fn, 1.0)(learner.create(cfg, params), imagined, KEY)


@pytest.mark.parametrize(
    ("name", "value"), [("minibatches", 0), ("microbatch", 0), ("lr", -1.0), ("betas", (1.0, 0.9))]
)
def test_bad_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"LearnerConfig\.{name}"):
        LearnerConfig(**{name: value})


def test_a_temperature_that_no_actor_samples_with_is_refused():
    with pytest.raises(ValueError, match="temperature=0.0"):
        learner.make_update(fake_learner(), logits_fn, 0.0)
