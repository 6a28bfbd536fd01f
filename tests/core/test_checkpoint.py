"""Saved trees come back exactly; a save that dies leaves a checkpoint; misfits are named."""

from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.compiles import count_compiles
from wovr_jax.core import checkpoint
from wovr_jax.core.checkpoint import CheckpointError


def tree():
    params = {"block": {"kernel": jnp.arange(12.0).reshape(3, 4), "bias": jnp.ones(4, jnp.bfloat16)}}
    optimizer = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), 2)
    return {
        "params": params,
        "optimizer": optimizer.init(params),
        "key": jax.random.key(3),
        "step": jnp.int32(7),
        "host": np.arange(3, dtype=np.int64),
        "rate": 0.25,
    }


def same(a, b) -> bool:
    def plain(leaf):
        is_key = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        plain(x).dtype == plain(y).dtype and np.array_equal(plain(x), plain(y)) for x, y in pairs
    )


def test_round_trip(tmp_path):
    saved = tree()
    checkpoint.save(tmp_path / "a" / "b", saved, {"epoch": 3})
    assert checkpoint.exists(tmp_path / "a" / "b")
    assert checkpoint.meta(tmp_path / "a" / "b") == {"epoch": 3}
    restored = checkpoint.restore(tmp_path / "a" / "b", saved)
    assert same(restored, saved)
    assert restored["host"].dtype == np.int64  # would become int32 on the device


def test_restores_into_shapes(tmp_path):
    saved = {"params": tree()["params"], "key": jax.random.key(1)}
    checkpoint.save(tmp_path / "c", saved)
    assert same(checkpoint.restore(tmp_path / "c", jax.eval_shape(lambda: saved)), saved)


@pytest.mark.parametrize("saved", [jnp.arange(3.0), {}, (jnp.ones(2), {"a": None})], ids=["array", "empty", "tuple"])
def test_any_tree(tmp_path, saved):
    checkpoint.save(tmp_path / "c", saved)
    assert same(checkpoint.restore(tmp_path / "c", saved), saved)


def test_second_save_replaces_the_first(tmp_path):
    checkpoint.save(tmp_path / "c", {"x": jnp.zeros(2)})
    checkpoint.save(tmp_path / "c", {"x": jnp.ones(2)})
    assert checkpoint.restore(tmp_path / "c", {"x": jnp.zeros(2)})["x"].tolist() == [1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize(
    "died", ["while writing", "before the old one moved", "between the renames", "before the clean-up"]
)
def test_a_save_that_dies_leaves_a_checkpoint(tmp_path, died):
    like = {"x": jnp.zeros(2)}
    target, new, old = tmp_path / "c", tmp_path / "c.new", tmp_path / "c.old"
    checkpoint.save(target, {"x": jnp.zeros(2)})
    checkpoint.save(tmp_path / "later", {"x": jnp.ones(2)})
    expected = 0.0
    if died == "while writing":
        shutil.copytree(tmp_path / "later", tmp_path / "c.new.orbax-checkpoint-tmp")
    elif died == "before the old one moved":
        shutil.copytree(tmp_path / "later", new)
    elif died == "between the renames":
        shutil.copytree(tmp_path / "later", new)
        target.rename(old)
        expected = 1.0
    else:
        target.rename(old)
        shutil.copytree(tmp_path / "later", target)
        expected = 1.0
    assert checkpoint.exists(target)
    assert checkpoint.restore(target, like)["x"].tolist() == [expected] * 2
    checkpoint.save(target, {"x": jnp.full(2, 5.0)})
    assert checkpoint.restore(target, like)["x"].tolist() == [5, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "later"]


def test_misfits_are_all_named(tmp_path):
    saved = {"a": {"w": jnp.zeros((2, 3))}, "b": jnp.zeros(2), "gone": jnp.zeros(1), "d": jnp.zeros(4)}
    checkpoint.save(tmp_path / "c", saved)
    like = {"a": {"w": jnp.zeros((2, 4))}, "b": jnp.zeros(2, jnp.int32), "added": jnp.zeros(1), "d": jnp.zeros(4)}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.restore(tmp_path / "c", like)
    message = str(caught.value)
    assert str(tmp_path / "c") in message and "4 leaves differ" in message
    assert "a/w: expected float32[2,4], got float32[2,3]" in message
    assert "b: expected int32[2], got float32[2]" in message
    assert "added: expected float32[1], got nothing" in message
    assert "gone: expected nothing, got float32[1]" in message


def test_missing_and_foreign_folders(tmp_path):
    assert not checkpoint.exists(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*c: nothing is there"):
        checkpoint.restore(tmp_path / "c", {})
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("milk")
    assert not checkpoint.exists(tmp_path / "notes")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        checkpoint.restore(tmp_path / "notes", {"x": jnp.zeros(1)})
    with pytest.raises(CheckpointError, match="exists and is not a checkpoint"):
        checkpoint.save(tmp_path / "notes", {"x": jnp.zeros(1)})
    assert (tmp_path / "notes" / "todo.txt").read_text() == "milk"


def test_a_restored_array_is_compiled_for_once(tmp_path):
    # An array tied to a device, where the fresh one was not, would make every program that reads it compile again.
    fresh = {"w": jnp.ones(3), "key": jax.random.key(0)}
    checkpoint.save(tmp_path / "c", fresh)
    # By arrays, or by a description of them.
    back, described = (checkpoint.restore(tmp_path / "c", like) for like in (fresh, jax.eval_shape(lambda: fresh)))
    for tree in (back, described):
        assert [leaf.committed for leaf in jax.tree.leaves(tree)] == [leaf.committed for leaf in jax.tree.leaves(fresh)]

    def once(tree):
        return tree["w"] * 2

    once = jax.jit(once)
    with count_compiles() as compiles:
        once(fresh), once(back), once(described)
    assert compiles["once"] == 1
