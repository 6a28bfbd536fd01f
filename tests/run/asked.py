"""Settings of configs/pace.py for the tests of this folder."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

from configs import pace as presets
from wovr_jax.core import config
from wovr_jax.run.recipe import Recipe


@functools.cache
def _settings(preset: str = "") -> dict[str, Any]:
    """The whole configuration of configs/pace.py, as it is written into a run folder."""
    return config.to_dict(config.from_dict(Recipe, json.loads(presets.get_config(preset).to_json())))


def changed(preset: str = "", **changes: Any) -> dict[str, Any]:
    """Settings with some of them replaced; two underscores in a name are a dot."""
    settings = copy.deepcopy(_settings(preset))
    for path, value in changes.items():
        *groups, name = path.split("__")
        group = settings
        for part in groups:
            group = group[part]
        group[name] = value
    return settings
