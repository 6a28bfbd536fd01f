"""The recipe of a run folder, whichever version wrote it; for those who look at finished runs. Training does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wovr_jax.core import config
from wovr_jax.run.recipe import RETIRED, Recipe, contradictions, modernise


def read_recipe(settings: Mapping[str, Any]) -> Recipe:
    """Returns the recipe of a run folder's ``config.json``, whichever version wrote it.

    Raises:
      ConfigError: settings that do not fit, or a retired one that contradicts its successor.
    """
    if against := contradictions(settings, settings):
        name, (there, now) = next(iter(against.items()))
        raise config.ConfigError(f"config.{name}: {there!r} contradicts {RETIRED[name]}={now!r}.")
    return config.from_dict(Recipe, modernise(settings))
