"""The command line that all doors share: settings of a config file, options, and refusals in a line or two.

A door that takes settings reads them so::

    parser = command.Parser(__doc__)
    command.add_config(parser)
    request = command.read(parser)  # request.settings, request.run, request.options

``--config=FILE[:preset,...]`` names a config file, ``--config.a.b=value`` changes one setting, ``--run=FOLDER`` names
the run folder. Nothing here imports jax, so that a misspelt flag is answered at once.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import difflib
import os
import pathlib
import re
import runpy
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

ROOT = pathlib.Path(__file__).resolve().parents[1]

STUDIES = ("ladder", "ablations", "baselines", "refreshes", "budget", "gates", "world_study", "senses_study")
DOORS = {"evaluate": "evaluate"} | dict.fromkeys(STUDIES, "study")
"""Jobs that have a door of their own; every other job belongs to launch/train.py."""

SWITCHES = ("JAX_ENABLE_X64", "JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION", "JAX_DEFAULT_PRNG_IMPL")
"""Variables of jax that change what comes out, or what may be added to what; runs are the same without them."""

WORDS = {"true": True, "false": False, "none": None}


class Parser(argparse.ArgumentParser):
    """argparse, with a door's docstring as the help, and every mistake answered in a line with its way out."""

    misuse_status = 2

    def __init__(self, doc: str | None, **options: Any):
        # Docstrings hold tables of commands, whose lines must stay as they are. Abbreviations would make a flag that is
        # added tomorrow change what a script of today means.
        shape = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=shape, allow_abbrev=False, **options)
        self.register("type", pathlib.Path, read_path)

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:  # pyright: ignore
        """Parses as argparse does, but names the nearest flag where one is unknown."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown and not unknown[0].startswith("-"):
            self.error(f"expected only --name=value, got {unknown[0]}")
        if unknown:
            name = unknown[0].partition("=")[0]
            # A path such as --confg.rounds is misspelt in its first part.
            near = difflib.get_close_matches(name.partition(".")[0], self._option_string_actions, n=1)
            self.error(f"there is no flag {name}{f'; did you mean {near[0]}?' if near else ''}")
        return options

    def error(self, message: str) -> NoReturn:
        """Ends the program with one line on stderr."""
        self.exit(self.misuse_status, f"{self.prog}: {message} (--help lists all flags)\n")


@dataclasses.dataclass(frozen=True)
class Request:
    """What a command line asks for.

    Attributes:
      settings: those of the config file with the changes of the command line, as nested dictionaries.
      run: the run folder.
      options: every other flag.
    """

    settings: dict[str, Any]
    run: pathlib.Path
    options: argparse.Namespace


def add_config(parser: Parser, *, run: bool = True) -> None:
    """Adds ``--config`` to a door's flags, and ``--run`` unless the door opens no run folder."""
    # Scripts that start a run again after a crash (tpu_pod.sh, slurm.sh) take 1, and only 1, for "refused".
    parser.misuse_status = 1
    # Not argparse's "required": what is missing is said with the list of the files that there are.
    parser.add_argument("--config", metavar="FILE[:PRESET]", help="settings; --config.a.b=value changes one of them")
    if run:
        parser.add_argument("--run", type=pathlib.Path, help="run folder; default runs/<file>[-<preset>][-seed<n>]")


def add_change(parser: Parser) -> None:
    """Adds ``--allow_config_change``, for doors whose runs consist of stages."""
    flags = ("--allow_config_change", "--allow-config-change")
    text = "go on in a run folder that was begun with other settings; finished stages stay as they are"
    parser.add_argument(*flags, action="store_true", help=text)


def read(parser: Parser, argv: Sequence[str] | None = None, *, door: str = "") -> Request:
    """Reads a command line with settings, once; what is wrong with it ends the program in a line or two.

    A config file lists the settings that matter. Others of the package can be set too: the package, which knows them
    all, checks them.

    Args:
      parser: with the flags of ``add_config``.
      argv: the words after the program's name; default ``sys.argv[1:]``.
      door: the stem of the door; a job of another one is then refused.
    """
    # Settings are split off first: argparse would have to know the name of each of them.
    changes, rest = split_changes(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(rest)
    if not options.config:
        refuse(f"Expected --config=configs/<job>.py, got none. {_list_configs()}")
    file, _, preset = options.config.partition(":")
    settings = load_config(os.path.expanduser(file), preset)
    # In the order in which they were written, so that the last one counts.
    for path, text in changes:
        put(settings, path, text)
    if "job" not in settings:
        refuse('The config file names no job: its settings need job="pace" or the like.')
    if door and (owner := DOORS.get(settings["job"], "train")) != door:
        refuse(f"config.job={settings['job']} belongs to launch/{owner}.py, which takes the same flags.")
    return Request(settings, getattr(options, "run", None) or default_run(file, preset, settings), options)


def split_changes(argv: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Returns path and text of every ``--config.path=text`` or ``--config.path text``, and the other words."""
    changes, rest, words = [], [], iter(argv)
    for word in words:
        match = re.fullmatch(r"--?config\.([\w.]+)(?:=(.*))?", word, re.DOTALL)
        if not match:
            rest.append(word)  # argparse judges it
            continue
        path, text = match[1], match[2]
        if text is None:
            # A value may begin with one dash, as negative numbers do, but with two it is the next flag.
            text = next(words, "--")
            if text.startswith("--"):
                refuse(f"Expected a value, --config.{path}=value, got none.")
        changes.append((path, text))
    return changes, rest


def read_path(text: str) -> pathlib.Path:
    """Returns the path of a flag, with the home folder for its ``~``, which a shell leaves alone in --name=value.

    Raises:
      ArgumentTypeError: an address such as gs://bucket/run, of which a path would make a folder named ``gs:``.
    """
    if "://" in text:
        raise argparse.ArgumentTypeError(f"expected a path on this machine, got the address {text} (docs/scaling.md)")
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError as error:  # a container's user without an entry in /etc/passwd
        raise argparse.ArgumentTypeError(f"{text}: ~ needs $HOME, which is not set; write the whole path") from error


def load_config(file: str, preset: str) -> dict[str, Any]:
    """Returns the settings of a config file with its presets; a file that cannot be used is refused with the reason."""
    # A name is one of ours: pace stands for configs/pace.py, wherever that lies.
    if (ours := ROOT / "configs" / f"{file}.py").is_file():
        file = str(ours)
    if not pathlib.Path(file).is_file():
        near = difflib.get_close_matches(pathlib.Path(file).stem, _configs(), n=1)
        hint = f" Did you mean --config=configs/{near[0]}.py?" if near else ""
        refuse(f"There is no config file {file}.{hint} {_list_configs()}")
    try:
        get_config = runpy.run_path(file).get("get_config")
        if get_config is None:
            refuse(f"{file} has no function get_config(preset), so it is no config file. {_list_configs()}")
        return get_config(preset).to_dict()
    except ValueError as error:  # a preset that is not there; the message says which there are
        refuse(f"--config={file}:{preset}: {error}")
    except SyntaxError as error:
        refuse(f"--config={file}: line {error.lineno}: {error.msg}")
    except Exception as error:  # the file is the user's, so the line that failed says more than our traceback
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        refuse(f"--config={file}: line {lines[-1] if lines else '?'}: {type(error).__name__}: {error}")


def put(settings: dict[str, Any], path: str, text: str) -> None:
    """``settings["a"]["b"] = value`` for the path ``a.b``; groups that are not there are made.

    The listed setting says what the text means: a text stays as it is, a tuple takes a single value and words with
    commas between them too.
    """
    *groups, name = path.split(".")
    for depth, group in enumerate(groups, 1):
        settings = settings.setdefault(group, {})
        if not isinstance(settings, dict):
            refuse(f"--config.{path}: config.{'.'.join(groups[:depth])} is a value, not a group of settings.")
    # 007 is a text where a text is listed, and True the name of a run if somebody calls it so.
    listed = settings.get(name)
    value = text if isinstance(listed, str) else parse_value(text)
    parts = value.split(",") if isinstance(value, str) else [value]
    settings[name] = tuple(parts) if isinstance(listed, tuple) and not isinstance(value, tuple | list) else value


def parse_value(text: str) -> Any:
    """Returns the number, tuple, list, True, False or None that the text is; else the text itself."""
    if text in WORDS:
        return WORDS[text]
    try:
        return ast.literal_eval(text)  # literals only: nothing on a command line is run
    except (ValueError, SyntaxError):
        return text


def default_run(file: str, preset: str, settings: Mapping[str, Any]) -> pathlib.Path:
    """``runs/pace``, ``runs/pace-libero_spatial``, ``runs/pace-seed1``: never one folder for two seeds."""
    parts = [pathlib.Path(file).stem, *filter(None, preset.split(","))]
    if settings.get("seed"):  # seed 0 is the plain folder
        parts.append(f"seed{settings['seed']}")
    # Out of a wheel, runs lie where the command was given and not beside the installed files.
    return (ROOT if (ROOT / "pyproject.toml").exists() else pathlib.Path.cwd()) / "runs" / "-".join(parts)


@contextlib.contextmanager
def explain_errors(stopped: str, *, place: object = None, kept: str = "") -> Iterator[None]:
    """Answers what the user can mend, and Ctrl-C, in words; anything else is a bug and keeps its traceback.

    Args:
      stopped: what is said on Ctrl-C or SIGTERM. The exit status is then 128 and the signal's number.
      place: where a failure of the disk or the network happened if it names no file; without, it is taken for a bug.
      kept: what is said behind such a failure.
    """
    settle_jax()
    try:
        yield
    except (ImportError, RuntimeError, AssertionError) as error:
        # What a machine lacks, jax and Python say in words for their authors; the doctor knows what it means.
        if why := runpy.run_path(str(ROOT / "launch" / "doctor.py"))["explain"](error):
            refuse(why)
        raise
    except (ValueError, FloatingPointError) as error:
        # Every refusal of the package is a class of its own and says what to do; a bare ValueError is a bug.
        if not type(error).__module__.startswith("wovr_jax."):
            raise
        refuse(str(error))
    except OSError as error:
        if place is None:
            raise
        refuse(f"{error.filename or place}: {error.strerror or error}. {kept}".rstrip())
    except KeyboardInterrupt as stop:
        # The terminal has just shown ^C in this line.
        print(f"\n{stopped}", file=sys.stderr)
        # A training that was asked to stop by SIGTERM says so in ``signal``.
        sys.exit(128 + getattr(stop, "signal", signal.SIGINT))


def settle_jax() -> None:
    """Sets aside, with a word, those of jax's ``SWITCHES`` that the environment has; to be called before jax comes."""
    for name in SWITCHES:
        if value := os.environ.pop(name, ""):
            print(f"{name}={value} is set aside: runs have jax's own.", file=sys.stderr)


def become(door: str, *words: object) -> NoReturn:
    """Ends this program and runs another door in its process: signals, output and exit status are then the other's."""
    sys.stdout.flush()
    # No child: this program may hold all of a device's memory until it ends, and a kill would leave the child behind.
    for number in map(int, os.listdir("/dev/fd")):
        with contextlib.suppress(OSError):  # what has read this folder is closed again
            os.set_inheritable(number, number <= 2)
    os.execv(sys.executable, [sys.executable, str(ROOT / "launch" / door), *map(str, words)])


def refuse(message: str) -> NoReturn:
    """Ends the program with ``message`` on stderr and exit status 1."""
    sys.exit(message)


def _configs() -> list[str]:
    return sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("common", "__init__"))


def _list_configs() -> str:
    return "There are: " + ", ".join(f"configs/{name}.py" for name in _configs())
