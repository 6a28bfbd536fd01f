"""A robot before an audit: its recorded evaluation can be imagined again; what it never did, nobody can show."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from wovr_jax.data import episodes as disk
from wovr_jax.data import starts as start_states
from wovr_jax.data.records import EpisodesError
from wovr_jax.data.starts import Starts
from wovr_jax.sim.arena import Actor, Course
from wovr_jax.sim.recorded.arena import Recorded, RecordedError
from wovr_jax.sim.witness import Played, stack_episodes
from wovr_jax.types import NULL_ACTION, Episode


class RecordedWitness:
    """A robot's recorded evaluation before an audit; see ``sim.witness.Witness``.

    Args:
      arena: the robot.
      prompt_KL: (tasks, L) int32 prompt tokens of every task.
      batch: episodes at once.
      chunk: steps of a chunk.
      memory: M, memory frames of a start state.
    """

    hold = 0  # what was recorded once is only read

    def __init__(self, arena: Recorded, prompt_KL: np.ndarray, *, batch: int, chunk: int, memory: int):
        self.arena, self.steps, self.prompt_KL = arena, arena.steps, np.asarray(prompt_KL)
        self.batch, self.chunk, self.memory = batch, chunk, memory

    def play(self, count: int, actor: Actor) -> Iterator[Played]:
        """Yields the first ``count`` episodes of the policy's recorded evaluation, on the host.

        Shorter ones are filled up to the longest possible: the picture stands still, and the action is no motion with
        the fingers as they were.

        Raises:
          RecordedError: an actor whose evaluation was not recorded.
        """
        folder = self._find(actor)
        source = disk.EpisodeSource(folder)
        for low in range(0, count, self.batch):
            rows = range(low, min(low + self.batch, count))
            episodes = [_fill_up(source[row], self.steps) for row in rows]
            # Padded to one size, since what replays them is one compiled program.
            batch = [episodes[row % len(episodes)] for row in range(self.batch)]
            table = start_states.initial(batch, memory=self.memory, intervened=True)
            start = start_states.gather(table, jnp.arange(self.batch), jnp.asarray(self.prompt_KL))
            yield Played(start, stack_episodes(batch, self.prompt_KL, self.chunk), len(rows))

    def _find(self, actor: Actor) -> pathlib.Path:
        # Named as the policy's rounds are: base, grpo-1, ...
        round_ = actor.name.removeprefix("grpo-") if actor.name.startswith("grpo-") else "0"
        folder = self.arena.run / "stages" / f"evaluate-{round_}" / "greedy"
        try:
            disk.manifest(folder)
        except EpisodesError as error:
            raise RecordedError(f"{actor.name}: there is no recorded evaluation of this policy ({error})") from error
        return folder

    def follow(self, table: Starts, row_K: np.ndarray, action_KSA: np.ndarray, film: bool = False) -> Course:
        """Refuses: what a robot would have done, no recording tells.

        Raises:
          RecordedError: always.
        """
        del table, row_K, action_KSA, film
        raise RecordedError(
            "recorded episodes cannot tell what other actions would have led to, so nothing can be followed in truth. "
            "Leave the closed loop out (evaluate.closed=0), or record more episodes and replay those."
        )


def _fill_up(episode: Episode, steps: int) -> Episode:
    """Returns an episode that goes on to ``steps`` steps in which nothing happens."""
    rest = steps - len(episode.action_SA)
    still_A = np.array([*NULL_ACTION[:-1], episode.action_SA[-1, -1]], np.float32)
    return dataclasses.replace(
        episode,
        frame_SHWC=np.concatenate([episode.frame_SHWC, np.repeat(episode.frame_SHWC[-1:], rest, axis=0)]),
        action_SA=np.concatenate([episode.action_SA, np.tile(still_A, (rest, 1))]),
        success_S=np.pad(episode.success_S, (0, rest), mode="edge"),
    )
