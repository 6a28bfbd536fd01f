"""The loop resumes exactly, never waits between reads, and stops with the checkpoint intact."""

from __future__ import annotations

import contextlib
import functools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.compiles import count_compiles
from wovr_jax.core import keys
from wovr_jax.core.history import CheckpointConfig, History
from wovr_jax.core.log import Log, read_metrics
from wovr_jax.train import loop

TX = optax.adamw(1e-2)


@jax.jit
def train(state, i):
    """Regression on a batch drawn on the device from the step."""
    key = jax.random.fold_in(keys.key(0, "data"), i)
    x = jax.random.normal(key, (8, 4))

    def loss(params):
        return jnp.mean(jnp.square(x @ params["w"] - x.sum(1, keepdims=True)))

    value, grad = jax.value_and_grad(loss)(state["params"])
    update, optimizer = TX.update(grad, state["optimizer"], state["params"])
    return {"params": optax.apply_updates(state["params"], update), "optimizer": optimizer}, {"loss": value}


train = jax.jit(train, donate_argnums=0)


def fresh():
    params = {"w": jnp.zeros((4, 1))}
    return {"params": params, "optimizer": TX.init(params)}


def logged(folder):
    return [(line["step"], line["loss"]) for line in read_metrics(folder)]


def steps(folder):
    return History(folder / "fit", CheckpointConfig()).steps()


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_interrupted_and_resumed_is_the_uninterrupted_run(tmp_path):
    whole_log = Log(tmp_path / "whole", tensorboard=False)
    whole = loop.fit("sft", fresh(), train, 30, log=whole_log, folder=tmp_path / "whole", log_every=8)

    def stop(done, state):
        if done == 13:  # in the middle of a window of metrics
            os.kill(os.getpid(), signal.SIGINT)

    log = Log(tmp_path / "cut", tensorboard=False)
    with pytest.raises(KeyboardInterrupt, match="sft stopped after step 13 of 30"):
        loop.fit("sft", fresh(), train, 30, log=log, folder=tmp_path / "cut", log_every=8, on_step=stop)
    assert steps(tmp_path / "cut") == [13]
    log.scalars("sft", 16, {"loss": 99.0})  # as if the run had gone on after its checkpoint and been killed
    resumed = loop.fit("sft", fresh(), train, 30, log=log, folder=tmp_path / "cut", log_every=8)
    assert same(whole, resumed)
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    assert [step for step, _ in logged(tmp_path / "whole")] == [8, 16, 24, 30]


def test_interrupt_raised_by_the_callback_saves_too(tmp_path):
    def stop(done, state):
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)  # a shell's background job has it switched off
    with pytest.raises(KeyboardInterrupt):
        loop.fit("sft", fresh(), train, 5, folder=tmp_path, on_step=stop)
    assert steps(tmp_path) == [1]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_says_which(tmp_path, number):
    def warned(done, state):
        if done == 2:
            signal.raise_signal(number)

    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(loop.Stopped, match="stopped after step 2 of 5") as caught:
        loop.fit("sft", fresh(), train, 5, folder=tmp_path, on_step=warned)
    assert caught.value.signal == number
    assert steps(tmp_path) == [2]
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_finished_stage_is_not_run_again(tmp_path):
    first = loop.fit("sft", fresh(), train, 4, folder=tmp_path)

    def never(state, i):
        raise AssertionError("the stage was complete")

    assert same(first, loop.fit("sft", fresh(), never, 4, folder=tmp_path))
    longer = loop.fit("sft", fresh(), train, 6, folder=tmp_path)
    assert same(longer, loop.fit("sft", fresh(), train, 6))
    with pytest.raises(ValueError, match=r"at step 6, beyond the 5 steps"):
        loop.fit("sft", fresh(), train, 5, folder=tmp_path)


def test_one_compilation_and_few_reads(monkeypatch):
    reads = []
    real = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: reads.append(1) or real(tree))

    def once(state, i):
        return state + 1, {"loss": state}

    with count_compiles() as compiles:
        loop.fit("sft", jnp.float32(0), jax.jit(once), 20, log_every=10)
    assert compiles["once"] == 1
    assert len(reads) == 2


def test_means_over_the_window_and_extra_scalars(tmp_path):
    log = Log(tmp_path, tensorboard=False)
    step = jax.jit(lambda state, i: (state, {"loss": i.astype(jnp.float32), "rate": 0.25}))
    loop.fit("x", 0, step, 5, log=log, log_every=2, on_step=lambda n, s: {"eval": n} if n == 3 else None)
    lines = [{key: line[key] for key in line if key != "time"} for line in read_metrics(tmp_path)]
    assert lines == [
        {"stage": "x", "step": 2, "loss": 0.5, "rate": 0.25},
        {"stage": "x", "step": 3, "eval": 3.0},
        {"stage": "x", "step": 4, "loss": 2.5, "rate": 0.25},
        {"stage": "x", "step": 5, "loss": 4.0, "rate": 0.25},
    ]


def test_non_finite_metric_names_stage_step_and_checkpoint(tmp_path):
    step = jax.jit(lambda state, i: (state + 1, {"loss": jnp.where(i == 6, jnp.nan, 1.0), "rate": 0.0}))
    loop.fit("world-model", jnp.float32(0), step, 4, folder=tmp_path)
    with pytest.raises(loop.NonFiniteError) as caught:
        loop.fit("world-model", jnp.float32(0), step, 20, folder=tmp_path, log_every=10)
    message = str(caught.value)
    assert "world-model: metric 'loss' is nan at step 7 of 20" in message
    assert f"The checkpoint of step 4 in {tmp_path / 'fit'} is kept" in message
    assert steps(tmp_path) == [4]


def test_a_share_of_nothing_may_be_nan_and_is_a_gap_in_the_log(tmp_path):
    """A share of failures in an iteration without a failure is no fault; infinity, and any other metric, is one."""

    def step(state, i, bad=np.nan, name="share"):
        return state, {"loss": 1.0, name: bad if i == 1 else 0.25}

    with contextlib.closing(Log(tmp_path)) as log:
        loop.fit("x", 0, step, 3, log=log, log_every=1, undefined=("share",), folder=tmp_path)
    assert [line["share"] for line in read_metrics(tmp_path)] == [0.25, None, 0.25]
    for wrong in ({"bad": np.inf}, {"name": "rate"}):
        with pytest.raises(loop.NonFiniteError, match="at step 2 of 3"):
            loop.fit("x", 0, functools.partial(step, **wrong), 3, log_every=1, undefined=("share",))


def test_the_first_of_many_bad_steps_is_named():
    step = jax.jit(lambda state, i: (state + jnp.where(i == 2, jnp.nan, 1.0), {"loss": state}))
    with pytest.raises(loop.NonFiniteError, match="metric 'loss' is nan at step 4 of 9") as caught:
        loop.fit("sft", jnp.float32(0), step, 9)
    assert caught.value.step == 4  # the state that step 3 left is NaN, and so is every loss from then on


def test_non_finite_state_is_not_saved(tmp_path):
    def step(state, i):
        return {"w": state["w"].at[0].set(jnp.where(i == 2, jnp.nan, 1.0)), "k": state["k"]}, {"loss": 1.0}

    state = {"w": jnp.zeros(2), "k": jax.random.key(0)}
    with pytest.raises(
        loop.NonFiniteError, match=r"state leaf 'w' holds a NaN at step 3 of 5. The checkpoint of step 2"
    ):
        loop.fit("sft", state, jax.jit(step), 5, folder=tmp_path, keep=CheckpointConfig(every_s=0))


def test_plain_lines_when_not_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("wovr_jax.core.log.LINE_EVERY_S", -1.0)
    loop.fit("reward", jnp.float32(0), jax.jit(lambda s, i: (s, {"loss": 0.25})), 2, log_every=1)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "reward 2/2" in captured.err and "loss 0.25" in captured.err and "left" in captured.err
    monkeypatch.setattr("wovr_jax.core.log.LINE_EVERY_S", 20.0)
    loop.fit("reward", jnp.float32(0), jax.jit(lambda s, i: (s, {"loss": 0.25})), 2)
    assert capsys.readouterr().err == ""
