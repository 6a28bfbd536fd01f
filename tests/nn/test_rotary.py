"""Rotary tables by hand, and both families against their torch originals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.nn.transformer import llama_angles, rotate_halves, rotate_pairs, wan_angles, wan_split


@pytest.mark.parametrize("width, split", [(128, (44, 42, 42)), (24, (8, 8, 8)), (20, (8, 6, 6)), (32, (12, 10, 10))])
def test_split_of_a_head(width, split):
    assert wan_split(width) == split


def test_angles_of_one_token_by_hand():
    # Head of 20: 4 pairs for time, 3 for rows, 3 for columns. Token (f, h, w) = (2, 1, 3) of a 3 x 4 x 6 grid.
    angle = wan_angles(3, 4, 6, 20)[2 * 24 + 1 * 6 + 3]
    time = 2 * 10_000.0 ** (-np.arange(4) * 2 / 8)
    row = 1 * 10_000.0 ** (-np.arange(3) * 2 / 6)
    column = 3 * 10_000.0 ** (-np.arange(3) * 2 / 6)
    np.testing.assert_allclose(angle, np.concatenate([time, row, column]), rtol=1e-6)


def test_pairs_are_neighbours():
    x = jnp.arange(1.0, 7.0).reshape(1, 1, 1, 6)
    quarter = np.full((1, 3), np.pi / 2, np.float32)
    # (1, 2) -> (-2, 1) and so on; pairing halves would give (-4, ...).
    np.testing.assert_allclose(rotate_pairs(x, quarter).ravel(), [-2, 1, -4, 3, -6, 5], atol=1e-5)


def test_wan_equals_diffusers():
    torch = pytest.importorskip("torch")
    wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    table = wan.WanRotaryPosEmbed(20, (1, 2, 2), 32)
    cos, sin = table(torch.zeros(1, 4, 3, 8, 12))
    x = jax.random.normal(jax.random.key(0), (2, 3 * 4 * 6, 2, 20))
    even, odd = torch.tensor(np.asarray(x)).unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[..., 0::2], sin[..., 1::2]
    want = torch.stack([even * c - odd * s, even * s + odd * c], -1).flatten(-2)
    np.testing.assert_allclose(rotate_pairs(x, wan_angles(3, 4, 6, 20)), want.numpy(), atol=1e-5)


def test_llama_equals_transformers():
    torch = pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = pytest.importorskip("transformers").LlamaConfig(hidden_size=32, num_attention_heads=4)
    q, k = jax.random.normal(jax.random.key(0), (2, 2, 5, 4, 8))
    position = jnp.array([[0, 0, 1, 2, 3], [0, 1, 2, 3, 4]])
    cos, sin = llama.LlamaRotaryEmbedding(config)(torch.zeros(2, 5, 32), torch.tensor(np.asarray(position)))
    heads_first = [torch.tensor(np.asarray(x)).transpose(1, 2) for x in (q, k)]
    want = llama.apply_rotary_pos_emb(*heads_first, cos, sin)
    angle = llama_angles(position, 8)
    for x, expected in zip((q, k), want, strict=True):
        np.testing.assert_allclose(rotate_halves(x, angle), expected.transpose(1, 2).numpy(), atol=1e-5)


def test_dot_product_depends_on_the_distance_only():
    q, k = jax.random.normal(jax.random.key(1), (2, 1, 1, 1, 8))
    here = [rotate_halves(x, llama_angles(jnp.array([[p]]), 8)) for x, p in ((q, 3), (k, 1))]
    there = [rotate_halves(x, llama_angles(jnp.array([[p]]), 8)) for x, p in ((q, 9), (k, 7))]
    np.testing.assert_allclose((here[0] * here[1]).sum(), (there[0] * there[1]).sum(), rtol=1e-5)


def test_refuses_odd_heads():
    with pytest.raises(ValueError, match="even width"):
        wan_split(9)
    with pytest.raises(ValueError, match="even width"):
        llama_angles(jnp.zeros((1, 1)), 7)
