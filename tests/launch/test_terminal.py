"""Colours for people, JSON for programs."""

from __future__ import annotations

import json
import math
import sys

import pytest

from launch import doctor, terminal
from wovr_jax.plan.need import Need


@pytest.mark.parametrize(
    ("terminal_there", "environment", "coloured"),
    [(True, {}, True), (False, {}, False), (True, {"NO_COLOR": "1"}, False), (True, {"TERM": "dumb"}, False)],
)
def test_colours_are_for_a_terminal_whose_user_wants_them(monkeypatch, terminal_there, environment, coloured) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal_there)
    assert terminal.paint("fits", "green") == ("\x1b[32mfits\x1b[0m" if coloured else "fits")
    line = doctor.describe({"name": "disk", "ok": False, "says": "full", "line": "rm -r runs/old"})
    assert ("\x1b" in line) == coloured and line.endswith("  disk      full\n          rm -r runs/old")


def test_what_is_printed_for_a_program_is_json(capsys) -> None:
    """JSON has no word for what is not a number, although Python's writer would print one."""
    terminal.print_json({"hours": math.nan, "held": {"policy": 1}, "rows": (1.5, math.inf), "fits": None})
    out = capsys.readouterr().out
    assert json.loads(out, parse_constant=pytest.fail) == {
        "hours": None,
        "held": {"policy": 1},
        "rows": [1.5, None],
        "fits": None,
    }


def test_the_doctor_tells_a_program_what_it_tells_a_person(opened) -> None:
    status, out, _ = opened("doctor.py")
    told_status, told, _ = opened("doctor.py", "--json")
    report = json.loads(told)
    assert status == told_status == (not report["well"])
    for check in report["checks"]:
        assert f"{'ok  ' if check['ok'] else 'MEND'}  {check['name']}" in out
    for part in report["optional"]:
        assert f"-     {part['name']}" in out and part["line"] in out


def test_a_plan_is_told_to_a_program(opened, monkeypatch) -> None:
    """Nothing is compiled: what the compiler says, tests/plan/ asks it."""
    said = Need("update", {"policy": 5, "optimizer": 7}, {"world": 3}, 11, 10**12, 4, {"all-reduce": 2})
    monkeypatch.setattr("wovr_jax.plan.need.need", lambda phase, recipe, where: said)
    words = ("--config=configs/pace.py:tiny", "--phases=update")
    status, out, err = opened("plan.py", *words, "--json")
    (row,) = json.loads(out)["phases"]
    assert not status and not err
    assert row["phase"] == "update" and row["topology"] == "here" and row["mesh"]["fsdp"] == 1
    assert row["held"] == said.held and row["idle"] == said.beside and row["peak"] == 26
    assert (row["flop"], row["times"], row["collectives"]) == (10**12, 4, {"all-reduce": 2})
    # What a CPU holds and how fast it is, nobody knows.
    assert row["fits"] is row["memory"] is row["seconds"] is None
    # The same for a person, who is told no verdict either.
    status, out, _ = opened("plan.py", *words)
    assert not status and "\nupdate: 0.0 MiB a device\n" in out and "fits" not in out.lower()


def test_the_doctor_writes_and_reads_a_film(monkeypatch) -> None:
    import av

    assert doctor.video().startswith(f"av {av.__version__}, libavcodec ")

    def lack(*_args: object, **_kwargs: object) -> None:
        raise ValueError("no codec libx264")

    monkeypatch.setattr(av, "open", lack)
    with pytest.raises(doctor.FaultError, match=r"no films: ValueError: no codec libx264\n.* av==\d+\.\d+\.\d+$"):
        doctor.video()
