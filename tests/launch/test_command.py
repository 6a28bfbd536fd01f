"""The command line of the doors: what it accepts, and that every mistake at it is answered in a line or two."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from configs import common
from launch import command

ROOT = pathlib.Path(__file__).resolve().parents[2]

CONFIG = '''
"""Settings for the tests of the door."""
from configs import common

def get_config(preset=""):
    settings = common.settings(job="pace", name="table", seed=0, rounds=2, sizes=(4,), world=dict(chunk=8))
    return common.with_preset(settings, preset, {"short": short, "long": long})

def short(settings):
    settings.rounds = 1

def long(settings):
    settings.rounds = 9
'''

# Runs the door with `pace.run` and the door that follows replaced: the door's own work is all that happens.
STAND_IN = """
import json, runpy, sys, types
sys.argv = sys.argv[1:]
pace, results = types.ModuleType("wovr_jax.pace"), {}
class Stopped(KeyboardInterrupt):
    signal = 15
def run(job, settings, folder, allow_change):
    if settings["rounds"] in (7, 8):
        raise KeyboardInterrupt if settings["rounds"] == 7 else Stopped
    results.update(job=job, settings=settings, folder=str(folder))
pace.run, sys.modules["wovr_jax.pace"] = run, pace
import wovr_jax
from launch import command
def become(door, *words):
    print(json.dumps(results | {"then": [door, *map(str, words)]}))
    sys.exit()
wovr_jax.pace, command.become = pace, become
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
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT)


def test_settings_reach_the_job(config_file):
    done = door(f"--config={config_file}:short", "--config.world.chunk=4", "--config.seed=3")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[0])
    assert found["job"] == "pace"
    changed = {"seed": 3, "rounds": 1, "world": {"chunk": 4}}
    assert found["settings"] == {"job": "pace", "name": "table", "sizes": [4], **changed}
    assert found["folder"] == str(ROOT / "runs" / "table-short-seed3")


@pytest.mark.parametrize(
    ("words", "then"),
    [
        (["--run=x"], ["audit.py", "x", "--config.mesh.data=1"]),
        (
            ["--run=x", "--config.mesh.fsdp=2", "--config.mesh.data=-1"],
            ["audit.py", "x", "--config.mesh.data=-1", "--config.mesh.fsdp=2"],
        ),
        (["--run=x", "--config.job=sft"], ["tools/report.py", "x"]),
    ],
)
def test_the_whole_loop_goes_on_with_the_audit_on_the_mesh_in_use_and_other_jobs_with_the_page(
    config_file, words, then
):
    done = door(f"--config={config_file}", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["then"] == then


OTHER = """
import os, sys
open_ones = []
for number in range(3, 64):
    try:
        os.fstat(number)
        open_ones.append(number)
    except OSError:
        pass
print(os.getpid(), sys.argv[1:], open_ones)
sys.exit(7)
"""


def test_a_door_becomes_another_one_in_the_same_process_and_keeps_nothing_open(tmp_path):
    other, lock = tmp_path / "other.py", tmp_path / "lock"
    other.write_text(OTHER)
    first = "import os, sys; from launch import command; print(os.getpid()); fd = os.open(sys.argv[2], os.O_CREAT); "
    first += "os.set_inheritable(fd, True); command.become(sys.argv[1], 'a b', 3)"
    program = [sys.executable, "-c", first, str(other), str(lock)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, cwd=ROOT)
    pid, said = done.stdout.splitlines()
    assert said == f"{pid} ['a b', '3'] []" and done.returncode == 7, done.stderr


def test_settings_that_the_file_does_not_list_reach_the_job_too(config_file):
    extra = ["--config.world.flow.steps=3", "--config.rates=(1,2)", "--config.kind=true"]
    done = door(f"--config={config_file}", *extra, "--config.world.chunk", "-4")
    assert done.returncode == 0, done.stderr
    settings = json.loads(done.stdout.splitlines()[0])["settings"]
    assert settings["world"] == {"chunk": -4, "flow": {"steps": 3}}
    assert (settings["rates"], settings["kind"]) == ([1, 2], True)


def settings_of(config_file, *words):
    parser = command.Parser("")
    command.add_config(parser)
    return command.read(parser, [f"--config={config_file}", *words]).settings


@pytest.mark.parametrize(
    ("word", "name", "value"),
    [
        ("--config.name=007", "name", "007"),  # a text stays a text, whatever it looks like
        ("--config.name=None", "name", "None"),
        ("--config.name=", "name", ""),
        ("--config.name=it's a=b", "name", "it's a=b"),
        ("--config.seed=1e3", "seed", 1000.0),
        ("--config.seed=abc", "seed", "abc"),  # the package refuses it, in its own words
        ("--config.sizes=3", "sizes", (3,)),
        ("--config.sizes=3,4", "sizes", (3, 4)),
        ("--config.sizes=()", "sizes", ()),
        ("--config.sizes=no_kir", "sizes", ("no_kir",)),
        ("--config.sizes=no_kir,no_mask", "sizes", ("no_kir", "no_mask")),
        ("--config.mask=none", "mask", None),
        ("--config.mask=False", "mask", False),
    ],
)
def test_the_listed_setting_says_what_a_text_means(config_file, word, name, value):
    found = settings_of(config_file, word)[name]
    assert found == value and type(found) is type(value)


def test_the_last_word_counts_and_changes_of_unlisted_groups_meet(config_file):
    settings = settings_of(config_file, "--config.seed=1", "--config.a.b=1", "--config.a.c=x", "--config.seed=2")
    assert (settings["seed"], settings["a"]) == (2, {"b": 1, "c": "x"})


@pytest.mark.parametrize(
    ("job", "word", "says"),
    [
        ("train:pace", "--config.evaluate.episods=3", "Did you mean config.evaluate.episodes?"),
        ("study:ladder", "--config.evaluate.episods=3", "Did you mean config.evaluate.episodes?"),
        ("train:pace", "--config.seed=abc", "config.seed: expected int, got 'abc'"),
    ],
)
def test_the_package_refuses_what_it_does_not_know(tmp_path, job, word, says):
    """The real thing, up to the strict construction of the settings."""
    door, config = job.split(":")
    words = [f"--config={ROOT}/configs/{config}.py", f"--run={tmp_path}/run", word]
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / f"{door}.py", *words], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert says in done.stderr
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
        (["--config=FILE", "--config.rounds"], "Expected a value, --config.rounds=value, got none"),
        (["--config=FILE", "--config.rounds", "--config.seed=1"], "Expected a value, --config.rounds=value, got none"),
        (["--config=FILE", "--config.job=ladder"], "config.job=ladder belongs to launch/study.py"),
        (["--config=README.md"], "--config=README.md: line "),
        (["--config=configs/common.py"], "has no function get_config(preset)"),
        (["--config=BROKEN"], "line 3: ZeroDivisionError: division by zero"),
        (["--config=FILE", "--config.rounds.x=2"], "config.rounds is a value, not a group of settings"),
        (["--config=FILE", "--confg.rounds=2"], "there is no flag --confg.rounds; did you mean --config?"),
        (["--config=FILE", "seed=2"], "expected only --name=value, got seed=2"),
    ],
)
def test_a_mistake_is_answered_in_a_line_or_two(config_file, arguments, says):
    broken = config_file.with_name("broken.py")
    broken.write_text('"""A config file with a bug."""\ndef get_config(preset=""):\n    return 1 / 0\n')
    places = {"FILE": config_file, "BROKEN": broken}
    done = door(*(re.sub("FILE|BROKEN", lambda name: str(places[name[0]]), argument) for argument in arguments))
    assert done.returncode == 1
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2, done.stderr


def test_presets_apply_from_left_to_right():
    presets = {"one": lambda s: s.update(n=1), "ten": lambda s: s.update(n=10), "double": lambda s: s.update(n=2 * s.n)}
    assert common.with_preset(common.settings(n=3), "", presets).n == 3
    assert common.with_preset(common.settings(n=3), "ten,double", presets).n == 20
    with pytest.raises(ValueError, match="There are: :one, :ten, :double"):
        common.with_preset(common.settings(n=3), "none", presets)
