"""Episodes come back exactly; every way a folder can be wrong has its own message."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from tests.shards import write_shards
from wovr_jax.data import episodes as disk
from wovr_jax.data import records
from wovr_jax.data.episodes import EpisodesError
from wovr_jax.types import Episode


def make(seed: int, steps: int = 12, success: bool | None = None, **changes) -> Episode:
    rng = np.random.default_rng(seed)
    won = seed % 2 == 0 if success is None else success
    episode = Episode(
        frame_SHWC=rng.integers(0, 256, (steps + 1, 8, 10, 3), np.uint8),
        action_SA=rng.uniform(-1, 1, (steps, 7)).astype(np.float32),
        success_S=np.arange(steps + 1) >= (steps - 2 if won else steps + 1),
        instruction=f"task {seed % 3} – ü",
        task=seed % 3,
        seed=seed,
        actor="base",
        label_SA=rng.uniform(-1, 1, (steps, 7)).astype(np.float32),
    )
    return dataclasses.replace(episode, **changes)


def same(a: Episode, b: Episode) -> bool:
    pairs = [(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(Episode)]
    return all(np.array_equal(x, y) and getattr(x, "dtype", 0) == getattr(y, "dtype", 0) for x, y in pairs)


def test_round_trip_over_shards_and_lengths(tmp_path):
    originals = [make(i, steps=8 + i) for i in range(7)]
    facts = write_shards(tmp_path / "base", iter(originals), meta={"sim": {"size": 8}}, per_shard=3)
    assert [shard["episodes"] for shard in facts["shards"]] == [3, 3, 1]
    read = disk.read(tmp_path / "base")
    assert len(read) == 7 and all(same(a, b) for a, b in zip(originals, read, strict=True))
    assert read[0].frame_SHWC.flags.writeable

    source = disk.EpisodeSource(tmp_path / "base", verify=False)
    assert len(source) == 7 and same(source[5], originals[5])


def test_episodes_that_stay_on_disk_are_those_of_the_list(tmp_path, monkeypatch):
    originals = [make(i, steps=8 + i) for i in range(5)]
    write_shards(tmp_path / "base", originals, per_shard=2)
    source = disk.EpisodeSource(tmp_path / "base")
    lazy = disk.Lazy([(source, e) for e in (4, 0, 3)])
    assert same(lazy[0], originals[4]) and same(lazy[-1], originals[3])
    assert [episode.seed for episode in lazy] == [4, 0, 3]
    both = disk.join([lazy[1:], [], lazy])
    assert isinstance(both, disk.Lazy) and [episode.seed for episode in both] == [0, 3, 4, 0, 3]
    mixed = disk.join([lazy[:1], originals[:1]])
    assert isinstance(mixed, list) and [episode.seed for episode in mixed] == [4, 0]
    monkeypatch.setattr(disk, "decode", None)
    assert disk.heads(both) == disk.heads([originals[e] for e in (0, 3, 4, 0, 3)])


def test_manifest_counts(tmp_path):
    facts = disk.write(tmp_path / "base", [make(i) for i in range(6)], meta={"sim": {"size": 8}})
    assert (facts["schema"], facts["episodes"], facts["steps"], facts["successes"]) == (2, 6, 72, 3)
    assert facts["tasks"]["1"] == {"instruction": "task 1 – ü", "episodes": 2, "successes": 1}
    assert facts["actors"] == {"base": 6} and facts["frame"] == [8, 10, 3] and facts["meta"] == {"sim": {"size": 8}}
    assert len(facts["shards"][0]["sha256"]) == 64


def test_still_background_is_small():
    still = make(0, steps=24, frame_SHWC=np.repeat(make(0).frame_SHWC[:1], 25, axis=0))
    assert len(records.encode(still)) < 0.3 * still.frame_SHWC.nbytes  # most of it random actions


def test_an_existing_folder_is_not_replaced_unasked(tmp_path):
    disk.write(tmp_path / "base", [make(0)])
    with pytest.raises(EpisodesError, match="exists already; pass overwrite=True"):
        disk.write(tmp_path / "base", [make(1)])
    assert same(disk.read(tmp_path / "base")[0], make(0))
    disk.write(tmp_path / "base", [make(1)], overwrite=True)
    assert same(disk.read(tmp_path / "base")[0], make(1))
    (tmp_path / "notes").mkdir()
    with pytest.raises(EpisodesError, match="is not an episode folder; it is not replaced"):
        disk.write(tmp_path / "notes", [make(1)], overwrite=True)


def test_an_interrupted_write_leaves_nothing_and_keeps_the_old(tmp_path):
    disk.write(tmp_path / "base", [make(0)])

    def broken():
        yield make(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        disk.write(tmp_path / "base", broken(), overwrite=True)
    assert same(disk.read(tmp_path / "base")[0], make(0))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_death_between_the_renames(tmp_path):
    disk.write(tmp_path / "base", [make(0)])
    (tmp_path / "base").rename(tmp_path / "base.old")
    assert same(disk.read(tmp_path / "base")[0], make(0))


def test_no_folder_and_foreign_folders(tmp_path):
    with pytest.raises(EpisodesError, match="the folder does not exist"):
        disk.read(tmp_path / "nothing")
    (tmp_path / "notes").mkdir()
    with pytest.raises(EpisodesError, match=r"is not an episode folder: manifest.json is missing"):
        disk.read(tmp_path / "notes")
    (tmp_path / "notes" / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(EpisodesError, match="does not describe episodes"):
        disk.read(tmp_path / "notes")
    (tmp_path / "notes" / "manifest.json").write_text("{")
    with pytest.raises(EpisodesError, match="is not JSON"):
        disk.read(tmp_path / "notes")


def test_a_newer_schema(tmp_path):
    facts = disk.write(tmp_path / "base", [make(0)])
    (tmp_path / "base" / "manifest.json").write_text(json.dumps(facts | {"schema": 9}))
    with pytest.raises(EpisodesError, match="written with schema 9; this code reads up to 2"):
        disk.read(tmp_path / "base")


def test_shards_cut_short_changed_or_missing(tmp_path):
    write_shards(tmp_path / "base", [make(i) for i in range(4)], per_shard=2)
    shard = tmp_path / "base" / "shard-00001.array_record"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(EpisodesError, match=r"shard-00001.array_record is cut short: expected \d+ bytes"):
        disk.read(tmp_path / "base", verify=False)
    shard.write_bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
    with pytest.raises(EpisodesError, match=r"shard-00001.array_record is damaged: its SHA-256"):
        disk.read(tmp_path / "base")
    shard.unlink()
    with pytest.raises(EpisodesError, match=r"shard-00001.array_record is missing; the manifest expects 2"):
        disk.read(tmp_path / "base")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action_SA": np.zeros((12, 6), np.float32)}, r"expected actions of shape \(steps, 7\), got \(12, 6\)"),
        ({"label_SA": np.zeros((11, 7), np.float32)}, r"expected label_SA of shape \(12, 7\)"),
        ({"success_S": np.zeros(12, bool)}, r"expected success_S of shape \(13,\)"),
        ({"frame_SHWC": np.zeros((13, 8, 10, 3), np.float32)}, r"expected frame_SHWC .* type uint8"),
        ({"action_SA": np.full((12, 7), np.nan, np.float32)}, "NaN or infinity"),
    ],
)
def test_malformed_episodes_are_not_written(tmp_path, changes, message):
    with pytest.raises(EpisodesError, match="episode 1 for .*base: .*" + message):
        disk.write(tmp_path / "base", [make(0), make(1, **changes)])
    assert not list(tmp_path.iterdir())


def test_a_stored_episode_of_another_robot_names_file_and_record(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "check", lambda episode, where: None)
    two_arms = np.zeros((12, 14), np.float32)
    write_shards(tmp_path / "base", [make(0), make(1), make(2, action_SA=two_arms, label_SA=two_arms)], per_shard=2)
    monkeypatch.undo()
    with pytest.raises(EpisodesError, match=r"shard-00001.array_record, record 0: expected .*7\), got \(12, 14\)"):
        disk.read(tmp_path / "base")


def test_damaged_records():
    record = records.encode(make(0))
    for broken in (record[:-30], record[:6], record[:4] + b"\xff\xff\xff\x7f" + record[8:]):
        with pytest.raises(EpisodesError, match="here: damaged record"):
            records.decode(broken, "here")
    with pytest.raises(EpisodesError, match="here: damaged record .*not an episode"):
        records.decode(b"PNG?" + record, "here")


def test_frames_of_two_sizes_and_no_episodes(tmp_path):
    with pytest.raises(EpisodesError, match=r"frame is \[4, 4, 3\], before it was \[8, 10, 3\]"):
        disk.write(tmp_path / "base", [make(0), make(1, frame_SHWC=np.zeros((13, 4, 4, 3), np.uint8))])
    with pytest.raises(EpisodesError, match="no episodes were given"):
        disk.write(tmp_path / "base", [])
    assert not list(tmp_path.iterdir())


def rich(seed: int, steps: int = 12) -> Episode:
    """With a wrist camera of another size, a state and an origin."""
    rng = np.random.default_rng(seed)
    return make(
        seed,
        steps,
        wrist_SHWC=rng.integers(0, 256, (steps + 1, 4, 6, 3), np.uint8),
        state_SD=rng.normal(size=(steps + 1, 8)).astype(np.float32),
        origin={"suite": "libero_spatial", "init": seed, "flaw": None},
    )


def test_wrist_camera_state_and_origin_come_back(tmp_path):
    originals = [rich(i, 8 + i) for i in range(3)]
    facts = disk.write(tmp_path / "base", originals)
    assert (facts["frame"], facts["wrist"], facts["state"]) == ([8, 10, 3], [4, 6, 3], 8)
    read = disk.read(tmp_path / "base")
    assert all(same(a, b) for a, b in zip(originals, read, strict=True))
    assert read[2].origin == {"suite": "libero_spatial", "init": 2, "flaw": None}


def test_one_folder_one_kind_of_episode(tmp_path):
    with pytest.raises(EpisodesError, match=r"episode 1 .*: wrist is None, before it was \[4, 6, 3\]"):
        disk.write(tmp_path / "base", [rich(0), make(1)])
    with pytest.raises(EpisodesError, match=r"state_SD of shape \(13, 8\)"):
        disk.write(tmp_path / "base", [make(0, state_SD=np.zeros((12, 8), np.float32))])
    with pytest.raises(EpisodesError, match="state_SD holds NaN"):
        disk.write(tmp_path / "base", [make(0, state_SD=np.full((13, 8), np.nan, np.float32))])


def test_records_of_schema_1_are_read():
    """Written before there was a wrist camera: no origin in the header."""
    record = records.encode(make(3))
    length = int.from_bytes(record[4:8], "little")
    header = json.loads(record[8 : 8 + length])
    del header["origin"]
    old = json.dumps(header).encode()
    assert same(records.decode(record[:4] + len(old).to_bytes(4, "little") + old + record[8 + length :]), make(3))
