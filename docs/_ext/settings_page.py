"""The directive ``settings``: every setting of a run, read from the dataclasses that a run is made of.

A setting's name, type and default are those of its field; what it means is its line in the class's ``Attributes``.
What ``configs/pace.py`` asks for stands beside the default where it is another value.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from wovr_jax.core import config

ITEM = re.compile(r"([a-zA-Z_]\w*(?:, \w+)*): (.*)")
"""``steps, lr: fewer and smaller``: one entry of ``Attributes``."""


class Settings(SphinxDirective):
    """Writes the page; the argument names the dataclass at its root, such as ``wovr_jax.run.recipe.Recipe``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Returns one section a dataclass, each with a table."""
        module, _, name = self.arguments[0].rpartition(".")
        cls = getattr(importlib.import_module(module), name)
        asked = config.from_dict(cls, importlib.import_module("configs.pace").get_config().to_dict())
        self.env.note_reread()  # the code may have changed, though the page has not
        text = "\n".join(line for group in walk(cls, asked) for line in group.write())
        return self.parse_text_to_nodes(text, allow_section_headings=True)


@dataclasses.dataclass(frozen=True)
class Group:
    """One dataclass in its place among the settings.

    Attributes:
      path: where it hangs, such as ``learner.grpo``; empty for the root.
      cls: the dataclass.
      default: an object of it where the settings have one, else None.
      asked: the object that ``configs/pace.py`` makes of it, or None.
      optional: whether the group may be None.
    """

    path: str
    cls: type
    default: Any
    asked: Any
    optional: bool

    def write(self) -> Iterator[str]:
        """Yields the section as Markdown."""
        yield f"\n## `{self.path or 'config'}`\n"
        yield first_line(self.cls).replace("``", "`") + "\n"
        notes = [f"Class `{self.cls.__module__}.{self.cls.__name__}`."]
        if self.optional:
            notes.append("`None` leaves the whole group out.")
        if names := sizes(self.cls):
            notes.append(f"Named sizes (`{self.path}.size`): {', '.join(f'`{name}`' for name in names)}.")
        yield " ".join(notes) + "\n"
        yield "| setting | type | default | meaning |\n|---|---|---|---|"
        meanings = read_attributes(self.cls)
        hints = typing.get_type_hints(self.cls, include_extras=True)
        for field in dataclasses.fields(self.cls):
            if not field.init:
                continue
            path = ".".join(filter(None, [self.path, field.name]))
            nested, _ = dataclass_of(hints[field.name])
            if nested:
                kind, default = f"[{nested.__name__}](#{anchor(path)})", ""
            else:
                kind, default = spell(hints[field.name]), self._default(field)
            # A group that its parent says nothing of says itself what it is.
            meaning = meanings.get(field.name) or first_line(nested)
            cells = [f"`{field.name}`", kind, default, meaning]
            yield "| " + " | ".join(cell.replace("|", "\\|").replace("``", "`") for cell in cells) + " |"

    def _default(self, field: dataclasses.Field) -> str:
        value = get_default(self.default, field)
        text = "required" if value is dataclasses.MISSING else f"`{value!r}`"
        asked = value if self.asked is None else getattr(self.asked, field.name)
        return text if asked == value else f"{text}; `{asked!r}` in pace"


def walk(cls: type, asked: Any = None, path: str = "", default: Any = None, optional: bool = False) -> Iterator[Group]:
    """Yields the dataclass and then those inside it, in the order of the fields."""
    yield Group(path, cls, default, asked, optional)
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        nested, may_be_none = dataclass_of(hints[field.name])
        if nested and field.init:
            inner = get_default(default, field)
            inner = inner if dataclasses.is_dataclass(inner) else None
            below = ".".join(filter(None, [path, field.name]))
            yield from walk(nested, getattr(asked, field.name, None), below, inner, may_be_none)


def get_default(default: Any, field: dataclasses.Field) -> Any:
    """Returns the value of a field in the object around it, else its own default, else ``dataclasses.MISSING``."""
    if default is not None:
        return getattr(default, field.name)
    return field.default_factory() if callable(field.default_factory) else field.default


def dataclass_of(hint: Any) -> tuple[type | None, bool]:
    """Returns the dataclass of ``X`` or ``X | None``, and whether None is allowed."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) or is_union(hint) else (hint,)
    inside = [option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)]
    return (inside[0] if inside else None), type(None) in options


def first_line(cls: type | None) -> str:
    """Returns the first line of a class's docstring; empty without a class."""
    return (inspect.getdoc(cls) or "").partition("\n")[0] if cls else ""


def is_union(hint: Any) -> bool:
    """Returns whether the annotation is one of ``typing``'s unions."""
    return typing.get_origin(hint) is typing.Union


def spell(hint: Any) -> str:
    """Returns an annotation in words: ``whole number, at least 1``; ``one of `a`, `b` ``."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return f"{spell(arguments[0])}, {arguments[1]}"
    if origin is Literal:
        return "one of " + ", ".join(f"`{option}`" for option in arguments)
    if origin is tuple:
        many = len(arguments) == 2 and arguments[1] is Ellipsis
        return f"list of: {spell(arguments[0])}" if many else f"{len(arguments)} values: {spell(arguments[0])}"
    if isinstance(hint, types.UnionType) or is_union(hint):
        return " or ".join("`None`" if option is type(None) else spell(option) for option in arguments)
    words = {int: "whole number", float: "number", str: "text", bool: "`True` or `False`", Any: "any value"}
    return words.get(hint, f"`{getattr(hint, '__name__', hint)}`")


def sizes(cls: type) -> list[str]:
    """Returns the named sizes of a config: its public classmethods."""
    return [name for name, member in vars(cls).items() if isinstance(member, classmethod) and name[0] != "_"]


def anchor(path: str) -> str:
    """Returns the anchor that the heading of a group gets."""
    return path.replace(".", "")


def read_attributes(cls: type) -> dict[str, str]:
    """Returns the meaning of each field that the ``Attributes`` of the class or of its bases speak of."""
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        text = inspect.cleandoc(base.__doc__ or "").partition("\nAttributes:\n")[2]
        names: list[str] = []
        for line in text.splitlines():
            if line and not line.startswith("  "):
                break  # another section
            item = ITEM.fullmatch(line[2:]) if not line.startswith("   ") else None
            if item:
                names = item[1].split(", ")
                meanings |= dict.fromkeys(names, item[2])
            elif names and line.strip():
                meanings |= {name: f"{meanings[name]} {line.strip()}" for name in names}
    return meanings


def setup(app: Sphinx) -> dict[str, bool]:
    """Adds the directive."""
    app.add_directive("settings", Settings)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
