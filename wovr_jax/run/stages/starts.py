"""The stage that chooses where imagined rollouts begin: episode starts, and keyframes of failures (KIR)."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from wovr_jax.data import starts as start_states
from wovr_jax.data.starts import Starts, StartsConfig
from wovr_jax.run.folder import Product, Run
from wovr_jax.run.stages.episodes import join_rounds
from wovr_jax.types import Episode


def choose_starts(
    run: Run,
    cfg: StartsConfig,
    memory: int,
    steps: int,
    seed: int,
    round_: int,
    rollouts: Sequence[Product[Sequence[Episode]]],
) -> Product[Starts]:
    """The start states of a round.

    Args:
      run: the run.
      round_: the round.
      cfg: share and rule of the keyframes.
      rollouts: true episodes of every round so far: a rollout may begin where any of them began, or at a keyframe of
        one of the newest.
      memory: M, memory frames of a start state.
      steps: of an episode.
      seed: of the run, for the choice among keyframes.
    """
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
        start_states.save(folder / "starts", table, overwrite=True)
        # Keyframes stand behind the episode starts.
        at, rules = (np.asarray(column[table.initials :]) for column in (table.step_K, table.rule_K))
        counts = {rule: int((rules == i).sum()) for i, rule in enumerate(start_states.RULES) if (rules == i).any()}
        # Episodes that nothing begins in, because their end was not the policy's own.
        left_out = sum(map(start_states.is_intervened, begun))
        return {"initials": table.initials, "steps": at.tolist(), "rules": counts, "intervened": left_out}

    return run.stage(name, make, lambda folder: start_states.load(folder / "starts"))
