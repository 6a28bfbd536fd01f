"""Opens what a run made, for somebody to play in: a policy, a world model with its judge, and start states.

The folder is only read, and nothing of it is claimed, so a run that is still going can be played in as well. Of an
embedded suite the true simulator comes along; LIBERO's cannot follow a compiled program, and its runs have the learned
world only.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Callable, Sequence

import jax
import numpy as np

from wovr_jax.core import keys
from wovr_jax.core.disk import read_json
from wovr_jax.data import episodes as disk
from wovr_jax.data import normalize
from wovr_jax.data import starts as start_states
from wovr_jax.data.starts import Starts
from wovr_jax.policy import vla
from wovr_jax.policy.actions import Codec
from wovr_jax.policy.tokenizer import Tokenizer
from wovr_jax.run.bind import assets_folder, read_words
from wovr_jax.run.folder import MARK
from wovr_jax.run.reader import read_recipe
from wovr_jax.run.recipe import Recipe
from wovr_jax.run.stages.policy import load_policy, start_policy
from wovr_jax.run.stages.reward import Judge, load_reward, start_reward
from wovr_jax.run.stages.starts import read_starts
from wovr_jax.run.stages.world import load_world, start_world
from wovr_jax.sim.embedded import Simulator, suite_of
from wovr_jax.types import Params
from wovr_jax.weights import native
from wovr_jax.world import model as world_model
from wovr_jax.world.model import WorldConfig

BEGUN = 96
"""Episodes whose first frames are start states where the run has chosen none yet."""


class PlayError(ValueError):
    """Tells why a folder cannot be played in, and what to do about it."""


@dataclasses.dataclass(frozen=True)
class Source:
    """What is played with; weights lie on the device.

    Attributes:
      name: of the run.
      recipe: its settings.
      suite: the environment's name.
      instructions: what the robot may be asked to do, by task index.
      prompt_KL: (tasks, L) int32 prompt tokens of every instruction.
      sim: the true simulator; None where it is no compiled program (LIBERO).
      codec: between action tokens and environment actions.
      policy, policy_stage: plain weights, and the stage that made them; the name of those that the run was given.
      world_cfg, world, world_round: the world model with its VAE's statistics, its weights, the round of its training.
      judge: the success classifier that was trained on it; None where that is not finished yet.
      starts: where episodes may begin, host arrays.
    """

    name: str
    recipe: Recipe
    suite: str
    instructions: tuple[str, ...]
    prompt_KL: np.ndarray
    sim: Simulator | None
    codec: Codec
    policy: Params
    policy_stage: str
    world_cfg: WorldConfig
    world: Params
    world_round: int
    judge: Judge | None
    starts: Starts

    @property
    def world_name(self) -> str:
        """The stage that made the world model, or the name of the weights that the run was given."""
        given = not self.recipe.world_train.steps
        return pathlib.Path(self.recipe.world_weights).stem if given else f"world-{self.world_round}"


def open_run(folder: str | os.PathLike, round_: int | None = None, world_round: int | None = None) -> Source:
    """Opens a run folder, finished or not.

    Args:
      folder: the run.
      round_: which policy: 0 is the base policy, k the policy after k rounds; by default the last finished one.
      world_round: the round of the world model's training, from 0; by default the last finished one.

    Raises:
      PlayError: no run folder, or no such policy or world model in it yet.
      ConfigError: settings that this version does not know, or weights from outside that are gone.
    """
    folder = pathlib.Path(folder).expanduser().absolute()
    recipe = _read_recipe(folder)
    # By name, as the stages draw: weights that a run begins with at random are then the same here.
    key = functools.partial(keys.key, recipe.seed)
    world_round = _choose_world(folder, world_round, frozen=not recipe.world_train.steps)
    starts, instructions = _read_starts(folder, recipe, world_round)
    world_cfg, world = _read_world(folder, recipe, world_round, key)
    policy, policy_stage = _read_policy(folder, recipe, round_, key)
    prompt_KL, codec = _read_words(folder, recipe, instructions)
    return Source(
        name=folder.name,
        recipe=recipe,
        suite=_name_suite(recipe),
        instructions=instructions,
        prompt_KL=prompt_KL,
        sim=None if recipe.outside else recipe.embedded,
        codec=codec,
        policy=policy,
        policy_stage=policy_stage,
        world_cfg=world_cfg,
        world=world,
        world_round=world_round,
        judge=_read_judge(folder, recipe, world_round, instructions, key),
        starts=starts,
    )


def _read_recipe(folder: pathlib.Path) -> Recipe:
    try:
        settings = read_json(folder / "config.json")
    except (OSError, ValueError) as error:
        raise PlayError(
            f"{folder} is not a run folder: its config.json cannot be read ({error}). Runs are made by launch/train.py."
        ) from error
    if not isinstance(settings, dict) or not {"policy", "world"} <= settings.keys():
        raise PlayError(f"{folder / 'config.json'} is not the configuration of a run: no policy and world in it.")
    return read_recipe(settings)


def _name_suite(recipe: Recipe) -> str:
    if recipe.recorded:
        return recipe.recorded.name
    return recipe.libero.suite if recipe.libero else suite_of(recipe.embedded).name


def _find_rounds(folder: pathlib.Path, kind: str) -> list[int]:
    """Returns the rounds of the finished stages ``<kind>-<round>``, in ascending order."""
    names = (mark.parent.name for mark in folder.glob(f"stages/{kind}-*/{MARK}"))
    return sorted(int(name.removeprefix(f"{kind}-")) for name in names if re.fullmatch(rf"{kind}-\d+", name))


def _choose_world(folder: pathlib.Path, asked: int | None, *, frozen: bool) -> int:
    """Returns the round of the world model to play in; a frozen one is the same in every round."""
    if frozen:
        return 0
    there = _find_rounds(folder, "world")
    if not there or (asked is not None and asked not in there):
        wanted = "a finished world model" if asked is None else f"a world model of round {asked}"
        has = ", ".join(f"round {k}" for k in there) or "none yet"
        raise PlayError(f"{folder}: expected {wanted}, found {has}. Let the run go on, or choose one with --world.")
    return there[-1] if asked is None else asked


def _read_world(folder: pathlib.Path, recipe: Recipe, round_: int, key: Callable) -> tuple[WorldConfig, Params]:
    """Returns the world model's settings with the VAE's statistics, and ``{"dit": ..., "vae": ...}``."""
    name, where = (recipe.vae, assets_folder(recipe)) if recipe.vae else ("vae", folder / "stages" / "vae")
    vae_cfg, vae = native.load_asset(name, where)
    cfg = dataclasses.replace(recipe.world, vae=vae_cfg)

    def start() -> Params:
        return start_world(cfg, recipe.world_weights, key)

    def read(k: int) -> Params:
        # Adapters of a refresh sit beside the weights of the round before.
        before = start if k == 0 else functools.partial(read, k - 1)
        return load_world(cfg, recipe.world_train, before, folder / "stages" / f"world-{k}")

    dit = read(round_) if recipe.world_train.steps else start()
    return cfg, world_model.for_use(cfg, jax.tree.map(jax.numpy.asarray, {"dit": dit, "vae": vae}))


def _read_judge(
    folder: pathlib.Path, recipe: Recipe, world_round: int, instructions: Sequence[str], key: Callable
) -> Judge | None:
    """Returns the classifier of the world model's round, or of the last one before that is finished."""
    if not recipe.reward_train.steps:
        return Judge(
            start_reward(recipe.reward, recipe.reward_weights, instructions, key), recipe.reward_train.threshold
        )
    earlier = [k for k in _find_rounds(folder, "reward") if k <= world_round]
    if not earlier:
        return None
    stage = folder / "stages" / f"reward-{earlier[-1]}"
    return Judge(load_reward(recipe.reward, stage), float(read_json(stage / MARK)["threshold"]))


def _read_policy(folder: pathlib.Path, recipe: Recipe, round_: int | None, key: Callable) -> tuple[Params, str]:
    """Returns plain weights and the name of the stage that made them."""
    stages = {k: f"grpo-{k}" for k in _find_rounds(folder, "grpo")}
    if not recipe.sft.steps or (folder / "stages" / "sft" / MARK).exists():
        stages = {0: "sft"} | stages
    if not stages or (round_ is not None and round_ not in stages):
        wanted = "a finished policy" if round_ is None else f"a policy of round {round_}"
        has = ", ".join(f"round {k} ({stages[k]})" for k in sorted(stages)) or "none yet"
        raise PlayError(f"{folder}: expected {wanted}, found {has}. Let the run go on, or choose one with --round.")
    chosen = max(stages) if round_ is None else round_
    name, use = stages[chosen], vla.for_use(recipe.policy)
    if chosen == 0 and not recipe.sft.steps:
        params = start_policy(recipe.policy, recipe.policy_weights, recipe.towers, assets_folder(recipe), key)
        return use(params), pathlib.Path(recipe.policy_weights).stem
    return use(load_policy(recipe.policy, folder / "stages" / name)), name


def _read_starts(folder: pathlib.Path, recipe: Recipe, world_round: int) -> tuple[Starts, tuple[str, ...]]:
    """Returns start states of when the world model was trained, and the instructions of the environment."""
    known = recipe.recorded or suite_of(recipe.embedded)
    names = None if recipe.libero else known.instructions
    if recipe.start_states and names is not None:
        given = read_starts(recipe.start_states, 0.0, recipe.world.slots, recipe.frame, names)
        assert given is not None
        return given, names
    where = pathlib.Path(recipe.start_states).expanduser() if recipe.start_states else None
    rounds = [k for k in _find_rounds(folder, "starts") if k <= world_round]
    if where is None and rounds:
        where = folder / "stages" / f"starts-{rounds[-1]}" / "starts"
    if where is not None:
        # The instructions of a LIBERO suite stand beside its start states; so LIBERO need not be installed.
        told = tuple(read_json(where / start_states.INDEX)["meta"].get("tasks", ()))
        return start_states.load(where), names or told or _list_tasks(folder)
    # Not chosen yet: whatever episodes there are began somewhere.
    episodes = next((path for path in _episode_folders(folder)), None)
    if episodes is None:
        raise PlayError(f"{folder}: expected episodes that start states can be taken from, found none yet.")
    source = disk.EpisodeSource(episodes)
    begun = [source[e] for e in range(min(len(source), BEGUN))]
    return start_states.initial(begun, memory=recipe.world.slots, intervened=True), names or _list_tasks(folder)


def _episode_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the finished collections, the newest first, and the demonstrations."""
    stages = [f"collect-{k}" for k in reversed(_find_rounds(folder, "collect"))] + ["demonstrations"]
    return [folder / "stages" / name / "episodes" for name in stages if (folder / "stages" / name / MARK).exists()]


def _list_tasks(folder: pathlib.Path) -> tuple[str, ...]:
    """Returns the instructions that the run's episodes had, by task index; those of tasks without one are empty."""
    known: dict[int, str] = {}
    for path in _episode_folders(folder):
        known |= {int(task): about["instruction"] for task, about in disk.manifest(path)["tasks"].items()}
    return tuple(known.get(task, "") for task in range(max(known, default=-1) + 1))


def _read_words(folder: pathlib.Path, recipe: Recipe, instructions: Sequence[str]) -> tuple[np.ndarray, Codec]:
    """Returns the prompt tokens of every instruction, and the codec between the policy's tokens and actions."""
    libero, robot, name = recipe.libero, recipe.recorded, _name_suite(recipe)
    words = robot.words if robot else "libero" if libero else name
    if release := recipe.outside and recipe.outside.release:
        prompt_KL = read_words(recipe.policy, words, instructions, release)
    else:
        prompt_KL = getattr(Tokenizer, words)().prompts(tuple(instructions))
    if libero and libero.release:
        statistics = normalize.load(libero.release, libero.suite)
        return prompt_KL, Codec.from_statistics(statistics["action"])
    # Computed again as the run did it: from the demonstrations, never from later episodes.
    demonstrations = disk.read(folder / "stages" / "demonstrations" / "episodes")
    codec = Codec.from_statistics(normalize.statistics(demonstrations, name)[name]["action"])
    return prompt_KL, codec
