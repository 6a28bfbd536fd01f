"""What is said where LIBERO cannot run, and how its files are read. Without LIBERO."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import zipfile

import numpy as np
import pytest

from wovr_jax.data.episodes import instruction_of
from wovr_jax.sim import arena
from wovr_jax.sim.libero import machine, setup, tasks
from wovr_jax.sim.libero.setup import LiberoError
from wovr_jax.sim.libero.tasks import LiberoExpertConfig, SceneConfig


def pruned_init(path, value, protocol=2):
    """As torch writes it: a zip with the pickle of a numpy array, which old versions called numpy.core."""
    pickled = pickle.dumps(value, protocol).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    return path


def test_initial_states_are_read_without_torch(tmp_path):
    states = np.random.default_rng(0).normal(size=(50, 92))
    assert np.array_equal(tasks.read_init_states(pruned_init(tmp_path / "a.pruned_init", states)), states)


class Runs:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Runs(), r"it names \w+\.mkdir"),
        ([Runs()], r"it names \w+\.mkdir"),
        ([1, 2], r"expected an array \(states, numbers\) of float64, got list"),
        (np.zeros(3), r"got float64\[3\]"),
        (np.zeros((2, 3), np.float32), r"got float32\[2, 3\]"),
    ],
)
def test_other_contents_are_refused_and_never_run(tmp_path, monkeypatch, value, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LiberoError, match=message):
        tasks.read_init_states(pruned_init(tmp_path / "a.pruned_init", value))
    assert not (tmp_path / "made-by-a-pickle").exists()


def test_damaged_and_missing_initial_states_are_named(tmp_path):
    path = pruned_init(tmp_path / "a.pruned_init", np.zeros((2, 3)))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(LiberoError, match=r"a\.pruned_init: cannot be read as initial states"):
        tasks.read_init_states(path)
    with pytest.raises(LiberoError, match=r"b\.pruned_init: no such file"):
        tasks.read_init_states(tmp_path / "b.pruned_init")
    buffer = io.BytesIO()
    pickle.dump(np.zeros((2, 3)), buffer)
    (tmp_path / "c.pruned_init").write_bytes(buffer.getvalue())
    with pytest.raises(LiberoError, match=r"c\.pruned_init: cannot be read .*BadZipFile"):
        tasks.read_init_states(tmp_path / "c.pruned_init")


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("open_the_middle_drawer_of_the_cabinet", "open the middle drawer of the cabinet"),
        ("KITCHEN_SCENE10_close_the_top_drawer_of_the_cabinet", "close the top drawer of the cabinet"),
        ("LIVING_ROOM_SCENE5_put_the_red_mug_on_the_left_plate", "put the red mug on the left plate"),
        ("STUDY_SCENE1_pick_up_the_book_demo", "pick up the book"),
    ],
)
def test_instructions_come_from_file_names(name, asked):
    assert instruction_of(name) == asked


def test_protocols_and_their_horizons():
    openvla, rlinf = tasks.protocol("openvla"), tasks.protocol("rlinf")
    assert list(openvla.horizons.values()) == [220, 280, 300, 520, 400] and openvla.settle == 10 and openvla.stops
    assert set(rlinf.horizons.values()) == {512} and rlinf.settle == 15 and not rlinf.stops
    with pytest.raises(LiberoError, match="one of openvla, rlinf, got 'pi'"):
        tasks.protocol("pi")
    with pytest.raises(LiberoError, match="libero_spatial, .*, got 'spatial'"):
        tasks.tasks("spatial")


# ---------------------------------------------------------------- the machine


@pytest.fixture
def fresh_choice():
    machine.choose_renderer.cache_clear()
    yield
    machine.choose_renderer.cache_clear()


def test_no_renderer_names_the_debian_package(monkeypatch, fresh_choice):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(machine.ctypes.util, "find_library", lambda name: None)
    with pytest.raises(LiberoError, match=r"libEGL is missing.*libOSMesa is missing|libOSMesa.*libEGL") as caught:
        machine.choose_renderer()
    assert str(caught.value).splitlines()[-1].strip() == "sudo apt-get install -y libosmesa6"


def test_a_renderer_that_was_asked_for_is_checked(monkeypatch, fresh_choice):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setattr(machine, "try_renderer", lambda name: "it hangs")
    with pytest.raises(LiberoError, match=r"egl: it hangs\.\n  sudo apt-get install -y libegl1"):
        machine.choose_renderer()
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    with pytest.raises(LiberoError, match="without a screen it is egl or osmesa"):
        machine.choose_renderer()


def test_the_first_renderer_that_draws_is_chosen(monkeypatch, fresh_choice):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(machine, "renderers", lambda: ("egl", "osmesa"))
    monkeypatch.setattr(machine, "try_renderer", lambda name: "broken" if name == "egl" else None)
    assert machine.choose_renderer() == "osmesa"


@pytest.mark.parametrize(
    ("cuda", "named", "tried"),
    [(None, None, ["0"]), ("", None, ["0"]), ("1", None, ["1", "0"]), ("3,4", None, ["3", "0"])]
    + [("GPU-5a1b", None, ["0"]), ("3", "0", ["0"]), ("", "2", ["2"])],
)
def test_the_card_to_draw_on_is_not_the_one_to_compute_on(monkeypatch, cuda, named, tried):
    for name, value in {machine.CUDA: cuda, machine.CARD: named}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    asked = []

    def draw(command, *, env, **_):
        assert machine.CUDA not in env and "EGLGLContext" in command[-1]
        asked.append(env[machine.CARD])
        return subprocess.CompletedProcess(
            command, 0, "drawn" if env[machine.CARD] == tried[-1] else "", "no such card"
        )

    monkeypatch.setattr(machine.ctypes.util, "find_library", lambda name: name)
    monkeypatch.setattr(machine.subprocess, "run", draw)
    assert machine.try_renderer("egl") is None and asked == tried
    assert os.environ[machine.CARD] == tried[-1]  # workers inherit it
    tried.append("none of them")
    os.environ.pop(machine.CARD)
    assert machine.try_renderer("egl") == "no such card"


def test_a_user_without_a_home_is_told_to_name_the_assets(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.os.path, "expanduser", lambda path: path)  # as where nobody knows the home
    monkeypatch.delenv(machine.ASSETS, raising=False)
    with pytest.raises(LiberoError, match=r"\$HOME is not set, .*\n  export LIBERO_ASSETS=<folder>"):
        machine.downloaded()
    monkeypatch.setattr(machine, "package_folder", lambda: tmp_path)
    for name in machine.FOLDERS:
        (tmp_path / "assets" / name).mkdir(parents=True)
    assert machine.assets_folder() == tmp_path / "assets"  # what needs no home runs


def test_a_folder_that_lacks_assets_is_named(tmp_path, monkeypatch):
    for name in machine.FOLDERS[1:]:
        (tmp_path / name).mkdir()
    monkeypatch.setenv("LIBERO_ASSETS", str(tmp_path))
    with pytest.raises(LiberoError, match="there is no articulated_objects in it"):
        machine.assets_folder()
    (tmp_path / machine.FOLDERS[0]).mkdir()
    assert machine.assets_folder() == tmp_path


def test_assets_have_a_hash_of_their_content(tmp_path):
    for name in machine.FOLDERS:
        (tmp_path / name).mkdir()
    (tmp_path / "scenes" / "a.xml").write_text("<a/>")
    (tmp_path / "README.md").write_text("not an asset")
    first = machine.hash_folder(tmp_path)
    (tmp_path / "README.md").write_text("changed")
    assert machine.hash_folder(tmp_path) == first
    (tmp_path / "scenes" / "a.xml").write_text("<b/>")
    assert machine.hash_folder(tmp_path) != first


def test_a_download_that_fails_says_what_else_there_is(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(LiberoError, match=r"no route to host\).\n  export LIBERO_ASSETS="):
        machine.download_assets()
    assert not machine.downloaded().exists()


def test_a_download_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    import huggingface_hub

    def arrive(name, repo_type, local_dir):
        assert (name, repo_type) == ("lerobot/libero-assets", "dataset") and not machine.downloaded().exists()
        for folder in machine.FOLDERS:
            (local_dir / folder).mkdir(parents=True)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", arrive)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (machine.download_assets() / "scenes").is_dir()
    machine.download_assets()  # as of a process that waited while another one downloaded
    assert sorted(path.name for path in machine.downloaded().parent.iterdir()) == ["assets", "assets.lock"]


@pytest.fixture
def settle_anew():
    setup.settle.cache_clear()
    yield
    setup.settle.cache_clear()


def test_a_run_hands_what_a_program_settled_to_its_workers(monkeypatch, settle_anew):
    asked, answer = [], {"renderer": "egl", "environment": {machine.CARD: "1", machine.ASSETS: "meshes"}}
    for name in answer["environment"]:
        monkeypatch.setenv(name, "of before")
    monkeypatch.setattr(arena, "call_program", lambda *words: asked.append(words) or (0, json.dumps(answer)))
    assert setup.settle(True) == setup.settle(True) == "egl" and asked == [(setup.SETTLE, "settle", "--draw")]
    assert {name: os.environ[name] for name in answer["environment"]} == answer["environment"]


def test_a_program_that_settles_nothing_says_why(monkeypatch, settle_anew):
    monkeypatch.setattr(arena, "call_program", lambda *_: (1, ""))
    with pytest.raises(LiberoError, match=r"settle_libero\.py ended with exit status 1; what it said stands above"):
        setup.settle(False)


def test_the_program_refuses_and_answers_as_the_machine_does(monkeypatch, settle_anew):
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    with pytest.raises(LiberoError, match=r"^MUJOCO_GL is 'glfw'; .*\.\n  unset MUJOCO_GL$"):
        setup.settle(True)
    monkeypatch.setenv(machine.ASSETS, "nowhere")
    with pytest.raises(LiberoError, match="there is no articulated_objects"):
        setup.fingerprint(None)
    monkeypatch.delenv(machine.ASSETS)
    if machine.installed()["hf-libero"] is None:
        with pytest.raises(LiberoError, match="LIBERO is not installed"):
            setup.settle(False)


def test_configs_refuse_what_they_do_not_know():
    with pytest.raises(ValueError, match="one of 'libero', 'fast', got 'nice'"):
        SceneConfig(drawing="nice")
    with pytest.raises(ValueError, match="early_release"):
        LiberoExpertConfig(flaw="clumsy")
