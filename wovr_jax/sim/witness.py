"""What an audit asks of a true environment: rollouts to be imagined again, and the true course of given actions.

A training asks for neither, so that whoever reads how training works need not read how LIBERO answers. Which witness
belongs to which arena, ``audit.witnesses`` says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from wovr_jax.core.pixels import to_float
from wovr_jax.data.starts import Starts
from wovr_jax.sim.arena import Actor, Course, layouts, true_rollout
from wovr_jax.sim.embedded import Embedded, make_starts
from wovr_jax.types import Episode, Imagined, Start


class Played(NamedTuple):
    """A batch of true rollouts with every frame; rows from ``count`` on are padding.

    Attributes:
      start: where they began; without the state of a simulator, as imagination knows it.
      rollout: what happened.
      count: of the rows that were asked for.
    """

    # Padded to one size, since what replays them is one compiled program.
    start: Start
    rollout: Imagined
    count: int


class Witness(Protocol):
    """A true environment that can show what happened, and what would have.

    Attributes:
      steps: of an episode, a multiple of the chunk.
      hold: control steps of the environment in each of them; 0 where nothing is played to show it.
    """

    @property
    def steps(self) -> int:
        """See above."""
        ...

    @property
    def hold(self) -> int:
        """See above."""
        ...

    def play(self, count: int, actor: Actor) -> Iterator[Played]:
        """Rollouts from the first ``count`` start states of the evaluation, batch by batch."""
        ...

    def follow(self, table: Starts, row_K: np.ndarray, action_KSA: np.ndarray, film: bool = False) -> Course:
        """True success of actions that were chosen elsewhere, played from the very states of start-state rows.

        The simulator is brought to each state as the episode came there: reset by ``seed_K``, then ``played_KSA`` up to
        ``step_K``. From there it plays the actions, a policy step each.

        Args:
          table: start states; its seeds are of layouts of this arena (``layouts``), whatever their purpose.
          row_K: rows of the table, some of them perhaps more than once.
          action_KSA: (K, S, A) environment actions from each of these rows.
          film: whether frames are wanted.

        Returns:
          Success, and frames if wanted. What comes after the first success, or after the
          episode's own end (step ``steps``, counted from its reset), nobody looks at: it need not be played.
        """
        ...


class EmbeddedWitness:
    """An embedded simulator before an audit; see :class:`Witness`.

    Args:
      arena: the simulator.
    """

    def __init__(self, arena: Embedded):
        self.arena, self.steps, self.hold, self.follow = arena, arena.steps, arena.hold, arena.follow

    def play(self, count: int, actor: Actor) -> Iterator[Played]:
        """Yields rollouts on the device."""
        arena = self.arena
        for seeds, rollout in arena.roll(layouts(arena.seed, "evaluate", count), actor):
            padded_B = jnp.asarray(np.resize(seeds, arena.batch))
            start = make_starts(padded_B, arena.prompt_KL, arena.sim, arena.memory)
            # Imagination begins from what a camera sees, not from the simulator's state.
            yield Played(dataclasses.replace(start, sim=None), rollout, len(seeds))


def stack_episodes(episodes: Sequence[Episode], prompt_KL: np.ndarray, chunk: int) -> Imagined:
    """Returns episodes of one length as a batch of rollouts, with video.

    To be looked at, not learnt from: episodes do not keep tokens, which are zero here as their log-probabilities are.
    """
    frame_BSHWC = to_float(np.stack([episode.frame_SHWC for episode in episodes]))
    action_BSA = np.stack([episode.action_SA for episode in episodes])
    # (B, S, A) -> (B, N, T, A); of the S + 1 frames the first of each chunk is what the policy saw.
    action_BNTA = action_BSA.reshape(len(episodes), -1, chunk, action_BSA.shape[-1])
    success_BS = np.stack([episode.success_S[1:] for episode in episodes])
    return true_rollout(
        frame_BNHWC=frame_BSHWC[:, :-1:chunk],
        task_B=np.array([episode.task for episode in episodes], np.int32),
        prompt_KL=prompt_KL,
        token_BNTA=np.zeros(action_BNTA.shape, np.int32),
        logp_BNTA=np.zeros(action_BNTA.shape, np.float32),
        action_BNTA=action_BNTA,
        success_BNT=success_BS.reshape(action_BNTA.shape[:3]),
        video_BNTHWC=frame_BSHWC[:, 1:].reshape(*action_BNTA.shape[:3], *frame_BSHWC.shape[2:]),
    )
