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
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from wovr_jax import config
from wovr_jax.arena.base import Actor, Measured, Played, layouts
from wovr_jax.data import episodes as disk
from wovr_jax.data import starts as start_states
from wovr_jax.policy import release
from wovr_jax.policy.actions import Codec
from wovr_jax.policy.tokenizer import Tokenizer
from wovr_jax.recipe import Recipe
from wovr_jax.sim.libero import collect, evaluate, rollout, setup
from wovr_jax.sim.libero.pool import Pool
from wovr_jax.sim.libero.rollout import Outcome, View
from wovr_jax.sim.libero.setup import LiberoError
from wovr_jax.sim.libero.tasks import DRAWN, Protocol, Trial, protocol, tasks
from wovr_jax.types import Array, Episode, Imagined


class Libero:
    """A suite of a recipe; see ``arena.base.Arena``.

    Raises:
      LiberoError: LIBERO is not installed, or a task that the suite does not have.
      ConfigError: a policy whose vocabulary is not that of the instructions.
    """

    def __init__(self, recipe: Recipe):
        assert recipe.libero is not None
        self.recipe, self.cfg = recipe, recipe.libero
        suite = tasks(self.cfg.suite)
        if wrong := [index for index in self.cfg.tasks if not 0 <= index < len(suite)]:
            raise LiberoError(f"{self.cfg.suite} has tasks 0 to {len(suite) - 1}, and {wrong[0]} was asked for.")
        self.tasks = [suite[index] for index in self.cfg.tasks] or list(suite)
        self.name, self.steps = self.cfg.suite, self.cfg.steps
        self.instructions = tuple(task.instruction for task in suite)
        self.prompt_KL, self.codec = self._words()

    def _words(self) -> tuple[np.ndarray, Codec | None]:
        """Prompts and action statistics of the released policy, or prompts in the package's own words."""
        cfg, where = self.recipe.policy, self.cfg.release
        if where:
            return release.ReleaseTokenizer(where, cfg).prompts(self.instructions), release.codec(where, self.name)
        words = Tokenizer.libero()
        if (cfg.vocab_size, cfg.pad) != (words.vocab_size, words.pad):
            raise config.ConfigError(
                f"config.policy: vocab_size {cfg.vocab_size} and pad {cfg.pad} are not those of LIBERO's words, "
                f"{words.vocab_size} and {words.pad}; use size='libero_small', or name the folder of the policy's own "
                "tokenizer with libero.release=..."
            )
        return words.prompts(self.instructions), None

    # --- where episodes begin ---------------------------------------------------------------

    def trials(self, purpose: str, count: int) -> list[Trial]:
        """``count`` trials for a purpose (see ``base.layouts``), the tasks taking turns."""
        cfg, seeds = self.cfg, layouts(self.recipe.seed, purpose, count).tolist()
        states: Sequence[int] = range(*cfg.train_inits) if cfg.train_inits else (DRAWN,)
        if purpose == "evaluate":
            states = range(*cfg.inits)
            # Whoever measures the same trials measures the same, whatever the seed of the run.
            seeds = [n // (len(self.tasks) * len(states)) for n in range(count)]
        turns = ((self.tasks[n % len(self.tasks)], states[n // len(self.tasks) % len(states)]) for n in range(count))
        return [Trial(task, init, seed) for (task, init), seed in zip(turns, seeds, strict=True)]

    def _protocol(self, *, stops: bool) -> Protocol:
        """The recipe's, over ``steps`` steps; ``stops`` at the first success where nothing after it matters."""
        return dataclasses.replace(protocol(self.cfg.protocol), horizons={self.name: self.steps}, stops=stops)

    def _pool(self, trials: Sequence[Trial]) -> Pool:
        return Pool(min(self.cfg.workers, len(trials)), self.cfg.scene)

    # --- demonstrations ---------------------------------------------------------------------

    def demonstrate(self, folder: pathlib.Path, key: Array) -> dict[str, Any]:
        """Episodes of the scripted expert, or those that the recipe names."""
        del key  # the expert draws from its own seed and the trial's
        cfg = self.recipe.collect
        if self.cfg.demonstrations:
            parts = self._given(cfg.demonstrations, cfg.validation)
            facts = [
                disk.write(folder / name, part, meta={"sim": self.name}, overwrite=True) for name, part in parts.items()
            ]
        else:
            wanted = self.trials("demonstrations", cfg.demonstrations + cfg.validation)
            halves = {"episodes": wanted[: cfg.demonstrations], "validation": wanted[cfg.demonstrations :]}
            facts = [self._recorded(folder / name, half, self._expert) for name, half in halves.items()]
        return {"episodes": facts[0]["episodes"], "successes": facts[0]["successes"]}

    def _expert(self, pool: Pool, trials: Sequence[Trial]) -> Iterable[Outcome]:
        return rollout.demonstrations(pool, trials, self._protocol(stops=False), self.cfg.expert)

    def _given(self, count: int, validation: int) -> dict[str, list[Episode]]:
        """The first episodes of each task in turn, from the folder that the recipe names."""
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
        """Rollouts over the whole horizon, every frame drawn."""
        facts = self._recorded(folder, self.trials(purpose, count), self._whole(actor))
        steps = facts["steps"] * self.cfg.scene.hold
        return {"episodes": facts["episodes"], "successes": facts["successes"], "true_steps": steps}

    def measure(self, folder: pathlib.Path, count: int, actor: Actor) -> Measured:
        """Success in any step, a line in ``folder`` for each trial as it ends; one without a verdict is a failure."""
        wanted, asked = self.trials("evaluate", count), [config.to_dict(self._settings()), actor.temperature]
        # Other settings, other lines.
        folder = folder.with_name(f"{folder.name}-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]}")
        folder.mkdir(parents=True, exist_ok=True)

        def play(left: Sequence[Trial]) -> Iterator[Outcome]:
            with self._pool(left) as pool:
                act = acting(actor, self.prompt_KL, len(pool))
                yield from rollout.rollouts(pool, act, left, self._protocol(stops=True), draw="last")

        with tqdm(total=count, desc=folder.parent.name, unit="trial") as bar:

            def tell(_: Mapping[str, Any]) -> None:
                bar.update()

            lines = evaluate.measure(play, wanted, folder, tell)
        steps = sum(line["steps"] for line in lines) * self.cfg.scene.hold
        return Measured(np.array([bool(line["success"]) for line in lines]), {}, steps)

    def play(self, count: int, actor: Actor) -> Iterator[Played]:
        """The trials of ``measure`` again, to the end and with every frame."""
        wanted, batch = self.trials("evaluate", count), self.recipe.collect.batch
        with self._pool(wanted) as pool:
            outcomes = collect.in_order(self._whole(actor)(pool, wanted), wanted)
            while part := list(itertools.islice(outcomes, batch)):
                if lost := [outcome for outcome in part if outcome.episode is None]:
                    raise LiberoError(f"{lost[0].trial} was lost {lost[0].tries} times: {lost[0].lost[-1]}")
                episodes = [outcome.episode for outcome in part if outcome.episode is not None]
                yield played(
                    episodes, batch, self.prompt_KL, self.recipe.policy.chunk, actor.programs.world_config.slots
                )

    def _whole(self, actor: Actor) -> Callable[[Pool, Sequence[Trial]], Iterable[Outcome]]:
        def play(pool: Pool, trials: Sequence[Trial]) -> Iterable[Outcome]:
            act = acting(actor, self.prompt_KL, len(pool))
            return rollout.rollouts(pool, act, trials, self._protocol(stops=False), draw="all", actor=actor.name)

        return play

    # --- onto the disk ----------------------------------------------------------------------

    def _recorded(
        self, folder: pathlib.Path, wanted: Sequence[Trial], play: Callable[[Pool, Sequence[Trial]], Iterable[Outcome]]
    ) -> Mapping[str, Any]:
        """The manifest of the trials' episodes in ``folder``, made if they are not there whole."""
        meta = {"sim": self.name, "libero": config.to_dict(self._settings())}
        if folder.exists():
            there = disk.manifest(folder)
            names = {line["trial"] for line in there["meta"]["outcomes"]}
            if there["meta"]["libero"] == meta["libero"] and names == {collect.name_of(trial) for trial in wanted}:
                return there
        with self._pool(wanted) as pool:
            meta["fingerprint"] = setup.fingerprint(pool.renderer)
            return collect.collect(lambda part: play(pool, part), wanted, folder, meta=meta, overwrite=True)

    def _settings(self) -> Any:
        """What decides a trial besides the policy; how many run at a time does not."""
        return dataclasses.replace(self.cfg, workers=1)


def acting(actor: Actor, prompt_KL: np.ndarray, batch: int) -> Callable[[Sequence[View]], np.ndarray]:
    """A policy as what ``rollouts`` asks: always a batch of one size, so that one program is compiled."""

    def act(views: Sequence[View]) -> np.ndarray:
        rows = [views[n % len(views)] for n in range(batch)]
        frame_BHWC = jnp.asarray(np.stack([view.frame_HWC for view in rows]))
        prompt_BL = jnp.asarray(prompt_KL[[view.trial.task.index for view in rows]])
        seed_B = jnp.asarray([evaluate.draw_seed(view.trial, view.chunk) for view in rows], jnp.uint32)
        action_BTA = actor.programs.act(actor.params, frame_BHWC, prompt_BL, actor.key, seed_B, actor.temperature)
        return np.asarray(action_BTA)[: len(views)]

    return act


def played(episodes: Sequence[Episode], batch: int, prompt_KL: np.ndarray, chunk: int, memory: int) -> Played:
    """Episodes of one length as a batch of rollouts, the last rows repeated up to ``batch``.

    To be looked at, not learnt from: episodes do not keep tokens, which are zero here as their log-probabilities are.
    """
    rows = [n % len(episodes) for n in range(batch)]
    table = start_states.initial(episodes, memory=memory)
    start = start_states.gather(table, jnp.asarray(rows), jnp.asarray(prompt_KL))

    def split(name: str, first: int) -> np.ndarray:
        column = np.stack([getattr(episodes[row], name)[first:] for row in rows])
        return column.reshape(batch, -1, chunk, *column.shape[2:])

    frame_BSHWC = disk.to_float(np.stack([episodes[row].frame_SHWC for row in rows]))
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
    rolled = Imagined(prompt_BL=start.prompt_BL, task_B=start.task_B, **columns)
    return Played(start, rolled, len(episodes))
