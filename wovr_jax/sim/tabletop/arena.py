"""The embedded table as an arena, and its true episodes: the expert's and the policy's.

Rollouts are compiled programs, policy and simulator in one. They come from ``imagine.imagine`` with the simulator as
the world; this file gives it its start states and turns what it returns into ``Episode`` records.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax.core import sharding
from wovr_jax.core.pixels import to_uint8
from wovr_jax.data import episodes as disk
from wovr_jax.data.starts import Starts
from wovr_jax.sim.arena import Actor, Groups, Measured, Played, layouts
from wovr_jax.sim.tabletop import expert as experts
from wovr_jax.sim.tabletop import table as tabletop
from wovr_jax.sim.tabletop.expert import ExpertConfig
from wovr_jax.sim.tabletop.table import TabletopConfig
from wovr_jax.types import NULL_ACTION, Array, Episode, Imagined, Start


class Tabletop:
    """The table of a run; see ``sim.arena.Arena``.

    Args:
      sim: the simulator.
      expert: who demonstrates.
      seed: of the run.
      batch: episodes rolled at once.
      memory: M, memory frames of a start state.
      prompt_KL: (tasks, L) int32 prompt tokens of every instruction.
    """

    name = "tabletop"
    instructions = tabletop.INSTRUCTIONS
    hold = 1
    explore: Callable[[int, Actor, Groups], Imagined] | None = None

    def __init__(
        self, sim: TabletopConfig, expert: ExpertConfig, *, seed: int, batch: int, memory: int, prompt_KL: Array
    ):
        self.sim, self.expert, self.seed, self.batch, self.memory = sim, expert, seed, batch, memory
        self.prompt_KL, self.steps = prompt_KL, sim.horizon

    def demonstrate(self, folder: pathlib.Path, key: Array, count: int, validation: int) -> dict[str, Any]:
        """Writes scripted episodes, a share of them flawed."""
        seeds = layouts(self.seed, "demonstrations", count + validation)
        # One generator feeds both folders, so that the two are parts of the same batches.
        episodes = play_demonstrations(seeds, key, self.expert, self.sim)
        facts = self._write(folder / "episodes", itertools.islice(episodes, count))
        self._write(folder / "validation", episodes)
        return {"episodes": facts["episodes"], "successes": facts["successes"]}

    def collect(self, folder: pathlib.Path, purpose: str, count: int, actor: Actor) -> dict[str, Any]:
        """Writes rollouts from fresh layouts."""
        rollouts = self._roll(layouts(self.seed, purpose, count), actor)
        episodes = (episode for seeds, rollout in rollouts for episode in split_episodes(rollout, seeds, actor.name))
        facts = self._write(folder, episodes)
        return {"episodes": count, "successes": facts["successes"], "true_steps": count * self.steps}

    def measure(self, folder: pathlib.Path, count: int, actor: Actor) -> Measured:
        """Returns success, and sub-goals by replaying what was done."""
        del folder  # a minute's work, and nothing to keep of it
        seeds = layouts(self.seed, "evaluate", count)
        parts = [sharding.host(rollout) for _, rollout in self._roll(seeds, actor)]
        rollout = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)  # without the last padding
        rates = measure_subgoals(rollout, jnp.asarray(seeds), self.sim)
        return Measured(rollout.truth_BNT.any(axis=(1, 2)), rates, count * self.steps)

    def play(self, count: int, actor: Actor) -> Iterator[Played]:
        """Yields rollouts on the device."""
        for seeds, rollout in self._roll(layouts(self.seed, "evaluate", count), actor):
            padded_B = jnp.asarray(np.resize(seeds, self.batch))
            start = make_starts(padded_B, self.prompt_KL, self.sim, self.memory)
            # Imagination begins from what a camera sees, not from the simulator's state.
            yield Played(dataclasses.replace(start, sim=None), rollout, len(seeds))

    def follow(self, table: Starts, row_K: np.ndarray, action_KSA: np.ndarray) -> np.ndarray:
        """Returns true success after each action, all rows in one program."""
        reached = (np.asarray(column)[row_K] for column in (table.seed_K, table.played_KSA, table.step_K))
        return np.asarray(_follow(*reached, action_KSA, self.sim))

    def _roll(self, seeds: np.ndarray, actor: Actor) -> Iterator[tuple[np.ndarray, Imagined]]:
        """Yields rollouts in equal batches of seeds, so that one program does; rows beyond the seeds are padding."""
        for low in range(0, len(seeds), self.batch):
            part = seeds[low : low + self.batch]
            padded_B = jnp.asarray(np.resize(part, self.batch))
            key = jax.random.fold_in(actor.key, low)
            yield part, actor.acting.roll(actor.params, padded_B, key, actor.temperature)

    def _write(self, folder: pathlib.Path, episodes: Iterator[Episode]) -> dict[str, Any]:
        return disk.write(folder, episodes, meta={"sim": self.name}, overwrite=True)


def make_starts(seed_B: Array, prompt_KL: Array, cfg: TabletopConfig, memory: int = 4) -> Start:
    """Makes the start states of episodes for integer seeds.

    Args:
      seed_B: (B,) int32 reset seeds.
      prompt_KL: (tasks, L) int32 prompt tokens of every task.
      cfg: the simulator.
      memory: M, how many copies of the first frame fill the memory.
    """
    sim = tabletop.reset_batch(seed_B, cfg)
    frame_BHWC = jax.vmap(lambda s: tabletop.render(s, cfg))(sim)
    task_B = tabletop.task_of(sim)
    batch = seed_B.shape[0]
    # Nothing has happened before an episode: the memory is the first frame, held still under the null action.
    return Start(
        anchor_BHWC=frame_BHWC,
        memory_BMHWC=jnp.repeat(frame_BHWC[:, None], memory, axis=1),
        action_BMA=jnp.broadcast_to(jnp.asarray(NULL_ACTION), (batch, memory, len(NULL_ACTION))),
        prompt_BL=prompt_KL[task_B],
        task_B=task_B,
        keyframe_B=jnp.zeros(batch, bool),
        step_B=jnp.zeros(batch, jnp.int32),
        sim=sim,
    )


def play_demonstrations(
    seeds: Sequence[int] | np.ndarray,
    key: Array,
    expert: ExpertConfig,
    cfg: TabletopConfig,
    batch: int = 128,
    play: Callable = experts.demonstrate,
) -> Iterator[Episode]:
    """Yields scripted episodes, one for each reset seed; ``play`` is ``expert.demonstrate`` or ``wander.wander``."""
    for low in range(0, len(seeds), batch):
        part = np.asarray(seeds[low : low + batch], np.int32)
        padded = np.resize(part, batch)  # one compiled shape; the padding is dropped below
        out = sharding.host(play_batch(padded, jax.random.fold_in(key, low), play, expert, cfg))
        for b in range(len(part)):
            yield Episode(
                frame_SHWC=to_uint8(out["frame"][b]),
                action_SA=out["action"][b],
                success_S=out["success"][b],
                instruction=tabletop.INSTRUCTIONS[int(out["task"][b])],
                task=int(out["task"][b]),
                seed=int(part[b]),
                actor="expert",
                label_SA=out["label"][b],
            )


# Of the module, so that the runs of a study, which differ in their seeds, share one program.
@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def play_batch(
    seed_B: Array, key: Array, play: Callable, expert: ExpertConfig, cfg: TabletopConfig
) -> dict[str, Array]:
    """Plays one scripted episode for each reset seed, as columns with the batch in front."""
    # The seed decides the layout, the key flaw and noise: the same layouts can be shown under other noise.
    keys = jax.random.split(key, seed_B.shape[0])
    states, label, action = jax.vmap(lambda s, k: play(s, k, expert, cfg))(seed_B, keys)
    return {
        "frame": jax.vmap(jax.vmap(lambda s: tabletop.render(s, cfg)))(states),
        "success": jax.vmap(jax.vmap(lambda s: tabletop.success(s, cfg)))(states),
        "task": tabletop.task_of(states)[:, 0],
        "action": action,
        "label": label,
    }


def split_episodes(rollout: Imagined, seeds: Sequence[int] | np.ndarray, actor: str) -> Iterator[Episode]:
    """Yields the episodes of a true rollout made with ``video=True`` from ``make_starts(seeds)``.

    Raises:
      ValueError: a rollout without video or without the true predicate.
    """
    if rollout.video_BNTHWC is None or rollout.truth_BNT is None:
        raise ValueError("episodes need a rollout of the true simulator made with video=True")
    host = sharding.host(rollout)  # from all devices and processes, once for the whole batch
    batch = host.task_B.shape[0]
    # Chunks are joined to steps: (B, N, T, ...) -> (B, N * T, ...)
    video_BSHWC = to_uint8(host.video_BNTHWC).reshape(batch, -1, *host.video_BNTHWC.shape[3:])
    first_BHWC = to_uint8(host.frame_BNHWC[:, 0])
    action_BSA = host.action_BNTA.reshape(batch, -1, host.action_BNTA.shape[-1])
    truth_BS = host.truth_BNT.reshape(batch, -1)
    for b in range(min(batch, len(seeds))):
        task = int(host.task_B[b])
        yield Episode(
            frame_SHWC=np.concatenate([first_BHWC[b : b + 1], video_BSHWC[b]]),
            action_SA=action_BSA[b],
            success_S=np.concatenate([[False], truth_BS[b]]),  # no layout begins with the block on the plate
            instruction=tabletop.INSTRUCTIONS[task],
            task=task,
            seed=int(seeds[b]),
            actor=actor,
            label_SA=action_BSA[b],
        )


@functools.partial(jax.jit, static_argnums=4)
def _follow(seed_B: Array, played_BSA: Array, step_B: Array, action_BSA: Array, cfg: TabletopConfig) -> Array:
    state = tabletop.replay(seed_B, played_BSA, step_B, cfg)
    # As one chunk of all steps; frames that nobody looks at are not rendered.
    return tabletop.world(cfg).step(state, action_BSA, None)[2]


def measure_subgoals(rollout: Imagined, seed_B: Array, cfg: TabletopConfig) -> dict[str, float]:
    """Returns the share of true episodes that reached each sub-goal, by replaying their actions."""
    batch = seed_B.shape[0]
    action_BSA = rollout.action_BNTA.reshape(batch, -1, rollout.action_BNTA.shape[-1])
    return {name: float(rate) for name, rate in _subgoals(seed_B, action_BSA, cfg).items()}


@functools.partial(jax.jit, static_argnums=2)
def _subgoals(seed_B: Array, action_BSA: Array, cfg: TabletopConfig) -> dict[str, Array]:
    # Sub-goals are in the state (what is held) and not in the pictures, so the state is made again from the actions.
    state = tabletop.reset_batch(seed_B, cfg)
    states = jax.vmap(lambda s, a: tabletop.roll(s, a, cfg))(state, action_BSA)
    reached = jax.vmap(lambda s: tabletop.subgoals(s, cfg))(states)
    # A share of episodes each: how far the policy comes on the way to a success.
    return jax.tree.map(lambda flag_B: flag_B.mean(), reached)
