"""Masked reductions: by hand, and against numpy on the values that are left."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.core import stats

X = jnp.array([[1.0, 2.0, 3.0, 100.0], [4.0, 8.0, jnp.nan, -1.0]])
WHERE = jnp.array([[True, True, True, False], [True, True, False, False]])


def test_by_hand():
    # row 0 keeps 1 2 3, row 1 keeps 4 8; forgetting the mask gives 106 and NaN
    np.testing.assert_allclose(stats.masked_sum(X, WHERE, axis=1), [6.0, 12.0])
    np.testing.assert_allclose(stats.masked_mean(X, WHERE, axis=1), [2.0, 6.0])
    # row 0: squares 1 0 1; row 1: squares 4 4
    np.testing.assert_allclose(stats.masked_std(X, WHERE, axis=1, ddof=0), [np.sqrt(2 / 3), 2.0], rtol=1e-6)
    np.testing.assert_allclose(stats.masked_std(X, WHERE, axis=1, ddof=1), [1.0, np.sqrt(8.0)], rtol=1e-6)
    # all five: mean 18 / 5 = 3.6, dividing by the 8 places would give 2.25
    np.testing.assert_allclose(stats.masked_mean(X, WHERE), 3.6, rtol=1e-6)


@pytest.mark.parametrize("ddof", [0, 1])
def test_equals_numpy_on_what_is_chosen(ddof):
    rng = np.random.default_rng(0)
    x, where = rng.normal(size=(5, 7)).astype(np.float32), rng.random((5, 7)) < 0.6
    assert (where.sum(1) > 1).all()
    np.testing.assert_allclose(
        stats.masked_std(jnp.asarray(x), jnp.asarray(where), axis=1, ddof=ddof),
        [row[keep].std(ddof=ddof) for row, keep in zip(x, where, strict=True)],
        rtol=1e-5,
    )
    np.testing.assert_allclose(stats.masked_mean(jnp.asarray(x), jnp.asarray(where)), x[where].mean(), rtol=1e-5)


def test_nothing_chosen_is_zero():
    nothing = jnp.zeros((2, 4), bool)
    for reduce in (stats.masked_sum, stats.masked_mean, stats.masked_std):
        np.testing.assert_array_equal(reduce(X, nothing, axis=1), [0.0, 0.0])
    # one value has no unbiased deviation: 0, where torch gives NaN
    np.testing.assert_array_equal(stats.masked_std(jnp.array([5.0, 7.0]), jnp.array([True, False]), ddof=1), 0.0)


def test_mask_broadcasts_and_keeps_dimensions():
    column = jnp.array([[True], [False]])
    np.testing.assert_allclose(stats.masked_sum(X, column), 106.0)
    assert stats.masked_mean(X, WHERE, axis=1, keepdims=True).shape == (2, 1)
    assert stats.masked_std(X, WHERE, axis=(0, 1), keepdims=True).shape == (1, 1)


def test_gradient_ignores_what_is_masked():
    gradient = jax.grad(lambda x: stats.masked_mean(x, WHERE))(X)
    np.testing.assert_allclose(gradient, np.where(np.asarray(WHERE), 0.2, 0.0), rtol=1e-6)
