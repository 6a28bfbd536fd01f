"""The command ``wovr``: it becomes the door that it names, and a wheel holds whatever a door may read."""

from __future__ import annotations

import ast
import os
import pathlib
import shutil
import subprocess
import sys
import tomllib

import pytest

from wovr_jax import cli
from wovr_jax.core import extras

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
    train = str(ROOT / "launch" / "train.py")
    words = ["--config=pace:tiny", "--run", "a folder"]
    assert become(monkeypatch, "train", *words) == [train, *words]
    assert become(monkeypatch, "demo", "--config.seed=3") == [train, "--config=pace", "--config.seed=3"]
    assert become(monkeypatch, "demo", "--run=x", "--smoke") == [train, "--config=pace:smoke", "--run=x"]


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


@pytest.mark.parametrize("words", [["demo"], ["plan"], ["benchmark", "parts"], ["data", "to_lerobot"]])
def test_the_help_of_a_door_speaks_of_this_command(words: list[str], tmp_path: pathlib.Path) -> None:
    """Whoever has a wheel has no launch/ to run."""
    done = wovr(*words, "--help", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    if words[0] != "data":  # which says so in its own docstring
        assert f"usage: wovr {' '.join(words).replace('demo', 'train')} [-h]" in done.stdout
        assert "python launch/" not in done.stdout and ".py:" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120 and not list(tmp_path.iterdir())


def wovr(*words: str, cwd: pathlib.Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", "from wovr_jax import cli; cli.main()", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"} | environment
    return subprocess.run(program, capture_output=True, text=True, timeout=120, cwd=cwd, env=environment)


def test_the_version_is_that_of_the_package() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert wovr("--version").stdout == f"wovr {version}\n"


# ---------------------------------------------------------------- TAB

TAB = """
wovr() {{ "{python}" -c 'from wovr_jax import cli; cli.main()' "$@"; }}
eval "$(wovr completion bash)"
COMP_LINE="$1"; COMP_POINT=${{#1}}; COMP_TYPE=9; COMP_KEY=9
read -ra COMP_WORDS <<< "$1"; [[ "$1" == *" " ]] && COMP_WORDS+=("")
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_python_argcomplete wovr
printf '%s\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("wovr pl", ["plan", "play"]),
        ("wovr data rl", ["rlds", "rlinf_starts"]),
        ("wovr completion z", ["zsh"]),
        ("wovr demo --sm", ["--smoke"]),
        ("wovr plan --m", ["--measure"]),
        ("wovr train --config=pa", ["pace"]),
        ("wovr export --to ", ["torch", "jax"]),
        ("wovr study probe --st", ["--stage", "--starts"]),
        ("wovr benchmark parts --c", ["--config", "--compare"]),
        ("wovr data rlinf_starts --no", ["--no-keyframes"]),
    ],
)
def test_tab_offers_what_may_follow(line: str, offered: list[str], tmp_path: pathlib.Path) -> None:
    """In a real bash, with what the command printed for it."""
    script = TAB.format(python=sys.executable)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    # stdin is nobody's: a completion that asked something would hang.
    done = subprocess.run(
        ["bash", "--norc", "-c", script, "bash", line],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert [word.strip() for word in done.stdout.splitlines()] == offered, done.stderr


@pytest.mark.parametrize("shell", cli.SHELLS)
def test_each_shell_is_told_to_complete_wovr(monkeypatch, capsys, shell: str) -> None:
    monkeypatch.setattr(sys, "argv", ["wovr", "completion", shell])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code and "wovr" in capsys.readouterr().out


# ---------------------------------------------------------------- what is not installed


def test_a_converter_whose_packages_are_missing_says_what_to_type(monkeypatch, capsys) -> None:
    installed = extras.importlib.metadata.version

    def version(name: str) -> str:
        if name == "pyarrow":
            raise extras.importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(extras.importlib.metadata, "version", version)
    monkeypatch.setattr(sys, "argv", ["wovr", "data", "lerobot", "set", "--out=o"])
    line = f"{sys.executable} -m pip install 'pyarrow>=20'"
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = f"wovr data lerobot needs pyarrow, of the extra formats. Not installed here; type\n{line}"
    assert stopped.value.code == said
    # The help is there all the same.
    monkeypatch.setattr(sys, "argv", ["wovr", "data", "lerobot", "--help"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and out.startswith("LeRobot") and out.strip().endswith(line)


def test_what_a_converter_needs_is_declared_by_its_extra() -> None:
    for extra, packages in cli.CONVERTERS.values():
        assert set(packages) <= {requirement.name for requirement in extras.declared()[extra]}


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
