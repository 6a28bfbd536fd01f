"""The whole loop at the smallest size: it compiles once, resumes exactly, and says what is wrong.

The tests of the loop share one uninterrupted run, because compiling its programs is most of the cost.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.compiles import count_compiles
from tests.notebooks import run_cells
from tests.small_run import run_whole, save_parts, small_settings
from wovr_jax import pace
from wovr_jax.core import checkpoint
from wovr_jax.core.config import ConfigError, from_dict, to_dict
from wovr_jax.core.log import RESERVED, read_metrics
from wovr_jax.data import episodes as disk
from wovr_jax.data import starts as start_states
from wovr_jax.data.batches import NoDataError
from wovr_jax.grpo import GRPOConfig
from wovr_jax.nn.functional import Pure
from wovr_jax.policy import vla
from wovr_jax.report import page, tables
from wovr_jax.report.meanings import explain
from wovr_jax.run.bind import Products, bind_stages
from wovr_jax.run.folder import MARK, Run, RunError
from wovr_jax.run.recipe import Recipe
from wovr_jax.run.stages import world as world_stage
from wovr_jax.run.stages.episodes import join_rounds
from wovr_jax.sim.tabletop.expert import ExpertConfig
from wovr_jax.studies.variants import merge_settings
from wovr_jax.train import loop
from wovr_jax.weights import native
from wovr_jax.world.model import networks


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Random stand-ins of the pretrained parts."""
    return save_parts(tmp_path_factory.mktemp("assets"))


# --- one uninterrupted run ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reference:
    """The uninterrupted run: settings, folder, results, what each stage compiled, and networks that lay idle then."""

    settings: dict[str, Any]
    folder: pathlib.Path
    results: dict[str, Any]
    compiled: dict[str, collections.Counter[str]]
    idle: dict[str, int]

    @functools.cached_property
    def made(self) -> Products:
        """Its products; what nobody asks for is not loaded."""
        return pace.pace(from_dict(Recipe, self.settings), Run(self.folder, self.settings))


@pytest.fixture(scope="module")
def reference(parts: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """One run of the whole loop for the tests of this file."""
    settings, folder = small_settings(parts), tmp_path_factory.mktemp("reference") / "run"
    jax.clear_caches()  # programs are kept for the whole process, whichever test had them compiled
    with pytest.MonkeyPatch.context() as patch:
        compiled, idle = _count_by_stage(patch)
        results = run_whole(settings, folder)
    return Reference(settings, folder, results, compiled, idle)


def _count_kernels() -> int:
    """Returns how many of the largest kernels of policy and transformer lie on the devices."""
    recipe = from_dict(Recipe, small_settings(pathlib.Path()))
    shapes = (vla.network(recipe.policy).shapes(), networks(recipe.world)[0].shapes())
    largest = {max(jax.tree.leaves(one), key=lambda leaf: leaf.size).shape for one in shapes}
    return sum(leaf.shape in largest for leaf in jax.live_arrays())


def _count_by_stage(patch: pytest.MonkeyPatch) -> tuple[dict[str, collections.Counter[str]], dict[str, int]]:
    """Fills the dictionaries that it returns: programs compiled, where what a stage asks of an earlier one counts there
    only; and large kernels on the devices when the stage begins, that were not there before the run."""
    compiled: dict[str, collections.Counter[str]] = {}
    idle: dict[str, int] = {}
    outer = [collections.Counter[str]()]
    make_stage, before = Run._make, _count_kernels()

    def counting(run: Run, name: str, make: Callable, folder: pathlib.Path) -> None:
        def begin(folder: pathlib.Path) -> Any:
            idle[name] = _count_kernels() - before
            return make(folder)

        outer.append(collections.Counter())
        with count_compiles() as seen:
            make_stage(run, name, begin, folder)
        compiled[name] = seen - outer.pop()
        outer[-1] += seen

    patch.setattr(Run, "_make", counting)
    return compiled, idle


def test_the_whole_loop_runs_and_reports(reference: Reference) -> None:
    results = reference.results
    assert [phase["name"] for phase in results["phases"]] == ["base", "after imagined GRPO", "after PACE"]
    learner = [account for name, account in results["ledger"].items() if name.startswith("grpo-")]
    assert [account["true_steps"] for account in learner] == [0, 0]
    assert all(account["imagined_frames"] > 0 for account in learner)
    assert [account["watched_steps"] for account in learner] == [2 * 16 * 16, 16 * 16], (
        "in the simulator, for the curve"
    )
    for made in results["closed_loop"]:
        counts = {kind: sum(made[kind][count] for count in tables.COUNTS) for kind in tables.STARTS}
        assert counts["episode_start"] == 4 and counts["all"] == counts["episode_start"] + counts["keyframe"] > 4
    for part in ("closed_loop", "comparison"):
        pairs = [(made["policy"], made["world"][-1]) for made in results[part]]
        # Each policy in the world that taught it, and in the one that was refreshed for it.
        after = [("after imagined GRPO", "1"), ("after imagined GRPO", "2"), ("after PACE", "2")]
        assert pairs == [("base", "1"), *after], part
    # Nobody makes a number up for stand-ins that were never trained.
    assert results["ledger"]["pretrained"]["pretrained_frames"] == 0 and "vae, dino, siglip" in results["remarks"][0]
    assert page.write(reference.folder) == reference.folder / "report.html"
    assert "after PACE" in (reference.folder / "report.html").read_text()
    assert json.loads((reference.folder / "results.json").read_text())["seed"] == 0


def test_every_policy_is_measured_at_every_temperature_on_the_same_layouts(reference: Reference) -> None:
    for phase in reference.results["phases"]:
        levels = phase["temperatures"]
        assert [level["temperature"] for level in levels] == [1.0, 0.5, 0.3, 0.0]
        assert [len(level["outcomes"]) for level in levels] == [8] * 4
        assert all(sum(level["outcomes"]) == level["successes"] for level in levels)
        assert phase["true_success"]["successes"] == levels[0]["successes"]
        assert phase["greedy"]["successes"] == levels[-1]["successes"]
        assert phase["outcomes"] == levels[0]["outcomes"]
    # 8 episodes of 16 steps at four temperatures.
    assert reference.results["ledger"]["evaluate-1"]["true_steps"] == 4 * 8 * 16


def test_imagination_moved_the_policy(reference: Reference) -> None:
    policies = [product.value for product in reference.made.policies]
    assert not _same(policies[0], policies[1]) and not _same(policies[1], policies[2])


PROGRAMS = ("live", "replay", "dream", "roll", "update", "step", "measure", "encode_batch", "play_batch")


def test_a_stage_compiles_its_programs_once_and_a_round_reuses_them(reference: Reference) -> None:
    """A weight that became a constant of a program, or a shape that changed, would compile again in a later stage."""
    compiled = {
        stage: {name: count for name, count in counter.items() if name in PROGRAMS}
        for stage, counter in reference.compiled.items()
    }
    assert {stage: programs for stage, programs in compiled.items() if programs} == {
        "demonstrations": {"play_batch": 1},
        "sft": {"step": 1, "measure": 1},
        "evaluate-0": {"live": 4},  # the temperature is a constant of the program
        "world-0": {"encode_batch": 1, "step": 1, "measure": 1},
        "reward-0": {"replay": 1, "step": 1},
        "closed-0-in-world-0": {"roll": 1, "replay": 1},
        "grpo-1": {"dream": 1, "update": 1},
        # Round 2. A refresh draws from new and old windows, which the first training did not have ...
        "world-1": {"encode_batch": 2, "step": 1, "measure": 1},
        # ... and the pool of frames, an argument of this program, has grown. Start states are drawn from another table
        # too, but by a program of their own: imagination and update are compiled once.
        "reward-1": {"step": 1},
    }


def test_no_idle_network_lies_on_the_devices_when_a_stage_begins(reference: Reference) -> None:
    """On one device the 15 GB of a full-size policy are what the training of the world model does not have."""
    assert len(reference.idle) > 15
    assert {stage: count for stage, count in reference.idle.items() if count} == {}


# --- interruptions --------------------------------------------------------------------------


class Interrupts:
    """Ctrl-C once at every place that a run passes; a run that is continued meets the next one."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.met: list[str] = []
        fit, make_stage, write = loop.fit, Run._make, disk.write

        def cut_fit(name: str, state: Any, step: Any, steps: int, on_step: Any = None, **options: Any) -> Any:
            watch = on_step or (lambda done, state: None)

            def cut(done: int, state: Any) -> Any:
                if done == max(1, steps // 2):
                    self.here(f"{name}: step {done}")
                return watch(done, state)

            return fit(name, state, step, steps, on_step=cut, **options)

        def cut_write(folder: pathlib.Path, made: Any, **options: Any) -> Any:
            return write(folder, self._some(f"{folder.parent.name}: third episode", made), **options)

        def cut_stage(run: Run, name: str, make: Callable, folder: pathlib.Path) -> None:
            def unmarked(folder: pathlib.Path) -> Any:
                facts = make(folder)
                self.here(f"{name}: everything made, not yet marked as done")
                return facts

            make_stage(run, name, unmarked, folder)

        patch.setattr(loop, "fit", cut_fit)
        patch.setattr(disk, "write", cut_write)
        patch.setattr(Run, "_make", cut_stage)

    def here(self, place: str) -> None:
        if place not in self.met:
            self.met.append(place)
            raise KeyboardInterrupt(place)

    def _some(self, place: str, made: Any) -> Iterator[Any]:
        for count, episode in enumerate(made, 1):
            yield episode
            if count == 3:
                self.here(place)


def _same(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


def _numbers(results: Any) -> Any:
    """Results without what depends on the clock and the machine."""
    if not isinstance(results, dict):
        return results
    clock = ("seconds", "seconds_now", "peak_rss_gb")
    return {name: _numbers(value) for name, value in results.items() if name not in clock}


def _curves(folder: pathlib.Path) -> list[str]:
    return sorted({json.dumps({k: v for k, v in line.items() if k != "time"}) for line in read_metrics(folder)})


def test_interrupted_in_every_stage_the_same_command_ends_in_the_same_numbers(
    reference: Reference, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupts = Interrupts(monkeypatch)
    # Only to save time: every continuation would trace the same initialisations again.
    init = functools.cache(lambda pure, key: _INIT(pure, jax.random.wrap_key_data(np.frombuffer(key, np.uint32))))
    monkeypatch.setattr(Pure, "init", lambda pure, key: init(pure, np.asarray(jax.random.key_data(key)).tobytes()))
    results = None
    while results is None:
        before = len(interrupts.met)
        try:
            results = run_whole(reference.settings, tmp_path / "run")
        except KeyboardInterrupt:
            assert len(interrupts.met) == before + 1
    cut = collections.Counter(place.split(":")[0] for place in interrupts.met)
    fits = {"sft", "world-0", "reward-0", "grpo-1", "world-1", "reward-1", "grpo-2"}
    twice = fits | {"demonstrations", "collect-0", "collect-1"}
    assert cut == {name: 2 if name in twice else 1 for name in reference.results["ledger"]}
    assert _numbers(results) == _numbers(reference.results)
    assert _curves(tmp_path / "run") == _curves(reference.folder)
    made = reference.made
    for stage, product, like in (
        ("sft", "policy", made.policies[0].value),
        ("grpo-1", "policy", made.policies[1].value),
        ("grpo-2", "policy", made.policies[2].value),
        ("world-1", "dit", made.worlds[1].value["dit"]),
        ("reward-1", "reward", made.rewards[1].value.params),
    ):
        assert _same(checkpoint.restore(tmp_path / "run" / "stages" / stage / product, like), like), stage


_INIT = Pure.init


def test_a_run_that_is_finished_loads_nothing_when_it_is_asked_for_again(
    reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    readers = ((checkpoint, "restore"), (disk, "read"), (native, "load_asset"), (start_states, "load"), (Pure, "init"))
    for module, name in readers:

        def load(*args: Any, name: str = name, **options: Any) -> Any:
            loads.append(name)
            raise AssertionError(f"{name} was called")

        monkeypatch.setattr(module, name, load)
    results = run_whole(reference.settings, reference.folder)
    assert loads == []
    assert _numbers(results) == _numbers(reference.results)

    # The products are there all the same, each loaded when it is used.
    made = pace.pace(from_dict(Recipe, reference.settings), Run(reference.folder, reference.settings))
    counts = [len(made.policies), len(made.rollouts), len(made.worlds), len(made.rewards), len(made.starts)]
    assert counts == [3, 2, 2, 2, 2] and loads == []
    with pytest.raises(AssertionError, match="restore was called"):
        _ = made.policies[2].value


# --- without PACE ---------------------------------------------------------------------------


def test_without_a_refresh_later_rounds_dream_in_the_first_world(
    reference: Reference, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, folder = reference.settings | {"pace": False}, tmp_path / "run"
    rounds = ("collect-0", "world-0", "reward-0", "starts-0")
    first = ("demonstrations", "sft", *rounds, "evaluate-0", "grpo-1", "evaluate-1")
    for name in (*first, "compare-0-in-world-0", "compare-1-in-world-0"):
        shutil.copytree(reference.folder / "stages" / name, folder / "stages" / name)
    (folder / "config.json").write_text(json.dumps(settings))
    results = run_whole(settings, folder)
    made = tuple(name for name in results["ledger"] if name.startswith(("collect", "world", "reward", "starts")))
    assert made == rounds
    last = results["comparison"][-1]
    assert (last["policy"], last["world"]) == ("after imagined GRPO without a refresh", "world model of round 1")
    like = reference.made.policies[1].value
    assert not _same(checkpoint.restore(folder / "stages" / "grpo-2" / "policy", like), like)


# --- episodes that stay on disk -------------------------------------------------------------


def test_a_run_that_streams_leaves_its_episodes_on_disk(
    reference: Reference, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = merge_settings(reference.settings, {"world_train": {"latents": "stream"}})
    run = Run(tmp_path / "run", settings)
    (run.folder / "stages").mkdir()
    for name in ("demonstrations", "sft", "grpo-1", "collect-0", "collect-1"):
        (run.folder / "stages" / name).symlink_to(reference.folder / "stages" / name)
    before, do = reference.made, bind_stages(from_dict(Recipe, settings), run, made := Products())
    made.demonstrations = do.demonstrate()
    rollouts = [do.collect(round_, do.act(round_, f"collect-{round_}")) for round_ in range(2)]
    given: list[Any] = []

    def windows(cfg: Any, train: Any, vae_params: Any, new: Any, *others: Any, **options: Any) -> None:
        given.append(new)
        raise KeyboardInterrupt

    monkeypatch.setattr(world_stage, "windows", windows)
    with pytest.raises(KeyboardInterrupt):
        do.fit_world(0, do.open_vae(made.demonstrations), [], rollouts[:1], made.demonstrations)
    (new,) = given
    whole = [*before.rollouts[0].value, *before.demonstrations.value.train]
    assert isinstance(new, disk.Lazy) and disk.heads(new) == disk.heads(whole)
    np.testing.assert_array_equal(new[len(whole) - 1].frame_SHWC, whole[-1].frame_SHWC)
    pool = join_rounds(rollouts)
    assert isinstance(pool, disk.Lazy) and len(pool) == len(join_rounds(before.rollouts))


# --- nothing to learn from ------------------------------------------------------------------


@pytest.mark.parametrize(("threshold", "rate"), [(2.0, "0%"), (-1.0, "100%")])
def test_a_reward_that_never_or_always_says_success_leaves_the_policy_and_says_so(
    reference: Reference, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], threshold: float, rate: str
) -> None:
    plain = {"grpo": to_dict(GRPOConfig.fake(group=4, filter=True))}
    settings = merge_settings(reference.settings, {"learner": plain})
    stages = tmp_path / "run" / "stages"
    for name in ("demonstrations", "sft", "evaluate-0", "collect-0", "world-0", "reward-0", "starts-0"):
        shutil.copytree(reference.folder / "stages" / name, stages / name)
    facts = json.loads((stages / "reward-0" / MARK).read_text())
    (stages / "reward-0" / MARK).write_text(json.dumps(facts | {"threshold": threshold}))
    (stages.parent / "config.json").write_text(json.dumps(settings))

    results = pace.run("grpo", settings, stages.parent)

    _, remark = results["remarks"]  # the first is of the pretrained stand-ins
    assert f"grpo-1: 2 of 2 iterations changed nothing: judged success was {rate}" in remark
    assert "The policy is as it was" in remark
    assert remark in capsys.readouterr().err
    assert remark in " ".join(tables.render_text(results).split())
    before = reference.made.policies[0].value
    assert _same(checkpoint.restore(stages / "grpo-1" / "policy", before), before)
    assert json.loads((stages / "grpo-1" / MARK).read_text())["skipped"] == 2
    curve = [line for line in read_metrics(stages.parent) if line["stage"] == "grpo-1"]
    assert [(line["skipped"], line["kept_groups"]) for line in curve] == [(1.0, 0.0), (1.0, 0.0)]


def test_every_curve_of_the_page_is_explained(reference: Reference) -> None:
    names = {name for line in read_metrics(reference.folder) for name in line if name not in RESERVED}
    assert len(names) > 30 and not {name for name in names if not explain(name)}
    assert explain("won_keyframe") == explain("won") + ", of those that begin at a keyframe"
    assert explain("what nobody measures") == explain("nothing_start") == ""


# --- mistakes -------------------------------------------------------------------------------


def test_another_seed_is_refused_in_the_same_folder(parts: pathlib.Path, tmp_path: pathlib.Path) -> None:
    pace.run("collect", small_settings(parts), tmp_path / "run")
    with pytest.raises(RunError, match="seed: 0 there, 1 asked"):
        pace.run("collect", small_settings(parts, seed=1), tmp_path / "run")


def test_demonstrations_without_success_stop_the_run_with_the_reason(
    parts: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    hopeless = small_settings(parts, expert=ExpertConfig(flawed_share=1.0, noise=0.0, flip=0.0))
    with pytest.raises(NoDataError, match="needs both"):
        pace.run("reward", hopeless, tmp_path / "run")


def test_unknown_job_is_named(parts: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="expected one of pace, sft"):
        pace.run("paec", small_settings(parts), tmp_path / "run")


# --- the notebooks --------------------------------------------------------------------------


def test_the_notebook_of_the_whole_loop_runs(
    reference: Reference, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the finished run of the smallest size."""
    monkeypatch.setattr("configs.pace.get_config", lambda preset: ConfigDict(reference.settings))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "pace").symlink_to(reference.folder)
    names = run_cells("01_pace_on_a_laptop.ipynb", tmp_path, monkeypatch)
    assert names["video"].shape[:2] == (2, names["won"].action_SA.shape[0])
    assert np.isfinite(float(names["metrics"]["loss"]))
    assert names["figures"] == 3  # an episode, its imagination, the reward


def test_the_notebook_that_drives_a_world_model_runs(
    reference: Reference, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the same run, which it takes as it is."""
    stages = sorted(path.name for path in (reference.folder / "stages").iterdir())
    monkeypatch.setenv("WOVR_RUN", str(reference.folder))
    names = run_cells("02_drive_a_world_model.ipynb", tmp_path, monkeypatch)
    assert sorted(path.name for path in (reference.folder / "stages").iterdir()) == stages
    # The truth that stands beside is the simulator's: it knows success, and starts where imagination starts.
    assert names["true"].truth_BNT is not None and names["imagined"].truth_BNT is None
    assert np.array_equal(names["true"].frame_BNHWC[:, 0], names["imagined"].frame_BNHWC[:, 0])
    assert all(np.isfinite(psnr).all() for psnr in names["fidelity"].values())
    assert len(names["surest"]) == 2 and not names["succeeded"][names["surest"]].any()
    assert names["figures"] == 3
