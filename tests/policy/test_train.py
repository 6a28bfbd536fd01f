"""Fine-tuning: loss by hand, frozen parts, exact resumption, and that it learns a chunk by heart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.sizes import fake_sft
from wovr_jax.core import pixels
from wovr_jax.policy import train
from wovr_jax.policy.actions import Codec
from wovr_jax.policy.tokenizer import Tokenizer
from wovr_jax.policy.train import SFTConfig
from wovr_jax.policy.vla import VLAConfig, network

CFG = VLAConfig.fake()
NET = network(CFG)
KEY = jax.random.key(0)


def data(chunks=3):
    rng = np.random.default_rng(0)
    label = np.sign(rng.normal(size=(chunks, 8, 7))).astype(np.float32)
    arrays = {"frame_BHWC": rng.integers(0, 256, (chunks, 16, 16, 3), np.uint8), "label_BTA": label}
    prompts = Tokenizer.tabletop().prompts(["pick up the red block", "pick up the blue block"])
    return train.demonstrations(arrays | {"task_B": np.arange(chunks) % 2}, Codec(), prompts)


def test_labels_become_tokens():
    chunks = data()
    assert chunks.token_BTA.shape == (3, 8, 7) and chunks.frame_BHWC.dtype == jnp.uint8
    assert set(np.unique(chunks.token_BTA[..., :6])) == {0, 255}
    assert set(np.unique(chunks.token_BTA[..., 6])) == {0, 128}


def test_first_loss_is_the_mean_cross_entropy():
    chunks, params = data(), NET.init(KEY)
    logits = NET(params, pixels.to_float(chunks.frame_BHWC), chunks.prompt_BL)
    logp = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(chunks.token_BTA)[..., None], -1)
    total, metrics = train.loss(NET, params, chunks)
    assert total == pytest.approx(-logp.mean(), rel=1e-5)
    hits = np.asarray(logits.argmax(-1)) == np.asarray(chunks.token_BTA)
    assert metrics["accuracy"] == pytest.approx(hits.mean())


def run(state, step, first, last):
    for i in range(first, last):
        state, metrics = step(state, jnp.asarray(i))
    return state, metrics


def test_frozen_parts_stay_and_the_rest_moves():
    params = NET.init(KEY)
    state, step = train.make(CFG, fake_sft(), params, data(), KEY)
    state, _ = run(state, step, 0, 3)
    assert set(state.params) == {"projector", "llm"}
    after = train.merge_weights(CFG, fake_sft(), params, state)
    same = {name: all(map(np.array_equal, *map(jax.tree.leaves, (params[name], after[name])))) for name in params}
    assert same == {"dino": True, "siglip": True, "projector": False, "llm": False}
    everything = dataclasses.replace(fake_sft(), frozen=())
    state, _ = run(*train.make(CFG, everything, params, data(), KEY), 0, 3)
    assert not np.array_equal(params["dino"]["pos_embed"], state.params["dino"]["pos_embed"])


def test_resumed_equals_uninterrupted():

    def start():
        return train.make(CFG, fake_sft(), NET.init(KEY), data(), KEY)

    whole, _ = run(*start(), 0, 4)
    half, _ = run(*start(), 0, 2)
    rest, _ = run(jax.tree.map(jnp.copy, half), start()[1], 2, 4)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(rest), strict=True):
        np.testing.assert_array_equal(a, b)


def test_learns_a_chunk_by_heart():
    cfg = SFTConfig(steps=120, batch=4, lr=1e-2, warmup=5)
    _, metrics = run(*train.make(CFG, cfg, NET.init(KEY), data(), KEY), 0, 120)
    assert metrics["accuracy"] > 0.85 and metrics["loss"] < 0.6


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="unknown \\['eyes'\\]"):
        train.make(CFG, dataclasses.replace(fake_sft(), frozen=("eyes",)), NET.init(KEY), data(), KEY)
    empty = {"frame_BHWC": np.zeros((0, 16, 16, 3), np.uint8), "label_BTA": np.zeros((0, 8, 7)), "task_B": np.zeros(0)}
    with pytest.raises(ValueError, match="at least one demonstrated chunk"):
        train.demonstrations(empty, Codec(), np.zeros((1, 26), np.int32))
    floats = empty | {"frame_BHWC": np.zeros((2, 16, 16, 3), np.float32)}
    with pytest.raises(ValueError, match="uint8"):
        train.demonstrations(floats, Codec(), np.zeros((1, 26), np.int32))
