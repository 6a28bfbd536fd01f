"""The video VAE: sizes, parity with diffusers, prefixes, shortcuts by hand, bad input."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.nn.functional import Pure
from wovr_jax.types import Params
from wovr_jax.world.vae.net import VAE, VAEConfig, average_down, duplicate_up, patchify, unpatchify

# Like Wan2.2 in every rule, small; and three levels that halve time at both halvings.
FOUR = VAEConfig(encoder_dim=4, decoder_dim=8, z_dim=6, res_blocks=1)
THREE = VAEConfig(encoder_dim=8, decoder_dim=4, z_dim=5, dim_mult=(1, 2, 2), res_blocks=1, temporal_down=(True, True))


def network(cfg: VAEConfig) -> Pure:
    return Pure(lambda rngs: VAE(cfg, rngs=rngs))


@functools.cache
def compiled(cfg: VAEConfig, method: str):
    return jax.jit(functools.partial(network(cfg), method=method))


def lively(cfg: VAEConfig) -> Params:
    """Parameters with nothing left at its initial zero or one, so that every branch counts."""
    shapes = network(cfg).shapes()
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))

    def draw(key: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        fan_in = math.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 4
        noise = jax.random.normal(key, leaf.shape) / math.sqrt(fan_in)
        return noise if len(leaf.shape) > 1 else 0.7 + noise  # gammas near one; biases may be anything

    return jax.tree.unflatten(tree, [draw(k, leaf) for k, leaf in zip(keys, leaves)])


def window(cfg: VAEConfig, frames: int = 13, batch: int = 2) -> jax.Array:
    # Height and width differ, so that swapped axes cannot pass.
    return jax.random.uniform(jax.random.key(1), (batch, frames, 2 * cfg.space, cfg.space, 3), minval=-1.0)


def test_size_of_wan2_2():
    shapes = jax.tree.leaves(network(VAEConfig.wan2_2()).shapes())
    assert sum(math.prod(leaf.shape) for leaf in shapes) == 704_688_668
    assert len(shapes) == 196
    cfg = VAEConfig.wan2_2()
    assert (cfg.space, cfg.time, cfg.latent_frames(13)) == (16, 4, 4)


def test_shapes_of_the_embedded_size():
    cfg = VAEConfig.tabletop()
    assert (cfg.space, cfg.time) == (8, 4)
    frame = jax.ShapeDtypeStruct((3, 13, 32, 32, 3), jnp.float32)
    vae = network(cfg)
    latent = jax.eval_shape(lambda p, x: vae(p, x, method="encode"), vae.shapes(), frame)
    assert latent.shape == (3, 4, 4, 4, cfg.z_dim)
    back = jax.eval_shape(lambda p, z: vae(p, z, method="decode"), vae.shapes(), latent)
    assert back == frame


@pytest.mark.parametrize("cfg", [FOUR, THREE], ids=["four-levels", "three-levels"])
def test_against_diffusers(cfg: VAEConfig):
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    mean = tuple(0.1 * i - 0.3 for i in range(cfg.z_dim))
    std = tuple(0.5 + 0.2 * i for i in range(cfg.z_dim))
    cfg = dataclasses.replace(cfg, latent_mean=mean, latent_std=std)
    params = lively(cfg)
    oracle = diffusers_twin(cfg, params)

    x = window(cfg)
    tensor = torch.tensor(np.asarray(x)).permute(0, 4, 1, 2, 3)
    with torch.no_grad():
        expected = oracle.encode(tensor).latent_dist
        moments = [part.permute(0, 2, 3, 4, 1).numpy() for part in (expected.mean, expected.logvar)]
        ours = compiled(cfg, "moments")(params, x)
        assert np.abs(moments[0]).mean() > 0.05
        np.testing.assert_allclose(ours[0], moments[0], atol=1e-4)
        np.testing.assert_allclose(np.clip(ours[1], -30, 20), moments[1], atol=1e-4)

        raw = 0.1 * np.random.default_rng(0).standard_normal(moments[0].shape).astype(np.float32)
        frame = oracle.decode(torch.tensor(raw).permute(0, 4, 1, 2, 3)).sample.permute(0, 2, 3, 4, 1).numpy()
    latent = (raw - np.array(mean, np.float32)) / np.array(std, np.float32)
    decoded = np.asarray(compiled(cfg, "decode")(params, latent))
    assert np.mean(np.abs(frame) < 1.0) > 0.5, "the oracle clamps: most pixels must be inside"
    np.testing.assert_allclose(np.clip(decoded, -1, 1), frame, atol=1e-4)


def test_encode_normalises_the_mean_and_decode_undoes_it():
    cfg = dataclasses.replace(THREE, latent_mean=(0.5,) * 5, latent_std=(2.0,) * 5)
    params, x = lively(cfg), window(cfg, frames=5)
    mean, _ = compiled(THREE, "moments")(params, x)
    latent = compiled(cfg, "encode")(params, x)
    np.testing.assert_allclose(latent, (mean - 0.5) / 2.0, atol=1e-5)
    np.testing.assert_allclose(
        compiled(cfg, "decode")(params, latent), compiled(THREE, "decode_raw")(params, mean), atol=1e-4
    )


def diffusers_twin(cfg: VAEConfig, params: Params):
    """diffusers' VAE with our parameters; it streams the frames in chunks of 1, 4, 4, ... with caches."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    oracle = diffusers.AutoencoderKLWan(
        base_dim=cfg.encoder_dim,
        decoder_base_dim=cfg.decoder_dim,
        z_dim=cfg.z_dim,
        dim_mult=list(cfg.dim_mult),
        num_res_blocks=cfg.res_blocks,
        attn_scales=[],
        temperal_downsample=list(cfg.temporal_down),
        is_residual=True,
        in_channels=3 * cfg.patch**2,
        out_channels=3 * cfg.patch**2,
        patch_size=cfg.patch,
        latents_mean=list(cfg.latent_mean),
        latents_std=list(cfg.latent_std),
    ).eval()
    oracle.load_state_dict({name: torch.tensor(value) for name, value in torch_state(params).items()}, strict=True)
    return oracle


def torch_state(params: Params) -> dict[str, np.ndarray]:
    """Our parameters under the names and layouts of diffusers."""
    renamed = {
        "quant": "quant_conv",
        "post_quant": "post_quant_conv",
        "down": "down_blocks",
        "up": "up_blocks",
        "mid": "mid_block",
        "res": "resnets",
        "res0": "resnets.0",
        "res1": "resnets.1",
        "attention": "attentions.0",
        "qkv": "to_qkv",
        "shortcut": "conv_shortcut",
        "kernel": "weight",
    }
    out = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        keys = [str(entry.key) for entry in path]
        if "resample" in keys:
            sampler = "downsampler" if "down" in keys else "upsampler"
            keys[keys.index("resample")] = f"{sampler}.resample.1"
        if "time_conv" in keys:
            sampler = "downsampler" if "down" in keys else "upsampler"
            keys[keys.index("time_conv")] = f"{sampler}.time_conv"
        name = ".".join(renamed.get(key, key) for key in keys)
        value = np.asarray(leaf)
        if value.ndim > 1:
            value = np.moveaxis(value, (-1, -2), (0, 1))
        elif name.endswith("gamma"):
            value = value.reshape(-1, 1, 1) if "attentions" in name else value.reshape(-1, 1, 1, 1)
        out[name] = np.ascontiguousarray(value)
    return out


def test_a_prefix_encodes_and_decodes_to_the_prefix():
    params, x = lively(THREE), window(THREE)
    encode, decode = compiled(THREE, "encode"), compiled(THREE, "decode")
    latent = encode(params, x)
    np.testing.assert_allclose(encode(params, x[:, :5]), latent[:, :2], atol=1e-5)
    decoded = decode(params, latent)
    assert decoded.shape == x.shape
    np.testing.assert_allclose(decode(params, latent[:, :2]), decoded[:, :5], atol=1e-5)
    # And a later latent does matter to every later frame.
    changed = np.abs(np.asarray(decode(params, latent.at[:, 2].add(1.0)) - decoded)).max(axis=(0, 2, 3, 4))
    np.testing.assert_allclose(changed[:5], 0.0, atol=1e-5)
    assert (changed[5:] > 1e-3).all()


def test_native_and_folded_convolutions_agree():
    params, x = lively(THREE), window(THREE, frames=5)
    one, other = (compiled(dataclasses.replace(THREE, conv=name), "encode")(params, x) for name in ("native", "fold"))
    np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("cfg", [FOUR, THREE], ids=["four-levels", "three-levels"])
def test_bfloat16_stays_within_two_hundredths(cfg: VAEConfig):
    """Of the largest value, both ways; measured 0.003 to 0.006."""
    params, x = lively(cfg), window(cfg, frames=5, batch=1)
    half = dataclasses.replace(cfg, dtype="bfloat16")
    latent = compiled(cfg, "encode")(params, x)
    for method, given in (("encode", x), ("decode", latent)):
        exact, rounded = (compiled(one, method)(params, given) for one in (cfg, half))
        assert rounded.dtype == jnp.float32
        np.testing.assert_allclose(rounded, exact, atol=0.02 * float(jnp.abs(exact).max()))


def test_shortcuts_by_hand():
    """On a constant picture the channel arithmetic is all that is left."""
    x = jnp.arange(1.0, 3.0).reshape(1, 1, 1, 1, 2) * jnp.ones((1, 3, 2, 2, 2))  # channels 1, 2; three frames
    y = average_down(x, 4, time=2, space=2)
    # The zero frame comes first: channel 2c is frame -1 (zero), channel 2c + 1 frame 0.
    np.testing.assert_allclose(y[0, :, 0, 0], [[0, 1, 0, 2], [1, 1, 2, 2]])
    np.testing.assert_allclose(average_down(x, 2, time=1, space=2)[0, :, 0, 0], [[1, 2]] * 3)
    np.testing.assert_allclose(average_down(x, 4, time=1, space=1)[0, 0, 0, 0], [1, 1, 2, 2])

    up = duplicate_up(x[:, :, :1, :1], 1, time=1, space=2)  # two channels become the two rows
    np.testing.assert_allclose(up[0, 0, :, :, 0], [[1, 1], [2, 2]])
    assert duplicate_up(x, 2, time=2, space=2).shape == (1, 5, 4, 4, 2)


def test_patchify_order_and_inverse():
    x = window(THREE)
    np.testing.assert_array_equal(unpatchify(patchify(x, 2), 2), x)
    # Channel 4c + 2 * column + row.
    np.testing.assert_array_equal(patchify(x, 2)[0, 0, 0, 0], x[0, 0, :2, :2].transpose(2, 1, 0).ravel())


def test_wrong_sizes_are_named():
    vae, params = network(THREE), network(THREE).shapes()
    with pytest.raises(ValueError, match=r"1 \+ n \* 4 frames, got 12"):
        jax.eval_shape(lambda p, x: vae(p, x, method="encode"), params, window(THREE, frames=12))
    with pytest.raises(ValueError, match="multiples of 8, got 12 x 8"):
        jax.eval_shape(lambda p, x: vae(p, x, method="encode"), params, window(THREE)[:, :, :12])
    with pytest.raises(ValueError, match="temporal_down: expected an entry for each of the 2"):
        VAEConfig(dim_mult=(1, 2, 2), temporal_down=(True,))
    with pytest.raises(ValueError, match="latent_mean: expected z_dim=48 numbers or none, got 2"):
        VAEConfig(latent_mean=(0.0, 1.0))
    with pytest.raises(ValueError, match="no shortcut from multiple 1 to 3"):
        VAEConfig(dim_mult=(1, 3, 3), temporal_down=(True, True))
