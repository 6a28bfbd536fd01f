"""Merged folders hold exactly the episodes of their parts, and unlike parts are refused."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from tests.shards import write_shards
from wovr_jax.data import episodes as disk
from wovr_jax.data.episodes import EpisodesError
from wovr_jax.types import Episode


def make(seed: int, task: int = 0, size: int = 6) -> Episode:
    rng = np.random.default_rng(seed)
    action_SA = rng.uniform(-1, 1, (5, 7)).astype(np.float32)
    frame_SHWC = rng.integers(0, 256, (6, size, size, 3), np.uint8)
    return Episode(frame_SHWC, action_SA, np.arange(6) > 4, f"task {task}", task, seed, "expert", action_SA)


def test_merged_is_the_same_as_written_at_once(tmp_path):
    made = [make(i, task=i % 2) for i in range(5)]
    disk.write(tmp_path / "a", made[:2])
    write_shards(tmp_path / "b", made[2:], per_shard=2)
    facts = disk.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "whole", meta={"from": "parts"})
    disk.write(tmp_path / "once", made, meta={"from": "parts"})
    once = disk.manifest(tmp_path / "once")
    assert {k: v for k, v in facts.items() if k != "shards"} == {k: v for k, v in once.items() if k != "shards"}
    assert [shard["episodes"] for shard in facts["shards"]] == [2, 2, 1]
    read = disk.read(tmp_path / "whole")
    assert [episode.seed for episode in read] == [0, 1, 2, 3, 4]
    assert all(np.array_equal(a.frame_SHWC, b.frame_SHWC) for a, b in zip(read, made, strict=True))


def test_unlike_parts_are_refused_and_nothing_is_written(tmp_path):
    disk.write(tmp_path / "a", [make(0)])
    disk.write(tmp_path / "small", [make(1, size=4)])
    disk.write(tmp_path / "other", [dataclasses.replace(make(2), instruction="something else")])
    with pytest.raises(EpisodesError, match=r"small: frame is \[4, 4, 3\], before it was \[6, 6, 3\]"):
        disk.merge([tmp_path / "a", tmp_path / "small"], tmp_path / "whole", meta={})
    with pytest.raises(EpisodesError, match="number their tasks differently"):
        disk.merge([tmp_path / "a", tmp_path / "other"], tmp_path / "whole", meta={})
    with pytest.raises(EpisodesError, match="no episodes were given"):
        disk.merge([], tmp_path / "whole", meta={})
    assert not (tmp_path / "whole").exists()
    disk.merge([tmp_path / "a"], tmp_path / "whole", meta={})
    with pytest.raises(EpisodesError, match="exists already"):
        disk.merge([tmp_path / "a"], tmp_path / "whole", meta={})


def test_a_damaged_part_is_named(tmp_path):
    disk.write(tmp_path / "a", [make(0)])
    shard = tmp_path / "a" / "shard-00000.array_record"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(EpisodesError, match="a/shard-00000.array_record is cut short"):
        disk.merge([tmp_path / "a"], tmp_path / "whole", meta={})


def test_parts_of_the_first_schema_have_no_wrist(tmp_path):
    disk.write(tmp_path / "a", [make(0)])
    disk.write(tmp_path / "old", [make(1)])
    path = tmp_path / "old" / "manifest.json"
    facts = json.loads(path.read_text()) | {"schema": 1}
    del facts["wrist"], facts["state"]
    path.write_text(json.dumps(facts))
    assert disk.merge([tmp_path / "old", tmp_path / "a"], tmp_path / "whole", meta={})["episodes"] == 2
