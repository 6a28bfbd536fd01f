"""Weights in every format: key lists of the releases, round trips without a changed bit, and refusals."""

from __future__ import annotations

import json
import math

import jax
import numpy as np
import pytest

from tests.bridge.layouts import (
    BFLOAT16,
    FLOAT32,
    FULL,
    announced,
    arrays,
    count,
    dit_shapes,
    facts,
    read,
    reward_shapes,
    same,
    vae_shapes,
    write,
)
from wovr_jax.bridge import exporter, formats, importer
from wovr_jax.bridge.sources import FileError, find, open_source
from wovr_jax.bridge.text_dit import TextDiTConfig
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.weights import native, writer
from wovr_jax.weights.plan import KeymapError, plan_export
from wovr_jax.weights.safetensors import Fact
from wovr_jax.world.dit import DiTConfig
from wovr_jax.world.vae.net import VAEConfig
from wovr_jax.world.weights import vae_table

# The releases ----------------------------------------------------------------------------------------


def test_full_size_key_lists_of_the_releases():
    text, action, vae = dit_shapes(**FULL), dit_shapes(**FULL, action=7), vae_shapes(160, 256, 48, blocks=2)
    assert (len(text), count(text)) == (825, 4_999_787_712)
    assert (len(action), count(action)) == (829, 5_025_334_464)
    assert (len(vae), count(vae)) == (196, 704_688_668)

    for shapes, cfg in (
        (text, TextDiTConfig(dtype="bfloat16", residual_dtype="bfloat16")),
        (action, DiTConfig.ti2v_5b(sinusoid_dtype="bfloat16")),
        (vae, VAEConfig.wan2_2()),
        (dit_shapes(**FULL), None),
    ):
        ready = importer.read_import(announced(shapes, BFLOAT16), text=cfg is not None)
        assert cfg is None or ready.cfg == cfg
        ours = {path: fact.shape for path, fact in ready.facts.items()}
        assert count(ours) == (5_025_334_464 if cfg is None else count(shapes))


def test_the_header_of_the_released_action_model_has_the_known_length():
    """RLinf's Goal file is 10,050,753,584 bytes: 2 for each parameter and 84,656 of header. Names decide the length."""
    shapes = dit_shapes(**FULL, action=7)
    before, _, size = writer.layout(facts(shapes, BFLOAT16), {"format": "pt"})
    assert (len(before), size) == (84_656, 10_050_753_584)


def test_released_reward_classifiers():
    plain = importer.read_import(announced(reward_shapes((64, 128, 256, 512))))
    assert plain.cfg == RewardConfig()
    goal = importer.read_import(announced(reward_shapes((64, 128, 256, 512), "task", 10, 64, 256)))
    assert goal.cfg == RewardConfig.resnet18_task()
    # in float32, with running statistics and 21 counts; the rest of the 45,379,978 bytes is the zip around them
    assert 4 * count({path: fact.shape for path, fact in goal.facts.items()}) == 45_343_748


DIALECTS = [
    # diffusers, and the original; pairs as other converters of the release have them
    ("encoder.conv_in.weight", "encoder.conv1.weight"),
    ("encoder.down_blocks.0.resnets.0.norm1.gamma", "encoder.downsamples.0.downsamples.0.residual.0.gamma"),
    ("encoder.down_blocks.0.resnets.1.norm2.gamma", "encoder.downsamples.0.downsamples.1.residual.3.gamma"),
    ("encoder.down_blocks.0.resnets.1.conv2.weight", "encoder.downsamples.0.downsamples.1.residual.6.weight"),
    ("encoder.down_blocks.1.resnets.0.conv_shortcut.bias", "encoder.downsamples.1.downsamples.0.shortcut.bias"),
    ("encoder.down_blocks.0.downsampler.resample.1.bias", "encoder.downsamples.0.downsamples.2.resample.1.bias"),
    ("encoder.down_blocks.1.downsampler.time_conv.bias", "encoder.downsamples.1.downsamples.2.time_conv.bias"),
    ("decoder.up_blocks.1.resnets.0.conv1.weight", "decoder.upsamples.1.upsamples.0.residual.2.weight"),
    ("decoder.up_blocks.0.upsampler.resample.1.weight", "decoder.upsamples.0.upsamples.3.resample.1.weight"),
    ("decoder.up_blocks.0.upsampler.time_conv.weight", "decoder.upsamples.0.upsamples.3.time_conv.weight"),
    ("decoder.mid_block.resnets.1.conv2.weight", "decoder.middle.2.residual.6.weight"),
    ("decoder.mid_block.resnets.0.norm2.gamma", "decoder.middle.0.residual.3.gamma"),
    ("encoder.mid_block.attentions.0.to_qkv.bias", "encoder.middle.1.to_qkv.bias"),
    ("encoder.norm_out.gamma", "encoder.head.0.gamma"),
    ("decoder.conv_out.weight", "decoder.head.2.weight"),
    ("quant_conv.weight", "conv1.weight"),
    ("post_quant_conv.bias", "conv2.bias"),
]


def test_both_dialects_of_the_vae_mean_the_same_leaf():
    """Equal shapes alone would not tell many of them apart."""
    cfg = VAEConfig.wan2_2()
    ours = {path: Fact(shape, FLOAT32) for path, shape in formats.shapes(cfg).items()}
    diffusers, wan = (plan_export("", vae_table(cfg, dialect), ours).links for dialect in ("diffusers", "wan"))
    same_leaf = {diffusers[path][0].theirs: wan[path][0].theirs for path in ours}
    assert {name: same_leaf[name] for name, _ in DIALECTS} == dict(DIALECTS)


# Round trips --------------------------------------------------------------------------------------------

CASES = {
    "dit-wan": ("wan", "diffusion_pytorch_model.safetensors", dit_shapes()),
    "dit-rlinf": ("rlinf", "model-00001.safetensors", dit_shapes(action=7)),
    "vae-wan": ("wan", "Wan2.2_VAE.pth", vae_shapes()),
    "vae-wan-three-levels": ("wan", "Wan2.2_VAE.pth", vae_shapes(8, 4, 5, (1, 2, 2), 2, (True, True))),
    "reward": ("rlinf", "resnet_rm.pth", reward_shapes()),
    "reward-task": ("rlinf", "taskemb_resnet_rm.pth", reward_shapes(head="task")),
}


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_round_trip_changes_no_bit(case, dtype, tmp_path):
    to, name, shapes = CASES[case]
    theirs = arrays(shapes, dtype)
    ready = importer.read_import(open_source(write(tmp_path / "in" / name, theirs)), heads=2, text=True)
    card = importer.write_import(ready, tmp_path / "ours")
    (back,) = exporter.write_export(card, to, tmp_path / "out")
    assert back.name == name
    same(read(back), theirs)
    assert sorted(path.suffix for path in (tmp_path / "ours").iterdir()) == [".json", ".safetensors"]


@pytest.mark.parametrize("prefix", ["pipe.dit.", "model."])
def test_prefixes_and_shards_come_back(prefix, tmp_path):
    theirs = {prefix + name: array for name, array in arrays(dit_shapes(layers=3), BFLOAT16).items()}
    single = write(tmp_path / "in" / "diffusion_pytorch_model.safetensors", theirs)
    ready = importer.read_import(open_source(single), heads=2, text=True)
    card = importer.write_import(ready, tmp_path / "ours")
    written = exporter.write_export(card, "wan", tmp_path / "out", shard_bytes=60_000)
    assert written[0].name == "diffusion_pytorch_model-00001-of-00007.safetensors"
    assert written[-1].name == "diffusion_pytorch_model.safetensors.index.json"
    assert find(tmp_path / "out") == [written[-1]]
    same(read(written[-1]), theirs)
    same(read(written[2]), theirs)  # any shard stands for all
    again = importer.read_import(open_source(written[-1]), heads=2, text=True)
    same(native.flatten(again.params()), native.flatten(ready.params()))


def test_a_checkpoint_keeps_its_container_and_loses_what_is_no_weight(tmp_path):
    torch = pytest.importorskip("torch")
    theirs = arrays(reward_shapes())
    state = {name: torch.tensor(array) for name, array in theirs.items()}
    torch.save({"model_state_dict": state, "epoch": 3, "optimizer": {"lr": 1e-4}}, tmp_path / "resnet_rm.pth")
    ready = importer.read_import(open_source(tmp_path / "resnet_rm.pth"))
    assert "left in the file, as they are no weights: epoch, optimizer" in ready.report()
    card = importer.write_import(ready, tmp_path / "ours")
    (back,) = exporter.write_export(card, "rlinf", tmp_path / "out")
    assert set(torch.load(back, weights_only=True)) == {"model_state_dict"}
    same(read(back), theirs)


def test_an_export_of_weights_trained_here_counts_no_batches(tmp_path):
    pytest.importorskip("torch")
    cfg = RewardConfig.fake(head="plain")
    leaves = native.flatten(jax.tree.map(np.asarray, formats.network(cfg).init(jax.random.key(0))))
    about = {path: Fact(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    card = writer.write_native(tmp_path, "mine", cfg, about, leaves.items(), {})
    (back,) = exporter.write_export(card, "rlinf", tmp_path / "out")
    theirs = read(back)
    assert theirs["net.0.1.num_batches_tracked"] == 0 and theirs["net.0.1.num_batches_tracked"].dtype == np.int64
    assert {name: array.shape for name, array in theirs.items()} == reward_shapes_of(cfg)


def reward_shapes_of(cfg):
    shapes = reward_shapes((*cfg.widths, 1, 1), kernel=cfg.stem_kernel)
    short = {name: shape for name, shape in shapes.items() if not name.startswith(("net.3", "net.4", "net.7"))}
    return short | {"net.5.weight": (1, cfg.widths[-1]), "net.5.bias": (1,)}


# Text to actions ------------------------------------------------------------------------------------------


def test_text_is_dropped_and_actions_are_made_and_both_are_said(tmp_path):
    theirs = arrays(dit_shapes(), BFLOAT16)
    source = open_source(write(tmp_path / "diffusion_pytorch_model.safetensors", theirs))
    ready = importer.read_import(source, heads=2, seed=3)
    assert ready.cfg.action_conditioning == "dual" and type(ready.cfg) is DiTConfig
    said = "\n".join(ready.report())
    assert "dropped, the text path: actions take its place: 4 tensors, 5,760 parameters" in said
    assert "newly initialised (seed 3): 8 leaves" in said

    leaves = native.flatten(ready.params())
    assert {leaf.dtype for leaf in leaves.values()} == {BFLOAT16}
    kernel = leaves["action_cross/inner/kernel"].astype(np.float32)
    bound = math.sqrt(6 / (7 + 64))
    assert 0.9 * bound < np.abs(kernel).max() <= bound * 1.01 and not leaves["action_cross/inner/bias"].any()
    assert not np.array_equal(leaves["action_adaln/inner/kernel"][:7, :64], leaves["action_cross/inner/kernel"])
    again = native.flatten(importer.read_import(source, heads=2, seed=3).params())
    same(again, leaves)
    # what stays is what was there
    np.testing.assert_array_equal(leaves["blocks/ffn/inner/kernel"][1], theirs["blocks.1.ffn.0.weight"].T)

    only = importer.read_import(
        source, cfg=DiTConfig(dim=64, heads=2, layers=2, ffn=80, channels=6, freq_dim=16, action_conditioning="adaln")
    )
    assert "this network has no cross-attention: 24 tensors" in "\n".join(only.report())


# Refusals ---------------------------------------------------------------------------------------------------


def test_every_misfit_is_listed_at_once(tmp_path):
    theirs = arrays(dit_shapes(action=7), BFLOAT16)
    del theirs["blocks.1.self_attn.q.bias"]
    theirs["blocks.0.self_attn.lora"] = np.zeros(3, BFLOAT16)
    theirs["blocks.0.ffn.0.weight"] = np.ascontiguousarray(theirs["blocks.0.ffn.0.weight"].T)
    theirs["time_projection.1.weight"] = theirs["time_projection.1.weight"].astype(np.int8)
    write(tmp_path / "model-00001-of-00002.safetensors", theirs)
    write(tmp_path / "model-00002-of-00002.safetensors", {"head.head.bias": theirs["head.head.bias"]})
    with pytest.raises(KeymapError) as caught:
        importer.read_import(open_source(tmp_path / "model-00001-of-00002.safetensors"), heads=2)
    assert {kind: len(cases) for kind, cases in caught.value.problems.items()} == {
        "missing in the file": 1,
        "not in the table": 1,
        "more than once in the file": 1,
        "shape": 1,
        "dtype": 1,
    }
    assert "it is transposed" in str(caught.value)


def test_a_config_that_does_not_fit_is_told_apart_leaf_by_leaf():
    wrong = DiTConfig(dim=64, heads=2, layers=3, ffn=80, channels=6, freq_dim=16)
    with pytest.raises(KeymapError, match="27 problems") as caught:
        importer.read_import(announced(dit_shapes(action=7)), cfg=wrong, heads=2)
    assert set(caught.value.problems) == {"missing in the file"}


def test_formats_that_cannot_hold_a_network(tmp_path):
    source = open_source(write(tmp_path / "a.safetensors", arrays(dit_shapes(action=7))))
    card = importer.write_import(importer.read_import(source, heads=2), tmp_path / "ours")
    with pytest.raises(FileError, match="conditioned on actions has no place in format 'diffusers'; use rlinf"):
        exporter.write_export(card, "diffusers", tmp_path)
    with pytest.raises(FileError, match="dit has no format 'torch'; it has rlinf, diffusers, wan"):
        exporter.write_export(card, "torch", tmp_path)
    with pytest.raises(KeymapError, match="without a row"):
        plan_export("x", formats.table_of(RewardConfig(), formats.FORMATS[-1]), {"stray": Fact((1,), FLOAT32)})


def test_unknown_files_and_sizes_that_cannot_be_told(tmp_path):
    with pytest.raises(FileError, match="not a known kind of weights.*the first names in it are encoder.wte"):
        importer.read_import(announced({"encoder.wte": (3, 3)}))
    with pytest.raises(FileError, match="width 64 does not make heads of 128"):
        importer.read_import(announced(dit_shapes()))
    broken = {name: shape for name, shape in dit_shapes().items() if name != "blocks.0.ffn.0.bias"}
    with pytest.raises(FileError, match=r"'blocks\.0\.ffn\.0\.bias' is missing"):
        importer.read_import(announced(broken), heads=2)
    renamed = {"condition_embedder.time_proj.weight": (2, 2)}
    with pytest.raises(FileError, match=r"config\.json of the diffusers folder is missing"):
        importer.read_import(announced(renamed))
    (tmp_path / "config.json").write_text(json.dumps({"is_residual": False, "z_dim": 16}))
    write(
        tmp_path / "m.safetensors", {"encoder.down_blocks.0.resnets.0.norm1.gamma": np.zeros((2, 1, 1, 1), np.float32)}
    )
    with pytest.raises(FileError, match="is_residual False instead of True"):
        importer.read_import(open_source(tmp_path / "m.safetensors"))
