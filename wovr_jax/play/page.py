"""The page of play as one file: markup, style and script, and what a browser may do with it."""

from __future__ import annotations

import base64
import hashlib
import pathlib
import string

FOLDER = pathlib.Path(__file__).parent
SCRIPTS = ("wire.js", "chart.js", "page.js")
"""One after another they are the script of the page."""


def build() -> tuple[str, str]:
    """Returns the page, and its Content-Security-Policy without the addresses that it may connect to."""
    style = (FOLDER / "page.css").read_text(encoding="utf-8")
    script = "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS)
    parts = {"style": style, "script": script}
    whole = string.Template((FOLDER / "page.html").read_text(encoding="utf-8")).substitute(parts)
    allowed = " ".join(f"{kind}-src '{_digest(text)}'" + ";" for kind, text in parts.items())
    # Nothing is loaded from anywhere, and no script but this one runs, whatever a run's instructions say.
    return whole, f"default-src 'none'; {allowed} img-src data: blob:; base-uri 'none'; frame-ancestors 'none'"


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
