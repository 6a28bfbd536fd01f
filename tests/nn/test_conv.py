"""Causal and planar convolutions: native against folded, taps by hand, torch, causality, bad input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wovr_jax.nn.conv import CausalConv3D, Conv2D, causal_conv3d, conv2d, upsample_conv2d


def draw(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1), (1, 1, 1)])
@pytest.mark.parametrize("stride,past", [(1, None), (2, 0), (1, 1), (2, 2)])
def test_fold_equals_native_forward_and_backward(kernel, stride, past):
    if kernel[0] == 1 and past:
        pytest.skip("one time tap has no past")
    x, k, b = draw(0, 2, 5, 4, 6, 3), draw(1, *kernel, 3, 7), draw(2, 7)

    def loss(x, k, b, implementation):
        y = causal_conv3d(x, k, b, stride=stride, past=past, implementation=implementation)
        return jnp.sum(jnp.sin(y)), y

    out = {i: jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, k, b, i) for i in ("native", "fold")}
    assert out["fold"][0][1].shape == out["native"][0][1].shape
    jax.tree.map(lambda a, c: np.testing.assert_allclose(a, c, atol=1e-4), out["fold"], out["native"])


@pytest.mark.parametrize("implementation", ["native", "fold"])
def test_no_frame_sees_the_future(implementation):
    x, k = draw(0, 1, 6, 4, 4, 2), draw(1, 3, 3, 3, 2, 5)
    changed = x.at[:, 3:].add(1.0)
    before, after = (causal_conv3d(v, k, implementation=implementation) for v in (x, changed))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert bool(jnp.all(jnp.any(before[:, 3:] != after[:, 3:], axis=(0, 2, 3, 4))))


def test_taps_by_hand():
    """The last tap meets the present frame; zeros come before the first."""
    x = jnp.array([1.0, 10.0, 100.0]).reshape(1, 3, 1, 1, 1)
    k = jnp.array([1.0, 2.0, 3.0]).reshape(3, 1, 1, 1, 1)
    for implementation in ("native", "fold"):
        y = causal_conv3d(x, k, implementation=implementation).ravel()
        np.testing.assert_allclose(y, [3.0, 32.0, 321.0])
        y = causal_conv3d(x, k, past=0, implementation=implementation).ravel()
        np.testing.assert_allclose(y, [321.0])


def test_against_torch():
    torch = pytest.importorskip("torch")
    x, k, b = draw(0, 2, 5, 6, 4, 3), draw(1, 3, 3, 3, 3, 7), draw(2, 7)
    layer = CausalConv3D(3, 7, rngs=nnx.Rngs(0))
    layer.kernel[...], layer.bias[...] = k, b
    tensor = torch.nn.functional.pad(torch.tensor(np.asarray(x)).permute(0, 4, 1, 2, 3), (1, 1, 1, 1, 2, 0))
    expected = torch.nn.functional.conv3d(
        tensor, torch.tensor(np.asarray(k)).permute(4, 3, 0, 1, 2), torch.tensor(np.asarray(b))
    ).permute(0, 2, 3, 4, 1)
    np.testing.assert_allclose(layer(x), expected.numpy(), atol=1e-4)

    plane = Conv2D(3, 7, stride=2, rngs=nnx.Rngs(0))
    plane.kernel[...], plane.bias[...] = k[0], b
    expected = torch.nn.functional.conv2d(
        torch.tensor(np.asarray(x[0])).permute(0, 3, 1, 2),
        torch.tensor(np.asarray(k[0])).permute(3, 2, 0, 1),
        torch.tensor(np.asarray(b)),
        stride=2,
        padding=1,
    ).permute(0, 2, 3, 1)
    np.testing.assert_allclose(plane(x)[0], expected.numpy(), atol=1e-4)


def test_conv2d_takes_any_leading_axes():
    x, k = draw(0, 2, 3, 4, 5, 2), draw(1, 1, 1, 2, 6)
    np.testing.assert_allclose(conv2d(x, k), x @ k[0, 0], atol=1e-5)
    wide = draw(2, 3, 3, 2, 6)
    np.testing.assert_allclose(conv2d(x, wide)[1, 2], conv2d(x[1, 2], wide), atol=1e-5)


def test_upsampling_before_equals_after_the_repetition():
    x, k = draw(0, 2, 3, 4, 6, 2), draw(1, 3, 3, 2, 5)
    expected = conv2d(x.repeat(2, axis=-3).repeat(2, axis=-2), k)
    np.testing.assert_allclose(upsample_conv2d(x, k), expected, atol=1e-5)


def test_bad_input_is_named():
    with pytest.raises(AssertionError, match="channels of the kernel"):
        causal_conv3d(draw(0, 1, 3, 4, 4, 2), draw(1, 3, 3, 3, 3, 2))
