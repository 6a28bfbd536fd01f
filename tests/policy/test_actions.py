"""The action codec against OpenVLA's arithmetic, the gripper's two conventions, and the categorical policy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.policy import actions
from wovr_jax.policy.actions import Codec

PLAIN = Codec(gripper=-1, mask=(False,) * 7)


def reference_encode(x):
    """OpenVLA in numpy: id = vocab - digitize(clip(x)), here minus the first action id (vocab - 256)."""
    return 256 - np.digitize(np.clip(x, -1.0, 1.0), np.linspace(-1.0, 1.0, 256))


def reference_decode(token):
    """OpenVLA in numpy: centres[clip(vocab - id - 1, 0, 254)]."""
    edges = np.linspace(-1.0, 1.0, 256)
    centre = (edges[:-1] + edges[1:]) / 2.0
    return centre[np.clip(256 - token - 1, 0, 254)]


def test_bins_equal_openvla():
    x = np.random.default_rng(0).uniform(-1.2, 1.2, (500, 7)).astype(np.float32)
    np.testing.assert_array_equal(PLAIN.encode(jnp.asarray(x)), reference_encode(x))
    token = np.arange(7 * 256).reshape(-1, 7) % 256
    np.testing.assert_allclose(PLAIN.decode(jnp.asarray(token)), reference_decode(token), atol=1e-6)


def test_index_zero_is_the_largest_action():
    ends = jnp.array([[1.0, -1.0, 0.0, 0.5, -0.5, 2.0, -2.0]])
    token = PLAIN.encode(ends)
    np.testing.assert_array_equal(token, [[0, 255, 128, 64, 192, 0, 255]])
    # 256 edges have 255 centres: tokens 0 and 1 are one action.
    pair = PLAIN.decode(jnp.array([[0, 1, 2, 255, 254, 0, 1]]))[0]
    assert pair[0] == pair[1] == pytest.approx(254 / 255)
    assert pair[2] == pytest.approx(252 / 255) and pair[3] == pytest.approx(-254 / 255)


def test_round_trip_stays_within_half_a_bin():
    x = jnp.linspace(-1.0, 1.0, 7 * 31).reshape(-1, 7)
    assert jnp.abs(PLAIN.decode(PLAIN.encode(x)) - x).max() <= 1 / 255 + 1e-6
    token = jnp.arange(1, 253).reshape(-1, 7)
    np.testing.assert_array_equal(PLAIN.encode(PLAIN.decode(token)), token)


def test_statistics_stretch_and_the_mask_spares():
    codec = Codec(q01=(-2.0, 0.0, -1.0), q99=(2.0, 0.5, 1.0), mask=(True, True, False), gripper=-1)
    x = codec.normalise(jnp.array([2.0, 0.25, 0.3]))
    np.testing.assert_allclose(x, [1.0, 0.0, 0.3], atol=1e-6)
    np.testing.assert_allclose(codec.unnormalise(x), [2.0, 0.25, 0.3], atol=1e-6)


def test_gripper_conventions():
    # Environment -1 open, +1 closed; the network sees 1 open, 0 closed.
    codec = Codec()
    action = jnp.array([[0.0] * 6 + [-1.0], [0.0] * 6 + [1.0]])
    np.testing.assert_allclose(codec.normalise(action)[:, 6], [1.0, 0.0])
    token = codec.encode(action)
    np.testing.assert_array_equal(token[:, 6], [0, 128])
    np.testing.assert_array_equal(codec.decode(token)[:, 6], [-1.0, 1.0])
    everything = codec.decode(jnp.tile(jnp.arange(256)[:, None], (1, 7)))[:, 6]
    assert set(np.unique(everything)) == {-1.0, 1.0}
    assert (np.diff(np.asarray(everything)) >= 0).all() and everything[0] == -1.0


def test_statistics_file():
    codec = Codec.from_statistics({"q01": [-0.5] * 7, "q99": [0.5] * 7, "mask": [True] * 6 + [False]})
    assert codec.gripper == 6 and codec.mask[6] is False
    assert Codec.from_statistics({"q01": [-0.5] * 7, "q99": [0.5] * 7}).mask == (True,) * 7


def test_wrong_action_dimension_is_named():
    with pytest.raises(AssertionError, match="dimensions of the statistics"):
        Codec().encode(jnp.zeros((2, 8, 6)))
    with pytest.raises(ValueError, match="one length"):
        Codec(q01=(0.0,), q99=(1.0, 1.0))
    with pytest.raises(AssertionError, match="256"):
        actions.sample(jnp.zeros((1, 8, 7, 255)), jax.random.split(jax.random.key(0), 1))


def keys(batch):
    return jax.vmap(lambda b: jax.random.fold_in(jax.random.key(0), b))(jnp.arange(batch))


def test_rows_do_not_depend_on_the_batch():
    logits = jax.random.normal(jax.random.key(1), (3, 8, 7, 256))
    whole = actions.sample(logits, keys(3))
    np.testing.assert_array_equal(whole[1:2], actions.sample(logits[1:2], keys(3)[1:2]))


def test_slots_are_independent_draws():
    token = actions.sample(jnp.zeros((64, 8, 7, 256)), keys(64))
    assert len(np.unique(token)) > 200
    assert (token[:, 0] != token[:, 1]).mean() > 0.9


def test_log_prob_and_entropy_by_hand():
    # Two ids share the mass 3:1 at temperature 1; at temperature 2 the odds are sqrt(3):1.
    logits = jnp.full((1, 1, 1, 256), -1e9).at[..., 5].set(jnp.log(3.0)).at[..., 9].set(0.0)
    token = jnp.array([[[5]]])
    assert actions.log_prob(logits, token)[0, 0, 0] == pytest.approx(np.log(0.75), abs=1e-6)
    p = np.sqrt(3.0) / (np.sqrt(3.0) + 1.0)
    assert actions.log_prob(logits, token, 2.0)[0, 0, 0] == pytest.approx(np.log(p), abs=1e-6)
    assert actions.entropy(logits)[0, 0, 0] == pytest.approx(-0.75 * np.log(0.75) - 0.25 * np.log(0.25), abs=1e-6)
    assert actions.entropy(jnp.zeros((1, 1, 1, 256)))[0, 0, 0] == pytest.approx(np.log(256.0), abs=1e-5)
    assert actions.greedy(logits)[0, 0, 0] == 5


def test_everything_is_float32():
    logits = jnp.zeros((1, 8, 7, 256), jnp.bfloat16)
    assert actions.log_prob(logits, jnp.zeros((1, 8, 7), jnp.int32)).dtype == jnp.float32
    assert actions.entropy(logits).dtype == jnp.float32
