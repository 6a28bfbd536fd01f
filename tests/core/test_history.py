"""The checkpoints of a training: which are kept, a broken one passed over, nothing half one step, half another."""

from __future__ import annotations

import errno
import json
import pathlib
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from tests.core.test_sharding import on_devices
from wovr_jax.core import checkpoint, history
from wovr_jax.core.history import CheckpointConfig, History


def state(number: float) -> dict[str, jax.Array]:
    return {"w": jnp.full(3, number)}


def saved(folder: pathlib.Path, steps: dict[int, float], **settings) -> History:
    kept = History(folder, CheckpointConfig(**settings))
    for step, loss in steps.items():
        kept.save(step, state(step), {"step": step, "means": {"loss": loss}})
    kept.wait()
    return kept


def newest(kept: History) -> tuple[list[float], int]:
    """The state and the step that a training goes on from."""
    found = kept.restore(state(0))
    assert found is not None
    return found[0]["w"].tolist(), found[1]["step"]


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept(tmp_path: pathlib.Path) -> None:
    kept = saved(tmp_path, {1: 0.1, 2: 0.2, 3: 0.3}, last=2)
    assert names(tmp_path) == ["00000002", "00000003"]
    assert newest(kept) == ([3, 3, 3], 3)


@pytest.mark.parametrize(("best", "steps"), [("-loss", [2, 4]), ("loss", [3, 4]), ("val_loss", [4])])
def test_and_the_best_by_a_metric(tmp_path: pathlib.Path, best: str, steps: list[int]) -> None:
    assert saved(tmp_path, {1: 0.5, 2: 0.1, 3: 0.9, 4: 0.7}, last=1, best=best).steps() == steps


def test_the_best_of_an_earlier_process_is_known(tmp_path: pathlib.Path) -> None:
    saved(tmp_path, {1: 0.5, 2: 0.1, 3: 0.9}, last=1, best="-loss")
    assert saved(tmp_path, {4: 0.7, 5: 0.2}, last=1, best="-loss").steps() == [2, 5]


def largest(path: pathlib.Path) -> pathlib.Path:
    """The file of arrays."""
    return max((one for one in path.rglob("d/*") if one.is_file()), key=lambda one: one.stat().st_size)


def flip(path: pathlib.Path) -> None:
    data = bytearray(largest(path).read_bytes())
    data[len(data) // 2] ^= 1
    largest(path).write_bytes(bytes(data))


def cut_short(path: pathlib.Path) -> None:
    largest(path).write_bytes(largest(path).read_bytes()[:10])


def spoil_sums(path: pathlib.Path) -> None:
    (path / checkpoint.SUMS.format(0)).write_text("{")


def forge(path: pathlib.Path) -> None:
    (path / checkpoint.META).write_text(json.dumps({"step": 7, "means": {}}))


@pytest.mark.parametrize("damage", [flip, cut_short, spoil_sums, forge])
def test_a_broken_checkpoint_is_reported_and_the_one_before_it_is_used(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], damage
) -> None:
    kept = saved(tmp_path, {1: 0.1, 2: 0.2})
    damage(tmp_path / "00000002" / checkpoint.ITEM)
    assert newest(kept) == ([1, 1, 1], 1)
    said = capsys.readouterr().err
    assert "00000002/default is broken: " in said and "It is now 00000002.broken" in said
    kept.save(2, state(5), {"step": 2, "means": {}})  # the same step comes again, and its name is free
    kept.wait()
    assert newest(kept) == ([5, 5, 5], 2)


def test_when_all_are_broken_the_training_begins_anew(tmp_path: pathlib.Path) -> None:
    kept = saved(tmp_path, {1: 0.1})
    flip(tmp_path / "00000001" / checkpoint.ITEM)
    assert kept.restore(state(0)) is None


def test_what_a_killed_process_left_is_swept(tmp_path: pathlib.Path) -> None:
    saved(tmp_path, {1: 0.1, 2: 0.2})
    (tmp_path / "00000003.orbax-checkpoint-tmp" / "default").mkdir(parents=True)  # died while it wrote
    (tmp_path / "00000001" / checkpoint.ITEM / checkpoint.META).unlink()  # died while it removed
    kept = History(tmp_path, CheckpointConfig())
    assert kept.steps() == [2]
    kept.save(3, state(3), {"step": 3})
    kept.wait()
    assert names(tmp_path) == ["00000002", "00000003"]


@pytest.mark.parametrize("died_at", ["_METADATA", checkpoint.META])
def test_a_checkpoint_that_is_half_removed_is_passed_over(tmp_path: pathlib.Path, died_at: str) -> None:
    saved(tmp_path, {1: 0.1, 2: 0.2, 3: 0.3}, last=3)
    flip(tmp_path / "00000003" / checkpoint.ITEM)
    (tmp_path / "00000002" / checkpoint.ITEM / died_at).unlink()
    assert newest(History(tmp_path, CheckpointConfig())) == ([1, 1, 1], 1)


def test_a_state_that_is_donated_while_it_is_written_is_written_as_it_was(tmp_path: pathlib.Path) -> None:
    """Orbax reads arrays of a CPU where they lie; the next step may be given the very same memory."""
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    tree = {str(i): jnp.zeros((256, 256)) for i in range(40)}
    kept = History(tmp_path, CheckpointConfig())
    kept.save(0, tree, {"means": {}})
    for _ in range(20):
        tree = step(tree)
    kept.wait()
    back = checkpoint.restore(kept.path(0), tree)
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(back))


def test_facts_are_those_of_the_moment_of_saving(tmp_path: pathlib.Path) -> None:
    window = [{"loss": 1.0}]
    kept = History(tmp_path, CheckpointConfig())
    kept.save(1, state(1), {"window": window})
    window.append({"loss": jnp.float32(2.0)})  # the training goes on with its list
    kept.wait()
    assert checkpoint.meta(kept.path(1)) == {"window": [{"loss": 1.0}]}


def test_settings_hold_inside_a_block() -> None:
    with history.use(CheckpointConfig(last=5)):
        assert history.current().last == 5
    assert history.current() == CheckpointConfig()
    with pytest.raises(ValueError, match="last: expected at least 1"):
        CheckpointConfig(last=0)


@pytest.mark.parametrize("fault", ["while it is written", "while it is completed"])
def test_a_full_disk_is_said_and_what_was_saved_before_stays(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    kept = saved(tmp_path, {1: 0.1})
    if fault == "while it is written":
        monkeypatch.setattr(ocp.StandardCheckpointHandler, "async_save", fail)
    else:  # in a thread, behind the training
        monkeypatch.setattr(checkpoint, "_sha256", fail)
    with pytest.raises(checkpoint.CheckpointError, match="00000002 could not be written: the disk is full"):
        kept.save(2, state(2), {"step": 2})
        kept.wait()
    assert names(tmp_path) == ["00000001"]
    monkeypatch.undo()
    assert newest(kept) == ([1, 1, 1], 1)
    kept.save(2, state(2), {"step": 2})
    kept.wait()
    assert newest(kept) == ([2, 2, 2], 2)


# --- what earlier versions wrote ------------------------------------------------------------


@pytest.fixture
def before(tmp_path: pathlib.Path) -> pathlib.Path:
    """A product and the states of steps 1 and 2 of a training, as they were written before Orbax kept the steps.

    Arrays were cut over two devices.
    """
    with tarfile.open(pathlib.Path(__file__).with_name("written_before.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def earlier(step: int) -> dict:
    params = {"kernel": jnp.arange(32.0).reshape(8, 4) + step, "bias": jnp.full(4, step, jnp.bfloat16)}
    key, optimizer = jax.random.key(step), optax.adam(1e-3).init(params)
    return {"params": params, "opt": optimizer, "key": key, "step": jnp.int32(step)}


def assert_same(tree: dict, other: dict) -> None:
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for mine, theirs in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert mine.dtype == theirs.dtype and bool((mine == theirs).all())


def test_a_product_of_an_earlier_version_opens(before: pathlib.Path) -> None:
    params = earlier(5)["params"]
    assert checkpoint.exists(before / "policy") and checkpoint.meta(before / "policy") == {"epoch": 3}
    assert_same(checkpoint.restore(before / "policy", params), params)
    np.testing.assert_array_equal(checkpoint.load(before / "policy")["kernel"], params["kernel"])


def test_a_product_of_an_earlier_version_is_cut_over_other_devices(before: pathlib.Path) -> None:
    assert on_devices(4, "core/product_of_before.py", str(before / "policy")) == "(2, 4) 656.0"


def test_a_training_of_an_earlier_version_goes_on(before: pathlib.Path) -> None:
    kept = History(before / "fit", CheckpointConfig())
    assert kept.steps() == [1, 2]
    result = kept.restore(earlier(0))
    assert result is not None and result[1]["step"] == 2
    assert_same(result[0], earlier(2))
    kept.save(3, earlier(3), {"step": 3})
    kept.wait()
    assert kept.steps() == [2, 3]


def test_a_broken_state_of_an_earlier_version_is_passed_over(before: pathlib.Path) -> None:
    flip(before / "fit" / "00000002")
    result = History(before / "fit", CheckpointConfig()).restore(earlier(0))
    assert result is not None and result[1]["step"] == 1
    assert_same(result[0], earlier(1))


def test_a_rename_of_an_earlier_version_that_was_cut_off_is_finished(before: pathlib.Path) -> None:
    (before / "fit" / "00000002").rename(before / "fit" / "00000002.new")
    assert History(before / "fit", CheckpointConfig()).steps() == [1, 2]
    assert names(before / "fit") == ["00000001", "00000002"]
