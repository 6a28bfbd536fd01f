"""The attention function against a loop in numpy, its masks, and its complaints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.nn.transformer import attention


def random_qkv(queries=3, keys=5):
    key = jax.random.key(0)
    q = jax.random.normal(jax.random.fold_in(key, 0), (2, queries, 4, 6))
    k, v = jax.random.normal(jax.random.fold_in(key, 1), (2, 2, keys, 4, 6))
    return q, k, v


def by_hand(q, k, v, mask=None):
    """Plain softmax attention in float64, one head at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            logit = q[b, :, h] @ k[b, :, h].T / np.sqrt(q.shape[-1])
            if mask is not None:
                logit = np.where(mask[b, h], logit, -np.inf)
            weight = np.exp(logit - logit.max(-1, keepdims=True))
            out[b, :, h] = weight / weight.sum(-1, keepdims=True) @ v[b, :, h]
    return out


def test_equals_the_loop_without_mask():
    q, k, v = random_qkv()
    np.testing.assert_allclose(attention(q, k, v), by_hand(q, k, v), atol=1e-5)


def test_padding_mask_hides_keys():
    q, k, v = random_qkv()
    valid = jnp.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    full = np.broadcast_to(np.asarray(valid[:, None, None, :]), (2, 4, 3, 5))
    np.testing.assert_allclose(attention(q, k, v, valid[:, None, None, :]), by_hand(q, k, v, full), atol=1e-5)
    cut = attention(q[:1], k[:1, :3], v[:1, :3])
    np.testing.assert_allclose(attention(q, k, v, valid[:, None, None, :])[:1], cut, atol=1e-5)


def test_a_mask_may_be_the_same_for_all_rows_and_heads():
    q, k, v = random_qkv(5, 5)
    causal = np.tril(np.ones((5, 5), bool))  # position i sees positions 0..i
    full = np.broadcast_to(causal, (2, 4, 5, 5))
    np.testing.assert_allclose(attention(q, k, v, jnp.asarray(causal)[None, None]), by_hand(q, k, v, full), atol=1e-5)


def test_softmax_is_in_float32_for_bfloat16_inputs():
    q, k, v = (x.astype(jnp.bfloat16) for x in random_qkv())
    out = attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), by_hand(q, k, v), atol=0.03)


@pytest.mark.parametrize("mask", [jnp.ones((3, 5), bool), jnp.ones((1, 1, 3, 5), jnp.float32)])
def test_refuses_odd_masks(mask):
    with pytest.raises(AssertionError, match="attention mask"):
        attention(*random_qkv(), mask)


def test_refuses_shapes_that_do_not_fit():
    q, k, v = random_qkv()
    with pytest.raises(AssertionError, match="batch, heads, width"):
        attention(q[:, :, :2], k, v)
    with pytest.raises(AssertionError, match="keys and values"):
        attention(q, k, v[:, :2])
