"""Strict configs: what is converted, what is refused, and the words of the refusal."""

from __future__ import annotations

import dataclasses
import json
from typing import Literal

import pytest

from wovr_jax.core.config import ConfigError, diff, from_dict, to_dict


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int = 8
    rate: float = 0.5
    shape: tuple[int, ...] = (1, 2)
    mode: Literal["mean", "mean_std"] = "mean"

    def __post_init__(self) -> None:
        if self.width % 2:
            raise ValueError(f"width must be even, got {self.width}")


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = Inner()
    pair: tuple[int, str] = (1, "a")
    limit: float | None = None
    flag: bool = False
    budgets: dict[str, int] = dataclasses.field(default_factory=dict)


def test_round_trip_through_json():
    config = Outer("x", Inner(4, 0.25, (3,), "mean_std"), (2, "b"), 1.5, True, {"sft": 3})
    assert from_dict(Outer, json.loads(json.dumps(to_dict(config)))) == config


def test_defaults_and_harmless_conversions():
    config = from_dict(Outer, {"name": "x", "inner": {"rate": 1, "shape": [4, 5]}, "limit": 2})
    assert config.inner == Inner(rate=1.0, shape=(4, 5))
    assert isinstance(config.inner.rate, float) and isinstance(config.limit, float)
    assert from_dict(Outer, {"name": "x", "inner": Inner(2)}).inner.width == 2


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (
            {"name": "x", "inner": {"widht": 3}},
            r"config\.inner\.widht: Inner has no such setting. Did you mean config\.inner\.width",
        ),
        ({"name": "x", "qqqq": 3}, r"config\.qqqq: .* Outer has: name, inner"),
        ({}, r"config: Outer needs name"),
        ({"name": 3}, r"config\.name: expected str, got 3 \(int\)"),
        ({"name": "x", "inner": {"width": 2.0}}, r"config\.inner\.width: expected int, got 2\.0 \(float\)"),
        ({"name": "x", "inner": {"width": True}}, r"config\.inner\.width: expected int, got True \(bool\)"),
        ({"name": "x", "flag": 1}, r"config\.flag: expected bool, got 1"),
        ({"name": "x", "inner": {"rate": "1e-3"}}, r"config\.inner\.rate: expected float, got '1e-3'"),
        ({"name": "x", "inner": {"shape": [1, "b"]}}, r"config\.inner\.shape\[1\]: expected int"),
        ({"name": "x", "inner": {"shape": 3}}, r"config\.inner\.shape: expected a list or tuple"),
        ({"name": "x", "pair": [1]}, r"config\.pair: expected 2 values, got 1"),
        ({"name": "x", "inner": {"mode": "median"}}, r"config\.inner\.mode: expected one of 'mean', 'mean_std'"),
        ({"name": "x", "limit": "soon"}, r"config\.limit: expected float"),
        ({"name": "x", "inner": 3}, r"config\.inner: expected a mapping with fields of Inner"),
        ({"name": "x", "inner": {"width": 3}}, r"config\.inner: width must be even, got 3"),
        ({"name": "x", "budgets": {"sft": "many"}}, r"config\.budgets\.sft: expected int"),
    ],
)
def test_refusals_name_the_setting(mapping, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(Outer, mapping)


def test_diff_by_dotted_path():
    a, b = Outer("x"), Outer("y", Inner(shape=(1, 3)))
    assert diff(a, b) == {"name": ("x", "y"), "inner.shape": ([1, 2], [1, 3])}
    assert diff(a, a) == {}
    assert diff({"a": 1}, {"b": 2}) == {"a": (1, None), "b": (None, 2)}


def test_only_plain_values_become_json():
    with pytest.raises(ConfigError, match="numbers, strings"):
        to_dict({"a": object()})


@dataclasses.dataclass(frozen=True)
class Sized:
    width: int = 1
    inner: dict = dataclasses.field(default_factory=dict)

    @classmethod
    def large(cls) -> Sized:
        return cls(width=8, inner={"a": 1, "b": 2})


def test_a_named_size_is_changed_by_the_other_keys() -> None:
    assert from_dict(Sized, {"size": "large", "inner": {"b": 3}}) == Sized(8, {"a": 1, "b": 3})
    with pytest.raises(ConfigError, match=r"config.size: Sized has no size 'huge'; it has large"):
        from_dict(Sized, {"size": "huge"})
