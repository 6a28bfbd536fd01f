"""Settings: frozen dataclasses that check themselves, built from plain mappings and turned back into them.

A config in this package is a frozen dataclass beside what it configures. Each field says what it allows where it is
declared, and the class is marked, so that no object with other values can exist::

    @config.checked
    @dataclasses.dataclass(frozen=True)
    class FlowConfig:
        steps: Count = 5  # at least 1
        shift: Positive = 5.0
        kind: Literal["euler", "heun"] = "euler"

Files, command lines and checkpoints speak plain dictionaries; :func:`from_dict` is the one translation. It refuses
what it does not understand rather than guess, and names everything that is wrong in one message.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

T = TypeVar("T")

SIZE = "size"
"""The key that names a size of a network instead of spelling out its fields."""

Fault = tuple[str, str]
"""The dotted name of a setting (empty for the whole), and what was expected there and what came."""

Faults = Iterator[Fault]
"""What the method ``faults`` of a config yields: what no single field can know, such as values that must divide."""


@dataclasses.dataclass(frozen=True)
class Between:
    """The range of a number, to be written into its annotation: ``Annotated[float, Between(0, 1, high_open=True)]``.

    NaN and infinity lie in no range.

    Attributes:
      low, high: bounds.
      low_open, high_open: whether the bound itself is outside.
      also: numbers outside that have a meaning of their own, such as 0 for "off".
    """

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    also: tuple[float, ...] = ()

    def __contains__(self, number: float) -> bool:
        # Every comparison with NaN is False, so "not below" would let it through; isfinite stops infinity too.
        above = number > self.low if self.low_open else number >= self.low
        below = number < self.high if self.high_open else number <= self.high
        return math.isfinite(number) and (number in self.also or (above and below))

    def __str__(self) -> str:
        parts = [f"{'above' if self.low_open else 'at least'} {self.low:_}"] if math.isfinite(self.low) else []
        if math.isfinite(self.high):
            parts.append(f"{'below' if self.high_open else 'at most'} {self.high:_}")
        return " or ".join([*map(str, self.also), " and ".join(parts) or "a finite number"])


Natural = Annotated[int, Between(0)]
Count = Annotated[int, Between(1)]
Seed = Annotated[int, Between(0, 2**31 - 1)]
"""What ``jax.random.key`` takes without 64-bit integers."""
Finite = Annotated[float, Between()]
Positive = Annotated[float, Between(0, low_open=True)]
NonNegative = Annotated[float, Between(0)]
Share = Annotated[float, Between(0, 1)]
Decay = Annotated[float, Between(0, 1, high_open=True)]
"""Of a moving average: what 1 would keep for ever."""
DType = Literal["float32", "bfloat16", "float16"]


class ConfigError(ValueError):
    """Settings that do not fit; the message begins with a dotted path and names all of them.

    Attributes:
      faults: what an object's own check found, under names relative to it; empty for every other refusal.
    """

    def __init__(self, message: str, faults: Sequence[Fault] = ()):
        super().__init__(message)
        self.faults = tuple(faults)


def checked(cls: type[T]) -> type[T]:
    """Marks a frozen dataclass whose objects check their fields when they are made.

    A method ``faults(self) -> Faults`` of the class is asked once every field is what its annotation says.

    Raises (when an object is made):
      ConfigError: naming every field that is not.
    """
    make = cls.__init__

    @functools.wraps(make)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        faults: list[Fault] = []
        # Each field first: what a class asks of several (a remainder, say) has no answer for a zero or a string.
        for name, hint in _hints(type(self)).items():
            _read(hint, getattr(self, name), name, faults)
        if not faults and hasattr(self, "faults"):
            faults.extend(self.faults())
        if faults:
            kind = type(self).__name__
            raise ConfigError(_message(kind, [(_join(kind, name), text) for name, text in faults]), faults)

    # The dataclass decorator has already made the constructor, so this is put around it.
    setattr(cls, "__init__", init)  # noqa: B010
    return cls


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
      ConfigError: naming every unknown key (with the closest field), wrong type, value out of range, missing
        field without default, and what the classes themselves refuse.
    """
    faults: list[Fault] = []
    result = _build(cls, mapping, where, faults)
    if faults:
        raise ConfigError(_message(where, faults))
    return result


def to_dict(obj: Any) -> Any:
    """Returns the plain JSON form: dataclasses become dictionaries, tuples become lists."""
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {field.name: to_dict(getattr(obj, field.name)) for field in dataclasses.fields(obj) if field.init}
    if isinstance(obj, Mapping):
        return {str(name): to_dict(value) for name, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [to_dict(value) for value in obj]
    if obj is None or isinstance(obj, bool | int | float | str):
        return obj
    raise ConfigError(f"a config holds numbers, strings, bools, tuples and dataclasses, not {_show(obj)}.")


def diff(a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
    """Returns where two configs (dataclasses or mappings) differ: dotted path -> (in a, in b).

    A field that only one side has is shown with ``None`` on the other side.
    """
    flat_a, flat_b = flatten(to_dict(a)), flatten(to_dict(b))
    # In the order of a, so that differences are listed as the config declares its fields.
    pairs = {name: (flat_a.get(name), flat_b.get(name)) for name in flat_a | flat_b}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def complete(cls: type, mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``mapping`` with the fields of ``cls`` that it lacks at their defaults; values are not checked."""
    whole = dict(mapping)
    hints = _hints(cls)
    for field in dataclasses.fields(cls):
        if field.name not in whole and not _required(field):
            default = field.default_factory() if callable(field.default_factory) else field.default
            whole[field.name] = to_dict(default)
            continue
        nested = _nested(hints.get(field.name))
        if nested and isinstance(whole.get(field.name), Mapping):  # a group that is None stays so
            whole[field.name] = complete(nested, whole[field.name])
    return whole


def flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """Returns the values of nested dictionaries by dotted path."""
    if not isinstance(tree, dict):
        return {path: tree}
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat.update(flatten(value, _join(path, name)))
    return flat


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Returns the annotation of each field that the constructor takes, ranges included."""
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"expected a dataclass, got {cls!r}.")
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _message(where: str, faults: Sequence[Fault]) -> str:
    """Writes one fault as a line; several as a list under a line that counts them."""
    lines = [f"{name}: {text}" for name, text in faults]
    return lines[0] if len(lines) == 1 else "\n  ".join([f"{where}: {len(lines)} settings do not fit:", *lines])


def _build(cls: Any, mapping: Any, where: str, faults: list[Fault]) -> Any:
    """Makes an object of ``cls``; where there can be none, returns None and adds to ``faults``."""
    if not isinstance(mapping, Mapping):
        faults.append((where, f"expected a mapping with fields of {cls.__name__}, got {_show(mapping)}."))
        return None
    # One list runs through the whole tree; what is new in it at the end is this group's.
    hints, before = _hints(cls), len(faults)
    if SIZE in mapping and SIZE not in hints:
        sizes = [name for name, member in vars(cls).items() if isinstance(member, classmethod) and name[0] != "_"]
        size, mapping = mapping[SIZE], {key: value for key, value in mapping.items() if key != SIZE}
        if size in sizes:
            mapping = _merge(cls, to_dict(getattr(cls, size)()), mapping)
        else:
            known = ", ".join(sizes) or "none"
            faults.append((_join(where, SIZE), f"{cls.__name__} has no size {size!r}; it has {known}."))
    # No fault ends the loop: whoever mends one setting wants to know of the others too.
    values: dict[str, Any] = {}
    for name, value in mapping.items():
        if name in hints:
            values[name] = _read(hints[name], value, _join(where, name), faults)
        else:
            close = difflib.get_close_matches(str(name), hints, n=1, cutoff=0.5)
            fields = f"{cls.__name__} has: {', '.join(hints) or 'no fields'}."
            hint = f"Did you mean {_join(where, close[0])}?" if close else fields
            faults.append((_join(where, name), f"{cls.__name__} has no such setting. {hint}"))
    needed = [field.name for field in dataclasses.fields(cls) if field.init and _required(field)]
    if missing := [name for name in needed if name not in values]:
        faults.append((where, f"{cls.__name__} needs {', '.join(missing)}; no default, and not given."))
    if len(faults) > before:
        return None
    try:
        return cls(**values)
    except ConfigError as error:
        # Their names are relative to the object; here is where it hangs in the tree.
        own = error.faults or [("", str(error))]
        faults.extend((_join(where, name), text) for name, text in own)
    except ValueError as error:  # a class that checks itself in its own way
        faults.append((where, str(error)))
    return None


def _read(hint: Any, value: Any, where: str, faults: list[Fault]) -> Any:
    """Returns ``value`` as the annotation ``hint`` has it; where it cannot be that, adds to ``faults``."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        # The plain type first: a string has no place in a range, and its fault is the type.
        before, value = len(faults), _read(arguments[0], value, where, faults)
        for range_ in arguments[1:]:
            if isinstance(range_, Between) and len(faults) == before and value not in range_:
                faults.append((where, f"expected {range_}, got {value!r}."))
        return value
    if origin in (typing.Union, types.UnionType):
        # ``LoRAConfig | None``: settings have no other unions, which would leave open what a value was meant to be.
        (option,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else _read(option, value, where, faults)
    if origin is Literal:
        # A list cannot be looked up by its hash, and True equals 1: compare one by one, type and value.
        if not any(type(value) is type(option) and value == option for option in arguments):
            faults.append((where, f"expected one of {', '.join(map(repr, arguments))}, got {value!r}."))
        return value
    if origin is tuple:
        return _read_tuple(arguments, value, where, faults)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        # An instance has checked itself when it was made.
        return value if isinstance(value, hint) else _build(hint, value, where, faults)
    # 1 for 1.0 is meant, and JSON makes no difference between them; the other way round something would be lost.
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    # bool is a subclass of int: True must not pass for a number.
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        faults.append((where, f"expected {getattr(hint, '__name__', hint)}, got {_show(value)}."))
    return value


def _read_tuple(hints: tuple[Any, ...], value: Any, where: str, faults: list[Fault]) -> Any:
    if not isinstance(value, list | tuple):
        faults.append((where, f"expected a list or tuple, got {_show(value)}."))
        return value
    if len(hints) == 2 and hints[1] is Ellipsis:  # tuple[int, ...], as long as the value is
        hints = (hints[0],) * len(value)
    if len(hints) != len(value):
        faults.append((where, f"expected {len(hints)} values, got {len(value)}: {value!r}."))
        return value
    pairs = enumerate(zip(hints, value, strict=True))
    return tuple(_read(hint, item, f"{where}[{i}]", faults) for i, (hint, item) in pairs)


def _merge(cls: Any, base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Lays ``change`` over ``base``, both fields of ``cls``, group by group."""
    merged = dict(base)
    for name, value in change.items():
        nested = _nested(_hints(cls).get(name))
        # A group that names a size of its own begins with that, not with what it has in the size around it.
        both = nested and isinstance(value, Mapping) and isinstance(base.get(name), Mapping)
        sized = both and SIZE in value and SIZE not in _hints(nested)
        merged[name] = _merge(nested, base[name], value) if both and not sized else value
    return merged


def _nested(hint: Any) -> Any:
    """Returns the dataclass of an annotation such as ``LoRAConfig`` or ``LoRAConfig | None``, or None."""
    options = (hint, *typing.get_args(hint))
    return next((option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)), None)


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path and name else f"{path}{name}"


def _show(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"
