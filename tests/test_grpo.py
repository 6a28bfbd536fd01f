"""GRPO by hand. Every expected number is derived beside it, with the number a known bug would give."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.surrogate import surrogate
from wovr_jax import grpo
from wovr_jax.grpo import GRPOConfig

ASYMMETRIC = GRPOConfig(clip_low=0.2, clip_high=0.28)


def flags(*rows: str) -> jax.Array:
    """``"00|01"`` -> one trajectory of two chunks of two steps."""
    return jnp.array([[[c == "1" for c in chunk] for chunk in row.split("|")] for row in rows])


def shown(mask_BNT: jax.Array) -> list[str]:
    return ["|".join("".join("1" if step else "0" for step in chunk) for chunk in row) for row in np.asarray(mask_BNT)]


# ------------------------------------------------------------------ mask


def test_step_mask_includes_the_success_and_nothing_after_it():
    success_BNT = flags("000|010|111", "000|000|000", "100|000|000", "000|000|001")
    # Masking from the success on (excluding it) would give "111|100|000", "111|111|111", "000|000|000", ...:
    # the deciding action would get no gradient, and 1/T would divide by zero in row 2.
    # No mask at all would keep the whole of row 0, and its hallucinated tail.
    assert shown(grpo.valid_mask(success_BNT)) == ["111|110|000", "111|111|111", "100|000|000", "111|111|111"]


def test_chunk_mask_includes_the_whole_success_chunk():
    success_BNT = flags("000|010|111", "000|000|000", "100|000|000", "000|000|001")
    # The step mask would end row 0 at "111|110|000"; cutting at the start of the success chunk gives "111|000|000".
    expected = ["111|111|000", "111|111|111", "111|000|000", "111|111|111"]
    assert shown(grpo.valid_mask(success_BNT, "chunk")) == expected


def test_masks_against_a_loop():
    rng = np.random.default_rng(0)
    success_BNT = rng.random((20, 3, 4)) < 0.1
    for b, row in enumerate(success_BNT.reshape(20, 12)):
        first = int(row.argmax()) if row.any() else 11
        assert np.asarray(grpo.valid_mask(success_BNT))[b].sum() == first + 1
        assert np.asarray(grpo.valid_mask(success_BNT, "chunk"))[b].sum() == (first // 4 + 1) * 4


# ------------------------------------------------------------------ returns


def test_return_is_one_success_however_long_it_stays():
    success_BNT = flags("00|11", "00|00", "10|11")
    # Summing the flags over the whole rollout would give 2, 0, 3.
    np.testing.assert_array_equal(grpo.returns(success_BNT), [1.0, 0.0, 1.0])
    # gamma 0.5: first success at t = 2 and t = 0 -> 0.25 and 1. Counting t from 1 would give 0.125 and 0.5.
    np.testing.assert_array_equal(grpo.returns(success_BNT, gamma=0.5), [0.25, 0.0, 1.0])


def test_flicker_can_take_a_success_back():
    success_BNT = flags("00|01", "00|10", "10|00", "00|11", "10|11")
    # Differences: row 1 gives +5 then -5 in its success chunk, row 2 likewise: return 0 although it succeeded.
    np.testing.assert_array_equal(grpo.returns(success_BNT, coef=5.0, flicker=True), [5.0, 0.0, 0.0, 5.0, 0.0])
    # Without the option any success is worth 5. A port that keeps the flicker by accident gives [5, 0, 0, 5, 0].
    np.testing.assert_array_equal(grpo.returns(success_BNT, coef=5.0), [5.0] * 5)


def test_flicker_carries_the_flag_between_chunks():
    # The mask ends with chunk 0, and the flag carried into chunk 1 would add nothing either.
    # Differences that start again in each chunk, without a mask, would pay twice: 10.
    np.testing.assert_array_equal(grpo.returns(flags("01|11"), coef=5.0, flicker=True), [5.0])


# ------------------------------------------------------------------ advantages


def test_advantage_by_hand():
    return_B = jnp.array([5.0, 0.0, 0.0, 0.0])
    # mean 1.25: 3.75 and -1.25
    np.testing.assert_allclose(grpo.advantages(return_B, 4), [3.75, -1.25, -1.25, -1.25])
    # ddof 1: sqrt((3.75^2 + 3 * 1.25^2) / 3) = sqrt(18.75 / 3) = 2.5 -> 1.5 and -0.5.
    # ddof 0 (numpy's and jax's default) would give sqrt(18.75 / 4) = 2.165 -> 1.732 and -0.577.
    np.testing.assert_allclose(grpo.advantages(return_B, 4, "mean_std", ddof=1), [1.5, -0.5, -0.5, -0.5], rtol=1e-5)
    np.testing.assert_allclose(
        grpo.advantages(return_B, 4, "mean_std", ddof=0), [1.7320508, -0.5773503, -0.5773503, -0.5773503], rtol=1e-5
    )


def test_groups_are_consecutive_rows():
    return_B = jnp.array([1.0, 1.0, 0.0, 1.0])
    # groups (1, 1) and (0, 1). Reshaped the other way (members first) they would be (1, 0) and (1, 1):
    # [0.5, 0, -0.5, 0], crediting rollouts of another start state.
    np.testing.assert_array_equal(grpo.advantages(return_B, 2), [0.0, 0.0, -0.5, 0.5])


def test_equal_returns_give_exactly_zero():
    # 0.9**t returns: equal numbers whose float32 mean is off by an ulp: divided by eps that is an advantage of -0.029
    return_B = jnp.full((6,), 0.9**7, jnp.float32)
    np.testing.assert_array_equal(grpo.advantages(return_B, 3, "mean_std"), np.zeros(6))


def test_wrong_group_size_is_refused():
    with pytest.raises(ValueError, match="multiple of group=4 trajectories, got 6"):
        grpo.advantages(jnp.zeros(6), 4)


# ------------------------------------------------------------------ filter and weights


def test_filter_drops_groups_that_agree():
    return_B = jnp.array([5.0, 5.0, 5.0, 0.0, 0.0, 0.0])
    # means 5, 2.5, 0; bounds 0.5 and 4.5 leave the middle group
    keep_B = grpo.group_filter(return_B, 2, 0.5, 4.5)
    np.testing.assert_array_equal(keep_B, [False, False, True, True, False, False])
    assert grpo.kept_groups(keep_B, 2) == 1
    assert grpo.kept_groups(grpo.group_filter(jnp.zeros(6), 2, 0.5, 4.5), 2) == 0


def test_weights_by_hand():
    valid_BNT = flags("11|00", "11|11")
    all_B = jnp.ones(2, bool)
    # 1 / (2 rows * T_i): 1/4 for two steps, 1/8 for four.
    # Dividing by the horizon T_max = 4 would give 1/8 everywhere: the short success would count half.
    # Dividing by all valid tokens would give 1/6 everywhere.
    expected = [[[0.25, 0.25], [0.0, 0.0]], [[0.125, 0.125], [0.125, 0.125]]]
    np.testing.assert_array_equal(grpo.weights(valid_BNT, all_B, GRPOConfig(length="valid")), expected)
    horizon = grpo.weights(valid_BNT, all_B, GRPOConfig(length="horizon"))
    np.testing.assert_array_equal(horizon, np.where(valid_BNT, 0.125, 0.0))


def test_filtered_rows_stay_in_the_denominator():
    valid_BNT, keep_B = flags("11|00", "11|11", "11|11", "11|11"), jnp.array([True, True, False, False])
    rlinf = grpo.weights(valid_BNT, keep_B, GRPOConfig(denominator="all"))
    # 4 rows: 1 / (4 * 2) and 1 / (4 * 4). Removing the filtered rows would double every weight (the "kept" option).
    np.testing.assert_array_equal(rlinf[:, 0, 0], [0.125, 0.0625, 0.0, 0.0])
    kept = grpo.weights(valid_BNT, keep_B, GRPOConfig(denominator="kept"))
    np.testing.assert_array_equal(kept, 2 * rlinf)
    nothing = grpo.weights(valid_BNT, jnp.zeros(4, bool), GRPOConfig(denominator="kept"))
    np.testing.assert_array_equal(nothing, np.zeros((4, 2, 2)))


def test_rlinf_length_ratio_is_the_papers_normaliser():
    """Their formula as written: mean over all places of loss / (T_i / T_max) * mask."""
    rng = np.random.default_rng(1)
    success_BNT = jnp.asarray(rng.random((6, 3, 4)) < 0.1)
    loss_BNT = rng.normal(size=(6, 3, 4)).astype(np.float32)
    valid_BNT = np.asarray(grpo.valid_mask(success_BNT, "chunk"))
    ratio_B11 = (valid_BNT.sum((1, 2)) / 12.0)[:, None, None]
    literal = np.mean(loss_BNT / ratio_B11 * valid_BNT)
    for length in ("ratio", "valid"):
        weight_BNT = grpo.weights(jnp.asarray(valid_BNT), jnp.ones(6, bool), GRPOConfig(length=length))
        np.testing.assert_allclose(np.sum(weight_BNT * loss_BNT), literal, rtol=1e-5)
    # A budget of 24 steps of which 12 are rolled out doubles their loss and not the paper's.
    weight_BNT = grpo.weights(jnp.asarray(valid_BNT), jnp.ones(6, bool), GRPOConfig(length="ratio", horizon=24))
    np.testing.assert_allclose(np.sum(weight_BNT * loss_BNT), 2 * literal, rtol=1e-5)


# ------------------------------------------------------------------ clipping


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "is_clipped"),
    [
        (1.5, 2.0, 2.56, True),  # rise stopped at 1.28 * 2; a symmetric clip gives 2.4
        (0.5, 2.0, 1.0, False),  # the way back is free; max instead of min gives 1.6
        (0.5, -2.0, -1.6, True),  # fall stopped at 0.8 * -2; clipped on the wrong side it stays -1.0
        (1.5, -2.0, -3.0, False),  # a bad action that rose is pushed down in full; the wrong side gives -2.56
        (1.1, 2.0, 2.2, False),
        (0.9, -2.0, -1.8, False),
    ],
)
def test_asymmetric_clip(ratio, advantage, objective, is_clipped):
    value, is_bound = grpo.clip_objective(jnp.float32(ratio), jnp.float32(advantage), ASYMMETRIC)
    np.testing.assert_allclose(value, objective, rtol=1e-6)
    assert bool(is_bound) == is_clipped


def test_no_gradient_where_clipped():
    slope = jax.grad(lambda ratio, advantage: grpo.clip_objective(ratio, advantage, ASYMMETRIC)[0])
    # A > 0: flat above 1.28. A < 0: flat below 0.8, slope A above. The wrong side would swap the last two.
    assert [float(slope(r, a)) for r, a in [(1.5, 2.0), (0.5, 2.0), (0.5, -2.0), (1.5, -2.0)]] == [0.0, 2.0, 0.0, -2.0]


def test_dual_clip_bounds_only_negative_advantages():
    cfg = dataclasses.replace(ASYMMETRIC, dual_clip=3.0)
    ratio, advantage = jnp.array([10.0, 10.0, 2.0, 0.5]), jnp.array([-2.0, 2.0, -2.0, -2.0])
    # A < 0, r = 10: objective -20 becomes 3 * -2 = -6. A > 0: 1.28 * 2, untouched; applied to both signs
    # with max(., c A) it would be 6. r = 2: -4 is above -6, untouched. r = 0.5: the lower clip, -1.6.
    np.testing.assert_allclose(grpo.clip_objective(ratio, advantage, cfg)[0], [-6.0, 2.56, -4.0, -1.6], rtol=1e-6)
    np.testing.assert_allclose(grpo.clip_objective(ratio, advantage, ASYMMETRIC)[0][0], -20.0, rtol=1e-6)


# ------------------------------------------------------------------ surrogate


def test_surrogate_by_hand():
    """Two rollouts of two chunks of one step, one action dimension."""
    success_BNT = flags("1|0", "0|0")
    ratio_BNT = np.array([[[1.5], [0.5]], [[0.5], [1.1]]], np.float32)
    logp_BNTA = jnp.log(ratio_BNT)[..., None]
    # returns 1, 0; advantages 0.5, -0.5; T = 1, 2
    # row 0: min(0.75, 0.64) = 0.64;  its second step comes after the success and is masked
    # row 1: (min(-0.25, -0.4) + min(-0.55, -0.55)) / 2 = (-0.4 - 0.55) / 2 = -0.475
    # loss = -(0.64 - 0.475) / 2 = -0.0825
    # without the mask row 0 is (0.64 + 0.25) / 2 = 0.445: 0.015; divided by T_max: -(0.64 / 2 - 0.475) / 2 = 0.0775;
    # clipped on the wrong side row 1 is (-0.25 - 0.55) / 2: -0.12
    cfg = GRPOConfig.fake(clip_high=0.28)
    signal = grpo.signal(success_BNT, cfg)
    np.testing.assert_allclose(signal.advantage_B, [0.5, -0.5])
    loss, metrics = surrogate(
        logp_BNTA, jnp.zeros_like(logp_BNTA), signal.advantage_B, signal.valid_BNT, signal.keep_B, cfg
    )
    np.testing.assert_allclose(loss, -0.0825, rtol=1e-5)
    horizon = dataclasses.replace(cfg, length="horizon")
    by_horizon = surrogate(
        logp_BNTA, jnp.zeros_like(logp_BNTA), signal.advantage_B, signal.valid_BNT, signal.keep_B, horizon
    )
    np.testing.assert_allclose(by_horizon[0], 0.0775, rtol=1e-5)
    # three valid tokens: ratios 1.5, 0.5, 1.1, two of them clipped; with the masked one the mean would be 0.9
    np.testing.assert_allclose(metrics["ratio_mean"], 3.1 / 3, rtol=1e-5)
    np.testing.assert_allclose(metrics["ratio_max"], 1.5, rtol=1e-5)
    np.testing.assert_allclose(metrics["clip_fraction"], 2 / 3, rtol=1e-5)
    assert metrics["kept_groups"] == 1


def numpy_surrogate(logp, old, success, cfg):
    """The loss with loops, straight from the formulas."""
    rows, chunks, steps, dims = logp.shape
    flat = success.reshape(rows, -1)
    ends = []
    for row in flat:
        first = int(row.argmax()) if row.any() else chunks * steps - 1
        ends.append(first + 1 if cfg.granularity == "step" else (first // steps + 1) * steps)
    total = []
    for g in range(0, rows, cfg.group):
        value = []
        for i in range(g, g + cfg.group):
            row, first = flat[i], int(flat[i].argmax())
            if cfg.flicker:
                value.append(cfg.coef * float(row[ends[i] - 1]))
            else:
                value.append(cfg.coef * cfg.gamma**first if row.any() else 0.0)
        mean = np.mean(value)
        if cfg.filter and not cfg.filter_low <= mean <= cfg.filter_high:
            total += [0.0] * cfg.group
            continue
        for i, reward in zip(range(g, g + cfg.group), value, strict=True):
            advantage = reward - mean
            if cfg.normalise == "mean_std":
                advantage = advantage / (np.std(value, ddof=cfg.ddof) + cfg.eps) if advantage else 0.0
            loss = 0.0
            for t, a in itertools.product(range(ends[i]), range(dims)):
                n, s = divmod(t, steps)
                ratio = np.exp(logp[i, n, s, a] - old[i, n, s, a])
                bound = min(max(ratio, 1 - cfg.clip_low), 1 + cfg.clip_high)
                objective = min(ratio * advantage, bound * advantage)
                if cfg.dual_clip and advantage < 0:
                    objective = max(objective, cfg.dual_clip * advantage)
                loss -= objective / dims
            total.append(loss / ends[i])
    return np.sum(total) / rows


@pytest.mark.parametrize(
    "cfg",
    [
        GRPOConfig.paper(group=4),
        GRPOConfig.rlinf(group=4),
        GRPOConfig.paper(group=2, gamma=0.9),
        GRPOConfig.rlinf(group=4, dual_clip=1.5),
    ],
    ids=["paper", "rlinf", "discount", "dual"],
)
@pytest.mark.parametrize("jitted", [False, True])
def test_surrogate_equals_loops(cfg, jitted):
    rng = np.random.default_rng(2)
    logp, old = (rng.normal(size=(8, 3, 4, 7)).astype(np.float32) * 0.4 for _ in range(2))
    success = rng.random((8, 3, 4)) < 0.08
    success[4:] = False  # the second group agrees: zero advantage, or filtered

    def run(logp, old, success):
        signal = grpo.signal(success, cfg)
        return surrogate(logp, old, signal.advantage_B, signal.valid_BNT, signal.keep_B, cfg)

    loss, metrics = (jax.jit(run) if jitted else run)(jnp.asarray(logp), jnp.asarray(old), jnp.asarray(success))
    expected = numpy_surrogate(logp, old, success, cfg)
    assert abs(expected) > 1e-3
    np.testing.assert_allclose(loss, expected, rtol=2e-4)
    assert metrics["kept_groups"] == (1 if cfg.filter else 8 // cfg.group)


def test_parts_of_a_batch_add_up():
    rng = np.random.default_rng(3)
    logp, old = (jnp.asarray(rng.normal(size=(6, 4, 7)), jnp.float32) for _ in range(2))
    advantage, weight = jnp.asarray(rng.normal(size=6), jnp.float32), jnp.asarray(rng.random((6, 4)), jnp.float32)
    whole, tally = grpo.chunk_loss(logp, old, advantage, weight, GRPOConfig())
    cuts = [slice(i, i + 2) for i in (0, 2, 4)]
    parts = [grpo.chunk_loss(logp[c], old[c], advantage[c], weight[c], GRPOConfig()) for c in cuts]
    np.testing.assert_allclose(sum(loss for loss, _ in parts), whole, rtol=1e-5)
    added = parts[0][1].add(parts[1][1]).add(parts[2][1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), added, tally)


def test_ratio_levels():
    """log-ratios 0.1 and 0.2 in step 0, 0.3 and 0.4 in step 1 (masked); one chunk, A = 1."""
    logp = jnp.array([[[0.1, 0.2], [0.3, 0.4]]])
    weight = jnp.array([[1.0, 0.0]])

    def run(level, weight):
        cfg = GRPOConfig(ratio=level, clip_high=9.0)
        return float(grpo.chunk_loss(logp, jnp.zeros_like(logp), jnp.ones(1), weight, cfg)[0])

    loss = {level: run(level, weight) for level in ("token", "step", "chunk")}
    # token: mean(e^0.1, e^0.2); step: e^0.3; chunk: also e^0.3, as the masked step stays out (with it: e^1.0 = 2.718)
    np.testing.assert_allclose(loss["token"], -(np.exp(0.1) + np.exp(0.2)) / 2, rtol=1e-5)
    np.testing.assert_allclose(loss["step"], -np.exp(0.3), rtol=1e-5)
    np.testing.assert_allclose(loss["chunk"], -np.exp(0.3), rtol=1e-5)
    np.testing.assert_allclose(run("chunk", jnp.ones((1, 2)) / 2), -np.exp(1.0), rtol=1e-5)


def test_masked_infinities_do_not_reach_the_gradient():
    logp = jnp.array([[[0.0], [-jnp.inf]]])
    weight = jnp.array([[1.0, 0.0]])
    slope = jax.grad(lambda x: grpo.chunk_loss(x, jnp.zeros_like(x), jnp.ones(1), weight, GRPOConfig())[0])(logp)
    np.testing.assert_array_equal(slope, [[[-1.0], [0.0]]])


# ------------------------------------------------------------------ regularisers


def test_categorical_kl_by_hand():
    # p = (1/2, 1/2), q = (1/4, 3/4): 1/2 ln 2 + 1/2 ln 2/3 = 0.14384; the other direction is 0.13081
    p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    np.testing.assert_allclose(grpo.categorical_kl(p, q), 0.5 * np.log(4 / 3), rtol=1e-5)
    np.testing.assert_allclose(grpo.categorical_kl(q, p), 0.1308122, rtol=1e-5)


def test_k3_is_unbiased_and_never_negative():
    log_p, log_q = jnp.log(jnp.array([0.5, 0.3, 0.2])), jnp.log(jnp.array([0.2, 0.3, 0.5]))
    estimate = grpo.k3(log_q - log_p)
    assert (estimate >= 0).all()
    # in expectation over p; the naive estimate log p/q is unbiased too but negative where q > p
    np.testing.assert_allclose(jnp.sum(jnp.exp(log_p) * estimate), grpo.categorical_kl(log_p, log_q), rtol=1e-5)


def test_regularisers_enter_with_the_right_sign():
    zeros = jnp.zeros((2, 1, 1, 1))
    ones = jnp.ones_like(zeros)
    fixed = (jnp.zeros(2), jnp.ones((2, 1, 1), bool), jnp.ones(2, bool))
    cfg = GRPOConfig.fake(kl=0.1, entropy=0.01)
    loss, metrics = surrogate(zeros, zeros, *fixed, cfg, kl_BNTA=2 * ones, entropy_BNTA=3 * ones)
    np.testing.assert_allclose(loss, 0.1 * 2 - 0.01 * 3, rtol=1e-5)
    np.testing.assert_allclose([metrics["kl"], metrics["entropy"]], [2.0, 3.0])
    # k3 of a sample twice as likely under the reference: 2 - 1 - ln 2 = 0.30685
    loss, _ = surrogate(zeros, zeros, *fixed, GRPOConfig.fake(kl=1.0), ref_logp_BNTA=np.log(2.0) * ones)
    np.testing.assert_allclose(loss, 1 - np.log(2.0), rtol=1e-5)
    with pytest.raises(ValueError, match="kl_XTA was not given"):
        surrogate(zeros, zeros, *fixed, GRPOConfig.fake(kl=1.0))


# ------------------------------------------------------------------ deadlines


def test_a_success_after_the_deadline_is_none():
    """Four rollouts of 2 chunks of 3 steps by hand, of which the second and the fourth have 4 steps left."""
    success = flags("011|111", "000|011", "000|011", "001|111")
    live = flags("111|111", "111|100", "111|111", "111|100")
    signal = grpo.signal(success, GRPOConfig(group=2), live)
    assert signal.return_B.tolist() == [1, 0, 1, 1] and signal.advantage_B.tolist() == [0.5, -0.5, 0, 0]
    assert shown(signal.valid_BNT) == ["110|000", "111|100", "111|110", "111|000"]
    # Each rollout weighs a quarter, however short its time was.
    np.testing.assert_allclose(signal.weight_BNT.sum((1, 2)), 0.25, rtol=1e-6)
    np.testing.assert_allclose(signal.weight_BNT[1], [[1 / 16] * 3, [1 / 16, 0, 0]], rtol=1e-6)
    # Without a mask the deadline still ends what counts.
    none = grpo.signal(success, GRPOConfig(group=2, granularity="none"), live).valid_BNT
    np.testing.assert_array_equal(none, live)


def test_a_deadline_does_not_take_a_success_back():
    """RLinf's rewards are differences of the flag: one that is up at the deadline must not fall there."""
    success = flags("000|111", "000|011")
    live = flags("111|100", "111|100")
    signal = grpo.signal(success, GRPOConfig.rlinf(group=2), live)
    assert signal.return_B.tolist() == [5, 0]
    np.testing.assert_array_equal(signal.valid_BNT, live)
    # Both on the same 4 steps: 1 / (4 / 6) / 6 of a half each.
    np.testing.assert_allclose(signal.weight_BNT, jnp.where(live, 1 / 8, 0), rtol=1e-6)


def test_a_start_at_its_deadline_counts_for_nothing():
    success, live = flags("010", "111"), flags("111", "000")
    for cfg in (GRPOConfig(group=2), GRPOConfig.rlinf(group=2), GRPOConfig(group=2, length="horizon")):
        signal = grpo.signal(success, cfg, live)
        assert signal.return_B.tolist() in ([1, 0], [0, 0]) and (signal.weight_BNT[1] == 0).all()
        assert all(np.isfinite(part).all() for part in signal)


# ------------------------------------------------------------------ config


def test_presets():
    paper, rlinf = GRPOConfig.paper(), GRPOConfig.rlinf()
    assert paper == GRPOConfig()  # what is not said is as the paper has it
    assert (paper.normalise, paper.granularity, paper.filter, paper.flicker) == ("mean", "step", False, False)
    assert (rlinf.normalise, rlinf.ddof, rlinf.granularity, rlinf.coef) == ("mean_std", 1, "chunk", 5.0)
    assert (rlinf.clip_low, rlinf.clip_high, rlinf.dual_clip) == (0.2, 0.28, 0.0)
    assert GRPOConfig.rlinf(group=4).group == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalise": "std"}, "GRPOConfig.normalise: expected one of .*mean_std.*got 'std'"),
        ({"group": 1, "normalise": "mean_std"}, "GRPOConfig.group: .*1 rollouts have no deviation"),
        ({"group": 0}, "GRPOConfig.group: expected at least 1, got 0"),
        ({"dual_clip": 0.5}, "GRPOConfig.dual_clip: expected 0 or above 1, got 0.5"),
        ({"filter_low": 2.0}, "GRPOConfig.filter_low: expected at most filter_high=0.9, got 2.0"),
        ({"clip_low": float("nan")}, "GRPOConfig.clip_low: expected at least 0 and at most 1, got nan"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**changes)
