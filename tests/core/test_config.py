"""Strict configs: what is converted, what is refused, and the words of the refusal."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any, Literal

import pytest

from wovr_jax.core import config
from wovr_jax.core.config import Between, ConfigError, Count, Faults, Share, complete, diff, from_dict, to_dict


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


def test_round_trip_through_json():
    config = Outer("x", Inner(4, 0.25, (3,), "mean_std"), (2, "b"), 1.5, True)
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
    height: int = 1

    @classmethod
    def large(cls) -> Sized:
        return cls(width=8, height=2)


def test_a_named_size_is_changed_by_the_other_keys() -> None:
    assert from_dict(Sized, {"size": "large", "height": 3}) == Sized(8, 3)
    with pytest.raises(ConfigError, match=r"config.size: Sized has no size 'huge'; it has large"):
        from_dict(Sized, {"size": "huge"})


# --- objects that check themselves ----------------------------------------------------------


@config.checked
@dataclasses.dataclass(frozen=True)
class Net:
    """A config as the package has them."""

    width: Count = 8
    heads: Count = 2
    dropout: Annotated[float, Between(0, 1, high_open=True)] = 0.0
    clip: Annotated[float, Between(1, low_open=True, also=(0,))] = 0.0
    levels: tuple[Count, ...] = (1,)
    kind: Literal["a", "b"] = "a"

    @classmethod
    def wide(cls) -> Net:
        return cls(width=64, heads=4)

    def faults(self) -> Faults:
        if self.width % self.heads:
            yield "width", f"expected a multiple of heads={self.heads}, got {self.width}"


@config.checked
@dataclasses.dataclass(frozen=True)
class Whole:
    """A config of configs."""

    net: Net = Net()
    share: Share = 0.5
    other: Net | None = None

    @classmethod
    def large(cls) -> Whole:
        return cls(Net.wide(), share=0.25)

    def faults(self) -> Faults:
        if self.other and self.other.width != self.net.width:
            yield "other.width", f"expected net.width={self.net.width}, got {self.other.width}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, r"Net\.width: expected at least 1, got 0\."),
        ({"width": 2.0}, r"Net\.width: expected int, got 2\.0 \(float\)"),
        ({"width": True}, r"Net\.width: expected int, got True \(bool\)"),
        ({"width": 7}, r"Net\.width: expected a multiple of heads=2, got 7"),
        ({"dropout": 1.0}, r"Net\.dropout: expected at least 0 and below 1, got 1\.0"),
        ({"dropout": float("nan")}, r"Net\.dropout: expected at least 0 and below 1, got nan"),
        ({"dropout": float("inf")}, r"Net\.dropout: .*got inf"),
        ({"clip": 1.0}, r"Net\.clip: expected 0 or above 1, got 1\.0"),
        ({"levels": (1, 0)}, r"Net\.levels\[1\]: expected at least 1, got 0"),
        ({"kind": "c"}, r"Net\.kind: expected one of 'a', 'b', got 'c'"),
    ],
)
def test_an_object_refuses_what_its_fields_do_not_allow(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Net(**changes)
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(Net(), **changes)
    with pytest.raises(ConfigError, match=message.replace("Net", r"config\.net")):
        from_dict(Whole, {"net": changes})


def test_what_is_allowed_is_allowed_and_stays_a_plain_number() -> None:
    net = Net(clip=1.5, dropout=0, levels=(2, 3))
    assert type(net.width) is int and net.clip == 1.5
    assert from_dict(Whole, json.loads(json.dumps(to_dict(Whole(net, other=Net()))))) == Whole(net, other=Net())


def test_all_faults_of_the_tree_are_in_one_message() -> None:
    asked = {"net": {"width": "abc", "haeds": 2, "clip": -1.0}, "share": 2, "other": {"size": "huge"}, "more": 1}
    with pytest.raises(ConfigError) as refusal:
        from_dict(Whole, asked)
    assert str(refusal.value).splitlines() == [
        "config: 6 settings do not fit:",
        "  config.net.width: expected int, got 'abc' (str).",
        "  config.net.haeds: Net has no such setting. Did you mean config.net.heads?",
        "  config.net.clip: expected 0 or above 1, got -1.0.",
        "  config.share: expected at least 0 and at most 1, got 2.0.",
        "  config.other.size: Net has no size 'huge'; it has wide.",
        "  config.more: Whole has no such setting. Whole has: net, share, other.",
    ]


def test_what_a_class_knows_of_its_parts_is_said_under_their_names() -> None:
    with pytest.raises(ConfigError, match=r"^config\.other\.width: expected net\.width=8, got 16$"):
        from_dict(Whole, {"other": {"width": 16}})
    with pytest.raises(ConfigError, match=r"^Whole\.other\.width: expected net\.width=8, got 16$"):
        Whole(other=Net(width=16))


def test_a_group_that_names_its_own_size_begins_with_that() -> None:
    assert from_dict(Whole, {"size": "large", "net": {"heads": 8}}).net == Net(64, 8)
    assert from_dict(Whole, {"size": "large", "net": {"size": "wide", "heads": 8}, "share": 1}) == Whole(
        Net(64, 8), 1.0
    )
    assert from_dict(Whole, {"net": {"size": "wide"}}).net == Net.wide()


def test_settings_are_completed_by_the_defaults_of_the_fields_they_lack() -> None:
    assert complete(Whole, {"share": 0.1, "net": {"width": 6}}) == to_dict(Whole(Net(6), 0.1))
    assert complete(Whole, {"other": {"width": "kept"}})["other"] == {**to_dict(Net()), "width": "kept"}
    assert complete(Whole, {"other": None, "unknown": 1})["unknown"] == 1
