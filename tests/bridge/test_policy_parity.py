"""An OpenVLA-OFT folder makes the same policy here as in torch, and none of the policies that are nearly it."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.bridge.layouts import openvla_folder
from tests.bridge.openvla_reference import CONFIG, HEADS, MISTAKES, PAD, VOCAB, Reference, weights
from wovr_jax.bridge import exporter, formats, importer
from wovr_jax.bridge.sources import find, open_source
from wovr_jax.policy import actions
from wovr_jax.policy.actions import Codec
from wovr_jax.weights import native

CLOSE = 1e-5
"""Largest error of a right answer, relative to the largest number; a wrong one is ten times as far at least."""

FRAME = np.random.default_rng(1).uniform(-1, 1, (3, 16, 16, 3)).astype(np.float32)
IDS = ([1, 17, 5, 80, 33, 9], [1, 40, 41, 9], [1, 17, 6, 80, 200, 110, 33, 12, 9])


def far(got, want):
    """Largest error relative to the largest number."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.abs(got - want).max() / np.abs(want).max()


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Config and parameters of a folder that went through our form on disk, and its card."""
    folder = tmp_path_factory.mktemp("vla")
    (file,) = find(openvla_folder(folder / "release", weights(), CONFIG, 3))
    card = importer.write_import(importer.read_import(open_source(file), heads=HEADS), folder / "ours")
    return *native.load(card, put=lambda _, leaf: jax.device_put(leaf)), card


@functools.cache
def run(cfg):
    net = formats.network(cfg)
    return jax.jit(lambda params, frame, prompt: net(params, frame, prompt))


def padded(side):
    width = max(map(len, IDS))
    fill = [[PAD] * (width - len(ids)) for ids in IDS]
    rows = [[*ids, *pads] if side == "right" else [ids[0], *pads, *ids[1:]] for ids, pads in zip(IDS, fill)]
    return jnp.array(rows)


def slots(imported, recipe="rlinf", side="left"):
    """Our logits of all three rows in one padded batch, (3, 56, 256)."""
    cfg, params, _ = imported
    with jax.default_matmul_precision("highest"):
        logits = run(dataclasses.replace(cfg, recipe=recipe))(params, FRAME, padded(side))
    return np.asarray(logits).reshape(3, 56, 256)


def wanted(reference, recipe="rlinf"):
    return np.stack([reference.slots(FRAME[b : b + 1], ids, recipe) for b, ids in enumerate(IDS)])


@pytest.fixture(scope="module")
def reference():
    return Reference(weights())


@pytest.fixture(scope="module")
def right(imported):
    return slots(imported)


def test_towers(imported, reference):
    cfg, params, _ = imported
    with jax.default_matmul_precision("highest"):
        got = np.asarray(formats.network(cfg)(params, FRAME, method="features"))
    assert far(got[..., :32], reference.tower("dino", FRAME)) <= CLOSE
    assert far(got[..., 32:], reference.tower("siglip", FRAME)) <= CLOSE


def test_projector(imported, reference):
    cfg, params, _ = imported
    feature = np.random.default_rng(2).standard_normal((2, 16, 56)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        got = formats.network(cfg).module(params).projector(jnp.asarray(feature))
    assert far(got, reference.project(reference.torch.tensor(feature))) <= CLOSE


def test_language_model(imported, reference):
    cfg, params, _ = imported
    x = 0.05 * np.random.default_rng(3).standard_normal((2, 11, 40)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        llm = formats.network(cfg).module(params).llm
        got = llm.logits(llm(jnp.asarray(x), jnp.ones((2, 11), bool)), 0, 392)
    with reference.torch.no_grad():
        want = reference.llm(inputs_embeds=reference.torch.tensor(x)).logits.numpy()
    assert far(got, want) <= CLOSE


@pytest.mark.parametrize("recipe", ["rlinf", "oft"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_all_slots_of_a_padded_batch(imported, reference, recipe, side):
    """The reference runs row by row without any pad."""
    want = wanted(reference, recipe)
    assert far(slots(imported, recipe, side), want) <= CLOSE
    assert np.ptp(want, axis=1).max() > 0.1  # the slots differ


@pytest.mark.parametrize("mistake", MISTAKES)
def test_no_wrong_answer_is_near(right, mistake):
    wrong = Reference(weights(), mistake).slots(FRAME[:1], IDS[0])
    assert far(right[0], wrong) > 10 * CLOSE


def test_the_exported_folder_gives_the_same_actions_in_torch(imported, right, tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    _, _, card = imported
    exporter.write_export(card, "openvla", tmp_path, shard_bytes=100_000)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2
    theirs = {name: array for file in files for name, array in library.load_file(file).items()}
    best = wanted(Reference(theirs)).argmax(-1).reshape(3, 8, 7)
    token = np.asarray(actions.greedy(jnp.asarray(right.reshape(3, 8, 7, 256))))
    np.testing.assert_array_equal(token, best)
    # decoded as the original does: ids, bins, centres, and the gripper turned into -1 or 1
    ids = VOCAB - 256 + best
    edges = np.linspace(-1, 1, 256)
    value = ((edges[:-1] + edges[1:]) / 2)[np.clip(VOCAB - ids - 1, 0, 254)]
    value[..., 6] = -np.sign(2 * value[..., 6] - 1)
    np.testing.assert_allclose(Codec().decode(token), value, atol=1e-6)
