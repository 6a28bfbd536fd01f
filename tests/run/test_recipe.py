"""Settings of a run: what is refused before any stage, and what an earlier version wrote."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import jax
import numpy as np
import pytest

from configs import grpo as grpo_job
from configs import online_grpo as online_job
from configs import pace as presets
from configs import robot as robot_job
from configs import world_model as world_job
from configs import world_study as study_job
from tests.run.asked import changed
from wovr_jax import pace
from wovr_jax.core import config, keys
from wovr_jax.core.config import Between, ConfigError
from wovr_jax.core.sharding import MeshConfig
from wovr_jax.export.server import ServerConfig
from wovr_jax.grpo import GRPOConfig
from wovr_jax.play.server import PlayConfig
from wovr_jax.policy import vla
from wovr_jax.policy.towers_train import TowerTraining
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.run.recipe import COLLECTIONS, Recipe
from wovr_jax.sim import embedded
from wovr_jax.sim.arena import RANGES, layouts
from wovr_jax.sim.libero.evaluate import LiberoEvaluation
from wovr_jax.world.flow import FlowConfig
from wovr_jax.world.train import WorldTrainConfig

# --- every number has its range ---------------------------------------------------------------


def _numbers(hint: Any, path: str, ranges: tuple[Any, ...] = ()) -> Iterator[tuple[str, bool]]:
    """Every number in an annotation, and whether a range stands beside it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        yield from _numbers(arguments[0], path, arguments[1:])
    elif origin in (tuple, typing.Union, types.UnionType):
        for argument in arguments:
            yield from _numbers(argument, path)
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
        assert hasattr(hint.__init__, "__wrapped__"), f"{hint.__name__} is not marked @checked"
        for name, inner in typing.get_type_hints(hint, include_extras=True).items():
            yield from _numbers(inner, f"{path}.{name}")
    elif hint in (int, float):
        yield path, any(isinstance(one, Between) for one in ranges)
    else:
        assert origin is Literal or hint in (str, bool, type(None), ...), f"{path}: {hint} is not looked into"


@pytest.mark.parametrize("root", [Recipe, TowerTraining, ServerConfig, PlayConfig, LiberoEvaluation])
def test_every_number_has_a_range(root: type) -> None:
    numbers = list(_numbers(root, root.__name__))
    assert len(numbers) > (150 if root is Recipe else 3)
    assert [path for path, ranged in numbers if not ranged] == []


NAN, INF = float("nan"), float("inf")

REFUSED: list[tuple[str, Any, str]] = [
    ("seed", "abc", "expected int"),
    ("seed", -1, "at least 0 and at most 2_147_483_647, got -1"),
    ("seed", 2**31, "at most 2_147_483_647, got 2147483648"),
    ("seed", 1.5, "expected int"),
    ("seeds", (0, 2**31), "at most 2_147_483_647"),
    ("temperature", 0.0, "above 0"),
    ("temperature", NAN, "above 0"),
    ("mesh__data", 0, "-1 or at least 1"),
    ("mesh__fsdp", -2, "-1 or at least 1"),
    ("mesh__tensor", True, "expected int"),
    ("checkpoints__every_s", -1.0, "at least 0"),
    ("checkpoints__last", 0, "at least 1"),
    ("policy__chunk", 0, "at least 1"),
    ("policy__vocab_size", -5, "at least 1"),
    ("policy__recipe", "openvla", "'oft', 'rlinf'"),
    ("policy__llm__depth", 0, "at least 1"),
    ("policy__llm__heads", 0, "at least 1"),
    ("policy__llm__eps", 0.0, "above 0"),
    ("policy__llm__rope_theta", INF, "above 0"),
    ("policy__llm__dtype", "float8", "'float32', 'bfloat16'"),
    ("policy__dino__image", 0, "at least 1"),
    ("policy__dino__depth", 1, "at least 2"),
    ("policy__siglip__std", (0.5, 0.0, 0.5), "above 0"),
    ("policy__siglip__mean", (0.5, NAN, 0.5), "a finite number"),
    ("world__chunk", -8, "at least 1"),
    ("world__memory", 0, "at least 1"),
    ("world__vae_rows", -1, "at least 0"),
    ("world__eight_bit", "ceil", "'none', 'round', 'floor'"),
    ("world__noise", "white", "'folded', 'fixed'"),
    ("world__dit__layers", 0, "at least 1"),
    ("world__dit__heads", 0, "at least 1"),
    ("world__dit__theta", -1.0, "above 0"),
    ("world__dit__kernel", "cuda", "'xla', 'cudnn'"),
    ("world__flow__steps", 0, "at least 1"),
    ("world__flow__shift", 0.0, "above 0"),
    ("world__flow__levels", 1, "at least 2"),
    ("world__vae__z_dim", 0, "at least 1"),
    ("world__vae__dim_mult", (1, 0, 2), "at least 1"),
    ("world__vae__conv", "winograd", "'auto', 'native', 'fold'"),
    ("reward__widths", (16, -32), "at least 1"),
    ("reward__dropout", 1.0, "at least 0 and below 1"),
    ("reward__momentum", 1.5, "at least 0 and at most 1"),
    ("sim__horizon", 0, "at least 1"),
    ("sim__size", -32, "at least 1"),
    ("sim__max_move", 0.0, "above 0"),
    ("sim__jitter", (0.1, 0.1), "expected 6 values"),
    ("expert__noise", -0.1, "at least 0"),
    ("expert__flip", 1.1, "at most 1"),
    ("expert__flaw", "clumsy", "'none', 'early_release'"),
    ("expert__speeds", (0.0, 2.0), "at most 1"),
    ("collect__demonstrations", -1, "at least 0"),
    ("collect__first", 0, "at least 1"),
    ("collect__again", 2_000_000, "at most 1_000_000"),
    ("collect__retold", 0, "at least 1"),
    ("collect__batch", 0, "at least 1"),
    ("sft__steps", -1, "at least 0"),
    ("sft__batch", 0, "at least 1"),
    ("sft__lr", 0.0, "above 0"),
    ("sft__b2", 1.0, "below 1"),
    ("sft__clip", 0.0, "above 0"),
    ("sft__weight_decay", -1.0, "at least 0"),
    ("sft__early", 0, "at least 1"),
    ("sft__optimizer", "sgd", "'adamw', 'muon'"),
    ("sft__validate_every", -100, "at least 0"),
    ("vae_train__seed", 2**31, "at most 2_147_483_647"),
    ("vae_train__kl", -1e-5, "at least 0"),
    ("world_train__lr", NAN, "above 0"),
    ("world_train__ema", 1.0, "below 1"),
    ("world_train__start_share", 1.01, "at most 1"),
    ("world_train__schedule", "linear", "'cosine', 'constant'"),
    ("world_train__stride", 0, "at least 1"),
    ("world_train__stream__visit", 0, "at least 1"),
    ("world_train__stream__workers", -1, "at least 0"),
    ("refresh__steps", -300, "at least 0"),
    ("refresh__lr", -INF, "above 0"),
    ("reward_train__batch", 0, "at least 1"),
    ("reward_train__positive", -0.3, "at least 0"),
    ("reward_train__max_fpr", 5.0, "at most 1"),
    ("reward_train__rule", "best", "'youden'"),
    ("starts__share", 1.5, "at most 1"),
    ("starts__before", 0, "at least 1"),
    ("starts__rule", "before_failure", "'last_event'"),
    ("starts__room", -1, "at least 0"),
    ("starts__event", "drop", "'any', 'open', 'close'"),
    ("dream__groups", 0, "at least 1"),
    ("dream__chunks", 0, "at least 1"),
    ("dream__updates", (12, -1), "at least 0"),
    ("dream__rates", (1.0, NAN), "at least 0"),
    ("dream__world", "real", "'learned', 'true', 'shadow'"),
    ("dream__select", "best", "'last', 'closed_loop', 'triggered'"),
    ("dream__false_success", 1.1, "at most 1"),
    ("evaluate__closed", -1, "at least 0"),
    ("learner__lr", -3e-4, "above 0"),
    ("learner__betas", (0.9, 1.0), "below 1"),
    ("learner__epochs", 0, "at least 1"),
    ("learner__minibatches", 0, "at least 1"),
    ("learner__microbatch", 0, "at least 1"),
    ("learner__lora", {"rank": 0}, "at least 1"),
    ("learner__lora", {"alpha": 0.0}, "above 0"),
    ("learner__grpo__group", 0, "at least 1"),
    ("learner__grpo__gamma", 1.1, "at most 1"),
    ("learner__grpo__clip_low", 1.2, "at most 1"),
    ("learner__grpo__clip_high", NAN, "at least 0"),
    ("learner__grpo__dual_clip", 0.5, "0 or above 1"),
    ("learner__grpo__kl", -0.1, "at least 0"),
    ("evaluate__episodes", -1, "at least 0"),
    ("evaluate__videos", -1, "at least 0"),
]

REFUSED_ON_LIBERO: list[tuple[str, Any, str]] = [
    ("libero__suite", "spatial", "'libero_spatial'"),
    ("libero__tasks", (-1,), "at least 0"),
    ("libero__steps", 0, "at least 1"),
    ("libero__inits", (0, 51), "at least 0 and at most 50"),
    ("libero__workers", 0, "at least 1"),
    ("libero__intervened_share", 1.2, "at most 1"),
    ("libero__protocol", "mine", "'openvla', 'rlinf'"),
    ("libero__scene__size", -1, "at least 0"),
    ("libero__scene__hold", 0, "at least 1"),
    ("libero__expert__noise", -0.1, "at least 0"),
    ("libero__expert__linger", -1, "at least 0"),
    ("libero__expert__flaw", "clumsy", "'missed_grasp'"),
]


def _shown(value: Any) -> str:
    """What a message shows of a refused value: of a group or a list one entry."""
    return "got " if isinstance(value, tuple | dict) else repr(value)


@pytest.mark.parametrize(("path", "value", "allowed"), REFUSED)
def test_a_value_out_of_range_is_refused_before_any_stage(path: str, value: Any, allowed: str) -> None:
    _refused(changed(**{path: value}), path, value, allowed)


@pytest.mark.parametrize(("path", "value", "allowed"), REFUSED_ON_LIBERO)
def test_a_value_out_of_range_is_refused_before_the_simulator(path: str, value: Any, allowed: str) -> None:
    _refused(changed("libero_small", **{path: value}), path, value, allowed)


def _refused(settings: dict[str, Any], path: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        config.from_dict(Recipe, settings)
    said = str(refusal.value)
    assert f"config.{path.replace('__', '.')}" in said and allowed in said and _shown(value) in said, said


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1234},
        {"seeds": [2**31 - 1]},
        {"dream__updates": (0,)},
        {"world_train__steps": 0, "world_weights": "somewhere"},
        {"sft__steps": 0, "policy_weights": "somewhere"},
        {"sft__validate_every": 0},
        {"world_train__validate_every": 0},
        {"learner__clip_norm": 0.0},
        {"learner__grpo__dual_clip": 0},
        {"starts__share": 0},
        {"evaluate__videos": 0},
        {"mesh__data": -1},
        {"mesh__tensor": -1, "sft__batch": 33},
    ],
)
def test_what_means_something_is_allowed(changes: dict[str, Any]) -> None:
    config.from_dict(Recipe, changed(**changes))


def test_nothing_is_begun_with_settings_that_do_not_fit(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="3 settings do not fit") as refusal:
        pace.run("pace", changed(seed=-1, dream__groups=0, sft__lr="fast"), tmp_path / "run")
    assert [line.split(":")[0].strip() for line in str(refusal.value).splitlines()[1:]] == [
        "config.seed",
        "config.sft.lr",
        "config.dream.groups",
    ]
    assert not (tmp_path / "run").exists()


# --- what has to fit together -----------------------------------------------------------------

PAIRS: list[tuple[dict[str, Any], str]] = [
    ({"world__chunk": 4}, r"world\.chunk: expected policy\.chunk=8.*got 4"),
    ({"policy__chunk": 4}, r"world\.chunk: expected policy\.chunk=4.*got 8"),
    ({"policy__action_dim": 6}, r"policy\.action_dim: expected the 7 numbers"),
    ({"world__dit__action_dim": 6}, r"world\.dit\.action_dim: expected the 7 numbers"),
    ({"policy__images": 2}, r"policy\.images: expected 1: that is what the environment shows, got 2"),
    ({"policy__proprio": 8}, r"policy\.proprio: expected 0"),
    ({"sim__wrist": True}, r"policy\.images: expected 2: .*, got 1.*\n.*world\.views: expected 2"),
    ({"sim__strip": 16}, r"policy\.proprio: expected 3: .*, got 0.*\n.*world\.state: expected 3"),
    ({"sim__strip": 8}, r"sim\.strip: expected a multiple of 16 pixels"),
    ({"sim__horizon": 20}, r"sim\.horizon: expected a multiple of the policy's chunk, 8, got 20"),
    ({"sim__size": 40}, r"sim\.size: expected a multiple of 16 pixels.*got 40"),
    ({"reward__tasks": 2}, r"reward\.tasks: expected at least the 3 tasks of the environment, got 2"),
    (
        {"reward__head": "plain", "reward_train__swap": 0.1},
        r"reward_train\.swap: expected 0 without reward\.head",
    ),
    ({"reward_train__extra": 0.8}, r"reward_train\.positive: expected shares of at most 1 together"),
    ({"sft__frozen": ("dino", "eyes")}, r"sft\.frozen: expected parts of the policy, dino, .*, got eyes"),
    ({"learner__minibatches": 1153}, r"learner\.minibatches: expected at most the 1152 samples.*got 1153"),
    ({"mesh__data": 5}, r"collect\.batch: expected a multiple of 5, mesh\.data=5 x mesh\.fsdp=1, got 128"),
    ({"mesh__fsdp": 4, "sft__batch": 30}, r"sft\.batch: expected a multiple of 4.*got 30"),
    ({"mesh__fsdp": 4, "world_train__batch": 30}, r"world_train\.batch: expected a multiple of 4.*got 30"),
    ({"mesh__fsdp": 4, "reward_train__batch": 66}, r"reward_train\.batch: expected a multiple of 4.*got 66"),
    ({"mesh__fsdp": 4, "vae": "", "vae_train__batch": 6}, r"vae_train\.batch: expected a multiple of 4.*got 6"),
    ({"mesh__fsdp": 4, "learner__microbatch": 6}, r"learner\.microbatch: expected a multiple of 4.*got 6"),
    ({"mesh__data": 2, "dream__groups": 3, "learner__grpo__group": 3}, r"dream\.groups: .*got 9 rollouts of 3 a group"),
    ({"mesh__data": -1, "mesh__fsdp": -1}, r"mesh: expected -1 once at most"),
    ({"evaluate__compare": 513}, r"evaluate\.compare: expected at least 1 and at most episodes=512, got 513"),
    ({"evaluate__episodes": 0, "evaluate__compare": 0}, r"evaluate\.episodes: expected at least 1 where a simulator"),
    ({"collect__validation": 0}, r"collect\.validation: expected at least 1"),
    (
        {"collect__demonstrations": 0},
        r"collect\.demonstrations: expected at least 1, which imitation .*the scale",
    ),
    ({"collect__demonstrations": 999_999}, r"collect\.validation: expected at most 1_000_000 episodes together"),
    ({"dream__updates": (1,) * 8}, r"dream\.updates: expected at most 7 rounds, each with a collection, got 8"),
    ({"dream__updates": ()}, r"dream\.updates: expected a number for each round"),
    ({"dream__select": "closed_loop", "dream__watch": 0}, r"dream\.select: .*which failures a learned reward pays"),
    ({"dream__select": "triggered", "dream__watch": 0}, r"dream\.select: 'triggered' asks which failures a learned"),
    ({"dream__reward": "true"}, r"dream\.reward: 'true' needs a world that knows the truth"),
    ({"starts__least": 7}, r"starts\.least: expected at most before=6, got 7"),
    ({"starts__room": 24}, r"starts\.room: expected below the 24 steps of an episode, got 24"),
    ({"expert__release_low": 0.5}, r"expert\.release_low: expected at most release_high=0\.44, got 0\.5"),
    ({"expert__speeds": (0.5,)}, r"expert\.speeds: expected shares with 0 and 1 among them"),
    ({"learner__grpo__group": 1, "learner__grpo__normalise": "mean_std"}, r"grpo\.group: .*have no deviation"),
    ({"learner__grpo__filter_low": 0.95}, r"grpo\.filter_low: expected at most filter_high=0\.9, got 0\.95"),
    ({"world__memory": 5}, r"world\.memory: expected at most the 4 slots of a window, got 5"),
    ({"world__dit__channels": 8}, r"world\.dit\.channels: expected the VAE's z_dim, 16, got 8"),
    ({"world__dit__heads": 5}, r"world\.dit\.dim: expected a multiple of heads=5, got 128"),
    ({"world__dit__heads": 64}, r"world\.dit\.dim: expected heads of an even width of at least 6"),
    ({"world__vae__dim_mult": (1, 2)}, r"world\.vae\.temporal_down: expected an entry for each of the 1 halvings"),
    ({"policy__dino__image": 40}, r"policy\.siglip: .*equally many patches"),
    ({"policy__dino__image": 36}, r"policy\.dino\.image: expected a multiple of patch=8, got 36"),
    ({"policy__llm__heads": 96}, r"policy\.llm\.width: expected a multiple of 2 \* heads=192, got 96"),
    ({"policy__vocab_size": 200}, r"policy\.vocab_size: expected above 256 and at most llm\.rows="),
    ({"policy__pad": 100_000}, r"policy\.pad: expected an id below llm\.rows="),
    ({"learner__lora": {"targets": ()}}, r"learner\.lora\.targets: expected the pattern of at least one layer"),
    ({"world_train__lora": {}}, r"world_train\.lora: adapters sit beside weights that know"),
    ({"sft__steps": 0}, r"sft\.steps: 0 leaves the base policy as it starts"),
    ({"towers": ("tabletop_dinov2",)}, r"towers: expected the names of two towers"),
    ({"seeds": ()}, r"seeds: expected the seed of at least one run"),
    ({"world_train__steps": 0}, r"world_train\.steps: 0 leaves the world model as it starts: .*world_weights="),
    ({"reward_train__steps": 0, "reward_train__rule": "fixed"}, r"reward_train\.steps: 0 leaves .*reward_weights="),
    (
        {"reward_train__steps": 0, "reward_train__rule": "rate", "reward_weights": "some"},
        r"reward_train\.rule: expected 'fixed' for a classifier that is used as it is.*got 'rate'",
    ),
    (
        {
            "start_states": "some",
            "world_weights": "some",
            "reward_weights": "some",
            "world_train__steps": 0,
            "reward_train__steps": 0,
            "reward_train__rule": "fixed",
        },
        r"pace: expected False: world model, classifier and start states are all given",
    ),
]

PAIRS_ON_LIBERO: list[tuple[dict[str, Any], str]] = [
    ({"libero__steps": 100}, r"libero\.steps: expected a multiple of the policy's chunk, 8, got 100"),
    ({"libero__scene__size": 0}, r"libero\.scene\.size: expected a multiple of 16 pixels.*got 0"),
    ({"libero__inits": (5, 5)}, r"libero\.inits: expected the first initial state and the one after the last"),
    ({"libero__train_inits": (1, 2, 3)}, r"libero\.train_inits: expected the first"),
    (
        {"libero__train_inits": (10, 20)},
        r"libero\.train_inits: initial states 10 to 19 are both trained on",
    ),
    ({"libero__suite": "libero_90", "libero__tasks": ()}, r"reward\.tasks: expected at least the 90 tasks"),
    ({"libero__demonstrations": "some"}, r"libero\.scene\.hold: .*use hold=1, or the expert"),
    ({"dream__world": "shadow"}, r"dream\.world: .*which LIBERO and a robot are not"),
    (
        {"dream__select": "closed_loop"},
        r"dream\.world: .*select='closed_loop' need a .*LIBERO and a robot are not.*select='last'",
    ),
]


@pytest.mark.parametrize(("changes", "message"), PAIRS)
def test_what_has_to_fit_is_checked_before_any_stage(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.([\w.]*\.)?{message}"):
        config.from_dict(Recipe, changed(**changes))


@pytest.mark.parametrize(("changes", "message"), PAIRS_ON_LIBERO)
def test_what_has_to_fit_on_libero_is_checked_before_any_stage(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.([\w.]*\.)?{message}"):
        config.from_dict(Recipe, changed("libero_small", **changes))


def test_all_that_does_not_fit_is_in_one_message() -> None:
    with pytest.raises(ConfigError) as refusal:
        config.from_dict(Recipe, changed(world__chunk=4, sim__horizon=20, sft__steps=0, mesh__data=3))
    said = str(refusal.value)
    assert said.startswith("config: 6 settings do not fit:\n")
    for name in ("world.chunk", "sim.horizon", "sft.steps", "collect.batch", "world_train.batch", "reward_train.batch"):
        assert f"\n  config.{name}: " in said


def test_ranges_of_layouts_are_those_of_the_arena() -> None:
    last = {"evaluate": 1_000_000, "online": 1_000_000, f"collect-{COLLECTIONS - 1}": 1_000_000}
    for purpose, count in last.items():
        found = np.asarray(layouts(RANGES - 1, purpose, count), np.int64)
        assert found[0] > 0 and found[-1] - found[0] == count - 1, "wrapped around int32"
    # One range more would wrap, one collection more would begin where online RL does.
    assert np.iinfo(np.int32).max < (RANGES + 1) * 10_000_000 - 1
    assert layouts(0, f"collect-{COLLECTIONS}", 1)[0] == layouts(0, "online", 1)[0]


@pytest.mark.parametrize("seed", [0, 213, 214, 1234, 2**31 - 1])
def test_any_seed_has_layouts_of_its_remainder_and_draws_of_its_own(seed: int) -> None:
    recipe = config.from_dict(Recipe, changed(seed=seed, seeds=(seed,)))
    found = layouts(recipe.seed, "evaluate", 3)
    assert found.dtype == np.int32 and found.tolist() == [seed % 214 * 10_000_000 + 9_000_000 + i for i in range(3)]
    # As the table's reset takes them, and as the other generators take the seed.
    assert embedded.reset_batch(found, recipe.sim).gripper.shape[0] == 3
    np.random.default_rng([seed, 1])
    draws = [jax.random.key_data(keys.key(other, "collect-0")).tolist() for other in (seed, seed % 214)]
    assert (draws[0] == draws[1]) == (seed < 214)


def test_the_parts_of_a_policy_are_those_of_its_parameters() -> None:
    assert set(vla.network(VLAConfig.fake()).shapes()) == set(vla.PARTS)


# --- the reference bundles --------------------------------------------------------------------


def test_the_reference_bundles_are_presets() -> None:
    def read(job: Any, preset: str) -> Recipe:
        return config.from_dict(Recipe, json.loads(job.get_config(preset).to_json()))

    assert read(presets, "paper").learner.grpo == GRPOConfig.paper(group=8)
    assert read(grpo_job, "paper").learner.grpo == GRPOConfig.paper(group=8)
    rlinf = read(grpo_job, "rlinf")
    assert rlinf.learner.grpo == GRPOConfig.rlinf(group=8)
    assert rlinf.world.flow == FlowConfig.rlinf() and (rlinf.world.eight_bit, rlinf.world.noise) == ("floor", "fixed")
    assert rlinf.world.dit.sinusoid_dtype == "bfloat16"
    trained = read(world_job, "rlinf")
    assert trained.world_train == WorldTrainConfig.rlinf(latents="disk", validate_every=250)
    assert trained.world == rlinf.world
    assert read(presets, "libero_goal,paper").learner.grpo == GRPOConfig.paper(group=8)
    # A fixed half is the threshold of the paper and of RLinf, who round.
    for preset in ("paper", "rlinf", "libero_spatial", "libero_goal", "libero_10,paper"):
        train = read(presets, preset).reward_train
        assert (train.rule, train.threshold) == ("fixed", 0.5), preset
    assert (read(presets, "").reward_train.rule, read(presets, "").reward_train.threshold) == ("fixed", 0.9)


@pytest.mark.parametrize(("suite", "head"), [("goal", "task"), ("spatial", "plain"), ("object", "plain")])
def test_the_released_parts_of_rlinf_are_a_preset(suite: str, head: str) -> None:
    settings = presets.get_config(f"libero_{suite},rlinf,rlinf_release").to_json()
    recipe = config.from_dict(Recipe, json.loads(settings))
    assert not (recipe.world_train.steps or recipe.reward_train.steps or recipe.sft.steps or recipe.pace)
    assert recipe.start_states and recipe.reward_weights and recipe.world_weights and recipe.rounds == 1
    assert recipe.reward == RewardConfig(head=head) and recipe.learner.grpo == GRPOConfig.rlinf(group=8)
    assert (recipe.reward_train.rule, recipe.reward_train.threshold, recipe.starts.share) == ("fixed", 0.5, 1 / 3)


@pytest.mark.parametrize("gpu", ["one_h100", "one_h200"])
@pytest.mark.parametrize("preset", ["libero_spatial", "libero_10", "libero_goal,rlinf,rlinf_release", "franka"])
def test_one_gpu_is_a_preset_after_everything_of_full_size(preset: str, gpu: str) -> None:
    """Nothing but adapters, pieces and the number of updates differs from what eight of them do."""
    job = robot_job if preset == "franka" else presets
    whole, one = (config.from_dict(Recipe, job.get_config(name).to_dict()) for name in (preset, f"{preset},{gpu}"))
    assert one.mesh == MeshConfig() and one.learner.lora and one.learner.lora.rank == 32
    assert bool(one.world_train.lora) == bool(whole.world_train.steps)
    assert sum(one.dream.updates) * 2 == sum(whole.dream.updates)
    changed = set(config.diff(config.to_dict(whole), config.to_dict(one)))
    assert {name.partition(".")[0] for name in changed} <= {
        "mesh",
        "learner",
        "world",
        "world_train",
        "refresh",
        "dream",
    }
    assert {name for name in changed if name.startswith("world.")} <= {"world.vae_rows"}
    # No GPU of a smaller kind is left with the pieces of a larger one.
    assert one.world.vae_rows == {"one_h100": 8, "one_h200": 32}[gpu]


def test_a_whole_rollout_from_a_keyframe_is_rlinfs_way_and_named() -> None:
    ours, theirs = changed()["starts"], changed("rlinf")["starts"]
    assert (ours["deadline"], ours["rule"], ours["room"]) == (True, "last_chance", 12)
    assert theirs == ours | {"deadline": False}


@pytest.mark.parametrize("preset", ["", "relay", "libero_small"])
def test_online_rl_has_as_many_true_episodes_as_the_loop_collects(preset: str) -> None:
    loop, online = (config.from_dict(Recipe, job.get_config(preset).to_dict()) for job in (presets, online_job))
    rollouts = online.dream.groups * online.learner.grpo.group
    budget = loop.collect.first + (loop.rounds - 1) * loop.collect.again
    assert online.dream.updates == (budget // rollouts,) and online.rounds == 1
    assert online.dream.groups == (loop.online_groups or loop.dream.groups)


def test_the_world_study_asks_for_the_worth_of_wovrs_own_noise() -> None:
    study = config.from_dict(Recipe, study_job.get_config().to_dict())
    assert (study.world_train.context_sigma, study.world_train.shift) == (WorldTrainConfig().context_sigma, 0)
