"""Episode folders of several small shards."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from typing import Any

import pytest

from wovr_jax.data import episodes as disk
from wovr_jax.types import Episode


def write_shards(folder: pathlib.Path, episodes: Iterable[Episode], per_shard: int, **options: Any) -> dict[str, Any]:
    """Does as ``disk.write``, with so few episodes in a shard."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "PER_SHARD", per_shard)
        return disk.write(folder, episodes, **options)
