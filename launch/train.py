"""The door: settings in, a run folder out.

    python launch/train.py --config=configs/pace.py                    the whole loop on the embedded table
    python launch/train.py --config=configs/pace.py:libero_spatial     a preset of the same file
    python launch/train.py --config=configs/sft.py --config.seed=1     one stage, one setting changed
    python launch/train.py --config=... --run=runs/mine                another run folder

The same command continues a run that was interrupted. Ctrl-C and SIGTERM (a scheduler that takes the machine away) save
first; the exit status is then 130 or 143, 128 and the signal's number. A run folder belongs to the settings that made
it: other settings are refused, so that no result mixes two experiments, unless --allow-config-change says that this is
wanted; finished stages then stay as they are. Works without installation, from any directory.
"""

from __future__ import annotations

import ast
import difflib
import itertools
import json
import pathlib
import re
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Python puts this file's folder first on the path; the packages lie one above it.
sys.path[0] = str(ROOT)

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "File of settings, with :preset after it if wanted.")
_RUN = flags.DEFINE_string("run", None, "Run folder; default runs/<file>[-<preset>][-seed<n>].")
_ALLOW = flags.DEFINE_bool("allow_config_change", False, "Go on in a run folder that was begun with other settings.")
_UNLISTED: dict[str, Any] = {}


def main(argv: Sequence[str]) -> None:
    """Reads the settings, runs the job they name, prints one table."""
    settings, run = asked(argv)

    # Only now: importing jax takes seconds, a misspelt flag none.
    from wovr_jax.core import processes

    try:
        with processes.join():
            from wovr_jax import pace
            from wovr_jax.report import tables  # after the processes have met: some modules hold arrays

            results = pace.run(settings["job"], settings, run, allow_change=_ALLOW.value)
            shown = processes.first()
    except (ValueError, FloatingPointError) as error:  # every refusal of the package is one, and says what to do
        if not type(error).__module__.startswith("wovr_jax."):
            raise
        refuse(str(error))
    except KeyboardInterrupt as stop:
        print(f"\nStopped. {run} is kept up to here; the same command continues it.", file=sys.stderr)
        sys.exit(128 + getattr(stop, "signal", signal.SIGINT))
    if shown:
        print(tables.render_text(results))
        print(f"\n{run / 'report.html'}")


def asked(argv: Sequence[str]) -> tuple[dict[str, Any], pathlib.Path]:
    """The settings and the run folder that the parsed command line asks for."""
    if len(argv) > 1:
        refuse(f"Expected only --name=value, got {' '.join(argv[1:])}.")
    logging.set_verbosity(logging.WARNING)  # jax tells of every accelerator that is not there
    settings = json.loads(_CONFIG.value.to_json())
    for path, value in _UNLISTED.items():
        put(settings, path, value)
    if "job" not in settings:
        refuse('The config file names no job: its settings need job="pace" or the like.')
    return settings, pathlib.Path(_RUN.value or default_run(*file_and_preset(sys.argv), settings))


def default_run(file: str, preset: str, settings: dict[str, Any]) -> pathlib.Path:
    """``runs/pace``, ``runs/pace-libero_spatial``, ``runs/pace-seed1``: never one folder for two seeds."""
    parts = [pathlib.Path(file).stem, *filter(None, preset.split(","))]
    if settings.get("seed"):
        parts.append(f"seed{settings['seed']}")
    return ROOT / "runs" / "-".join(parts)


def parse(argv: Sequence[str]) -> list[str]:
    """Parses the command line; what is wrong with it is said in a line or two, without a traceback.

    A config file lists the settings that matter. Others of the package can be set too: they are kept aside here and
    the package, which knows them all, checks them.
    """
    file, preset = file_and_preset(argv)
    if file and not pathlib.Path(file).is_file():
        near = difflib.get_close_matches(pathlib.Path(file).stem, _jobs(), n=1)
        hint = f" Did you mean --config=configs/{near[0]}.py?" if near else ""
        refuse(f"There is no config file {file}.{hint} {_known()}")
    if not file:
        asks = any(re.match(r"--?help", word) for word in argv)
        return flags.FLAGS(argv) if asks else refuse(f"Expected --config=configs/<job>.py, got none. {_known()}")
    try:
        listed = runpy.run_path(file)["get_config"](preset).to_dict()
        # In place, because ml_collections looks for settings there and not in what it is given.
        sys.argv[:] = [word for word in argv if not _keep_aside(word, listed)]
        return flags.FLAGS(sys.argv)
    except (flags.Error, ValueError) as error:
        refuse(str(error))


def put(settings: dict[str, Any], path: str, value: Any) -> None:
    """``settings["a"]["b"] = value`` for the path ``a.b``; groups that are not there are made."""
    *groups, name = path.split(".")
    for depth, group in enumerate(groups, 1):
        settings = settings.setdefault(group, {})
        if not isinstance(settings, dict):
            refuse(f"--config.{path}: config.{'.'.join(groups[:depth])} is a value, not a group of settings.")
    settings[name] = value


def _keep_aside(word: str, listed: Mapping[str, Any]) -> bool:
    """Whether ``word`` sets what the config file does not list; then it is noted."""
    found = re.fullmatch(r"--?config\.([\w.]+)=(.*)", word, re.DOTALL)
    if not found:
        return False
    group: Any = listed
    for name in found[1].split("."):
        if not isinstance(group, Mapping) or name not in group:
            _UNLISTED[found[1]] = _literal(found[2])
            return True
        group = group[name]
    return False


def _literal(text: str) -> Any:
    """A number, tuple, list, True, False or None where the text is one; else the text."""
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text, text))
    except (ValueError, SyntaxError):
        return text


def file_and_preset(argv: Sequence[str]) -> tuple[str, str]:
    """File and preset of ``--config=file:preset``, empty where there is none."""
    given = [word.split("=", 1)[1] for word in argv if re.match(r"--?config=", word)]
    given += [after for word, after in itertools.pairwise(argv) if word in ("--config", "-config")]
    file, _, preset = (given[-1] if given else "").partition(":")
    return file, preset


def refuse(message: str) -> NoReturn:
    """Ends the program with ``message`` on stderr and exit status 1."""
    sys.exit(message)


def _jobs() -> list[str]:
    return sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("common", "__init__"))


def _known() -> str:
    return "There are: " + ", ".join(f"configs/{job}.py" for job in _jobs())


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
