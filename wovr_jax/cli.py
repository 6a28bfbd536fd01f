"""The command wovr: every door of the project under one name, from any folder, out of a clone or a wheel.

    wovr demo                                    the whole loop on the embedded table, on a laptop's CPU
    wovr demo --smoke                            every stage of it with almost nothing in it, to see that it runs here
    wovr train --config=pace:libero_spatial      what python launch/train.py --config=configs/pace.py:... does
    wovr data lerobot FOLDER --out=EPISODES      a converter of data_prep/
    wovr COMMAND --help                          the help of that door
    wovr completion bash                         what makes TAB complete all of this; zsh, fish and tcsh too

It is the same code: a command becomes its door, with the same flags, output and exit status. A wheel brings the doors
along as they stand in the repository, in share/wovr_jax of the environment.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.metadata
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from typing import Any, NoReturn
from unittest import mock

DOORS = {
    "demo": "launch/train.py",
    "train": "launch/train.py",
    "audit": "launch/audit.py",
    "study": "launch/study.py",
    "evaluate": "launch/evaluate.py",
    "plan": "launch/plan.py",
    "report": "launch/tools/report.py",
    "import": "launch/import_weights.py",
    "export": "launch/export.py",
    "serve": "launch/serve.py",
    "label": "launch/label.py",
    "play": "launch/play.py",
    "benchmark": "launch/benchmark.py",
    "doctor": "launch/doctor.py",
}
"""Command -> its program."""
DEMO, SMOKE = "--config=pace", "--config=pace:smoke"
CONVERTERS = {
    "lerobot": ("formats", ("pyarrow", "pillow")),
    "libero_hdf5": ("hdf5", ("h5py",)),
    "rlds": ("formats", ("tensorflow-datasets", "pillow")),
    "rlinf_starts": ("", ()),
    "to_lerobot": ("formats", ("pyarrow", "pillow")),
}
"""What ``wovr data`` can do: module of ``data_prep`` -> what it needs of which extra."""
SHELLS = ("bash", "zsh", "fish", "tcsh", "powershell")


def main() -> NoReturn:
    """Becomes the door that the first word names; with no word, or ``--help``, says which there are."""
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what could come next
        _complete()
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(describe())
        sys.exit(0)
    name, *rest = words
    if name == "--version":
        print(f"wovr {importlib.metadata.version('wovr_jax')}")
        sys.exit(0)
    if name == "data":
        _become_converter(rest)
    if name == "completion":
        _print_completion(rest)
    if name not in DOORS:
        _refuse(name, [*DOORS, "data", "completion"])
    if name == "demo":
        if asks_for_help(rest):
            print(f"wovr demo [--smoke] ...\n\nIs wovr train {DEMO}; with --smoke {SMOKE}. Other words go along.\n")
        rest = [SMOKE if "--smoke" in rest else DEMO, *(word for word in rest if word != "--smoke")]
    if asks_for_help(rest):
        _print_help(name, rest)
    _become([str(root() / DOORS[name]), *rest])


def root() -> pathlib.Path:
    """Returns the folder of ``launch/`` and ``configs/``: the clone, or where the wheel put them.

    Raises (as an exit in words): neither is there.
    """
    places = (pathlib.Path(__file__).parents[1], pathlib.Path(sysconfig.get_path("data")) / "share" / "wovr_jax")
    for place in places:
        if (place / "launch" / "train.py").is_file():
            return place
    sys.exit(f"wovr: its programs are neither in {places[0]} nor in {places[1]}; install the package again.")


def describe() -> str:
    """Returns the help: what each command is for, in the first words of its program."""
    lines = [f"  {name:11}{_first_line(root() / path)}" for name, path in DOORS.items() if name != "demo"]
    demo = f"  {'demo':11}Runs the whole loop on the embedded table: train {DEMO}."
    data = f"  {'data':11}Converts data sets: {', '.join(CONVERTERS)}."
    completion = f"  {'completion':11}Prints what a shell needs to complete commands and flags: {', '.join(SHELLS)}."
    return "\n".join([(__doc__ or "").strip(), "", "Commands:", demo, *lines, data, completion])


def asks_for_help(words: Iterable[str]) -> bool:
    """Whether a door would answer these words with its help."""
    return any(word in ("-h", "--help") for word in words)


def _first_line(path: pathlib.Path) -> str:
    # Read and not imported: a help should not wait for jax.
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def _print_help(name: str, words: list[str]) -> NoReturn:
    """Prints the help of a door in the words of this command: whoever has a wheel has no launch/ to run."""
    door = DOORS[name]
    width = shutil.get_terminal_size().columns - len(f"wovr {name}") + len(pathlib.Path(door).name)
    done = subprocess.run(
        [sys.executable, str(root() / door), *words],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": str(width)},
    )
    text = rename(done.stdout)
    # The lines of a usage stand under its first one, which has become longer or shorter.
    usage, blank, rest = text.partition("\n\n")
    first, *others = usage.split("\n")
    indent = " " * (len(first) - len(first.partition(" [-h]")[2]) - len("[-h]"))
    sys.stdout.write("\n".join([first, *(indent + line.strip() for line in others)]) + blank + rest)
    sys.exit(done.returncode)


def rename(text: str) -> str:
    """Returns a door's help with ``wovr train`` where ``python launch/train.py`` or ``usage: train.py`` stands."""
    commands = {path: name for name, path in DOORS.items() if name != "demo"}
    for path, name in commands.items():
        text = text.replace(f"python {path}", f"wovr {name}")
        text = text.replace(f"usage: {pathlib.Path(path).name}", f"usage: wovr {name}").replace(path, f"wovr {name}")
    text = re.sub(r"python -m data_prep\.(\w+)", r"wovr data \1", text)
    return re.sub(r"--config=configs/(\w+)\.py", r"--config=\1", text)


def _become_converter(words: list[str]) -> NoReturn:
    if not words or words[0] in ("-h", "--help"):
        print("wovr data CONVERTER ...\n")
        for name in CONVERTERS:
            print(f"  {name:13}{_first_line(root() / 'data_prep' / f'{name}.py')}")
        sys.exit(0)
    name, *rest = words
    if name not in CONVERTERS:
        _refuse(name, CONVERTERS, " data")
    from wovr_jax.core import extras

    extra, packages = CONVERTERS[name]
    if lacking := extras.find_missing(extra, packages) if packages else []:
        names, line = " and ".join(requirement.name for requirement in lacking), extras.install_line(lacking)
        if asks_for_help(rest):
            print(ast.get_docstring(ast.parse((root() / "data_prep" / f"{name}.py").read_text(encoding="utf-8"))))
            print(f"\nIts flags are listed once there is {names}, of the extra {extra}:\n{line}")
            sys.exit(0)
        sys.exit(f"wovr data {name} needs {names}, of the extra {extra}. Not installed here; type\n{line}")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root()), os.environ.get("PYTHONPATH")]))
    _become(["-m", f"data_prep.{name}", *rest])


def _print_completion(words: list[str]) -> NoReturn:
    from argcomplete.shell_integration import shellcode

    if asks_for_help(words) or len(words) != 1:
        print(f"wovr completion {{{','.join(SHELLS)}}}\n\nFor bash and zsh, in ~/.bashrc or ~/.zshrc:\n")
        print('    eval "$(wovr completion bash)"\n\nFor fish:\n\n    wovr completion fish | source')
        sys.exit(0 if asks_for_help(words) else 2)
    if words[0] not in SHELLS:
        _refuse(words[0], SHELLS, " completion")
    print(shellcode(["wovr"], shell=words[0]))
    sys.exit(0)


class _FoundError(Exception):
    """Carries the parser of a door out of it."""


def _complete() -> NoReturn:
    """Answers the shell: what may follow the words on its line. Ends the program."""
    import argcomplete
    from argcomplete.lexers import split_line

    line = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
    words = [*split_line(line)[3], ""][1:3]  # those before the one that is being typed
    if words == ["study", "probe"]:  # which its door takes off its words by hand
        parser, skipped = find_parser(root() / DOORS["study"], "probe"), 3
    elif words[0] in DOORS:
        parser, skipped = find_parser(root() / DOORS[words[0]]), 2
    elif words[0] == "data" and words[1:] and words[1] in CONVERTERS:
        sys.path.insert(0, str(root()))
        parser, skipped = find_parser(root() / "data_prep" / f"{words[1]}.py"), 3
    else:
        parser, skipped = argparse.ArgumentParser(prog="wovr"), 1
        commands = parser.add_subparsers()
        for name in (*DOORS, "data", "completion"):
            commands.add_parser(name)
        commands.choices["data"].add_argument("converter", choices=CONVERTERS)
        commands.choices["completion"].add_argument("shell", choices=SHELLS)
    if words[0] == "demo":
        parser.add_argument("--smoke", action="store_true")
    configs = [path.stem for path in (root() / "configs").glob("*.py") if path.stem != "common"]
    for action in parser._actions:
        if "--config" in action.option_strings:
            vars(action)["completer"] = lambda **_: configs
    # It counts from 1, and what stands before is the program.
    os.environ["_ARGCOMPLETE"] = str(skipped)
    argcomplete.autocomplete(parser, always_complete_options="long")
    sys.exit(0)


def find_parser(program: pathlib.Path, *words: str) -> argparse.ArgumentParser:
    """Returns the parser of a program, which is run up to where it would read its command line."""

    def stop(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        raise _FoundError(parser)

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop),
        mock.patch.object(sys, "argv", [str(program), *words]),
        mock.patch.object(sys, "path", [*sys.path]),  # whose first entry a door replaces
    ):
        try:
            runpy.run_path(str(program), run_name="__main__")
        except _FoundError as found:
            return found.args[0]
    raise AssertionError(f"{program} read no command line")


def _become(words: list[str]) -> NoReturn:
    sys.stdout.flush()
    # No child: signals, output and exit status are the door's own.
    os.execv(sys.executable, [sys.executable, *words])


def _refuse(name: str, known: Iterable[str], under: str = "") -> NoReturn:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    print(f"wovr{under}: there is no {name!r}.{hint} There are: {', '.join(known)}.", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
