"""Types of flags that several doors take."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """Reads a whole number above 0; a type for ``add_argument``."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text}")
    return int(text)
