"""Optional packages: which of them are missing here, and the line that brings them.

What only one command needs is no dependency of all of them but an extra of ``pyproject.toml``. A clone is asked through
that file, an installed package through its metadata, so the two say the same.
"""

from __future__ import annotations

import functools
import importlib.metadata
import pathlib
import shlex
import sys
import tomllib
from collections.abc import Iterable

from packaging.requirements import Requirement

MODULES = {"pillow": "PIL", "huggingface-hub": "huggingface_hub", "tensorflow-datasets": "tensorflow_datasets"}
"""Distribution -> the module that it brings, where the two differ."""
PROJECT = pathlib.Path(__file__).parents[2] / "pyproject.toml"


@functools.cache
def declared() -> dict[str, list[Requirement]]:
    """Returns what each extra asks for, by its name; under the name "" is what everything needs."""
    if PROJECT.is_file():  # a clone, where installed metadata may be older than the file, or not be there
        project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
        groups = {"": project["dependencies"], **project["optional-dependencies"]}
        return {name: [Requirement(text) for text in texts] for name, texts in groups.items()}
    about = importlib.metadata.metadata("wovr_jax")
    asked: dict[str, list[Requirement]] = {name: [] for name in ["", *(about.get_all("Provides-Extra") or ())]}
    for requirement in map(Requirement, about.get_all("Requires-Dist") or ()):
        # The marker of an extra holds for that extra alone; whatever has none belongs to all.
        owners = [name for name in asked if requirement.marker is None or requirement.marker.evaluate({"extra": name})]
        asked["" if "" in owners else owners[0]].append(requirement)
    return asked


def find_missing(extra: str, only: Iterable[str] = ()) -> list[Requirement]:
    """Returns what of an extra is not installed in a version that will do.

    Args:
      extra: its name; "" for what everything needs.
      only: names of distributions; the others of the extra are then not asked for.
    """
    wanted = [requirement for requirement in declared()[extra] if not only or requirement.name in only]
    return [requirement for requirement in wanted if not is_satisfied(requirement)]


def is_satisfied(requirement: Requirement) -> bool:
    """Whether the distribution is installed in a version that will do."""
    try:
        installed = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return requirement.specifier.contains(installed, prereleases=True)


def install_line(requirements: Iterable[Requirement]) -> str:
    """Returns what to type for them, for the Python that runs."""
    words = [f"{requirement.name}{requirement.specifier}" for requirement in requirements]
    return shlex.join([sys.executable, "-m", "pip", "install", *words])


def explain(error: ImportError) -> str:
    """Returns which extra brings the module that is missing and what to type; empty for a module of no extra."""
    # jax.export says in words of its own that flatbuffers is missing, and keeps the import that failed as the cause.
    cause = error.__cause__ or error.__context__ if error.name is None else error
    missing = (getattr(cause, "name", None) or "").partition(".")[0]
    for extra, requirements in declared().items():
        for requirement in requirements:
            if MODULES.get(requirement.name, requirement.name) == missing:
                # All of the extra at once, or the next import would fail as this one did.
                group = f"the extra {extra}" if extra else "what everything needs"
                line = install_line(find_missing(extra) or [requirement])
                return f"{requirement.name} ({group}) is not installed here.\n{line}"
    return ""
