"""RLDS data sets, written here with tensorflow-datasets' own features and TFRecord's own framing, to episodes."""

from __future__ import annotations

import io
import json
import struct
import sys
import warnings

import numpy as np
import pytest

from data_prep.demos import Conventions, SourceError, to_episode
from wovr_jax.data import episodes as disk

PIL = pytest.importorskip("PIL.Image")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    tfds = pytest.importorskip("tensorflow_datasets")
from data_prep import checksums, rlds  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS, SIZE = 4, 16
TASKS = ("pick up the bowl", "open the drawer")


def layout(with_action=True):
    f = tfds.features
    picture = f.Image(shape=(SIZE, SIZE, 3), dtype=np.uint8, encoding_format="jpeg")
    numbers = {"discount": np.float32, "reward": np.float32}
    numbers |= dict.fromkeys(("is_first", "is_last", "is_terminal"), np.bool_)
    step = {name: f.Scalar(dtype=kind) for name, kind in numbers.items()} | {"language_instruction": f.Text()}
    step["observation"] = f.FeaturesDict(
        {
            "image": picture,
            "wrist_image": picture,
            "state": f.Tensor(shape=(8,), dtype=np.float32),
            "joint_state": f.Tensor(shape=(7,), dtype=np.float32),
        }
    )
    if with_action:
        step["action"] = f.Tensor(shape=(7,), dtype=np.float32)
    return f.FeaturesDict({"steps": f.Dataset(step), "episode_metadata": f.FeaturesDict({"file_path": f.Text()})})


def picture(seed):
    """A soft one, so that JPEG keeps it."""
    ramp = np.linspace(0, 200, SIZE, dtype=np.float32)
    return np.stack([ramp[:, None] + ramp[None] * 0.2 + seed] * 3, axis=-1).astype(np.uint8)


def jpeg(pixels):
    file = io.BytesIO()
    PIL.fromarray(pixels).save(file, "JPEG", quality=98)
    file.seek(0)
    return file


def example(number, with_action=True):
    steps = []
    for t in range(STEPS):
        step = dict.fromkeys(("is_last", "is_terminal"), t == STEPS - 1) | {"is_first": t == 0, "discount": 1.0}
        step |= {"reward": float(t == STEPS - 1), "language_instruction": TASKS[number % 2]}
        step["observation"] = {
            "image": jpeg(picture(t)),
            "wrist_image": jpeg(picture(2 * t)),
            "state": np.arange(8, dtype=np.float32) + t,
            "joint_state": np.zeros(7, np.float32),
        }
        if with_action:
            step["action"] = np.array([0.1 * (t + 1), 0, 0, 0, 0, number / 10, -1 if t < 2 else 1], np.float32)
        steps.append(step)
    return {"steps": steps, "episode_metadata": {"file_path": "a.hdf5"}}


def crc(data):
    return struct.pack("<I", checksums.masked_crc(data))


def write(folder, shards=2, each=2, with_action=True):
    folder.mkdir(parents=True)
    features = layout(with_action)
    features.save_config(str(folder))
    for shard in range(shards):
        path = folder / f"libero_x-train.tfrecord-{shard:05d}-of-{shards:05d}"
        with path.open("wb") as file:
            for number in range(shard * each, (shard + 1) * each):
                content = features.serialize_example(features.encode_example(example(number, with_action)))
                length = struct.pack("<Q", len(content))
                file.write(length + crc(length) + content + crc(content))
    splits = [{"name": "train", "shardLengths": [str(each)] * shards}]
    (folder / "dataset_info.json").write_text(json.dumps({"splits": splits, "version": "1.0.0"}))
    return folder


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["rlds", *map(str, arguments)])
    rlds.main()


def test_the_checksum_is_the_published_one():
    assert checksums.masked_crc(b"123456789") == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_a_data_set_becomes_episodes(tmp_path, monkeypatch, capsys):
    run(monkeypatch, write(tmp_path / "libero_x" / "1.0.0"), "--out", tmp_path / "ours", "--key", "libero_x_no_noops")
    assert "4 episodes, 16 steps, statistics 'libero_x_no_noops'" in capsys.readouterr().out
    made = disk.read(tmp_path / "ours")
    assert [episode.instruction for episode in made] == [TASKS[number % 2] for number in range(4)]
    assert made[0].task == 1 and made[1].task == 0  # by alphabet
    first = made[0]
    assert first.frame_SHWC.shape == (STEPS + 1, SIZE, SIZE, 3)
    # Turned already in the set: another turn would put the dark edge below.
    assert np.abs(first.frame_SHWC[2].astype(int) - picture(2)).max() <= 3
    assert np.abs(first.wrist_SHWC[2].astype(int) - picture(4)).max() <= 3
    assert np.allclose(first.state_SD[1], np.arange(8) + 1)
    assert first.action_SA[:, 6].tolist() == [-1, -1, 1, 1]  # stored as the simulator takes it
    assert first.success_S.tolist() == [False] * STEPS + [True]
    assert "tensorflow" not in sys.modules


def test_shards_that_are_missing_cut_short_or_damaged_are_named(tmp_path):
    folder = write(tmp_path / "x")
    (first, _), (second, length) = rlds.shards(folder)
    whole = first.read_bytes()
    first.write_bytes(whole[:-40])
    with pytest.raises(SourceError, match=r"tfrecord-00000-of-00002, record 1: cut short"):
        list(rlds.read((first, 2)))
    first.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(SourceError, match="record 0: damaged or cut short"):
        list(rlds.read((first, 2)))
    *_, error = rlds.read((second, 5))
    assert "2 episodes, dataset_info.json counts 5" in str(error)
    first.unlink()
    with pytest.raises(SourceError, match=r"1 shards, and there should be 2: .*00000-of-00002 is missing"):
        rlds.shards(folder)
    assert length == 2


def test_a_changed_byte_costs_its_episode_and_no_other(tmp_path, monkeypatch, capsys):
    folder = write(tmp_path / "x")
    first = rlds.shards(folder)[0][0]
    data = bytearray(first.read_bytes())
    data[data.find(struct.pack("<f", 0.2)) + 3] ^= 2  # a number of the first record
    first.write_bytes(data)
    with pytest.raises(SystemExit, match="record 0: damaged, its checksum is not that of its content"):
        run(monkeypatch, folder, "--out", tmp_path / "ours")
    run(monkeypatch, folder, "--out", tmp_path / "ours", "--skip")
    assert [episode.task for episode in disk.read(tmp_path / "ours")] == [0, 1, 0]


def test_what_lies_before_a_cut_is_kept(tmp_path, monkeypatch):
    folder = write(tmp_path / "x")
    first = rlds.shards(folder)[0][0]
    first.write_bytes(first.read_bytes()[:-40])
    run(monkeypatch, folder, "--out", tmp_path / "ours", "--skip")
    facts = disk.manifest(tmp_path / "ours")
    assert facts["episodes"] == 3 and "record 1: cut short" in facts["meta"]["skipped"][0]


def test_a_missing_shard_is_skipped_when_asked(tmp_path, monkeypatch):
    folder = write(tmp_path / "x")
    rlds.shards(folder)[0][0].unlink()
    with pytest.raises(SystemExit, match="00000-of-00002 is missing"):
        run(monkeypatch, folder, "--out", tmp_path / "ours")
    run(monkeypatch, folder, "--out", tmp_path / "ours", "--skip")
    assert disk.manifest(tmp_path / "ours")["episodes"] == 2


@pytest.mark.parametrize("size", [0, 1, 9, 65535, 65536, 65537, 65539, 200001])
def test_lanes_give_the_checksum_of_one_byte_after_another(size):
    data = np.random.default_rng(size).bytes(size)
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 & -(value & 1))
    assert checksums.crc32c(data) == value ^ 0xFFFFFFFF


def test_a_record_that_is_damaged_within_is_named(tmp_path):
    folder = write(tmp_path / "x", shards=1)
    ((path, _),) = rlds.shards(folder)
    content = bytearray(next(rlds.records(path)))
    content[5:200] = bytes(195)
    with pytest.raises(SourceError, match="here: damaged|here: .* is missing"):
        rlds.demo(bytes(content), rlds.features(folder), "here")


def test_other_folders_and_other_features_are_refused(tmp_path):
    with pytest.raises(SourceError, match=r"features.json is missing"):
        rlds.shards(tmp_path)
    folder = write(tmp_path / "x", with_action=False)
    errors = list(rlds.read(rlds.shards(folder)[0]))
    assert "record 0: 'action' is missing" in str(errors[0])
    (folder / "features.json").write_text("{}")
    with pytest.raises(SourceError, match=r"features.json: cannot be read"):
        rlds.features(folder)


def test_frames_come_before_their_actions(tmp_path):
    ((path, length),) = rlds.shards(write(tmp_path / "x", shards=1, each=1))
    (one,) = rlds.read((path, length))
    episode = to_episode(one, 0, 0, Conventions())
    assert one.pairing == "before" and episode.origin["last_frame"] == "repeated"
    assert np.array_equal(episode.frame_SHWC[-1], episode.frame_SHWC[-2])
