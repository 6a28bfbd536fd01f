"""What config files share: settings with dots, and presets.

A config file has one function, ``get_config(preset)``, that returns settings; a preset is a function that
changes them, so that two presets which differ by one line differ by one line of text::

    def get_config(preset: str = ""):
        settings = common.settings(job="pace", seed=0, rounds=2)
        return common.with_preset(settings, preset, {"short": short})


    def short(settings):
        settings.rounds = 1

On the command line: ``--config=configs/pace.py:short --config.rounds=3``. Several presets are written
``:short,rlinf`` and applied from left to right.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

Preset = Callable[[ConfigDict], None]


def settings(**values: Any) -> ConfigDict:
    """Makes settings by name; a dictionary becomes a nested group with dots."""
    return ConfigDict(values)


def with_preset(config: ConfigDict, names: str, presets: Mapping[str, Preset]) -> ConfigDict:
    """Changes ``config`` by the presets in ``names`` (comma-separated, may be empty), and returns it.

    Raises:
      ValueError: for a preset that is not in ``presets``; the message names the closest one.
    """
    for name in filter(None, names.split(",")):
        if name not in presets:
            raise ValueError(_unknown(name, presets))
        presets[name](config)
    return config


def _unknown(name: str, presets: Mapping[str, Preset]) -> str:
    close = difflib.get_close_matches(name, presets, n=1)
    hint = f"did you mean :{close[0]}? " if close else ""
    return f"there is no preset :{name}; {hint}There are: {', '.join(f':{known}' for known in presets) or 'none'}."
