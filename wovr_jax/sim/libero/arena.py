"""The real LIBERO as an arena: worker processes step it, the policy acts between chunks in one compiled program.

Demonstrations and collections begin in layouts that the tasks draw, or in the initial states named for training;
evaluation and comparison begin in official initial states that training does not see. A trial's course depends on the
trial, the policy and its key alone, so whatever was interrupted goes on where it stood.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from wovr_jax.core import config, processes, sharding
from wovr_jax.core.pixels import to_float
from wovr_jax.data import episodes as disk
from wovr_jax.data import starts as start_states
from wovr_jax.sim.arena import Actor, Groups, Measured, Played, layouts
from wovr_jax.sim.libero import collect, hosts, rollout, setup
from wovr_jax.sim.libero.pool import Pool
from wovr_jax.sim.libero.rollout import Outcome, View
from wovr_jax.sim.libero.setup import LiberoError
from wovr_jax.sim.libero.tasks import DRAWN, EvaluationProtocol, LiberoConfig, Trial, draw_seed, protocol, tasks
from wovr_jax.types import Array, Episode, Imagined, Start


class Libero:
    """A suite of LIBERO; see ``sim.arena.Arena``.

    Args:
      cfg: suite, tasks, scene, workers, where episodes begin.
      seed: of the run.
      batch: rows of a batch of rollouts that are compared.
      chunk: actions that the policy chooses at once.
      memory: M, memory frames of a start state.
      prompt_KL: (tasks, L) int32 prompt tokens of every instruction.

    Raises:
      LiberoError: LIBERO is not installed, or a task that the suite does not have.
    """

    def __init__(self, cfg: LiberoConfig, *, seed: int, batch: int, chunk: int, memory: int, prompt_KL: np.ndarray):
        self.cfg, self.seed, self.batch, self.chunk, self.memory = cfg, seed, batch, chunk, memory
        self.name, self.steps, self.hold = cfg.suite, cfg.steps, cfg.scene.hold
        suite = tasks(cfg.suite)
        if wrong := [index for index in cfg.tasks if not 0 <= index < len(suite)]:
            raise LiberoError(f"{cfg.suite} has tasks 0 to {len(suite) - 1}, and {wrong[0]} was asked for.")
        self.tasks = [suite[index] for index in cfg.tasks] or list(suite)
        self.instructions, self.prompt_KL = instructions(cfg.suite), prompt_KL

    # --- where episodes begin ---------------------------------------------------------------

    def trials(self, purpose: str, count: int) -> list[Trial]:
        """``count`` trials for a purpose (see ``sim.arena.layouts``), the tasks taking turns."""
        cfg, seeds = self.cfg, layouts(self.seed, purpose, count).tolist()
        states: Sequence[int] = range(*cfg.train_inits) if cfg.train_inits else (DRAWN,)
        if purpose == "evaluate":
            states = range(*cfg.inits)
            # Whoever measures the same trials measures the same, whatever the seed of the run.
            seeds = [n // (len(self.tasks) * len(states)) for n in range(count)]
        turns = ((self.tasks[n % len(self.tasks)], states[n // len(self.tasks) % len(states)]) for n in range(count))
        return [Trial(task, init, seed) for (task, init), seed in zip(turns, seeds, strict=True)]

    def _protocol(self, *, stops: bool, steps: int = 0) -> EvaluationProtocol:
        """The settings' protocol with ``steps``, if given; ``stops`` where nothing after the first success matters."""
        return dataclasses.replace(protocol(self.cfg.protocol), horizons={self.name: steps or self.steps}, stops=stops)

    def _pool(self, trials: int) -> Pool:
        return Pool(min(self.cfg.workers, trials), self.cfg.scene)

    # --- demonstrations ---------------------------------------------------------------------

    def demonstrate(self, folder: pathlib.Path, key: Array, count: int, validation: int) -> dict[str, Any]:
        """Episodes of the scripted expert, or those in the folder that the settings name."""
        del key  # the expert draws from its own seed and the trial's
        if self.cfg.demonstrations:
            parts = self._given(count, validation)
            facts = [
                disk.write(folder / name, part, meta={"sim": self.name}, overwrite=True) for name, part in parts.items()
            ]
        else:
            wanted = self.trials("demonstrations", count + validation)
            halves = {"episodes": wanted[:count], "validation": wanted[count:]}
            facts = [self._recorded(folder / name, half, self._expert) for name, half in halves.items()]
        return {"episodes": facts[0]["episodes"], "successes": facts[0]["successes"]}

    def _expert(self, pool: Pool, trials: Sequence[Trial]) -> Iterable[Outcome]:
        return rollout.demonstrations(pool, trials, self._protocol(stops=False), self.cfg.expert)

    def _given(self, count: int, validation: int) -> dict[str, list[Episode]]:
        """The first episodes of each task in turn, from the folder that the settings name."""
        where = self.cfg.demonstrations
        by_task: dict[int, list[Episode]] = {task.index: [] for task in self.tasks}
        for episode in disk.EpisodeSource(where):
            self._check(episode, where)
            by_task.get(episode.task, []).append(episode)
        turns = itertools.zip_longest(*by_task.values())
        found = [episode for turn in turns for episode in turn if episode is not None][: count + validation]
        if len(found) < count + validation:
            raise disk.EpisodesError(
                f"{where} has {len(found)} episodes of the tasks asked for; collect.demonstrations={count} and "
                f"collect.validation={validation} need {count + validation}."
            )
        return {"episodes": found[:count], "validation": found[count:]}

    def _check(self, episode: Episode, where: str) -> None:
        size, known = self.cfg.scene.size, self.instructions
        if not (0 <= episode.task < len(known) and known[episode.task] == episode.instruction):
            raise disk.EpisodesError(f"{where}: {episode.instruction!r} is not task {episode.task} of {self.name}.")
        if episode.frame_SHWC.shape[1:3] != (size, size):
            raise disk.EpisodesError(
                f"{where}: frames of {episode.frame_SHWC.shape[1:3]} pixels, the run has {size} (libero.scene.size)."
            )

    # --- rollouts of a policy ---------------------------------------------------------------

    def collect(self, folder: pathlib.Path, purpose: str, count: int, actor: Actor) -> dict[str, Any]:
        """Rollouts over the whole horizon, every frame drawn; in a share of them the gripper is not the policy's."""
        with hosts.alone(actor) as own:
            facts = self._recorded(folder, self.trials(purpose, count), self._whole(own, self.cfg.intervened_share))
        steps = facts["steps"] * self.cfg.scene.hold
        return {"episodes": facts["episodes"], "successes": facts["successes"], "true_steps": steps}

    def measure(self, folder: pathlib.Path, count: int, actor: Actor) -> Measured:
        """Success in any step, a line in ``folder`` for each trial as it ends; one without a verdict is a failure."""
        wanted, asked = self.trials("evaluate", count), [config.to_dict(self._settings()), actor.temperature]
        # Other settings, other lines.
        folder = folder.with_name(f"{folder.name}-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]}")
        folder.mkdir(parents=True, exist_ok=True)

        with hosts.alone(actor) as own, self._bar(count, folder.parent.name) as bar:

            def play(left: Sequence[Trial]) -> Iterator[Outcome]:
                with self._pool(len(left)) as pool:
                    act = acting(own, self.prompt_KL, len(pool))
                    yield from rollout.rollouts(pool, act, left, self._protocol(stops=True), draw="last")

            def tell(_: Mapping[str, Any]) -> None:
                bar.update()

            lines = collect.measure(play, wanted, folder, tell)
        steps = sum(line["steps"] for line in lines) * self.cfg.scene.hold
        return Measured(np.array([bool(line["success"]) for line in lines]), {}, steps)

    def play(self, count: int, actor: Actor) -> Iterator[Played]:
        """The trials of ``measure`` again, to the end and with every frame; of a batch each process plays its rows."""
        batch, wanted = self.batch, self.trials("evaluate", count)
        row_B, put = sharding.rows(batch)
        parts = [wanted[low : low + batch] for low in range(0, count, batch)]
        mine = [[part[row % len(part)] for row in row_B] for part in parts]
        turn = -(-self.cfg.workers // len(row_B))  # batches that keep all workers busy
        with self._bar(count, "comparison") as bar, self._pool(min(count, turn * len(row_B))) as pool:
            for low in range(0, len(parts), turn):
                for part, found in zip(parts[low:], self._played(pool, actor, mine[low : low + turn]), strict=False):
                    start, rolled = put(found) if processes.count() > 1 else found
                    yield Played(start, rolled, len(part))
                    bar.update(len(part))

    def _played(self, pool: Pool, actor: Actor, parts: Sequence[Sequence[Trial]]) -> Iterator[tuple[Start, Imagined]]:
        """The rows of some batches, on the host; trials that fill a batch up are played once."""
        trials = list(dict.fromkeys(itertools.chain(*parts)))
        with hosts.alone(actor) as own:
            outcomes = self._finished(self._whole(own)(pool, trials), trials)
        episodes = {outcome.trial: outcome.episode for outcome in outcomes if outcome.episode is not None}
        for part in parts:
            found = [episodes[trial] for trial in part]
            yield played(found, self.prompt_KL, self.chunk, self.memory)

    def _whole(self, actor: Actor, share: float = 0.0) -> Callable[[Pool, Sequence[Trial]], Iterable[Outcome]]:
        def play(pool: Pool, trials: Sequence[Trial]) -> Iterable[Outcome]:
            act = rollout.intervene(acting(actor, self.prompt_KL, len(pool)), share, self.steps)
            return rollout.rollouts(pool, act, trials, self._protocol(stops=False), draw="all", actor=actor.name)

        return play

    # --- online RL --------------------------------------------------------------------------

    def explore(self, number: int, actor: Actor, groups: Groups) -> Imagined:
        """Groups of rollouts, a new start for each group of each iteration; an episode ends at its first success.

        Raises:
          LiberoError: a trial was lost as often as it was begun.
        """
        wanted = self.trials("online", (number + 1) * groups.groups)[number * groups.groups :]
        repeats = [dataclasses.replace(trial, repeat=n) for trial in wanted for n in range(groups.size)]
        rules = self._protocol(stops=True, steps=groups.chunks * self.chunk)
        row_B, put = sharding.rows(len(repeats))
        mine = [repeats[row] for row in row_B]
        with hosts.alone(actor) as own, self._pool(len(mine)) as pool:
            tape = Tape(own, self.prompt_KL, len(pool))
            rolled = tape.rollouts(self._finished(rollout.rollouts(pool, tape.act, mine, rules), mine), groups.chunks)
        return put(rolled)

    @staticmethod
    def _finished(outcomes: Iterable[Outcome], wanted: Sequence[Trial]) -> list[Outcome]:
        """In the order of the trials, of which none may be missing."""
        found = list(collect.in_order(outcomes, wanted))
        if lost := [outcome for outcome in found if outcome.success is None]:
            raise LiberoError(f"{lost[0].trial} was lost {lost[0].tries} times: {lost[0].lost[-1]}")
        return found

    @staticmethod
    def _bar(count: int, what: str) -> tqdm:
        return tqdm(total=count, desc=what, unit="trial", disable=not processes.first())

    # --- onto the disk ----------------------------------------------------------------------

    def _recorded(
        self, folder: pathlib.Path, wanted: Sequence[Trial], play: Callable[[Pool, Sequence[Trial]], Iterable[Outcome]]
    ) -> Mapping[str, Any]:
        """The manifest of the trials' episodes in ``folder``, made if they are not there whole."""
        meta = {"sim": self.name, "libero": config.to_dict(self._settings())}
        there = processes.once(lambda: disk.manifest(folder) if folder.exists() else None, f"look for {folder}")
        if there:
            names = {line["trial"] for line in there["meta"]["outcomes"]}
            if there["meta"]["libero"] == meta["libero"] and names == {trial.name for trial in wanted}:
                return there
        with self._pool(len(wanted)) as pool:
            meta["fingerprint"] = setup.fingerprint(pool.renderer)
            return collect.collect(lambda part: play(pool, part), wanted, folder, meta=meta, overwrite=True)

    def _settings(self) -> Any:
        """What decides a trial besides the policy; how many run at a time does not."""
        return dataclasses.replace(self.cfg, workers=1)


class Tape:
    """A policy that acts for ``rollouts`` and keeps what a learner has to know: frames, tokens, log-probabilities."""

    def __init__(self, actor: Actor, prompt_KL: np.ndarray, batch: int):
        self._actor, self._prompt_KL, self._batch = actor, prompt_KL, batch
        self._kept: dict[tuple[Trial, int], tuple[np.ndarray, ...]] = {}

    def act(self, views: Sequence[View]) -> np.ndarray:
        """As ``acting``."""
        acting, params, key = self._actor.acting, self._actor.params, self._actor.key
        rows = _rows(views, self._batch, self._prompt_KL)
        found = [np.asarray(part) for part in acting.sample(params, rows.frame_BHWC, rows.prompt_BL, key, rows.seed_B)]
        for n, view in enumerate(views):
            self._kept[view.trial, view.chunk] = (view.frame_HWC, *(part[n] for part in found))
        return found[2][: len(views)]

    def rollouts(self, outcomes: Sequence[Outcome], chunks: int) -> Imagined:
        """Trials as rows. After its first success nothing of a row is true, and a learner's mask leaves it out."""

        def row(outcome: Outcome) -> list[np.ndarray]:
            played = [self._kept[outcome.trial, n] for n in range(chunks) if (outcome.trial, n) in self._kept]
            columns = [np.stack(part) for part in zip(*played, strict=True)]
            return [np.pad(part, [(0, chunks - len(part))] + [(0, 0)] * (part.ndim - 1)) for part in columns]

        frame, token, logp, action = (np.stack(part) for part in zip(*map(row, outcomes), strict=True))
        ends = np.array([outcome.steps if outcome.success else chunks * token.shape[2] + 1 for outcome in outcomes])
        success = (np.arange(1, chunks * token.shape[2] + 1) >= ends[:, None]).reshape(token.shape[:3])
        task = np.array([outcome.trial.task.index for outcome in outcomes], np.int32)
        columns: dict[str, Any] = {"prompt_BL": self._prompt_KL[task], "task_B": task}
        columns |= {
            "frame_BNHWC": to_float(frame),
            "token_BNTA": token,
            "logp_BNTA": logp,
            "action_BNTA": action,
        }
        columns |= {"prob_BNT": success.astype(np.float32), "success_BNT": success, "truth_BNT": success}
        return Imagined(**columns)


class _Rows(NamedTuple):
    """What a compiled policy is given: always a batch of one size, so that one program is compiled."""

    frame_BHWC: Array
    prompt_BL: Array
    seed_B: Array


def _rows(views: Sequence[View], batch: int, prompt_KL: np.ndarray) -> _Rows:
    rows = [views[n % len(views)] for n in range(batch)]
    return _Rows(
        jnp.asarray(np.stack([view.frame_HWC for view in rows])),
        jnp.asarray(prompt_KL[[view.trial.task.index for view in rows]]),
        jnp.asarray([draw_seed(view.trial, view.chunk) for view in rows], jnp.uint32),
    )


def instructions(suite: str) -> tuple[str, ...]:
    """What the robot may be asked to do in a suite.

    Raises:
      LiberoError: LIBERO is not installed.
    """
    return tuple(task.instruction for task in tasks(suite))


def acting(actor: Actor, prompt_KL: np.ndarray, batch: int) -> Callable[[Sequence[View]], np.ndarray]:
    """A policy as what ``rollouts`` asks."""

    def act(views: Sequence[View]) -> np.ndarray:
        rows = _rows(views, batch, prompt_KL)
        action_BTA = actor.acting.act(
            actor.params, rows.frame_BHWC, rows.prompt_BL, actor.key, rows.seed_B, actor.temperature
        )
        return np.asarray(action_BTA)[: len(views)]

    return act


def played(episodes: Sequence[Episode], prompt_KL: np.ndarray, chunk: int, memory: int) -> tuple[Start, Imagined]:
    """Episodes of one length as a batch of rollouts: where they began, and what happened.

    To be looked at, not learnt from: episodes do not keep tokens, which are zero here as their log-probabilities are.
    """
    table = start_states.initial(episodes, memory=memory)
    with hosts.apart():
        start = sharding.host(start_states.gather(table, jnp.arange(len(episodes)), jnp.asarray(prompt_KL)))

    def split(name: str, first: int) -> np.ndarray:
        column = np.stack([getattr(episode, name)[first:] for episode in episodes])
        return column.reshape(len(episodes), -1, chunk, *column.shape[2:])

    frame_BSHWC = to_float(np.stack([episode.frame_SHWC for episode in episodes]))
    action_BNTA, success_BNT = split("action_SA", 0), split("success_S", 1)
    columns: dict[str, Any] = {
        "frame_BNHWC": frame_BSHWC[:, :-1:chunk],
        "token_BNTA": np.zeros(action_BNTA.shape, np.int32),
        "logp_BNTA": np.zeros(action_BNTA.shape, np.float32),
        "action_BNTA": action_BNTA,
        "prob_BNT": success_BNT.astype(np.float32),
        "success_BNT": success_BNT,
        "truth_BNT": success_BNT,
        "video_BNTHWC": frame_BSHWC[:, 1:].reshape(*action_BNTA.shape[:3], *frame_BSHWC.shape[2:]),
    }
    return start, Imagined(prompt_BL=start.prompt_BL, task_B=start.task_B, **columns)
