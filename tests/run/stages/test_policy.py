"""The base policy by LoRA: only adapters move and are kept, bit-exact resumption, the judgement on held-out chunks."""

from __future__ import annotations

import dataclasses
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.sizes import fake_sft
from wovr_jax.core import checkpoint, config, history, pixels
from wovr_jax.core.log import read_metrics
from wovr_jax.nn import lora
from wovr_jax.policy import train
from wovr_jax.policy.actions import Codec
from wovr_jax.policy.tokenizer import Tokenizer
from wovr_jax.policy.train import PolicyAdapters, SFTConfig
from wovr_jax.policy.vla import PolicyLoRA, VLAConfig, network
from wovr_jax.run.folder import Product, Run
from wovr_jax.run.recipe import Recipe
from wovr_jax.run.stages import policy as policy_stage
from wovr_jax.run.stages.episodes import Demonstrations
from wovr_jax.run.stages.policy import fine_tune
from wovr_jax.train import loop
from wovr_jax.types import Episode

CFG = VLAConfig.fake()
KEY = jax.random.key(0)
TRAIN = dataclasses.replace(fake_sft(), lora=PolicyLoRA.oft(rank=2), validate_every=2, lr=1e-2)
"""The towers are frozen: they have no adapters either."""
CODEC = Codec(q01=(-0.5,) * 7, q99=(0.5,) * 7)


def data(chunks=3, seed=0):
    rng = np.random.default_rng(seed)
    label = (0.5 * np.sign(rng.normal(size=(chunks, 8, 7)))).astype(np.float32)
    arrays = {"frame_BHWC": rng.integers(0, 256, (chunks, 16, 16, 3), np.uint8), "label_BTA": label}
    prompts = Tokenizer.tabletop().prompts(["pick up the red block"])
    return train.demonstrations(arrays | {"task_B": np.zeros(chunks, int)}, CODEC, prompts)


def episode(steps, seed=0):
    rng = np.random.default_rng(seed)
    label = (0.5 * np.sign(rng.normal(size=(steps, 7)))).astype(np.float32)
    frame = rng.integers(0, 256, (steps + 1, 16, 16, 3), np.uint8)
    return Episode(frame, label, np.zeros(steps + 1, bool), "pick up the red block", 0, seed, "expert", label)


@pytest.fixture(scope="module")
def params():
    return network(CFG).init(KEY)


@pytest.fixture(scope="module")
def made(params):
    """First state and step; the step donates, so the state is copied by those who use it."""
    return train.make(CFG, TRAIN, params, data(), KEY)


def fresh(made):
    return jax.tree.map(jnp.copy, made[0])


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_state_holds_adapters_only_and_only_they_move(params, made):
    state, step = fresh(made), made[1]
    own = train.resolve_targets(CFG, TRAIN.lora, TRAIN.frozen)
    assert jax.tree.structure(state.params) == jax.tree.structure(lora.init(KEY, params, own))

    def size(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    assert size(state.opt_state) <= 2 * size(state.params) + 8 < size(params)
    before = jax.tree.map(np.array, params)
    for i in range(3):
        state, metrics = step(state, jnp.asarray(i))
    same(params, before)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(state.params)), "every b has left zero"
    assert np.isfinite(metrics["loss"])


def test_at_first_the_policy_is_what_it_was(params, made):
    same(train.merge_weights(CFG, TRAIN, params, made[0]), params)
    other = train.make(CFG, TRAIN, params, data(), jax.random.key(1))[0]  # adapters of another seed
    assert not np.array_equal(other.params["projector"]["fc1"]["lora_a"], made[0].params["projector"]["fc1"]["lora_a"])


def test_resumed_equals_uninterrupted_bit_for_bit(made, tmp_path):
    whole = loop.fit("sft", fresh(made), made[1], 4)

    def cut(done, _):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.fit("sft", fresh(made), made[1], 4, folder=tmp_path, on_step=cut)
    stored = checkpoint.restore(tmp_path / "fit" / "00000002", made[0])
    assert jax.tree.structure(stored) == jax.tree.structure(whole)
    same(loop.fit("sft", fresh(made), made[1], 4, folder=tmp_path), whole)


def test_frozen_parts_have_no_adapters(params):
    found = [train.resolve_targets(CFG, TRAIN.lora, frozen) for frozen in (TRAIN.frozen, ())]
    parts = [{path.split("/")[0] for path in own.targets} for own in found]
    assert parts == [{"projector", "llm"}, {"dino", "siglip", "projector", "llm"}]
    with pytest.raises(ValueError, match=r"unknown \['eyes'\]"):
        train.make(CFG, dataclasses.replace(TRAIN, frozen=("eyes",)), params, data(), KEY)
    with pytest.raises(ValueError, match="no layer matches 'llm/tail'"):
        train.resolve_targets(CFG, PolicyLoRA(targets=("llm/tail",)))
    with pytest.raises(ValueError, match="expected the pattern of at least one layer, got none"):
        train.resolve_targets(CFG, PolicyLoRA(targets=("dino/*",)), ("dino",))


def test_the_judgement_by_hand(params):
    held, plain = data(5, seed=1), dataclasses.replace(TRAIN, lora=None)  # five chunks in batches of two
    state = train.make(CFG, plain, params, data(), KEY)[0]
    got = train.validation(CFG, plain, params, CODEC, held)(state)
    run = jax.jit(lambda *inputs: network(CFG)(*inputs))
    logits = np.asarray(run(params, pixels.to_float(held.frame_BHWC), held.prompt_BL), np.float64)
    token, guess = np.asarray(held.token_BTA), logits.argmax(-1)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert got["val_loss"] == pytest.approx(-np.take_along_axis(logp, token[..., None], -1).mean(), rel=1e-4)
    assert got["val_accuracy"] == pytest.approx((guess == token).mean(), abs=1e-6)
    centre = (np.linspace(-1, 1, 256)[:-1] + 1 / 255)[np.clip(255 - np.stack([guess, token]), 0, 254)]
    action = np.where(np.arange(7) < 6, 0.5 * centre, -np.sign(2 * centre - 1))
    assert got["val_l1"] == pytest.approx(np.abs(action[0] - action[1]).mean(), rel=1e-5)


def test_a_whole_fit_logs_its_judgements_and_keeps_its_adapters(params, tmp_path):
    prompt = Tokenizer.tabletop().prompts(["pick up the red block"])
    demos = Demonstrations([episode(steps=4, seed=0), episode(steps=5, seed=1)], [episode(16)])
    run = Run(tmp_path / "run", {})
    product = fine_tune(run, CFG, TRAIN, lambda: params, lambda: CODEC, prompt, lambda *_: KEY, Product(lambda: demos))
    run.log.close()
    lines = [line for line in read_metrics(run.folder) if "val_l1" in line]
    assert [line["step"] for line in lines] == [2, 4]
    judged = {name: lines[-1][name] for name in ("val_loss", "val_accuracy", "val_l1")}
    assert product.name == "sft" and product.facts == {"chunks": 9, "seconds": product.facts["seconds"]} | judged

    stage = run.folder / "stages" / "sft"
    about = config.from_dict(PolicyAdapters, checkpoint.meta(stage / "adapters"))
    assert about == PolicyAdapters(CFG, train.resolve_targets(CFG, TRAIN.lora, TRAIN.frozen))
    own = checkpoint.restore(stage / "adapters", train.make(CFG, TRAIN, params, data(), KEY)[0].params)
    same(product.value, jax.jit(lambda p, a: lora.merge(p, a, about.lora))(params, own))
    assert sorted(path.name for path in stage.iterdir()) == ["adapters", "done.json", "fit", "policy"]


EAGER = dataclasses.replace(
    TRAIN, lora=None, steps=40, warmup=1, schedule="constant", validate_every=2, patience=3, lr=5e-3
)
"""On labels without a rule the loss on held-out chunks falls for a few steps and then rises for good."""


def tune(folder, params, how=EAGER):
    prompt = Tokenizer.tabletop().prompts(["pick up the red block"])
    demos = Demonstrations([episode(steps=4, seed=0), episode(steps=5, seed=1)], [episode(16, seed=2)])
    run = Run(folder, {})
    try:
        product = fine_tune(
            run, CFG, how, lambda: params, lambda: CODEC, prompt, lambda *_: KEY, Product(lambda: demos)
        )
    finally:
        run.log.close()
    lines = {line["step"]: line["val_loss"] for line in read_metrics(run.folder) if "val_loss" in line}
    return product, {name: fact for name, fact in product.facts.items() if name != "seconds"}, lines


@pytest.fixture(scope="module")
def patient(params, tmp_path_factory):
    return tune(tmp_path_factory.mktemp("patient") / "run", params)


def test_training_stops_when_the_held_out_loss_no_longer_falls_and_keeps_the_best(params, patient, tmp_path):
    product, facts, losses = patient
    best = min(losses, key=losses.__getitem__)
    assert facts["best_step"] == best and facts["val_loss"] == pytest.approx(losses[best], rel=1e-6)
    assert facts["stopped_at"] == max(losses) == best + 3 * 2 < 40, "three measurements without a smaller loss"
    # At a constant rate it is the policy that a training of just so many steps ends with.
    just = dataclasses.replace(EAGER, steps=best, patience=0)
    same(product.value, tune(tmp_path / "run", params, just)[0].value)


@pytest.mark.parametrize("place", ["before the best", "at the best, which is kept", "after it", "at the end"])
def test_a_killed_training_stops_where_an_unbroken_one_does(params, patient, tmp_path, monkeypatch, place):
    product, facts, losses = patient
    best = facts["best_step"]
    killed_at = dict(zip(("before", "at", "after", "end"), (best - 2, best, best + 2, best + 6), strict=True))
    step = killed_at["end" if place == "at the end" else place.split()[0]]
    wait = policy_stage._wait

    def kill(folder, done, trained, loss):
        waited = wait(folder, done, trained, loss)
        if done == step:
            raise RuntimeError("killed")
        return waited

    # A checkpoint after every step, so that the training is taken up right before the step.
    with history.use(history.CheckpointConfig(every_s=0.0)):
        with monkeypatch.context() as patch:
            patch.setattr(policy_stage, "_wait", kill)
            with pytest.raises(RuntimeError, match="killed"):
                tune(tmp_path / "run", params)
        again, its_facts, its_losses = tune(tmp_path / "run", params)
    assert its_facts == facts and its_losses == losses
    same(again.value, product.value)


def test_a_patience_that_nothing_tries_or_a_cosine_cut_short_is_refused():
    for wrong in ({"validate_every": 0, "schedule": "constant"}, {"schedule": "cosine"}):
        with pytest.raises(config.ConfigError, match="patience: expected 0 without validate_every and schedule="):
            SFTConfig(patience=2, **wrong)
    SFTConfig(patience=2, schedule="constant")


def test_without_a_step_the_policy_is_what_it_starts_from(params, tmp_path):
    run = Run(tmp_path / "run", {})
    untrained = dataclasses.replace(TRAIN, steps=0)
    product = fine_tune(run, CFG, untrained, lambda: params, None, None, None, None)
    assert product.load() is params and run.facts == {}
    jax.tree.map(np.testing.assert_array_equal, product.value, params)


def test_settings_name_the_presets_of_the_stacks():
    found = config.from_dict(SFTConfig, {"lora": {"size": "rlinf", "rank": 8}, "frozen": []})
    assert found.lora == PolicyLoRA.rlinf(rank=8)
    assert config.from_dict(SFTConfig, {}).lora is None


@pytest.mark.parametrize("preset, own", [("lora_oft", PolicyLoRA.oft()), ("lora_rlinf", PolicyLoRA.rlinf())])
def test_the_config_file_has_them_and_wants_weights_to_begin_with(preset, own):
    path = pathlib.Path(__file__).parents[3] / "configs" / "sft.py"
    settings = runpy.run_path(str(path))["get_config"](f"smoke,{preset}").to_dict()
    assert settings["sft"]["steps"] == 10
    with pytest.raises(
        config.ConfigError, match=r"sft\.lora: adapters sit beside weights that know.*policy_weights=\.\.\."
    ):
        config.from_dict(Recipe, settings)
    recipe = config.from_dict(Recipe, settings | {"policy_weights": "somewhere"})
    assert recipe.sft.lora == own and recipe.sft.frozen == () and recipe.sft.optimizer == "adamw"
