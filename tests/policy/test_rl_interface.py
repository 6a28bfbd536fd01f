"""What reinforcement learning asks of the policy: draws from the distribution that it reports, and usable gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from wovr_jax.policy import actions, vla
from wovr_jax.policy.tokenizer import Tokenizer
from wovr_jax.policy.vla import VLAConfig

DRAWS = 20_000
EXTREME = (0.0, 1e4, -1e4, 3e38, -3e38)
"""Logits that a network may have, the last two near the largest float32."""


def probabilities(logits, temperature):
    """Of one slot, in float64 and from the definition."""
    scaled = np.asarray(logits, np.float64) / temperature
    weight = np.exp(scaled - scaled.max())
    return weight / weight.sum()


def p_value(token, p):
    """Chi-square of counts against ``p``; ids that are expected fewer than five times are one class."""
    counts, expected = np.bincount(token, minlength=256), p * len(token)
    rare = expected < 5
    pair = [np.append(x[~rare], x[rare].sum()) for x in (counts, expected)]
    keep = pair[1] > 0
    return stats.chisquare(pair[0][keep], pair[1][keep] * pair[0].sum() / pair[1].sum()).pvalue


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.6])
def test_tokens_come_as_often_as_the_tempered_distribution_says(temperature):
    logits = 2.0 * np.random.default_rng(0).standard_normal((8, 7, 256)).astype(np.float32)
    keys = jax.random.split(jax.random.key(1), DRAWS)
    draw = jax.jit(lambda keys: actions.sample(jnp.broadcast_to(logits[:1, :3], (DRAWS, 1, 3, 256)), keys, temperature))
    token = np.asarray(draw(keys))[:, 0]
    for slot in range(3):
        p = probabilities(logits[0, slot], temperature)
        assert p_value(token[:, slot], p) > 1e-3
        # Wrong answers are seen: another temperature, the order of the slice reversed, a neighbour slot.
        for wrong in (
            probabilities(logits[0, slot], 1.3 * temperature),
            p[::-1],
            probabilities(logits[0, 3], temperature),
        ):
            assert p_value(token[:, slot], wrong) < 1e-6
    pairs = np.histogram2d(token[:, 0] // 64, token[:, 1] // 64, bins=4)[0]
    assert stats.chi2_contingency(pairs).pvalue > 1e-3  # slots are drawn apart from each other


@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_log_probabilities_and_entropy_are_those_of_the_definition(temperature):
    rng = np.random.default_rng(1)
    logits = (5.0 * rng.standard_normal((2, 8, 7, 256))).astype(np.float32)
    token = rng.integers(0, 256, (2, 8, 7))
    p = np.apply_along_axis(probabilities, -1, logits, temperature)
    want = np.log(np.take_along_axis(p, token[..., None], -1))[..., 0]
    np.testing.assert_allclose(actions.log_prob(logits, token, temperature), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(actions.entropy(logits, temperature), -(p * np.log(p)).sum(-1), rtol=1e-5)
    shifted = actions.log_prob(logits + 100.0, token, temperature)  # a constant says nothing
    np.testing.assert_allclose(shifted, want, atol=1e-4)


def test_the_actor_reports_what_the_learner_will_compute():
    cfg = VLAConfig.fake()
    net = vla.network(cfg)
    params = jax.tree.map(lambda leaf: 0.3 * jax.random.normal(jax.random.key(0), leaf.shape), net.shapes())
    frame = jax.random.uniform(jax.random.key(1), (2, 16, 16, 3), minval=-1.0)
    prompt = jnp.asarray(Tokenizer.tabletop().prompts(["pick up the red block"] * 2))
    act = jax.jit(vla.policy(cfg, params, actions.Codec(), 1.6))
    token, logp, _ = act(frame, prompt, jax.random.split(jax.random.key(2), 2))
    logits = jax.jit(lambda *inputs: net(*inputs))(params, frame, prompt)
    p = np.apply_along_axis(probabilities, -1, np.asarray(logits), 1.6)
    want = np.log(np.take_along_axis(p, np.asarray(token)[..., None], -1))[..., 0]
    np.testing.assert_allclose(logp, want, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 1.6])
@pytest.mark.parametrize("high", EXTREME)
def test_gradients_are_finite_everywhere(high, temperature):
    """One id far above or below the others, which is asked for or not."""
    logits = jnp.zeros((1, 1, 2, 256)).at[..., 7].set(high * temperature if abs(high) > 1e38 else high)
    token = jnp.array([[[7, 9]]])

    def objective(logits):
        return (actions.log_prob(logits, token, temperature) + actions.entropy(logits, temperature)).sum()

    value, gradient = jax.value_and_grad(objective)(jnp.clip(logits, -3e38, 3e38))
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert actions.greedy(logits)[0, 0, 0] == (7 if high > 0 else 0)


def test_gradients_of_random_logits_are_the_analytic_ones():
    rng = np.random.default_rng(2)
    logits, token = (8.0 * rng.standard_normal((2, 8, 7, 256))).astype(np.float32), rng.integers(0, 256, (2, 8, 7))
    got = jax.grad(lambda x: actions.log_prob(x, token, 1.6).sum())(jnp.asarray(logits))
    p = np.apply_along_axis(probabilities, -1, logits, 1.6)
    np.testing.assert_allclose(got, (np.eye(256)[token] - p) / 1.6, atol=1e-5)
