"""RLDS data sets of LIBERO, as OpenVLA publishes them, to episodes.

    python -m data_prep.rlds modified_libero_rlds/libero_spatial_no_noops/1.0.0 --out data/spatial

A folder holds ``features.json``, ``dataset_info.json`` and shards ``*.tfrecord-00000-of-00016``; one record is one
episode, whose steps have ``observation/{image, wrist_image, state}``, ``action``, ``reward`` and
``language_instruction``. Read without TensorFlow: tensorflow-datasets parses the records, the shards are read here.

Frames in these sets are turned by 180 degrees already, no-ops are gone, and the gripper is stored as the simulator
takes it, -1 open and +1 closed (OpenVLA's loader turns it into 1 and 0 later). Frames come before their actions.
"""

from __future__ import annotations

import pathlib
import struct
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_prep import convert
from data_prep.demos import Demo, SourceError
from wovr_jax.core.disk import read_json
from wovr_jax.data.episodes import EpisodesError

SHARDS = "*.tfrecord*"


def shards(folder: pathlib.Path) -> list[tuple[pathlib.Path, int]]:
    """Returns the shards of a data set and how many episodes each holds by its own description, -1 without one.

    Raises:
      SourceError: no data set, or shards that are missing.
    """
    if not (folder / "features.json").is_file():
        raise SourceError(f"{folder}: no RLDS data set (features.json is missing); name the folder of its version.")
    files = sorted(folder.glob(SHARDS))
    lengths = _lengths(folder)
    # A download that was interrupted lacks whole files, and those that are there look fine.
    if lengths and len(files) != len(lengths):
        raise SourceError(f"{folder}: {len(files)} shards, and dataset_info.json speaks of {len(lengths)}.")
    if not files:
        raise SourceError(f"{folder}: no files {SHARDS}.")
    return list(zip(files, lengths or [-1] * len(files), strict=True))


def _lengths(folder: pathlib.Path) -> list[int]:
    """Returns the episodes of each shard, split after split by alphabet; nothing without a description."""
    path = folder / "dataset_info.json"
    if not path.is_file():
        return []
    try:
        splits = read_json(path).get("splits", [])
        # By alphabet, since that is the order of the files; the description may list the splits in another one.
        return [int(n) for split in sorted(splits, key=lambda split: split["name"]) for n in split["shardLengths"]]
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{path}: not a description of a data set ({type(error).__name__}: {error}).") from error


def records(path: pathlib.Path) -> Iterator[bytes]:
    """Yields the records of a TFRecord file: length (8 bytes), its checksum (4), content, its checksum (4).

    The checksum of the length is checked, that of the content is not: in Python it would take longer than all the rest,
    and damage inside an episode mostly shows when its protocol buffer and its pictures are decoded. Compare the files'
    hashes with the publisher's where that is not enough.

    Raises:
      SourceError: a file that ends within a record, or whose framing is damaged.
    """
    with path.open("rb") as file:
        number = 0
        while head := file.read(12):
            if len(head) < 12 or struct.unpack("<I", head[8:])[0] != masked_crc(head[:8]):
                raise SourceError(f"{path.name}, record {number}: damaged or cut short.")
            (length,) = struct.unpack("<Q", head[:8])
            content = file.read(length)
            tail = file.read(4)
            if len(content) < length or len(tail) < 4:
                raise SourceError(f"{path.name}, record {number}: cut short, {len(content)} of {length} bytes.")
            yield content
            number += 1


def masked_crc(data: bytes) -> int:
    """Returns TFRecord's checksum of a few bytes: CRC-32C, rotated and shifted."""
    # Bit by bit, with the reflected polynomial of Castagnoli; eight bytes of length need no table.
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 & -(crc & 1))
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def features(folder: pathlib.Path) -> Any:
    """Returns what a record holds, by the data set's own ``features.json``."""
    import tensorflow_datasets as tfds  # takes seconds, and a wrong folder is found without it

    try:
        return tfds.features.FeaturesDict.from_config(str(folder))
    except Exception as error:  # a damaged description fails in every way there is
        raise SourceError(f"{folder / 'features.json'}: cannot be read ({type(error).__name__}: {error}).") from error


def read(shard: tuple[pathlib.Path, int]) -> Iterator[Demo]:
    """Yields the episodes of a shard.

    Raises:
      SourceError: naming shard and record, when something is missing or damaged, or episodes are missing.
    """
    path, expected = shard
    layout, count = features(path.parent), 0
    for number, content in enumerate(records(path)):
        yield demo(content, layout, f"{path.name}, record {number}")
        count += 1
    # A file that ends between two records looks whole; only the description knows that one is missing.
    if expected not in (-1, count):
        raise SourceError(f"{path.name}: {count} episodes, dataset_info.json counts {expected}; cut short?")


def demo(content: bytes, layout: Any, name: str) -> Demo:
    """Decodes one record."""
    try:
        # Pictures are decoded here too, by the data set's own description of its features.
        steps = list(layout.deserialize_example_np(content)["steps"])
        views = [step["observation"] for step in steps]
        wrist = np.stack([view["wrist_image"] for view in views]) if "wrist_image" in views[0] else None
        return Demo(
            name=name,
            frame_THWC=np.stack([view["image"] for view in views]),
            action_TA=np.stack([step["action"] for step in steps]),
            success_T=np.array([step["reward"] for step in steps]) > 0,
            instruction=text(steps[0]["language_instruction"]),
            wrist_THWC=wrist,
            state_TD=np.stack([view["state"] for view in views]) if "state" in views[0] else None,
        )
    except SourceError:
        raise
    except (KeyError, IndexError) as error:
        raise SourceError(f"{name}: {error} is missing.") from error
    except Exception as error:  # of protobuf or of the picture
        raise SourceError(f"{name}: damaged ({type(error).__name__}: {error}).") from error


def text(value: Any) -> str:
    """Returns text, which may come as bytes, without blanks around it."""
    return (value.decode() if isinstance(value, bytes) else str(value)).strip()


def instructions(files: list[tuple[pathlib.Path, int]]) -> list[str]:
    """Returns every instruction of the data set, by one pass over its records."""
    layout, known = features(files[0][0].parent), set()
    for path, _ in files:
        for number, content in enumerate(records(path)):
            try:
                # The first step is enough, and decoding it costs one picture of the episode's hundreds.
                first = next(iter(layout.deserialize_example_np(content)["steps"]))
                known.add(text(first["language_instruction"]))
            except Exception as error:  # of protobuf, or a name that is missing
                raise SourceError(
                    f"{path.name}, record {number}: damaged ({type(error).__name__}: {error})."
                ) from error
    return sorted(known)


def main() -> None:
    """Reads an RLDS data set and writes episodes."""
    args = convert.parser(__doc__, rotation="none", gripper="environment", actor="human").parse_args()
    try:
        files = shards(args.source)
        tasks = [] if args.tasks else instructions(files)
        convert.run(args, [(path.name, (path, length)) for path, length in files], read, tasks, "RLDS")
    except (SourceError, EpisodesError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
