"""Arrays in msgpack: there and back, and everything that is none of them refused in words."""

from __future__ import annotations

import pickle
import warnings

import msgpack
import numpy as np
import pytest

from wovr_jax.export import observation, wire
from wovr_jax.export.observation import ObservationError
from wovr_jax.export.wire import WireError

FRAME = (4, 6, 3)


def array(**change):
    entry = {b"__ndarray__": True, b"data": bytes(12), b"dtype": "|u1", b"shape": [4, 3]}
    return msgpack.packb({"a": entry | {key.encode(): value for key, value in change.items()}})


@pytest.mark.parametrize("dtype", ["u1", "i1", "<i4", ">f4", "<f8", "<f2", "?", "<u8"])
def test_arrays_there_and_back(dtype):
    want = np.arange(24).reshape(2, 3, 4).astype(dtype)
    found = wire.unpack(wire.pack({"a": want, "b": [want[0], "text", 3, None], "c": np.float32(0.5)}))
    for got, sent in ((found["a"], want), (found["b"][0], want[0])):
        assert got.dtype == sent.dtype
        np.testing.assert_array_equal(got, sent)
    assert found["b"][1:] == ["text", 3, None] and found["c"] == np.float32(0.5)


def test_views_and_empty_arrays_too():
    want = np.arange(24).reshape(4, 6)[:, ::-2]
    np.testing.assert_array_equal(wire.unpack(wire.pack({"a": want}))["a"], want)
    assert wire.unpack(wire.pack({"a": np.zeros((0, 7))}))["a"].shape == (0, 7)


@pytest.mark.parametrize("value", [np.array([None]), np.array(["text"]), np.array([1j]), object()])
def test_what_cannot_be_sent(value):
    with pytest.raises(TypeError, match="cannot send"):
        wire.pack({"a": value})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "one whole msgpack map"),
        (b"\xc1", "one whole msgpack map"),
        (array()[:-3], "one whole msgpack map"),
        (array() + b"\x00", "one whole msgpack map"),
        (pickle.dumps({"image": 1}), "one whole msgpack map"),
        (b"\x91" * 5000 + b"\xc0", "one whole msgpack map"),
        (b"\xdf\xff\xff\xff\xff", "one whole msgpack map"),
        (b"\xdd\x7f\xff\xff\xff" + bytes(100), "one whole msgpack map"),
        (msgpack.packb(msgpack.ExtType(4, b"code")), "one whole msgpack map"),
        (msgpack.packb({1: 2}), "one whole msgpack map"),
        (array(dtype="O"), "dtype of numbers"),
        (array(dtype="|O"), "dtype of numbers"),
        (array(dtype="u1,u1"), "dtype of numbers"),
        (array(dtype="<M8[s]"), "dtype of numbers"),
        (array(dtype=["a", "u1"]), "dtype of numbers"),
        (array(shape=[2**40, 2**40]), r"is 1208925819614629174706176 bytes, got 12"),
        (array(shape=[-4, -3]), "whole numbers"),
        (array(shape=[4.0, 3.0]), "whole numbers"),
        (array(shape=[True, 12]), "whole numbers"),
        (array(shape=[1] * 40), "at most 8 whole numbers"),
        (array(shape="43"), "whole numbers"),
        (array(dtype="<f8"), "is 96 bytes, got 12"),
        (array(data="a string of text"), "got str"),
        (array(data=None), "got NoneType"),
        (msgpack.packb({b"__npgeneric__": True, b"dtype": "|u1", b"data": 4000}), "does not fit uint8"),
        (msgpack.packb({b"__npgeneric__": True, b"dtype": "<f4", b"data": "x"}), "expected a number"),
    ],
)
def test_what_comes_in_wrong(data, message):
    with pytest.raises(WireError, match=message):
        wire.unpack(data)


def test_a_number_too_large_for_its_type_is_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = wire.unpack(msgpack.packb({b"__npgeneric__": True, b"dtype": "<f2", b"data": 1e30}))
    assert np.isinf(found)


def right(**change):
    return {"observation/image": np.zeros(FRAME, np.uint8), "prompt": "open the drawer"} | change


def test_the_names_of_clients():
    image = np.ones(FRAME, np.uint8)
    for message in (
        right(**{"observation/image": image, "observation/state": np.zeros(8), "observation/wrist_image": image}),
        {"image": image, "instruction": "open the drawer", "state": [1.0], "wrist_image": image},
    ):
        seen = observation.read(message, FRAME)
        assert seen.instruction == "open the drawer" and seen.seed is None
        np.testing.assert_array_equal(seen.frame_HWC, image)
    assert observation.read(right(seed=7), FRAME).seed == 7


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ([1, 2], r"expected a map with 'observation/image' \(uint8 \[4, 6, 3\]\) and 'prompt'.*got list"),
        ({}, r"no 'observation/image' in the observation; expected"),
        ({"observation/image": np.zeros(FRAME, np.uint8)}, "no 'prompt'"),
        (right(image=np.zeros(FRAME, np.uint8)), "both 'observation/image' and 'image'"),
        (right(observation__image=3), "unknown key 'observation__image'"),
        (right() | {b"seed": 1}, "unknown key"),
        (right(**{"observation/image": np.zeros((6, 4, 3), np.uint8)}), r"expected uint8 \[4, 6, 3\], got uint8 \[6,"),
        (right(**{"observation/image": np.zeros(FRAME, np.float32)}), "got float32"),
        (right(**{"observation/image": bytes(72)}), "got bytes of length 72"),
        (right(prompt=None), "'prompt': expected text"),
        (right(prompt="a" * 1001), "got str of length 1001"),
        (right(seed=-1), "'seed': expected a whole number"),
        (right(seed=True), "'seed'"),
        (right(seed=2**32), "'seed'"),
    ],
)
def test_an_observation_that_is_wrong_says_what_was_expected(message, says):
    with pytest.raises(ObservationError, match=says):
        observation.read(message, FRAME)
