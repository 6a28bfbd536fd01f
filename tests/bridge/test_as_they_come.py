"""Weights as trainers, clones and downloads leave them: read, or called what they are with the way to mend them."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from tests.bridge.layouts import BFLOAT16, arrays, dit_shapes, read, reward_shapes, same, write
from wovr_jax.bridge import exporter, importer, torch_io
from wovr_jax.bridge.sources import FileError, find, open_source
from wovr_jax.weights import native
from wovr_jax.weights.plan import KeymapError

NET = arrays(dit_shapes(action=7), BFLOAT16)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"


def renamed(change):
    return {change(name): array for name, array in NET.items()}


def opened(path):
    return importer.read_import(open_source(path), heads=2)


# Names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "model.module.", "actor.policy.net."]
)
def test_what_stands_before_every_name_is_taken_off_and_put_back(prefix, tmp_path):
    """The last is a script's own: no list of prefixes has it, and the names behind it are known."""
    theirs = renamed(lambda name: prefix + name)
    ready = opened(write(tmp_path / "model-00001.safetensors", theirs))
    assert ready.source.facts.keys() == NET.keys()
    assert any(repr(ready.source.prefix) in line for line in ready.report())
    card = importer.write_import(ready, tmp_path / "ours")
    (back,) = exporter.write_export(card, "rlinf", tmp_path / "out")
    same(read(back), theirs)


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_wrappers_of_single_blocks_are_taken_off_and_said(wrapper, tmp_path):
    theirs = renamed(lambda name: name.replace("blocks.1.", f"blocks.1.{wrapper}."))
    ready = opened(write(tmp_path / "model-00001.safetensors", theirs))
    same(native.flatten(ready.params()), native.flatten(opened(write(tmp_path / "b" / "m.safetensors", NET)).params()))
    assert any(f"cleared of {wrapper!r}" in line for line in ready.report())


def test_two_names_that_become_one_are_refused(tmp_path):
    theirs = NET | {"blocks._orig_mod.0.ffn.0.bias": NET["blocks.0.ffn.0.bias"]}
    with pytest.raises(KeymapError, match="more than once in the file"):
        opened(write(tmp_path / "m.safetensors", theirs))


def test_a_network_beside_its_average_is_not_guessed(tmp_path):
    theirs = renamed(lambda name: f"generator.{name}") | renamed(lambda name: f"generator_ema.{name}")
    with pytest.raises(FileError, match=r"fall into generator\. \(73\), generator_ema\. \(73\): save the one"):
        opened(write(tmp_path / "m.safetensors", theirs))


# Endings and containers ------------------------------------------------------------------------------------


def saved(path, content):
    torch = pytest.importorskip("torch")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def tensors(theirs=NET):
    pytest.importorskip("torch")
    return {name: torch_io.from_numpy(array) for name, array in theirs.items()}


@pytest.mark.parametrize("name", ["full_weights.pt", "last.ckpt", "pytorch_model.bin", "model.pth"])
@pytest.mark.parametrize("inside", [(), ("model",), ("state_dict",), ("actor", "weights")])
def test_what_torch_saves_is_read_whatever_it_is_called(name, inside, tmp_path):
    content = tensors() | {"blocks.0._extra_state": None}
    for key in reversed(inside):
        content = {key: content, "step": 3, "optimizer": {"state": {0: {"exp_avg": tensors()["head.head.bias"]}}}}
    path = saved(tmp_path / name, content)
    assert find(tmp_path) == [path]
    ready = opened(path)
    same(read(path), NET)
    assert ready.source.container == ("/".join(inside) or None)
    said = "\n".join(ready.report())
    assert "blocks.0._extra_state" in said and ("optimizer, step" in said or not inside)


def test_several_networks_in_one_file(tmp_path):
    odd = opened(saved(tmp_path / "a.pt", {"model": tensors(), "ema": tensors()}))
    assert odd.warnings()[0] == "a.pt holds tensors under ema too; what is read is model"
    with pytest.raises(
        FileError, match=r"several sets of weights: student, teacher\. Save the one that is meant alone"
    ):
        open_source(saved(tmp_path / "b.pt", {"student": tensors(), "teacher": tensors()}))


def test_shards_of_torch(tmp_path):
    names = sorted(NET)
    home = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(home.values()):
        saved(tmp_path / file, tensors({name: NET[name] for name in names if home[name] == file}))
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": home}), encoding="utf-8")
    assert find(tmp_path) == [index]
    same(read(index), NET)
    index.unlink()
    same(read(find(tmp_path)[0]), NET)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(FileError, match="1 of its 2 shards are not there"):
        open_source(find(tmp_path)[0])


def test_the_rest_of_a_trainings_folder_is_no_weights(tmp_path):
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state_0.pth", "optimizer_1.bin"):
        (tmp_path / name).write_bytes(b"x")
    path = write(tmp_path / "model-00001.safetensors", NET)
    assert find(tmp_path) == [path]


def test_without_torch_the_way_around_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    (tmp_path / "full_weights.pt").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(FileError, match=r"(?s)full_weights\.pt: .*needs torch.*state dict of torch, such as RLinf's"):
        open_source(tmp_path / "full_weights.pt")


# What is no weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "full_weights.pt", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "content, message",
    [
        (POINTER, "is a pointer of Git LFS, not the weights: fetch them with `git lfs pull`"),
        (b"/annex/objects/SHA256E-s12--ab.pt\n", "is a pointer of git-annex"),
        (b"\n<!DOCTYPE html><html>Sign in", "is a web page: the download was answered with one"),
        (b"\x1f\x8b" + bytes(50), "is a compressed archive: unpack it first"),
        (b"\x89HDF\r\n" + bytes(50), "is an HDF5 file"),
        (b"", "is empty: the copy or download was interrupted"),
    ],
    ids=["lfs", "annex", "html", "gzip", "hdf5", "empty"],
)
def test_what_is_no_weights_is_called_what_it_is(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileError, match=message) as refused:
        open_source(tmp_path / name)
    assert "damaged" not in str(refused.value) and name in str(refused.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_settings_that_git_did_not_download_are_called_so_too(name, tmp_path):
    write(tmp_path / "model.safetensors", NET)
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(FileError, match=rf"{name} is a pointer of Git LFS"):
        open_source(find(tmp_path)[0])


def test_each_format_under_the_others_name(tmp_path):
    write(tmp_path / "a.safetensors", NET).rename(tmp_path / "a.pt")
    with pytest.raises(FileError, match=r"safetensors file under another name: rename it to a\.safetensors"):
        open_source(tmp_path / "a.pt")
    (tmp_path / "b.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(FileError, match=r"what torch\.save writes, under another name: rename it to b\.pt"):
        open_source(tmp_path / "b.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_a_locked_file_is_called_locked(name, tmp_path, monkeypatch):
    (tmp_path / name).write_bytes(b"x" * 100)
    first = pathlib.Path.open

    def locked(self, *how, **more):
        if self.name == name:
            raise PermissionError(13, "Permission denied", str(self))
        return first(self, *how, **more)

    monkeypatch.setattr(pathlib.Path, "open", locked)
    with pytest.raises(FileError, match=rf"{name} cannot be opened: Permission denied\. Give this user the right"):
        open_source(tmp_path / name)


@pytest.mark.parametrize(
    "name, message",
    [
        ("__0_0.distcp", "a distributed checkpoint of torch in pieces: python -m torch.distributed.checkpoint"),
        ("model_world_size_8_rank_3.pt", "verl's model_merger"),
        ("mp_rank_00_model_states.pt", "zero_to_fp32.py"),
    ],
)
def test_checkpoints_in_pieces(name, message, tmp_path):
    (tmp_path / "global_step_10" / "actor").mkdir(parents=True)
    (tmp_path / "global_step_10" / "actor" / name).write_bytes(b"PK\x03\x04")
    for folder in (tmp_path, tmp_path / "global_step_10" / "actor"):
        with pytest.raises(FileError, match=message):
            find(folder)


def test_weights_that_lie_deeper_are_named(tmp_path):
    write(tmp_path / "hub" / "snapshots" / ("a" * 40) / "model.safetensors", NET)
    with pytest.raises(
        FileError, match=rf"weights deeper; name the folder.*snapshots/{'a' * 40} \(model\.safetensors\)"
    ):
        find(tmp_path / "hub")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(FileError, match="a folder of LoRA adapters: name the policy's folder"):
        find(tmp_path / "adapter")


def test_other_endings_are_answered_with_what_is_read(tmp_path):
    for name in ("model.gguf", "weights.h5", "params.msgpack"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(
            FileError, match=r"(?s)expected a \.safetensors file.*What is read:.*model\.save_pretrained"
        ):
            open_source(tmp_path / name)


# Numbers ----------------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_refused(tmp_path):
    theirs = arrays(reward_shapes())
    theirs["net.1.0.conv1.weight"][0, 0, 0, 0] = np.nan
    ready = importer.read_import(open_source(write(tmp_path / "rm.safetensors", theirs)))
    with pytest.raises(FileError, match="conv1/kernel is not finite, in float32. A training that diverged"):
        importer.write_import(ready, tmp_path / "ours")
    theirs["net.1.0.conv1.weight"][0, 0, 0, 0] = 1e6
    ready = importer.read_import(open_source(write(tmp_path / "rm.safetensors", theirs)), dtype="float16")
    with pytest.raises(FileError, match="not finite, in float16"), np.errstate(over="ignore"):
        importer.write_import(ready, tmp_path / "ours")
    assert not list((tmp_path / "ours").glob("*"))


@pytest.mark.parametrize("width", [1536, 3072])
def test_heads_of_a_released_width_are_the_releases(width):
    from tests.bridge.layouts import announced

    shapes = dit_shapes(dim=width, layers=1, action=7)
    assert importer.read_import(announced(shapes)).cfg.heads == width // 128
    with pytest.raises(FileError, match=rf"--heads 16, but a release of width {width} has {width // 128}"):
        importer.read_import(announced(shapes), heads=16)


def test_heads_that_nothing_confirms_are_a_warning(tmp_path):
    path = write(tmp_path / "m.safetensors", NET)
    assert "2 attention heads are believed because --heads says so" in "\n".join(opened(path).warnings())
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"num_heads": 4, "eps": 1e-5}), encoding="utf-8")
    ready = importer.read_import(open_source(path))
    assert (ready.cfg.heads, ready.cfg.eps, ready.warnings()) == (4, 1e-5, [])
    with pytest.raises(FileError, match="--heads 2, but config.json beside it has 4"):
        opened(path)
    config.write_text(json.dumps({"num_heads": 4, "num_layers": 30, "ffn_dim": 9}), encoding="utf-8")
    with pytest.raises(FileError, match="ffn_dim 9 instead of 80, num_layers 30 instead of 2"):
        importer.read_import(open_source(path))
