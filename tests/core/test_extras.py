"""What is not installed is named with the line that brings it, in a clone and out of a wheel."""

from __future__ import annotations

import email
import importlib.metadata
import pathlib
import sys

import pytest
from packaging.requirements import Requirement

from launch import command
from wovr_jax.core import extras


def plain(groups: dict[str, list[Requirement]]) -> dict[str, list[str]]:
    return {extra: [f"{one.name}{one.specifier}" for one in group] for extra, group in groups.items()}


def test_the_metadata_of_a_wheel_say_what_pyproject_says(monkeypatch) -> None:
    project = plain(extras.declared())
    fields = [f"Provides-Extra: {extra}" for extra in project if extra]
    for extra, group in project.items():
        fields += [f"Requires-Dist: {line}{f'; extra == {extra!r}' if extra else ''}" for line in group]
    about = email.message_from_string("\n".join(fields))
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: about)
    monkeypatch.setattr(extras, "PROJECT", pathlib.Path("a wheel has no such file"))
    assert plain(extras.declared.__wrapped__()) == project
    assert {"", "serve", "formats", "hdf5"} <= set(project)


def test_too_old_is_as_good_as_missing(monkeypatch) -> None:
    versions = {"flatbuffers": "25.2", "msgpack": "1.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    lacking = extras.find_missing("serve")
    assert [requirement.name for requirement in lacking] == ["msgpack", "websockets"]
    assert [requirement.name for requirement in extras.find_missing("serve", ["websockets"])] == ["websockets"]
    line = extras.install_line(lacking)
    assert line == f"{sys.executable} -m pip install 'msgpack>=1.1' 'websockets>=15.0'"


def test_a_door_that_misses_a_package_of_an_extra_says_what_to_type() -> None:
    missing = ModuleNotFoundError("No module named 'PIL'", name="PIL")
    said = pytest.raises(
        SystemExit, match=r"^pillow \(the extra formats\) is not installed here\.\n.* -m pip install .*pillow"
    )
    with said, command.explain_errors("stopped"):
        raise missing
    # jax.export raises an error of its own over the import that failed.
    said = pytest.raises(SystemExit, match=r"^flatbuffers \(the extra serve\) is not installed here\.\n")
    with said, command.explain_errors("stopped"):
        try:
            raise ModuleNotFoundError("No module named 'flatbuffers'", name="flatbuffers")
        except ImportError as error:
            raise ImportError("Please install 'flatbuffers' in order to use Exported serialization") from error
    # A module of ours that is not there is a bug, and keeps its traceback.
    with pytest.raises(ModuleNotFoundError), command.explain_errors("stopped"):
        raise ModuleNotFoundError("No module named 'wovr_jax.worlds'", name="wovr_jax.worlds")
