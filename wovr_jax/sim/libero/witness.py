"""The real LIBERO before an audit: trials played again with every frame, and actions followed from recorded states."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from wovr_jax.core import processes, sharding
from wovr_jax.data import starts as start_states
from wovr_jax.data.starts import Starts
from wovr_jax.sim.arena import Actor, Course
from wovr_jax.sim.libero import collect, worker
from wovr_jax.sim.libero.actors import on_own_devices
from wovr_jax.sim.libero.arena import Libero
from wovr_jax.sim.libero.pool import Lost, Pool
from wovr_jax.sim.libero.setup import LiberoError
from wovr_jax.sim.libero.tasks import DRAWN, Trial
from wovr_jax.sim.witness import Played, stack_episodes
from wovr_jax.types import Episode, Imagined, Start


class LiberoWitness:
    """A suite of LIBERO before an audit; see ``sim.witness.Witness``.

    Args:
      arena: the suite.
    """

    def __init__(self, arena: Libero):
        self.arena, self.steps, self.hold = arena, arena.steps, arena.hold

    def play(self, count: int, actor: Actor) -> Iterator[Played]:
        """Yields the trials of ``measure`` again, to the end and with every frame; each process plays its rows."""
        arena, batch, wanted = self.arena, self.arena.batch, self.arena.trials("evaluate", count)
        row_B, put = sharding.rows(batch)
        parts = [wanted[low : low + batch] for low in range(0, count, batch)]
        # The last batch is filled up with its own trials again.
        mine = [[part[row % len(part)] for row in row_B] for part in parts]
        turn = -(-arena.cfg.workers // len(row_B))  # batches that keep all workers busy
        with arena.progress(count, "comparison") as bar, arena.pool(min(count, turn * len(row_B))) as pool:
            for low in range(0, len(parts), turn):
                batches = self._play_batches(pool, actor, mine[low : low + turn])
                for part, rows in zip(parts[low:], batches, strict=False):
                    start, rolled = put(rows) if processes.count() > 1 else rows
                    yield Played(start, rolled, len(part))
                    bar.update(len(part))

    def _play_batches(
        self, pool: Pool, actor: Actor, batches: Sequence[Sequence[Trial]]
    ) -> Iterator[tuple[Start, Imagined]]:
        """Yields the rows of some batches, on the host; trials that fill a batch up are played once."""
        arena, wanted = self.arena, list(dict.fromkeys(itertools.chain(*batches)))
        with on_own_devices(actor) as own:
            outcomes = arena.finish(arena.roll_whole(own)(pool, wanted), wanted)
            episode_of = {outcome.trial: outcome.episode for outcome in outcomes if outcome.episode is not None}
            episodes = [[episode_of[trial] for trial in batch] for batch in batches]
            # In here, as they are computed: by the devices of this process alone.
            starts = [self._starts(batch) for batch in episodes]
        for start, batch in zip(starts, episodes, strict=True):
            yield start, stack_episodes(batch, arena.prompt_KL, arena.chunk)

    def _starts(self, episodes: Sequence[Episode]) -> Start:
        table = start_states.initial(episodes, memory=self.arena.memory, intervened=True)
        return sharding.host(start_states.gather(table, jnp.arange(len(episodes)), jnp.asarray(self.arena.prompt_KL)))

    def follow(self, table: Starts, row_K: np.ndarray, action_KSA: np.ndarray, film: bool = False) -> Course:
        """Returns the true success after each of S actions that are played on from K start states.

        What was played up to a start state brings the simulator there, so it has to be of an episode of this suite. A
        success holds on; nothing is played after it, nor after the end of the episode.

        Args:
          table: start states.
          row_K: rows of the table.
          action_KSA: (K, S, 7) actions from there on.
          film: whether it is drawn; what is not played has the last frame that was.

        Raises:
          LiberoError: a row that does not say where its episode began, or one that was lost as often as it was begun.
        """
        arena, step_K, played_KSA = self.arena, np.asarray(table.step_K), np.asarray(table.played_KSA)
        jobs = []
        for row, action_SA in zip(row_K.tolist(), np.asarray(action_KSA), strict=True):
            whole_SA = np.concatenate([played_KSA[row, : step_K[row]], action_SA])
            jobs.append((self._trial_of(table, row), arena.rules(stops=True), whole_SA, int(step_K[row]), film))
        # Task by task: a worker that changes its task builds another scene.
        order = sorted(range(len(jobs)), key=lambda k: jobs[k][0].task.index)
        # Frames are too many to be sent around: where they are wanted each process plays all rows.
        mine, flags, frames = order if film else order[processes.index() :: processes.count()], [], {}
        size = arena.cfg.scene.size if film else 0
        with arena.progress(len(mine), "true course") as bar, arena.pool(len(mine), size=size) as pool:
            for number, played in pool.map(worker.replay, [jobs[k] for k in mine], tries=3):
                if isinstance(played, Lost):
                    raise LiberoError(f"{jobs[mine[number]][0]} was lost every time: {played.reason}")
                frames[mine[number]] = played[1]
                flags.append((mine[number], played[0].tolist()))
                bar.update()
        every = dict(itertools.chain(*processes.gather(flags, "follow their rows", wait_s=collect.PATIENCE_S)))
        success_KS = np.array([every[k] for k in range(len(jobs))], bool)
        return success_KS, np.array([frames[k] for k in range(len(jobs))]) if film else None

    def _trial_of(self, table: Starts, row: int) -> Trial:
        """Returns the trial that the episode of a start state was."""
        task, init, seed = (int(np.asarray(column)[row]) for column in (table.task_K, table.init_K, table.seed_K))
        # Tables of before initial states were kept say BY_SEED of every row.
        if init == start_states.UNKNOWN or (init == DRAWN and self.arena.cfg.train_inits):
            raise LiberoError(
                f"start state {row} does not say from which initial state its episode began, so nothing can be played "
                "from there. It has to be of an episode that this suite recorded; choose start states anew."
            )
        return Trial(self.arena.suite[task], init, seed)
