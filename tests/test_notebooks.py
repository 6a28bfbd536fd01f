"""The notebooks that need no finished run, executed at the smallest size, and what holds for all of them.

Those that do need one are executed in ``test_pace.py``, which has one.
"""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.notebooks import ROOT, run_cells
from tests.small_run import save_parts, small_settings
from wovr_jax.sim.libero import machine, setup

NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
STORED_BYTES = 250_000
"""Of a notebook with its outputs: a figure or three."""


def test_weights_go_in_and_out(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    names = run_cells("03_weights_in_and_out.ipynb", tmp_path, monkeypatch)
    said = capsys.readouterr().out
    assert "every leaf as it was: True" in said and "3 problems; nothing was converted" in said
    assert names["theirs"].read_bytes() == names["back"].read_bytes()
    files = [path.name for path in names["release"].iterdir()]
    assert len(files) == 3
    for file in files:
        assert (names["release"] / file).read_bytes() == (names["work"] / "robot" / file).read_bytes(), file
    assert names["figures"] == 1


def test_own_episodes_become_a_world_model(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    settings = small_settings(save_parts(tmp_path / "parts"))
    monkeypatch.setattr("configs.pace.get_config", lambda: ConfigDict(settings))
    monkeypatch.setenv("WOVR_EPISODES", "12")
    monkeypatch.setenv("WOVR_STEPS", "2")
    names = run_cells("04_your_own_episodes.ipynb", tmp_path, monkeypatch)
    said = capsys.readouterr().out
    assert "What was believed:" in said and "(-1 open, 1 closed)" in said
    # What came back is what was recorded, but for the order of the tasks.
    recorded = {episode.seed: episode for episode in names["disk"].EpisodeSource(names["recorded"])}
    assert [episode.seed for episode in names["episodes"]] == sorted(recorded)
    for episode in names["episodes"]:
        before = recorded[episode.seed]
        assert episode.instruction == before.instruction
        assert np.array_equal(episode.frame_SHWC[:-1], before.frame_SHWC[:-1])
        assert np.array_equal(episode.action_SA, before.action_SA)
    assert names["world"].facts["windows"] > 0
    assert [frames.shape for frames in names["imagined"]] == [names["held_out"][0].frame_SHWC.shape] * 2
    assert names["figures"] == 1


@pytest.mark.libero
def test_libero_is_demonstrated_read_and_measured(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    try:
        setup.package_folder()
        machine.choose_renderer()
        if machine.assets_folder() is None:
            raise setup.LiberoError("no assets")
    except setup.LiberoError as error:
        pytest.skip(f"the real LIBERO does not run here: {error}")
    monkeypatch.setenv("WOVR_EPISODES", "1")
    monkeypatch.setenv("WOVR_TRIALS", "1")
    names = run_cells("05_libero.ipynb", tmp_path, monkeypatch)
    said = capsys.readouterr().out
    (won,) = names["episodes"]
    assert won.frame_SHWC.shape[1:] == (128, 128, 3) and won.success_S.any() and won.origin["init"] == 0
    assert names["failed"].origin["flaw"] == "early_release" and not names["failed"].success_S.any()
    assert "actions as they were: True" in said
    assert names["answer"]["outcomes"] == {"libero_object/7/10/0": True}
    assert "1 of 2 trials begin at initial states that training saw" in said
    assert names["figures"] == 3


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_listed_tested_and_stored_small(name: str) -> None:
    path = ROOT / "notebooks" / name
    notebook = json.loads(path.read_text())
    assert path.stat().st_size < STORED_BYTES
    assert f"](../notebooks/{name})" in (ROOT / "docs" / "notebooks.md").read_text()
    tests = [(ROOT / "tests" / file).read_text() for file in ("test_pace.py", "test_notebooks.py")]
    assert any(f'run_cells("{name}"' in text for text in tests), f"{name} is executed by no test"
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            assert output["output_type"] != "error" and output.get("name") != "stderr", f"{name}: {output}"
    assert notebook["cells"][0]["cell_type"] == "markdown" and notebook["cells"][0]["source"][0].startswith("# ")
