"""Which parameters Muon moves, and how; the schedule's ends."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wovr_jax.train import optimizers

PARAMS = {
    "stack": {"kernel": jnp.zeros((3, 8, 16)), "bias": jnp.zeros((3, 16))},
    "conv": {"kernel": jnp.zeros((3, 3, 4, 8))},
    "modulation": jnp.zeros((6, 8)),
}


def _first_update(name: str) -> dict:
    moves = optimizers.build(name, 1.0, clip=1e9)
    gradient = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), PARAMS)
    return moves.update(gradient, moves.init(PARAMS), PARAMS)[0]


def test_muon_makes_every_layer_of_a_stack_orthogonal_by_itself():
    update = _first_update("muon")["stack"]["kernel"]
    for layer in update:
        found = np.linalg.svd(np.asarray(layer), compute_uv=False)
        # Newton-Schulz leaves singular values near 1, here scaled alike; a gradient's own spread over a factor of 4.
        assert found.max() / found.min() < 2.0
    whole = np.linalg.svd(np.asarray(update).reshape(3 * 8, 16), compute_uv=False)
    assert whole.max() / whole.min() > 2.0  # the wrong reading: one matrix of all layers


def test_muon_reads_a_convolution_as_one_matrix():
    found = np.linalg.svd(np.asarray(_first_update("muon")["conv"]["kernel"]).reshape(36, 8), compute_uv=False)
    assert found.max() / found.min() < 2.0


def test_muon_leaves_the_rest_to_adamw():
    """With Nesterov's momentum, as Muon itself has it."""
    adamw = optax.nadamw(1.0, weight_decay=0.0)
    gradient = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), PARAMS)
    theirs = adamw.update(gradient, adamw.init(PARAMS), PARAMS)[0]
    ours = _first_update("muon")
    np.testing.assert_allclose(ours["stack"]["bias"], theirs["stack"]["bias"], rtol=1e-3)
    np.testing.assert_allclose(ours["modulation"], theirs["modulation"], rtol=1e-3)
    size = float(jnp.sqrt(jnp.mean(jnp.square(ours["stack"]["kernel"]))))
    assert 0.1 < size < 0.4  # 0.2 of the learning rate, give or take Newton-Schulz


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_each_finds_the_minimum_of_a_small_problem(name: str):
    goal = jax.random.normal(jax.random.key(0), (4, 4))
    moves = optimizers.build(name, optimizers.warmup_cosine(0.3, 5, 100), clip=10.0)
    params = {"kernel": jnp.zeros((4, 4))}
    state, error = moves.init(params), lambda p: jnp.square(p["kernel"] - goal).sum()
    for _ in range(100):
        update, state = moves.update(jax.grad(error)(params), state, params)
        params = optax.apply_updates(params, update)
    assert float(error(params)) < 0.05 * float(error({"kernel": jnp.zeros((4, 4))}))


def test_schedule_rises_and_falls():
    rate = optimizers.warmup_cosine(2.0, 10, 100)
    assert [round(float(rate(i)), 3) for i in (0, 10, 100)] == [0.0, 2.0, 0.0]
    assert float(optimizers.warmup_cosine(2.0, 50, 4)(2)) == 2.0  # a short run still reaches its peak


def test_constant_and_ramp_rise_alike_and_only_one_falls():
    constant, ramp, hold = (
        optimizers.warmup_constant(2.0, 4),
        optimizers.ramp_cosine(2.0, 4, 8),
        optimizers.ramp_cosine(2.0, 4),
    )
    np.testing.assert_allclose([constant(i) for i in range(6)], [0.5, 1.0, 1.5, 2.0, 2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose([hold(i) for i in range(6)], [constant(i) for i in range(6)], rtol=1e-6)
    # Times a cosine over all eight steps: 0.854 of the rate at step 2, a half at step 4, nothing at step 8.
    np.testing.assert_allclose([ramp(i) for i in (0, 2, 4, 8, 9)], [0.5, 1.280330, 1.0, 0.0, 0.0], atol=1e-5)
    assert float(optimizers.ramp_cosine(2.0, 0)(0)) == float(optimizers.warmup_constant(2.0, 0)(0)) == 2.0


def test_what_it_does_not_move_has_no_moments_and_does_not_count_in_the_norm():
    params = {"w": jnp.zeros(3), "mean": jnp.zeros(3)}
    gradient = {"w": jnp.array([3.0, 0.0, 4.0]), "mean": jnp.full(3, 1e6)}
    moves = optimizers.build("adamw", 1.0, clip=1.0, moves=lambda path: path[-1].key != "mean")
    update, state = moves.update(gradient, moves.init(params), params)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * 3 + 1  # two moments of w, and the step count
    # The first moment is a tenth of the gradient, clipped to norm 1 by what moves alone.
    np.testing.assert_allclose(optax.tree.get(state, "mu")["w"], [0.06, 0.0, 0.08], rtol=1e-6)
    np.testing.assert_array_equal(update["mean"], gradient["mean"])


def test_a_clip_of_zero_is_off():
    gradient, params = {"w": jnp.array([30.0])}, {"w": jnp.zeros(1)}
    sizes = [
        float(optax.tree.get(moves.update(gradient, moves.init(params), params)[1], "mu")["w"][0])
        for moves in (optimizers.build("adamw", 1.0, clip=clip) for clip in (0.0, 10.0))
    ]
    np.testing.assert_allclose(sizes, [3.0, 1.0], rtol=1e-6)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="expected 'adamw' or 'muon', got 'muno'"):
        optimizers.build("muno", 1e-3, clip=1.0)
