"""Several pictures and the robot's state: the same policy here as in torch, its projector's file both ways."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.bridge.layouts import openvla_folder, read, same
from tests.bridge.openvla_reference import CONFIG, HEADS, MIXED_UP, PAD, Reference, weights
from wovr_jax.bridge import exporter, formats, importer, torch_io
from wovr_jax.bridge.sources import FileError, find, open_source
from wovr_jax.bridge.state_projector import NAMES
from wovr_jax.policy.vla import VLAConfig, network
from wovr_jax.weights import native
from wovr_jax.weights.plan import KeymapError

torch = pytest.importorskip("torch")
CLOSE = 1e-5
FILE = "proprio_projector--150000_checkpoint.pt"
ALL = weights(state=8)
RNG = np.random.default_rng(1)
FRAME = RNG.uniform(-1, 1, (3, 2, 16, 16, 3)).astype(np.float32)
STATE = RNG.uniform(-1, 1, (3, 8)).astype(np.float32)
IDS = ([1, 17, 5, 80, 33, 9], [1, 40, 41, 9], [1, 17, 6, 80, 200, 110, 33, 12, 9])
PROMPT = jnp.array([[ids[0], *[PAD] * (9 - len(ids)), *ids[1:]] for ids in IDS])


def far(got, want):
    return np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()


def release(folder, prefix="module."):
    """A release whose policy takes the state: the projector lies in a file of torch's."""
    main = {name: array for name, array in ALL.items() if not name.startswith(NAMES)}
    there = openvla_folder(folder, main, CONFIG, 2)
    own = {prefix + name.removeprefix(NAMES): array for name, array in ALL.items() if name.startswith(NAMES)}
    torch_io.save(there / FILE, own.items())
    return there


def opened(folder, **how):
    (file,) = find(folder)
    return importer.read_import(open_source(file), heads=HEADS, **how)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    there = tmp_path_factory.mktemp("two")
    ready = opened(release(there / "release"), images=2, state=True)
    assert f"with {FILE}, the projector of the robot's state" in ready.report()
    card = importer.write_import(ready, there / "ours")
    return *native.load(card, put=lambda _, leaf: jax.device_put(leaf)), card


@functools.cache
def run(cfg):
    return jax.jit(lambda params, frame, prompt, state: network(cfg)(params, frame, prompt, state))


def wanted(reference, b, recipe="rlinf"):
    return reference.slots(FRAME[b], IDS[b], recipe, STATE[b])


@pytest.fixture(scope="module")
def right(imported):
    """Our logits of all rows in one padded batch."""
    cfg, params, _ = imported
    assert (cfg.images, cfg.proprio) == (2, 8)
    with jax.default_matmul_precision("highest"):
        return np.asarray(run(cfg)(params, FRAME, PROMPT, STATE)).reshape(3, 56, 256)


def test_all_slots_of_a_padded_batch(right):
    reference = Reference(ALL)
    for b in range(3):
        assert far(right[b], wanted(reference, b)) <= CLOSE


def test_the_projector_alone(imported):
    """One token of many moves the logits too little to tell the two forms of GELU apart."""
    cfg, params, _ = imported
    with jax.default_matmul_precision("highest"):
        got = np.asarray(network(cfg).module(params).proprio(jnp.asarray(STATE)))
    want, wrong = (
        np.concatenate([Reference(ALL, mistake).tell(state)[0] for state in STATE])
        for mistake in (None, "tanh GELU for the state")
    )
    assert far(got, want) <= CLOSE and far(got, wrong) > 10 * CLOSE


@pytest.mark.parametrize("mistake", MIXED_UP)
def test_no_wrong_answer_is_near(right, mistake):
    assert far(right[0], wanted(Reference(ALL, mistake), 0)) > 10 * CLOSE


def test_pictures_without_the_state(imported, tmp_path):
    """Two pictures alone, as the discrete recipe of two cameras has them; the projector's file is copied, not used."""
    there = release(tmp_path / "release")
    ready = opened(there, images=2, recipe="oft")
    assert (ready.cfg.images, ready.cfg.proprio) == (2, 0)
    params = {part: leaves for part, leaves in imported[1].items() if part != "proprio"}
    with jax.default_matmul_precision("highest"):
        got = np.asarray(run(ready.cfg)(params, FRAME[:1], PROMPT[:1], None)).reshape(56, 256)
    assert far(got, Reference(ALL).slots(FRAME[0], IDS[0], "oft")) <= CLOSE
    card = importer.write_import(ready, tmp_path / "ours")
    exporter.write_export(card, "openvla", tmp_path / "out")
    assert (tmp_path / "out" / FILE).read_bytes() == (there / FILE).read_bytes()


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_the_projector_goes_out_as_it_came(prefix, tmp_path):
    there = release(tmp_path / "release", prefix)
    card = importer.write_import(opened(there, state=True), tmp_path / "ours")
    written = exporter.write_export(card, "openvla", tmp_path / "out", shard_bytes=100_000)
    assert tmp_path / "out" / FILE in written
    (weights_file,) = find(tmp_path / "out")
    same(read(weights_file), {name: array for name, array in ALL.items() if not name.startswith(NAMES)})
    before, after = (torch_io.load(folder / FILE).tensors for folder in (there, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (there / "tokenizer.model").read_bytes()


def test_projectors_that_are_not_there_or_do_not_fit(tmp_path):
    there = release(tmp_path)
    (there / "proprio_projector--50000_checkpoint.pt").write_bytes(b"")
    with pytest.raises(FileError, match=r"expected one proprio_projector--\*\.pt.*there is: .*150000.*50000"):
        opened(there, state=True)
    (there / "proprio_projector--50000_checkpoint.pt").unlink()
    (there / FILE).unlink()
    with pytest.raises(FileError, match="there is: none"):
        opened(there, state=True)
    own = {name.removeprefix(NAMES): array for name, array in ALL.items() if name.startswith(NAMES)}
    own["fc2.weight"], own["fc3.weight"] = own["fc2.weight"][:, :-1], own.pop("fc2.bias")
    torch_io.save(there / FILE, own.items())
    with pytest.raises(KeymapError) as caught:
        opened(there, state=True)
    assert {kind: len(cases) for kind, cases in caught.value.problems.items()} == {
        "missing in the file": 1,
        "not in the table": 1,
        "shape": 1,
    }


def test_inputs_that_are_not_the_configs(imported):
    cfg, _, _ = imported
    shapes = network(cfg).shapes()

    def call(*inputs):
        return jax.eval_shape(lambda p: network(cfg)(p, *inputs), shapes)

    with pytest.raises(ValueError, match=r"expected frames \(B, 2, H, W, 3\), or .*, got shape \(3, 16, 16, 3\)"):
        call(FRAME[:, 0], PROMPT, STATE)
    with pytest.raises(ValueError, match="expected 8 numbers of the robot's state, got None"):
        call(FRAME, PROMPT)
    with pytest.raises(ValueError, match="expected 8 numbers of the robot's state, got 7"):
        call(FRAME, PROMPT, STATE[:, 1:])
    plain = VLAConfig.fake()
    with pytest.raises(ValueError, match="expected None numbers of the robot's state, got 8"):
        jax.eval_shape(lambda p: network(plain)(p, FRAME[:, 0], PROMPT, STATE), network(plain).shapes())
    with pytest.raises(ValueError, match="images: expected at least 1"):
        VLAConfig(cfg.dino, cfg.siglip, cfg.llm, cfg.vocab_size, pad=cfg.pad, images=0)
    assert formats.part_of(cfg) == "policy"
