"""Everything that can stop a run: what is said, and that what was there before is there as it was.

``FAULTS`` is the table of docs/reliability.md; a test holds the two together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import hashlib
import itertools
import pathlib
import re
import resource
import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.shards import write_shards
from wovr_jax.core import checkpoint, sharding
from wovr_jax.core.history import CheckpointConfig
from wovr_jax.data import episodes as disk
from wovr_jax.run.folder import Run, RunError
from wovr_jax.train import loop
from wovr_jax.train.step import ReplayableStep
from wovr_jax.types import Episode
from wovr_jax.weights import native

ROOT = pathlib.Path(__file__).resolve().parents[1]
EVERY_STEP = CheckpointConfig(every_s=0)


@jax.jit
def drawn(numbers: jax.Array, i: jax.Array) -> jax.Array:
    return numbers[i]


@jax.jit
def add(state: dict, i: jax.Array, numbers: jax.Array) -> tuple[dict, dict]:
    size = jnp.mean(numbers[i])
    return {"w": state["w"] + size}, {"loss": jnp.float32(1.0), "grad_norm": size}


def train(
    folder: pathlib.Path, steps: int, *, bad: int = 99, value: float = np.nan, batch: bool = True, rolls: bool = False
) -> dict:
    """Adds the mean of three numbers drawn from the step; those of step ``bad`` are not finite.

    Programs are compiled by the first call, not by one that finds the disk full: JAX's cache is on a disk too.
    """
    numbers = jnp.asarray(np.where(np.arange(100)[:, None] == bad, value, np.arange(300.0).reshape(100, 3)), np.float32)
    drawn(numbers, jnp.int32(0))

    def step(state, i):
        return add(state, i, numbers)

    made = ReplayableStep(step, lambda _, i: drawn(numbers, i), on_policy=rolls) if batch else step
    return loop.fit("world-0", {"w": jnp.zeros(2)}, made, steps, folder=folder, keep=EVERY_STEP, log_every=3)


@dataclasses.dataclass
class Fault:
    """What goes wrong, what is raised and said, and what has to be whole afterwards."""

    happens: Callable[[pathlib.Path], object]
    raises: type[Exception]
    says: str
    intact: Callable[[pathlib.Path], object] = lambda folder: None


def trained(folder: pathlib.Path) -> None:
    """Three steps, saved after each."""
    train(folder, 3)


def as_after_three_steps(folder: pathlib.Path) -> None:
    """The same command goes on from the last good step and ends as a run to which nothing happened."""
    went_on = train(folder, 6)
    np.testing.assert_array_equal(went_on["w"], train(folder / "whole", 6)["w"])
    assert not list((folder / "fit").glob("*tmp*")), "half a checkpoint was left"


@contextlib.contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """A disk with no room for more, as near as a test comes to one: a longer write fails.

    The error of the first file stops a save. Those of the other files reach nobody, and Python says so of each.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", lambda _: None)
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            gc.collect()


def full_while_saving(folder: pathlib.Path) -> None:
    with files_no_larger_than(64):
        train(folder, 6)


def full_while_a_stage_writes(folder: pathlib.Path) -> None:
    def make(_: pathlib.Path) -> dict:
        raise OSError(errno.ENOSPC, "No space left on device")

    Run(folder / "run", {"seed": 0}).stage("collect-0", make, lambda _: None)


def read_only(folder: pathlib.Path) -> None:
    with pytest.MonkeyPatch.context() as patch:  # permissions do not stop root, who may be running this
        patch.setattr(pathlib.Path, "mkdir", _refuse)
        Run(folder / "run", {"seed": 0})


def _refuse(*_: object, **__: object) -> None:
    raise OSError(errno.EROFS, "Read-only file system")


def collected(folder: pathlib.Path) -> None:
    """Six episodes in three shards."""
    rng = np.random.default_rng(0)
    frame, action = rng.integers(0, 256, (5, 8, 8, 3), np.uint8), np.zeros((4, 7), np.float32)
    one = Episode(frame, action, np.zeros(5, bool), "reach", 0, 0, "base", action)
    write_shards(folder / "episodes", [dataclasses.replace(one, seed=i) for i in range(6)], per_shard=2)


def an_episode_is_damaged(folder: pathlib.Path) -> None:
    shard = folder / "episodes" / "shard-00001.array_record"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    disk.read(folder / "episodes")


def other_episodes_are_whole(folder: pathlib.Path) -> None:
    shards = disk.manifest(folder / "episodes")["shards"]
    sums = [hashlib.sha256((folder / "episodes" / shard["file"]).read_bytes()).hexdigest() for shard in shards]
    assert [found == shard["sha256"] for found, shard in zip(sums, shards, strict=True)] == [True, False, True]


def weights_are_missing(folder: pathlib.Path) -> None:
    shapes = {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}
    native.load_weights("world_weights", str(folder / "nowhere.json"), shapes, sharding.WHOLE)


def fewer_devices(_: pathlib.Path) -> None:
    with sharding.use(sharding.MeshConfig(data=1024)):
        pass


FAULTS = {
    "a gradient is not finite": (
        trained,
        Fault(
            lambda folder: train(folder, 9, bad=4, value=np.inf),
            loop.NonFiniteError,
            r"world-0: metric 'grad_norm' is inf at step 5 of 9\. The checkpoint of step \d in .* is kept\..*nonfinite",
            as_after_three_steps,
        ),
    ),
    "the disk is full while a state is saved": (
        trained,
        Fault(
            full_while_saving,
            checkpoint.CheckpointError,
            r"0000000\d could not be written: the disk is full \(\d+ MiB are free at .*\)\. Free some space",
            as_after_three_steps,
        ),
    ),
    "the disk is full while a stage writes": (
        trained,
        Fault(
            full_while_a_stage_writes,
            RunError,
            r"collect-0 cannot go on: the disk is full .*Finished stages and checkpoints are as they were",
            as_after_three_steps,
        ),
    ),
    "the run folder is read-only": (
        trained,
        Fault(
            read_only,
            RunError,
            r"the run cannot begin: .* cannot be written to by this user\. Choose another folder",
            as_after_three_steps,
        ),
    ),
    "an episode cannot be read": (
        collected,
        Fault(
            an_episode_is_damaged,
            disk.EpisodesError,
            r"shard-00001\.array_record is damaged: its SHA-256 is not the manifest's\. Copy or collect it again",
            other_episodes_are_whole,
        ),
    ),
    "weights are missing": (
        trained,
        Fault(weights_are_missing, ValueError, r"config\.world_weights: .*nowhere\.json", as_after_three_steps),
    ),
    "there are fewer devices than the mesh needs": (
        trained,
        Fault(
            fewer_devices,
            sharding.ShardingError,
            r"data 1024 x fsdp 1 x tensor 1 needs 1024 devices, there (is|are) \d+\. Ask for a smaller mesh",
            as_after_three_steps,
        ),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_explained_and_leaves_everything_before_it(tmp_path: pathlib.Path, name: str) -> None:
    prepare, fault = FAULTS[name]
    prepare(tmp_path)
    with pytest.raises(fault.raises) as caught:
        fault.happens(tmp_path)
    assert re.search(fault.says, str(caught.value), re.DOTALL), caught.value
    fault.intact(tmp_path)


def test_every_refusal_is_one_that_the_door_answers_in_words() -> None:
    for name, (_, fault) in FAULTS.items():
        assert issubclass(fault.raises, ValueError | FloatingPointError), name


def test_the_table_of_the_docs_is_this_one() -> None:
    lines = (ROOT / "docs" / "reliability.md").read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("| what happens"))
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[begin + 2 :])
    rows = [line.split("|")[1].strip() for line in table]
    assert [row for row in rows if row] == [*FAULTS]


# --- what the update trained on -------------------------------------------------------------


def test_the_batch_and_the_state_before_a_bad_update_are_kept(tmp_path: pathlib.Path) -> None:
    trained(tmp_path)
    with pytest.raises(loop.NonFiniteError):
        train(tmp_path, 9, bad=4)
    kept = checkpoint.load(tmp_path / "nonfinite")
    assert np.isnan(kept["batch"]).all()
    # Means of 0..2, 3..5, 6..8 and 9..11: the state that the update met, two steps after the last checkpoint.
    assert kept["state"]["w"].tolist() == [22.0, 22.0]
    assert checkpoint.meta(tmp_path / "nonfinite") == {"stage": "world-0", "step": 4}


def test_without_a_checkpoint_the_batch_is_kept_all_the_same(tmp_path: pathlib.Path) -> None:
    with pytest.raises(loop.NonFiniteError, match=r"No checkpoint had been written yet.*nonfinite"):
        train(tmp_path, 3, bad=0)
    kept = checkpoint.load(tmp_path / "nonfinite")
    assert np.isnan(kept["batch"]).all() and not (tmp_path / "fit").exists()


def test_rollouts_of_a_state_that_is_lost_are_not_kept_and_that_is_said(tmp_path: pathlib.Path) -> None:
    with pytest.raises(loop.NonFiniteError, match="Nothing had been saved, so its rollouts are not kept"):
        train(tmp_path, 3, bad=0, rolls=True)
    assert not (tmp_path / "nonfinite").exists()


def test_a_disk_that_is_full_as_well_does_not_hide_the_first_fault(tmp_path: pathlib.Path) -> None:
    trained(tmp_path)
    with files_no_larger_than(64), pytest.raises(loop.NonFiniteError, match="is nan .* could not be kept: .* is full"):
        train(tmp_path, 9, bad=3)


def test_a_step_that_cannot_show_its_batch_stops_as_well(tmp_path: pathlib.Path) -> None:
    with pytest.raises(loop.NonFiniteError, match="at step 2 of 3"):
        train(tmp_path, 3, bad=1, batch=False)
    assert not (tmp_path / "nonfinite").exists()
