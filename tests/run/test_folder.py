"""Run folders: claimed, compared, skipped stage by stage."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import filelock
import pytest

from configs import pace as pace_config
from wovr_jax.core import config, disk
from wovr_jax.core.disk import InUseError
from wovr_jax.run.folder import Run, RunError
from wovr_jax.run.recipe import Recipe
from wovr_jax.studies import runner


def _made(run: Run, calls: list[str], name: str = "one", **facts: Any) -> str:
    def make(folder: pathlib.Path) -> dict[str, Any]:
        calls.append(name)
        (folder / "product").write_text(name)
        return facts

    return run.stage(name, make, lambda folder: (folder / "product").read_text()).value


def test_a_done_stage_is_loaded_and_not_made_again(tmp_path: pathlib.Path) -> None:
    calls: list[str] = []
    assert _made(Run(tmp_path / "run", {"seed": 0}), calls, true_steps=7) == "one"
    again = Run(tmp_path / "run", {"seed": 0})
    assert _made(again, calls) == "one"
    assert calls == ["one"]
    assert again.ledger()["one"]["true_steps"] == 7


def test_a_product_is_loaded_when_it_is_first_used_and_then_kept(tmp_path: pathlib.Path) -> None:
    loads: list[pathlib.Path] = []

    def make(folder: pathlib.Path) -> dict[str, Any]:
        (folder / "product").write_text("made")
        return {"episodes": 3}

    def load(folder: pathlib.Path) -> str:
        loads.append(folder)
        return (folder / "product").read_text()

    for _ in ("made", "found"):  # what was made just now is read back too: both runs compute with the same arrays
        product = Run(tmp_path / "run", {"seed": 0}).stage("one", make, load)
        assert product.name == "one" and product.facts["episodes"] == 3 and not loads
        assert product.value == product.value == "made"
        assert loads == [tmp_path / "run" / "stages" / "one"]
        loads.clear()


# --- the last stage -------------------------------------------------------------------------


def test_a_run_stops_where_a_stage_would_follow_the_last_one(tmp_path: pathlib.Path) -> None:
    run, calls, after = Run(tmp_path / "run", {"seed": 0}), [], []
    with run.stop_after("two"):
        for name in ("one", "two"):
            _made(run, calls, name)
        after.append("what is computed between stages is still done")
        _made(run, calls, "three")
        after.append("this is not")
    assert calls == ["one", "two"] == list(run.facts) and len(after) == 1
    assert not (run.folder / "stages" / "three").exists()
    _made(run, calls, "three")  # the bound holds inside the block only
    assert calls == ["one", "two", "three"]


def test_a_last_stage_that_is_the_last_of_all_or_is_done_already_ends_the_block(tmp_path: pathlib.Path) -> None:
    for again in (False, True):
        run, calls = Run(tmp_path / "run", {"seed": 0}), []
        with run.stop_after("one"):
            _made(run, calls, "one")
        with run.stop_after(""):
            _made(run, calls, "two")
        assert calls == ([] if again else ["one", "two"])


def test_a_last_stage_that_never_comes_is_refused_in_words(tmp_path: pathlib.Path) -> None:
    run = Run(tmp_path / "run", {"seed": 0})
    with (
        pytest.raises(RunError, match=r"run: with these settings no stage is called 'world-9', which should be last"),
        run.stop_after("world-9"),
    ):
        _made(run, [])
    with pytest.raises(KeyError), run.stop_after("world-9"):
        raise KeyError("an error inside is not hidden")


# --- accounts -------------------------------------------------------------------------------


def test_the_ledger_of_a_resumed_run_has_every_stage_that_was_made(tmp_path: pathlib.Path) -> None:
    # A later product may be there, so that the earlier one is not asked for; it was paid for all the same.
    _made(Run(tmp_path / "run", {"seed": 0}), [], true_steps=7)
    assert Run(tmp_path / "run", {"seed": 0}).ledger() == {
        "one": {
            "episodes": 0,
            "true_steps": 7,
            "watched_steps": 0,
            "pretrained_frames": 0,
            "imagined_frames": 0,
            "seconds": pytest.approx(0, abs=60),
        }
    }


def test_the_seconds_of_a_stage_inside_another_are_its_own(tmp_path: pathlib.Path) -> None:
    run = Run(tmp_path / "run", {"seed": 0})
    begin = time.perf_counter()

    def inner(folder: pathlib.Path) -> dict[str, Any]:
        time.sleep(0.05)
        return {}

    def outer(folder: pathlib.Path) -> dict[str, Any]:
        run.stage("inner", inner, lambda folder: None)
        return {}

    run.stage("outer", outer, lambda folder: None)
    assert run.facts["inner"]["seconds"] >= 0.05
    assert (
        sum(account["seconds"] for account in run.ledger().values()) <= time.perf_counter() - begin
    )  # once, not twice


def test_an_interrupted_stage_is_made_again_and_its_seconds_count(tmp_path: pathlib.Path) -> None:
    run = Run(tmp_path / "run", {"seed": 0})

    def stop(folder: pathlib.Path) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.stage("one", stop, lambda folder: None)
    tried = json.loads((tmp_path / "run" / "stages" / "one" / "tried.json").read_text())["seconds"]
    calls: list[str] = []
    _made(run, calls)
    assert calls == ["one"]
    assert run.facts["one"]["seconds"] > tried > 0


def test_another_configuration_is_refused_with_the_difference(tmp_path: pathlib.Path) -> None:
    Run(tmp_path / "run", {"seed": 0, "world": {"memory": 4}})
    with pytest.raises(RunError, match=r"world\.memory: 4 there, 1 asked"):
        Run(tmp_path / "run", {"seed": 0, "world": {"memory": 1}})


def test_another_configuration_goes_on_when_that_is_wanted(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _made(Run(tmp_path / "run", {"lr": 1, "seed": 0}), [])
    calls: list[str] = []
    assert _made(Run(tmp_path / "run", {"lr": 2, "seed": 0}, allow_change=True), calls) == "one"
    assert calls == [], "a finished stage stays as it is"
    assert "lr: 1 there, 2 asked" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "config-before-1.json").read_text()) == {"lr": 1, "seed": 0}
    Run(tmp_path / "run", {"lr": 2, "seed": 0})  # and from now on the new one is what is there


def test_a_foreign_folder_is_refused_and_untouched(tmp_path: pathlib.Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"meow")
    with pytest.raises(RunError, match=r"is not a run folder.*--run="):
        Run(tmp_path / "photos", {"seed": 0})
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


# --- whose folder it is ---------------------------------------------------------------------

HOLD = """
import sys, time
from wovr_jax.run.folder import Run
run = Run(sys.argv[1], {"seed": 0})
print("open", flush=True)
time.sleep(120)
"""


def hold(folder: pathlib.Path) -> subprocess.Popen:
    """Starts a process that has the run open, and waits until it has."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "open\n"
    return process


def test_a_second_process_is_refused_and_the_first_goes_on(tmp_path: pathlib.Path, capsys) -> None:
    with hold(tmp_path / "run") as first:
        with pytest.raises(InUseError, match=rf"run is in use by process {first.pid} on .*another folder"):
            Run(tmp_path / "run", {"seed": 0})
        assert "looking for at most 30 s whether the process" in capsys.readouterr().err
        assert first.poll() is None
        assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.json", "owner"}
        # Whoever only looks at what is finished is let in.
        assert runner._LookedAt(tmp_path / "run", {"seed": 0}).facts == {}
        first.kill()
    # A killed one leaves its mark behind, which holds nobody up.
    Run(tmp_path / "run", {"seed": 0}).close()
    assert not (tmp_path / "run" / "owner").exists()


FOREIGN = f"filelock/2\npid=1\nhost=elsewhere\nmode=lease\ntoken={'a' * 32}\nduration={{}}\nstart=7\n"


def foreign(mark: pathlib.Path, monkeypatch: pytest.MonkeyPatch, lease_s: float) -> None:
    """Another machine's process owns the folder of ``mark``; times are short."""
    monkeypatch.setattr(disk, "BEAT_S", 0.2)
    monkeypatch.setattr(disk, "LEASE_S", lease_s)
    mark.parent.mkdir(exist_ok=True)
    mark.unlink(missing_ok=True)
    mark.write_text(FOREIGN.format(lease_s), encoding="utf-8")


@contextlib.contextmanager
def alive(mark: pathlib.Path) -> Iterator[None]:
    """The owner gives signs of life."""
    ended = threading.Event()

    def live() -> None:
        while not ended.wait(0.05):
            mark.touch()

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    yield
    ended.set()
    thread.join()


@pytest.mark.parametrize("swaps", [True, False], ids=["local disk", "disk of a network"])
def test_the_dead_owner_of_another_machine_is_given_up(tmp_path: pathlib.Path, monkeypatch, swaps: bool) -> None:
    mark = tmp_path / "run" / "owner"
    foreign(mark, monkeypatch, 1.0)
    if not swaps:
        # There the library cannot swap two names in one step, and takes nothing over.
        monkeypatch.setattr(filelock.SoftFileLease, "_take_over", lambda *_: None)
    run, begin = Run(tmp_path / "run", {"seed": 0}), time.monotonic()
    assert time.monotonic() - begin < 10 and f"pid={os.getpid()}" in mark.read_text(encoding="utf-8")
    run.close()
    assert not mark.exists()


def test_the_living_owner_of_another_machine_is_not(tmp_path: pathlib.Path, monkeypatch) -> None:
    mark = tmp_path / "run" / "owner"
    foreign(mark, monkeypatch, 30.0)
    with alive(mark), pytest.raises(InUseError, match="process 1 on elsewhere, and two"):
        Run(tmp_path / "run", {"seed": 0})


def test_a_process_opens_its_own_run_twice(tmp_path: pathlib.Path) -> None:
    runs = [Run(tmp_path / "run", {"seed": 0}) for _ in range(2)]
    runs[0].close()
    assert (tmp_path / "run" / "owner").exists(), "the other one is still open"
    runs[1].close()
    assert not (tmp_path / "run" / "owner").exists()


def lose(run: Run, mark: pathlib.Path) -> None:
    """What a machine finds that slept: its mark is gone."""
    mark.unlink()
    assert run._lease is not None
    while run._lease.compromise is None:
        time.sleep(0.05)


def test_a_run_that_was_taken_over_stops(tmp_path: pathlib.Path, monkeypatch) -> None:
    mark = tmp_path / "run" / "owner"
    monkeypatch.setattr(disk, "BEAT_S", 0.2)
    run, calls = Run(tmp_path / "run", {"seed": 0}), []
    lose(run, mark)
    foreign(mark, monkeypatch, 30.0)
    with alive(mark), pytest.raises(InUseError, match="process 1 on elsewhere"):
        _made(run, calls)
    assert not calls


def test_a_run_that_lost_its_folder_to_nobody_goes_on(tmp_path: pathlib.Path, monkeypatch) -> None:
    mark = tmp_path / "run" / "owner"
    monkeypatch.setattr(disk, "BEAT_S", 0.2)
    run, calls = Run(tmp_path / "run", {"seed": 0}), []
    lose(run, mark)
    assert _made(run, calls) == "one" and f"pid={os.getpid()}" in mark.read_text(encoding="utf-8")
    run.close()
    assert not mark.exists()


def test_a_stage_that_was_made_without_the_folder_is_not_marked(tmp_path: pathlib.Path, monkeypatch) -> None:
    mark = tmp_path / "run" / "owner"
    monkeypatch.setattr(disk, "BEAT_S", 0.2)
    run = Run(tmp_path / "run", {"seed": 0})

    def make(folder: pathlib.Path) -> dict[str, Any]:
        lose(run, mark)
        foreign(mark, monkeypatch, 30.0)
        return {}

    with pytest.raises(InUseError), contextlib.ExitStack() as stack:
        stack.enter_context(alive(mark))
        run.stage("one", make, lambda folder: None)
    assert not (tmp_path / "run" / "stages" / "one" / "done.json").exists()


def test_a_broken_config_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"config\.json is not readable JSON"):
        Run(tmp_path / "run", {"seed": 0})


# --- what decides no outcome ----------------------------------------------------------------


def test_a_run_goes_on_with_other_workers_and_threads_and_on_other_devices(tmp_path: pathlib.Path) -> None:
    recipe = config.to_dict(config.from_dict(Recipe, pace_config.get_config("libero_small").to_dict()))
    Run(tmp_path / "run", recipe)
    other = json.loads(json.dumps(recipe))
    other["libero"]["workers"], other["mesh"]["data"] = 16, -1
    other["world_train"]["stream"] |= {"threads": 2, "workers": 3, "ahead": 5}
    Run(tmp_path / "run", other)
    assert not list((tmp_path / "run").glob("config-before-*"))
    other["world_train"]["stream"]["visit"] += 1
    with pytest.raises(RunError, match=r"another configuration \(1 settings differ\)(.|\n)*world_train.stream.visit"):
        Run(tmp_path / "run", other)


def test_an_evaluation_goes_on_with_other_workers(tmp_path: pathlib.Path) -> None:
    Run(tmp_path / "run", {"policy": "expert", "seed": 0})  # as before workers were written down
    Run(tmp_path / "run", {"policy": "expert", "seed": 0, "workers": 7})
    with pytest.raises(RunError, match="seed: 0 there, 1 asked"):
        Run(tmp_path / "run", {"policy": "expert", "seed": 1, "workers": 7})
