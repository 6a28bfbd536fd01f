"""The engine of weight tables: both directions, every kind of misfit at once, one leaf in memory at a time."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.weights.plan import KeymapError, plan_export, plan_import
from wovr_jax.weights.safetensors import Fact
from wovr_jax.weights.table import Row, Table
from wovr_jax.weights.transforms import KERNEL, Flattened, Ones

TABLE = Table(
    "the toy format",
    (
        Row("embed.weight", "embed/kernel", Flattened((2, 1, 3))),
        Row("layer.<i>.lin.weight", "stack/kernel", KERNEL),
        Row("layer.<i>.lin.bias", "stack/bias"),
        Row("layer.<i>.table", "stack/table", Ones(before=1)),
        Row("down.<d>.conv.weight", "down/<d>/kernel", KERNEL),
        Row("down.<d>.gamma", "down/<d>/gamma", Ones(after=3)),
    ),
    dropped={"text.*": "no text here"},
    fresh={"new/*": "the file has none"},
    aside={"counter": 7},
)
OURS = {
    "embed/kernel": (6, 4),
    "stack/kernel": (3, 4, 5),
    "stack/bias": (3, 5),
    "stack/table": (3, 2, 4),
    "down/0/kernel": (3, 1, 1, 4, 5),
    "down/1/kernel": (3, 3, 5, 2),
    "down/0/gamma": (4,),
    "new/kernel": (2, 2),
}


def tensors(dtype="float32"):
    """Their side, every value different."""
    shapes = {"embed.weight": (4, 2, 1, 3), "down.0.conv.weight": (5, 4, 3, 1, 1), "down.1.conv.weight": (2, 5, 3, 3)}
    shapes |= {"down.0.gamma": (4, 1, 1, 1), "text.0.weight": (9,)}
    for i in range(3):
        shapes |= {f"layer.{i}.lin.weight": (5, 4), f"layer.{i}.lin.bias": (5,), f"layer.{i}.table": (1, 2, 4)}
    rng = np.random.default_rng(0)
    found = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    return found | {"counter": np.array(41)}


def facts(arrays):
    return {name: Fact(array.shape, array.dtype) for name, array in arrays.items()}


@pytest.mark.parametrize("dtype", ["float32", "float16", jnp.bfloat16])
def test_both_directions_change_no_bit(dtype):
    theirs = tensors(dtype)
    forth = plan_import("toy.pt", TABLE, facts(theirs), OURS)
    leaves = dict(forth.leaves(theirs.__getitem__))
    assert {path: leaf.shape for path, leaf in leaves.items()} == {k: v for k, v in OURS.items() if k != "new/kernel"}
    assert forth.fresh == {"new/kernel": "the file has none"} and forth.dropped == {"text.0.weight": "no text here"}

    back = plan_export("ours", TABLE, facts(leaves))
    written = dict(back.tensors(leaves.__getitem__, {"counter": 41}))
    assert set(written) == set(theirs) - {"text.0.weight"} and facts(written) == back.tensor
    for name, array in written.items():
        assert array.tobytes() == theirs[name].tobytes() and array.dtype == theirs[name].dtype


def test_layouts_by_hand():
    theirs = tensors()
    leaves = dict(plan_import("toy.pt", TABLE, facts(theirs), OURS).leaves(theirs.__getitem__))
    # linear: kernel[in, out] = weight[out, in]; layers in order
    assert leaves["stack/kernel"][2, 1, 3] == theirs["layer.2.lin.weight"][3, 1]
    # convolution: kernel[time, row, column, in, out] = weight[out, in, time, row, column]
    assert leaves["down/0/kernel"][2, 0, 0, 3, 1] == theirs["down.0.conv.weight"][1, 3, 2, 0, 0]
    assert leaves["down/1/kernel"][2, 1, 4, 0] == theirs["down.1.conv.weight"][0, 4, 2, 1]
    # patches: the row of the matrix is (channel, row, column) with the column fastest
    assert leaves["embed/kernel"][1 * 3 + 2, 3] == theirs["embed.weight"][3, 1, 0, 2]


def test_all_problems_at_once():
    theirs = tensors()
    del theirs["layer.1.lin.bias"], theirs["counter"]
    theirs["surprise"] = np.zeros(3, np.float32)
    theirs["layer.0.lin.weight"] = theirs["layer.0.lin.weight"].T
    theirs["down.0.gamma"] = np.zeros((4, 1, 1), np.float32)
    theirs["layer.2.table"] = theirs["layer.2.table"].astype(np.float64)
    theirs["embed.weight"] = theirs["embed.weight"].astype(np.int8)
    with pytest.raises(KeymapError) as caught:
        plan_import("toy.pt", TABLE, facts(theirs), OURS | {"orphan": (1,)}, doubled=["down.1.conv.weight"])
    kinds = {kind: len(cases) for kind, cases in caught.value.problems.items()}
    assert kinds == {
        "our leaves without a row": 1,
        "missing in the file": 2,
        "not in the table": 1,
        "more than once in the file": 1,
        "shape": 2,
        "dtype": 2,
    }
    text = str(caught.value)
    assert text.startswith("toy.pt does not fit the toy format: 9 problems; nothing was converted.")
    assert "layer.1.lin.bias [5], for stack/bias[1]" in text
    assert "layer.0.lin.weight: expected [5, 4], got [4, 5]; it is transposed (for stack/kernel[0])" in text
    assert "embed.weight: expected float32, got int8[4,2,1,3]" in text


def test_a_square_kernel_is_never_called_right_by_its_shape_alone():
    """A transposed square passes any shape test: what protects it is that the table, not the file, says the layout."""
    theirs = {"w": np.arange(4.0, dtype=np.float32).reshape(2, 2)}
    table = Table("square", (Row("w", "w", KERNEL),))
    ((_, leaf),) = plan_import("f", table, facts(theirs), {"w": (2, 2)}).leaves(theirs.__getitem__)
    np.testing.assert_array_equal(leaf, theirs["w"].T)


def test_dtypes_of_a_file():
    narrow = tensors(jnp.bfloat16)
    narrow["down.0.gamma"] = narrow["down.0.gamma"].astype(np.float32)  # norms are often kept wide
    assert plan_import("f", TABLE, facts(narrow), OURS).leaf["down/0/gamma"].dtype == np.float32
    narrow["down.1.conv.weight"] = narrow["down.1.conv.weight"].astype(np.float16)
    narrow["layer.0.lin.bias"] = narrow["layer.0.lin.bias"].astype(np.float32)
    with pytest.raises(KeymapError, match="partly bfloat16, partly float32") as caught:
        plan_import("f", TABLE, facts(narrow), OURS)
    assert len(caught.value.problems["dtype"]) == 2
    wide = tensors()
    wide["down.0.gamma"] = wide["down.0.gamma"].astype(np.float16)
    with pytest.raises(KeymapError, match="expected float32, got float16"):
        plan_import("f", TABLE, facts(wide), OURS)


def test_a_table_that_contradicts_itself_is_refused():
    twice = Table("twice", (Row("a", "x"), Row("a", "y"), Row("b", "z"), Row("c", "z")))
    with pytest.raises(KeymapError) as caught:
        plan_import("f", twice, {}, {"x": (1,), "y": (1,), "z": (1,)})
    assert caught.value.problems["wanted by two leaves"] == ["a"]
    assert caught.value.problems["our leaves with two rows"] == ["z [1]"]


def test_an_export_has_a_place_for_everything():
    leaves = {path: Fact(shape, np.dtype(np.float32)) for path, shape in OURS.items()}
    with pytest.raises(KeymapError, match="cannot be written as the toy format: 1 problem;.*") as caught:
        plan_export("ours", TABLE, leaves)
    assert caught.value.problems == {"our leaves without a row": ["new/kernel [2, 2]"]}


def test_one_leaf_and_one_tensor_at_a_time():
    theirs, alive = tensors(), []
    for path, leaf in plan_import("f", TABLE, facts(theirs), OURS).leaves(
        lambda name: alive.append(name) or theirs[name]
    ):
        assert leaf.flags.owndata, path
        # nothing of a later leaf was read before this one was handed out
        assert len(alive) == (3 if path.startswith("stack") else 1)
        alive.clear()


def test_a_leaf_of_several_tensors_one_after_another():
    table = Table("parts", (Row("cls", "prefix", part=(0, 1)), Row("reg", "prefix", part=(1, None))))
    rng = np.random.default_rng(0)
    theirs = {name: rng.standard_normal((1, n, 3)).astype(np.float32) for name, n in (("cls", 1), ("reg", 4))}
    leaves = dict(plan_import("f", table, facts(theirs), {"prefix": (1, 5, 3)}).leaves(theirs.__getitem__))
    np.testing.assert_array_equal(leaves["prefix"], np.concatenate([theirs["cls"], theirs["reg"]], axis=1))
    back = dict(plan_export("ours", table, facts(leaves)).tensors(leaves.__getitem__))
    assert all(np.array_equal(back[name], theirs[name]) for name in theirs) and len(back) == 2
    with pytest.raises(KeymapError, match=r"reg: expected \[1, 5, 3\], got \[1, 4, 3\] \(for prefix\[:,1:6\]\)"):
        plan_import("f", table, facts(theirs), {"prefix": (1, 6, 3)})


@pytest.mark.parametrize("parts", [((0, 1), (2, None)), ((0, 1), (1, 4)), ((1, None), (0, 1)), ((0, None), None)])
def test_parts_that_do_not_fill_the_leaf_are_no_row(parts):
    table = Table("parts", tuple(Row(name, "x", part=part) for name, part in zip("ab", parts)))
    theirs = {name: Fact((1, 2, 3), np.dtype(np.float32)) for name in "ab"}
    with pytest.raises(KeymapError, match="our leaves with two rows"):
        plan_import("f", table, theirs, {"x": (1, 5, 3)})


def test_tensors_that_are_kept_must_be_there_both_ways():
    table = Table("kept", (Row("a", "x"),), kept={"b": (2,), "c": (3,)})
    theirs = {name: Fact((n,), np.dtype(np.float32)) for name, n in (("a", 1), ("b", 2), ("c", 3))}
    forth = plan_import("f", table, theirs, {"x": (1,)})
    assert set(forth.kept) == {"b", "c"} and set(forth.tensor) == {"a"}
    with pytest.raises(KeymapError, match=r"c: expected \[3\] of .*, got float32\[4\]"):
        plan_import("f", table, theirs | {"c": Fact((4,), np.dtype(np.float32))}, {"x": (1,)})
    with pytest.raises(KeymapError, match="missing in the file"):
        plan_import("f", table, {"a": theirs["a"], "b": theirs["b"]}, {"x": (1,)})
    assert plan_export("ours", table, forth.leaf, forth.kept).kept == forth.kept
    with pytest.raises(KeymapError, match="2 problems") as caught:
        plan_export("ours", table, forth.leaf, {"b": theirs["b"], "d": theirs["c"]})
    assert set(caught.value.problems) == {"kept tensors that are missing", "kept tensors that are not in the table"}


def test_a_leaf_whose_layout_cannot_be_is_said_on_import_too():
    table = Table("matrix", (Row("a", "x", Flattened((2, 3))), Row("b", "y")))
    with pytest.raises(KeymapError, match="a matrix with 6 rows was meant"):
        plan_import("f", table, {"b": Fact((1,), np.dtype(np.float32))}, {"x": (5, 4), "y": (1,)})
