"""Episodes to a LeRobot data set of version 3.0; neither lerobot nor torch is imported.

    python -m data_prep.to_lerobot data/spatial_expert --out lerobot/spatial_expert
    python -m data_prep.to_lerobot data/spatial_expert --out lerobot/small --video
    python -m data_prep.to_lerobot runs/pace/stages/demonstrations/episodes --out lerobot/table --robot table --executed
    python -m data_prep.to_lerobot recordings --out lerobot/recordings --executed --fps 10

A row is a frame and the action that was chosen in it, so the last frame of an episode, which has no action, is left
out; ``next.reward`` and ``next.done`` say what the action led to. Cameras are PNG pictures in the tables, without loss,
or with ``--video`` H.264 films. Actions are those to imitate, -1 for an open gripper. Where the hand was noisy the
frames follow other actions, those that were executed: ``--executed`` writes these, as a world model wants them.

A folder of recordings, as a policy server writes them, becomes one data set, with its labels applied. Times of
recordings are not kept, as rows are ``--fps`` a second: that has to be the robot's own rate.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from data_prep.files import place
from wovr_jax.core import pixels
from wovr_jax.core.disk import InUseError, drop_folder, fresh_folder, replace_folder, write_json
from wovr_jax.data import episodes as disk
from wovr_jax.data.recordings import Recordings, find_recordings, read_recordings
from wovr_jax.types import ACTION_DIM, Episode

IMAGE, WRIST = "observation.images.image", "observation.images.wrist_image"
STATE, ACTION = "observation.state", "action"
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EACH, CHUNK = 20, 1000
"""Episodes of a file, and files of a folder."""
STATE_NAMES = ("x", "y", "z", "axis_angle1", "axis_angle2", "axis_angle3", "finger1", "finger2")
ACTION_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")


class Joined:
    """The recordings of a folder, read as one set of episodes with their labels applied.

    Args:
      recordings: as ``data.recordings`` finds them.
    """

    def __init__(self, recordings: Recordings):
        self._recordings = recordings
        first = disk.manifest(recordings.places[0].folder)
        self.manifest: dict[str, Any] = {name: first.get(name) for name in disk.LAYOUT} | {"tasks": {}}
        for header in (found.header for found in recordings.places):
            self.manifest["tasks"][str(header["task"])] = {"instruction": header["instruction"]}

    def __len__(self) -> int:
        return len(self._recordings)

    def __getitem__(self, index: int) -> Episode:
        return self._recordings[index]


def open_folder(folder: pathlib.Path) -> disk.EpisodeSource | Joined:
    """Returns the episodes of an episode folder, or all recordings in a folder, in the order of their names.

    Raises:
      EpisodesError: recordings of several kinds, a folder among them that is none, or labels that are malformed.
    """
    if not folder.is_dir() or (folder / disk.MANIFEST).is_file() or not find_recordings(folder):
        return disk.EpisodeSource(folder)
    recordings = read_recordings(folder)
    if not len(recordings):
        raise disk.EpisodesError(f"{folder}: every recording in it is discarded; nothing is left to write.")
    return Joined(recordings)


def write(
    source: disk.EpisodeSource | Joined,
    out: pathlib.Path,
    *,
    fps: int = 20,
    video: bool = False,
    executed: bool = False,
    robot: str = "panda",
) -> dict[str, Any]:
    """Writes the data set, whole or not at all, and returns its ``info.json``.

    Args:
      source: the episodes.
      out: the folder.
      fps: control steps in a second; LIBERO has 20.
      video: films instead of pictures.
      executed: the actions that led to the frames, instead of those to imitate.
      robot: its name in ``info.json``; LIBERO's arm is a Panda.

    Raises:
      EpisodesError: ``out`` is there.
    """
    if out.exists():
        raise disk.EpisodesError(f"{out} exists already; name another folder.")
    fresh = fresh_folder(out.expanduser().absolute())
    tasks = {int(number): facts["instruction"] for number, facts in source.manifest["tasks"].items()}
    # Tasks are numbered without gaps there, and ours may have any numbers.
    order = {number: index for index, number in enumerate(sorted(tasks))}
    listing: list[dict[str, Any]] = []
    sums: dict[str, list[np.ndarray]] = {STATE: [], ACTION: [], IMAGE: [], WRIST: []}
    try:
        for file in tqdm(range(-(-len(source) // EACH)), desc=out.name, unit="file"):
            # A file at a time: all episodes at once would not fit in memory.
            part = range(file * EACH, min((file + 1) * EACH, len(source)))
            episodes = [source[index] for index in part]
            if executed:
                episodes = [dataclasses.replace(episode, label_SA=episode.action_SA) for episode in episodes]
            _write_file(fresh, episodes, file, order, listing, sums, fps, video)
        info = _info(source, listing, len(tasks), fps, video) | {"robot_type": robot}
        _write_meta(fresh, info, listing, [tasks[number] for number in sorted(tasks)], sums)
        replace_folder(fresh, out.expanduser().absolute())
    finally:
        drop_folder(fresh)
    return info


def _write_file(
    folder: pathlib.Path,
    episodes: Sequence[Episode],
    file: int,
    order: dict[int, int],
    listing: list[dict[str, Any]],
    sums: dict[str, list[np.ndarray]],
    fps: int,
    video: bool,
) -> None:
    """Writes one table and, with ``video``, a film of each camera; notes in ``listing`` where each episode lies."""
    at = {"chunk_index": file // CHUNK, "file_index": file % CHUNK}
    columns: dict[str, list[Any]] = {}
    films: dict[str, list[np.ndarray]] = {}
    frames = 0  # in the films of this file, before the episode
    for episode in episodes:
        number, first = len(listing), sum(line["length"] for line in listing)
        steps = len(episode.label_SA)
        for name, column in _columns(episode, number, first, order[episode.task], fps).items():
            columns.setdefault(name, []).extend(column)
        line: dict[str, Any] = {"episode_index": number, "tasks": [episode.instruction], "length": steps}
        line |= {"dataset_from_index": first, "dataset_to_index": first + steps}
        line |= {f"data/{key}": value for key, value in at.items()}
        # The listing of all episodes is one file, number 0 of folder 0.
        line |= {f"meta/episodes/{key}": 0 for key in at}
        for name, frame_SHWC in _cameras(episode):
            # Without the last frame, in which no action was chosen.
            films.setdefault(name, []).append(frame_SHWC[:-1])
            # A sample of the pixels: the statistics of all of them would need all of them at once.
            sums[name].append(frame_SHWC[::10, ::8, ::8].reshape(-1, 3) / 255.0)
            if video:
                line |= {f"videos/{name}/{key}": value for key, value in at.items()}
                line |= {f"videos/{name}/from_timestamp": frames / fps}
                line |= {f"videos/{name}/to_timestamp": (frames + steps) / fps}
        sums[ACTION].append(episode.label_SA)
        if episode.state_SD is not None:
            sums[STATE].append(episode.state_SD[:-1])
        listing.append(line)
        frames += steps
    for name, parts in films.items():
        if video:
            film(folder / VIDEO.format(**at, video_key=name), np.concatenate(parts), fps)
        else:
            columns[name] = [png(frame) for part in parts for frame in part]
    _save(folder / DATA.format(**at), columns)


def _columns(episode: Episode, number: int, first: int, task: int, fps: int) -> dict[str, list[Any]]:
    """Returns the columns of an episode's rows; the last frame has no action and no row."""
    steps = len(episode.label_SA)
    columns: dict[str, list[Any]] = {ACTION: episode.label_SA.tolist()}
    if episode.state_SD is not None:
        columns[STATE] = episode.state_SD[:-1].tolist()
    columns["timestamp"] = [step / fps for step in range(steps)]
    columns["frame_index"] = list(range(steps))
    columns["episode_index"], columns["task_index"] = [number] * steps, [task] * steps
    columns["index"] = list(range(first, first + steps))
    # What the action led to: the success of the frame after it.
    columns["next.reward"] = episode.success_S[1:].astype(float).tolist()
    columns["next.done"] = [step == steps - 1 for step in range(steps)]
    return columns


def _cameras(episode: Episode) -> Iterator[tuple[str, np.ndarray]]:
    yield IMAGE, episode.frame_SHWC
    if episode.wrist_SHWC is not None:
        yield WRIST, episode.wrist_SHWC


def _info(
    source: disk.EpisodeSource | Joined, listing: list[dict[str, Any]], tasks: int, fps: int, video: bool
) -> dict[str, Any]:
    """Returns the content of ``meta/info.json``."""
    facts = source.manifest
    kind = "video" if video else "image"
    features: dict[str, Any] = {}
    for name, shape in ((IMAGE, facts["frame"]), (WRIST, facts.get("wrist"))):
        if shape:
            features[name] = {"dtype": kind, "shape": shape, "names": ["height", "width", "channel"]}
            if video:
                about = {"height": shape[0], "width": shape[1], "channels": 3, "fps": fps, "codec": "h264"}
                about |= {"pix_fmt": "yuv420p", "is_depth_map": False}
                features[name]["info"] = {f"video.{key}": value for key, value in about.items()} | {"has_audio": False}
    if width := facts.get("state"):
        # Names for LIBERO's eight numbers only; of others we know nothing.
        names = list(STATE_NAMES) if width == len(STATE_NAMES) else None
        features[STATE] = {"dtype": "float32", "shape": [width], "names": names}
    features[ACTION] = {"dtype": "float32", "shape": [ACTION_DIM], "names": list(ACTION_NAMES)}
    # Columns that every data set of LeRobot has.
    kinds = dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64")
    for name, dtype in {"timestamp": "float32", "next.reward": "float32", "next.done": "bool", **kinds}.items():
        features[name] = {"dtype": dtype, "shape": [1], "names": None}
    return {
        "codebase_version": "v3.0",
        "total_episodes": len(listing),
        "total_frames": sum(line["length"] for line in listing),
        "total_tasks": tasks,
        "chunks_size": CHUNK,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 500,
        "fps": fps,
        "splits": {"train": f"0:{len(listing)}"},
        "data_path": DATA,
        "video_path": VIDEO if video else None,
        "features": features,
    }


def _write_meta(
    folder: pathlib.Path,
    info: dict[str, Any],
    listing: list[dict[str, Any]],
    tasks: Sequence[str],
    sums: dict[str, list[np.ndarray]],
) -> None:
    columns = {key: [line[key] for line in listing] for key in listing[0]}
    _save(folder / "meta/episodes/chunk-000/file-000.parquet", columns)
    # The reader wants the instructions as the index of a data frame, which this note makes of the column.
    named = {"task_index": ("int64", "int64"), "task": ("unicode", "object")}
    fields = [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpys, "metadata": None}
        for name, (kind, numpys) in named.items()
    ]
    note = {"index_columns": ["task"], "column_indexes": [], "columns": fields, "pandas_version": "2.0.0"}
    table = pa.table({"task_index": list(range(len(tasks))), "task": list(tasks)})
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(note)}), folder / "meta/tasks.parquet")
    stats = {name: _stats(parts, name in (IMAGE, WRIST)) for name, parts in sums.items() if parts}
    write_json(folder / "meta/stats.json", stats, indent=None)
    write_json(folder / "meta/info.json", info, indent=4)


def _stats(parts: Sequence[np.ndarray], picture: bool) -> dict[str, list[Any]]:
    # Sums over millions of rows lose digits in float32.
    rows = np.concatenate(parts).astype(np.float64)
    stats = {"min": rows.min(0), "max": rows.max(0), "mean": rows.mean(0), "std": rows.std(0)}
    # Pictures have their statistics by channel, in the shape that broadcasts against (channel, height, width).
    shape = (3, 1, 1) if picture else (-1,)
    return {name: value.reshape(shape).tolist() for name, value in stats.items()} | {"count": [len(rows)]}


def png(frame_HWC: np.ndarray) -> dict[str, Any]:
    """Encodes a picture as the cell of a table."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frame_HWC).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def film(path: pathlib.Path, frame_SHWC: np.ndarray, fps: int) -> None:
    """Writes an H.264 film, pixel for pixel.

    Raises:
      EpisodesError: a side is odd.
    """
    _, height, width, _ = frame_SHWC.shape
    if height % 2 or width % 2:
        raise disk.EpisodesError(
            f"{path.name}: expected frames with even sides, which H.264 halves for colour, got {height} x {width}; "
            "write pictures, without --video."
        )
    # A key frame in every second frame: readers of training data jump about, and decode from the last key frame.
    pixels.encode(path, frame_SHWC, "libx264", "yuv420p", fps, pixels.X264 | {"g": "2"})


def _save(path: pathlib.Path, columns: dict[str, list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without types pyarrow would take Python's floats for float64, and info.json says float32.
    typed: dict[str, Any] = {}
    for name, column in columns.items():
        if name in (STATE, ACTION):
            typed[name] = pa.array(column, pa.list_(pa.float32()))
        elif name in ("timestamp", "next.reward"):
            typed[name] = pa.array(column, pa.float32())
        else:
            typed[name] = pa.array(column)
    pq.write_table(pa.table(typed), path)


def main() -> None:
    """Reads episodes and writes a LeRobot data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=place, help="episode folder, or a folder of recordings")
    parser.add_argument("--out", type=place, required=True, help="folder to write")
    parser.add_argument("--fps", type=int, default=20, help="control steps in a second (default 20, LIBERO's)")
    parser.add_argument("--video", action="store_true", help="films instead of pictures")
    parser.add_argument("--executed", action="store_true", help="actions as executed, instead of those to imitate")
    parser.add_argument("--robot", default="panda", help="name of the robot in info.json (default panda, LIBERO's)")
    args = parser.parse_args()
    how = {"fps": args.fps, "video": args.video, "executed": args.executed, "robot": args.robot}
    try:
        info = write(open_folder(args.folder), args.out, **how)
    except (disk.EpisodesError, InUseError, OSError) as error:
        sys.exit(str(error))
    print(f"{args.out}: {info['total_episodes']} episodes, {info['total_frames']} frames, {info['total_tasks']} tasks")


if __name__ == "__main__":
    main()
