"""Every kind of layer of the world model against its torch original, one at a time, with nothing at zero or one."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wovr_jax.nn.functional import Pure
from wovr_jax.nn.transformer import wan_angles
from wovr_jax.world.dit import Block, DiT, DiTConfig, sinusoid
from wovr_jax.world.vae.net import Down, FrameAttention, ResidualBlock, Up, VAEConfig, average_down, duplicate_up

torch = pytest.importorskip("torch")
wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")
wan_vae = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_wan")

CFG = VAEConfig(encoder_dim=4, decoder_dim=4, z_dim=4, res_blocks=1)
VIDEO = (2, 5, 6, 4, 8)
"""(B, F, H, W, D): every axis of another length."""


def lively(layer):
    """The torch layer with every parameter random: gains near one, products of the size of their input."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            fan_in = max(1, parameter[0].numel())
            gain = name.endswith(("gamma", "norm_q.weight", "norm_k.weight", "norm2.weight"))
            parameter.copy_(gain + torch.randn_like(parameter) * (0.3 if gain else 0.7 / math.sqrt(fan_in)))
    return layer.eval()


def draw(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tensor(x):
    """(B, F, H, W, D) as torch's (B, D, F, H, W)."""
    return torch.tensor(np.asarray(x)).permute(0, 4, 1, 2, 3)


def array(y):
    return y.detach().permute(0, 2, 3, 4, 1).numpy()


def kernel(layer):
    """Kernel and bias of a torch convolution or linear layer in our layout."""
    weight = layer.weight.detach().numpy()
    ours = {"kernel": np.moveaxis(weight, (0, 1), (-1, -2))}
    return ours | ({} if layer.bias is None else {"bias": layer.bias.detach().numpy()})


def gamma(norm):
    return {"gamma": norm.gamma.detach().numpy().ravel()}


def residual(block):
    parts = {name: gamma(getattr(block, name)) for name in ("norm1", "norm2")}
    parts |= {name: kernel(getattr(block, name)) for name in ("conv1", "conv2")}
    return parts | (
        {} if isinstance(block.conv_shortcut, torch.nn.Identity) else {"shortcut": kernel(block.conv_shortcut)}
    )


def run(pure, params, *args, **kwargs):
    assert jax.tree.structure(params) == jax.tree.structure(pure.shapes())
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda p: pure(p, *args, **kwargs))(params)


def close(got, want, tolerance=1e-5):
    want = np.asarray(want)
    assert np.abs(want).max() > 0.1 and got.shape == want.shape
    assert np.abs(np.asarray(got) - want).max() <= tolerance * np.abs(want).max()


# Transformer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [16, 256])
def test_sinusoid(width):
    from diffusers.models.embeddings import Timesteps

    time = np.array([[0.0, 0.0, 1000.0, 952.38], [0.0, 1.0, 555.56, 3.5]], np.float32)
    want = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)(torch.tensor(time.ravel()))
    # float32 angles near 1000 radians are known to 6e-5.
    np.testing.assert_allclose(sinusoid(jnp.asarray(time), width), want.numpy().reshape(2, 4, width), atol=1.5e-4)


@pytest.mark.parametrize("dim, freq", [(40, 16), (66, 32)])
def test_time_embedding_and_its_projection(dim, freq):
    twin = lively(wan.WanTimeTextImageEmbedding(dim, freq, 6 * dim, 8))
    pure = Pure(lambda rngs: DiT(DiTConfig.fake(dim=dim, heads=2 if dim == 40 else 3, freq_dim=freq), rngs=rngs))
    time = np.array([[0.0, 0.0, 13.0, 4.5], [0.0, 1.0, 2.5, 30.0]], np.float32)
    embedder = twin.time_embedder
    params = pure.init(jax.random.key(0)) | {
        "time_embedding": {"inner": kernel(embedder.linear_1), "outer": kernel(embedder.linear_2)},
        "time_projection": kernel(twin.time_proj),
    }
    embedding, projected, *_ = twin(torch.tensor(time.ravel()), torch.zeros(8, 1, 8))

    def ours(module):
        wave = module.time_embedding(sinusoid(jnp.asarray(time), freq))
        return wave, module.time_projection(jax.nn.silu(wave))

    got = ours(pure.module(params))
    for mine, theirs in zip(got, (embedding, projected), strict=True):
        close(mine.reshape(8, -1), theirs.detach().numpy())


@pytest.mark.parametrize("heads, width, size", [(2, 20, (3, 4, 6)), (3, 22, (4, 2, 5))])
def test_block(heads, width, size):
    """Heads that the three rotary axes share unevenly, and one modulation for each latent frame."""
    dim, (f, h, w) = heads * width, size
    twin = lively(wan.WanTransformerBlock(dim, 56, heads, cross_attn_norm=True))
    cfg = DiTConfig.fake(dim=dim, heads=heads)
    pure = Pure(lambda rngs: Block(cfg, rngs=rngs))

    def attention(layer):
        parts = {name: kernel(getattr(layer, f"to_{name}")) for name in "qkv"} | {"o": kernel(layer.to_out[0])}
        return parts | {f"norm_{x}": {"scale": getattr(layer, f"norm_{x}").weight.detach().numpy()} for x in "qk"}

    params = {
        "modulation": twin.scale_shift_table.detach().numpy()[0],
        "self_attn": attention(twin.attn1),
        "cross_attn": attention(twin.attn2),
        "cross_norm": {"scale": twin.norm2.weight.detach().numpy(), "bias": twin.norm2.bias.detach().numpy()},
        "ffn": {"inner": kernel(twin.ffn.net[0].proj), "outer": kernel(twin.ffn.net[2])},
    }
    token, context, time = draw(2, f, h * w, dim), draw(2, 7, dim, seed=2), draw(2, f, 6, dim, seed=3)
    rope = wan.WanRotaryPosEmbed(width, (1, 1, 1), 32)(torch.zeros(1, 1, f, h, w))
    per_token = torch.tensor(time).repeat_interleave(h * w, dim=1)
    want = twin(torch.tensor(token).flatten(1, 2), torch.tensor(context), per_token, rope)

    module = pure.module(params)
    with jax.default_matmul_precision("highest"):
        key_value = module.cross_attn.key_value(jnp.asarray(context))
        got = run(pure, params, jnp.asarray(token), key_value, jnp.asarray(time), wan_angles(f, h, w, width))
    close(got, want.detach().unflatten(1, (f, h * w)).numpy())


# VAE ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs, outputs", [(8, 8), (8, 12)])
def test_residual_block(inputs, outputs):
    twin, x = lively(wan_vae.WanResidualBlock(inputs, outputs)), draw(*VIDEO)
    pure = Pure(lambda rngs: ResidualBlock(inputs, outputs, CFG, rngs))
    close(run(pure, residual(twin), x), array(twin(tensor(x))))


def test_attention_among_the_positions_of_a_frame():
    twin, x = lively(wan_vae.WanAttentionBlock(8)), draw(*VIDEO)
    pure = Pure(lambda rngs: FrameAttention(8, CFG, rngs))
    params = {"norm": gamma(twin.norm), "qkv": kernel(twin.to_qkv), "proj": kernel(twin.proj)}
    got = run(pure, params, x)
    close(got, array(twin(tensor(x))))
    # A layout in which every position sees itself only passes no test of shapes: here others must matter,
    moved = run(pure, params, jnp.asarray(x).at[:, 2, 0, 0].add(1.0))
    change = np.abs(np.asarray(moved - got)).max(axis=(0, 4))
    assert change[2].min() > 1e-5
    assert change[[0, 1, 3, 4]].max() == 0.0  # and other frames must not.


@pytest.mark.parametrize("features, time, space", [(8, 1, 2), (16, 2, 2), (4, 2, 2), (8, 1, 1)])
@pytest.mark.parametrize("frames", [1, 4, 5])
def test_shortcut_down(features, time, space, frames):
    x = draw(*VIDEO)[:, :frames]
    want = array(wan_vae.AvgDown3D(8, features, time, space)(tensor(x)))
    np.testing.assert_allclose(average_down(jnp.asarray(x), features, time, space), want, atol=1e-6)


@pytest.mark.parametrize("features, time, space", [(8, 2, 2), (4, 1, 2), (16, 2, 2)])
def test_shortcut_up(features, time, space):
    x = draw(*VIDEO)
    want = array(wan_vae.DupUp3D(8, features, time, space)(tensor(x), first_chunk=True))
    np.testing.assert_array_equal(duplicate_up(jnp.asarray(x), features, time, space), want)


class Resampler(nnx.Module):
    """A level of ours without its residual blocks and its shortcut: the resampling alone."""

    def __init__(self, level, rngs, time):
        cfg = VAEConfig(encoder_dim=4, decoder_dim=4, z_dim=4, res_blocks=1)
        self.level = level(8, 8, cfg, rngs, space=2, time=time)
        self.level.res = nnx.List([])

    def __call__(self, x):
        shortcut = average_down if isinstance(self.level, Down) else duplicate_up
        return self.level(x) - shortcut(x, 8, self.level.time, 2)


@pytest.mark.parametrize("mode", ["downsample2d", "downsample3d", "upsample2d", "upsample3d"])
def test_resampler(mode):
    """The original gets one frame, then four at a time (two, one at a time, on the way up), with its cache."""
    down, time = mode.startswith("down"), 2 if mode.endswith("3d") else 1
    twin, x = lively(wan_vae.WanResample(8, mode, upsample_out_dim=8)), draw(*VIDEO)
    cuts = [0, 1, 5] if down else [0, 1, 2, 3, 4, 5]
    cache, parts = [None], []
    with torch.no_grad():
        for low, high in zip(cuts, cuts[1:]):
            parts.append(array(twin(tensor(x[:, low:high]), cache, [0])))
    params = {"resample": kernel(twin.resample[1])} | ({"time_conv": kernel(twin.time_conv)} if time == 2 else {})
    pure = Pure(lambda rngs: Resampler(Down if down else Up, rngs, time))
    expected = pure.shapes()
    params = {"level": params | {name: leaf for name, leaf in expected["level"].items() if not jax.tree.leaves(leaf)}}
    close(run(pure, params, x), np.concatenate(parts, axis=1))
