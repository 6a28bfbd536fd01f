"""Llama with every token seeing every other, against transformers with ``is_causal=False``."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.nn.functional import Pure
from wovr_jax.policy.backbones import Llama, LlamaConfig

CFG = LlamaConfig(rows=40, width=16, depth=3, heads=2, mlp=24)


def build(cfg):
    return Pure(lambda rngs: Llama(cfg, rngs=rngs))


def transformers_pair():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        rms_norm_eps=1e-6,
    )
    config.is_causal = False
    model = transformers.LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + 0.1)

    def kernel(layer):
        return {"kernel": layer.weight.detach().numpy().T}

    def scale(layer):
        return {"scale": layer.weight.detach().numpy()}

    blocks = [
        {name: kernel(getattr(layer.self_attn, f"{name}_proj")) for name in "qkvo"}
        | {name: kernel(getattr(layer.mlp, f"{name}_proj")) for name in ("gate", "up", "down")}
        | {"norm1": scale(layer.input_layernorm), "norm2": scale(layer.post_attention_layernorm)}
        for layer in model.model.layers
    ]
    params = {
        "embed": {"embedding": model.model.embed_tokens.weight.detach().numpy()},
        "blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks),
        "norm": scale(model.model.norm),
        "head": kernel(model.lm_head),
    }
    return torch, model, jax.tree.map(jnp.asarray, params)


def test_logits_equal_transformers():
    torch, model, params = transformers_pair()
    x = jax.random.normal(jax.random.key(0), (2, 7, 16))
    with torch.no_grad():
        want = model(inputs_embeds=torch.tensor(np.asarray(x))).logits.numpy()
    net = build(CFG)
    hidden = net(params, x, jnp.ones((2, 7), bool))
    got = net(params, hidden, 0, 40, method="logits")
    np.testing.assert_allclose(got, want, atol=1e-4)
    np.testing.assert_allclose(net(params, hidden, 30, 5, method="logits"), got[..., 30:35], atol=1e-6)


def test_last_token_reaches_the_first():
    # A causal model would leave position 0 as it is.
    net, params, x = build(CFG), build(CFG).init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (1, 5, 16))
    mask = jnp.ones((1, 5), bool)
    moved = net(params, x.at[0, 4].add(1.0), mask)
    assert jnp.abs(moved - net(params, x, mask))[0, 0].max() > 1e-3


def test_padding_changes_nothing():
    net, params, x = build(CFG), build(CFG).init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (1, 5, 16))
    want = net(params, x, jnp.ones((1, 5), bool))
    padded = jnp.concatenate([x[:, :2], jnp.full((1, 3, 16), 9.0), x[:, 2:]], axis=1)
    mask = jnp.array([[True, True, False, False, False, True, True, True]])
    got = net(params, padded, mask)[0, jnp.array([0, 1, 5, 6, 7])]
    np.testing.assert_allclose(got, want[0], atol=1e-5)


def test_eps_and_theta_are_settings():
    x, mask = 1e-2 * jax.random.normal(jax.random.key(1), (1, 5, 16)), jnp.ones((1, 5), bool)
    params = build(CFG).init(jax.random.key(0))
    want = build(CFG)(params, x, mask)
    for change in ({"eps": 1e-5}, {"rope_theta": 100.0}):
        other = build(dataclasses.replace(CFG, **change))(params, x, mask)
        assert jnp.abs(want - other).max() > 1e-4, change


def test_released_size_has_the_released_count():
    leaves = jax.tree.leaves(build(LlamaConfig.llama2_7b()).shapes())
    assert sum(leaf.size for leaf in leaves) == 6_738_939_904
