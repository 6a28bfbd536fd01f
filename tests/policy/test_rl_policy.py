"""RL of adapters beside a policy: what acts is what learns, and what comes out is a plain policy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.sizes import fake_learner
from wovr_jax import learner
from wovr_jax.grpo import GRPOConfig
from wovr_jax.nn import lora
from wovr_jax.policy import actions, vla
from wovr_jax.policy.tokenizer import Tokenizer
from wovr_jax.policy.train import make_rl_policy, resolve_targets
from wovr_jax.policy.vla import PolicyLoRA
from wovr_jax.types import Imagined

CFG, KEY = vla.VLAConfig.fake(), jax.random.key(0)
OWN = PolicyLoRA.oft(rank=2)


def test_only_adapters_learn_and_the_plain_policy_does_what_they_did() -> None:
    policy = make_rl_policy(CFG, OWN, frozen=("dino",))
    plain = vla.network(CFG).init(KEY)
    params = policy.begin(plain, KEY)
    prompt = jnp.asarray(Tokenizer.tabletop().prompts(["pick up the red block"])).repeat(4, axis=0)
    frame = jax.random.normal(KEY, (4, 16, 16, 3))
    net, before = jax.jit(policy.net), jax.jit(vla.network(CFG))
    logits = net(params, frame, prompt)
    np.testing.assert_array_equal(logits, before(plain, frame, prompt))  # they begin as if they were not there

    token = actions.sample(logits, jax.random.split(KEY, 4), 1.0)
    success = np.zeros((4, 1, CFG.chunk), bool)
    success[::2, 0, -1] = True
    rollout = Imagined(
        frame_BNHWC=frame[:, None],
        prompt_BL=prompt,
        task_B=jnp.zeros(4, jnp.int32),
        token_BNTA=token[:, None],
        logp_BNTA=actions.log_prob(logits, token, 1.0)[:, None],
        action_BNTA=jnp.zeros((4, 1, *token.shape[1:])),
        prob_BNT=jnp.asarray(success, jnp.float32),
        success_BNT=jnp.asarray(success),
    )
    cfg = fake_learner(lr=0.02, lora=OWN, grpo=GRPOConfig.fake(group=2))
    state = learner.create(cfg, params, lora.find_frozen(params))
    state, metrics = learner.make_update(cfg, policy.net, 1.0)(state, rollout, KEY)
    assert metrics["steps"] == 1 and metrics["ratio_gap"] < 1e-5

    same, own = lora.separate(state.params)
    jax.tree.map(np.testing.assert_array_equal, same, plain)
    assert "dino" not in own and all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(own["llm"]))
    # Moments of the adapters only.
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(own))

    after = net(state.params, frame, prompt)
    assert float(jnp.abs(after - logits).max()) > 1e-3
    np.testing.assert_allclose(
        before(policy.plain(state.params, lambda: jax.tree.map(jnp.copy, plain)), frame, prompt), after, atol=2e-5
    )


def test_without_adapters_the_policy_is_itself() -> None:
    policy, params = make_rl_policy(CFG, None), {"any": 1}
    assert policy.net is vla.network(CFG)
    assert policy.begin(params, KEY) is params and policy.plain(params, dict) is params


def test_beside_adapters_the_weights_are_held_narrow_and_folded_into_those_that_were_not() -> None:
    parts = {name: dataclasses.replace(getattr(CFG, name), dtype="bfloat16") for name in ("dino", "siglip", "llm")}
    cfg = dataclasses.replace(CFG, **parts)
    policy, plain = make_rl_policy(cfg, OWN), vla.network(cfg).init(KEY)
    joined = policy.begin(plain, KEY)
    held, adapters = lora.separate(joined)
    for tower in ("dino", "siglip"):
        # An adapted convolution adds before it rounds, so its kernel is held as it is.
        assert held[tower]["patch_embed"]["kernel"].dtype == jnp.float32
        held[tower]["patch_embed"]["kernel"] = held[tower]["patch_embed"]["kernel"].astype(jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, held, vla.for_use(cfg)(plain))
    assert held["llm"]["blocks"]["q"]["kernel"].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
    prompt = jnp.asarray(Tokenizer.tabletop().prompts(["pick up the red block"])).repeat(2, axis=0)
    frame = jax.random.normal(KEY, (2, 16, 16, 3))
    # Of the rounding at use there is none, so the adapters learn as they would beside float32.
    wide = lora.join(plain, adapters)
    np.testing.assert_array_equal(policy.net(joined, frame, prompt), policy.net(wide, frame, prompt))
    lively = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    # Of the last bits of a policy that has learned there is no other rounding either.
    learned = policy.net(lora.join(lora.separate(joined)[0], lively), frame, prompt)
    np.testing.assert_array_equal(learned, policy.net(lora.join(plain, lively), frame, prompt))
    merged = policy.plain(lora.join(held, lively), lambda: jax.tree.map(jnp.copy, plain))
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype("float32")}
    expected = lora.merge(plain, lively, resolve_targets(cfg, OWN, ()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), merged, expected)


def test_adapters_without_a_layer_are_refused() -> None:
    with pytest.raises(ValueError, match="no layer matches"):
        make_rl_policy(CFG, PolicyLoRA(targets=("llm/tail",)))
