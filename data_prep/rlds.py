"""RLDS data sets of LIBERO, as OpenVLA publishes them, to episodes.

    python -m data_prep.rlds modified_libero_rlds/libero_spatial_no_noops/1.0.0 --out data/spatial

A folder holds ``features.json``, ``dataset_info.json`` and shards ``*.tfrecord-00000-of-00016``; one record is one
episode, whose steps have ``observation/{image, wrist_image, state}``, ``action``, ``reward`` and
``language_instruction``. Read without TensorFlow: tensorflow-datasets parses the records, the shards are read here.

Frames in these sets are turned by 180 degrees already, no-ops are gone, and the gripper is stored as the simulator
takes it, -1 open and +1 closed (OpenVLA's loader turns it into 1 and 0 later). Frames come before their actions.
"""

from __future__ import annotations

import contextlib
import pathlib
import re
import struct
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_prep import checksums, convert, files
from data_prep.beliefs import Told
from data_prep.demos import Demo, SourceError, Stream, find_success
from wovr_jax.core.disk import InUseError, read_json
from wovr_jax.data.episodes import EpisodesError

SHARDS = "*.tfrecord*"
ENDING = re.compile(r"\.tfrecord-(\d+)-of-(\d+)$")
"""How the name of a shard ends: its number, and how many there are."""


def shards(folder: pathlib.Path, told: Told | None = None) -> list[tuple[pathlib.Path, int]]:
    """Returns the shards of a data set and how many episodes each holds by its own description, -1 without one.

    Args:
      folder: of a version of the data set.
      told: takes what is believed of the set, and shards that are missing; without it a missing one is refused.

    Raises:
      SourceError: no data set, or shards that are missing.
    """
    if not (folder / "features.json").is_file():
        found = files.nearby(folder, lambda path: path.name == "features.json", "a data set")
        raise SourceError(f"{folder}: no RLDS data set (features.json is missing): {found}.")
    files.check(folder / "features.json", "a description of features")
    found = {path.name: path for path in sorted(folder.glob(SHARDS)) if ENDING.search(path.name)}
    if not found:
        raise SourceError(f"{folder}: no files {SHARDS}; {files.nearby(folder, _is_shard, 'a shard')}.")
    lengths, given = _lengths(folder), told or Told()
    # What the names of those that are there say of the others: 00000-of-00016.
    for name in list(found):
        (match,) = ENDING.finditer(name)
        for number in range(int(match[2])):
            found.setdefault(f"{name[: match.start(1)]}{number:0{len(match[1])}d}{name[match.end(1) :]}", folder)
    counts: dict[str, int] = {}
    for split, each in lengths.items():
        names = sorted(name for name in found if re.search(rf"(^|-){re.escape(split)}\.tfrecord", name))
        # A download that was interrupted lacks whole files, and those that are there look fine.
        if len(names) != len(each):
            given.problems.append(
                f"{folder}: {len(names)} shards of {split!r}, and dataset_info.json speaks of {len(each)}."
            )
        else:
            counts |= dict(zip(names, each, strict=True))
    missing = sorted(name for name, path in found.items() if path == folder)
    if missing:
        given.problems.append(
            f"{folder}: {len(found) - len(missing)} shards, and there should be {len(found)}: {missing[0]} is missing"
            f"{'' if len(missing) == 1 else ' and others'}; fetch it again."
        )
    if given.problems and told is None:
        raise SourceError("\n".join(given.problems))
    names = sorted(set(found) - set(missing))
    splits = sorted({name.split(".tfrecord")[0].rpartition("-")[2] for name in names})
    given.facts["splits"] = ", ".join(splits)
    if set(splits) - {"train"} and len(splits) > 1:
        given.warnings.append(f"episodes of all splits are taken together: {', '.join(splits)}.")
    if not lengths:
        given.warnings.append("dataset_info.json does not count the episodes, so that none is known to be missing.")
    return [(found[name], counts.get(name, -1)) for name in names]


def _is_shard(path: pathlib.Path) -> bool:
    return bool(ENDING.search(path.name))


def _lengths(folder: pathlib.Path) -> dict[str, list[int]]:
    """Returns the episodes of each shard of each split; nothing without a description."""
    path = folder / "dataset_info.json"
    if not path.is_file():
        return {}
    files.check(path, "a description of a data set")
    try:
        splits = read_json(path).get("splits", [])
        return {str(split["name"]): [int(count) for count in split["shardLengths"]] for split in splits}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{path}: not a description of a data set ({type(error).__name__}: {error}).") from error


def records(path: pathlib.Path) -> Iterator[bytes | SourceError]:
    """Yields the records of a TFRecord file: length (8 bytes), its checksum (4), content, its checksum (4).

    In the place of a record whose content is not the one that its checksum was made of stands the error that says so.

    Raises:
      SourceError: a file that ends within a record, or whose framing is damaged: no record after it can be found.
    """
    files.check(path, "a TFRecord file")
    with path.open("rb") as file:
        number = 0
        while head := file.read(12):
            name = f"{path.name}, record {number}"
            if len(head) < 12 or struct.unpack("<I", head[8:])[0] != checksums.masked_crc(head[:8]):
                raise SourceError(f"{name}: damaged or cut short, here the file stops making sense; copy it again.")
            (length,) = struct.unpack("<Q", head[:8])
            content = file.read(length)
            tail = file.read(4)
            if len(content) < length or len(tail) < 4:
                raise SourceError(f"{name}: cut short, {len(content)} of {length} bytes; copy the file again.")
            if struct.unpack("<I", tail)[0] != checksums.masked_crc(content):
                yield SourceError(f"{name}: damaged, its checksum is not that of its content; copy the file again.")
            else:
                yield content
            number += 1


def features(folder: pathlib.Path) -> Any:
    """Returns what a record holds, by the data set's own ``features.json``."""
    import tensorflow_datasets as tfds  # takes seconds, and a wrong folder is found without it

    try:
        return tfds.features.FeaturesDict.from_config(str(folder))
    except Exception as error:  # a damaged description fails in every way there is
        raise SourceError(f"{folder / 'features.json'}: cannot be read ({type(error).__name__}: {error}).") from error


def read(shard: tuple[pathlib.Path, int]) -> Iterator[Demo | SourceError]:
    """Yields the episodes of a shard, and in the place of one that is damaged the error that says so.

    Raises:
      SourceError: naming shard and record, when the rest of the shard cannot be read.
    """
    path, expected = shard
    layout, count = features(path.parent), 0
    for number, content in enumerate(records(path)):
        count += 1
        if isinstance(content, SourceError):
            yield content
            continue
        try:
            yield demo(content, layout, f"{path.name}, record {number}")
        except SourceError as error:
            yield error
    # A file that ends between two records looks whole; only the description knows that one is missing.
    if expected not in (-1, count):
        yield SourceError(f"{path.name}: {count} episodes, dataset_info.json counts {expected}; cut short?")


def demo(content: bytes, layout: Any, name: str) -> Demo:
    """Decodes one record; its pictures are decoded when they are asked for."""
    steps = parse(content, layout, name)
    odd: list[str] = []
    try:
        views = [step["observation"] for step in steps]
        lacking = [key for key in ("image",) if key not in views[0]]
        if lacking:
            raise SourceError(f"{name}: 'image' is missing in its observations; there are {', '.join(views[0])}.")
        texts = {text(step["language_instruction"]) for step in steps}
        if len(texts) > 1:
            odd.append(f"its instruction changes from step to step ({', '.join(sorted(texts)[:3])})")
        # Every step but the ends says that it is none of them; anything else was cut or glued.
        ends = [
            (bool(step["is_first"]), bool(step["is_last"])) for step in steps if {"is_first", "is_last"} <= set(step)
        ]
        if ends and ends != [(t == 0, t == len(ends) - 1) for t in range(len(ends))]:
            odd.append("its marks of the first and the last step are not at its ends")
        return Demo(
            name=name,
            frame_THWC=pictures(views, "image", layout, name),
            action_TA=np.stack([step["action"] for step in steps]),
            success_T=find_success([step["reward"] for step in steps], name, odd),
            instruction=text(steps[0]["language_instruction"]),
            wrist_THWC=pictures(views, "wrist_image", layout, name) if "wrist_image" in views[0] else None,
            state_TD=np.stack([view["state"] for view in views]) if "state" in views[0] else None,
            odd=odd,
        )
    except SourceError:
        raise
    except (KeyError, IndexError) as error:
        raise SourceError(f"{name}: {error} is missing.") from error
    except Exception as error:  # of numbers that do not fit
        raise SourceError(f"{name}: damaged ({type(error).__name__}: {error}).") from error


def parse(content: bytes, layout: Any, name: str) -> list[dict[str, Any]]:
    """Returns the steps of a record; pictures stay encoded.

    Raises:
      SourceError: no such record.
    """
    import tensorflow_datasets as tfds

    try:
        seen = layout["steps"].feature["observation"]
        skipped = {key: tfds.decode.SkipDecoding() for key in seen if isinstance(seen[key], tfds.features.Image)}
        how = {"steps": {"observation": skipped}} if skipped else None
        return list(layout.deserialize_example_np(content, decoders=how)["steps"])
    except (KeyError, IndexError) as error:
        raise SourceError(f"{name}: {error} is missing.") from error
    except Exception as error:  # of protobuf
        raise SourceError(f"{name}: damaged ({type(error).__name__}: {error}).") from error


def pictures(views: list[dict[str, Any]], camera: str, layout: Any, name: str) -> Stream:
    """Returns the pictures of a camera, each decoded when it is asked for by the set's own description."""
    feature = layout["steps"].feature["observation"][camera]

    def make() -> Iterator[np.ndarray]:
        for view in views:
            try:
                pixels = np.asarray(view[camera])
                encoded = pixels.ndim == 0
                yield feature.decode_example_np(view[camera]) if encoded else pixels
            except Exception as error:  # a damaged picture fails in every way there is
                raise SourceError(f"{name}: damaged picture ({type(error).__name__}: {error}).") from error

    return Stream(len(views), make)


def text(value: Any) -> str:
    """Returns text, which may come as bytes, without blanks around it."""
    value = value.item() if isinstance(value, np.ndarray) else value
    return (value.decode("utf-8") if isinstance(value, bytes) else str(value)).strip()


def instructions(found: list[tuple[pathlib.Path, int]]) -> list[str]:
    """Returns every instruction of the data set, by one pass over its records; damaged ones are left to the reading."""
    layout, known = features(found[0][0].parent), set()
    for path, _ in found:
        try:
            for content in records(path):
                if isinstance(content, bytes):
                    with contextlib.suppress(SourceError, KeyError, IndexError, UnicodeDecodeError):
                        known.add(text(parse(content, layout, path.name)[0]["language_instruction"]))
        except SourceError:
            continue
    return sorted(known)


def main() -> None:
    """Reads an RLDS data set and writes episodes."""
    args = convert.parser(__doc__, rotation="none", gripper="environment", actor="human").parse_args()
    try:
        told = Told({"format": "RLDS", "success": "where the reward is 1", "frame rate": "not told by the format"})
        found = shards(args.source, told)
        layout, cameras = features(args.source), []
        with contextlib.suppress(KeyError):  # said of the first record, with its name
            cameras = [key for key in layout["steps"].feature["observation"].keys() if "state" not in key]  # noqa: SIM118
        left = [key for key in cameras if key not in ("image", "wrist_image")]
        taken = [key for key in cameras if key not in left]
        told.facts["cameras"] = f"{', '.join(taken) or 'none'}; left: {', '.join(left) or 'none'}"
        tasks = [] if args.tasks else instructions(found)
        convert.run(args, [(path.name, (path, length)) for path, length in found], read, tasks, "RLDS", told)
    except (SourceError, EpisodesError, InUseError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
