"""The door: what it accepts, and that every mistake at it is answered in a line or two."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from configs import common

ROOT = pathlib.Path(__file__).resolve().parents[1]

CONFIG = '''
"""Settings for the tests of the door."""
from configs import common

def get_config(preset=""):
    settings = common.settings(job="pace", seed=0, rounds=2, world=dict(chunk=8))
    return common.with_preset(settings, preset, {"short": short, "long": long})

def short(settings):
    settings.rounds = 1

def long(settings):
    settings.rounds = 9
'''

# Runs the door with `pace.run` replaced: the door's own work is all that happens, and no network is built.
STAND_IN = """
import json, runpy, sys, types
sys.argv = sys.argv[1:]
pace, tables = types.ModuleType("wovr_jax.pace"), types.ModuleType("wovr_jax.report.tables")
class Stopped(KeyboardInterrupt):
    signal = 15
def run(job, settings, folder, allow_change):
    if settings["rounds"] in (7, 8):
        raise KeyboardInterrupt if settings["rounds"] == 7 else Stopped
    return {"job": job, "settings": settings, "folder": str(folder)}
pace.run, tables.render_text = run, json.dumps
sys.modules["wovr_jax.pace"], sys.modules["wovr_jax.report.tables"] = pace, tables
import wovr_jax
wovr_jax.pace = pace
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("settings") / "table.py"
    file.write_text(CONFIG)
    return file


def door(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", STAND_IN, str(ROOT / "launch" / "train.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_settings_reach_the_job(config_file):
    done = door(f"--config={config_file}:short", "--config.world.chunk=4", "--config.seed=3")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[0])
    assert found["job"] == "pace"
    assert found["settings"] == {"job": "pace", "seed": 3, "rounds": 1, "world": {"chunk": 4}}
    assert found["folder"] == str(ROOT / "runs" / "table-short-seed3")


def test_settings_that_the_file_does_not_list_reach_the_job_too(config_file):
    extra = ["--config.world.flow.steps=3", "--config.name=new", "--config.sizes=(1,2)", "--config.kind=true"]
    done = door(f"--config={config_file}", *extra, "--config.world.chunk=4")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[0])["settings"]
    assert found["world"] == {"chunk": 4, "flow": {"steps": 3}}
    assert (found["name"], found["sizes"], found["kind"]) == ("new", [1, 2], True)


def test_the_package_refuses_what_it_does_not_know(tmp_path):
    """The real thing, up to the strict construction of the settings."""
    command = [
        sys.executable,
        ROOT / "launch" / "train.py",
        f"--config={ROOT}/configs/pace.py",
        f"--run={tmp_path}/run",
    ]
    done = subprocess.run([*command, "--config.evaluate.episods=3"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].endswith("Did you mean config.evaluate.episodes?")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("rounds", "status"), [(7, 130), (8, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupted_run_says_how_to_go_on(config_file, rounds, status):
    done = door(f"--config={config_file}", f"--config.rounds={rounds}")
    assert done.returncode == status
    assert "the same command continues" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Expected --config="),
        (["--config=configs/pcae.py"], "There is no config file configs/pcae.py"),
        (["--config=FILE:shrot"], "no preset :shrot; did you mean :short?"),
        (["--config=FILE", "--config.rounds=two"], "--config.rounds=two: invalid literal for int()"),
        (["--config=FILE", "--config.rounds.x=2"], "config.rounds is a value, not a group of settings"),
        (["--config=FILE", "--confg.rounds=2"], "Unknown command line flag 'confg.rounds'"),
        (["--config=FILE", "seed=2"], "Expected only --name=value, got seed=2."),
    ],
)
def test_a_mistake_is_answered_in_a_line_or_two(config_file, arguments, says):
    done = door(*(argument.replace("FILE", str(config_file)) for argument in arguments))
    assert done.returncode == 1
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2, done.stderr


def test_presets_apply_from_left_to_right():
    presets = {"one": lambda s: s.update(n=1), "ten": lambda s: s.update(n=10), "double": lambda s: s.update(n=2 * s.n)}
    assert common.with_preset(common.settings(n=3), "", presets).n == 3
    assert common.with_preset(common.settings(n=3), "ten,double", presets).n == 20
    with pytest.raises(ValueError, match="There are: :one, :ten, :double"):
        common.with_preset(common.settings(n=3), "none", presets)
