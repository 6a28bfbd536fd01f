"""Small pieces of HTML that the page of a run and that of several share."""

from __future__ import annotations

import html
import importlib.resources
import itertools
import re
import string
from collections.abc import Iterable, Mapping, Sequence

from wovr_jax.report.tables import Rows


def fill(template: str, parts: Mapping[str, str]) -> str:
    """Returns a page: a template of this folder with its parts, and the one style sheet.

    A section of the template whose part is empty goes with its heading and its explanation.
    """
    folder = importlib.resources.files("wovr_jax").joinpath("report")
    words = folder.joinpath(template).read_text(encoding="utf-8")
    words = re.sub(r'(?s)<section id="(\w+)">.*?</section>\n', lambda match: match[0] * bool(parts[match[1]]), words)
    style = folder.joinpath("page.css").read_text(encoding="utf-8")
    return string.Template(words).substitute(parts, style=style)


def side_by_side(drawn: Sequence[str]) -> str:
    """Returns figures beside each other, as many as the page is wide; nothing of none."""
    return f'<div class="row">{"".join(drawn)}</div>' if drawn else ""


def render_table(rows: Rows, attributes: Iterable[str] = ()) -> str:
    """Returns a table in HTML; ``attributes`` are those of the rows under the head, which may be more."""
    kinds = itertools.zip_longest(rows[1:], attributes, fillvalue="")
    lines = [f"<tr {kind}>{_render_cells(row)}</tr>" for row, kind in kinds]
    return f'<div class="wide"><table><tr>{_render_cells(rows[0], "th")}</tr>{"".join(lines)}</table></div>'


def _render_cells(row: Iterable[str], kind: str = "td") -> str:
    return "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in row)
