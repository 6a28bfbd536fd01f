"""Files that are damaged, incomplete, dangerous or simply something else; and our own form."""

from __future__ import annotations

import json
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.bridge.layouts import BFLOAT16, FLOAT32, arrays, read, reward_shapes, same, write
from wovr_jax.bridge import formats
from wovr_jax.bridge.sources import FileError, find, open_source
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.weights import native, writer
from wovr_jax.weights.safetensors import Fact
from wovr_jax.weights.source import open_native

EVERY = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(5).astype(BFLOAT16),
    "c": np.array(7),
    "d": np.zeros((0, 4), np.float16),
    "e": np.array([True, False]),
    "f": np.arange(4, dtype=np.uint8),
}


def ours(path, content):
    facts = {name: Fact(array.shape, array.dtype) for name, array in content.items()}
    writer.write(path, facts, reversed(content.items()))
    return path


def test_the_library_reads_what_we_write_and_we_what_it_writes(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    same(library.load_file(ours(tmp_path / "ours.safetensors", EVERY)), EVERY)
    same(read(write(tmp_path / "theirs.safetensors", EVERY)), EVERY)


def test_what_was_announced_must_come(tmp_path):
    fact = {"a": Fact((2,), FLOAT32)}
    with pytest.raises(ValueError, match="1 tensors did not come"):
        writer.write(tmp_path / "x", fact, [])
    with pytest.raises(ValueError, match=r"float64\[2\] came, float32\[2\] was announced"):
        writer.write(tmp_path / "x", fact, [("a", np.zeros(2))])


def test_damaged_files_are_named(tmp_path):
    path = ours(tmp_path / "a.safetensors", EVERY)
    whole = path.read_bytes()
    for cut, message in ((4, "not a safetensors file"), (30, "cut short"), (len(whole) - 1, "is cut short: '.' ends")):
        path.write_bytes(whole[:cut])
        with pytest.raises(FileError, match=message):
            open_source(path)
    path.write_bytes(whole.replace(b'"shape":[2,3]', b'"shape":[2,4]'))
    with pytest.raises(FileError, match=r"'a' is F32\[2, 4\] but has 24 bytes"):
        open_source(path)
    path.write_bytes(whole.replace(b'"b"', b'"a"'))
    assert open_source(path).doubled == ["a"]
    path.write_bytes(whole)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(FileError, match="cannot be read as JSON settings"):
        open_source(path)
    with pytest.raises(FileError, match="no such file"):
        find(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match=r"no \.safetensors and no \.pth in it"):
        find(tmp_path / "empty")
    with pytest.raises(FileError, match=r"expected a \.safetensors file"):
        open_source(__file__)


def test_shards_that_are_not_all_there_or_disagree(tmp_path):
    ours(tmp_path / "m-00001-of-00002.safetensors", {"a": EVERY["a"]})
    with pytest.raises(FileError, match=r"1 of its 2 shards are not there: m-00002-of-00002\.safetensors"):
        open_source(find(tmp_path)[0])
    ours(tmp_path / "m-00002-of-00002.safetensors", {"b": EVERY["b"]})
    same(read(find(tmp_path)[0]), {"a": EVERY["a"], "b": EVERY["b"]})
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"a": "m-00002-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}})
    )
    with pytest.raises(FileError, match="disagree about 1 tensors, 'a' among them"):
        open_source(find(tmp_path)[0])
    index.write_text("[]")
    with pytest.raises(FileError, match="is not an index of shards"):
        open_source(index)


def test_a_folder_of_a_release_is_taken_apart(tmp_path):
    for name in ("model-00001.safetensors", "Wan2.2_VAE.pth", "resnet_rm.pth", "README.md", "dataset/traj0.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in find(tmp_path)] == ["Wan2.2_VAE.pth", "model-00001.safetensors", "resnet_rm.pth"]


# .pth -------------------------------------------------------------------------------------------------------


class Bomb:
    """A pickle that would run a command when it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_pickle_that_runs_something_is_not_loaded(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"weight": torch.zeros(2), "extra": Bomb(tmp_path / "mark")}, tmp_path / "new.pth")
    torch.save(Bomb(tmp_path / "mark"), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    for name in ("new.pth", "old.pth", "bare.pth"):
        with pytest.raises(FileError, match="cannot be read as weights only") as refused:
            open_source(tmp_path / name)
        # torch's own words advise to load such a file all the same; no one who trusts this message should read them.
        assert "weights_only" not in str(refused.value)
    assert not (tmp_path / "mark").exists()
    with pytest.raises(FileError, match=r"it asks for \w+\.mkdir, and Python objects are never loaded"):
        open_source(tmp_path / "new.pth")


def test_a_broken_pth_is_called_so(tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "a.pth").write_bytes(b"no pickle at all")
    with pytest.raises(FileError, match="it is damaged, or not a file that torch wrote"):
        open_source(tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["model-00001.safetensors", "Wan2.2_VAE.pth"])
def test_a_file_that_git_did_not_download_is_called_so(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10050753584\n")
    with pytest.raises(FileError, match="pointer of Git LFS, not the weights"):
        open_source(tmp_path / name)


def test_a_checkpoint_may_name_the_function_that_trained_it(tmp_path, monkeypatch):
    """Released classifiers do; the name is read as a function that does nothing."""
    torch = pytest.importorskip("torch")
    import __main__

    def train():
        raise AssertionError("ran")

    train.__module__, train.__qualname__ = "__main__", "train"
    monkeypatch.setattr(__main__, "train", train, raising=False)
    torch.save({"model_state_dict": {"w": torch.ones(2)}, "by": train}, tmp_path / "a.pth")
    monkeypatch.delattr(__main__, "train")
    source = open_source(tmp_path / "a.pth")
    assert source.container == "model_state_dict" and source.others == ["by"]
    np.testing.assert_array_equal(source.read("w"), [1, 1])


def test_old_files_and_files_without_weights(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.ones(3, dtype=torch.bfloat16)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    same(read(tmp_path / "old.pth"), {"w": np.ones(3, BFLOAT16)})
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(FileError, match="does not hold a dict of tensors"):
        open_source(tmp_path / "none.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(FileError, match="does not hold a dict of tensors"):
        open_source(tmp_path / "list.pth")


# Our own form ------------------------------------------------------------------------------------------------


@pytest.fixture
def imported(tmp_path):
    from wovr_jax.bridge import importer

    theirs = arrays(reward_shapes(head="task"))
    ready = importer.read_import(open_source(write(tmp_path / "in" / "rm.safetensors", theirs)))
    return importer.write_import(ready, tmp_path / "ours", "judge"), ready


def test_imported_weights_load_and_run(imported):
    card, ready = imported
    cfg, params = native.load(card, put=lambda _, leaf: jnp.asarray(leaf, jnp.float32))
    assert cfg == ready.cfg and isinstance(params["stem"]["kernel"], jax.Array)
    logit = formats.network(cfg)(params, jnp.zeros((2, 32, 32, 3)), jnp.array([0, 1]))
    assert logit.shape == (2,)
    # the package's own assets are of the same form
    as_asset, leaves = native.load_asset("judge", card.parent)
    assert as_asset == cfg
    same(native.flatten(leaves), native.flatten(jax.tree.map(np.asarray, params)))


def test_our_own_form_is_checked(imported):
    card, _ = imported
    open_native(card, verify=True)
    weights = card.with_suffix(".safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(FileError, match="has SHA-256 .*, judge.json says"):
        open_native(card, verify=True)
    facts = json.loads(card.read_text())
    card.write_text(json.dumps(facts | {"config_class": "os:system"}))
    with pytest.raises(FileError, match="is not a class of this package"):
        open_native(card)
    card.write_text("{")
    with pytest.raises(FileError, match="is not JSON"):
        open_native(card)
    card.write_text("{}")
    with pytest.raises(FileError, match="does not describe imported weights"):
        open_native(card)


def test_an_interrupted_import_leaves_what_was_there(imported):
    card, ready = imported
    before = {path.name: path.read_bytes() for path in card.parent.iterdir()}

    def dying():
        yield from list(ready.leaves())[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer.write_native(card.parent, "judge", RewardConfig.fake(), ready.facts, dying(), {})
    assert {path.name: path.read_bytes() for path in card.parent.iterdir()} == before
