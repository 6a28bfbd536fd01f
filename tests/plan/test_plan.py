"""The planner: what it compiles is what runs, and its figures are the compiler's."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.sizes import draw_world, fake_learner, fake_world_train
from wovr_jax.core.sharding import ShardingError, mesh
from wovr_jax.data import batches
from wovr_jax.data import starts as start_states
from wovr_jax.plan import chips, flops, measure
from wovr_jax.plan import need as plan
from wovr_jax.plan.need import GIB, _exhausted, need
from wovr_jax.plan.phases import PHASES, PROMPT, Phase, Placement, list_phases
from wovr_jax.policy import train as sft
from wovr_jax.policy import vla
from wovr_jax.policy.actions import Codec
from wovr_jax.policy.train import SFTObjective
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.run import programs
from wovr_jax.run.bind import improvement
from wovr_jax.run.recipe import CollectConfig, DreamConfig, Recipe
from wovr_jax.run.stages.world import windows
from wovr_jax.sim import embedded
from wovr_jax.sim.tabletop.table import TabletopConfig
from wovr_jax.train import step as train_step
from wovr_jax.world import train
from wovr_jax.world.model import WorldConfig

ROOT = pathlib.Path(__file__).resolve().parents[2]
RECIPE = Recipe(
    policy=VLAConfig.fake(),
    world=WorldConfig.fake(),
    reward=RewardConfig.fake(),
    sim=TabletopConfig.fake(),
    temperature=1.0,
    world_train=fake_world_train(batch=4),
    learner=fake_learner(),
    collect=CollectConfig(demonstrations=4, validation=1, first=6, again=4, retold=4, batch=4),
    dream=DreamConfig(groups=2, chunks=2),
)


def test_what_is_planned_are_the_programs_that_run() -> None:
    """The same jitted functions, not functions like them: a change of the run is a change of the plan."""
    on, net = Placement(mesh(RECIPE.mesh)), vla.network(RECIPE.policy)
    objective = train.WorldObjective(RECIPE.world, RECIPE.world_train, (4,))
    assert PHASES["world"](RECIPE, on).program is train_step.compile_programs(objective).step
    imitation = SFTObjective(RECIPE.policy, RECIPE.sft)
    assert PHASES["sft"](RECIPE, on).program is train_step.compile_programs(imitation).step
    assert PHASES["update"](RECIPE, on).program is programs.update(RECIPE.learner, net, RECIPE.temperature)
    assert PHASES["imagine"](RECIPE, on).program is programs.dream(improvement(RECIPE), Codec(), RECIPE.world)


def test_what_is_given_is_not_planned() -> None:
    assert list_phases(RECIPE) == ["sft", "world", "imagine", "update"]
    frozen = {"sft": dataclasses.replace(RECIPE.sft, steps=0), "policy_weights": "given"}
    assert list_phases(dataclasses.replace(RECIPE, **frozen)) == ["world", "imagine", "update"]


def test_the_planned_step_of_imitation_has_the_shapes_of_what_runs() -> None:
    cfg, how, side = RECIPE.policy, dataclasses.replace(RECIPE.sft, early=3), RECIPE.size
    seeds = np.arange(RECIPE.collect.demonstrations)
    made = list(embedded.play_demonstrations(seeds, jax.random.key(0), RECIPE.expert, RECIPE.sim))
    chunks = batches.sft_chunks(made, cfg.chunk, early=how.early)
    data = sft.demonstrations(chunks, Codec(), np.zeros((3, PROMPT), np.int32))
    state, _ = sft.make(cfg, how, vla.network(cfg).init(jax.random.key(0)), data, jax.random.key(1))
    planned = PHASES["sft"](dataclasses.replace(RECIPE, sft=how), Placement(mesh(RECIPE.mesh)))

    def describe(tree):
        return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]

    assert data.frame_BHWC.shape[1] == side
    assert describe(planned.args[0]) == describe(state)
    assert describe(planned.held["data"]) == describe(data)  # every episode of this table is as long as it may be


def test_what_is_planned_has_the_shapes_of_what_runs() -> None:
    """A step on real episodes takes the planned state and the planned windows, and needs the planned memory."""
    cfg, how = RECIPE.world, RECIPE.world_train
    seeds = np.arange(RECIPE.collect.first + RECIPE.collect.demonstrations)
    made = list(embedded.play_demonstrations(seeds, jax.random.key(0), RECIPE.expert, RECIPE.sim))
    params = draw_world(cfg, jax.random.key(0))
    data, _ = windows(cfg, how, params["vae"], made)
    state, _ = train.make(cfg, how, params["dit"], data, jax.random.key(0))
    planned = PHASES["world"](RECIPE, Placement(mesh(RECIPE.mesh)))

    def shape(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

    assert shape(planned.args[0]) == shape(state) and shape(planned.args[3]) == shape((data,))

    plan_of_world = need("world", RECIPE, chips.topology("here"))
    program = train_step.compile_programs(train.WorldObjective(cfg, how, (how.batch,))).step
    account = program.lower(state, jnp.int32(0), None, (data,), jax.random.key(0)).compile().memory_analysis()
    assert plan_of_world.temporary == pytest.approx(account.temp_size_in_bytes, rel=0.05)
    sizes = {"parameters": state.params, "optimizer": state.opt_state, "data": data}
    assert plan_of_world.held == {name: sum(x.nbytes for x in jax.tree.leaves(tree)) for name, tree in sizes.items()}
    assert plan_of_world.peak == sum(plan_of_world.held.values()) + plan_of_world.temporary
    assert plan_of_world.collectives == {} and plan_of_world.times == how.steps + RECIPE.refresh.steps


def test_the_start_states_that_are_planned_are_as_a_stage_makes_them() -> None:
    seeds = np.arange(RECIPE.collect.first)
    made = list(embedded.play_demonstrations(seeds, jax.random.key(0), RECIPE.expert, RECIPE.sim))
    table = start_states.initial(made, memory=RECIPE.world.slots)
    planned = PHASES["imagine"](RECIPE, Placement(mesh(RECIPE.mesh))).beside["starts"]
    columns = ((name, getattr(planned, name), getattr(table, name)) for name in vars(table) if name != "initials")
    assert {name: (b.shape[1:], b.dtype) for name, _, b in columns} == {
        name: (getattr(planned, name).shape[1:], getattr(planned, name).dtype)
        for name in vars(table)
        if name != "initials"
    }
    # An episode start of each episode, and at most so many keyframes of it.
    assert planned.initials == table.initials and len(planned) == len(table) * (1 + RECIPE.starts.each)


def test_what_a_phase_leaves_in_memory_beside_it_is_counted() -> None:
    on = Placement(mesh(RECIPE.mesh))
    dream, update = PHASES["imagine"](RECIPE, on), PHASES["update"](RECIPE, on)
    assert {"optimizer", "starts"} <= set(dream.beside) and {"world", "reward", "starts"} <= set(update.beside)
    assert jax.tree.structure(dream.beside["optimizer"]) == jax.tree.structure(update.held["optimizer"])


def test_a_measured_phase_takes_what_was_made_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred MiB of numbers are found within a tenth, and flags are not all alike: no success, nothing to learn."""
    here = chips.topology("here")
    large = Placement(mesh(RECIPE.mesh)).rows(25, 2**20)
    trial = Phase(jax.jit(lambda x: x * 2.0), (large,), {}, {}, 1, chains=False)
    monkeypatch.setitem(PHASES, "world", lambda recipe, on: trial)
    found = measure.measure_phase("world", RECIPE, here, runs=3)
    assert found.bytes == pytest.approx(2 * 100 * 2**20, rel=0.1) and len(found.seconds) == 3
    # A donated argument is used up: the result takes its place.
    used = trial._replace(program=jax.jit(lambda x: (x * 2.0, 0), donate_argnums=0), chains=True)
    monkeypatch.setitem(PHASES, "world", lambda recipe, on: used)
    found = measure.measure_phase("world", RECIPE, here, runs=2)
    assert found.bytes == pytest.approx(100 * 2**20, rel=0.1) and len(found.seconds) == 2
    monkeypatch.setattr(measure, "CLEAR", ROOT / "not-linux")
    with pytest.raises(measure.MeasureError, match="measured by Linux, through .*not-linux"):
        measure.measure_phase("world", RECIPE, here)
    flags = measure._make_array(Placement(mesh(RECIPE.mesh)).rows(4, 3, 2, dtype=bool))
    assert flags.sum() == 2 and flags[1, -1, -1] and flags[3, -1, -1]


def test_operations_are_counted_as_often_as_a_loop_runs_them() -> None:
    """The compiler's own count has a loop's body once."""
    a, kernel = jnp.zeros((3, 5)), jnp.zeros((2, 3, 3, 7, 4))

    def product(w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), a, None, length=6)[0]

    def convolved(x: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1, 1), "VALID", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
        )

    def either(w: jax.Array) -> jax.Array:
        return jax.lax.cond(w[0, 0] > 0, product, lambda w: a @ w, w)

    def of(f, *shape):
        return flops.count(jax.make_jaxpr(f)(jnp.zeros(shape)).jaxpr)

    assert of(product, 5, 5) == 6 * 2 * 3 * 5 * 5
    assert of(jax.jit(product), 5, 5) == of(product, 5, 5)
    assert of(either, 5, 5) == of(product, 5, 5)
    assert of(convolved, 1, 3, 6, 6, 7) == 2 * (1 * 2 * 4 * 4 * 4) * (2 * 3 * 3 * 7)
    # Backwards: the gradients of both sides of each product, but the first input has none.
    assert of(jax.grad(lambda w: product(w).sum()), 5, 5) in range(3 * 900 - 300, 3 * 900 + 1)


def test_what_the_tpu_compiler_says_of_a_program_that_does_not_fit_is_read() -> None:
    said = "the total memory required for HLO temporaries (17.91G) exceeds available HBM (15.75G)."
    assert _exhausted(said) == int(17.91 * GIB)
    assert _exhausted("Ran out of memory in memory space hbm. Used 24.5G of 15.75G hbm.") == int(24.5 * GIB)


def test_the_smallest_slice_is_looked_for_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled for are only the slices that hold what the program is given; the first that fits is the answer."""
    gib, asked = {1: 40, 4: 20, 8: 14, 16: 9}, []

    def found(name: str, recipe: Recipe, where: chips.Topology) -> plan.Need:
        asked.append(len(where.devices))
        return plan.Need(name, {"all": int(gib[recipe.mesh.fsdp] * GIB)}, {}, 3 * GIB, 1, 1, {})

    slices = {f"v5e:{shape}": size for shape, size in zip(chips.SLICES["v5e"], (1, 4, 8, 16), strict=False)}

    def describe(name: str) -> chips.Topology:
        return chips.Topology(name, [None] * slices[name], chips.TPUS["v5e"])

    monkeypatch.setattr(plan, "topology", describe)
    monkeypatch.setattr(plan, "count_held_bytes", lambda name, recipe, where: gib[len(where.devices)] * GIB)
    monkeypatch.setattr(plan, "need", found)
    # Batches that sixteen chips divide; a recipe refuses a mesh that does not divide them.
    batches: dict[str, Any] = {
        "world_train": fake_world_train(batch=16),
        "learner": fake_learner(microbatch=16),
    }
    batches["collect"] = dataclasses.replace(RECIPE.collect, batch=16)
    divisible = dataclasses.replace(RECIPE, dream=DreamConfig(groups=8, chunks=2), **batches)
    recipe, where, need = plan.find_smallest_slice("update", divisible, "v5e")
    assert (asked, where.name, recipe.mesh.fsdp, need.fits(where)) == ([8, 16], "v5e:4x4", 16, True)


@pytest.mark.parametrize("name", ["v9:2x2", "v5e", "h200:3", "h200:x", "tpu"])
def test_topologies_that_nobody_makes_are_refused(name: str) -> None:
    with pytest.raises(ShardingError, match=rf"expected here, <generation>:<shape> of .*; got {name}"):
        chips.topology(name)


def test_devices_that_are_here_are_known_by_their_name() -> None:
    assert chips.topology("here").devices == jax.devices()
    assert chips._find_chip("NVIDIA H100 80GB HBM3") == chips.GPUS["h100"]
    assert chips._find_chip("TPU v5 lite") == chips.TPUS["v5e"] and chips._find_chip("TPU v5") == chips.TPUS["v5p"]
    assert chips._find_chip("cpu").gib == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["here", "v5e:4x4", "h100:8"])
def test_every_phase_is_compiled_for_many_devices(topology: str) -> None:
    """The TPU compiler takes the small networks' programs in a minute or two."""
    if topology != "here" and importlib.util.find_spec("libtpu") is None:
        pytest.skip('libtpu is not installed: pip install "jax[tpu]"')
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    told = _plan("--config=configs/pace.py", f"--topology={topology}", "--config.mesh.fsdp=4", XLA_FLAGS=flags)
    for name in PHASES:
        assert f"\n{name}: " in told
    assert "\nlargest: " in told
    assert told.count("all-gather") + told.count("all-reduce") >= 3


def test_collectives_of_several_arrays_at_once_are_counted_and_those_that_read_them_are_not() -> None:
    program = """
      %all-gather.1 = f32[8,4]{1,0:T(8,128)} all-gather(%a), dimensions={0}
      %all-reduce.2 = (f32[4]{0}, f32[2,2]{1,0}) all-reduce(%b, %c), to_apply=%add
      %all-reduce-start.3 = (f32[], f32[]) all-reduce-start(%d, %e), to_apply=%add
      %all-reduce-done.3 = (f32[], f32[]) all-reduce-done(%all-reduce-start.3)
      %sum.4 = f32[4]{0} add(%all-reduce.2, %all-gather.1), metadata={op_name="all-reduce"}
    """
    assert plan.COLLECTIVE.findall(program) == ["all-gather", "all-reduce", "all-reduce"]


@pytest.mark.slow
def test_the_full_size_training_step_of_the_world_model_fits_eight_v6e() -> None:
    pytest.importorskip("libtpu", reason='pip install "jax[tpu]"')
    told = _plan("--config=configs/pace.py:libero_spatial", "--topology=v6e:2x4", "--phases=world")
    assert " a device fits\n" in told and "all-gather" in told


def _plan(*flags: str, **environment: str) -> str:
    command = [sys.executable, "launch/plan.py", *flags]
    given = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    done = subprocess.run(command, env=given, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
