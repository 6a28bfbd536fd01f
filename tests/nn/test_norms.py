"""The two norms against torch, their float32 statistics, and their parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wovr_jax.nn.transformer import LayerNorm, RMSNorm


def random_input(dim=12):
    return 3.0 * jax.random.normal(jax.random.key(0), (2, 3, dim)) + 1.0


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_layer_norm_equals_torch(affine, eps):
    torch = pytest.importorskip("torch")
    x = random_input()
    norm = LayerNorm(12, eps=eps, affine=affine)
    weight = bias = None
    if affine:
        norm.scale[...] = jnp.linspace(0.5, 2.0, 12)
        norm.bias[...] = jnp.linspace(-1.0, 1.0, 12)
        weight, bias = (torch.tensor(np.asarray(p[...])) for p in (norm.scale, norm.bias))
    want = torch.nn.functional.layer_norm(torch.tensor(np.asarray(x)), (12,), weight, bias, eps)
    np.testing.assert_allclose(norm(x), want.numpy(), atol=1e-5)


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_rms_norm_equals_torch(eps):
    torch = pytest.importorskip("torch")
    x = random_input()
    norm = RMSNorm(12, eps=eps)
    norm.scale[...] = jnp.linspace(0.5, 2.0, 12)
    want = torch.nn.functional.rms_norm(
        torch.tensor(np.asarray(x)), (12,), torch.tensor(np.asarray(norm.scale[...])), eps
    )
    np.testing.assert_allclose(norm(x), want.numpy(), atol=1e-5)


@pytest.mark.parametrize("build", [LayerNorm, RMSNorm])
def test_statistics_survive_bfloat16(build):
    x = (random_input(4096) * 30.0).astype(jnp.bfloat16)
    out = build(4096)(x)
    assert out.dtype == jnp.bfloat16
    exact = build(4096)(x.astype(jnp.float32))
    np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=0.005, atol=1e-5)


def test_parameters_by_name():
    assert set(nnx.to_pure_dict(nnx.state(LayerNorm(4)))) == {"scale", "bias"}
    assert set(nnx.to_pure_dict(nnx.state(RMSNorm(4)))) == {"scale"}
    assert nnx.to_pure_dict(nnx.state(LayerNorm(4, affine=False))) == {}


@pytest.mark.parametrize("build", [LayerNorm, RMSNorm])
def test_refuses_another_width(build):
    with pytest.raises(AssertionError, match="Norm"):
        build(8)(random_input())
