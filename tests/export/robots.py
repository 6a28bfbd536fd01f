"""What is taken to a robot: a run folder as PACE leaves it, and an imported release; tiny, with made-up episodes."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import pytest

from tests.bridge.layouts import BFLOAT16, arrays, openvla_config, openvla_folder, openvla_shapes
from wovr_jax.bridge import importer
from wovr_jax.bridge.sources import find, open_source
from wovr_jax.core import checkpoint, config
from wovr_jax.data import episodes as disk
from wovr_jax.policy import vla
from wovr_jax.policy.tokenizer import PROMPT, SPACE
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.types import Episode

CFG = VLAConfig.fake()
TASKS = ("pick up the red block and put it on the plate", "open the top drawer")


@functools.cache
def params(seed=0):
    """Random weights under which the actions depend on frame, instruction and slot."""
    made = jax.device_get(vla.network(CFG).init(jax.random.key(seed)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (leaf + 0.15 * rng.standard_normal(leaf.shape)).astype(np.float32), made)


def episode(i, steps=16, size=(CFG.dino.image, CFG.dino.image)):
    rng = np.random.default_rng(i)
    action = rng.uniform(-1, 1, (steps, 7)).astype(np.float32) * np.float32([1, 0.8, 0.6, 0.4, 0.2, 0.1, 1])
    action[:, 6] = np.where(action[:, 6] < 0, -1, 1)
    frame = rng.integers(0, 256, (steps + 1, *size, 3), np.uint8)
    success = np.zeros(steps + 1, bool)
    return Episode(frame, action, success, TASKS[i % 2], i % 2, i, "expert", action)


def fake_run(folder, rounds=1):
    """Base policy, demonstrations, one collection, and a policy for each round."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"policy": config.to_dict(CFG), "temperature": 1.6}))
    for stage, seeds in (("demonstrations", range(6)), ("collect-0", range(10, 14))):
        disk.write(folder / "stages" / stage / "episodes", map(episode, seeds))
    for k in range(rounds + 1):
        checkpoint.save(folder / "stages" / (f"grpo-{k}" if k else "sft") / "policy", params(k))
    for stage in (folder / "stages").iterdir():
        (stage / "done.json").write_text('{"seconds": 1.0}')
    return folder


RELEASE = {"dino": (24, 3, 40), "siglip": (12, 4, 20), "llm": (32, 3, 48), "rows": 392, "patch": 4, "patches": 4}
KEY = "libero_goal_no_noops"


def release(folder):
    """An OpenVLA-OFT release with a word-level tokenizer and the statistics of two data sets."""
    tokenizers = pytest.importorskip("tokenizers")
    settings = openvla_config(num_attention_heads=4, vocab_size=392, pad_token_id=328) | {"pad_token_id": 328}
    openvla_folder(folder, arrays(openvla_shapes(**RELEASE), BFLOAT16), settings, 2)
    words = ["<unk>", "<s>", "</s>", SPACE]
    for text in ("".join(PROMPT.format(task=task)) for task in (*TASKS, "close the top drawer")):
        words += [word for word in text.replace(":", " : ").replace("?", " ? ").split() if word not in words]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens(words[:3])
    inner.save(str(folder / "tokenizer.json"))
    kinds = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kinds))
    table = {name: {"action": statistics(scale)} for name, scale in ((KEY, 0.9), ("libero_10_no_noops", 0.3))}
    (folder / "dataset_statistics.json").write_text(json.dumps(table))
    return folder


def statistics(scale):
    high = [scale * (i + 1) / 7 for i in range(7)]
    same = dict.fromkeys(("mean", "std", "max", "min", "q99"), high)
    return same | {"q01": [-value for value in high], "mask": [True] * 6 + [False]}


def imported(folder, recipe="oft"):
    """``policy.json`` of the release, and episodes of a camera with more pixels than the network takes."""
    (file,) = find(release(folder / "release"))
    card = importer.write_import(importer.read_import(open_source(file), heads=2, recipe=recipe), folder / "ours")
    disk.write(folder / "episodes", (episode(i, 16, (12, 20)) for i in range(4)))
    return card, folder / "episodes"
