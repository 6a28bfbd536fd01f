"""OpenVLA-OFT folders: the released key list, there and back without a changed bit or byte, and refusals."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from tests.bridge.layouts import (
    BFLOAT16,
    FLOAT32,
    FULL_VLA,
    TINY_VLA,
    announced,
    arrays,
    count,
    openvla_config,
    openvla_folder,
    openvla_shapes,
    read,
    same,
)
from wovr_jax.bridge import exporter, formats, importer
from wovr_jax.bridge.rest import other_files
from wovr_jax.bridge.sources import FileError, find, open_source
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.policy.weights import vla_table
from wovr_jax.weights import native, writer
from wovr_jax.weights.plan import KeymapError, plan_export
from wovr_jax.weights.safetensors import Fact
from wovr_jax.weights.source import open_native

TINY = openvla_config(num_attention_heads=4, vocab_size=392, pad_token_id=327) | {"pad_token_id": 327}


def tiny(dtype=FLOAT32):
    return arrays(openvla_shapes(**TINY_VLA), dtype)


def opened(folder):
    (file,) = find(folder)
    return importer.read_import(open_source(file), heads=2)


def bytes_of(folder):
    """Every file but weights and index, hidden folders left out."""
    files = (path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts)
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if not path.name.startswith("model") or path.suffix == ".py"
    }


# Full size ------------------------------------------------------------------------------------------------


def test_the_release_has_its_counts_and_reads_as_the_named_size():
    shapes = openvla_shapes(**FULL_VLA)
    parts = ("vision_backbone.featurizer", "vision_backbone.fused", "projector", "language_model")
    assert [sum(name.startswith(part) for name in shapes) for part in parts] == [343, 342, 6, 291]
    assert (len(shapes), count(shapes)) == (982, 7_541_237_184)

    source = dataclasses.replace(announced(shapes, BFLOAT16), config=openvla_config())
    ready = importer.read_import(source)
    assert ready.cfg == VLAConfig.openvla_7b()
    ours = {path: fact.shape for path, fact in ready.facts.items()}
    kept = {name: fact.shape for name, fact in ready.kept.items()}
    assert count(ours) == 7_498_156_704 and (len(kept), count(kept)) == (43, 43_080_480)
    assert ready.bytes == 2 * 7_541_237_184
    assert "43 tensors, 43,080,480 parameters" in "\n".join(ready.report())


def test_the_exported_index_of_full_size():
    cfg = VLAConfig.openvla_7b()
    ours = {path: Fact(shape, BFLOAT16) for path, shape in formats.shapes(cfg).items()}
    kept = {name: Fact(shape, BFLOAT16) for name, shape in vla_table(cfg).kept.items()}
    checked = plan_export("ours", vla_table(cfg), ours, kept)
    groups = exporter.shards("model.safetensors", {**checked.tensor, **checked.kept}, exporter.POLICY_SHARD)
    index = exporter.index(groups)
    assert len(groups) == 4 and groups[0][0] == "model-00001-of-00004.safetensors"
    assert len(index["weight_map"]) == 982 and index["metadata"]["total_size"] == 2 * 7_541_237_184
    exported = {name: fact.shape for _, group in groups for name, fact in group.items()}
    assert exported == openvla_shapes(**FULL_VLA)
    for _, group in groups:
        assert sum(fact.nbytes for fact in group.values()) <= 5_000_000_000


# There and back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("shards", [1, 3])
def test_round_trip_changes_no_bit_and_no_file(dtype, shards, tmp_path):
    theirs = tiny(dtype)
    release = openvla_folder(tmp_path / "release", theirs, TINY, shards)
    ready = opened(release)
    card = importer.write_import(ready, tmp_path / "ours", "mine")
    before, leaves = bytes_of(release), native.flatten(ready.params())
    most = None if shards == 1 else 40_000
    (tmp_path / "release").rename(tmp_path / "gone")  # nothing of the source is needed any more
    written = exporter.write_export(card, "openvla", tmp_path / "out", shard_bytes=most)

    (weights,) = find(tmp_path / "out")
    assert weights.name == ("model.safetensors" if shards == 1 else "model.safetensors.index.json")
    same(read(weights), theirs)
    assert bytes_of(tmp_path / "out") == before and len(before) == 6
    assert sorted(written) == sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
    same(native.flatten(opened(tmp_path / "out").params()), leaves)
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["mine.json", "mine.rest", "mine.safetensors"]


def test_the_transformers_library_reads_what_is_exported(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    theirs = tiny()
    card = importer.write_import(opened(openvla_folder(tmp_path / "release", theirs, TINY)), tmp_path / "ours")
    exporter.write_export(card, "openvla", tmp_path / "out", shard_bytes=40_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == theirs.keys()
    for file in sorted(set(index["weight_map"].values())):
        held = library.load_file(tmp_path / "out" / file)
        assert held.keys() == {name for name, home in index["weight_map"].items() if home == file}
        same(held, {name: theirs[name] for name in held})


def test_every_tensor_stands_where_it_belongs(tmp_path):
    theirs = tiny()
    leaves = native.flatten(opened(openvla_folder(tmp_path, theirs, TINY)).params())
    tower, layer = "vision_backbone.featurizer", "language_model.model.layers"
    np.testing.assert_array_equal(leaves["dino/prefix"][:, :1], theirs[f"{tower}.cls_token"])
    np.testing.assert_array_equal(leaves["dino/prefix"][:, 1:], theirs[f"{tower}.reg_token"])
    assert leaves["dino/patch_embed/kernel"][1, 3, 2, 5] == theirs[f"{tower}.patch_embed.proj.weight"][5, 2, 1, 3]
    assert leaves["dino/blocks/qkv/kernel"].shape == (2, 24, 72)  # of three blocks two are run
    np.testing.assert_array_equal(leaves["dino/blocks/qkv/kernel"][1], theirs[f"{tower}.blocks.1.attn.qkv.weight"].T)
    np.testing.assert_array_equal(leaves["dino/blocks/ls2"][0], theirs[f"{tower}.blocks.0.ls2.scale_factor"])
    np.testing.assert_array_equal(leaves["llm/blocks/down/kernel"][2], theirs[f"{layer}.2.mlp.down_proj.weight"].T)
    np.testing.assert_array_equal(
        leaves["llm/blocks/norm2/scale"][1], theirs[f"{layer}.1.post_attention_layernorm.weight"]
    )
    np.testing.assert_array_equal(leaves["llm/head/kernel"], theirs["language_model.lm_head.weight"].T)


def test_imported_weights_load_and_run(tmp_path):
    ready = opened(openvla_folder(tmp_path / "release", tiny(BFLOAT16), TINY))
    card = importer.write_import(ready, tmp_path / "ours")
    cfg, params = native.load(card, put=lambda _, leaf: jnp.asarray(leaf, jnp.float32))
    assert cfg == ready.cfg and cfg.llm.dtype == "bfloat16" and cfg.pad == 327 and cfg.vocab_size == 328
    prompt = jnp.array([[1, 5, 9]])
    logits = formats.network(cfg)(params, jnp.zeros((1, 8, 8, 3)), prompt)
    assert logits.shape == (1, 8, 7, 256) and bool(jnp.isfinite(logits).all())


def test_a_cast_import_casts_what_it_keeps(tmp_path):
    theirs = tiny(BFLOAT16)
    (file,) = find(openvla_folder(tmp_path / "release", theirs, TINY))
    card = importer.write_import(
        importer.read_import(open_source(file), heads=2, dtype="float32", recipe="oft"), tmp_path / "ours"
    )
    assert open_native(card)[0].recipe == "oft"
    exporter.write_export(card, "openvla", tmp_path / "out")
    same(read(tmp_path / "out" / "model.safetensors"), {name: a.astype(np.float32) for name, a in theirs.items()})


# Refusals ---------------------------------------------------------------------------------------------------


def test_every_misfit_is_listed_at_once(tmp_path):
    theirs = tiny()
    del theirs["vision_backbone.featurizer.reg_token"], theirs["vision_backbone.fused_featurizer.attn_pool.latent"]
    theirs["vision_backbone.featurizer.reg_token"] = np.zeros((1, 4, 23), np.float32)
    theirs["vision_backbone.featurizer.norm.bias"] = np.zeros(23, np.float32)
    theirs["language_model.model.layers.1.mlp.up_proj.weight"] = theirs[
        "language_model.model.layers.1.mlp.up_proj.weight"
    ].T.copy()
    theirs["projector.fc1.bias"] = theirs["projector.fc1.bias"].astype(np.int8)
    theirs["language_model.model.norm.weight"] = theirs["language_model.model.norm.weight"].astype(np.float16)
    theirs["value_head.mlp.0.weight"] = theirs["vision_backbone.featurizer.blocks.0.scale.weight"] = np.ones(2)
    with pytest.raises(KeymapError) as caught:
        opened(openvla_folder(tmp_path, theirs, TINY))
    assert {kind: len(cases) for kind, cases in caught.value.problems.items()} == {
        "missing in the file": 1,
        "not in the table": 2,
        "shape": 3,
        "dtype": 2,
    }
    said = str(caught.value)
    assert "reg_token: expected [1, 4, 24], got [1, 4, 23] (for dino/prefix[:,1:5])" in said
    assert "it is transposed" in said and "(kept for export)" in said


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "llava"}, "model_type 'llava' instead of 'openvla'"),
        ({"use_fused_vision_backbone": False}, "use_fused_vision_backbone False instead of True"),
        ({"arch_specifier": "linear"}, "arch_specifier 'linear' instead of"),
        ({"text_config": {"num_key_value_heads": 2}}, "num_key_value_heads 2 instead of 32"),
        ({"text_config": {"rope_scaling": {"factor": 2}}}, "rope_scaling"),
        ({"text_config": {"num_attention_heads": 5}}, "width 32 does not make 5 heads"),
        ({"text_config": {"vocab_size": 32064}}, "vocab_size 32064 instead of 392"),
        ({"text_config": {"head_dim": 8}}, "head_dim 8 instead of 1"),
        ({"text_config": {"rope_parameters": {"rope_type": "yarn"}}}, "rope_type 'yarn' instead of 'default'"),
        ({"pad_to_multiple_of": 200}, "vocab_size: expected above 256"),
    ],
)
def test_policies_of_another_kind(change, message):
    source = dataclasses.replace(announced(openvla_shapes(**TINY_VLA)), config=TINY | change)
    with pytest.raises(FileError, match=message):
        importer.read_import(source, heads=2)


def test_sizes_that_cannot_be_told():
    source = announced(openvla_shapes(**TINY_VLA))
    with pytest.raises(FileError, match=r"config\.json of the OpenVLA folder is missing"):
        importer.read_import(source)
    source = dataclasses.replace(source, config=TINY)
    towers = {name: shape for name, shape in openvla_shapes(**TINY_VLA).items() if ".layers." not in name}
    with pytest.raises(FileError, match=r"'language_model\.model\.layers\.0\.mlp\.gate_proj\.weight' is missing"):
        importer.read_import(dataclasses.replace(announced(towers), config=TINY), heads=2)
    with pytest.raises(FileError, match="featurizer is 24 wide, not 1024; say how many heads"):
        importer.read_import(source)


def test_rms_eps_and_theta_come_from_the_file_and_default_as_it_does():
    shapes = openvla_shapes(**TINY_VLA)
    plain = importer.read_import(dataclasses.replace(announced(shapes), config=TINY), heads=2)
    assert (plain.cfg.llm.eps, plain.cfg.llm.rope_theta, plain.cfg.stop) == (1e-6, 10000.0, 2)
    text = TINY["text_config"] | {"rms_norm_eps": 1e-5, "rope_theta": 5e5}
    other = importer.read_import(dataclasses.replace(announced(shapes), config=TINY | {"text_config": text}), heads=2)
    assert (other.cfg.llm.eps, other.cfg.llm.rope_theta) == (1e-5, 5e5)
    text = TINY["text_config"] | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    other = importer.read_import(dataclasses.replace(announced(shapes), config=TINY | {"text_config": text}), heads=2)
    assert other.cfg.llm.rope_theta == 5e5


def test_an_export_needs_what_was_kept_unchanged(tmp_path):
    card = importer.write_import(opened(openvla_folder(tmp_path / "release", tiny(), TINY)), tmp_path / "ours")
    kept = tmp_path / "ours" / "policy.rest"
    statistics = kept / "files" / "dataset_statistics.json"
    whole = statistics.read_bytes()
    for spoil in (
        lambda: statistics.write_bytes(whole + b" "),
        statistics.unlink,
        lambda: (statistics.write_bytes(whole), (kept / "files" / "new.py").touch()),
    ):
        spoil()
        with pytest.raises(FileError, match="is not as the import left it: 1 files"):
            exporter.write_export(card, "openvla", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileError, match="policy has no format 'rlinf'; it has openvla"):
        exporter.write_export(card, "rlinf", tmp_path / "out")


def test_a_policy_of_our_own_is_no_release(tmp_path):
    cfg = VLAConfig.fake()
    leaves = {path: np.ones(shape, np.float32) for path, shape in formats.shapes(cfg).items()}
    facts = {path: Fact(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    card = writer.write_native(tmp_path, "mine", cfg, facts, leaves.items(), {})
    with pytest.raises(FileError, match="Only a policy that was imported from a release"):
        exporter.write_export(card, "openvla", tmp_path / "out")


def test_old_weights_never_stay_beside_new_ones(tmp_path):
    release = openvla_folder(tmp_path / "release", tiny(), TINY, 3)
    (release / "model.safetensors").touch()  # a leftover: the index is what is read
    files = other_files(open_source(release / "model.safetensors.index.json").files)
    assert not any(file.name.startswith("model") and file.suffix != ".py" for file in files)
    (release / "model.safetensors").unlink()
    card = importer.write_import(opened(release), tmp_path / "ours")
    with pytest.raises(FileError, match="would be loaded with the new weights; remove them"):
        exporter.write_export(card, "openvla", release)


def test_an_interrupted_import_leaves_what_was_there(tmp_path, monkeypatch):
    ready = opened(openvla_folder(tmp_path / "release", tiny(), TINY))
    card = importer.write_import(ready, tmp_path / "ours")
    before = {path: path.read_bytes() for path in card.parent.rglob("*") if path.is_file()}

    def dying(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(importer.Import, "leaves", dying)
    with pytest.raises(KeyboardInterrupt):
        importer.write_import(ready, tmp_path / "ours")
    assert {path: path.read_bytes() for path in card.parent.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in card.parent.iterdir()) == ["policy.json", "policy.rest", "policy.safetensors"]
