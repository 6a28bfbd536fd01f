"""Our own form of weights: round trip, damage, other versions, one leaf at a time, and each leaf at its place."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.core import checkpoint, sharding
from wovr_jax.core.config import ConfigError
from wovr_jax.weights import native, safetensors, writer
from wovr_jax.weights.native import load_asset, save_asset
from wovr_jax.weights.safetensors import Fact, FileError
from wovr_jax.world.vae import train as vae_train
from wovr_jax.world.vae.net import VAEConfig
from wovr_jax.world.vae.train import VAETraining

CFG = dataclasses.replace(VAEConfig.fake(), latent_mean=(0.1,) * 4, latent_std=(2.0,) * 4)


def facts_of(arrays):
    return {name: Fact(array.shape, np.dtype(array.dtype)) for name, array in arrays.items()}


@pytest.fixture
def saved(tmp_path):
    params = vae_train.network(CFG).init(jax.random.key(0))
    save_asset("small", CFG, params, training=VAETraining(), scores={"psnr": 30.0}, folder=tmp_path)
    return tmp_path, params


def test_round_trip(saved):
    folder, params = saved
    cfg, loaded = load_asset("small", folder)
    assert cfg == CFG
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), loaded, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}
    facts = native.describe(folder / "small.json")
    assert facts["training"]["steps"] == VAETraining().steps and facts["scores"] == {"psnr": 30.0}
    assert sorted(path.name for path in folder.iterdir()) == ["small.json", "small.safetensors"]


def test_the_library_reads_the_same(saved):
    folder, _ = saved
    library = pytest.importorskip("safetensors.numpy")
    theirs = library.load_file(folder / "small.safetensors")
    ours = native.flatten(native.load(folder / "small.json")[1])
    assert theirs.keys() == {path.replace("/", ".") for path in ours}
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[path.replace("/", ".")])


def test_a_damaged_or_foreign_file_is_refused(saved):
    folder, _ = saved
    path = folder / "small.safetensors"
    whole = path.read_bytes()
    for at in (-1, 12):  # in the last tensor, and in the header: {"decoder... becomes another name
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at:][1:])
        with pytest.raises(FileError, match="has SHA-256 .*, small.json says"):
            load_asset("small", folder)
    path.write_bytes(whole[:-1])
    with pytest.raises(FileError, match="is cut short"):
        load_asset("small", folder)
    path.unlink()
    with pytest.raises(FileError, match="small.safetensors is missing"):
        load_asset("small", folder)
    with pytest.raises(FileError, match="large.json is missing. Weights there: small"):
        load_asset("large", folder)


@pytest.mark.parametrize("name", ["small.json", "small.safetensors"])
def test_weights_of_ours_that_git_did_not_download_are_called_so(saved, name):
    folder, _ = saved
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", encoding="utf-8")
    with pytest.raises(FileError, match=rf"{name} is a pointer of Git LFS"):
        load_asset("small", folder)


def test_a_config_of_another_version_is_refused(saved):
    folder, _ = saved
    path = folder / "small.json"
    facts = json.loads(path.read_text())
    facts["config"]["z_dims"] = facts["config"].pop("z_dim")
    path.write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match="z_dim"):
        load_asset("small", folder)


def test_weights_beyond_float16_are_refused(tmp_path):
    with pytest.raises(FileError, match=r"'a\.0' is not finite"):
        save_asset("big", CFG, {"a": {0: np.float32([1e6])}}, training={}, scores={}, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_assets_of_a_suite_are_small():
    for suite in ("tabletop", "relay"):
        parts = [native.FOLDER / f"{suite}_{name}.safetensors" for name in ("vae", "dinov2", "siglip")]
        assert sum(path.stat().st_size for path in parts) < 3e6
    # With what a run of the table has learned, which play and the impatient begin with, and a VAE for two cameras.
    assert sum(path.stat().st_size for path in native.FOLDER.glob("*.safetensors")) < 14.5e6


# Leaf by leaf ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [False, True])
def test_the_host_holds_one_leaf(saved, monkeypatch, verify):
    """A leaf is gone from the host before the next one is read: 7B of them would not fit."""
    folder, params = saved
    alive: list[weakref.ref] = []
    read = safetensors.read_tensor

    def watched(*arguments):
        assert not [ref for ref in alive if ref() is not None], "a leaf lives on while the next one is read"
        tensor = read(*arguments)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(safetensors, "read_tensor", watched)
    _, shapes = native.load(folder / "small.json", put=lambda name, leaf: leaf.shape, verify=verify)
    assert len(alive) == len(jax.tree.leaves(params))
    assert native.flatten(shapes) == {path: leaf.shape for path, leaf in native.flatten(params).items()}
    # Without a cast, what the caller keeps is what was read: then the watch must bite.
    with pytest.raises(AssertionError, match="lives on"):
        native.load(folder / "small.json", verify=verify)


def test_a_run_holds_one_leaf_too(saved, monkeypatch):
    folder, params = saved
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    events: list[str] = []
    read, put = safetensors.read_tensor, jnp.asarray
    monkeypatch.setattr(safetensors, "read_tensor", lambda *a: events.append("read") or read(*a))
    monkeypatch.setattr(native.jnp, "asarray", lambda *a: events.append("put") or put(*a))
    loaded = native.load_weights("world_weights", str(folder / "small.json"), like, sharding.WHOLE)
    assert events == ["read", "put"] * len(jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, loaded, load_asset("small", folder)[1])


def test_a_cpu_device_takes_each_leaf_as_it_lies(tmp_path):
    """Of leaves that a device copies, the host would hold one more: the largest is a quarter of a network."""
    arrays = {"a": np.arange(5, dtype=np.float32), "b": np.ones((3, 7), np.float16), "c": np.zeros((2, 0), np.int8)}
    arrays["d"] = np.array(3, np.int32)
    card = writer.write_native(tmp_path, "x", CFG, facts_of(arrays), arrays.items(), {})
    places, read = {}, safetensors.read_tensor

    def watched(file, opened, name):
        tensor = read(file, opened, name)
        places[name] = tensor.ctypes.data
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors, "read_tensor", watched)
        _, held = native.load(card, put=lambda _, leaf: jax.device_put(leaf))
    for name, array in arrays.items():
        np.testing.assert_array_equal(held[name], array)
        assert array.size == 0 or held[name].unsafe_buffer_pointer() == places[name]


def test_a_leaf_has_arrived_before_the_next_one_is_read(saved, monkeypatch):
    folder, _ = saved
    events: list[str] = []
    read, wait = safetensors.read_tensor, jax.block_until_ready
    monkeypatch.setattr(safetensors, "read_tensor", lambda *a: events.append("read") or read(*a))
    monkeypatch.setattr(jax, "block_until_ready", lambda x: events.append("wait") or wait(x))
    native.load(folder / "small.json", put=lambda _, leaf: jax.device_put(leaf))
    assert events == ["read", "wait"] * (len(events) // 2) and events


def test_damage_is_named_before_a_run_uses_it(saved):
    folder, params = saved
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    path = folder / "small.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"^config\.vae: .*has SHA-256"):
        native.load_weights("vae", str(folder / "small.json"), like, sharding.WHOLE)


def test_another_network_is_refused_before_anything_is_read(saved, monkeypatch):
    folder, params = saved
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    native.check_weights("vae", str(folder / "small.json"), like)
    like["quant"]["bias"] = jax.ShapeDtypeStruct((3,), jnp.float32)
    like["extra"] = jax.ShapeDtypeStruct((2,), jnp.float32)
    monkeypatch.setattr(safetensors, "read_tensor", lambda *_: pytest.fail("weights were read"))
    for refuse in (native.check_weights, lambda *a: native.load_weights(*a, sharding.WHOLE)):
        with pytest.raises(ConfigError, match=r"(?s)^config\.vae: .*2 leaves.*bias: .*extra: .*got nothing"):
            refuse("vae", str(folder / "small.json"), like)


def test_gaps_and_empty_tensors_count_in_the_hash(tmp_path):
    """A file of somebody else may leave bytes between tensors; every byte is in the hash, each once."""
    arrays = {"b": np.arange(6, dtype=np.float32), "a": np.zeros((0, 3), np.float32), "c": np.ones((), np.int8)}
    writer.write(tmp_path / "w.safetensors", facts_of(arrays), arrays.items(), {"note": "x"})
    data = (tmp_path / "w.safetensors").read_bytes() + b"more"
    (tmp_path / "w.safetensors").write_bytes(data)

    seen = bytearray()
    back = dict(safetensors.read_all(safetensors.header(tmp_path / "w.safetensors"), seen.extend))
    assert seen == data
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)


ON_A_MESH = """
import sys
import jax, jax.numpy as jnp, numpy as np
from wovr_jax.core import sharding
from wovr_jax.weights import native

shapes = {"w": jax.ShapeDtypeStruct((8, 6), jnp.float32), "b": {0: jax.ShapeDtypeStruct((3,), jnp.float32)}}
put = jax.device_put
def checked(leaf, at):
    assert isinstance(leaf, np.ndarray), "the leaf was on a device before it was cut"
    return put(leaf, at)
with sharding.use(sharding.MeshConfig(fsdp=4)):
    jax.device_put = checked
    for where in sys.argv[1:]:
        found = native.load_weights("policy_weights", where, shapes, (("w", ("embed", None)), ("*", ())))
        assert {shard.data.shape for shard in found["w"].addressable_shards} == {(2, 6)}, where
        assert len(found["w"].addressable_shards) == 4 and found["w"].dtype == jnp.float32
        assert np.array_equal(found["w"], np.arange(48).reshape(8, 6)), where
        assert np.array_equal(found["b"][0], [0, 1, 2]) and found["b"][0].is_fully_replicated
print("whole")
"""


def test_cut_parameters_never_lie_whole_on_a_device(tmp_path):
    params = {"w": np.arange(48, dtype=np.float32).reshape(8, 6), "b": {0: np.arange(3, dtype=np.float32)}}
    checkpoint.save(tmp_path / "checkpoint", params)
    half = {path: leaf.astype(jnp.bfloat16) for path, leaf in native.flatten(params).items()}
    card = writer.write_native(tmp_path, "half", CFG, facts_of(half), half.items(), {})
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", ON_A_MESH, str(card), str(tmp_path / "checkpoint")],
        cwd=pathlib.Path(__file__).parents[2],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout == "whole\n", done.stderr
