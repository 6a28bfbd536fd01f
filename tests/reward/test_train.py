"""Batches, loss and training of the success classifier, on coloured squares."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.sizes import fake_reward_train
from wovr_jax.reward import calibrate, classifier, train
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.reward.train import RewardObjective, RewardTrainConfig
from wovr_jax.train.step import compile_programs

KEY = jax.random.key(0)


def squares(count, seed=0):
    """Frames with a square of one colour somewhere; success when it has the colour of the task."""
    rng = np.random.default_rng(seed)
    frame = rng.integers(90, 130, (count, 10, 10, 3), dtype=np.uint8)
    task, colour = rng.integers(0, 3, count), rng.integers(0, 3, count)
    for picture, c, (row, column) in zip(frame, colour, rng.integers(0, 6, (count, 2)), strict=True):
        picture[row : row + 4, column : column + 4] = 20
        picture[row : row + 4, column : column + 4, c] = 235
    return frame, colour == task, task.astype(np.int32)


@pytest.fixture(scope="module")
def data():
    frame, label, task = squares(96)
    return train.dataset(frame, label, task, extra_X=np.arange(96) >= 80)


# ------------------------------------------------------------------ batches


def test_pools_are_apart(data):
    label, extra = np.asarray(data.label_X), np.asarray(data.extra_E)
    np.testing.assert_array_equal(extra, np.arange(80, 96))
    assert label[data.positive_P].all() and not label[data.negative_Q].any()
    assert sorted(np.concatenate([data.positive_P, data.negative_Q, extra])) == list(range(96))


def test_batch_keeps_the_shares(data):
    training = fake_reward_train(batch=16, positive=0.25, swap=0.25, extra=0.125)
    assert training.counts == (4, 4, 2, 6)
    frame, label, task = jax.jit(train.draw, static_argnums=0)(training, data, KEY)
    assert frame.shape == (16, 10, 10, 3) and frame.dtype == jnp.float32
    stored, drawn = np.asarray(data.frame_XHWC), np.round((np.asarray(frame) + 1) * 127.5).astype(np.uint8)
    found = np.array([np.flatnonzero((stored == picture).all((1, 2, 3)))[0] for picture in drawn])
    assert np.isin(found[:8], data.positive_P).all()
    assert np.isin(found[8:10], data.extra_E).all()
    assert np.isin(found[10:], data.negative_Q).all()
    # successes stay successes; under another instruction they are failures; extras keep their own label
    np.testing.assert_array_equal(label[:4], True)
    np.testing.assert_array_equal(label[4:8], False)
    np.testing.assert_array_equal(label[8:], np.asarray(data.label_X)[found[8:]])
    own = np.asarray(data.task_X)[found]
    assert (np.asarray(task)[4:8] != own[4:8]).all()
    np.testing.assert_array_equal(np.delete(task, np.s_[4:8]), np.delete(own, np.s_[4:8]))


def test_swapped_tasks_are_the_others_uniformly():
    occurring = jnp.array([1, 4, 9])
    other = np.asarray(train._another(KEY, jnp.full(3000, 4), occurring))
    # never its own task, never one that the data lacks, both others about equally
    assert set(other) == {1, 9}
    assert abs((other == 1).mean() - 0.5) < 0.05


def test_batches_depend_on_the_step_alone(data):
    training = fake_reward_train()
    first = train.draw(training, data, jax.random.fold_in(KEY, 3))
    again = train.draw(training, data, jax.random.fold_in(KEY, 3))
    other = train.draw(training, data, jax.random.fold_in(KEY, 4))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first[0], other[0])


# ------------------------------------------------------------------ loss


def test_cross_entropy_by_hand():
    logit, label = jnp.array([0.0, np.log(3.0)]), jnp.array([True, False])
    # sigmoids 1/2 and 3/4: -(w ln 1/2 + ln 1/4) / 2. The weight on the failure instead would give 2.4260 for w = 3;
    # normalising by the weights 0.8664.
    np.testing.assert_allclose(train.cross_entropy(logit, label), (np.log(2) + np.log(4)) / 2, rtol=1e-6)
    np.testing.assert_allclose(train.cross_entropy(logit, label, 3.0), (3 * np.log(2) + np.log(4)) / 2, rtol=1e-6)
    torch = pytest.importorskip("torch")
    expected = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0))(
        torch.tensor(np.asarray(logit)), torch.tensor([1.0, 0.0])
    )
    np.testing.assert_allclose(train.cross_entropy(logit, label, 3.0), expected.item(), rtol=1e-6)


def test_extreme_logits_stay_finite():
    loss = train.cross_entropy(jnp.array([-200.0, 200.0]), jnp.array([True, False]))
    np.testing.assert_allclose(loss, 200.0)


# ------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def trained(data):
    cfg = RewardConfig.fake(widths=(8, 12), blocks=1, hidden=32, embed=8)
    training = fake_reward_train(batch=32, swap=0.1, positive=0.4, steps=100)
    frame, label, task = squares(300, seed=1)
    start = classifier.network(cfg).init(KEY)
    state, step = train.make(cfg, training, start, train.dataset(frame, label, task), KEY)
    losses = []
    for i in range(100):
        state, metrics = step(state, jnp.int32(i))
        losses.append(float(metrics["loss"]))
    return cfg, training, start, state, losses, step


def test_it_learns_to_tell(trained):
    cfg, _, _, state, losses, _ = trained
    assert np.mean(losses[-10:]) < 0.3 * np.mean(losses[:5])
    frame, label, task = squares(200, seed=2)
    result = calibrate.rates(train.predict(cfg, state.params, frame, task), label, 0.5)
    assert result.tpr > 0.9 and result.fpr < 0.1
    # the instruction matters: under the next task the same frames are failures
    shifted = calibrate.rates(train.predict(cfg, state.params, frame[label], (task[label] + 1) % 3), ~label[label], 0.5)
    assert shifted.fpr < 0.15


def test_statistics_are_averaged_not_trained(trained):
    _, _, start, state, _, _ = trained
    before, after = start["stem_norm"], state.params["stem_norm"]
    assert not np.allclose(before["mean"], after["mean"]) and (np.asarray(after["var"]) > 0).all()
    # the optimizer holds no moments for them
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    leaves = jax.tree_util.tree_flatten_with_path(state.params)[0]
    learned = sum(leaf.size for path, leaf in leaves if not classifier.is_statistic(path))
    assert moments == 2 * learned + 2  # and the two step counts


def test_one_compilation(trained):
    cfg, training, *_ = trained
    assert compile_programs(RewardObjective(cfg, training)).step._cache_size() == 1


def test_resuming_repeats_the_run(data):
    cfg, training = RewardConfig.fake(), fake_reward_train(extra=0.25)
    params = classifier.network(cfg).init(KEY)

    def run(state, begin, end):
        fresh, step = train.make(cfg, training, params, data, KEY)  # made anew, as after a restart
        state = state or fresh
        for i in range(begin, end):
            state, metrics = step(state, jnp.int32(i))
        return state, metrics

    straight, metrics = run(None, 0, 4)
    half, _ = run(None, 0, 2)
    resumed, again = run(jax.tree.map(jnp.copy, half), 2, 4)
    jax.tree.map(np.testing.assert_array_equal, (straight, metrics), (resumed, again))
    assert compile_programs(RewardObjective(cfg, training)).step._cache_size() == 1  # compiled once all the same
    assert np.isfinite(np.asarray(params["out"]["bias"])).all()  # make copied them, so donation did not eat them


def test_predict_in_ragged_batches(trained):
    cfg, _, _, state, _, _ = trained
    frame, _, task = squares(11)
    whole = train.predict(cfg, state.params, frame, task, batch=11)
    np.testing.assert_allclose(train.predict(cfg, state.params, frame, task, batch=4), whole, atol=1e-6)
    assert train.predict(cfg, state.params, frame[:0], task[:0]).shape == (0,)
    scorer = classifier.score(cfg, state.params)
    pixels = jnp.asarray(frame, jnp.float32) / 127.5 - 1
    np.testing.assert_allclose(scorer(pixels[:, None], jnp.asarray(task), None)[:, 0], whole, atol=1e-5)


def test_rate_rises_and_falls():
    training = fake_reward_train(lr=0.1, warmup=2, steps=8, weight_decay=0.0)
    transform = RewardObjective(RewardConfig.fake(), training).optimizer()
    params = {"w": jnp.zeros(())}
    state, sizes = transform.init(params), []
    for _ in range(9):
        update, state = transform.update({"w": jnp.ones(())}, state, params)
        sizes.append(float(-update["w"]))
    # Adam's step under a constant gradient is the rate: half, full times the cosine, ..., 0
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(9) / 8))
    np.testing.assert_allclose(sizes, 0.1 * np.array([0.5, *[1.0] * 8]) * cosine, atol=1e-5)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(("label", "name"), [(0, "success"), (1, "failure")])
def test_one_sided_data_is_refused(label, name):
    frame, _, task = squares(5)
    with pytest.raises(ValueError, match=f"none of 5 frames is a {name}"):
        train.dataset(frame, np.full(5, label), task)


def test_misfitting_data_is_refused(data):
    frame, label, task = squares(5)
    with pytest.raises(ValueError, match="expected uint8 frames, as on disk, got float32"):
        train.dataset(frame.astype(np.float32), label, task)
    with pytest.raises(ValueError, match="'label': 4"):
        train.dataset(frame, label[:4], task)
    plain = train.dataset(*squares(20))
    with pytest.raises(ValueError, match="marked no frames"):
        train.make(RewardConfig.fake(), fake_reward_train(extra=0.2), {}, plain, KEY)
    with pytest.raises(ValueError, match="needs the task head"):
        train.make(RewardConfig.fake(head="plain"), fake_reward_train(swap=0.2), {}, plain, KEY)
    with pytest.raises(ValueError, match=r"RewardConfig.tasks is 2, but the data has task 2"):
        train.make(RewardConfig.fake(tasks=2), fake_reward_train(), {}, plain, KEY)
    with pytest.raises(ValueError, match="at most 1 together"):
        RewardTrainConfig(positive=0.7, extra=0.4)
