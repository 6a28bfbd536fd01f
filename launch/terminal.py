"""What a door shows: colours where a person looks on, and nothing but JSON where a program reads."""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Any

COLOURS = {"green": 32, "red": 31, "yellow": 33}


def paint(text: str, colour: str) -> str:
    """Returns ``text`` in a colour, or as it is where stdout is no terminal or the user wants none (NO_COLOR)."""
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\033[{COLOURS[colour]}m{text}\033[0m"


def print_json(content: Any) -> None:
    """Prints ``content`` as JSON on stdout; what is not a number becomes null, which JSON has instead."""
    print(json.dumps(_without_nan(content), indent=1, ensure_ascii=False))


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _without_nan(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
