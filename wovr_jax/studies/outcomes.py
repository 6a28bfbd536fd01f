"""``outcomes.json``: what every run of a study came to, episode by episode, so that seeds can be measured apart.

A study takes hours, and its seeds know nothing of each other. What is kept here is small and all that its tables are
made of: seeds of another day or another machine are counted without their run folders (``config.outcomes``).
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from wovr_jax.core.config import ConfigError
from wovr_jax.core.disk import read_json, write_json
from wovr_jax.run import recipe as recipes
from wovr_jax.run.folder import FREE
from wovr_jax.studies.seeds import Ends

FORMAT = "wovr_jax outcomes"
NAME = "outcomes.json"

_FREE = ("job", "name", "seed", "seeds", "variants", "outcomes", "assets")
"""Settings that say which runs are made, and where, and nothing of what comes of one; those of ``run.folder`` too."""

ByVariant = dict[str, list[Ends]]


def write(folder: pathlib.Path, study: str, settings: Mapping[str, Any], ends: Mapping[str, Sequence[Ends]]) -> None:
    """Writes what the variants of a study came to so far.

    Args:
      folder: of the study.
      study: its name.
      settings: of its reference.
      ends: by variant, a seed each.
    """
    runs = {
        variant: [end._asdict() | {"base": _pack(end.base), "final": _pack(end.final)} for end in each]
        for variant, each in ends.items()
    }
    write_json(folder / NAME, {"format": FORMAT, "study": study, "settings": dict(settings), "runs": runs})


def read(paths: Sequence[str], study: str, settings: Mapping[str, Any]) -> ByVariant:
    """Returns what was measured elsewhere, by variant.

    Args:
      paths: files that :func:`write` made.
      study: the one that asks.
      settings: of its reference.

    Raises:
      ConfigError: a file that is not there or is something else, another study, other settings, or a seed twice.
    """
    found: ByVariant = {}
    for path in paths:
        try:
            facts = read_json(pathlib.Path(path).expanduser())
        except (OSError, ValueError) as error:
            raise ConfigError(f"config.outcomes: {path} cannot be read: {error}") from error
        if not isinstance(facts, Mapping) or facts.get("format") != FORMAT:
            raise ConfigError(f"config.outcomes: {path} is not the {NAME} of a study.")
        if facts["study"] != study:
            raise ConfigError(f"config.outcomes: {path} is of the study {facts['study']!r}, expected {study!r}.")
        _check_settings(path, facts["settings"], settings)
        for variant, ends in facts["runs"].items():
            mine = found.setdefault(variant, [])
            if twice := {end.seed for end in mine} & {end["seed"] for end in ends}:
                raise ConfigError(f"config.outcomes: {path} holds seed {min(twice)} of {variant!r} a second time.")
            mine += [Ends(**end | {"base": _unpack(end["base"]), "final": _unpack(end["final"])}) for end in ends]
    return found


def _check_settings(path: str, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuses runs of other settings, which a mean would mix without a word."""
    changed = {
        name: pair
        for name, pair in recipes.differences(there, asked).items()
        if name.partition(".")[0] not in _FREE and (name.startswith("mesh") or not FREE.match(name))
    }
    if changed:
        name, (was, now) = next(iter(sorted(changed.items())))
        raise ConfigError(
            f"config.outcomes: {path} was measured with {len(changed)} other setting{'s' * (len(changed) > 1)}, such "
            f"as {name}={was!r}, here {now!r}. Seeds of one table need equal settings."
        )


def _pack(outcomes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    # A digit an episode: readable, and a tenth of a list of numbers.
    return {how: "".join(str(int(each)) for each in flags) for how, flags in outcomes.items()}


def _unpack(packed: Mapping[str, str]) -> dict[str, list[int]]:
    return {how: [int(digit) for digit in digits] for how, digits in packed.items()}
