"""Strict construction of nested frozen dataclasses from plain mappings, and back.

A config in this package is a frozen dataclass beside the network it describes. Files,
command lines and checkpoints speak plain dictionaries; this file is the one translation,
and it refuses what it does not understand rather than guess.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")

SIZE = "size"
"""The key that names a size of a network instead of spelling out its fields."""


class ConfigError(ValueError):
    """A setting that does not fit; the message begins with its dotted path."""


def from_dict(cls: type[T], mapping: Mapping[str, Any], where: str = "config") -> T:
    """Builds ``cls`` from ``mapping``, nested dataclasses included.

    Fields that are absent take their default. Lists become tuples where the field is a
    tuple, integers become floats where the field is a float; nothing else is converted.

    A key ``size`` that is not a field of the class names one of its classmethods, whose result the other
    keys change: ``{"size": "tabletop", "memory": 1}``.

    Args:
      cls: a dataclass type.
      mapping: field name -> value; a nested dataclass is a mapping or an instance.
      where: dotted path of this mapping, for error messages.

    Raises:
      ConfigError: for an unknown key (naming the closest field), a wrong type, a missing
        field without default, or a value that the class itself refuses.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where}: expected a mapping with fields of {cls.__name__}, got {_shown(mapping)}.")
    fields = {field.name: field for field in _fields(cls) if field.init}
    if SIZE in mapping and SIZE not in fields:
        mapping = _resized(cls, mapping, where)
    for name in mapping:
        if name not in fields:
            raise ConfigError(_unknown(cls, name, fields, where))
    hints = typing.get_type_hints(cls)
    values = {name: _convert(hints[name], value, f"{where}.{name}") for name, value in mapping.items()}
    missing = [name for name, field in fields.items() if name not in values and _required(field)]
    if missing:
        raise ConfigError(f"{where}: {cls.__name__} needs {', '.join(missing)}; no default, and not given.")
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def to_dict(obj: Any) -> Any:
    """The plain JSON form: dataclasses become dictionaries, tuples become lists."""
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {field.name: to_dict(getattr(obj, field.name)) for field in dataclasses.fields(obj) if field.init}
    if isinstance(obj, Mapping):
        return {str(name): to_dict(value) for name, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [to_dict(value) for value in obj]
    if obj is None or isinstance(obj, bool | int | float | str):
        return obj
    raise ConfigError(f"a config holds numbers, strings, bools, tuples and dataclasses, not {_shown(obj)}.")


def diff(a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
    """Where two configs (dataclasses or mappings) differ: dotted path -> (in a, in b).

    A field that only one side has is shown with ``None`` on the other side.
    """
    flat_a, flat_b = _flat(to_dict(a)), _flat(to_dict(b))
    names = list(flat_a) + [name for name in flat_b if name not in flat_a]
    pairs = {name: (flat_a.get(name), flat_b.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _resized(cls: type, mapping: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``mapping`` laid over the named size, nested groups merged."""
    name = mapping[SIZE]
    sizes = [key for key, member in vars(cls).items() if isinstance(member, classmethod) and not key.startswith("_")]
    if name not in sizes:
        raise ConfigError(f"{where}.{SIZE}: {cls.__name__} has no size {name!r}; it has {', '.join(sizes) or 'none'}.")
    return _merged(to_dict(getattr(cls, name)()), {key: value for key, value in mapping.items() if key != SIZE})


def _merged(base: Any, change: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(change, Mapping):
        return change
    return base | {key: _merged(base.get(key), value) for key, value in change.items()}


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found.update(_flat(value, f"{path}.{name}" if path else name))
    return found


def _fields(cls: Any) -> tuple[dataclasses.Field, ...]:
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"expected a dataclass, got {cls!r}.")
    return dataclasses.fields(cls)


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _unknown(cls: type, name: Any, fields: Mapping[str, Any], where: str) -> str:
    close = difflib.get_close_matches(str(name), fields, n=1, cutoff=0.5)
    hint = f"Did you mean {where}.{close[0]}?" if close else f"{cls.__name__} has: {', '.join(fields) or 'no fields'}."
    return f"{where}.{name}: {cls.__name__} has no such setting. {hint}"


def _shown(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"


def _convert(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the annotated type ``hint``, or a ConfigError."""
    if hint is Any:
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError(f"{where}: expected one of {', '.join(map(repr, arguments))}, got {value!r}.")
        return value
    if origin is tuple or hint is tuple:
        return _convert_tuple(arguments, value, where)
    if origin is dict or hint is dict:
        return _convert_dict(arguments, value, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where)
    return _convert_plain(hint, value, where)


def _convert_plain(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # bool is a subclass of int: True must not pass for a number.
    fits = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    if not fits:
        raise ConfigError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {_shown(value)}.")
    return value


def _convert_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    problems = []
    for option in options:
        if option is type(None):
            if value is None:
                return None
            continue
        try:
            return _convert(option, value, where)
        except ConfigError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    names = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise ConfigError(f"{where}: expected {names}, got {_shown(value)}.")


def _convert_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{where}: expected a list or tuple, got {_shown(value)}.")
    if not arguments:
        return tuple(value)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        raise ConfigError(f"{where}: expected {len(arguments)} values, got {len(value)}: {value!r}.")
    pairs = zip(arguments, value, strict=True)
    return tuple(_convert(hint, item, f"{where}[{i}]") for i, (hint, item) in enumerate(pairs))


def _convert_dict(arguments: tuple[Any, ...], value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected a mapping, got {_shown(value)}.")
    hint = arguments[1] if arguments else Any
    return {name: _convert(hint, item, f"{where}.{name}") for name, item in value.items()}
