"""The whole loop of a robot that nobody simulates, against a laboratory in the same process."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import pathlib
import runpy
import sys
from typing import Any

import pytest

from launch import called
from tests.sim.recorded import lab
from tests.small_run import save_parts, small_settings
from wovr_jax import pace
from wovr_jax.audit.runner import audit
from wovr_jax.core.disk import read_json, write_json
from wovr_jax.data import episodes as disk
from wovr_jax.export.robot import Robot
from wovr_jax.report import page, tables
from wovr_jax.run.folder import Run
from wovr_jax.run.recipe import EvaluateConfig
from wovr_jax.sim import embedded
from wovr_jax.sim.recorded import arena
from wovr_jax.sim.recorded.arena import RecordedConfig, RecordedError
from wovr_jax.sim.tabletop import table as tabletop

ROOT = pathlib.Path(__file__).resolve().parents[3]
EVALUATE = EvaluateConfig(episodes=8, compare=8, videos=1, closed=0, temperatures=())


def settings_of(parts: pathlib.Path, folder: pathlib.Path, **changes: Any) -> dict[str, Any]:
    robot = RecordedConfig(
        folder=str(folder),
        name="tabletop",
        instructions=tabletop.INSTRUCTIONS,
        success="the block lies on the plate",
        words="tabletop",
        size=16,
        steps=16,
    )
    return small_settings(parts, recorded=robot, **{"evaluate": EVALUATE} | changes)


def call_here(name: str, *words: str) -> tuple[int, str]:
    """``arena.call_program`` in this process: importing all anew is most of what a program costs."""
    program, said = ROOT / "launch" / "tools" / name, io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", [str(program), *words])
        patch.setattr(sys, "path", [""] + sys.path)
        tool = runpy.run_path(str(program))
        patch.setattr(called, "end_with_run", lambda: None)
        try:
            tool["main"]()
        except SystemExit as end:
            return int(end.code or 0), said.getvalue().strip()
    return 0, said.getvalue().strip()


@pytest.fixture(autouse=True)
def no_simulator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop must not touch the table: whatever plays on it is forbidden while ``pace.run`` runs."""
    run = pace.run

    def guarded(*words: Any, **more: Any) -> Any:
        def touched(*_: object, **__: object) -> None:
            raise AssertionError("the loop has touched the simulator")

        with pytest.MonkeyPatch.context() as patch:
            for name in ("reset_batch", "roll", "replay", "world", "demonstrate", "play_batch", "make_starts"):
                patch.setattr(embedded, name, touched)
            for name in ("reset", "step", "success", "render"):
                patch.setattr(tabletop, name, touched)
            shut = {
                kind: suite._replace(**dict.fromkeys(suite._fields[2:], touched))
                for kind, suite in embedded.SUITES.items()
            }
            patch.setattr(embedded, "SUITES", shut)
            return run(*words, **more)

    monkeypatch.setattr(pace, "run", guarded)
    monkeypatch.setattr(arena, "call_program", call_here)


def go_on(settings: dict[str, Any], run: pathlib.Path, job: str = "pace") -> dict[str, Any] | RecordedError:
    """The results, or what the run waits for."""
    try:
        return pace.run(job, settings, run)
    except RecordedError as error:
        return error


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Random stand-ins of the pretrained parts."""
    return save_parts(tmp_path_factory.mktemp("assets"))


def test_a_policy_is_exported_recorded_and_measured(parts: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The first stops alone, which need no world model."""
    recordings, run = tmp_path / "recordings", tmp_path / "run"
    settings = settings_of(parts, recordings, evaluate=dataclasses.replace(EVALUATE, episodes=4, compare=4))
    lab.show(recordings / "demonstrations", 36)
    said = str(go_on(settings, run, "sft"))
    bundle, wanted = run / "policies" / "base", read_json(run / "wanted.json")
    assert "waits for 4 of 4 recorded episodes of its policy base" in said and str(bundle) in said
    assert wanted["policy"]["weights"] == Robot.load(bundle).hash_weights() and wanted["policy"]["temperature"] == 0
    # Somebody else's episodes are there, and count for nothing.
    lab.serve(wanted | {"policy": wanted["policy"] | {"temperature": 1.0}})
    said = str(go_on(settings, run, "sft"))
    assert "waits for 4 of 4" in said and "4 that were sampled at temperature 1" in said
    lab.serve(wanted)
    results = go_on(settings, run, "sft")
    assert not isinstance(results, RecordedError) and results["phases"][0]["true_success"]["n"] == 4
    assert results["ledger"]["evaluate-0"]["robot_minutes"] == round(4 * 16 / 10 / 60, 3)
    # An earlier policy in the place of the run's is exported anew.
    note = read_json(run / "policies" / "base.json")
    write_json(run / "policies" / "base.json", note | {"made": "of another stage", "weights": "of another"})
    (run / "stages" / "evaluate-0" / "done.json").unlink()
    assert not isinstance(go_on(settings, run, "sft"), RecordedError)
    assert read_json(run / "policies" / "base.json") == note


def test_nothing_is_asked_of_a_robot_that_is_not_measured(parts: pathlib.Path, tmp_path: pathlib.Path) -> None:
    unmeasured = dataclasses.replace(EVALUATE, episodes=0, compare=0)
    settings = settings_of(parts, tmp_path / "recordings", evaluate=unmeasured)
    lab.show(tmp_path / "recordings" / "demonstrations", 36)
    assert "policy base" in str(said := go_on(settings, tmp_path / "run")) and "collect-0" in str(said)
    assert not (tmp_path / "run" / "stages" / "evaluate-0").exists()


@pytest.mark.slow
def test_a_run_goes_from_demonstrations_to_its_last_policy_by_recordings_alone(
    parts: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    recordings, run, stages = tmp_path / "recordings", tmp_path / "run", []
    settings, shown = settings_of(parts, recordings), recordings / "demonstrations"
    said = str(go_on(settings, run))
    assert "waits for 36 of 36 recorded demonstrations" in said and str(shown) in said
    lab.show(shown / "day-1", 20)
    assert "waits for 16 of 36 recorded demonstrations" in str(go_on(settings, run))
    lab.show(shown / "day-2", 16, first=20)
    while isinstance(said := go_on(settings, run), RecordedError):
        wanted = read_json(run / "wanted.json")
        stages.append((wanted["stage"], wanted["missing"]))
        assert f"waits for {wanted['missing']} of 8 recorded episodes" in str(said) and len(stages) < 10, said
        lab.serve(wanted, most=5 if len(stages) == 2 else None)
    # The first collection was left half finished once.
    wanted = [
        ("evaluate-0", 8),
        ("collect-0", 8),
        ("collect-0", 3),
        ("evaluate-1", 8),
        ("collect-1", 8),
        ("evaluate-2", 8),
    ]
    assert stages == wanted and not (run / "wanted.json").exists()
    check_results(said, run)
    check_collections(run, recordings)
    check_audit(run)
    check_again(settings, run, tmp_path / "again")


def check_results(results: dict[str, Any], run: pathlib.Path) -> None:
    """Success is of the recorded evaluations, and the ledger counts minutes of the robot."""
    assert [phase["name"] for phase in results["phases"]] == ["base", "after imagined GRPO", "after PACE"]
    for k, phase in enumerate(results["phases"]):
        won = disk.manifest(run / "stages" / f"evaluate-{k}" / "greedy")["successes"]
        assert phase["true_success"] == phase["greedy"] and phase["true_success"]["n"] == 8
        assert phase["true_success"]["successes"] == won and phase.get("paired", True), "the same placements"
        assert [level["temperature"] for level in phase["temperatures"]] == [0.0]
    ledger = results["ledger"]
    assert ledger["collect-0"]["robot_minutes"] == round(8 * 16 / 10 / 60, 3)
    assert {ledger[f"grpo-{k}"][what] for k in (1, 2) for what in ("true_steps", "robot_minutes", "watched_steps")} == {
        0
    }
    said = tables.render_text(results)
    assert "True success (greedy) went from" in said and "The robot moved for" in said and "robot minutes" in said


def check_collections(run: pathlib.Path, recordings: pathlib.Path) -> None:
    """A stage has the recordings under the numbers and names of the run."""
    hashes = set()
    for k, name in enumerate(("base", "grpo-1")):
        made = disk.read(run / "stages" / f"collect-{k}" / "episodes")
        assert {one.actor for one in made} == {name} and {one.origin["recorded"] for one in made} == {"somebody"}
        assert all(tabletop.INSTRUCTIONS[one.task] == one.instruction for one in made)
        assert sorted(one.task for one in made) == [0, 0, 0, 1, 1, 1, 2, 2]
        assert len({one.seed for one in made}) == 8 and min(one.seed for one in made) >= 1_000_000
        hashes |= {one.origin["weights"] for one in made}
        assert {one.origin["recording"] for one in made} <= {
            path.name for path in (recordings / f"collect-{k}").iterdir()
        }
    assert hashes == {read_json(run / "policies" / f"{name}.json")["weights"] for name in ("base", "grpo-1")}
    shown = [disk.manifest(run / "stages" / "demonstrations" / half)["episodes"] for half in ("episodes", "validation")]
    assert shown == [32, 4]


def check_audit(run: pathlib.Path) -> None:
    """Imagination is held against the recorded evaluation; nothing is followed, and nothing played."""
    found = audit(run)
    assert sorted(found) == [
        f"compare-{pair}" for pair in ("0-in-world-0", "1-in-world-0", "1-in-world-1", "2-in-world-1")
    ]
    for k, facts in ((int(name.split("-")[1]), facts) for name, facts in found.items()):
        won = read_json(run / "stages" / f"evaluate-{k}" / "done.json")["outcomes"]
        counts = facts["verdicts"]
        assert counts["tp"] + counts["fn"] == sum(won) and sum(counts[c] for c in ("tp", "fp", "fn", "tn")) == 8
        assert facts["true_steps"] == facts["episodes"] == 0 and facts["imagined_frames"] > 0
    results = read_json(run / "results.json")
    assert len(results["comparison"]) == 4 and not results["closed_loop"]
    html = page.write(run).read_text()
    assert "Recorded actions replayed" in html and "The robot moved for" in html


def check_again(settings: dict[str, Any], run: pathlib.Path, again: pathlib.Path) -> None:
    """Another run of the same recordings, cut off in every stage before its mark, ends in the same weights."""
    make, cut = Run._make, set()

    def cutting(self: Run, name: str, work: Any, folder: pathlib.Path) -> None:
        def stop(folder: pathlib.Path) -> Any:
            facts = work(folder)
            if name not in cut:
                cut.add(name)
                raise KeyboardInterrupt
            return facts

        make(self, name, stop, folder)

    tries = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_make", cutting)
        while tries < 40:
            tries += 1
            try:
                pace.run("pace", settings, again)
                break
            except KeyboardInterrupt:
                pass
    assert len(cut) == tries - 1 > 10
    for name in ("base", "grpo-1", "grpo-2"):
        first, second = (read_json(one / "policies" / f"{name}.json")["weights"] for one in (run, again))
        assert first == second, f"{name}: bit for bit"
