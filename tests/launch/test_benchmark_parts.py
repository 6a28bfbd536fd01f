"""The benchmarks of parts and of a GPU: what is made up, what is measured, what is kept when a part fails."""

from __future__ import annotations

import argparse
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import command
from launch.benchmarks import arrays, components, gpu, parts, rendering, rival, timing
from launch.benchmarks.components import Maker
from launch.benchmarks.session import Session, first_line
from launch.benchmarks.timing import Bench, Part
from wovr_jax.core import config
from wovr_jax.policy import vla
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.run.recipe import Recipe
from wovr_jax.world import model as world_model
from wovr_jax.world.model import WorldConfig

CONFIG = str(command.ROOT / "configs" / "pace.py")


@pytest.fixture(scope="module")
def settings():
    return command.load_config(CONFIG, "tiny,lora")


@pytest.fixture(scope="module")
def recipe(settings):
    return config.from_dict(Recipe, settings)


def leaves(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


# ---------------------------------------------------------------- the command line


def test_parts_and_batches_become_a_list_in_the_order_of_a_run():
    wanted = parts.list_wanted(parts.names("update,decode,policy"), [1, 8])
    assert wanted == [("policy", 1), ("policy", 8), ("decode", 1), ("decode", 8), ("update", None)]


def test_a_pair_is_a_setting_and_two_values():
    assert parts.pair("world.vae.conv=native,fold") == ("world.vae.conv", ("native", "fold"))
    assert parts.pair("config.world.vae_rows=4,0") == ("world.vae_rows", (4, 0))


@pytest.mark.parametrize(
    "text", ["world.vae.conv", "world.vae.conv=fold", "a=1,1", "a=1,2,3", "=1,2", "a=1,", "weights=float32,int8"]
)
def test_what_is_no_pair_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected"):
        parts.pair(text)


def test_unknown_parts_and_steps_are_refused_with_those_there_are():
    with pytest.raises(argparse.ArgumentTypeError, match=r"expected some of policy, .*got encod"):
        parts.names("encod")
    with pytest.raises(argparse.ArgumentTypeError, match=r"expected some of matrix, .*got conf"):
        gpu.step_names("matrix,conf")


def test_the_command_is_kept_without_folders(monkeypatch):
    words = ["benchmark.py", "parts", "--out", "/somewhere", "--batches=2", "--out=/else", "--parts", "policy"]
    monkeypatch.setattr("sys.argv", words)
    assert parts.command_line("parts") == "launch/benchmark.py parts --batches=2 --parts policy"


def test_parts_are_those_that_can_be_made():
    assert tuple(components.BATCHED) == parts.BATCHED and tuple(components.WHOLE) == parts.WHOLE


# ---------------------------------------------------------------- what is made up


def test_weights_have_the_dtype_of_their_layer_and_the_rest_stays_float32():
    cfg = WorldConfig.fake()
    cfg = dataclasses.replace(cfg, dit=dataclasses.replace(cfg.dit, dtype="bfloat16"))
    shapes = world_model.networks(cfg)[0].shapes()
    dtypes = arrays.compute_dtypes(world_model.networks(cfg)[0])
    cast = leaves(arrays.cast(shapes, dtypes))
    assert cast["['blocks']['ffn']['inner']['kernel']"].dtype == jnp.bfloat16
    assert cast["['blocks']['modulation']"].dtype == jnp.float32
    assert cast["['time_projection']['kernel']"].dtype == jnp.float32  # computed in float32 whatever the rest
    assert cast["['blocks']['cross_norm']['scale']"].dtype == jnp.float32


@pytest.mark.parametrize("frozen", ["compute", "float32"])
def test_full_size_weights_are_what_the_compute_dtype_makes_of_them(frozen):
    """By shapes alone: 7.5 billion numbers, 2 bytes each but for norms and tables."""
    net = vla.network(VLAConfig.openvla_7b())
    cast = arrays.cast(net.shapes(), arrays.compute_dtypes(net) if frozen == "compute" else {})
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cast))
    assert size / 1e9 == pytest.approx(15.0 if frozen == "compute" else 30.0, abs=0.1)


def test_no_weight_is_zero(recipe):
    maker = Maker(recipe, {})
    params = leaves({"policy": maker.weights(maker.rl.net), "world": maker.world})
    assert any("lora_b" in name for name in params)
    for name, leaf in params.items():
        assert np.mean(np.asarray(leaf) == 0) < 0.01, name


def test_made_up_data_are_what_programs_take():
    shapes = {
        "opt_state": {"mu": jax.ShapeDtypeStruct((3,), jnp.float32)},
        "frame_BHWC": jax.ShapeDtypeStruct((2, 4, 4, 3), jnp.float32),
        "anchor_KHWC": jax.ShapeDtypeStruct((2, 4, 4, 3), jnp.uint8),
        "success_BNT": jax.ShapeDtypeStruct((4, 2, 3), bool),
        "prompt_BL": jax.ShapeDtypeStruct((2, 5), jnp.int32),
        "task_B": jax.ShapeDtypeStruct((2,), jnp.int32),
        "var": jax.ShapeDtypeStruct((9,), jnp.float32),
        "rate": jax.ShapeDtypeStruct((), jnp.float32),
        "large": jax.ShapeDtypeStruct((3, arrays.NOISE // 2), jnp.float32),
    }
    made = arrays.fill(shapes)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), made) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), shapes
    )
    assert not made["opt_state"]["mu"].any() and not made["task_B"].any() and made["rate"] == 1
    assert np.abs(made["frame_BHWC"]).max() <= 1 and np.std(made["anchor_KHWC"]) > 10
    assert made["success_BNT"].sum() == 2 and made["success_BNT"][1::2, -1, -1].all()
    assert made["prompt_BL"].min() >= 1 and made["var"].min() > 0.5


@pytest.mark.parametrize("name", parts.PARTS)
def test_every_part_is_traced_on_its_arguments(recipe, name):
    part = Maker(recipe, {}).make(name, 2 if name in parts.BATCHED else None)
    assert part.name == name and part.dtype in ("float32", "bfloat16")
    traced = part.program.trace(*part.args)
    assert timing.flops.count(traced.jaxpr.jaxpr) > 1e4


def test_frozen_weights_are_shared_by_parts_and_by_recipes_of_the_same_shapes(recipe):
    store = {}
    first = Maker(recipe, store).make("decode", 1)
    again = dataclasses.replace(recipe, world=dataclasses.replace(recipe.world, vae_rows=1))
    second = Maker(again, store).make("decode", 2)
    assert jax.tree.leaves(first.args[0])[0] is jax.tree.leaves(second.args[0])[0]


def test_a_policy_that_is_trained_whole_stays_float32(settings):
    plain = config.from_dict(Recipe, command.load_config(CONFIG, "tiny"))
    plain = dataclasses.replace(plain, policy=dataclasses.replace(plain.policy, llm=_bfloat16(plain.policy.llm)))
    adapted = dataclasses.replace(plain, learner=config.from_dict(Recipe, settings).learner)
    for recipe, dtype in ((plain, jnp.float32), (adapted, jnp.bfloat16)):
        state = Maker(recipe, {}).make("update", None).args[0]
        assert state.params["llm"]["blocks"]["q"]["kernel"].dtype == dtype


def _bfloat16(llm):
    return dataclasses.replace(llm, dtype="bfloat16")


# ---------------------------------------------------------------- what is measured


def test_a_donating_program_goes_on_from_its_own_result():
    program = jax.jit(lambda state, x: (state + x, x.sum()), donate_argnums=0)
    part = Part("count", None, program, (jnp.zeros(3), jnp.ones(3)), "float32", chains=True)
    bench = Bench(part, timing.lower(part)())
    (taken,) = timing.repeat([bench], 2, 60.0)
    assert len(taken) == 2 and min(taken) > 0 and bench.calls > 1
    assert float(bench._args[0][0]) == 2 + 2 * bench.calls  # two calls alone to warm up, then as measured


def test_operations_are_counted_by_the_trace_and_memory_by_the_compiler():
    program = jax.jit(lambda a: jax.lax.scan(lambda x, _: (x @ a, None), a, length=7)[0])
    part = Part("loop", None, program, (jnp.ones((16, 16)),), "float32")
    compiled = timing.lower(part)()
    assert compiled.flops == 7 * 2 * 16**3
    assert compiled.bytes is not None and compiled.bytes >= 2 * 16 * 16 * 4
    assert compiled.compile_s > 0


def test_the_matrix_rate_is_that_of_the_best_size():
    found = timing.measure_matrix("float32", (16, 64), repeats=2)
    assert set(found["rates"]) == {"16", "64"} and found["rate"] == max(found["rates"].values())


def test_what_is_measured_in_turn_has_as_many_of_each():
    part = Part("add", None, jax.jit(lambda x: x + 1), (jnp.ones(3),), "float32")
    benches = [Bench(part, timing.lower(part)()) for _ in range(2)]
    a, b = timing.repeat(benches, 3, 60.0)
    assert len(a) == len(b) == 3
    assert len(timing.repeat(benches, 3, 0.0)[0]) == 1  # at least one of each, however little time there is


# ---------------------------------------------------------------- a sitting


@pytest.fixture
def session(settings, tmp_path):
    return Session(settings, tmp_path, title="a test", repeats=2, seconds=1.0)


def test_a_part_that_fails_is_told_of_and_the_rest_goes_on(session, monkeypatch, tmp_path, capsys):
    def fail(self, batch):
        raise RuntimeError("RESOURCE_EXHAUSTED: no room\nand a long story")

    monkeypatch.setitem(components.BATCHED, "encode", fail)
    session.results["matrix"] = {"float32": {"rate": 1e12, "size": 8}}
    session.measure(session.maker(), [("encode", 2), ("reward", 2)])
    said = capsys.readouterr().out
    assert "RuntimeError: RESOURCE_EXHAUSTED: no room" in said and "long story" not in said
    lost, kept = json.loads((tmp_path / "parts.json").read_text())["parts"]
    assert lost["error"].startswith("RuntimeError") and kept["rate"] > 0
    assert kept["share"] == pytest.approx(kept["rate"] / 1e12)
    assert "not measured: RuntimeError" in (tmp_path / "parts.md").read_text()
    assert "reward 2" in (tmp_path / "parts.html").read_text()


def test_the_file_is_there_after_every_part(session, monkeypatch, tmp_path):
    def stop(self, batch):
        assert len(json.loads((tmp_path / "parts.json").read_text())["parts"]) == 1
        raise KeyboardInterrupt

    monkeypatch.setitem(components.BATCHED, "decode", stop)
    with pytest.raises(KeyboardInterrupt):
        session.measure(session.maker(), [("reward", 2), ("decode", 2)])


def test_two_values_are_timed_in_turn(session, tmp_path):
    session.compare("world.vae.conv", ("native", "fold"), [("encode", 1)])
    (row,) = json.loads((tmp_path / "parts.json").read_text())["pairs"]
    a, b = row["seconds"]
    assert len(a) == len(b) and row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
    assert row["ratio"]["high"] == pytest.approx(max(y / x for x, y in zip(a, b, strict=True)))
    assert "world.vae.conv fold by native: " in rendering.pair_line(row)


def test_a_value_that_does_not_fit_is_refused_before_anything_is_measured(session):
    with pytest.raises(config.ConfigError, match=r"world\.vae\.conv"):
        session.compare("world.vae.conv", ("native", "folded"), [("encode", 1)])
    assert not session.results["pairs"]


def test_weights_are_no_setting_of_a_run_and_can_be_compared(session):
    assert session.maker({"weights": "float32"}).frozen == "float32" and session.maker().frozen == "compute"


def test_after_the_deadline_nothing_is_begun(settings, tmp_path):
    for threads in (1, 2):
        late = Session(settings, tmp_path, title="late", threads=threads, deadline=0.0)
        late.measure(late.maker(), [("reward", 2)])
        assert late.results["parts"][0]["error"] == "TimeoutError: no time was left"


def test_the_first_line_of_an_error_says_its_kind():
    assert first_line(ValueError("one\ntwo")) == "ValueError: one" and first_line(ValueError()) == "ValueError"


# ---------------------------------------------------------------- the script for a GPU


def test_a_dry_run_goes_through_every_step(opened, tmp_path):
    status, said, wrong = opened("benchmark.py", "gpu", "--dry", "--threads=2", f"--out={tmp_path}")
    assert status in (0, None), (said, wrong)
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert set(results["matrix"]) == {"bfloat16", "float32"}
    measured = {(row["part"], row["batch"]) for row in results["parts"] if "error" not in row}
    assert {("chunk", 1), ("chunk", 2), ("chunk", 4), ("step", 2), ("decode", 2), ("update", None)} <= measured
    pairs = {(row["setting"], row["part"]): row for row in results["pairs"]}
    assert pairs["world.vae.conv", "decode"]["ratio"]["median"] > 0
    assert pairs["world.vae_rows", "world"]["ratio"]["median"] > 0
    # A CPU has no such kernel, which is said and stops nothing.
    assert "error" in pairs["world.dit.kernel", "step"]
    beside = results.get("beside", []) or [note for note in results["notes"] if "left out, beside" in note]
    assert beside and (not rival.find_missing(dry=True)) == bool(results.get("beside"))
    text = (tmp_path / "gpu.md").read_text()
    assert "| chunk | 4 |" in text and str(tmp_path) not in text and "times the paper's 23" in text


def test_without_a_gpu_the_script_says_what_is_missing(opened, tmp_path):
    status, _, _ = opened("benchmark.py", "gpu", f"--out={tmp_path}")
    assert "Expected a GPU" in str(status) and "--dry" in str(status)
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named_with_the_way_to_bring_them(opened, tmp_path, monkeypatch):
    monkeypatch.setitem(gpu.NEEDS, "no_such_module", "no-such-package")
    # The door imports the module anew only where it is not loaded yet, so this list is the one that it reads.
    status, _, _ = opened("benchmark.py", "gpu", "--dry", f"--out={tmp_path}")
    assert "no-such-package" in str(status) and "wheels" in str(status)


def test_steps_without_time_are_left_out_and_said_to_be(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "is_ready", lambda: True)
    monkeypatch.setattr(gpu, "measure_peak", None)
    monkeypatch.setitem(gpu.STEPS, "matrix", gpu.Step(1e3, gpu.measure_peak))
    monkeypatch.setitem(gpu.STEPS, "conv", gpu.Step(1e3, gpu.measure_peak))
    status, _, wrong = opened(
        "benchmark.py", "gpu", "--minutes=1", "--steps=conv", f"--config={CONFIG}:tiny,lora", f"--out={tmp_path}"
    )
    assert status in (0, None), wrong
    first, second = json.loads((tmp_path / "gpu.json").read_text())["notes"]
    assert first.startswith("left out, matrix: needs about 1000 s") and second.startswith("left out, conv")
