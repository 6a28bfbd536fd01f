"""The scripted expert in many environments at once: the demonstrations of a run, or of whoever asks for some.

Training does not import this file, nor the expert: ``launch/tools/demonstrate_libero.py`` is a program of its own,
which a run calls and whose episodes it reads.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from wovr_jax.sim.libero import expert
from wovr_jax.sim.libero.arena import Libero, halves
from wovr_jax.sim.libero.pool import Lost, Pool
from wovr_jax.sim.libero.rollout import Outcome, give_up, record
from wovr_jax.sim.libero.tasks import EvaluationProtocol, LiberoConfig, LiberoExpertConfig, Trial


def demonstrations(
    pool: Pool,
    wanted: Iterable[Trial],
    protocol: EvaluationProtocol,
    cfg: LiberoExpertConfig | None = None,
    *,
    draw: str = "all",
    tries: int = 3,
) -> Iterator[Outcome]:
    """Runs the scripted expert in every trial; each runs within one worker, as workers come free.

    Args:
      pool: the environments.
      wanted: the trials.
      protocol: how episodes begin, and their horizon.
      cfg: how demonstrations are made.
      draw: ``"all"`` to record episodes, ``"none"`` to see only whether they succeed.
      tries: how often a trial is begun whose worker is lost.

    Yields:
      an outcome for each trial, in the order in which they end.

    Raises:
      LiberoError: a trial was given up before any had been played.
    """
    # The expert acts within its worker, so frames do not travel between the processes at every step.
    cfg, begun = cfg or LiberoExpertConfig(), False
    left: list[tuple[Trial, tuple[str, ...]]] = [(trial, ()) for trial in wanted]
    while left:
        turn, left = left, []
        jobs = [(trial, protocol, cfg, draw) for trial, _ in turn]
        for number, answer in pool.map(expert.demonstrate, jobs):
            trial, lost = turn[number]
            if isinstance(answer, Lost):
                lost = (*lost, answer.reason)
                print(f"{trial}: {answer.reason}", file=sys.stderr, flush=True)
                if len(lost) < tries:
                    left.append((trial, lost))
                else:
                    yield give_up(trial, lost, begun)
                continue
            begun = True
            success = any(part.success_T.any() for part in answer.observed)
            episode = None
            if draw == "all":
                origin = {"protocol": protocol.name, "renderer": pool.renderer, "flaw": answer.flaw}
                # Executed actions beside labels: a world model learns from what was done, a policy from what was meant.
                episode = record(trial, answer.observed, answer.action_SA, answer.label_SA, "expert", origin)
            yield Outcome(trial, bool(success), len(answer.action_SA), len(lost) + 1, lost, episode)


def demonstrate_run(folder: pathlib.Path, cfg: LiberoConfig, *, seed: int, count: int, validation: int) -> None:
    """Writes the demonstrations of a run: ``count`` episodes into ``folder/episodes``, the rest into another one.

    What an interrupted call has left is used, and what is there whole is not made again.

    Args:
      folder: of the run's stage.
      cfg: of the run.
      seed: of the run.
      count, validation: how many episodes to learn from, and how many to be judged on.
    """
    # No policy enters this arena; batch, chunk, memory and prompts are a policy's.
    arena = Libero(cfg, seed=seed, batch=1, chunk=1, memory=1, prompt_KL=np.zeros((0, 0), np.int32))
    wanted = arena.trials("demonstrations", count + validation)

    def play(pool: Pool, trials: Sequence[Trial]) -> Iterable[Outcome]:
        return demonstrations(pool, trials, arena.rules(stops=False), cfg.expert)

    for name, half in halves(count).items():
        arena.record(folder / name, wanted[half], play)
