"""What a robot cannot do is refused when the settings are read, before anything is recorded for it."""

from __future__ import annotations

from typing import Any

import pytest

from launch import command
from wovr_jax.core.config import ConfigError, from_dict
from wovr_jax.run.bind import open_environment
from wovr_jax.run.recipe import Recipe
from wovr_jax.sim.recorded.arena import Recorded


def settings(**changes: Any) -> dict[str, Any]:
    """Those of the preset, with some changed by their dotted names."""
    asked = command.load_config("robot", "tabletop")
    for path, text in changes.items():
        command.put(asked, path.replace("__", "."), text)
    return asked


def test_the_preset_is_a_run_of_a_robot() -> None:
    recipe = from_dict(Recipe, settings())
    assert recipe.outside is recipe.recorded and (recipe.steps, recipe.size) == (24, 32)
    environment = open_environment(recipe)
    assert isinstance(environment.arena, Recorded) and environment.prompt_KL.shape[0] == 3
    assert environment.arena.explore is None and environment.arena.follow is None
    tiny = from_dict(Recipe, command.load_config("robot", "tabletop,tiny"))
    assert (tiny.steps, tiny.size, tiny.evaluate.closed) == (16, 16, 0)
    sensing = from_dict(Recipe, command.load_config("robot", "tabletop,senses"))
    assert sensing.senses == (2, 3, 16) and sensing.frame == (32, 80) and recipe.frame == (32, 32)
    assert sensing.recorded and sensing.recorded.folder == "recordings/tabletop-senses"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"dream__world": "true"},
            "need a simulator that a compiled program can hold, which LIBERO and a robot are not",
        ),
        ({"dream__world": "shadow"}, "use 'learned' for both"),
        ({"dream__world": "true", "dream__reward": "true", "starts__share": "0"}, "use 'learned' for both"),
        ({"dream__select": "closed_loop"}, "select='last'"),
        ({"evaluate__closed": "4"}, "expected closed=0 and temperatures=(), got 4"),
        ({"evaluate__temperatures": "0.5,0.3"}, "it is measured greedily alone"),
        ({"sft__steps": "0", "policy_weights": "somewhere"}, "the base policy is exported from its stage"),
        ({"libero__suite": "libero_goal"}, "expected one true environment, got 2: leave out libero or recorded"),
        ({"recorded__steps": "20"}, "recorded.steps: expected a multiple of the policy's chunk, 8, got 20"),
        ({"recorded__size": "30"}, "recorded.size: expected a multiple of"),
        ({"recorded__success": ""}, "recorded.success: expected one of the laboratory's own, got none"),
        ({"recorded__views": "2"}, "policy.images: expected 2: that is what the environment shows, got 1"),
        (
            {"recorded__state": "3"},
            "strip: expected pixels for the 3 numbers of the state, and 0 without, got 0",
        ),
        (
            {"recorded__state": "40", "recorded__strip": "16"},
            "a state of 40 numbers, 16 pixels have it for 32",
        ),
        ({"evaluate__compare": "0"}, "compare: expected at least 1 and at most episodes=64, got 0"),
    ],
)
def test_what_a_robot_cannot_do_is_refused_in_words(changes: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_dict(Recipe, settings(**changes))
    assert said in str(error.value)


def test_a_robot_may_be_left_unmeasured_and_a_simulator_not() -> None:
    unmeasured = {"evaluate__episodes": "0", "evaluate__compare": "0"}
    assert from_dict(Recipe, settings(**unmeasured)).evaluate.episodes == 0
    with pytest.raises(ConfigError, match="expected at least 1 where a simulator can play them, got 0"):
        from_dict(Recipe, settings(**unmeasured, recorded="None") | {"recorded": None})


def test_words_that_the_policy_does_not_read_are_refused() -> None:
    with pytest.raises(ConfigError, match="use size='libero_small', or name its tokenizer's folder"):
        open_environment(from_dict(Recipe, settings(recorded__words="libero")))
