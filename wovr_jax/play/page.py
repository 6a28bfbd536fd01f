"""The page of play as one file: markup, style and script."""

from __future__ import annotations

import pathlib

from wovr_jax.export import pages

FOLDER = pathlib.Path(__file__).parent


def build() -> tuple[str, str]:
    """Returns the page, and what a browser may do with it (``export.pages``)."""
    scripts = (pages.WIRE, FOLDER / "chart.js", FOLDER / "page.js")
    return pages.build(FOLDER / "page.html", FOLDER / "page.css", scripts)
