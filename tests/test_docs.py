"""What the pages of the site are made of; `make docs` builds the site itself, strictly.

Tests of what Sphinx is needed for skip themselves where requirements-docs.txt is not installed.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import shlex
import tomllib
from types import ModuleType

import pytest

from launch import command
from wovr_jax import cli
from wovr_jax.run.recipe import Recipe

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture
def settings_page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The extension that writes the page of settings."""
    pytest.importorskip("sphinx", reason="requirements-docs.txt is not installed")
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    import settings_page  # type: ignore[import-not-found]

    return settings_page


def test_every_setting_has_a_meaning(settings_page: ModuleType) -> None:
    groups = list(settings_page.walk(Recipe))
    assert {"", "learner.grpo", "world.dit", "libero.scene"} <= {group.path for group in groups}
    for group in groups:
        meanings = settings_page.read_attributes(group.cls)
        for field in dataclasses.fields(group.cls):
            nested = any(other.path == ".".join(filter(None, [group.path, field.name])) for other in groups)
            assert meanings.get(field.name) or nested or not field.init, f"{group.cls.__name__}.{field.name}"
        rows = [line for line in group.write() if line.startswith("| `")]
        assert not any(row.endswith("|  |") for row in rows), "a group without a meaning of its own"
        assert len(rows) == sum(field.init for field in dataclasses.fields(group.cls))
        assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows), "four cells each"


def test_a_setting_says_its_range_its_default_and_what_pace_asks(settings_page: ModuleType) -> None:
    asked = settings_page.config.from_dict(Recipe, command.load_config("pace", ""))
    lines = {
        f"{group.path}.{line.split('`')[1]}": line
        for group in settings_page.walk(Recipe, asked)
        for line in group.write()
        if line.startswith("| `")
    }
    assert "| whole number, at least 1 | `12`; `48` in pace | start states of an iteration;" in lines["dream.groups"]
    assert "one of `learned`, `true`, `shadow` | `'learned'` |" in lines["dream.world"]
    assert "| [GRPOConfig](#learnergrpo) |" in lines["learner.grpo"]
    # A size is spelled out: the table's network, though the default is Wan's.
    assert re.search(r"\| `\d+`; `\d+` in pace \|", lines["world.dit.layers"])


def test_every_command_is_on_its_page(settings_page: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import commands_page  # type: ignore[import-not-found]

    monkeypatch.setattr(
        commands_page, "ask_door", lambda path, *words: "usage: x {a,b} ...\n\nbody" if not words else ""
    )
    monkeypatch.setattr(commands_page, "ask_converter", lambda name: "help")
    page = "\n".join(commands_page.write())
    for name in {*cli.DOORS} - {"demo"} | {f"data {name}" for name in cli.CONVERTERS}:
        assert f"`wovr {name}`" in page
    assert "### `wovr train b`" in page


def test_every_page_is_in_the_index() -> None:
    listed = re.findall(r"^(?:[^<\n]*<)?([\w/.]+)>?$", (DOCS / "index.md").read_text(), re.MULTILINE)
    pages = {path.relative_to(DOCS).with_suffix("").as_posix() for path in (*DOCS.glob("*.md"), *DOCS.glob("api/*.md"))}
    assert pages - {"index"} <= set(listed)


def test_the_pages_name_files_that_are_there() -> None:
    """Source files by their path, from the root or from the package as the pages write it."""
    for page in (ROOT / "README.md", *DOCS.glob("*.md")):
        for name in re.findall(r"(?<![\w/.<>-])((?:\w+/)+\w+\.(?:py|sh|ipynb))\b", page.read_text()):
            assert any((base / name).exists() for base in (ROOT, ROOT / "wovr_jax")), f"{page.name} names {name}"


def test_the_site_needs_no_other_versions() -> None:
    """What requirements-docs.txt pins is exact, and pins nothing again that the others pin."""
    pins = {}
    for name in ("requirements.txt", "requirements-dev.txt", "requirements-docs.txt"):
        lines = [line for line in (ROOT / name).read_text().splitlines() if line[:1].isalnum()]
        assert all("==" in line for line in lines), f"{name}: an exact version each"
        pins[name] = {re.split(r"[=\[ ]", line)[0].lower().replace("_", "-") for line in lines}
    assert not pins["requirements-docs.txt"] & (pins["requirements.txt"] | pins["requirements-dev.txt"])
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["docs"]
    assert {re.split(r"[>=<]", line)[0] for line in extra} <= pins["requirements-docs.txt"]


def printed_commands() -> list[tuple[str, str]]:
    """Returns page and command of every line in a block of README and docs that starts a program of ours."""
    found = []
    for page in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))):
        for block in re.findall(r"^```(?:sh|text)?\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if re.match(r"(\w+=\S+ )*(python (launch/|-m data_prep)|wovr )", line):
                    found.append((page.name, line))
    return found


def test_a_command_on_a_page_has_flags_and_settings_that_there_are() -> None:
    """Each is read as its program would read it, and run no further; <what> and ... stand for what a reader knows."""
    parsers = {}
    commands = printed_commands()
    assert len(commands) > 40
    for page, line in commands:
        words = [word for word in shlex.split(line, comments=True) if word not in ("...", "[...]")]
        while "=" in words[0]:  # variables of the environment
            words.pop(0)
        words = words[: words.index("|")] if "|" in words else words
        if words[0] == "wovr":
            assert words[1] in {*cli.DOORS, "data", "completion"}, f"{page}: {line}"
            program, rest = cli.DOORS[words[1]], words[2:]
        elif words[1] == "-m":
            program, rest = f"{words[2].replace('.', '/')}.py", words[3:]
        else:
            program, rest = words[1], words[2:]
        probe = program == "launch/study.py" and rest[:1] == ["probe"]
        rest = rest[1:] if probe else rest
        if (program, probe) not in parsers:
            parsers[program, probe] = cli.find_parser(ROOT / program, *(["probe"] if probe else []))
        changes, rest = command.split_changes(rest)
        try:
            options = parsers[program, probe].parse_args(rest)
        except SystemExit:
            pytest.fail(f"{page} has a command that {program} would refuse: {line}")
        config = getattr(options, "config", None) or ""
        # <job> is the reader's to fill in, and so is a preset of three dots.
        if config and not re.search(r"[<>]|\.\.\.", config):
            file, _, preset = config.partition(":")
            settings = command.load_config(str(ROOT / file) if "/" in file else file, preset)
            for path, text in changes:
                command.put(settings, path, text)
