"""The command ``wovr``: it becomes the door that it names, and a wheel holds whatever a door may read."""

from __future__ import annotations

import ast
import os
import pathlib
import sys
import tomllib

import pytest

from wovr_jax import cli

ROOT = pathlib.Path(__file__).parents[1]


class BecameError(Exception):
    """What the process would have become."""


def become(monkeypatch: pytest.MonkeyPatch, *words: str) -> list[str]:
    def execv(program: str, arguments: list[str]) -> None:
        assert program == arguments[0] == sys.executable
        raise BecameError(arguments[1:])

    monkeypatch.setattr(sys, "argv", ["wovr", *words])
    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(BecameError) as became:
        cli.main()
    return became.value.args[0]


def test_a_command_is_its_door_with_the_same_words(monkeypatch) -> None:
    words = ["--config=pace:tiny", "--run", "a folder", "--help"]
    assert become(monkeypatch, "train", *words) == [str(ROOT / "launch" / "train.py"), *words]
    assert become(monkeypatch, "demo", "--config.seed=3") == [
        str(ROOT / "launch" / "train.py"),
        "--config=pace",
        "--config.seed=3",
    ]


def test_a_converter_finds_its_package_from_any_folder(monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    assert become(monkeypatch, "data", "rlds", "set", "--out=o") == ["-m", "data_prep.rlds", "set", "--out=o"]
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "elsewhere"]


@pytest.mark.parametrize(
    ("words", "said"), [(["trian"], "Did you mean train?"), (["data", "libero_hdf"], "Did you mean libero_hdf5?")]
)
def test_what_is_not_there_is_answered_with_what_is(monkeypatch, capsys, words: list[str], said: str) -> None:
    monkeypatch.setattr(sys, "argv", ["wovr", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--help"], ["data", "--help"]])
def test_the_help_names_everything(monkeypatch, capsys, words: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["wovr", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out = capsys.readouterr().out
    assert not stopped.value.code
    assert all(f"  {name}" in out for name in (cli.CONVERTERS if "data" in words else [*cli.DOORS, "data"]))


def has_main(path: pathlib.Path) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in ast.parse(path.read_text()).body)


def test_every_door_and_every_converter_has_a_command() -> None:
    doors = {f"launch/{path.name}" for path in (ROOT / "launch").glob("*.py") if has_main(path)}
    assert doors | {"launch/tools/report.py"} == set(cli.DOORS.values())
    assert {path.stem for path in (ROOT / "data_prep").glob("*.py") if has_main(path)} == set(cli.CONVERTERS)


def test_a_wheel_holds_what_the_doors_read() -> None:
    files = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    held = {path for patterns in files.values() for pattern in patterns for path in ROOT.glob(pattern)}
    wanted = {path for room in ("launch", "configs", "data_prep") for path in (ROOT / room).rglob("*.py")}
    assert wanted <= held, f"pyproject.toml leaves out {sorted(path.name for path in wanted - held)}"
    for target, patterns in files.items():
        # Every file has to lie in the folder that it has here, or a door would not find its neighbours.
        for here in map(pathlib.PurePath, patterns):
            assert pathlib.PurePath(target) / here.name == "share/wovr_jax" / here


def test_without_its_programs_the_command_says_where_it_looked(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "wovr_jax" / "cli.py"))
    monkeypatch.setattr(cli.sysconfig, "get_path", lambda name: str(tmp_path / name))
    with pytest.raises(SystemExit, match="neither in .* nor in .*share/wovr_jax"):
        cli.root()
    (tmp_path / "data" / "share" / "wovr_jax" / "launch").mkdir(parents=True)
    (tmp_path / "data" / "share" / "wovr_jax" / "launch" / "train.py").write_text("")
    assert cli.root() == tmp_path / "data" / "share" / "wovr_jax"
