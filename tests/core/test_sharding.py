"""Sharding: sizes and rules by hand, what is refused, and every training step equal on every mesh."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from tests.sizes import draw_world
from wovr_jax.core import sharding
from wovr_jax.core.sharding import MeshConfig, ShardingError
from wovr_jax.policy import vla
from wovr_jax.types import Params
from wovr_jax.world import dit, model

ROOT = pathlib.Path(__file__).resolve().parents[2]
LARGE = jax.ShapeDtypeStruct((2048, 1024), jnp.float32)


def over(data: int, fsdp: int, tensor: int) -> AbstractMesh:
    return AbstractMesh((data, fsdp, tensor), sharding.MESH_AXES)


def specs(tree: Params, axes: sharding.Axes, mesh: AbstractMesh) -> Params:
    return jax.tree.map(lambda leaf: leaf.spec, sharding.shardings(tree, axes, mesh))


def test_one_axis_takes_what_is_left() -> None:
    assert MeshConfig(-1, 2, 2).sizes(16) == (4, 2, 2)
    assert MeshConfig(2, 1, 1).sizes(8) == (2, 1, 1)  # fewer than there are is allowed


@pytest.mark.parametrize(
    ("sizes", "says"),
    [((4, 4, 1), r"needs 16 devices, there are 8"), ((-1, 3, 1), "8 is not a multiple of 3")],
)
def test_a_mesh_that_devices_cannot_form_is_refused(sizes: tuple[int, ...], says: str) -> None:
    with pytest.raises(ShardingError, match=says):
        MeshConfig(*sizes).sizes(8)


def test_a_mesh_of_two_unknowns_is_refused() -> None:
    with pytest.raises(ValueError, match="-1 once"):
        MeshConfig(-1, -1, 1)


def test_moments_and_averages_lie_as_their_parameter() -> None:
    lines = (("ffn/kernel", ("embed", "mlp")),)
    state = {"params": {"ffn": {"kernel": LARGE}}, "opt": [{"mu": {"ffn": {"kernel": LARGE}}}], "count": jnp.zeros(())}
    found = specs(state, lines, over(1, 4, 2))
    assert found["params"]["ffn"]["kernel"] == found["opt"][0]["mu"]["ffn"]["kernel"] == PartitionSpec("fsdp", "tensor")
    assert found["count"] == PartitionSpec()


def test_what_cannot_lie_is_named_all_at_once() -> None:
    odd = jax.ShapeDtypeStruct((2049, 1024), jnp.float32)
    tree = {"nowhere": LARGE, "odd": odd, "flat": LARGE, "small": jnp.zeros((3, 5))}
    lines = (("odd", ("embed", "mlp")), ("flat", ("embed",)), ("small", ("embed", "mlp")))
    with pytest.raises(ShardingError) as caught:
        sharding.shardings(tree, lines, over(1, 4, 2))
    said = str(caught.value)
    assert "3 leaves" in said and "small" not in said  # small and uneven: left whole
    assert "nowhere (2048, 1024): no line of AXES fits it" in said
    assert "odd (2049, 1024): not divisible, embed = 2049 over fsdp = 4" in said
    assert "flat (2048, 1024): AXES describes 1 axes" in said


@pytest.mark.parametrize("mesh", [over(2, 4, 1), over(1, 8, 8), over(1, 32, 1)], ids=str)
def test_the_released_sizes_are_described_and_cut_evenly(mesh: AbstractMesh) -> None:
    """No large leaf is left whole but those said to be, and a device holds at most a fifth more than its share."""
    parts = {
        "policy": (vla.network(vla.VLAConfig.openvla_7b()).shapes(), vla.AXES),
        "world": (model.networks(model.WorldConfig.wan())[0].shapes(), dit.AXES),
    }
    for name, (shapes, axes) in parts.items():
        placed = sharding.shardings(shapes, axes, mesh)
        leaves = list(zip(jax.tree.leaves(shapes), jax.tree.leaves(placed), strict=True))
        held = sum(int(np.prod(at.shard_shape(leaf.shape))) for leaf, at in leaves)
        total = sum(leaf.size for leaf, _ in leaves)
        # The MLPs around time and actions are cut over fsdp alone.
        assert held < 1.2 * total / (mesh.shape["fsdp"] * mesh.shape["tensor"]), name


def test_every_network_is_described() -> None:
    shapes = jax.eval_shape(lambda: draw_world(model.WorldConfig.wan(), jax.random.key(0)))
    sharding.shardings(shapes, model.AXES, over(1, 8, 1))


def on_devices(count: int, script: str, *words: str) -> str:
    """The last line that a script below tests/ prints in a process with so many devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # see machine.enable_compile_cache
    command = [sys.executable, str(ROOT / "tests" / script), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def on_meshes(cases: str, *meshes: str) -> dict[str, dict[str, list[float]]]:
    """What ``mesh_cases.py`` finds, in a process with eight devices."""
    return json.loads(on_devices(8, "core/mesh_cases.py", cases, *meshes))


def assert_equal_on(meshes: tuple[str, ...], cases: str) -> None:
    """Five steps on each mesh against one device, relative to the largest number; Adam makes more of rounding."""
    alone, *others = on_meshes(cases, "1x1x1", *meshes).values()
    for mesh, numbers in zip(meshes, others, strict=True):
        for case, found in numbers.items():
            scale = max(map(abs, alone[case]))
            near = 1e-4 if case == "grpo" else 5e-6
            np.testing.assert_allclose(found, alone[case], atol=near * scale, rtol=0, err_msg=f"{case} on {mesh}")


def test_training_is_the_same_over_data_parameters_and_tensors() -> None:
    assert_equal_on(("2x2x2",), "world,read")


def test_a_state_saved_by_eight_devices_is_restored_by_four(tmp_path: pathlib.Path) -> None:
    saved, cut_8 = on_devices(8, "core/moved_checkpoint.py", "save", str(tmp_path / "c"), "2x2x2").split()
    restored, cut_4 = on_devices(4, "core/moved_checkpoint.py", "restore", str(tmp_path / "c"), "1x4x1").split()
    assert restored == saved
    assert min(int(cut_8), int(cut_4)) > 50, "arrays that were cut; copies would prove nothing"


@pytest.mark.slow
def test_every_step_is_the_same_on_every_mesh() -> None:
    assert_equal_on(("2x1x1", "1x4x1", "8x1x1", "2x2x2", "1x2x4"), "world,read,policy,reward,dream,grpo")
