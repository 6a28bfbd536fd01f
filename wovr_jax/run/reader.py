"""The recipe of a run folder, for those who look at finished runs. Training does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wovr_jax.core import config
from wovr_jax.run.recipe import Recipe


def read_recipe(settings: Mapping[str, Any]) -> Recipe:
    """Returns the recipe of a run folder's ``config.json``.

    Raises:
      ConfigError: settings that do not fit, or that this version does not know.
    """
    return config.from_dict(Recipe, settings)
