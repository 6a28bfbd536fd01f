"""The real LIBERO as an arena: worker processes step it, the policy acts between chunks in one compiled program.

Demonstrations and collections begin in layouts that the tasks draw, or in the initial states named for training;
evaluation and comparison begin in official initial states that training does not see, each once, and then in layouts
that no training draws. A trial's course depends on the trial, the policy and its key alone, so whatever was interrupted
goes on where it stood.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from wovr_jax.core import config, processes, sharding
from wovr_jax.data import episodes as disk
from wovr_jax.sim.arena import Actor, Groups, Measured, add_halves, call_program, layouts
from wovr_jax.sim.libero import collect, rollout, setup
from wovr_jax.sim.libero.actors import RolloutRecorder, make_act, on_own_devices
from wovr_jax.sim.libero.pool import Pool
from wovr_jax.sim.libero.rollout import Outcome
from wovr_jax.sim.libero.setup import LiberoError
from wovr_jax.sim.libero.tasks import DRAWN, EvaluationProtocol, LiberoConfig, Trial, draws_fixtures, protocol, tasks
from wovr_jax.types import Array, Episode, Imagined

DEMONSTRATE = "demonstrate_libero.py"
"""The program of the scripted expert, which is not part of training."""

Play = Callable[[Pool, Sequence[Trial]], Iterable[Outcome]]
"""Plays trials in the workers of a pool, and yields their outcomes in any order."""


class Libero:
    """A suite of LIBERO; see ``sim.arena.Arena``. What an audit asks of it besides is ``sim.libero.witness``.

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

    follow = None

    def __init__(self, cfg: LiberoConfig, *, seed: int, batch: int, chunk: int, memory: int, prompt_KL: np.ndarray):
        self.cfg, self.seed, self.batch, self.chunk, self.memory = cfg, seed, batch, chunk, memory
        # Manifests and statistics go by the suite: its tasks have their own indices.
        self.name, self.steps, self.hold = cfg.suite, cfg.steps, cfg.scene.hold
        self.suite = suite = tasks(cfg.suite)
        if wrong := [index for index in cfg.tasks if not 0 <= index < len(suite)]:
            raise LiberoError(f"{cfg.suite} has tasks 0 to {len(suite) - 1}, and {wrong[0]} was asked for.")
        self.tasks = [suite[index] for index in cfg.tasks] or list(suite)
        self.instructions, self.prompt_KL = instructions(cfg.suite), prompt_KL

    # --- where episodes begin ---------------------------------------------------------------

    def trials(self, purpose: str, count: int) -> list[Trial]:
        """Returns ``count`` trials for a purpose (see ``sim.arena.layouts``), the tasks taking turns."""
        cfg, seeds = self.cfg, layouts(self.seed, purpose, count).tolist()
        if purpose == "evaluate":
            return self._evaluation_trials(count)
        states: Sequence[int] = range(*cfg.train_inits) if cfg.train_inits else (DRAWN,)
        turns = ((self.tasks[n % len(self.tasks)], states[n // len(self.tasks) % len(states)]) for n in range(count))
        return [Trial(task, init, seed) for (task, init), seed in zip(turns, seeds, strict=True)]

    def _evaluation_trials(self, count: int) -> list[Trial]:
        official = [Trial(task, init) for init in range(*self.cfg.inits) for task in self.tasks]
        if self.cfg.beyond == "official":
            again = range(-(-count // len(official)))
            return [dataclasses.replace(trial, seed=seed) for seed in again for trial in official][:count]
        # Those of seed 0 in every run: whoever measures the same trials measures the same.
        seeds = layouts(0, "evaluate", max(count - len(official), 0)).tolist()
        drawn = [Trial(self.tasks[n % len(self.tasks)], DRAWN, seed) for n, seed in enumerate(seeds)]
        return (official + drawn)[:count]

    def check_evaluation(self, count: int) -> None:
        """Refuses trials that a greedy policy would play alike, which would count as several.

        Raises:
          LiberoError: there are some among the first ``count`` of the evaluation.
        """
        again = [trial for trial in self.trials("evaluate", count) if trial.init != DRAWN and trial.seed]
        if twins := [trial for trial in again if not draws_fixtures(trial.task)]:
            raise LiberoError(
                f"libero.beyond='official' begins {len(twins)} of {count} trials where another began, and a seed moves "
                f"nothing there ({twins[0].task.name} has no fixtures to place): a greedy policy would do the same "
                f"again. Take beyond='drawn', or evaluate.episodes={count - len(again)}."
            )

    def rules(self, *, stops: bool, steps: int = 0) -> EvaluationProtocol:
        """Returns the settings' protocol; ``stops`` where nothing after the first success matters."""
        return dataclasses.replace(protocol(self.cfg.protocol), horizons={self.name: steps or self.steps}, stops=stops)

    def pool(self, trials: int, **scene: Any) -> Pool:
        """Opens workers for so many trials; ``scene`` are changes of how their environments are built."""
        # A worker takes a gigabyte, and one without a trial would take it for nothing.
        return Pool(min(self.cfg.workers, trials), dataclasses.replace(self.cfg.scene, **scene))

    # --- demonstrations ---------------------------------------------------------------------

    def demonstrate(self, folder: pathlib.Path, key: Array, count: int, validation: int) -> dict[str, Any]:
        """Writes episodes of the scripted expert, or those in the folder that the settings name.

        Raises:
          LiberoError: the expert's program failed.
        """
        del key  # the expert draws from its own seed and the trial's
        if self.cfg.demonstrations:
            episodes, meta = self._read_demonstrations(count, validation), {"sim": self.name}
            for name, half in halves(count).items():
                disk.write(folder / name, episodes[half], meta=meta, overwrite=True)
        else:
            ask = functools.partial(self._call_expert, folder, count, validation)
            processes.once(ask, "call the expert", wait_s=collect.PATIENCE_S)
        facts = processes.once(lambda: [disk.manifest(folder / name) for name in halves(count)], f"read {folder}")
        return add_halves(facts, self.hold)

    def _call_expert(self, folder: pathlib.Path, count: int, validation: int) -> None:
        """Has the expert's own program write the demonstrations."""
        asked = {"cfg": config.to_dict(self.cfg), "seed": self.seed, "count": count, "validation": validation}
        status, _ = call_program(DEMONSTRATE, "--for-run", json.dumps(asked), "--out", str(folder))
        if status:
            raise LiberoError(
                f"{DEMONSTRATE} ended with exit status {status}; what it said stands above. Episodes that are there "
                "are kept; the same command goes on with them."
            )

    def _read_demonstrations(self, count: int, validation: int) -> list[Episode]:
        """Returns the first episodes of each task in turn, from the folder that the settings name.

        Raises:
          EpisodesError: other tasks or frames than those of the run, or too few episodes.
        """
        where, size, known = self.cfg.demonstrations, self.cfg.scene.size, self.instructions
        by_task: dict[int, list[Episode]] = {task.index: [] for task in self.tasks}
        for episode in disk.EpisodeSource(where):
            if not (0 <= episode.task < len(known) and known[episode.task] == episode.instruction):
                raise disk.EpisodesError(f"{where}: {episode.instruction!r} is not task {episode.task} of {self.name}.")
            if episode.frame_SHWC.shape[1:3] != (size, size):
                shape = episode.frame_SHWC.shape[1:3]
                raise disk.EpisodesError(f"{where}: frames of {shape} pixels, the run has {size} (libero.scene.size).")
            # Episodes of tasks that the run leaves out go nowhere.
            by_task.get(episode.task, []).append(episode)
        # Tasks take turns, so that the first so many are balanced whatever the order in the folder.
        turns = itertools.zip_longest(*by_task.values())
        episodes = [episode for turn in turns for episode in turn if episode is not None][: count + validation]
        if len(episodes) < count + validation:
            raise disk.EpisodesError(
                f"{where} has {len(episodes)} episodes of the tasks asked for; collect.demonstrations={count} and "
                f"collect.validation={validation} need {count + validation}."
            )
        return episodes

    # --- rollouts of a policy ---------------------------------------------------------------

    def collect(self, folder: pathlib.Path, purpose: str, count: int, actor: Actor) -> dict[str, Any]:
        """Writes rollouts of the whole horizon with every frame; in a share of them the gripper is not the policy's."""
        with on_own_devices(actor) as own:
            play = self.roll_whole(own, self.cfg.intervened_share)
            facts = self.record(folder, self.trials(purpose, count), play)
        steps = facts["steps"] * self.cfg.scene.hold
        return {"episodes": facts["episodes"], "successes": facts["successes"], "true_steps": steps}

    def measure(self, folder: pathlib.Path, count: int, actor: Actor) -> Measured:
        """Returns success in any step. Each trial has a line on the disk as it ends, beside ``folder``.

        Raises:
          LiberoError: a trial without a verdict; it is played again by the next call.
        """
        wanted = self.trials("evaluate", count)
        # Other settings, other lines.
        asked = json.dumps([self._settings(), actor.temperature])
        folder = folder.with_name(f"{folder.name}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}")
        folder.mkdir(parents=True, exist_ok=True)
        with on_own_devices(actor) as own, self.progress(count, folder.parent.name) as bar:

            def play(left: Sequence[Trial]) -> Iterator[Outcome]:
                with self.pool(len(left)) as pool:
                    act = make_act(own, self.prompt_KL, len(pool))
                    yield from rollout.rollouts(pool, act, left, self.rules(stops=True), draw="last")

            lines = collect.measure(play, wanted, folder, lambda line: bar.update())
        collect.check_verdicts(lines)
        steps = sum(line["steps"] for line in lines) * self.cfg.scene.hold
        kinds = ["drawn" if trial.init == DRAWN else "official" for trial in wanted]
        return Measured(np.array([bool(line["success"]) for line in lines]), {}, steps, kinds)

    def roll_whole(self, actor: Actor, share: float = 0.0) -> Play:
        """Returns what rolls ``actor`` out to the horizon with every frame, ``share`` of the trials intervened in."""

        def play(pool: Pool, trials: Sequence[Trial]) -> Iterable[Outcome]:
            act, rules = make_act(actor, self.prompt_KL, len(pool)), self.rules(stops=False)
            how = {"draw": "all", "actor": actor.name, "intervened_share": share}
            return rollout.rollouts(pool, act, trials, rules, **how)

        return play

    # --- online RL --------------------------------------------------------------------------

    def explore(self, number: int, actor: Actor, groups: Groups) -> Imagined:
        """Returns groups of rollouts, a new start for each group of each iteration; success ends an episode.

        Raises:
          LiberoError: a trial was lost as often as it was begun.
        """
        # Counted up from the first iteration: a run that is taken up begins where an unbroken one would.
        wanted = self.trials("online", (number + 1) * groups.groups)[number * groups.groups :]
        repeats = [dataclasses.replace(trial, repeat=n) for trial in wanted for n in range(groups.size)]
        rules = self.rules(stops=True, steps=groups.chunks * self.chunk)
        row_B, put = sharding.rows(len(repeats))
        mine = [repeats[row] for row in row_B]
        with on_own_devices(actor) as own, self.pool(len(mine)) as pool:
            recorder = RolloutRecorder(own, self.prompt_KL, len(pool))
            outcomes = self.finish(rollout.rollouts(pool, recorder.act, mine, rules), mine)
            rolled = recorder.stack(outcomes, groups.chunks)
        return put(rolled)

    @staticmethod
    def finish(outcomes: Iterable[Outcome], wanted: Sequence[Trial]) -> list[Outcome]:
        """Runs to the end and returns the outcomes in the order of the trials, of which none may be missing."""
        ended = list(collect.in_order(outcomes, wanted))
        if lost := [outcome for outcome in ended if outcome.success is None]:
            raise LiberoError(f"{lost[0].trial} was lost {lost[0].tries} times: {lost[0].lost[-1]}")
        return ended

    @staticmethod
    def progress(count: int, what: str) -> tqdm:
        """Opens a bar over trials."""
        return tqdm(total=count, desc=what, unit="trial", disable=not processes.first())

    # --- onto the disk ----------------------------------------------------------------------

    def record(self, folder: pathlib.Path, wanted: Sequence[Trial], play: Play) -> Mapping[str, Any]:
        """Returns the manifest of the trials' episodes in ``folder``, which are played if they are not there whole."""
        meta = {"sim": self.name, "libero": self._settings()}
        known = processes.once(lambda: disk.manifest(folder) if folder.exists() else None, f"look for {folder}")
        if known:
            names = {line["trial"] for line in known["meta"]["outcomes"]}
            if known["meta"]["libero"] == meta["libero"] and names == {trial.name for trial in wanted}:
                return known
        with self.pool(len(wanted)) as pool:
            meta |= {"fingerprint": setup.fingerprint(pool.renderer), "keep": "all"}
            return collect.collect(lambda part: play(pool, part), wanted, folder, meta=meta)

    def _settings(self) -> Any:
        """Returns what decides a trial besides the policy, for JSON; how many there are or run at a time does not."""
        settings = config.to_dict(dataclasses.replace(self.cfg, workers=1))
        return {name: value for name, value in settings.items() if name != "beyond"}


def instructions(suite: str) -> tuple[str, ...]:
    """Returns what the robot may be asked to do in a suite.

    Raises:
      LiberoError: LIBERO is not installed.
    """
    return tuple(task.instruction for task in tasks(suite))


def halves(count: int) -> dict[str, slice]:
    """Returns which of a run's demonstrations go into which folder: ``count`` to learn from, the others to judge on."""
    return {"episodes": slice(count), "validation": slice(count, None)}
