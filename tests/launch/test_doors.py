"""Every door: a help that needs no jax, a mistake answered in a line with its exit status, and no door too many."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

import pytest

from launch import command
from tests.report.test_compare import make_run
from wovr_jax import pace
from wovr_jax.core import disk
from wovr_jax.studies import runner

LAUNCH = pathlib.Path(command.__file__).parent

DOORS = {
    "train.py": 1,
    "audit.py": 2,
    "study.py": 1,
    "study.py probe": 2,
    "evaluate.py": 1,
    "plan.py": 1,
    "import_weights.py": 2,
    "export.py": 2,
    "serve.py": 2,
    "play.py": 2,
    "label.py": 2,
    "doctor.py": 2,
    "benchmark.py": 2,
    "benchmark.py parts": 2,
    "benchmark.py gpu": 2,
    "benchmark.py import": 2,
    "benchmark.py input": 2,
    "benchmark.py libero": 2,
    "benchmark.py serve": 2,
    "tools/kill_test.py": 2,
    "tools/pretrain_tabletop.py": 2,
    "tools/report.py": 2,
    "tools/film_strip.py": 2,
    "tools/imagine.py": 2,
    "tools/study_chart.py": 2,
    "tools/ranking_chart.py": 2,
    "tools/before_and_after.py": 2,
    "tools/moving_picture.py": 2,
    "tools/release_run.py": 2,
    "tools/demonstrate_libero.py": 2,
    "tools/read_recordings.py": 2,
    "tools/settle_libero.py": 2,
    "tools/table_robot.py show": 2,
    "tools/table_robot.py drive": 2,
    "tools/table_robot.py measure": 2,
}
"""Door -> exit status of a misspelt flag. It is 1 where a script begins again whatever ends with another status."""

WITHOUT_JAX = """
import runpy, sys
sys.modules["jax"] = sys.modules["flax"] = None  # importing them fails
sys.argv = sys.argv[1:]
sys.path[0] = "the folder of the door"  # which it replaces
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(door: str, *words: str, cwd: pathlib.Path | None = None) -> subprocess.CompletedProcess[str]:
    name, *subcommand = door.split()
    program = [sys.executable, "-c", WITHOUT_JAX, str(LAUNCH / name)]
    return subprocess.run([*program, *subcommand, *words], capture_output=True, text=True, timeout=60, cwd=cwd)


def test_these_are_the_doors() -> None:
    names = {path.relative_to(LAUNCH).as_posix() for path in (*LAUNCH.glob("*.py"), *LAUNCH.glob("tools/*.py"))}
    assert names == {door.split()[0] for door in DOORS} | {"called.py", "command.py", "flags.py", "terminal.py"}


@pytest.mark.parametrize("door", DOORS)
def test_the_help_needs_no_jax_and_begins_with_what_the_door_does(door: str, tmp_path: pathlib.Path) -> None:
    """From another directory, as every door works from any."""
    done = run(door, "--help", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.startswith("usage: ") and f"python launch/{door.split()[0]}" in done.stdout


@pytest.mark.parametrize(("door", "status"), DOORS.items())
def test_a_misspelt_flag_is_answered_in_a_line(door: str, status: int, tmp_path: pathlib.Path) -> None:
    required = {
        "import_weights.py": ["x"],
        "export.py": ["--to=jax", "--out=x"],
        "serve.py": ["x"],
        "play.py": ["x"],
        "label.py": ["x"],
        "benchmark.py": ["libero"],
        "benchmark.py import": ["--folder=x"],
        "benchmark.py input": ["--episodes=x"],
        "benchmark.py serve": ["x"],
        "audit.py": ["x"],
        "study.py probe": ["--run=x"],
        "tools/pretrain_tabletop.py": ["vae"],
        "tools/report.py": ["x"],
        "tools/film_strip.py": ["relay", "--out=x"],
        "tools/imagine.py": ["x", "y", "--out=z"],
        "tools/study_chart.py": ["x", "--out=x"],
        "tools/ranking_chart.py": ["x", "--out=x"],
        "tools/before_and_after.py": ["x", "--out=x"],
        "tools/moving_picture.py": ["x", "--out=x"],
        "tools/release_run.py": ["x", "--out=x"],
        "tools/read_recordings.py": ["--for-run={}"],
        "tools/settle_libero.py": ["settle"],
        "tools/table_robot.py show": ["x"],
        "tools/table_robot.py drive": ["x", "--wanted=x"],
        "tools/table_robot.py measure": ["x"],
    }
    done = run(door, *required.get(door, []), "--hlep", cwd=tmp_path)
    assert done.returncode == status
    assert "there is no flag --hlep; did you mean --help?" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("door", "words", "status", "says"),
    [
        ("train.py", ["--config=configs/ladder.py"], 1, "config.job=ladder belongs to launch/study.py"),
        ("train.py", ["--config=configs/evaluate.py"], 1, "config.job=evaluate belongs to launch/evaluate.py"),
        ("audit.py", [], 2, "required: run"),
        ("audit.py", ["x", "--config.evaluate.closed=4"], 2, "a finished run keeps its settings"),
        ("audit.py", ["x", "--foreign=y"], 2, "required: run, or --foreign FOLDER, and not both"),
        ("audit.py", ["--foreign=y", "--ladder"], 2, "--ladder is of a run"),
        ("audit.py", ["--foreign=y", "--config.mesh.data=1"], 2, "a finished run keeps its settings"),
        ("audit.py", ["x", "--chunk=4"], 2, "--chunk is of --foreign FOLDER"),
        ("audit.py", ["x", "--episodes=4"], 2, "--episodes is of --rank, --ladder, --signs and --twins"),
        ("audit.py", ["x", "--rank", "--shares=10"], 2, "--shares is of --ladder"),
        ("audit.py", ["x", "--ladder", "--shares=10,x"], 2, "expected percents with commas between them, got 10,x"),
        ("audit.py", ["x", "--ladder", "--shares=50,10"], 2, "in ascending order, got 50,10"),
        ("study.py", ["--config=configs/pace.py:tiny"], 1, "config.job=pace belongs to launch/train.py"),
        ("study.py", ["--config=configs/lader.py"], 1, "Did you mean --config=configs/ladder.py?"),
        ("study.py probe", ["--run=x", "--starts=1"], 2, "--starts is at least 2"),
        ("study.py probe", [], 2, "required: --run"),
        ("evaluate.py", ["--config=configs/evaluate.py:libero_spatail"], 1, "did you mean :libero_spatial?"),
        ("plan.py", ["--config=configs/pace.py", "--measure=-1"], 1, "--measure is at least 0, got -1"),
        ("plan.py", ["--config=configs/pace.py", "--measure=1", "--topology=v5e"], 1, "needs --topology=here, got v5e"),
        ("plan.py", ["--config=configs/pace.py", "--efficiency=0"], 1, "a share above 0 and at most 1, got 0.0"),
        ("import_weights.py", ["x"], 2, "give either --out FOLDER to write, or --check"),
        ("export.py", ["--to=jax", "--out=x"], 2, "say what to export"),
        ("serve.py", ["x", "--port=99999"], 2, "--port from 0 to 65535"),
        ("label.py", ["x", "--port=99999"], 2, "--port is from 0 to 65535"),
        ("serve.py", ["x", "--clients=0"], 2, "expected a whole number above 0, got 0"),
        ("benchmark.py", [], 2, "required: {parts,gpu,import,input,libero,serve}"),
        ("benchmark.py parts", ["--parts=encod"], 2, "expected some of policy, encode,"),
        ("benchmark.py parts", ["--compare=world.vae.conv=fold"], 2, "expected a setting and two values of it"),
        ("benchmark.py parts", ["--config=configs/pace.py:libero_spatail"], 1, "did you mean :libero_spatial?"),
        ("benchmark.py gpu", ["--steps=matrix,conf"], 2, "expected some of matrix, first,"),
        ("benchmark.py libero", ["--config.seed=1"], 2, "takes no settings; parts and gpu do"),
        ("benchmark.py input", ["--episodes=x", "--steps=0"], 2, "expected a whole number above 0, got 0"),
        ("benchmark.py libero", ["--workers=1,x"], 2, "expected a whole number above 0, got x"),
        ("tools/kill_test.py", ["--kills=0"], 2, "expected a whole number above 0, got 0"),
        ("tools/pretrain_tabletop.py", ["dinov2", "--kl=1"], 2, "--kl is of the VAE"),
        ("tools/read_recordings.py", ["--for-run=x"], 2, "argument --for-run: invalid"),
        ("tools/table_robot.py", ["show", "x", "--episodes=0"], 2, "expected a whole number above 0, got 0"),
        ("tools/demonstrate_libero.py", [], 2, "give either --out FOLDER to record episodes, or --measure"),
    ],
)
def test_a_wrong_input_is_answered_before_jax_is_loaded(door: str, words: list[str], status: int, says: str) -> None:
    done = run(door, *words, cwd=LAUNCH.parent)
    assert done.returncode == status and says in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) <= 2 and not done.stdout


def test_every_job_has_one_door() -> None:
    assert {job for job, door in command.DOORS.items() if door == "study"} == set(runner.JOBS)
    assert not set(command.DOORS) & set(pace.JOBS)


def test_refusals_of_the_package_are_said_and_bugs_keep_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    refusal = type("SomeError", (ValueError,), {"__module__": "wovr_jax.somewhere"})
    with pytest.raises(SystemExit, match="^too small$"), command.explain_errors("stopped"):
        raise refusal("too small")
    with pytest.raises(ValueError, match="a bug"), command.explain_errors("stopped"):
        raise ValueError("a bug")
    disk = pytest.raises(SystemExit, match="^robot: No space left on device. All is kept.$")
    with disk, command.explain_errors("stopped", place="robot", kept="All is kept."):
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space left"), command.explain_errors("stopped"):
        raise OSError(28, "No space left on device")
    with pytest.raises(SystemExit) as end, command.explain_errors("Go on with the same command."):
        raise KeyboardInterrupt
    assert end.value.code == 130 and "Go on with the same command." in capsys.readouterr().err


def test_a_report_is_made_again_of_a_run_folder_and_of_nothing_else(opened, tmp_path):
    results = {"name": "pace", "job": "pace", "seed": 0, "versions": {}, "device": "cpu", "seconds": 1.0, "phases": []}
    status, _, _ = opened("tools/report.py", tmp_path)
    assert "holds no results.json" in str(status)
    (tmp_path / "results.json").write_text(json.dumps(results))
    status, out, err = opened("tools/report.py", tmp_path)
    assert status in (0, None) and not err and out.strip().endswith("report.html")
    assert "<html" in (tmp_path / "report.html").read_text()
    # And for a program: where the page lies, and the numbers.
    status, out, err = opened("tools/report.py", tmp_path, "--json")
    assert status in (0, None) and not err
    assert json.loads(out) == {"page": str(tmp_path / "report.html"), "tables": [], "results": results}


def test_several_runs_are_compared_on_one_page(opened, tmp_path):
    runs = [make_run(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two"))]
    status, out, err = opened("tools/report.py", *runs, f"--out={tmp_path / 'both.html'}")
    assert status in (0, None) and not err and out.strip().endswith("both.html")
    assert "<html" in (tmp_path / "both.html").read_text() and "Highest true success" in out
    status, out, _ = opened("tools/report.py", runs[0], runs[0], f"--out={tmp_path / 'none.html'}")
    assert "cannot be compared" in str(status) and "the same run as" in str(status) and not out
    assert not (tmp_path / "none.html").exists()
    status, _, err = opened("tools/report.py", runs[0], "--out=page.html")
    assert status == 2 and "--out is for several runs" in err


# --- the machine as it is -------------------------------------------------------------------

COMPUTE = {
    "train.py": ["--config=configs/pace.py:tiny", "--run=run"],
    "plan.py": ["--config=configs/pace.py:tiny"],
    "study.py": ["--config=configs/ladder.py", "--run=run"],
    "doctor.py": [],
}


@pytest.mark.parametrize("door", COMPUTE)
@pytest.mark.parametrize("platform", ["cuda", "cdua"])
def test_devices_that_are_not_there_are_said_in_two_lines(door, platform, tmp_path):
    if "cuda" in {plugin.name for plugin in importlib.metadata.entry_points(group="jax_plugins")}:
        pytest.skip("jax has its plugin for cards here")
    words = [word.replace("--run=", f"--run={tmp_path}/") for word in COMPUTE[door]]
    done = start(door, *words, JAX_PLATFORMS=platform)
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "Traceback" not in said
    assert f"JAX_PLATFORMS={platform!r} is asked for, installed is cpu" in said
    assert "JAX_PLATFORMS=cpu computes on the CPU" in said
    if door != "doctor.py":
        assert len(done.stderr.strip().splitlines()) == 2


def start(door, *words, cwd=LAUNCH.parent, **environment):
    command = [sys.executable, str(LAUNCH / door), *map(str, words)]
    inherited = {name: value for name, value in os.environ.items() if environment.get(name, "") is not None}
    environment = {name: value for name, value in environment.items() if value is not None}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd, env=inherited | environment)


def test_a_check_of_the_doctor_that_fails_itself_keeps_no_other_from_being_made():
    from launch import doctor

    def odd():
        raise KeyError("what nobody thought of")

    found = doctor.examine("odd", odd)
    assert not found["ok"]
    assert doctor.describe(found) == "MEND  odd       this check itself failed: KeyError('what nobody thought of')"


@pytest.mark.parametrize(("name", "value"), [("JAX_ENABLE_X64", "True"), ("JAX_NUMPY_DTYPE_PROMOTION", "strict")])
def test_switches_of_jax_that_would_change_a_run_are_set_aside_with_a_word(monkeypatch, capsys, name, value):
    monkeypatch.setenv(name, value)
    with command.explain_errors("Stopped."):
        assert name not in os.environ
    assert capsys.readouterr().err.startswith(f"{name}={value} is set aside: ")


def test_paths_of_a_command_line_may_begin_at_home(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mine.py").write_text((LAUNCH.parent / "configs" / "pace.py").read_text(encoding="utf-8"))
    words = ["--config=~/mine.py:tiny", "--config.vae=no_such_part", "--run=~/runs/x"]
    done = start("train.py", *words, cwd=tmp_path, HOME=str(tmp_path / "home"), PYTHONPATH=str(LAUNCH.parent))
    assert done.returncode == 1 and "no_such_part" in done.stderr, done.stderr
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("door", "words"),
    [
        ("train.py", ["--config=configs/pace.py:tiny", "--run=~/x"]),
        ("serve.py", ["~/robot"]),
        ("audit.py", ["~/x"]),
        ("export.py", ["--run=~/x", "--to=jax", "--out=~/y"]),
    ],
)
def test_a_user_without_a_home_is_told_to_write_whole_paths(monkeypatch, opened, door, words):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "expanduser", no_home)
    status, _, err = opened(door, *words)
    assert status == command.Parser.misuse_status or (door == "train.py" and status == 1)
    assert "~ needs $HOME, which is not set; write the whole path" in err


@pytest.mark.parametrize(
    ("door", "words"),
    [
        ("train.py", ["--config=configs/pace.py:tiny", "--run=gs://bucket/x"]),
        ("serve.py", ["gs://bucket/robot"]),
        ("export.py", ["--run=x", "--to=jax", "--out=s3://bucket/y"]),
        ("tools/report.py", ["x", "gs://bucket/y"]),  # one of several
    ],
)
def test_the_address_of_a_bucket_makes_no_folder_of_that_name(monkeypatch, opened, tmp_path, door, words):
    monkeypatch.chdir(tmp_path)
    status, _, err = opened(door, *words)
    assert status == command.Parser.misuse_status or (door == "train.py" and status == 1)
    assert f"expected a path on this machine, got the address {words[-1].partition('=')[2] or words[-1]}" in err
    assert not list(tmp_path.iterdir())


def test_a_result_that_is_a_link_stays_one(tmp_path):
    """Files and folders: a larger disk is often behind a link, and a rename would put the new one before it."""
    (tmp_path / "disk" / "robot").mkdir(parents=True)
    (tmp_path / "disk" / "a.json").write_text("{}", encoding="utf-8")
    for name in ("robot", "a.json", "new"):  # the last one is still to be written
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    disk.write_json(tmp_path / "a.json", [1])
    for name in ("robot", "new"):
        folder = disk.settle_folder(tmp_path / name, lambda _: False)
        fresh = disk.fresh_folder(tmp_path / name)
        (fresh / "made").write_text("whole", encoding="utf-8")
        disk.replace_folder(fresh, folder)
        assert (tmp_path / "disk" / name / "made").read_text(encoding="utf-8") == "whole"
    assert disk.read_json(tmp_path / "disk" / "a.json") == [1]
    assert all((tmp_path / name).is_symlink() for name in ("robot", "a.json", "new"))
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["a.json", "new", "robot"]
