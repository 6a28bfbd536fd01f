"""launch/import_weights.py: what it prints, what it refuses, and that it refuses in words."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from tests.bridge.layouts import (
    BFLOAT16,
    TINY_VLA,
    arrays,
    dit_shapes,
    openvla_config,
    openvla_folder,
    openvla_shapes,
    read,
    reward_shapes,
    same,
    write,
)
from wovr_jax.bridge import adapters
from wovr_jax.nn import lora
from wovr_jax.policy.train import PolicyAdapters
from wovr_jax.policy.vla import PolicyLoRA
from wovr_jax.weights import native


@pytest.fixture
def door(opened):
    """Runs the door in this process: exit status or message, stdout, stderr."""
    return functools.partial(opened, "import_weights.py")


@pytest.fixture
def release(tmp_path):
    """A folder as RLinf releases one, small."""
    folder = tmp_path / "RLinf-Wan"
    write(folder / "model-00001.safetensors", arrays(dit_shapes(action=7), BFLOAT16))
    write(folder / "resnet_rm.pth", arrays(reward_shapes()))
    write(folder / "other.safetensors", {"lm_head.weight": np.zeros(3, np.float32)})
    return folder


def test_a_release_comes_in_and_goes_out_again(door, release, tmp_path):
    status, out, err = door(release, "--heads", 2, "--out", tmp_path / "ours")
    assert status == 0
    assert "dit (rlinf), 73 tensors into 46 leaves" in out and "reward (rlinf)" in out
    assert "kept beside the weights: 17 counts of batches" in out and "peak memory" in out
    assert "passed over" in err and "other.safetensors: not a known kind of weights" in err
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == [
        "dit.json",
        "dit.safetensors",
        "reward.json",
        "reward.safetensors",
    ]
    for part, file in (("dit", "model-00001.safetensors"), ("reward", "resnet_rm.pth")):
        status, out, _ = door(tmp_path / "ours" / f"{part}.json", "--to", "rlinf", "--out", tmp_path / "back")
        assert status == 0 and out.startswith(str(tmp_path / "back" / file))
        same(read(tmp_path / "back" / file), read(release / file))


def test_looking_writes_nothing(door, release, tmp_path):
    status, out, _ = door(release, "--heads", 2, "--check", "--part", "dit")
    assert status == 0 and "reward" not in out
    assert [p.name for p in tmp_path.iterdir()] == ["RLinf-Wan"]


def test_mistakes_are_answered_in_words(door, release, tmp_path):
    out = tmp_path / "ours"
    for arguments, message in (
        ((release / "nowhere", "--check"), "nowhere: no such file or folder."),
        ((release, "--check"), "width 64 does not make heads of 128; say how many heads the network has."),
        ((release / "other.safetensors", "--check"), "not a known kind of weights"),
        ((release, "--check", "--part", "vae"), "found no weights of vae."),
        ((release, "--heads", 2, "--out", out, "--name", "x"), "--name is for one part"),
        ((release / "resnet_rm.pth", "--to", "rlinf", "--out", out), "expected the .json of imported weights"),
    ):
        status, _, _ = door(*arguments)
        assert message in str(status) and "Traceback" not in str(status)
    assert not out.exists()


def test_a_command_line_that_means_nothing(door, release, tmp_path):
    for arguments, message in (
        ((release,), "give either --out FOLDER to write, or --check"),
        ((release, "--check", "--out", tmp_path), "give either --out FOLDER to write, or --check"),
        ((release, "--out", tmp_path, "--shard-gb", 1), "--shard-gb is a size above 0, for --to"),
        ((release, "--to", "wan", "--out", tmp_path, "--text"), "--to goes with --out"),
    ):
        status, _, err = door(*arguments)
        assert status == 2 and message in err


def test_files_that_are_there_stay(door, release, tmp_path):
    arguments = (release / "resnet_rm.pth", "--out", tmp_path / "ours")
    assert door(*arguments)[0] == 0
    assert "there already. Name another folder with --out, or add --overwrite." in door(*arguments)[0]
    assert door(*arguments, "--overwrite")[0] == 0
    assert "is imported already; give" in door(tmp_path / "ours" / "reward.safetensors", "--check")[0]
    back = (tmp_path / "ours" / "reward.json", "--to", "rlinf", "--out", release)
    assert "resnet_rm.pth: there already" in door(*back)[0]


def test_what_does_not_fit_is_listed_and_nothing_is_written(door, release, tmp_path):
    theirs = arrays(dit_shapes(action=7), BFLOAT16)
    theirs["blocks.0.lora"] = theirs.pop("blocks.1.norm3.bias")
    write(release / "model-00001.safetensors", theirs)
    status, _, _ = door(release, "--heads", 2, "--out", tmp_path / "ours")
    assert "2 problems; nothing was converted." in status
    assert "blocks.1.norm3.bias [64], for blocks/cross_norm/bias[1]" in status and "blocks.0.lora" in status
    assert not (tmp_path / "ours").exists()


def test_a_policy_comes_in_and_goes_out_as_a_folder(door, tmp_path):
    text = {"num_attention_heads": 4, "vocab_size": 392}
    config = openvla_config(**text) | {"pad_token_id": 327}
    theirs = arrays(openvla_shapes(**TINY_VLA), BFLOAT16)
    release = openvla_folder(tmp_path / "release", theirs, config, 2)
    arguments = (release, "--heads", 2, "--out", tmp_path / "ours")
    status, out, _ = door(*arguments, "--recipe", "oft")
    assert status == 0 and "policy (openvla)" in out and "6 other files" in out
    assert '"recipe": "oft"' in (tmp_path / "ours" / "policy.json").read_text()
    assert "there already" in door(*arguments)[0]
    assert door(*arguments, "--overwrite")[0] == 0

    back = (tmp_path / "ours" / "policy.json", "--to", "openvla", "--out", tmp_path / "robot")
    status, out, _ = door(*back, "--shard-gb", 0.00004)
    assert status == 0 and str(tmp_path / "robot" / "tokenizer.model") in out
    same(read(tmp_path / "robot" / "model.safetensors.index.json"), theirs)
    assert "there already" in door(*back, "--shard-gb", 0.00004)[0]
    assert door(*back, "--shard-gb", 0.00004, "--overwrite")[0] == 0
    assert "remove them" in door(*back, "--overwrite")[0]  # one file now, and the shards still there


def test_adapters_are_merged_or_kept_on_request_and_it_is_said(door, tmp_path):
    config = openvla_config(num_attention_heads=4, vocab_size=392) | {"pad_token_id": 327}
    release = openvla_folder(tmp_path / "release", arrays(openvla_shapes(**TINY_VLA)), config)
    arguments = (release, "--heads", 2, "--out")
    (release / "lora_adapter" / "adapter_config.json").unlink()
    assert door(*arguments, tmp_path / "plain")[0] == 0
    cfg, params = native.load(tmp_path / "plain" / "policy.json")
    own = PolicyLoRA(2, 4.0, ("llm/blocks/q", "projector/fc2"))
    ours = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, np.float32), lora.init(jax.random.key(0), params, own))
    adapters.write_peft(release / "lora_adapter", PolicyAdapters(cfg, own), native.flatten(ours))

    status, out, _ = door(*arguments, tmp_path / "untouched")
    assert status == 0 and "lora_adapter/ is copied and not merged; --adapter merge would do that" in out
    same(native.flatten(native.load(tmp_path / "untouched" / "policy.json")[1]), native.flatten(params))

    status, out, _ = door(*arguments, tmp_path / "merged", "--adapter", "merge")
    assert status == 0 and "lora_adapter: 4 adapters of rank 2 and scale 2" in out and "merged in float32" in out
    merged = native.load(tmp_path / "merged" / "policy.json")[1]
    want = params["projector"]["fc2"]["kernel"] + np.float32(2 * 2 * 0.1 * 0.1)
    np.testing.assert_allclose(merged["projector"]["fc2"]["kernel"], want, atol=1e-6)
    assert not (tmp_path / "merged" / "policy.rest" / "files" / "lora_adapter").exists()

    (release / "lora_adapter").rename(tmp_path / "elsewhere")
    status, out, _ = door(
        *arguments, tmp_path / "kept", "--adapter", "keep", "--adapter-folder", tmp_path / "elsewhere"
    )
    assert status == 0 and "kept as lora.json, not merged" in out
    same(native.flatten(native.load(tmp_path / "kept" / "lora.json")[1]), native.flatten(ours))
    back = (tmp_path / "kept" / "lora.json", "--to", "peft", "--out", tmp_path / "peft")
    assert door(*back)[0] == 0 and "there already" in door(*back)[0]
    same(*(read(folder / "adapter_model.safetensors") for folder in (tmp_path / "elsewhere", tmp_path / "peft")))

    assert "adapter_config.json cannot be read" in door(*arguments, tmp_path / "no", "--adapter", "merge")[0]
    status, _, err = door(*arguments, tmp_path / "no", "--adapter-folder", tmp_path)
    assert status == 2 and "--adapter-folder goes with --adapter" in err
    write(tmp_path / "reward" / "resnet_rm.safetensors", arrays(reward_shapes()))
    assert "are a policy's, and there is none" in door(tmp_path / "reward", "--check", "--adapter", "merge")[0]
    assert not (tmp_path / "no").exists()


def test_an_import_ends_with_what_it_believed_and_strict_refuses_what_looks_odd(door, tmp_path):
    config = openvla_config(num_attention_heads=4, vocab_size=392) | {"pad_token_id": 327}
    release = openvla_folder(tmp_path / "release", arrays(openvla_shapes(**TINY_VLA)), config)
    (release / "action_head--150000_checkpoint.pt").write_bytes(b"PK\x03\x04")
    arguments = (release, "--heads", 2, "--out", tmp_path / "ours")
    status, _, _ = door(*arguments, "--strict")
    assert "--strict refuses what looks odd. Nothing was written." in status and "action_head--150000" in status
    assert not (tmp_path / "ours").exists()
    status, out, _ = door(*arguments)
    assert status == 0 and "recipe rlinf: no stop token" in out
    assert "warning: action_head--150000_checkpoint.pt is copied and not used" in out
    assert out.index("recipe rlinf") < out.index("warning: ") < out.index("policy.json") < out.index("peak memory")


def test_heads_where_nothing_has_heads_are_refused(door, release):
    assert "--heads is a transformer's or a policy's" in door(release / "resnet_rm.pth", "--heads", 2, "--check")[0]


def test_what_a_trainer_left_is_read_and_what_is_missing_is_said(door, tmp_path):
    torch = pytest.importorskip("torch")
    theirs = arrays(openvla_shapes(**TINY_VLA))
    config = openvla_config(num_attention_heads=4, vocab_size=392) | {"pad_token_id": 327}
    release = openvla_folder(tmp_path / "release", theirs, config)
    (release / "model.safetensors").unlink()
    left = tmp_path / "checkpoints" / "actor" / "full_weights.pt"
    left.parent.mkdir(parents=True)
    torch.save({f"module.{name}": torch.tensor(array) for name, array in theirs.items()}, left)
    arguments = ("--heads", 2, "--out", tmp_path / "ours")
    # The trainer writes weights alone: what is beside the release's has to be put there.
    assert "config.json of the OpenVLA folder is missing beside it" in door(left, *arguments)[0]
    left.rename(release / left.name)
    assert door(release, *arguments)[0] == 0
    assert door(tmp_path / "ours" / "policy.json", "--to", "openvla", "--out", tmp_path / "back")[0] == 0
    same(read(tmp_path / "back" / "model.safetensors"), theirs)
