"""RLinf's start states: what is read, what is refused, and that nothing in a file ever runs."""

from __future__ import annotations

import os
import pickle
import sys

import numpy as np
import pytest

from data_prep import rlinf_starts
from data_prep.plain_pickle import RefusedError, load
from wovr_jax.data import episodes, starts
from wovr_jax.data.batches import NoDataError
from wovr_jax.types import NULL_ACTION

BOWL, WINE = "put the bowl on the plate", "put the wine bottle on the rack"


def frame(value, text=BOWL, **extra):
    """A frame full of ``value``, reached by an action full of it."""
    known = {"image": np.full((4, 6, 3), value, np.uint8), "delta_action": np.full(7, value / 100)}
    return known | {"instruction": text, "init_ee_pose": np.zeros(6)} | extra


def write(path, frames, protocol=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.empty(len(frames), object)
    array[:] = frames
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": array.shape})
        pickle.dump(array, file, protocol=protocol)
    return path


@pytest.fixture
def folder(tmp_path):
    at = tmp_path / "dataset"
    write(at / "seed_7_traj_0.npy", [frame(10, WINE)])
    write(at / "seed_8_traj_1.npy", [frame(20)])
    write(at / "step_0_seed_9_traj_2_kir.npy", [frame(v) for v in (30, 31, 32, 33, 34, 35)])
    return at


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol_gives_what_numpy_gives(tmp_path, protocol):
    many = {"half": np.arange(3, dtype=">f2"), "text": np.array(["ab", "c"]), "bytes": b"\x00\xff", "none": None}
    many |= {"number": np.float32(0.1), "flag": np.bool_(True), "order": np.asfortranarray(np.arange(6).reshape(2, 3))}
    many |= {"nested": [1, (2.5, "x"), {"deep": np.zeros((0, 2))}], "objects": np.array(["a", 1, None], object), 3: 4}
    path = write(tmp_path / "a.npy", [frame(1), many], protocol)
    ours, numpys = load(path), np.load(path, allow_pickle=True)
    assert len(ours) == 2
    for mine, theirs in zip(ours, numpys, strict=True):
        assert mine.keys() == theirs.keys()
        np.testing.assert_equal(mine, theirs)
    assert ours[1]["half"].dtype == np.dtype(">f2") and type(ours[1]["number"]) is np.float32
    np.save(tmp_path / "b.npy", numpys, allow_pickle=True)
    np.testing.assert_equal(load(tmp_path / "b.npy"), ours)


def test_the_table_is_what_the_reference_resets_to(folder):
    found = list(rlinf_starts.read(folder))
    table = rlinf_starts.to_starts(found, rlinf_starts.tasks(found))
    assert len(table) == 3 and table.initials == 2
    assert table.task_K.tolist() == [1, 0, 0]  # by alphabet
    assert table.seed_K.tolist() == [7, 8, 9] and table.step_K.tolist() == [0, 0, 5]
    assert table.anchor_KHWC[:, 0, 0, 0].tolist() == [10, 20, 30]
    # memory: copies of the start, or the last four frames with the actions that led into them
    assert table.memory_KMHWC[:, :, 0, 0, 0].tolist() == [[10] * 4, [20] * 4, [32, 33, 34, 35]]
    np.testing.assert_allclose(table.action_KMA[2, :, 0], [0.32, 0.33, 0.34, 0.35])
    np.testing.assert_array_equal(table.action_KMA[0], [NULL_ACTION] * 4)
    np.testing.assert_allclose(table.played_KSA[2, :, 0], [0.31, 0.32, 0.33, 0.34, 0.35])
    assert [row["rule"] for row in table.provenance()] == ["initial", "initial", "last_event"]


def test_saved_and_gathered_like_any_other(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rlinf_starts", str(folder), "--out", str(tmp_path / "ours")])
    rlinf_starts.main()
    assert "2 starts and 1 keyframes of 2 tasks" in capsys.readouterr().out
    table = starts.load(tmp_path / "ours")
    start = starts.gather(table, np.array([2, 0]), np.array([[5, 6], [7, 8]], np.int32))
    assert start.keyframe_B.tolist() == [True, False] and start.prompt_BL.tolist() == [[5, 6], [7, 8]]
    with pytest.raises(SystemExit, match="exists already"):
        rlinf_starts.main()


def test_keyframes_as_episodes(folder, tmp_path):
    found = list(rlinf_starts.read(folder))
    episodes.write(tmp_path / "ours", rlinf_starts.to_episodes(found, rlinf_starts.tasks(found)))
    (episode,) = episodes.read(tmp_path / "ours")
    assert episode.frame_SHWC.shape == (6, 4, 6, 3) and not episode.success_S.any()
    np.testing.assert_allclose(episode.action_SA[:, 0], [0.31, 0.32, 0.33, 0.34, 0.35])
    # the same memory as the table gives: our convention and theirs meet
    ours = starts._build([episode], [(0, 5, "last_event")], 4)
    theirs = rlinf_starts.to_starts(found[2:], [BOWL])
    np.testing.assert_array_equal(ours.memory_KMHWC, theirs.memory_KMHWC)
    np.testing.assert_array_equal(ours.action_KMA, theirs.action_KMA)


# Refusals ---------------------------------------------------------------------------------------------------


class Runs:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_is_never_run(tmp_path, protocol):
    mark = tmp_path / "mark"
    for call in ((os.mkdir, str(mark)), (eval, f"open({str(mark)!r}, 'w')"), (getattr, [], "append")):
        path = write(tmp_path / "bad.npy", [frame(1, note=Runs(*call))], protocol)
        with pytest.raises(RefusedError, match=r"bad\.npy: refused, it names .*, which plain data do not need"):
            load(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "call, message",
    [
        ((np.ndarray, (2,)), "makes an array without content"),
        ((np.dtype, "V8"), "an array of type 'V8'"),
        ((np.dtype, "f4"), "is of type Dtype"),
        ((np.memmap, "x"), "it names numpy.memmap"),
        ((np.lib.npyio.NpzFile, "x"), "it names numpy.lib"),
    ],
)
def test_not_even_numpy_may_be_called_with_anything(tmp_path, call, message):
    with pytest.raises(RefusedError, match=message):
        load(write(tmp_path / "a.npy", [frame(1, note=Runs(*call))]))


def test_what_is_not_plain_is_named_with_its_place(tmp_path):
    for value, message in (
        ({1, 2}, r"a\.npy\[0\]\['note'\] is of type set"),
        (1j, r"it names builtins\.complex"),
        (np.zeros(2, [("x", "f4")]), "an array of type 'V4'|compound type"),
        (np.datetime64("2020-01-01"), "an array of type 'M8'"),
        ({(1, 2): 3}, "has a key of type tuple"),
    ):
        with pytest.raises(RefusedError, match=message):
            load(write(tmp_path / "a.npy", [frame(1, note=value)]))
    loop = []
    loop.append(loop)
    with pytest.raises(RefusedError, match="nested more than 50 deep"):
        load(write(tmp_path / "a.npy", [frame(1, note=loop)]))


def test_forged_arrays_are_refused(tmp_path):
    """States that numpy itself would take on trust: too few bytes, objects as numbers, negative lengths."""
    array = np.zeros(3, np.uint8)
    make, arguments, state = array.__reduce__()
    for forged in (
        (1, (3000,), state[2], False, b"abc"),
        (1, (3,), np.dtype(object), False, b"abcdefgh" * 3),
        (1, (-1, -3), state[2], False, b"abc"),
        (1, (3,), state[2], False, [1, 2, 3]),
    ):

        class Forged:
            def __reduce__(self, forged=forged):
                return make, arguments, forged

        with pytest.raises(RefusedError, match="is an array of|objects where numbers"):
            load(write(tmp_path / "a.npy", [frame(1, note=Forged())]))


def test_stand_ins_cannot_be_changed(tmp_path):
    """A pickle may set attributes of whatever it names; here it may not."""
    names = [(b"numpy", b"ndarray"), (b"_codecs", b"encode"), (b"numpy._core.multiarray", b"scalar")]
    for module, name in names:
        for made in (b"", b"(VAA\ntR"):  # the class itself, and an instance where there can be one
            forged = b"\x80\x04c" + module + b"\n" + name + b"\n" + made + b"N}(Vstate\nI1\nu\x86b."
            path = tmp_path / "a.npy"
            with path.open("wb") as file:
                np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": (1,)})
                file.write(forged)
            with pytest.raises(RefusedError):
                load(path)
    assert load(write(tmp_path / "b.npy", [{"n": np.float64(2)}])) == [{"n": 2.0}]


def test_damaged_and_foreign_files(tmp_path):
    path = write(tmp_path / "a.npy", [frame(1)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(RefusedError, match="damaged or cut short"):
        load(path)
    path.write_bytes(whole + b"more")
    with pytest.raises(RefusedError, match="bytes follow after the end"):
        load(path)
    path.write_bytes(whole[80:])
    with pytest.raises(RefusedError, match=r"it is not an \.npy file"):
        load(path)
    np.save(tmp_path / "plain.npy", np.zeros(3))
    with pytest.raises(RefusedError, match=r"an array of float64\[3\], not of objects"):
        load(tmp_path / "plain.npy")
    with pytest.raises(RefusedError, match="no such file"):
        load(tmp_path / "none.npy")


@pytest.mark.parametrize(
    "frames, message",
    [
        ([1, 2], "expected a list of frames, each a dict, got int"),
        (
            [frame(1) | {"image": np.zeros((3, 4, 6), np.uint8)}],
            r"expected 'image' as uint8 .* got uint8\[3, 4, 6\]",
        ),
        ([frame(1) | {"image": "x"}], "got str"),
        ([frame(1)] * 3 + [frame(1) | {"delta_action": np.zeros(8)}], "frame 3: expected 'delta_action' as 7 finite"),
        ([{k: v for k, v in frame(1).items() if k != "delta_action"}] * 4, "frame 0: expected 'delta_action'"),
        ([frame(1, "  ")], "expected 'instruction' or 'task' as text"),
        ([frame(1), frame(1) | {"image": np.zeros((2, 2, 3), np.uint8)}], "different sizes"),
    ],
)
def test_what_a_frame_must_have(tmp_path, frames, message):
    with pytest.raises(RefusedError, match=message):
        rlinf_starts.trajectory(write(tmp_path / "a.npy", frames))


def test_folders_and_tasks(folder, tmp_path):
    with pytest.raises(NoDataError, match=r"no folder with \.npy files"):
        list(rlinf_starts.read(tmp_path / "nowhere"))
    assert len(list(rlinf_starts.read(folder, keyframes=False))) == 2
    found = list(rlinf_starts.read(folder))
    assert rlinf_starts.tasks(found, [WINE, "x", BOWL]) == [WINE, "x", BOWL]
    with pytest.raises(NoDataError, match="1 instructions are not among the 1 tasks: 'put the wine"):
        rlinf_starts.tasks(found, [BOWL])
    write(folder / "small.npy", [frame(1) | {"image": np.zeros((2, 2, 3), np.uint8)}])
    with pytest.raises(NoDataError, match="of one frame size"):
        rlinf_starts.to_starts(list(rlinf_starts.read(folder)), [BOWL, WINE])
