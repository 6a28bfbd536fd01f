"""A release's tokenizer and statistics, read from files of its layout."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from wovr_jax.data import normalize
from wovr_jax.data.normalize import StatisticsError
from wovr_jax.policy.actions import Codec
from wovr_jax.policy.tokenizer import SPACE, ReleaseTokenizer
from wovr_jax.policy.vla import VLAConfig

WORDS = ["in", "what", "action", "should", "the", "robot", "take", "to", "pick", "up", "out"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer of Llama's kind: byte fallback, spaces as ``SPACE``, 600 real ids of which 256 are for actions."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, normalizers

    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), SPACE, ":", "?", "I", "O", "W"]
    names += sorted({letter for word in WORDS for letter in word} - set(names))
    merges = []
    for word in (SPACE + "In", "Out", "What", SPACE + "the", SPACE + "to"):  # a few merges, letter by letter
        for i in range(1, len(word)):
            if (word[:i], word[i]) not in merges:
                merges.append((word[:i], word[i]))
            names += [word[: i + 1]] if word[: i + 1] not in names else []
    vocabulary = {name: i for i, name in enumerate(names)}
    inner = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    inner.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    there = tmp_path_factory.mktemp("release")
    inner.save(str(there / "tokenizer.json"))
    described = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (there / "tokenizer_config.json").write_text(json.dumps(described | {"processor_class": "PrismaticProcessor"}))
    (there / "config.json").write_text(json.dumps({"model_type": "openvla", "auto_map": {"AutoConfig": "x.Y"}}))
    return there


@pytest.fixture(scope="module")
def cfg():
    base = VLAConfig.fake()
    return dataclasses.replace(base, vocab_size=640, pad=640, llm=dataclasses.replace(base.llm, rows=704))


def read(folder, cfg, **options):
    return ReleaseTokenizer(folder, cfg.vocab_size, stop=cfg.stop, pad=cfg.pad, **options)


def test_prompts_end_in_the_lone_space(folder, cfg):
    words = read(folder, cfg, length=120)
    ids = words.encode("Pick UP the robot")
    names = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    text = {i: name for name, i in names.items()}
    assert ids[0] == words.bos == 1 and text[ids[-1]] == SPACE and ids.count(1) == 1
    said = "".join(text[i] for i in ids[1:-1]).replace(SPACE, " ").replace("<0x0A>", "\n")
    assert said == " In: What action should the robot take to pick up the robot?\nOut:"
    row = words.prompt("pick up the robot")
    assert row.dtype == np.int32 and row[0] == 1 and row[-1] == ids[-1]
    np.testing.assert_array_equal(row[row != cfg.pad], ids)
    np.testing.assert_array_equal(np.flatnonzero(row == cfg.pad), np.arange(1, 1 + 120 - len(ids)))
    assert words.prompts(["pick up", "take the robot"]).shape == (2, 120)


def test_a_tokenizer_of_another_policy(folder, cfg, tmp_path):
    with pytest.raises(ValueError, match="not the policy's: expected <s>"):
        read(folder, VLAConfig.fake())  # whose action ids begin where this one still has words
    with pytest.raises(ValueError, match="not the policy's"):
        read(folder, dataclasses.replace(cfg, stop=3))
    with pytest.raises(ValueError, match=r"expected a tokenizer\.json"):
        read(tmp_path, cfg)
    with pytest.raises(ValueError, match="expected at most 20"):
        read(folder, cfg, length=20).prompt("pick up the robot")


# Statistics ---------------------------------------------------------------------------------------------------


def read_codec(folder, key):
    return Codec.from_statistics(normalize.load(folder, key)["action"])


def entry(scale):
    one = {name: [scale] * 7 for name in ("mean", "std", "max", "min", "q99")} | {"q01": [-scale] * 7}
    return {"action": one | {"mask": [True] * 6 + [False]}, "num_transitions": 9, "num_trajectories": 1}


def test_the_codec_is_the_one_asked_for(tmp_path):
    table = {"libero_goal_no_noops": entry(0.5), "bridge": entry(2.0)}
    (tmp_path / "dataset_statistics.json").write_text(json.dumps(table))
    codec = read_codec(tmp_path, "libero_goal")
    assert codec == Codec((-0.5,) * 7, (0.5,) * 7, (True,) * 6 + (False,), 6)
    assert read_codec(tmp_path, "bridge").q99[0] == 2.0
    # By OpenVLA's formula: token 64 is the bin value 0.502, of which six are stretched and the gripper is decided.
    x = (np.linspace(-1, 1, 256)[:-1] + 1 / 255)[255 - 64]
    want = [0.5 * (x + 1) * (1 + 1e-8) - 0.5] * 6 + [-1.0]
    np.testing.assert_allclose(codec.decode(np.full((1, 7), 64))[0], want, atol=1e-6)
    for key, message in (
        ("kitchen", "expected an entry 'kitchen', the file has libero_goal_no_noops, bridge"),
        (None, "expected exactly one entry, the file has libero_goal_no_noops, bridge"),
    ):
        with pytest.raises(StatisticsError, match=message):
            read_codec(tmp_path, key)


def test_the_file_of_statistics_counts_before_the_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"norm_stats": {"a": entry(3.0)}}))
    assert read_codec(tmp_path, "a").q99[0] == 3.0
    (tmp_path / "dataset_statistics.json").write_text(json.dumps({"a": entry(1.0)}))
    assert read_codec(tmp_path, "a").q99[0] == 1.0
    assert normalize.load(tmp_path, "a")["num_transitions"] == 9


def test_statistics_that_are_not_there(tmp_path):
    with pytest.raises(StatisticsError, match="neither dataset_statistics.json nor norm_stats"):
        read_codec(tmp_path, "a")
    (tmp_path / "dataset_statistics.json").write_text(json.dumps({"a": {"action": {"q01": [0.0]}}}))
    with pytest.raises(StatisticsError, match="lack mean"):
        read_codec(tmp_path, "a")
