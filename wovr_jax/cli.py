"""The command ``wovr``: every door of the project under one name, from any folder, out of a clone or a wheel.

    wovr demo                                    the whole loop on the embedded table, on a laptop's CPU
    wovr train --config=pace:libero_spatial      what python launch/train.py --config=configs/pace.py:... does
    wovr data lerobot FOLDER --out=EPISODES      a converter of data_prep/
    wovr COMMAND --help                          the help of that door

It is the same code: a command becomes its door, with the same flags, output and exit status. A wheel brings the doors
along as they stand in the repository, in share/wovr_jax of the environment.
"""

from __future__ import annotations

import ast
import difflib
import os
import pathlib
import sys
import sysconfig
from typing import NoReturn

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
    "play": "launch/play.py",
    "benchmark": "launch/benchmark.py",
    "doctor": "launch/doctor.py",
}
"""Command -> its program."""
DEMO = "--config=pace"
CONVERTERS = ("lerobot", "libero_hdf5", "rlds", "rlinf_starts", "to_lerobot")
"""What ``wovr data`` can do: modules of ``data_prep``."""


def main() -> NoReturn:
    """Becomes the door that the first word names; with no word, or ``--help``, says which there are."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(describe())
        sys.exit(0)
    name, *rest = words
    if name == "data":
        _become_converter(rest)
    if name not in DOORS:
        _refuse(name, [*DOORS, "data"])
    if name == "demo":
        rest = [DEMO, *rest]
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
    return "\n".join([(__doc__ or "").strip(), "", "Commands:", demo, *lines, data])


def _first_line(path: pathlib.Path) -> str:
    # Read and not imported: a help should not wait for jax.
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def _become_converter(words: list[str]) -> NoReturn:
    if not words or words[0] in ("-h", "--help"):
        print("wovr data CONVERTER ...\n")
        for name in CONVERTERS:
            print(f"  {name:13}{_first_line(root() / 'data_prep' / f'{name}.py')}")
        sys.exit(0)
    if words[0] not in CONVERTERS:
        _refuse(words[0], CONVERTERS, " data")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root()), os.environ.get("PYTHONPATH")]))
    _become(["-m", f"data_prep.{words[0]}", *words[1:]])


def _become(words: list[str]) -> NoReturn:
    sys.stdout.flush()
    # No child: signals, output and exit status are the door's own.
    os.execv(sys.executable, [sys.executable, *words])


def _refuse(name: str, known: list[str] | tuple[str, ...], under: str = "") -> NoReturn:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    print(f"wovr{under}: there is no {name!r}.{hint} There are: {', '.join(known)}.", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
