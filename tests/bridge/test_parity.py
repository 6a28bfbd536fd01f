"""Weights of the originals, read through files, make the same network here."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from tests.bridge.layouts import arrays, dit_shapes, read, same, vae_shapes, write
from wovr_jax.bridge import exporter, formats, importer
from wovr_jax.bridge.sources import find, open_source
from wovr_jax.weights import native

DITS = {
    "uneven heads": (
        {"num_attention_heads": 2, "attention_head_dim": 20, "ffn_dim": 56, "num_layers": 2, "in_channels": 4},
        (3, 8, 12),
    ),
    "three heads, no patches": (
        {"num_attention_heads": 3, "attention_head_dim": 22, "ffn_dim": 48, "num_layers": 3, "in_channels": 5}
        | {"patch_size": (1, 1, 1)},
        (4, 3, 5),
    ),
}
"""Sizes in diffusers' words, and a latent window: frames, rows, columns."""


def twin_dit(sizes):
    """diffusers' transformer, every weight random."""
    torch = pytest.importorskip("torch")
    wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    torch.manual_seed(0)
    defaults = {"out_channels": sizes["in_channels"], "text_dim": 18, "freq_dim": 16, "rope_max_seq_len": 32}
    twin = wan.WanTransformer3DModel(**{"patch_size": (1, 2, 2)} | defaults | sizes)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return twin.eval()


@pytest.mark.parametrize("case", DITS)
def test_a_diffusers_transformer_runs_the_same_here(case, tmp_path):
    torch = pytest.importorskip("torch")
    sizes, (frames, rows, columns) = DITS[case]
    twin = twin_dit(sizes)
    twin.save_pretrained(tmp_path / "transformer")
    (file,) = find(tmp_path)
    ready = importer.read_import(open_source(file), text=True)
    params, pure = ready.params(), formats.network(ready.cfg)

    rng = np.random.default_rng(1)
    latent = rng.standard_normal((2, frames, rows, columns, sizes["in_channels"])).astype(np.float32)
    text = rng.standard_normal((2, 7, 18)).astype(np.float32)
    time = np.tile(np.array([0.0, 0.0, 952.0, 555.6], np.float32)[:frames], (2, 1))
    with jax.default_matmul_precision("highest"):
        run = jax.jit(lambda p: pure(p, latent, time, context=pure(p, text, method="text_context")))
        got = np.asarray(run(params))
    with torch.no_grad():
        tokens = rows * columns // ready.cfg.patch**2
        per_token = torch.tensor(np.repeat(time, tokens, axis=1))
        want = twin(torch.tensor(latent).permute(0, 4, 1, 2, 3), per_token, torch.tensor(text), return_dict=False)[0]
    want = want.permute(0, 2, 3, 4, 1).numpy()
    assert np.abs(want).max() > 0.5
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()

    with pytest.raises(ValueError, match="has no actions"):
        pure(params, latent, time, np.zeros((2, 1 + 4 * (frames - 1), 7), np.float32))

    card = importer.write_import(ready, tmp_path / "ours")
    written = exporter.write_export(card, "diffusers", tmp_path / "out")
    same(read(written[0]), {name: tensor.numpy() for name, tensor in twin.state_dict().items()})
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    type(twin).from_config(described).load_state_dict(twin.state_dict(), strict=True)


def test_original_names_equal_those_that_diffusers_reads(tmp_path):
    """Their converter of the original names, and their model, agree with our reading of the original names."""
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    torch = pytest.importorskip("torch")
    sizes, _ = DITS["uneven heads"]
    theirs = arrays(dit_shapes(40, 2, 56, 4, 16, 18))
    ours = importer.read_import(open_source(write(tmp_path / "a.safetensors", theirs)), heads=2, text=True).params()
    renamed = single_file.convert_wan_transformer_to_diffusers({name: torch.tensor(a) for name, a in theirs.items()})
    twin = twin_dit(sizes)
    twin.load_state_dict(renamed, strict=True)
    twin.save_pretrained(tmp_path / "transformer")
    other = importer.read_import(open_source(find(tmp_path / "transformer")[0]), text=True).params()
    same(native.flatten(ours), native.flatten(other))


VAES = {
    "four levels": {"base_dim": 4, "decoder_base_dim": 8, "z_dim": 6, "dim_mult": [1, 2, 4, 4]}
    | {"temperal_downsample": [False, True, True]},
    "three levels": {"base_dim": 8, "decoder_base_dim": 4, "z_dim": 5, "dim_mult": [1, 2, 2]}
    | {"temperal_downsample": [True, True]},
}


@pytest.mark.parametrize("case", VAES)
def test_a_diffusers_vae_runs_the_same_here(case, tmp_path):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    sizes = VAES[case]
    torch.manual_seed(0)
    mean, std = [0.1 * i - 0.2 for i in range(sizes["z_dim"])], [0.5 + 0.1 * i for i in range(sizes["z_dim"])]
    fixed = {"attn_scales": [], "is_residual": True, "patch_size": 2, "num_res_blocks": 1}
    fixed |= {"in_channels": 12, "out_channels": 12}
    twin = diffusers.AutoencoderKLWan(**sizes, **fixed, latents_mean=mean, latents_std=std).eval()
    with torch.no_grad():
        for parameter in twin.parameters():
            fan_in = max(1, parameter[0].numel())
            parameter.add_(torch.randn_like(parameter) / (2 * fan_in**0.5))
    twin.save_pretrained(tmp_path / "vae")
    ready = importer.read_import(open_source(find(tmp_path)[0]))
    assert ready.cfg.latent_std == tuple(std)
    params, pure = ready.params(), formats.network(ready.cfg)

    frame = np.random.default_rng(2).uniform(-1, 1, (1, 5, 2 * ready.cfg.space, ready.cfg.space, 3)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        got = jax.jit(lambda p: pure(p, frame, method="moments"))(params)[0]
        decoded = np.asarray(jax.jit(lambda p, z: pure(p, z, method="decode_raw"))(params, 0.1 * got))
    with torch.no_grad():
        want = twin.encode(torch.tensor(frame).permute(0, 4, 1, 2, 3)).latent_dist.mean
        film = twin.decode(0.1 * want).sample.permute(0, 2, 3, 4, 1).numpy()
    want = want.permute(0, 2, 3, 4, 1).numpy()
    assert np.abs(want).mean() > 0.05 and np.mean(np.abs(film) < 1) > 0.5
    np.testing.assert_allclose(got, want, atol=1e-4)
    np.testing.assert_allclose(np.clip(decoded, -1, 1), film, atol=1e-4)

    card = importer.write_import(ready, tmp_path / "ours")
    state = {name: tensor.numpy() for name, tensor in twin.state_dict().items()}
    same(read(exporter.write_export(card, "diffusers", tmp_path / "out")[0]), state)
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    diffusers.AutoencoderKLWan.from_config(described).load_state_dict(twin.state_dict(), strict=True)
    # and under the original names, written down independently
    (original,) = exporter.write_export(card, "wan", tmp_path / "wan")
    sizes_and_names = {"base": "base_dim", "decoder": "decoder_base_dim", "z": "z_dim"}
    expected = vae_shapes(
        **{ours: sizes[theirs] for ours, theirs in sizes_and_names.items()},
        mult=tuple(sizes["dim_mult"]),
        halves=tuple(sizes["temperal_downsample"]),
    )
    assert {name: array.shape for name, array in read(original).items()} == expected


def twin_classifier(head):
    """RLinf's classifier in torch, small, every weight random; returns the module and its forward."""
    torch = pytest.importorskip("torch")
    nn = torch.nn

    class Residual(nn.Module):
        def __init__(self, width_in, width, stride):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(width_in, width, 3, stride, 1), nn.Conv2d(width, width, 3, 1, 1)
            self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
            self.conv3 = nn.Conv2d(width_in, width, 1, stride) if stride > 1 else None

        def forward(self, x):
            y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            return torch.relu(y + (x if self.conv3 is None else self.conv3(x)))

    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 4, 7, 2, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    sizes = ((4, 4, 1), (4, 6, 2), (6, 8, 2), (8, 10, 2))
    stages = [nn.Sequential(Residual(a, b, stride), Residual(b, b, 1)) for a, b, stride in sizes]
    layers = [stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    if head == "plain":
        twin = nn.ModuleDict({"net": nn.Sequential(*layers, nn.Linear(10, 1))})
    else:
        fusion = nn.Sequential(nn.Linear(14, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 1))
        parts = {"visual_encoder": nn.Sequential(*layers), "task_embedding": nn.Embedding(3, 4), "fusion_layer": fusion}
        twin = nn.ModuleDict(parts)
    with torch.no_grad():
        for name, tensor in twin.state_dict().items():
            if "num_batches" in name:
                tensor.fill_(77)
            else:
                tensor.add_(0.1 * torch.rand_like(tensor))  # running variances stay positive

    def forward(picture, task):
        if head == "plain":
            return twin["net"](picture)
        feature = torch.cat([twin["visual_encoder"](picture), twin["task_embedding"](task)], dim=1)
        return twin["fusion_layer"](feature)

    return twin.eval(), forward


@pytest.mark.parametrize("head", ["plain", "task"])
def test_a_reward_classifier_runs_the_same_here(head, tmp_path):
    torch = pytest.importorskip("torch")
    twin, forward = twin_classifier(head)
    torch.save(twin.state_dict(), tmp_path / "rm.pth")
    ready = importer.read_import(open_source(tmp_path / "rm.pth"))
    assert ready.cfg.head == head and set(ready.aside().values()) == {77}
    frame = np.random.default_rng(0).uniform(-1, 1, (3, 48, 40, 3)).astype(np.float32)
    task = np.array([2, 0, 1], np.int32)
    got = jax.jit(formats.network(ready.cfg))(ready.params(), frame, task)
    with torch.no_grad():
        want = forward(torch.tensor(frame).permute(0, 3, 1, 2), torch.tensor(task))[:, 0].numpy()
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)
