"""The checkpoints of a training: which are kept, a broken one passed over, nothing half one step, half another."""

from __future__ import annotations

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.core import checkpoint, history
from wovr_jax.core.history import CheckpointConfig, History


def state(number: float) -> dict[str, jax.Array]:
    return {"w": jnp.full(3, number)}


def filled(folder: pathlib.Path, steps: dict[int, float], **settings) -> History:
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
    kept = filled(tmp_path, {1: 0.1, 2: 0.2, 3: 0.3}, last=2)
    assert names(tmp_path) == ["00000002", "00000003"]
    assert newest(kept) == ([3, 3, 3], 3)


@pytest.mark.parametrize(("best", "steps"), [("-loss", [2, 4]), ("loss", [3, 4]), ("val_loss", [4])])
def test_and_the_best_by_a_metric(tmp_path: pathlib.Path, best: str, steps: list[int]) -> None:
    assert filled(tmp_path, {1: 0.5, 2: 0.1, 3: 0.9, 4: 0.7}, last=1, best=best).steps() == steps


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
    kept = filled(tmp_path, {1: 0.1, 2: 0.2})
    damage(tmp_path / "00000002")
    assert newest(kept) == ([1, 1, 1], 1)
    said = capsys.readouterr().err
    assert "00000002 is broken: " in said and "It is now 00000002.broken" in said
    kept.save(2, state(5), {"step": 2, "means": {}})  # the same step comes again, and its name is free
    kept.wait()
    assert newest(kept) == ([5, 5, 5], 2)


def test_when_all_are_broken_the_training_begins_anew(tmp_path: pathlib.Path) -> None:
    kept = filled(tmp_path, {1: 0.1})
    flip(tmp_path / "00000001")
    assert kept.restore(state(0)) is None


def test_what_a_killed_process_left_is_swept_or_finished(tmp_path: pathlib.Path) -> None:
    filled(tmp_path, {1: 0.1, 2: 0.2})
    (tmp_path / "00000003.new.orbax-checkpoint-tmp-7").mkdir()  # died while it wrote
    (tmp_path / "00000002").rename(tmp_path / "00000002.new")  # died before the last rename
    assert History(tmp_path, CheckpointConfig()).steps() == [1, 2]
    assert names(tmp_path) == ["00000001", "00000002"]


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


def test_a_fault_in_the_writing_thread_reaches_the_training(tmp_path: pathlib.Path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise checkpoint.CheckpointError("no")

    kept = History(tmp_path, CheckpointConfig())
    monkeypatch.setattr(checkpoint, "begin", lambda *_: functools.partial(fail))
    kept.save(1, state(1), {})
    with pytest.raises(checkpoint.CheckpointError, match="no"):
        kept.wait()
