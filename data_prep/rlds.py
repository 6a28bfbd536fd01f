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
    """The shards of a data set and how many episodes each holds by its own description.

    Raises:
      SourceError: no data set, or shards that are missing.
    """
    if not (folder / "features.json").is_file():
        raise SourceError(f"{folder}: no RLDS data set (features.json is missing); name the folder of its version.")
    files = sorted(folder.glob(SHARDS))
    lengths = _lengths(folder)
    if lengths and len(files) != len(lengths):
        raise SourceError(f"{folder}: {len(files)} shards, and dataset_info.json speaks of {len(lengths)}.")
    if not files:
        raise SourceError(f"{folder}: no files {SHARDS}.")
    return list(zip(files, lengths or [-1] * len(files), strict=True))


def _lengths(folder: pathlib.Path) -> list[int]:
    """Episodes of each shard, of all splits, by their alphabetical order; nothing without a description."""
    path = folder / "dataset_info.json"
    if not path.is_file():
        return []
    try:
        splits = read_json(path).get("splits", [])
        return [int(n) for split in sorted(splits, key=lambda one: one["name"]) for n in split["shardLengths"]]
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{path}: not a description of a data set ({type(error).__name__}: {error}).") from error


def records(path: pathlib.Path) -> Iterator[bytes]:
    """The records of a TFRecord file: length (8 bytes), its checksum (4), content, its checksum (4).

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
    """TFRecord's checksum of a few bytes: CRC-32C, rotated and shifted."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 & -(crc & 1))
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def features(folder: pathlib.Path) -> Any:
    """What a record holds, by the data set's own ``features.json``."""
    import tensorflow_datasets as tfds

    try:
        return tfds.features.FeaturesDict.from_config(str(folder))
    except Exception as error:  # a damaged description fails in every way there is
        raise SourceError(f"{folder / 'features.json'}: cannot be read ({type(error).__name__}: {error}).") from error


def read(shard: tuple[pathlib.Path, int]) -> Iterator[Demo]:
    """The episodes of a shard.

    Raises:
      SourceError: naming shard and record, when something is missing or damaged, or episodes are missing.
    """
    path, expected = shard
    layout, found = features(path.parent), 0
    for number, content in enumerate(records(path)):
        yield demo(content, layout, f"{path.name}, record {number}")
        found += 1
    if expected not in (-1, found):
        raise SourceError(f"{path.name}: {found} episodes, dataset_info.json counts {expected}; cut short?")


def demo(content: bytes, layout: Any, name: str) -> Demo:
    """One record."""
    try:
        steps = list(layout.deserialize_example_np(content)["steps"])
        seen = [step["observation"] for step in steps]
        wrist = np.stack([one["wrist_image"] for one in seen]) if "wrist_image" in seen[0] else None
        return Demo(
            name=name,
            frame_THWC=np.stack([one["image"] for one in seen]),
            action_TA=np.stack([step["action"] for step in steps]),
            success_T=np.array([step["reward"] for step in steps]) > 0,
            instruction=text(steps[0]["language_instruction"]),
            wrist_THWC=wrist,
            state_TD=np.stack([one["state"] for one in seen]) if "state" in seen[0] else None,
        )
    except SourceError:
        raise
    except (KeyError, IndexError) as error:
        raise SourceError(f"{name}: {error} is missing.") from error
    except Exception as error:  # of protobuf or of the picture
        raise SourceError(f"{name}: damaged ({type(error).__name__}: {error}).") from error


def text(value: Any) -> str:
    """Text that may come as bytes."""
    return (value.decode() if isinstance(value, bytes) else str(value)).strip()


def instructions(found: list[tuple[pathlib.Path, int]]) -> list[str]:
    """Every instruction of the data set, by one pass over its records that decodes a first step only."""
    layout, known = features(found[0][0].parent), set()
    for path, _ in found:
        for number, content in enumerate(records(path)):
            try:
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
        found = shards(args.source)
        asked = [] if args.tasks else instructions(found)
        convert.run(args, [(path.name, (path, length)) for path, length in found], read, asked, "RLDS")
    except (SourceError, EpisodesError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
