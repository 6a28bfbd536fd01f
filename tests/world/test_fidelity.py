"""How far imagined chunks are from true ones: what counts as an error, and where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.sizes import draw_world
from wovr_jax.world import fidelity, model
from wovr_jax.world.model import WorldConfig

CFG = WorldConfig.fake()


@pytest.fixture(scope="module")
def params():
    return draw_world(CFG, jax.random.key(0))


def draw_video():
    """First frames (2, H, W, C), and three chunks of eight frames after them."""
    frame = np.random.default_rng(0).uniform(-1, 1, (2, 25, 16, 16, 3)).astype(np.float32)
    return jnp.asarray(frame[:, 0]), jnp.asarray(frame[:, 1:].reshape(2, 3, 8, 16, 16, 3))


def test_an_error_is_in_the_chunk_where_it_happens(params):
    first, true = draw_video()
    same = fidelity.measure_errors(CFG, params["vae"], first, true, true)
    np.testing.assert_array_equal(same["latent_N"], 0.0)
    np.testing.assert_allclose(same["psnr_N"], 106.02, atol=0.01)  # the cap: equal frames are not infinitely good

    off = true.at[:, 1].set(-true[:, 1])
    found = fidelity.measure_errors(CFG, params["vae"], first, true, off)
    want = 10 * np.log10(4.0 / np.mean((2 * np.asarray(true[:, 1])) ** 2))
    np.testing.assert_allclose(found["psnr_N"][1], want, rtol=1e-5)
    assert found["psnr_N"][0] > 100 and found["psnr_N"][2] > 100
    # Chunk 3 remembers the end of chunk 2, so its latents differ; chunk 1 knows nothing of it.
    assert found["latent_N"][0] == 0.0 and found["latent_N"][1] > 0.0

    def encode(window):
        return model.networks(CFG)[1](params["vae"], window, method="encode")

    windows = [jnp.concatenate([first[:, None], true[:, 0, 4:], video[:, 1]], axis=1) for video in (true, off)]
    a, b = (jax.jit(encode)(window)[:, 2:] for window in windows)
    np.testing.assert_allclose(found["latent_N"][1], jnp.square(a - b).mean(), rtol=1e-3)


def test_the_reference_without_a_model_is_the_vae_alone(params):
    first, true = draw_video()
    seen = fidelity.reconstruct(CFG, params["vae"], first, true)
    assert seen.shape == true.shape
    vae = model.networks(CFG)[1]
    window = jnp.concatenate([first[:, None], jnp.repeat(first[:, None], 4, axis=1), true[:, 0]], axis=1)

    def there_and_back(x):
        return vae(params["vae"], vae(params["vae"], x, method="encode"), method="decode")

    np.testing.assert_allclose(seen[:, 0], jnp.clip(jax.jit(there_and_back)(window)[:, 5:], -1, 1), atol=1e-4)
