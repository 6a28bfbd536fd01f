"""Pointers, pages, archives, locks and folders in the place of data: each is named with its cure."""

from __future__ import annotations

import argparse

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("h5py")

from data_prep import libero_hdf5
from data_prep.demos import SourceError
from data_prep.files import check, place, unreadable
from tests.data_prep import test_lerobot as sets
from tests.data_prep.test_libero_hdf5 import BOWL
from tests.data_prep.test_libero_hdf5 import run as run_hdf5
from tests.data_prep.test_libero_hdf5 import write as write_hdf5
from tests.data_prep.test_troubles import FIRST, LISTING, POINTER, convert


@pytest.fixture
def folder(tmp_path):
    return sets.write(tmp_path / "set", "v3.0", "image")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER.encode(), "a pointer of Git LFS, not a film: fetch the data with `git lfs pull`"),
        (b"", r"empty \(0 bytes\), expected a film"),
        (b"<!DOCTYPE html><html>", "this is a page of the web"),
        (b"PK\x03\x04zip", "this is a zip archive; unpack it"),
        (b"PAR1table", "this is a parquet file"),
    ],
)
def test_what_a_file_is_in_place_of_data(tmp_path, content, message):
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        check(tmp_path / "a.mp4", "a film")


def test_folders_links_and_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(SourceError, match="expected a film, this is a folder"):
        check(tmp_path, "a film")
    (tmp_path / "a").symlink_to(tmp_path / "blob")
    with pytest.raises(SourceError, match="a link to .*blob, which is not there"):
        check(tmp_path / "a", "a film")


@pytest.mark.parametrize("name", [FIRST, "meta/info.json", "meta/tasks.parquet", LISTING])
def test_pointers_in_the_place_of_tables_are_named(folder, monkeypatch, name):
    (folder / name).write_text(POINTER, encoding="utf-8")
    with pytest.raises(SystemExit, match="Git LFS"):
        convert(monkeypatch, folder)


def test_a_folder_that_is_one_too_high_is_named(folder, monkeypatch):
    with pytest.raises(SystemExit, match=r"this is no LeRobot data set: a data set lies in set; name"):
        sets.run(monkeypatch, folder.parent, "--out", folder.parent / "ours")
    with pytest.raises(SystemExit, match=r"a data set lies in .*set; name that folder"):
        sets.run(monkeypatch, folder / "data/chunk-000", "--out", folder.parent / "ours")


@pytest.mark.parametrize("ending", ["h5", "HDF5", "H5"])
def test_files_of_other_endings_are_read(tmp_path, monkeypatch, ending):
    path = write_hdf5(tmp_path / "in" / f"{BOWL}_demo.hdf5")
    path.rename(path.with_suffix(f".{ending}"))
    run_hdf5(monkeypatch, tmp_path / "in", "--out", tmp_path / "out")
    assert (tmp_path / "out/manifest.json").is_file()


def test_a_folder_above_the_files_is_no_folder_without_them(tmp_path):
    write_hdf5(tmp_path / "libero_spatial" / f"{BOWL}_demo.hdf5")
    with pytest.raises(SourceError, match="a file of demonstrations lies in libero_spatial; name"):
        libero_hdf5.find(tmp_path)


def test_a_file_that_is_locked_or_closed_is_not_called_damaged(tmp_path):
    locked = OSError("unable to lock file, errno = 11, error message = 'Resource temporarily unavailable'")
    assert "HDF5_USE_FILE_LOCKING=FALSE" in unreadable(tmp_path, "an HDF5 file", locked)
    assert "chmod u+r" in unreadable(tmp_path, "an HDF5 file", PermissionError(13, "Permission denied"))


def test_another_kind_of_data_is_named(tmp_path):
    (tmp_path / "x_demo.hdf5").write_bytes(b"PAR1 and more")
    with pytest.raises(SourceError, match="expected an HDF5 file, this is a parquet file"):
        list(libero_hdf5.read(tmp_path / "x_demo.hdf5"))


def test_a_path_may_begin_at_home_and_is_no_address(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert place("~/data") == tmp_path / "data"
    with pytest.raises(argparse.ArgumentTypeError, match="expected a path on this machine, got the address gs://b/x"):
        place("gs://b/x")
