"""The three questions with real networks, fresh ones, on the embedded table: programs and stages fit together."""

from __future__ import annotations

import pathlib

import jax
import pytest

from tests.sizes import draw_world
from tests.small_run import save_parts, small_settings
from wovr_jax.audit import known, signs, trust
from wovr_jax.audit.lies import FILE, Rollouts
from wovr_jax.audit.trust import TrustConfig
from wovr_jax.core.config import from_dict
from wovr_jax.evaluate import summarize_outcomes
from wovr_jax.policy import vla
from wovr_jax.report import trust as words
from wovr_jax.reward import classifier
from wovr_jax.run.bind import Products, bind_stages
from wovr_jax.run.folder import Product, Run
from wovr_jax.run.recipe import CollectConfig, EvaluateConfig, Recipe
from wovr_jax.run.stages.reward import Judge
from wovr_jax.train.optimizers import TrainingConfig

EPISODES = 6


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    parts = save_parts(tmp_path_factory.mktemp("assets"))
    collect = CollectConfig(demonstrations=4, validation=1, batch=4)
    evaluate = EvaluateConfig(episodes=EPISODES, compare=EPISODES, temperatures=())
    return from_dict(Recipe, small_settings(parts, collect=collect, evaluate=evaluate, temperature=1.0))


def test_what_is_asked_is_answered_from_first_to_last(
    recipe: Recipe, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "TRAINING", TrainingConfig(steps=3, batch=4))
    key, run, made = jax.random.key(0), Run(tmp_path / "run", {}), Products()
    params, cfg = draw_world(recipe.world, key), recipe.world
    judge = classifier.network(recipe.reward).init(key)
    made.vae, made.worlds = Product(lambda: (cfg, params["vae"])), [Product(lambda: params)]
    # A judge of this threshold pays every frame.
    made.rewards = [Product(lambda: Judge(judge, -1.0))]
    made.policies = [Product(lambda k=k: vla.network(recipe.policy).init(jax.random.key(k))) for k in (1, 2)]
    do = bind_stages(recipe, run, made)
    made.demonstrations = do.demonstrate()
    do.measure(0)
    made.rollouts = [do.collect(0, do.act(0, "collect-0"))]

    asked = TrustConfig(episodes=EPISODES, shares=(0.5,))
    trust.ask(recipe, run, made, asked, ladder=True, twins=True)
    answers = trust.read(run.folder)["trust"]
    names = [policy["name"] for policy in answers["policies"]]
    assert names == ["imitation of 50 % (2 demonstrations)", "base", "after imagined GRPO"]
    base = answers["policies"][1]
    # The base plays as it does where the run measures it, so the truth about it is the same.
    assert base["sampled"]["true"] == run.facts["evaluate-0"]["true_success"]
    assert base["greedy"]["true"] == run.facts["evaluate-0"]["greedy"]
    assert base["sampled"]["imagined"] == [summarize_outcomes([1] * EPISODES)]
    horizon = answers["worlds"][0]["horizon"]
    assert horizon["rollouts"] == EPISODES and len(horizon["psnr"]) == len(horizon["latent"]) == 2
    assert all(0 < psnr < 100 for psnr in (*horizon["psnr"], *horizon["psnr_vae"])) and 0 <= horizon["horizon"] <= 2
    assert answers["ledger"]["trial-base"]["true_steps"] == 2 * EPISODES * recipe.sim.horizon
    assert "Can it rank policies?" in words.render_text(answers)

    # Six episode starts, at most six keyframes; every frame is paid, so a lie is whatever fails in truth.
    lies = answers["worlds"][0]["lies"]
    assert lies["rollouts"] == lies["paid"] >= EPISODES and lies["precision"] == 1 - lies["lies"] / lies["paid"]
    whole = {"margin", "second_noise", "twin_verdict"}
    assert set(lies["signs"]) - {"mix"} == {*signs.NAMES, *whole, "twin_frames"}
    assert all((lies["signs"][name]["astray"] is None) == (name in whole) for name in (*signs.NAMES, *whole))
    # The twin is another world, trained in a folder of its own, and the run knows nothing of it.
    told = Rollouts.load(run.folder / trust.FOLDER / "stages" / "lies-1-in-world-0-with-twin" / FILE)
    assert told.sign["twin_frames"].min() > 0 and (told.sign["margin"] != told.sign["twin_verdict"]).any()
    assert (run.folder / trust.FOLDER / trust.TWINS / "stages" / "world-0").exists()
    assert "world-0" not in run.facts and "Does anything tell a lie" in words.render_text(answers)

    # Asked again, every stage is passed over: what it would load is not there any more.
    made.policies = [Product(lambda: pytest.fail("loaded"))] * 2
    run.close()
    trust.ask(recipe, Run(tmp_path / "run", {}), made, asked, ladder=True, twins=True)
    assert trust.read(run.folder)["trust"] == answers
