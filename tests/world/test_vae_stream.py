"""The VAE piece by piece: equal to one pass, to diffusers' cached chunks, and of constant state."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from tests.world.test_vae import FOUR, THREE, compiled, diffusers_twin, lively, window
from wovr_jax.world import vae_stream


@functools.cache
def piece(cfg, which: str):
    return jax.jit(functools.partial(getattr(vae_stream, f"{which}_piece"), cfg))


def stream(cfg, which: str, params, x, cuts):
    """The parts of ``x`` between ``cuts`` one after another, and the states between them."""
    past, parts, states = None, [], []
    for low, high in zip((0, *cuts), (*cuts, x.shape[1])):
        out, past = piece(cfg, which)(params, x[:, low:high], past)
        parts.append(np.asarray(out))
        states.append(past)
    return np.concatenate(parts, axis=1), states


@pytest.mark.parametrize("cuts", [(1, 5, 9), (5,)], ids=["as upstream", "uneven"])
def test_pieces_equal_one_pass(cuts):
    params, x = lively(THREE), window(THREE)
    latent = compiled(THREE, "encode")(params, x)
    got, states = stream(THREE, "encode", params, x, cuts)
    np.testing.assert_allclose(got, latent, atol=1e-5)
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) for state in states]
    assert all(shape == shapes[0] for shape in shapes), "the state has one shape, whatever the piece"

    frame = compiled(THREE, "decode")(params, latent)
    got, states = stream(THREE, "decode", params, latent, [THREE.latent_frames(cut) for cut in cuts])
    np.testing.assert_allclose(got, frame, atol=2e-5)
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) for state in states]
    assert all(shape == shapes[0] for shape in shapes)


def test_a_long_video_in_a_scan_equals_one_pass():
    params, x = lively(THREE), window(THREE, frames=29, batch=1)
    latent = compiled(THREE, "encode")(params, x)
    # Seven latents after the first, three at a time: one is left over.
    got = jax.jit(functools.partial(vae_stream.encode, THREE, latents=3))(params, x)
    np.testing.assert_allclose(got, latent, atol=1e-5)
    frame = compiled(THREE, "decode")(params, latent)
    got = jax.jit(functools.partial(vae_stream.decode, THREE, latents=3))(params, latent)
    assert got.shape == x.shape
    np.testing.assert_allclose(got, frame, atol=2e-5)


def test_pieces_equal_the_chunks_of_diffusers():
    torch = pytest.importorskip("torch")
    mean, std = (0.25,) * FOUR.z_dim, (0.75,) * FOUR.z_dim
    cfg = dataclasses.replace(FOUR, latent_mean=mean, latent_std=std)
    params, x = lively(cfg), window(cfg, frames=9, batch=1)
    twin = diffusers_twin(cfg, params)
    with torch.no_grad():
        raw = twin.encode(torch.tensor(np.asarray(x)).permute(0, 4, 1, 2, 3)).latent_dist.mean
        small = 0.1 * raw
        film = twin.decode(small).sample.permute(0, 2, 3, 4, 1).numpy()
    to_ours = lambda z: (z.permute(0, 2, 3, 4, 1).numpy() - 0.25) / 0.75  # noqa: E731
    got, _ = stream(cfg, "encode", params, x, (1, 5))
    np.testing.assert_allclose(got, to_ours(raw), atol=1e-4)
    assert np.abs(got).mean() > 0.05
    frame, _ = stream(cfg, "decode", params, to_ours(small), (1, 2))
    assert np.mean(np.abs(film) < 1.0) > 0.5
    np.testing.assert_allclose(np.clip(frame, -1, 1), film, atol=1e-4)


def test_the_state_of_the_released_size():
    """Two frames for each of 22 convolutions of the encoder and one for two more; in the decoder 32 times two."""
    cfg = dataclasses.replace(vae_stream.VAEConfig.wan2_2(), dtype="bfloat16")
    shapes = vae_stream._pure(cfg).shapes()
    frame = jax.ShapeDtypeStruct((1, 1, 256, 256, 3), np.float32)
    latent, past = jax.eval_shape(functools.partial(vae_stream.encode_piece, cfg), shapes, frame)
    assert (len(past), sorted({leaf.shape[1] for leaf in past})) == (24, [1, 2])
    _, past = jax.eval_shape(functools.partial(vae_stream.decode_piece, cfg), shapes, latent)
    assert (len(past), {leaf.shape[1] for leaf in past}) == (32, {2})
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in past) == pytest.approx(234e6, rel=0.02)


def test_wrong_pieces_are_named():
    params = vae_stream._pure(THREE).shapes()
    x, past = window(THREE), ()

    def encode(x, past=None, cfg=THREE):
        jax.eval_shape(lambda p: vae_stream.encode_piece(cfg, p, x, past), params)

    with pytest.raises(ValueError, match=r"1 \+ n \* 4 frames, got 4"):
        encode(x[:, :4])
    with pytest.raises(ValueError, match=r"not the first has n \* 4 frames, n >= 1, got 5"):
        encode(x[:, :5], past)
    with pytest.raises(ValueError, match="multiples of 8"):
        encode(x[:, :5, :12])
    with pytest.raises(ValueError, match="at least one latent of 5 channels"):
        vae_stream.decode_piece(THREE, params, x[:, :1])
    with pytest.raises(ValueError, match="at least one latent, got 0"):
        vae_stream.encode(THREE, params, x, latents=0)
