"""LeRobot data sets, versions 2.x and 3.0, to episodes; neither lerobot nor torch is imported.

    python -m data_prep.lerobot libero_spatial_image --out data/spatial
    python -m data_prep.lerobot my_set --image observation.images.front --wrist none --out data/mine

A folder holds ``meta/info.json``, tables in ``data/`` (parquet) and, for cameras of kind ``video``, mp4 files in
``videos/``; a camera of kind ``image`` lies in the tables. Version 2 has one table and one video an episode; version 3
puts many into one file and lists in ``meta/episodes/`` where each begins.

Rows are found by the number of their episode in all tables, as lerobot itself does: listings are written apart from the
tables, and are wrong about the file in sets that were converted or merged. Columns and conventions differ between sets
(:mod:`data_prep.columns`): read what was believed, and look at some frames.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep import convert, files
from data_prep.beliefs import Told
from data_prep.columns import SUCCESS, choose
from data_prep.demos import Demo, SourceError, Stream, collect, find_success
from data_prep.film import Film, rate
from data_prep.tables import fill, need, numbers, picture, read_json, read_table
from wovr_jax.core.disk import InUseError
from wovr_jax.data.episodes import EpisodesError


@dataclasses.dataclass(frozen=True)
class Record:
    """Where an episode lies.

    Attributes:
      index: its number.
      length: its frames.
      table: parquet file.
      videos: camera -> (mp4 file, seconds at which the episode begins in it).
      texts: its instructions by the listing.
      won: whether it succeeded by the listing; None where that does not say.
    """

    index: int
    length: int
    table: pathlib.Path
    videos: dict[str, tuple[pathlib.Path, float]]
    texts: tuple[str, ...] = ()
    won: bool | None = None


class DataSet:
    """An open data set.

    Args:
      folder: with ``meta/``.
      success: a column that tells of success, ``"last"`` where every episode succeeds at its end, ``"none"`` where none
        does; found where it is not given.
      columns: name of a column for ``image``, ``wrist``, ``state``, ``action``; ``"none"`` for no wrist or state; found
        by name where it is not given.

    Attributes:
      told: what is believed of the set, what looks odd, and what is missing.

    Raises:
      SourceError: another format or version, or columns that are not there.
    """

    def __init__(self, folder: pathlib.Path, success: str | None = None, **columns: str | None):
        self.folder, self.told = folder, Told()
        about = folder / "meta" / "info.json"
        if not about.is_file() and not about.is_symlink():
            found = files.nearby(folder, lambda path: (path / "info.json").is_file(), "a data set")
            raise SourceError(f"{folder}: meta/info.json is missing; this is no LeRobot data set: {found}.")
        self.info = read_json(about)
        self.version = str(self.info.get("codebase_version", "?"))
        if self.version.split(".")[0] not in ("v2", "v3"):
            raise SourceError(f"{folder}: LeRobot version {self.version!r}; read are v2.x and v3.0.")
        features = need(self.info, "features", dict, about)
        self.features = {name: need(features, name, dict, about) for name in features}
        self.fps = float(need(self.info, "fps", (int, float), about))
        if not 0 < self.fps < float("inf"):
            raise SourceError(f"{about}: fps is {self.fps:g}; expected frames in a second.")
        self.columns = choose(self.features, columns, str(folder), self.told)
        self.success = success
        self.tasks = self._tasks()
        self.films: dict[str, Film] = {}
        self._describe()

    @property
    def cameras(self) -> tuple[str, ...]:
        """The names of the cameras that are read."""
        return tuple(filter(None, (self.columns.image, self.columns.wrist)))

    def _describe(self) -> None:
        """Notes what the description says beside columns."""
        told, info = self.told, self.info
        told.facts |= {"format": f"LeRobot {self.version}", "robot": str(info.get("robot_type") or "not told")}
        told.facts["frame rate"] = f"{self.fps:g} frames in a second"
        for name in self.cameras:
            about = {**(self.features[name].get("video_info") or {}), **(self.features[name].get("info") or {})}
            fps = about.get("video.fps", about.get("fps"))
            if isinstance(fps, (int, float)) and abs(fps - self.fps) > 1e-3 * self.fps:
                told.warnings.append(f"{name} has {fps:g} frames in a second by its description, the set {self.fps:g}.")
        splits = info.get("splits") or {}
        told.facts["splits"] = ", ".join(splits) or "not told"
        if len(splits) > 1:
            told.warnings.append(f"episodes of all splits are taken together: {told.facts['splits']}.")

    def records(self) -> list[Record]:
        """Returns where every episode lies, in the order of their numbers, and decides what tells of success.

        What keeps single episodes out (no rows, no listing, a table that is damaged) is noted in ``told.problems``.

        Raises:
          SourceError: when no episode is listed.
        """
        listed: dict[int, Record] = {}
        for record in self._listed():
            if record.index in listed:
                self.told.problems.append(f"{self.folder}: episode {record.index} is listed twice.")
            listed.setdefault(record.index, record)
        if not listed:
            raise SourceError("\n".join([f"{self.folder}: no episodes are listed in meta/.", *self.told.problems]))
        counted = self.info.get("total_episodes")
        if counted != len(listed):
            self.told.problems.append(f"{self.folder}: {len(listed)} episodes listed, info.json counts {counted}.")
        elif self.info.get("total_frames") not in (None, sum(record.length for record in listed.values())):
            self.told.warnings.append(
                f"{sum(record.length for record in listed.values())} frames are listed, info.json counts "
                f"{self.info['total_frames']}."
            )
        return self._place(listed)

    def _place(self, listed: dict[int, Record]) -> list[Record]:
        """Returns the records with the tables in which their rows lie, as far as they lie in one."""
        tellers = [name for name, about in self.features.items() if _tells_success(name, about)]
        found: dict[int, pathlib.Path] = {}
        broken: dict[pathlib.Path, str] = {}
        yes: dict[str, set[int]] = {name: set() for name in tellers}
        # The tables that are named and those that are there; in sets that were merged by hand these are not the same.
        tables = {record.table for record in listed.values()} | set((self.folder / "data").rglob("*.parquet"))
        for path in sorted(tables):
            try:
                table = read_table(path, ["episode_index", *tellers])
                numbers_N = np.asarray(table.column("episode_index").to_pylist(), np.int64)
                for name in set(tellers) & set(table.column_names):
                    yes[name] |= set(numbers_N[numbers(table.column(name)) > 0].tolist())
            except (SourceError, KeyError, ValueError, TypeError) as error:
                broken[path] = str(error) if isinstance(error, SourceError) else f"{path}: no numbers of episodes in it"
                continue
            for index in np.unique(numbers_N).tolist():
                if index in found:
                    self.told.problems.append(f"episode {index} has rows in {found[index].name} and in {path.name}.")
                found.setdefault(index, path)
        self._settle_success(tellers, yes, listed)
        for path, message in broken.items():
            lost = [index for index, record in listed.items() if record.table == path and index not in found]
            which = f"; episodes {lost[0]} to {lost[-1]} are listed in it" if lost else ""
            self.told.problems.append(f"{message.rstrip('.')}{which}.")
        missing = [i for i, record in listed.items() if i not in found and record.table not in broken]
        self.told.problems += [f"episode {index}: listed, but no table holds rows of it." for index in missing]
        strange = sorted(set(found) - set(listed))
        if strange:
            self.told.problems.append(
                f"episodes {strange[:10]} have rows in {found[strange[0]].name}, and are not listed."
            )
        moved = [index for index, path in found.items() if index in listed and listed[index].table != path]
        if moved:
            self.told.warnings.append(
                f"{len(moved)} episodes lie in another table than the listing says, the first of them episode "
                f"{min(moved)} in {found[min(moved)].name}; the tables were believed."
            )
        return [dataclasses.replace(listed[i], table=found[i]) for i in sorted(set(found) & set(listed))]

    def _settle_success(self, tellers: list[str], yes: dict[str, set[int]], listed: dict[int, Record]) -> None:
        """Decides which column tells of success: the first that ever says yes."""
        told, facts = self.told, self.told.facts
        if self.success in ("last", "none"):
            self.columns = dataclasses.replace(self.columns, success=None)
            facts["success"] = "named: " + ("every episode, at its end" if self.success == "last" else "no episode")
            return
        if self.success:
            if self.success not in self.features:
                raise SourceError(f"{self.folder}: no column {self.success!r} for --success; there are {tellers}.")
            self.columns, facts["success"] = (
                dataclasses.replace(self.columns, success=self.success),
                "named: " + self.success,
            )
            return
        told_by = [name for name in tellers if name != SUCCESS[-1]]
        name = next((name for name in told_by if yes[name]), told_by[0] if told_by else None)
        self.columns = dataclasses.replace(self.columns, success=name)
        if name is not None:
            facts["success"] = f"column {name}, which says yes in {len(yes[name])} of {len(listed)} episodes"
            for other in told_by:
                if yes[other] != yes[name]:
                    told.warnings.append(
                        f"{other} says yes in {len(yes[other])} episodes and {name} in {len(yes[name])}; {name} was "
                        "believed, --success names another."
                    )
        elif any(record.won is not None for record in listed.values()):
            facts["success"] = "what the listing of episodes says, at the end of each"
        else:
            done = "; next.done only says that an episode ended" if SUCCESS[-1] in tellers else ""
            facts["success"] = "assumed: every episode, at its end"
            told.warnings.append(
                f"no column tells of success{done}: every episode is taken to succeed at its end (--success last says "
                "that you know, --success none that none does)."
            )

    def _tasks(self) -> dict[int, str]:
        """Returns the instruction of each task number."""
        if self.version.startswith("v2"):
            path = self.folder / "meta" / "tasks.jsonl"
            lines = self._lines(path)
            return {need(n, "task_index", int, path): need(n, "task", str, path).strip() for n in lines}
        path = self.folder / "meta" / "tasks.parquet"
        table = read_table(path).to_pydict()
        # The instruction is the index of a data frame, which keeps no name of its own.
        name = next((name for name, column in table.items() if column and isinstance(column[0], str)), None)
        if name is None or "task_index" not in table:
            raise SourceError(f"{path}: expected task_index and the instructions, got {', '.join(table) or 'nothing'}.")
        return {number: str(text or "").strip() for number, text in zip(table["task_index"], table[name], strict=True)}

    def _listed(self) -> Iterator[Record]:
        """Yields where each episode lies by the listing, in its order; what is damaged in it becomes a problem."""
        about = self.folder / "meta" / "info.json"
        moving = [name for name in self.cameras if self.features[name]["dtype"] == "video"]
        video = need(self.info, "video_path", str, about) if moving else ""
        size = self.info.get("chunks_size") or 1000
        if self.version.startswith("v2"):
            path = self.folder / "meta" / "episodes.jsonl"
            for line in self._lines(path):
                index = need(line, "episode_index", int, path)
                at = {"episode_chunk": index // size, "episode_index": index}
                yield self._record(index, line, at, dict.fromkeys(moving, (video, at, 0.0)), path)
            return
        # Version 3: several episodes share a file, and a video tells by time where each begins.
        for path in sorted((self.folder / "meta" / "episodes").rglob("*.parquet")):
            try:
                lines = read_table(path).to_pylist()
            except SourceError as error:
                self.told.problems.append(str(error))
                continue
            for line in lines:
                films = {}
                for name in moving:
                    at = {key: need(line, f"videos/{name}/{key}", int, path) for key in ("chunk_index", "file_index")}
                    films[name] = (video, at, need(line, f"videos/{name}/from_timestamp", (int, float), path))
                # The table and the videos of one episode are numbered apart.
                at = {key: need(line, f"data/{key}", int, path) for key in ("chunk_index", "file_index")}
                yield self._record(need(line, "episode_index", int, path), line, at, films, path)

    def _record(
        self, index: int, line: dict[str, Any], at: dict[str, int], films: dict[str, Any], path: pathlib.Path
    ) -> Record:
        """Returns the record of one line of a listing."""
        where = self.folder / "meta" / "info.json"
        table = fill(self.folder, need(self.info, "data_path", str, where), at, where)
        videos = {
            name: (fill(self.folder, pattern, {**place, "video_key": name}, where), float(begins))
            for name, (pattern, place, begins) in films.items()
        }
        # Some recorders note how an episode ended, in its line and nowhere else.
        won = next((line[key] for key in ("success", "is_success", "episode_success") if key in line), None)
        texts = tuple(str(text).strip() for text in line.get("tasks") or ())
        won = None if won is None else bool(won)
        return Record(index, need(line, "length", int, path), table, videos, texts, won)

    def read(self, records: list[Record]) -> Iterator[Demo | SourceError]:
        """Yields the episodes of one table, and in the place of one that cannot be read the error that says so.

        Raises:
          SourceError: naming the file, when the table itself cannot be read.
        """
        path, wanted = records[0].table, self.columns
        columns = [
            "episode_index",
            "frame_index",
            "timestamp",
            "task_index",
            wanted.action,
            wanted.state,
            wanted.success,
        ]
        table = read_table(path, [name for name in columns if name])
        still = [name for name in self.cameras if self.features[name]["dtype"] != "video"]
        # Encoded, as they lie in the file; each is decoded when its turn comes.
        pictures = read_table(path, still) if still else pa.table({})
        number_N = np.asarray(table.column("episode_index").to_pylist())
        for record in records:
            try:
                yield self._demo(record, table, pictures, np.flatnonzero(number_N == record.index))
            except SourceError as error:
                yield error

    def _demo(self, record: Record, table: pa.Table, pictures: pa.Table, rows: np.ndarray) -> Demo:
        """Reads one episode from its rows of a table."""
        name, wanted = f"{record.table.name}, episode {record.index}", self.columns
        odd: list[str] = []
        # The listing and the table are written apart, and a copy may lack the end of one.
        if len(rows) != record.length:
            raise SourceError(f"{name}: {len(rows)} rows, its listing counts {record.length}; cut short?")
        needed = filter(None, (wanted.action, "task_index", wanted.state, wanted.success))
        lacking = [key for key in needed if key not in table.column_names]
        if lacking:
            raise SourceError(f"{name}: column {lacking[0]} is missing.")
        if "frame_index" in table.column_names:
            frame_T = numbers(table.column("frame_index").take(rows))
            if not np.array_equal(np.sort(frame_T), np.arange(len(rows))):
                raise SourceError(
                    f"{name}: its frames are not numbered from 0 to {len(rows) - 1}; rows are lost or doubled."
                )
            # Merges by hand leave rows in any order; the number of the frame is what counts.
            if not np.array_equal(frame_T, np.arange(len(rows))):
                odd.append("its rows are not in the order of their frames, which was believed")
                rows = rows[np.argsort(frame_T)]

        def vectors(key: str) -> np.ndarray:
            try:
                return np.array(table.column(key).take(rows).to_pylist(), np.float64)
            except (ValueError, TypeError) as error:
                raise SourceError(f"{name}: {key} holds no rows of numbers ({error}).") from error

        if "timestamp" in table.column_names:
            time_T = vectors("timestamp").reshape(len(rows))
            if np.abs(time_T - time_T[0] - np.arange(len(rows)) / self.fps).max() > 0.5 / self.fps:
                odd.append(f"its timestamps do not keep {self.fps:g} frames in a second; frames were lost")
        tasks = sorted(set(table.column("task_index").take(rows).to_pylist()), key=str)
        if strange := [number for number in tasks if number not in self.tasks]:
            raise SourceError(
                f"{name}: its rows name task {strange[0]}, and meta/tasks lists {sorted(self.tasks)[:20]}; add the "
                "instruction there."
            )
        text = self.tasks[table.column("task_index")[int(rows[0])].as_py()]
        if len(tasks) > 1:
            odd.append(f"its task changes within it, from {text!r}")
        if record.texts and text not in record.texts:
            odd.append(f"its rows say {text!r} and its listing {record.texts[0]!r}")
        return Demo(
            name=name,
            frame_THWC=self._frames(wanted.image, record, pictures, rows, name, odd),
            action_TA=vectors(wanted.action),
            success_T=self._success(record, table, rows, name, odd),
            instruction=text,
            wrist_THWC=self._frames(wanted.wrist, record, pictures, rows, name, odd) if wanted.wrist else None,
            state_TD=vectors(wanted.state) if wanted.state else None,
            odd=odd,
        )

    def _success(self, record: Record, table: pa.Table, rows: np.ndarray, name: str, odd: list[str]) -> np.ndarray:
        """Returns (T,) bool, by the rule that was settled for the whole set."""
        if self.columns.success:
            return find_success(numbers(table.column(self.columns.success).take(rows)), name, odd)
        # Without a column that tells, a demonstration is taken to end in success, at its last step.
        won = self.success != "none" and (record.won is not False or self.success == "last")
        return np.eye(len(rows), dtype=bool)[-1] & won

    def _frames(
        self, camera: str, record: Record, pictures: pa.Table, rows: np.ndarray, name: str, odd: list[str]
    ) -> Stream:
        # Pictures lie in the rows of the table, videos in files of their own.
        if camera in record.videos:
            path, begins = record.videos[camera]
            return Stream(len(rows), lambda: self._film(camera, path).read(begins, len(rows), name, odd))
        if camera not in pictures.column_names:
            raise SourceError(f"{name}: camera {camera} is missing.")
        cells = pictures.column(camera)
        return Stream(len(rows), lambda: (picture(cells[int(i)].as_py(), name, self.folder) for i in rows))

    def _film(self, camera: str, path: pathlib.Path) -> Film:
        """Returns the film of a camera, which stays open as long as episodes come from it."""
        film = self.films.get(camera)
        if film is None or film.path != path:
            if film is not None:
                film.close()
            film = self.films[camera] = Film(path, self.fps)
        return film

    def _lines(self, path: pathlib.Path) -> list[dict[str, Any]]:
        """Returns the objects of a file that has one a line; a line that is none is a problem, not the end."""
        files.check(path, "a listing, one JSON object a line")
        made = []
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise SourceError(f"{path}: expected text in UTF-8 ({error}).") from error
        for number, line in enumerate(text.splitlines(), 1):
            try:
                if line.strip():
                    made.append(json.loads(line))
                    if not isinstance(made[-1], dict):
                        raise ValueError(f"{type(made.pop()).__name__} in place of an object")
            except ValueError as error:
                self.told.problems.append(f"{path}: line {number} is not JSON ({error}); half written?")
        return made


def video_frames(path: pathlib.Path, first: int, count: int, name: str) -> np.ndarray:
    """Returns ``count`` frames of a video from number ``first`` on, (count, H, W, 3) uint8.

    Raises:
      SourceError: no such file, or fewer frames.
    """
    fps = rate(path, name)
    film = Film(path, fps)
    try:
        frames = Stream(count, lambda: film.read(first / fps, count, name))
        return collect(frames, np.arange(count), "none", name)
    finally:
        film.close()


def _tells_success(name: str, about: Mapping[str, Any]) -> bool:
    # Recorders have columns of their own beside those of LeRobot.
    return name in SUCCESS or ("success" in name and list(about.get("shape") or [1]) == [1])


def main() -> None:
    """Reads a LeRobot data set and writes episodes."""
    parser = convert.parser(__doc__, rotation="none", gripper="environment", actor="human")
    for role in ("image", "wrist", "state", "action"):
        parser.add_argument(f"--{role}", metavar="COLUMN", help=f"of the {role}; default: found by its name")
    parser.add_argument("--success", metavar="COLUMN", help="that tells of it, or 'last' or 'none'; default: found")
    args = parser.parse_args()
    try:
        roles = {role: getattr(args, role) for role in ("success", "image", "wrist", "state", "action")}
        data = DataSet(args.source, **roles)
        # A table is a source: it is read once for all its episodes, and an interruption costs one.
        tables: dict[pathlib.Path, list[Record]] = {}
        for record in data.records():
            tables.setdefault(record.table, []).append(record)
        sources = [(path.relative_to(args.source).as_posix(), records) for path, records in tables.items()]
        chosen = {"columns": dataclasses.asdict(data.columns), "success": args.success}
        kind, tasks = f"LeRobot {data.version}", list(data.tasks.values())
        convert.run(args, sources, data.read, tasks, kind, data.told, chosen)
    except (SourceError, EpisodesError, InUseError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
