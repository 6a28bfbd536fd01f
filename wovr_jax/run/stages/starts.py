"""The stage that chooses where imagined rollouts begin: episode starts, and keyframes of failures (KIR)."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from wovr_jax.core.config import ConfigError
from wovr_jax.core.disk import read_json
from wovr_jax.data import starts as start_states
from wovr_jax.data.records import EpisodesError
from wovr_jax.data.starts import Starts, StartsConfig
from wovr_jax.run.folder import Product, Run
from wovr_jax.run.stages.episodes import join_rounds
from wovr_jax.types import Episode


def choose_starts(
    run: Run,
    cfg: StartsConfig,
    given: Starts | None,
    memory: int,
    steps: int,
    seed: int,
    instructions: Sequence[str],
    round_: int,
    rollouts: Sequence[Product[Sequence[Episode]]],
) -> Product[Starts]:
    """The start states of a round.

    Args:
      run: the run.
      round_: the round.
      cfg: share and rule of the keyframes.
      given: those of every round, from outside the run; None where the run chooses.
      rollouts: true episodes of every round so far: a rollout may begin where any of them began, or at a keyframe of
        one of the newest.
      memory: M, memory frames of a start state.
      steps: of an episode.
      seed: of the run, for the choice among keyframes.
      instructions: of the environment, in the order of its task numbers; they are written down.
    """
    if given is not None:
        return Product(lambda: given)
    name = f"starts-{round_}"

    def make(folder: pathlib.Path) -> dict[str, Any]:
        # Every episode that was ever begun shows a true first frame, so those of all rounds serve.
        begun = join_rounds(rollouts)
        table = start_states.initial(begun, memory=memory)
        if cfg.share:
            # Keyframes are of the newest policy's failures alone: what it fails at today is what it has to learn.
            rng = np.random.default_rng([seed, round_])
            keys = start_states.keyframes(rollouts[-1].value, cfg, rng, steps=steps, memory=memory)
            table = start_states.join(table, keys)
        start_states.save(folder / "starts", table, meta={"tasks": list(instructions)}, overwrite=True)
        # Keyframes stand behind the episode starts.
        at, rules = (np.asarray(column[table.initials :]) for column in (table.step_K, table.rule_K))
        counts = {rule: int((rules == i).sum()) for i, rule in enumerate(start_states.RULES) if (rules == i).any()}
        # Episodes that nothing begins in, because their end was not the policy's own.
        left_out = sum(map(start_states.is_intervened, begun))
        return {"initials": table.initials, "steps": at.tolist(), "rules": counts, "intervened": left_out}

    return run.stage(name, make, lambda folder: start_states.load(folder / "starts"))


def read_starts(
    where: str, share: float, memory: int, frame: tuple[int, int], instructions: Sequence[str], followed: bool = False
) -> Starts | None:
    """Start states from outside the run, under the task numbers of its environment.

    Args:
      where: a folder that ``data.starts.save`` wrote: of another run, or of ``data_prep.rlinf_starts``; empty for none.
      share: of the groups, to begin at keyframes.
      memory: M, memory frames of the world model.
      frame: height and width of the environment's frames.
      instructions: of the environment, in the order of its task numbers.
      followed: whether a simulator that knows its episodes by their initial states plays on from them (``audit``).

    Raises:
      ConfigError: nothing there, or start states that do not fit these.
    """
    if not where:
        return None
    folder = pathlib.Path(where).expanduser()
    try:
        table = start_states.load(folder)
    except EpisodesError as error:
        raise ConfigError(f"config.start_states: {error}") from error
    # Tables of before do not say what their tasks are; they are then those of the environment.
    names = read_json(folder / start_states.INDEX)["meta"].get("tasks", list(instructions))
    shape, used = table.memory_KMHWC.shape[1:], np.unique(table.task_K)
    strange = [int(task) for task in used if not 0 <= task < len(names) or names[task] not in instructions]
    keyframes = len(table) - table.initials
    faults = {
        f"expected {memory} memory frames, as the world model has (world.memory), got {shape[0]}": shape[0] != memory,
        f"expected frames of {frame} pixels, as the environment draws them, got {shape[1:3]}": (
            {shape[1:3], table.anchor_KHWC.shape[1:3]} != {frame}
        ),
        f"expected tasks of the environment, got {[names[t] if 0 <= t < len(names) else t for t in strange]}": strange,
        f"expected keyframes for starts.share={share}, got episode starts only; use starts.share=0": (
            share and not keyframes
        ),
        "expected initial states, which a simulator would begin in to follow; use evaluate.closed=0": (
            followed and (table.init_K == start_states.UNKNOWN).any()
        ),
    }
    if wrong := [what for what, is_so in faults.items() if is_so]:
        raise ConfigError(f"config.start_states: {folder}: {'; '.join(wrong)}")
    number_T = np.array([instructions.index(name) if name in instructions else -1 for name in names], np.int32)
    return dataclasses.replace(table, task_K=number_T[table.task_K])
