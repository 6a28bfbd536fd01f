"""A bundle acts as its policy does, without the network's code; what does not is never written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import export as jax_export

from tests.export.old_bundle import MANIFEST, RECIPE, STATISTICS
from tests.export.robots import CFG, TASKS, episode, fake_run, params
from wovr_jax.data import normalize
from wovr_jax.export import bundle, contract, program, source
from wovr_jax.export.contract import ContractError
from wovr_jax.export.robot import FILES, BundleError, Robot
from wovr_jax.export.source import SourceError
from wovr_jax.policy import processing, vla
from wovr_jax.policy.actions import Codec
from wovr_jax.policy.tokenizer import Tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fake_run(tmp_path_factory.mktemp("runs") / "mine")


@pytest.fixture(scope="module")
def policy(run):
    return source.from_run(run)


@pytest.fixture(scope="module", autouse=True)
def remembered(policy):
    """What the policy itself does is computed once for all tests; the bundles are what differs between them."""
    answers, act = {}, contract._by_policy

    def once(whose, frames, temperature, batch):
        key = whose.name, frames.where_K, temperature, batch
        if key not in answers:
            answers[key] = act(whose, frames, temperature, batch)
        return answers[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contract, "_by_policy", once)
        yield


@pytest.fixture(scope="module")
def made(policy, tmp_path_factory):
    """The bundle's folder and its manifest."""
    folder = tmp_path_factory.mktemp("robots") / "robot"
    return folder, bundle.write(policy, folder, frames=8)


@pytest.fixture(scope="module")
def robot(made):
    return Robot.load(made[0])


@pytest.fixture(scope="module")
def frames(policy):
    return contract.choose_frames(policy.recorded, 6, CFG.chunk)


def by_hand(frames, temperature):
    """The policy of the run's last round as training runs it."""
    table = normalize.statistics([episode(i) for i in range(6)], "tabletop")
    codec = Codec.from_statistics(table["tabletop"]["action"])
    act = jax.jit(lambda *given: vla.policy(CFG, params(1), codec, temperature)(*given))
    pixels = frames.frame_KHWC.astype(np.float32) / 127.5 - 1.0
    keys = jax.vmap(jax.random.key)(np.arange(len(pixels), dtype=np.uint32))
    return jax.device_get(act(pixels, Tokenizer.tabletop().prompts(frames.instruction_K), keys))


def test_a_policy_has_one_hash_in_its_bundle_and_in_its_run(robot, policy, run):
    assert robot.hash_weights() == program.make_robot(policy).hash_weights()
    assert robot.hash_weights() != program.make_robot(source.from_run(run, 0)).hash_weights()


# What it does ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.6])
def test_it_acts_as_the_last_policy_of_the_run(robot, frames, temperature):
    token, logp, action = by_hand(frames, temperature)
    got = robot.act(frames.frame_KHWC, frames.instruction_K, temperature=temperature)
    np.testing.assert_array_equal(got.token_BTA, token)
    np.testing.assert_allclose(got.action_BTA, action, atol=1e-6)
    np.testing.assert_allclose(got.logp_BTA, logp, atol=1e-4)
    assert (token != token[0]).mean() > 0.3  # the frames matter
    assert set(np.unique(got.action_BTA[..., 6])) <= {-1.0, 1.0}


def test_a_row_does_not_depend_on_its_batch(robot, frames):
    whole = robot.act(frames.frame_KHWC, frames.instruction_K, seeds=range(6), temperature=1.0)
    for k in (0, 4):
        alone = robot.act(frames.frame_KHWC[k : k + 1], frames.instruction_K[k : k + 1], seeds=[k], temperature=1.0)
        np.testing.assert_array_equal(alone.token_BTA[0], whole.token_BTA[k])
    other = robot.act(frames.frame_KHWC, frames.instruction_K, seeds=range(6, 12), temperature=1.0)
    assert (other.token_BTA != whole.token_BTA).mean() > 0.5


@pytest.mark.parametrize("seeds", [[-1], [2**32], [0.5], np.array([-1]), [True], [0, 1]])
def test_a_seed_that_would_be_another_one_is_refused(robot, frames, seeds):
    with pytest.raises(BundleError, match=r"seeds: expected (whole numbers from 0 to 2\*\*32 - 1|1, one a frame), got"):
        robot.act(frames.frame_KHWC[:1], frames.instruction_K[:1], seeds=seeds, temperature=1.0)


def test_the_manifest_has_every_file_and_what_was_compared(made):
    folder, manifest = made
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, "manifest.json"])
    assert json.loads((folder / "manifest.json").read_text()) == manifest
    for name in FILES:
        data = (folder / name).read_bytes()
        assert manifest["files"][name] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["policy"] == "mine, grpo-1" and manifest["platforms"] == ["cpu", "cuda", "tpu"]
    assert manifest["contract"]["frames"] == 8 and manifest["contract"]["recorded"] == "collect-0"
    assert set(manifest["contract"]["differences"]) == {"greedy", "sampled at temperature 1.6"}
    assert {"jax", "jaxlib", "wovr_jax"} <= manifest["versions"].keys() | {"wovr_jax"}


def test_the_program_is_for_every_device_and_tells_no_secrets(made):
    data = (made[0] / "policy.stablehlo").read_bytes()
    exported = jax_export.deserialize(bytearray(data))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    text = exported.mlir_module()
    assert "cudnn" not in text and "flash" not in text
    assert str(ROOT).encode() not in data and re.search(rb"/(home|root|work|usr)/", data) is None
    assert len(data) < 300_000  # weights are no part of it


def test_the_released_size_is_lowered_without_weights_or_devices():
    """With OFT's whole processing, JPEG included."""
    cfg, image = vla.VLAConfig.openvla_7b("oft"), processing.of_recipe("oft")
    leaves = source.flatten_dotted(vla.network(cfg).shapes())
    data = program.serialise(program.make(cfg, image, 6), leaves, frame=(256, 256, 3), length=32, dim=7)
    exported = jax_export.deserialize(bytearray(data))
    assert exported.platforms == ("cpu", "cuda", "tpu") and len(data) < 300_000
    assert sum(math.prod(leaf.shape) for leaf in exported.in_avals[: len(leaves)]) == 7_498_156_704
    assert {str(leaf) for leaf in exported.out_avals} == {"float32[batch,8,7]", "int32[batch,8,7]"}


ALONE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"flax", "optax", "orbax", "grain", "chex", "array_record", "torch", "transformers"}:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import numpy as np
from wovr_jax.export.robot import Robot
given = np.load(sys.argv[2])
answer = Robot.load(sys.argv[1]).act(given["frame"], list(given["text"]), temperature=1.6)
np.save(sys.argv[3], answer.action_BTA)
print(sorted(name for name in sys.modules if name.startswith("wovr_jax.")))
"""


def test_it_needs_nothing_of_the_network_code(made, robot, frames, tmp_path):
    np.savez(tmp_path / "given.npz", frame=frames.frame_KHWC, text=np.array(frames.instruction_K))
    command = [sys.executable, "-c", ALONE, made[0], tmp_path / "given.npz", tmp_path / "out.npy"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    loaded = {"wovr_jax.export", "wovr_jax.export.robot", "wovr_jax.policy", "wovr_jax.policy.tokenizer"}
    assert set(re.findall(r"wovr_jax[\w.]*", done.stdout)) == loaded
    want = robot.act(frames.frame_KHWC, frames.instruction_K, temperature=1.6)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), want.action_BTA)


def test_a_live_policy_is_the_same_without_a_bundle(policy, robot, frames):
    want = robot.act(frames.frame_KHWC, frames.instruction_K)
    got = program.make_robot(policy).act(frames.frame_KHWC, frames.instruction_K)
    np.testing.assert_array_equal(got.action_BTA, want.action_BTA)


def test_what_does_not_fit_is_said(robot, frames):
    for frame, texts, message in (
        (frames.frame_KHWC[:1, :8], TASKS[:1], r"expected uint8 \[1, 16, 16, 3\].*got uint8 \[1, 8, 16, 3\]"),
        (frames.frame_KHWC[:1] / 255, TASKS[:1], "got float64"),
        (frames.frame_KHWC[:2], TASKS[:1], "for 1 instructions"),
        (frames.frame_KHWC[:1], ["juggle the plates"], r"unknown \['juggle', 'plates'\]"),
    ):
        with pytest.raises(BundleError, match=message):
            robot.act(frame, texts)


# Bundles of before ------------------------------------------------------------------------------------------------


def test_a_bundle_that_was_written_before_still_opens(made, robot, frames, tmp_path):
    """Its files as text, written out here, so that no renamed key or file goes unnoticed."""
    folder, row = tmp_path / "robot", robot.prompt("open the top drawer").tolist()
    folder.mkdir()
    for name in ("policy.stablehlo", "weights.safetensors"):
        shutil.copy(made[0] / name, folder)
    (folder / "dataset_statistics.json").write_text(STATISTICS)
    (folder / "recipe.json").write_text(RECIPE % row)
    names = ("policy.stablehlo", "weights.safetensors", "dataset_statistics.json", "recipe.json")
    contents = [(folder / name).read_bytes() for name in names]
    sums = [fact for data in contents for fact in (len(data), hashlib.sha256(data).hexdigest())]
    (folder / "manifest.json").write_text(MANIFEST % tuple(sums))
    opened = Robot.load(folder)
    assert opened.frame_shape == (16, 16, 3) and opened.chunk_shape == (8, 7)
    assert opened.about["policy"] == "mine, grpo-1"
    got = opened.act(frames.frame_KHWC, ["Open the  top drawer"] * 6, temperature=1.6)
    want = robot.act(frames.frame_KHWC, ["open the top drawer"] * 6, temperature=1.6)
    np.testing.assert_array_equal(got.token_BTA, want.token_BTA)
    assert np.abs(got.action_BTA[..., 0]).max() <= 0.9 + 1e-6  # by its own statistics


# What is refused --------------------------------------------------------------------------------------------------


def perturbed(monkeypatch, leaf, change):
    """Exports write another value into one leaf."""
    write = bundle.writer.write

    def wrong(path, facts, leaves):
        write(path, facts, ((name, change(value.copy()) if name == leaf else value) for name, value in leaves))

    monkeypatch.setattr(bundle.writer, "write", wrong)


def one_number(value):
    value[1, 3, 5] += 3.0
    return value


def unseen_word(value):
    value[60] += 1e-3
    return value


def test_a_perturbed_weight_is_caught(policy, tmp_path, monkeypatch):
    perturbed(monkeypatch, "llm.blocks.v.kernel", one_number)
    with pytest.raises(ContractError, match=r"by up to [\d.]+\. They part first at frame \d+ \(episode \d+, step"):
        bundle.write(policy, tmp_path / "robot", frames=8)
    assert not list(tmp_path.iterdir())


def test_a_weight_that_no_recorded_frame_exercises_is_caught(policy, tmp_path, monkeypatch):
    perturbed(monkeypatch, "llm.embed.embedding", unseen_word)
    with pytest.raises(ContractError, match="llm.embed.embedding differs from the policy's in 16 of"):
        bundle.write(policy, tmp_path / "robot", frames=8)
    assert not list(tmp_path.iterdir())


def test_a_swapped_statistic_is_caught(policy, tmp_path, monkeypatch):
    write = bundle.write_json

    def wrong(path, value):
        if path.name == "dataset_statistics.json":
            value = json.loads(json.dumps(value))
            low = value["tabletop"]["action"]["q01"]
            low[0], low[4] = low[4], low[0]
        write(path, value)

    monkeypatch.setattr(bundle, "write_json", wrong)
    with pytest.raises(ContractError, match=r"greedy: the bundle's actions are not the policy's.*dimension [04]"):
        bundle.write(policy, tmp_path / "robot", frames=8)
    assert not list(tmp_path.iterdir())


def stop_token(cfg, image):
    return dataclasses.replace(cfg, recipe="oft"), image


def cropped(cfg, image):
    return cfg, dataclasses.replace(image, crop=0.9)


@pytest.mark.parametrize("wrong", [stop_token, cropped])
def test_a_program_of_another_recipe_is_caught(policy, tmp_path, monkeypatch, wrong):
    make = program.make
    monkeypatch.setattr(program, "make", lambda cfg, image, gripper: make(*wrong(cfg, image), gripper))
    with pytest.raises(ContractError, match="the bundle's actions are not the policy's"):
        bundle.write(policy, tmp_path / "robot", frames=8)
    assert not list(tmp_path.iterdir())


def test_a_recipe_file_that_says_something_else_is_caught(policy, tmp_path, monkeypatch):
    write = bundle.write_json

    def wrong(path, value):
        write(path, value | {"sequence": "oft"} if path.name == "recipe.json" else value)

    monkeypatch.setattr(bundle, "write_json", wrong)
    with pytest.raises(ContractError, match=r"recipe.json does not say what the policy says"):
        bundle.write(policy, tmp_path / "robot", frames=8)
    assert not list(tmp_path.iterdir())


def test_a_bundle_that_is_there_outlives_a_refused_one(policy, made, tmp_path, monkeypatch):
    shutil.copytree(made[0], tmp_path / "robot")
    with pytest.raises(BundleError, match="holds a bundle already"):
        bundle.write(policy, tmp_path / "robot")
    perturbed(monkeypatch, "llm.blocks.v.kernel", one_number)
    with pytest.raises(ContractError):
        bundle.write(policy, tmp_path / "robot", frames=8, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["robot"]
    Robot.load(tmp_path / "robot")
    monkeypatch.undo()
    bundle.write(policy, tmp_path / "robot", frames=4, overwrite=True)
    assert Robot.load(tmp_path / "robot").about["contract"]["frames"] == 4


def test_a_folder_of_something_else_is_not_replaced(policy, tmp_path):
    (tmp_path / "robot").mkdir()
    (tmp_path / "robot" / "thesis.tex").write_text("")
    with pytest.raises(BundleError, match="is not a robot bundle; it is not replaced"):
        bundle.write(policy, tmp_path / "robot", overwrite=True)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_or_missing_file_is_named(made, tmp_path, name):
    folder = shutil.copytree(made[0], tmp_path / "robot")
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} is not the file that was exported"):
        Robot.load(folder)
    (folder / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        Robot.load(folder)


def test_what_is_no_bundle(made, tmp_path):
    with pytest.raises(BundleError, match="not a robot bundle"):
        Robot.load(tmp_path)
    folder = shutil.copytree(made[0], tmp_path / "robot")
    for manifest, message in (("{", "does not describe"), ('{"files": {}, "schema": 9, "format": "x"}', "with 9")):
        (folder / "manifest.json").write_text(manifest)
        with pytest.raises(BundleError, match=message):
            Robot.load(folder)


def test_what_is_no_run(run, tmp_path):
    with pytest.raises(SourceError, match="not a run folder"):
        source.from_run(tmp_path)
    with pytest.raises(SourceError, match=r"expected a policy of round 7, found round 0 \(sft\), round 1 \(grpo-1\)"):
        source.from_run(run, 7)
    assert source.from_run(run, 0).name == "mine, sft"


def test_a_run_on_libero_speaks_liberos_words(run, tmp_path):
    folder, words = shutil.copytree(run, tmp_path / "mine"), Tokenizer.libero()
    settings = json.loads((folder / "config.json").read_text()) | {"libero": {"suite": "libero_goal"}}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(SourceError, match=f"the embedded tokenizer {words.vocab_size}"):
        source.from_run(folder)  # its policy has the table's
    llm = settings["policy"]["llm"] | {"rows": words.vocab_size + 64}
    settings["policy"] |= {"llm": llm, "vocab_size": words.vocab_size, "pad": words.pad}
    (folder / "config.json").write_text(json.dumps(settings))
    found = source.from_run(folder)
    assert found.key == "libero_goal" and list(found.statistics) == ["libero_goal"]
    assert np.array_equal(
        found.tokens("put the wine bottle on the rack"), words.prompt("put the wine bottle on the rack")
    )


def test_the_run_folder_is_only_read(run, policy):
    def state():
        return {path: path.stat().st_mtime_ns for path in run.rglob("*")}

    before = state()
    contract.choose_frames(policy.recorded, 3, CFG.chunk)
    dict(source.from_run(run).leaves())
    assert state() == before
