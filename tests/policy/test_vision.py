"""The towers against transformers' DINOv2 with registers and SigLIP, and their input path."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.nn.functional import Pure
from wovr_jax.policy.backbones import Tower, TowerConfig, normalise, resize

DINO = TowerConfig(16, 4, 16, 4, 2, 32, prefix=5, layer_scale=True)
SIGLIP = TowerConfig(16, 4, 16, 4, 2, 24)


def linear(torch_module):
    return {"kernel": torch_module.weight.detach().numpy().T, "bias": torch_module.bias.detach().numpy()}


def norm(torch_module):
    return {"scale": torch_module.weight.detach().numpy(), "bias": torch_module.bias.detach().numpy()}


def attention(module, out):
    qkv = [linear(getattr(module, name)) for name in ("q_proj", "k_proj", "v_proj")]
    fused = {part: np.concatenate([x[part] for x in qkv], axis=-1) for part in ("kernel", "bias")}
    return {"qkv": fused, "proj": linear(getattr(module, out))}


def stacked(blocks):
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *blocks)


def patch_embed(conv):
    return {"kernel": conv.weight.detach().numpy().transpose(2, 3, 1, 0), "bias": conv.bias.detach().numpy()}


def randomised(torch, module):
    """Every tensor away from its special initial value, so that nothing is right by being one or zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + 0.1)
    return module.eval()


def dino_pair():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        mlp_ratio=2,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        image_size=16,
        patch_size=4,
        num_register_tokens=4,
    )
    model = randomised(torch, transformers.Dinov2WithRegistersModel(config))
    with torch.no_grad():
        model.embeddings.position_embeddings[:, 0] = 0.0  # the release adds positions to patches only
    blocks = [
        attention(layer.attention, "o_proj")
        | {"norm1": norm(layer.norm1), "norm2": norm(layer.norm2), "fc1": linear(layer.mlp.fc1)}
        | {"fc2": linear(layer.mlp.fc2)}
        | {f"ls{k}": getattr(layer, f"layer_scale{k}").lambda1.detach().numpy() for k in (1, 2)}
        for layer in model.encoder.layer[:3]
    ]
    e = model.embeddings
    params = {
        "patch_embed": patch_embed(e.patch_embeddings.projection),
        "pos_embed": e.position_embeddings.detach().numpy()[:, 1:],
        "prefix": np.concatenate([e.cls_token.detach().numpy(), e.register_tokens.detach().numpy()], axis=1),
        "blocks": stacked(blocks),
    }
    return torch, model, params


def siglip_pair():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.SiglipVisionConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=24,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        image_size=16,
        patch_size=4,
    )
    model = randomised(torch, transformers.SiglipVisionModel(config))
    blocks = [
        attention(layer.self_attn, "out_proj")
        | {"norm1": norm(layer.layer_norm1), "norm2": norm(layer.layer_norm2)}
        | {"fc1": linear(layer.mlp.fc1), "fc2": linear(layer.mlp.fc2)}
        for layer in model.encoder.layers[:3]
    ]
    params = {
        "patch_embed": patch_embed(model.embeddings.patch_embedding),
        "pos_embed": model.embeddings.position_embedding.weight.detach().numpy()[None],
        "blocks": stacked(blocks),
    }
    return torch, model, params


@pytest.mark.parametrize("pair, cfg", [(dino_pair, DINO), (siglip_pair, SIGLIP)])
def test_features_equal_transformers(pair, cfg):
    torch, model, params = pair()
    frame = jax.random.uniform(jax.random.key(1), (2, 16, 16, 3), minval=-1.0)
    pixels = torch.tensor(np.asarray(normalise(frame, cfg.mean, cfg.std))).permute(0, 3, 1, 2)
    with torch.no_grad():
        want = model(pixels, output_hidden_states=True).hidden_states[-2][:, cfg.prefix :].numpy()
    params = jax.tree.map(jnp.asarray, params)
    got = Pure(lambda rngs: Tower(cfg, rngs=rngs))(params, frame)
    assert got.shape == (2, 16, 16)
    np.testing.assert_allclose(got, want, atol=1e-4)
    # The wrong answers: one block too many or too few, the tanh form of GELU.
    with torch.no_grad():
        last = model(pixels, output_hidden_states=True).hidden_states[-1][:, cfg.prefix :].numpy()
    assert np.abs(want - last).max() > 0.1


def test_normalisations_by_hand():
    frame = jnp.array([-1.0, 0.0, 1.0]).reshape(1, 1, 1, 3)
    half = TowerConfig.siglip_so400m()
    np.testing.assert_allclose(normalise(frame, half.mean, half.std).ravel(), [-1.0, 0.0, 1.0], atol=1e-6)
    dino = TowerConfig.dinov2_large()
    want = [(0.0 - 0.485) / 0.229, (0.5 - 0.456) / 0.224, (1.0 - 0.406) / 0.225]
    np.testing.assert_allclose(normalise(frame, dino.mean, dino.std).ravel(), want, rtol=1e-5)


def test_resize_only_when_the_size_differs():
    frame = jax.random.uniform(jax.random.key(0), (1, 16, 16, 3), minval=-1.0)
    assert resize(frame, 16) is frame
    flat = jnp.full((1, 256, 256, 3), 0.25)
    np.testing.assert_allclose(resize(flat, 224), 0.25, atol=1e-5)


def test_resize_is_antialiased_bicubic():
    torch = pytest.importorskip("torch")
    frame = jax.random.uniform(jax.random.key(0), (1, 24, 24, 3), minval=-0.5, maxval=0.5)
    first = torch.tensor(np.asarray(frame)).permute(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(first, (16, 16), mode="bicubic", antialias=True, align_corners=False)
    np.testing.assert_allclose(resize(frame, 16), want.permute(0, 2, 3, 1).numpy(), atol=1e-4)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="image: expected a multiple of patch=5"):
        dataclasses.replace(SIGLIP, patch=5)
    with pytest.raises(ValueError, match="depth: expected at least 2"):
        dataclasses.replace(SIGLIP, depth=1)
