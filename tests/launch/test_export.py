"""The door to the robot: both kinds of export, and every mistake at it answered in a line or two."""

from __future__ import annotations

import functools
import pathlib
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from websockets.sync.client import connect

from tests.bridge.layouts import (
    BFLOAT16,
    TINY_VLA,
    arrays,
    openvla_config,
    openvla_folder,
    openvla_shapes,
    read,
    same,
)
from tests.export.robots import TASKS, fake_run
from wovr_jax.bridge import exporter, importer
from wovr_jax.bridge.sources import find, open_source
from wovr_jax.export import source, torch_folder, wire
from wovr_jax.export.robot import BundleError, Robot
from wovr_jax.weights import native
from wovr_jax.weights.safetensors import Fact

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "launch"


@pytest.fixture
def door(opened):
    """Runs the door in this process: exit status or message, stdout, stderr."""
    return functools.partial(opened, "export.py")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fake_run(tmp_path_factory.mktemp("runs") / "mine")


@pytest.fixture
def release(tmp_path):
    config = openvla_config(num_attention_heads=4, vocab_size=392, pad_token_id=327) | {"pad_token_id": 327}
    return openvla_folder(tmp_path / "release", arrays(openvla_shapes(**TINY_VLA), BFLOAT16), config, 2)


@pytest.fixture
def card(release, tmp_path):
    (file,) = find(release)
    return importer.write_import(importer.read_import(open_source(file), heads=2), tmp_path / "ours")


def others(folder):
    """Bytes of every file that is no weights."""
    files = (path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if "safetensors" not in path.name}


# To JAX ---------------------------------------------------------------------------------------------------------


def test_a_run_becomes_a_bundle_that_is_served(door, run, tmp_path):
    arguments = ("--run", run, "--round", 0, "--to", "jax", "--out", tmp_path / "robot", "--frames", 5)
    status, out, _ = door(*arguments)
    assert status == 0 and "mine, sft" in out and "policy.stablehlo" in out
    assert "5 recorded frames, greedy: every action equal" in out and "peak memory" in out
    assert "holds a bundle already" in door(*arguments)[0]
    (tmp_path / "key").write_text("opensesame\n")
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    command = [sys.executable, LAUNCH / "serve.py", tmp_path / "robot", "--port", "0"]
    with subprocess.Popen(
        [*command, "--api-key-file", tmp_path / "key"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            url = re.fullmatch(r"serving mine, sft at (ws://127\.0\.0\.1:\d+)\n", process.stdout.readline())[1]
            with connect(url, additional_headers={"Authorization": "Api-Key opensesame"}) as connection:
                connection.recv(timeout=60)
                connection.send(wire.pack({"image": image, "instruction": TASKS[0]}))
                got = wire.unpack(connection.recv(timeout=60))["actions"]
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    robot = Robot.load(tmp_path / "robot")
    np.testing.assert_array_equal(got, robot.act(image[None], TASKS[:1]).action_BTA[0])
    assert robot.about["contract"]["frames"] == 5
    assert process.returncode == 0 and errors == "stopped\n"


def test_nothing_to_serve(tmp_path):
    command = [sys.executable, LAUNCH / "serve.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "is not a run folder" in done.stderr and "Traceback" not in done.stderr


# To torch --------------------------------------------------------------------------------------------------------


def test_an_import_becomes_the_folder_it_was(door, release, card, tmp_path):
    arguments = ("--policy", card, "--to", "torch", "--out", tmp_path / "robot", "--shard-gb", 0.00004)
    status, out, _ = door(*arguments)
    assert status == 0 and str(tmp_path / "robot" / "tokenizer.model") in out
    (index,) = find(tmp_path / "robot")
    (before,) = find(release)
    same(read(index), read(before))
    assert others(tmp_path / "robot") == others(release)
    assert "holds an exported policy already" in door(*arguments)[0]
    assert door(*arguments[:-2], "--overwrite")[0] == 0  # one file now; the shards are gone with the old folder
    assert [path.name for path in (tmp_path / "robot").glob("model*.safetensors*")] == ["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "release", "robot"]


def test_a_policy_trained_further_takes_the_files_of_its_import(release, card, tmp_path):
    cfg, params = native.load(card, put=lambda _, leaf: leaf.astype(np.float32))
    moved = {name: leaf + np.float32(0.25) for name, leaf in source.flatten_dotted(params).items()}
    facts = {name: Fact(leaf.shape, leaf.dtype) for name, leaf in moved.items()}
    around = {"statistics": {}, "key": "", "tokens": len, "prompt": {}, "frame": (8, 8, 3), "image": None}
    trained = source.Policy(
        name="trained",
        cfg=cfg,
        facts=facts,
        leaves=lambda: iter(moved.items()),
        **around,
        temperature=1.0,
        recorded=tmp_path,
    )
    torch_folder.write(card, tmp_path / "robot", trained=trained)
    (before,), (after,) = find(release), find(tmp_path / "robot")
    old, new = read(before), read(after)
    assert old.keys() == new.keys() and others(tmp_path / "robot") == others(release)
    name, unused = "language_model.lm_head.weight", "vision_backbone.featurizer.norm.weight"
    want = (old[name].astype(np.float32) + np.float32(0.25)).astype(BFLOAT16)
    np.testing.assert_array_equal(new[name].view(np.uint16), want.view(np.uint16))
    same({unused: new[unused]}, {unused: old[unused]})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "release", "robot"]


def test_a_folder_that_is_not_what_was_to_be_written_is_not_put_in_place(card, tmp_path, monkeypatch):
    write = exporter.write_export

    def wrong(path, to, folder, **more):
        written = write(path, to, folder, **more)
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "model.safetensors").write_bytes(data)
        return written

    monkeypatch.setattr(exporter, "write_export", wrong)
    with pytest.raises(BundleError, match="is not what was to be written"):
        torch_folder.write(card, tmp_path / "robot")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "release"]


# Mistakes -------------------------------------------------------------------------------------------------------


def test_mistakes_are_answered_in_words(door, run, release, card, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("")
    jax, torch = ("--to", "jax", "--out"), ("--to", "torch", "--out")
    for arguments, message in (
        (("--run", tmp_path, *jax, tmp_path / "x"), "is not a run folder"),
        (("--run", run, "--round", 9, *jax, tmp_path / "x"), "expected a policy of round 9, found round 0 (sft)"),
        (("--run", run, *jax, taken, "--overwrite"), "is not a robot bundle; it is not replaced"),
        (("--policy", card, *torch, taken, "--overwrite"), "holds thesis.tex, which no export wrote"),
        (("--run", run, "--policy", card, *torch, tmp_path / "x"), "is not the network of"),
        (("--policy", release / "config.json", *torch, tmp_path / "x"), "expected the .json of imported weights"),
        (("--run", run, "--episodes", tmp_path, *jax, tmp_path / "x"), "is not an episode folder"),
    ):
        status, _, _ = door(*arguments)
        assert message in str(status) and "Traceback" not in str(status)
        assert not (tmp_path / "x").exists() and [path.name for path in taken.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--to"),
        (("--to", "jax", "--out", "x"), "say what to export"),
        (("--to", "torch", "--out", "x", "--run", "y"), "--to torch needs --policy"),
        (("--to", "jax", "--out", "x", "--run", "y", "--policy", "z"), "--run or --policy, not both"),
        (("--to", "jax", "--out", "x", "--policy", "z"), "name episodes of its robot with --episodes"),
        (("--to", "torch", "--out", "x", "--policy", "z", "--round", 1), "--round is of a --run"),
        (("--to", "jax", "--out", "x", "--run", "y", "--key", "z"), "a run has its own"),
        (("--to", "jax", "--out", "x", "--run", "y", "--shard-gb", 1), "for --to torch"),
        (("--to", "jax", "--out", "x", "--run", "y", "--frames", 0), "--frames"),
    ],
)
def test_a_command_line_that_means_nothing(door, arguments, message):
    status, _, err = door(*arguments)
    assert status == 2 and message in err
