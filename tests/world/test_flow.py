"""The schedule by its published numbers, the weight by hand, the sampler against diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.world.flow import FlowConfig, add_noise, draw_levels, euler, sigmas, times, training_levels, weight


@pytest.mark.parametrize(
    "steps, want",
    [
        (5, [1, 0.952381, 0.882353, 0.769231, 0.555556, 0]),
        (4, [1, 0.9375, 0.833333, 0.625, 0]),
        (3, [1, 0.909091, 0.714286, 0]),
        (1, [1, 0]),
    ],
)
def test_sampler_levels(steps, want):
    # Shifting twice, as some schedulers do by default, would end near 0.024 instead of 0.556.
    np.testing.assert_allclose(sigmas(steps, 5.0), want, atol=1e-6)


def test_deltas_of_five_steps():
    np.testing.assert_allclose(
        np.diff(sigmas(5, 5.0)), [-0.047619, -0.070028, -0.113122, -0.213675, -0.555556], atol=1e-6
    )


@pytest.mark.parametrize("steps", [2, 7, 50])
def test_any_number_of_steps(steps):
    level = sigmas(steps, 5.0)
    assert (level.shape, level[0], level[-1]) == ((steps + 1,), 1.0, 0.0)
    assert level[-2] == pytest.approx(5 / (steps + 4))  # u = 1 / n, shifted
    assert np.all(np.diff(level) < 0)
    np.testing.assert_allclose(sigmas(steps, 1.0), np.linspace(1, 0, steps + 1), atol=1e-6)


def test_times_round_to_bfloat16_in_the_reference_preset():
    level = jnp.asarray(sigmas(5, 5.0)[:-1])
    np.testing.assert_array_equal(times(level, FlowConfig.rlinf()), [1000, 952, 884, 768, 556])
    np.testing.assert_allclose(times(level, FlowConfig()), [1000, 952.381, 882.353, 769.231, 555.556], rtol=1e-6)


@pytest.mark.parametrize("steps, want", [(1, [1000]), (3, [1000, 908, 716]), (4, [1000, 936, 832, 624])])
def test_times_round_when_compiled_too(steps, want):
    cfg = FlowConfig.rlinf(steps=steps)
    told = jax.jit(lambda level: times(level, cfg))(jnp.asarray(sigmas(steps, 5.0)[:-1]))
    np.testing.assert_array_equal(told, want)


def test_training_levels_are_looked_up_by_their_rounded_time():
    exact, table = FlowConfig(), training_levels(FlowConfig())
    rounding = FlowConfig.rlinf()
    drawn, looked_up = (np.asarray(draw_levels(jax.random.key(0), 3000, cfg)) for cfg in (exact, rounding))
    assert np.isin(looked_up, table).all() and np.any(drawn != looked_up)
    # What the network is told does not change by it, and is now nearest to the level it was given.
    np.testing.assert_array_equal(times(jnp.asarray(drawn), rounding), times(jnp.asarray(looked_up), rounding))
    told = np.asarray(times(jnp.asarray(looked_up), rounding))
    nearest = table[np.abs(1000 * table[None] - told[:, None]).argmin(1)]
    np.testing.assert_array_equal(looked_up, nearest)


def test_training_table():
    table = training_levels(FlowConfig())
    assert table.shape == (1000,)
    assert table[0] == 1.0
    np.testing.assert_allclose(table[950], 5 / 24, rtol=1e-5)  # the noise of the memory frames
    assert 1000 * np.median(table) == pytest.approx(833, abs=2)


def test_weight_has_its_published_values_and_mean_one():
    cfg = FlowConfig()
    want = {1000: 0.0, 990: 0.064, 950: 0.318, 900: 0.631, 800: 1.209, 700: 1.671, 600: 1.971, 500: 2.076}
    want |= {300: 1.671, 100: 0.631, 10: 0.064}
    np.testing.assert_allclose(weight(jnp.array(list(want), jnp.float32), cfg), list(want.values()), atol=2e-3)
    at_steps = {952.38: 0.30, 882.35: 0.74, 769.23: 1.36, 555.56: 2.04, 208.33: 1.25, 5.0: 0.03}
    np.testing.assert_allclose(weight(jnp.array(list(at_steps), jnp.float32), cfg), list(at_steps.values()), atol=6e-3)
    table = jnp.asarray(1000.0 * training_levels(cfg))
    np.testing.assert_allclose(weight(table, cfg).mean(), 1.0, rtol=1e-4)


def test_weight_of_one_draw_does_not_depend_on_its_batch():
    # Normalising over the batch instead of the table gives NaN for a batch of one.
    one, two = jnp.array([700.0]), jnp.array([700.0, 300.0])
    assert weight(one, FlowConfig())[0] == weight(two, FlowConfig())[0]


def test_draws_crowd_towards_noise():
    drawn = draw_levels(jax.random.key(0), 4000, FlowConfig())
    assert np.mean(np.asarray(drawn) > 0.8) == pytest.approx(0.556, abs=0.03)


@pytest.mark.parametrize("steps", [1, 3, 5, 8])
def test_euler_finds_the_data_when_the_velocity_is_exact(steps):
    clean, noise, context = jax.random.normal(jax.random.key(1), (3, 2, 2, 3, 3, 4))
    calls = []

    def velocity(window, time):
        calls.append((window.shape, time.shape))
        return jnp.concatenate([jnp.full_like(context, 1e6), noise - clean], axis=1)  # context frames are ignored

    sample = euler(velocity, context, noise, FlowConfig(steps=steps))
    np.testing.assert_allclose(sample, clean, atol=1e-4)
    assert calls[0] == ((2, 4, 3, 3, 4), (2, 4))


def test_context_is_clean_and_at_time_zero_in_every_step():
    context, noise = jax.random.normal(jax.random.key(2), (2, 1, 2, 3, 3, 4))
    cfg = FlowConfig()

    def velocity(window, time):
        intact = jnp.all(window[:, :2] == context) & jnp.all(time[:, :2] == 0.0) & jnp.all(time[:, 2:] > 500.0)
        return jnp.where(intact, 0.0 * window, jnp.nan)

    np.testing.assert_array_equal(euler(velocity, context, noise, cfg), noise)


def test_euler_equals_diffusers():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.6, 0.4, 0.2])
    noise = jax.random.normal(jax.random.key(3), (1, 2, 2, 2, 3))
    want = torch.tensor(np.asarray(noise))
    for time in scheduler.timesteps:
        want = scheduler.step(torch.sin(want) * time / 500, time, want, return_dict=False)[0]

    def velocity(window, time):
        return jnp.sin(window) * time[:, :, None, None, None] / 500.0

    got = euler(velocity, noise[:, :0], noise, FlowConfig())
    np.testing.assert_allclose(got, want.numpy(), atol=1e-5)


def test_noised_ends():
    clean, noise = jnp.ones((1, 2)), jnp.full((1, 2), 3.0)
    np.testing.assert_allclose(add_noise(clean, noise, jnp.array([[0.0, 1.0]])), [[1.0, 3.0]])


def test_refuses_empty_schedules():
    with pytest.raises(ValueError, match="steps: expected at least 1"):
        FlowConfig(steps=0)
