"""The directive ``commands``: the ``--help`` of every command of ``wovr``, asked when the site is built."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from unittest import mock

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from wovr_jax import cli

WIDTH = {"COLUMNS": "100", "NO_COLOR": "1"}
"""What argparse reads: lines of one width, wherever the site is built."""


class Commands(SphinxDirective):
    """Writes the page."""

    def run(self) -> list[nodes.Node]:
        """Returns one section a command."""
        self.env.note_reread()  # the programs may have changed, though the page has not
        return self.parse_text_to_nodes("\n".join(write()), allow_section_headings=True)


def write() -> Iterator[str]:
    """Yields the page as Markdown: the command itself, its doors, their subcommands, the converters."""
    yield from _section("wovr", "", cli.describe())
    for name, path in cli.DOORS.items():
        if name == "demo":  # `train` with its settings filled in
            continue
        text = ask_door(path)
        yield from _section(f"wovr {name}", f"Is `python {path}`.", text)
        for inner in find_subcommands(text):
            yield from _section(f"wovr {name} {inner}", "", ask_door(path, inner), depth=3)
    for name in cli.CONVERTERS:
        yield from _section(f"wovr data {name}", f"Is `python -m data_prep.{name}`.", ask_converter(name))


def _section(title: str, about: str, text: str, depth: int = 2) -> Iterator[str]:
    yield f"\n{'#' * depth} `{title}`\n"
    if about:
        yield f"{about}\n"
    yield f"````text\n{text.strip()}\n````\n"


def ask_door(path: str, *words: str) -> str:
    """Returns the help of a program of ``launch/``; one that fails stops the build with what it said."""
    program = [sys.executable, str(cli.root() / path), *words, "--help"]
    done = subprocess.run(program, capture_output=True, text=True, env=os.environ | WIDTH, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{path} {' '.join(words)} --help ended with {done.returncode}: {done.stderr}")
    return done.stdout


def ask_converter(name: str) -> str:
    """Returns the help of a module of ``data_prep/``, in this process: each of them imports jax, for seconds."""
    said, file = io.StringIO(), f"data_prep/{pathlib.Path(name)}.py"
    with (
        contextlib.redirect_stdout(said),
        contextlib.suppress(SystemExit),
        mock.patch.object(sys, "argv", [file, "--help"]),
        mock.patch.dict(os.environ, WIDTH),
    ):
        importlib.import_module(f"data_prep.{name}").main()
    return said.getvalue()


def find_subcommands(text: str) -> list[str]:
    """Returns ``parts``, ``gpu`` of a usage with ``{parts,gpu,...} ...``; none where a door has no subcommands."""
    match = re.search(r"\{([\w,]+)\}\s+\.\.\.", text.partition("\n\n")[0])
    return match[1].split(",") if match else []


def setup(app: Sphinx) -> dict[str, bool]:
    """Adds the directive."""
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
