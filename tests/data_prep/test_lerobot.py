"""LeRobot data sets of versions 2.1 and 3.0, written here with their exact layout, to episodes."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow")
PIL = pytest.importorskip("PIL.Image")
import pyarrow.parquet as pq  # noqa: E402

from data_prep import lerobot  # noqa: E402
from data_prep.columns import Columns, choose  # noqa: E402
from data_prep.demos import SourceError  # noqa: E402
from wovr_jax.core import pixels  # noqa: E402
from wovr_jax.data import episodes as disk  # noqa: E402

TASKS = ["pick up the bowl", "open the drawer"]
LENGTHS, SIZE, FPS = (5, 7, 6), 64, 10
IMAGE, WRIST = "observation.images.image", "observation.images.wrist_image"


def frame(number, step, hand=False):
    """Soft, so that a codec keeps it, and different for every episode, step and camera."""
    ramp = np.linspace(0, 60, SIZE)
    shades = [20 + 60 * number + 0 * ramp[:, None] + ramp[None], 20 + 25 * step + ramp[:, None] + 0 * ramp[None]]
    return np.stack([*shades, np.full((SIZE, SIZE), 200 if hand else 40)], axis=-1).clip(0, 255).astype(np.uint8)


def rows(number, first):
    """The columns of an episode, without cameras."""
    steps = range(LENGTHS[number])
    action = [[0.1 * (step + 1), 0, 0, 0, 0, 0.01 * number, -1 if step < 3 else 1] for step in steps]
    return {
        "observation.state": [[float(step)] * 8 for step in steps],
        "action": action,
        "timestamp": [step / FPS for step in steps],
        "frame_index": list(steps),
        "episode_index": [number] * len(action),
        "index": [first + step for step in steps],
        "task_index": [number % 2] * len(action),
    }


def png(frame_HWC):
    file = io.BytesIO()
    PIL.fromarray(frame_HWC).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": "x.png"}


def film(path, frames):
    pixels.encode(path, np.stack(frames), "libx264", "yuv420p", FPS, {"crf": "10"})


def save(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def write(folder, version, camera):
    """``version`` "v2.1" or "v3.0"; cameras are of kind ``camera``, "image" or "video"."""
    kind = {"dtype": camera, "shape": [SIZE, SIZE, 3], "names": ["height", "width", "channel"]}
    features = {IMAGE: kind, WRIST: kind, "observation.state": {"dtype": "float32", "shape": [8]}}
    features["action"] = {"dtype": "float32", "shape": [7]}
    info = {"codebase_version": version, "fps": FPS, "features": features, "total_episodes": len(LENGTHS)}
    info |= {"chunks_size": 1000, "total_frames": sum(LENGTHS)}
    (folder / "meta").mkdir(parents=True)
    tables = [rows(number, sum(LENGTHS[:number])) for number in range(len(LENGTHS))]
    films = {
        name: [[frame(number, step, name == WRIST) for step in range(length)] for number, length in enumerate(LENGTHS)]
        for name in (IMAGE, WRIST)
    }
    if camera == "image":
        for table, *views in zip(tables, films[IMAGE], films[WRIST], strict=True):
            table |= {name: list(map(png, view)) for name, view in zip((IMAGE, WRIST), views, strict=True)}
    (_v2 if version == "v2.1" else _v3)(folder, info, tables, films, camera == "video")
    return folder


def _v2(folder, info, tables, films, moving):
    info["data_path"] = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    info["video_path"] = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    listing = []
    for number, table in enumerate(tables):
        save(folder / f"data/chunk-000/episode_{number:06d}.parquet", table)
        listing.append({"episode_index": number, "tasks": [TASKS[number % 2]], "length": LENGTHS[number]})
        for name in films if moving else ():
            film(folder / f"videos/chunk-000/{name}/episode_{number:06d}.mp4", films[name][number])
    (folder / "meta/info.json").write_text(json.dumps(info))
    (folder / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, listing)))
    lines = [json.dumps({"task_index": number, "task": task}) for number, task in enumerate(TASKS)]
    (folder / "meta/tasks.jsonl").write_text("\n".join(lines))


def _v3(folder, info, tables, films, moving):
    """Episodes 0 and 1 share a table; all three share a video."""
    info["data_path"] = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    info["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    save(folder / "data/chunk-000/file-000.parquet", {key: tables[0][key] + tables[1][key] for key in tables[0]})
    save(folder / "data/chunk-000/file-001.parquet", tables[2])
    listing = {"episode_index": [0, 1, 2], "length": list(LENGTHS), "tasks": [[TASKS[n % 2]] for n in range(3)]}
    listing |= {"data/chunk_index": [0, 0, 0], "data/file_index": [0, 0, 1]}
    for name in films if moving else ():
        film(folder / f"videos/{name}/chunk-000/file-000.mp4", [one for view in films[name] for one in view])
        listing |= {f"videos/{name}/chunk_index": [0, 0, 0], f"videos/{name}/file_index": [0, 0, 0]}
        begins = [sum(LENGTHS[:number]) / FPS for number in range(3)]
        listing |= {f"videos/{name}/from_timestamp": begins, f"videos/{name}/to_timestamp": [*begins[1:], 9.9]}
    save(folder / "meta/episodes/chunk-000/file-000.parquet", listing)
    save(folder / "meta/tasks.parquet", {"task_index": [0, 1], "__index_level_0__": TASKS})
    (folder / "meta/info.json").write_text(json.dumps(info))


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["lerobot", *map(str, arguments)])
    lerobot.main()


@pytest.mark.parametrize("camera", ["image", "video"])
@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_a_data_set_becomes_episodes(tmp_path, monkeypatch, version, camera):
    for package in ("lerobot", "torch"):
        monkeypatch.setitem(sys.modules, package, None)  # to import one of them is an error from here on
    run(monkeypatch, write(tmp_path / "set", version, camera), "--out", tmp_path / "ours")
    made = disk.read(tmp_path / "ours")
    assert [episode.instruction for episode in made] == [TASKS[0], TASKS[1], TASKS[0]]
    assert [episode.task for episode in made] == [1, 0, 1] and [episode.seed for episode in made] == [0, 1, 2]
    for number, episode in enumerate(made):
        assert len(episode.action_SA) == LENGTHS[number]
        # Compression moves a shade by a few levels; the next step is 25 away, the next episode 60.
        wanted = [frame(number, step).astype(int) for step in range(LENGTHS[number])]
        assert np.abs(episode.frame_SHWC[:-1] - np.stack(wanted)).mean() < 6
        assert episode.wrist_SHWC[0, ..., 2].mean() > 150 > 100 > episode.frame_SHWC[0, ..., 2].mean()
        assert np.allclose(episode.action_SA[:, 5], 0.01 * number) and episode.action_SA[-1, 6] == 1
        assert episode.state_SD[:-1, 0].tolist() == list(range(LENGTHS[number]))
        assert episode.success_S.tolist() == [False] * LENGTHS[number] + [True]


def damaged_table(folder):
    path = next((folder / "data").rglob("*.parquet"))
    path.write_bytes(path.read_bytes()[:-50])


def short_video(folder):
    path = next((folder / "videos").rglob("*.mp4"))
    film(path, [frame(0, 0)] * 2)


def cut_video(folder):
    path = next((folder / "videos").rglob("*.mp4"))
    path.write_bytes(path.read_bytes()[:200])


def missing_video(folder):
    next((folder / "videos").rglob("*.mp4")).unlink()


def short_episode(folder):
    path = folder / "data/chunk-000/file-001.parquet"
    pq.write_table(pq.read_table(path).slice(0, 4), path)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damaged_table, r"file-00\d\.parquet: damaged or cut short, expected a parquet file"),
        (short_video, r"file-000\.mp4 ends after \d+ of its \d frames"),
        (cut_video, r"file-000\.mp4 (is damaged|ends after)"),
        (missing_video, r"file-000\.mp4: missing; expected a film"),
        (short_episode, r"episode 2: 4 rows, its listing counts 6; cut short"),
    ],
)
def test_damage_is_named_and_nothing_is_half_imported(tmp_path, monkeypatch, harm, message):
    folder = write(tmp_path / "set", "v3.0", "video")
    harm(folder)
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, folder, "--out", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_columns_and_versions_that_are_not_there_are_refused(tmp_path):
    folder = write(tmp_path / "set", "v2.1", "image")
    with pytest.raises(SourceError, match=r"no column 'front' for the image; there are observation.images.image"):
        lerobot.DataSet(folder, image="front")
    assert lerobot.DataSet(folder, wrist="none").columns.wrist is None
    info = json.loads((folder / "meta/info.json").read_text())
    for change, message in (
        ({"codebase_version": "v1.6"}, "LeRobot version 'v1.6'; read are v2.x and v3.0"),
        ({"features": info["features"] | {"action": {"dtype": "float32", "shape": [14]}}}, r"action has shape \[14\]"),
    ):
        (folder / "meta/info.json").write_text(json.dumps(info | change))
        with pytest.raises(SourceError, match=message):
            lerobot.DataSet(folder)
    with pytest.raises(SourceError, match="this is no LeRobot data set"):
        lerobot.DataSet(tmp_path)


def test_success_is_read_where_it_is_told():
    features = {
        "image": {"dtype": "image"},
        "actions": {"dtype": "float32", "shape": [7]},
        "state": {"dtype": "float32"},
    }
    found = choose(features, {}, "here")
    assert found == Columns("image", None, "state", "actions", None)
    assert choose({**features, "next.reward": {"dtype": "float32"}}, {}, "here").success == "next.reward"
    two = {"observation.images.image2": {"dtype": "video"}, **features}
    assert choose(two, {}, "here").wrist == "observation.images.image2"
