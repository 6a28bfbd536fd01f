"""LeRobot data sets, versions 2.x and 3.0, to episodes; neither lerobot nor torch is imported.

    python -m data_prep.lerobot libero_spatial_image --out data/spatial
    python -m data_prep.lerobot my_set --image observation.images.front --wrist none --out data/mine

A folder holds ``meta/info.json``, tables in ``data/`` (parquet) and, for cameras of kind ``video``, mp4 files in
``videos/``; a camera of kind ``image`` lies in the tables. Version 2 has one table and one video an episode; version 3
puts many into one file and lists in ``meta/episodes/`` where each begins.

The camera on the table is the first that is not called wrist, hand, gripper or ``image2``; the one in the hand is the
first that is. Columns and conventions differ between data sets: look at the table that is printed, and at some frames.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import imageio_ffmpeg
import numpy as np
import pyarrow.parquet as pq

from data_prep import convert
from data_prep.demos import Demo, SourceError
from wovr_jax.core.disk import read_json
from wovr_jax.data.episodes import EpisodesError
from wovr_jax.types import ACTION_DIM

HAND = re.compile(r"wrist|hand|gripper|image2")
SUCCESS = ("next.success", "next.reward", "next.done")
"""Columns that tell of success, best first."""


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns of a data set are read.

    Attributes:
      image, wrist: cameras; ``wrist`` may be None.
      state, action: vectors; ``state`` may be None.
      success: of ``SUCCESS``, or None: then the last step of every episode counts as one.
    """

    image: str
    wrist: str | None
    state: str | None
    action: str
    success: str | None


@dataclasses.dataclass(frozen=True)
class Record:
    """Where an episode lies.

    Attributes:
      index: its number.
      length: its frames.
      table: parquet file.
      videos: camera -> (mp4 file, seconds at which the episode begins in it).
    """

    index: int
    length: int
    table: pathlib.Path
    videos: dict[str, tuple[pathlib.Path, float]]


class DataSet:
    """An open data set.

    Args:
      folder: with ``meta/``.
      columns: name of a column for ``image``, ``wrist``, ``state``, ``action``; ``"none"`` for no wrist or state; found
        by name where it is not given.

    Raises:
      SourceError: another format or version, or columns that are not there.
    """

    def __init__(self, folder: pathlib.Path, **columns: str | None):
        self.folder, self.info = folder, _json(folder / "meta" / "info.json")
        self.version = str(self.info.get("codebase_version", "?"))
        if self.version.split(".")[0] not in ("v2", "v3"):
            raise SourceError(f"{folder}: LeRobot version {self.version!r}; read are v2.x and v3.0.")
        self.features, self.fps = self.info["features"], float(self.info["fps"])
        self.columns = choose(self.features, columns, str(folder))
        self.tasks = self._tasks()

    @property
    def cameras(self) -> tuple[str, ...]:
        """The names of the cameras that are read."""
        return tuple(filter(None, (self.columns.image, self.columns.wrist)))

    def records(self) -> list[Record]:
        """Returns where every episode lies, in the order of their numbers.

        Raises:
          SourceError: when there are not as many as the description says.
        """
        records = sorted(self._records(), key=lambda record: record.index)
        if len(records) != self.info["total_episodes"] or not records:
            raise SourceError(
                f"{self.folder}: {len(records)} episodes listed, info.json counts {self.info['total_episodes']}."
            )
        return records

    def _tasks(self) -> dict[int, str]:
        """Returns the instruction of each task number."""
        if self.version.startswith("v2"):
            return {line["task_index"]: line["task"] for line in _lines(self.folder / "meta" / "tasks.jsonl")}
        table = _table(self.folder / "meta" / "tasks.parquet")
        # The instruction is the index of a data frame, which keeps no name of its own.
        name = next(name for name in table if name != "task_index")
        return dict(zip(table["task_index"], table[name], strict=True))

    def _records(self) -> Iterator[Record]:
        """Yields where each episode lies, in the order of the listing."""
        table, video = self.info["data_path"], self.info.get("video_path") or ""
        moving = [name for name in self.cameras if self.features[name]["dtype"] == "video"]
        if self.version.startswith("v2"):
            for line in _lines(self.folder / "meta" / "episodes.jsonl"):
                index = line["episode_index"]
                at = {"episode_chunk": index // self.info["chunks_size"], "episode_index": index}
                videos = {name: (self.folder / video.format(**at, video_key=name), 0.0) for name in moving}
                yield Record(index, line["length"], self.folder / table.format(**at), videos)
            return
        # Version 3: several episodes share a file, and a video tells by time where each begins.
        for path in sorted((self.folder / "meta" / "episodes").rglob("*.parquet")):
            rows = _table(path)
            for i, index in enumerate(rows["episode_index"]):
                videos = {}
                for name in moving:
                    at = {key: rows[f"videos/{name}/{key}"][i] for key in ("chunk_index", "file_index")}
                    begins = float(rows[f"videos/{name}/from_timestamp"][i])
                    videos[name] = (self.folder / video.format(**at, video_key=name), begins)
                # The table and the videos of one episode are numbered apart.
                at = {key: rows[f"data/{key}"][i] for key in ("chunk_index", "file_index")}
                yield Record(index, rows["length"][i], self.folder / table.format(**at), videos)

    def read(self, records: list[Record]) -> Iterator[Demo]:
        """Yields the episodes of one table.

        Raises:
          SourceError: naming file and episode, when something is missing or damaged.
        """
        table = _table(records[0].table)
        # A table of version 3 holds several episodes, one after another.
        number_T = np.asarray(table.get("episode_index", []))
        for record in records:
            yield self._demo(record, table, np.flatnonzero(number_T == record.index))

    def _demo(self, record: Record, table: dict[str, list[Any]], rows: np.ndarray) -> Demo:
        """Reads one episode from its rows of a table."""
        name, wanted = f"{record.table.name}, episode {record.index}", self.columns
        # The listing and the table are written apart, and a copy may lack the end of one.
        if len(rows) != record.length:
            raise SourceError(f"{name}: {len(rows)} rows, its listing counts {record.length}; cut short?")
        lacking = [key for key in (wanted.action, "task_index") if key not in table]
        if lacking:
            raise SourceError(f"{name}: column {lacking[0]} is missing.")

        def column(key: str) -> list[Any]:
            return [table[key][row] for row in rows]

        # Without a column that tells, a demonstration is taken to end in success, at its last step.
        success_T = np.eye(len(rows), dtype=bool)[-1]
        if wanted.success:
            success_T = np.array(column(wanted.success), np.float32).reshape(len(rows), -1)[:, 0] > 0
        return Demo(
            name=name,
            frame_THWC=self._frames(wanted.image, record, table, rows, name),
            action_TA=np.array(column(wanted.action), np.float64),
            success_T=success_T,
            instruction=self.tasks[column("task_index")[0]],
            wrist_THWC=self._frames(wanted.wrist, record, table, rows, name) if wanted.wrist else None,
            state_TD=np.array(column(wanted.state), np.float64) if wanted.state else None,
        )

    def _frames(
        self, camera: str, record: Record, table: dict[str, list[Any]], rows: np.ndarray, name: str
    ) -> np.ndarray:
        # Pictures lie in the rows of the table, videos in files of their own.
        if camera in record.videos:
            path, begins = record.videos[camera]
            return video_frames(path, round(begins * self.fps), len(rows), name)
        if camera not in table:
            raise SourceError(f"{name}: camera {camera} is missing.")
        return np.stack([picture(table[camera][row], name) for row in rows])


def choose(features: dict[str, Any], given: dict[str, str | None], where: str) -> Columns:
    """Returns the columns that are named in ``given``, else those that their own names give away.

    Raises:
      SourceError: a column that is not there, or actions of another number of dimensions.
    """
    cameras = [name for name, feature in features.items() if feature["dtype"] in ("image", "video")]
    # Names are all there is to tell cameras by; whoever knows better names the column.
    outside = [name for name in cameras if not HAND.search(name)]
    inside = [name for name in cameras if HAND.search(name)]

    def pick(role: str, likely: list[str], needed: bool) -> str | None:
        name = given.get(role) or (likely[0] if likely else "none")
        if name == "none" and not needed:
            return None
        if name not in features:
            raise SourceError(f"{where}: no column {name!r} for the {role}; there are {', '.join(features)}.")
        return name

    # The names of LeRobot itself first, then those of older conversions.
    vectors = {role: [name for name in names if name in features] for role, names in _VECTORS.items()}
    action = pick("action", vectors["action"], True)
    # Two arms or joint angles have another number; nothing here could make sense of them.
    if features[action]["shape"] != [ACTION_DIM] and tuple(features[action]["shape"]) != (ACTION_DIM,):
        raise SourceError(f"{where}: {action} has shape {features[action]['shape']}, expected {ACTION_DIM} numbers.")
    return Columns(
        image=pick("image", outside, True) or "",
        wrist=pick("wrist", inside, False),
        state=pick("state", vectors["state"], False),
        action=action or "",
        success=next((name for name in SUCCESS if name in features), None),
    )


_VECTORS = {"state": ("observation.state", "state"), "action": ("action", "actions")}


def picture(cell: Any, name: str) -> np.ndarray:
    """Decodes a frame that lies in a table as an encoded picture."""
    from PIL import Image  # part of an extra; data sets with videos do without

    try:
        return np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB"))
    except Exception as error:  # a damaged picture fails in every way there is
        raise SourceError(f"{name}: a picture is damaged ({type(error).__name__}: {error}).") from error


def video_frames(path: pathlib.Path, first: int, count: int, name: str) -> np.ndarray:
    """Returns ``count`` frames of a video from number ``first`` on.

    Raises:
      SourceError: no such file, or fewer frames.
    """
    if not path.is_file():
        raise SourceError(f"{name}: {path.name} is missing.")
    # Frames are counted from the beginning of the file: seeking by time may land one beside the right one.
    wanted = ["-vf", f"select=gte(n\\,{first})", "-fps_mode", "passthrough", "-frames:v", str(count)]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), *wanted]
    # PPM: three lines of text with the size, then the pixels.
    done = subprocess.run([*command, "-f", "image2pipe", "-c:v", "ppm", "-"], capture_output=True, check=False)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
        raise SourceError(f"{name}: {path.name} is damaged ({lines[-1]}).")
    frames, at = [], 0
    while at < len(done.stdout):
        # The header of a frame is read line by line: the pixels behind it may hold any byte.
        end = at
        for _ in range(3):
            end = done.stdout.index(b"\n", end) + 1
        width, height = map(int, done.stdout[at:end].split()[1:3])
        at = end + height * width * 3
        frames.append(np.frombuffer(done.stdout[end:at], np.uint8).reshape(height, width, 3))
    if len(frames) < count:
        raise SourceError(f"{name}: {path.name} ends after {len(frames)} of its {count} frames.")
    return np.stack(frames)


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except FileNotFoundError:
        raise SourceError(f"{path}: missing; this is no LeRobot data set.") from None
    except ValueError as error:
        raise SourceError(f"{path}: not JSON ({error}).") from error


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line]
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: missing or damaged ({error}).") from error


def _table(path: pathlib.Path) -> dict[str, list[Any]]:
    try:
        return pq.read_table(path).to_pydict()
    except Exception as error:  # pyarrow's own, and the system's
        raise SourceError(f"{path}: missing or damaged ({type(error).__name__}: {error}).") from error


def main() -> None:
    """Reads a LeRobot data set and writes episodes."""
    parser = convert.parser(__doc__, rotation="none", gripper="environment", actor="human")
    for role in ("image", "wrist", "state", "action"):
        parser.add_argument(f"--{role}", metavar="COLUMN", help=f"of the {role}; default: found by its name")
    args = parser.parse_args()
    try:
        data = DataSet(args.source, image=args.image, wrist=args.wrist, state=args.state, action=args.action)
        # A table is a source: it is read once for all its episodes, and an interruption costs one.
        tables: dict[pathlib.Path, list[Record]] = {}
        for record in data.records():
            tables.setdefault(record.table, []).append(record)
        sources = [(path.relative_to(args.source).as_posix(), records) for path, records in tables.items()]
        convert.run(args, sources, data.read, list(data.tasks.values()), f"LeRobot {data.version}")
    except (SourceError, EpisodesError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
