"""The simulators in pure JAX: what is written once for all of them, and the arena that they are.

A suite is a bundle of pure functions of one state, without a batch axis; which one it is, the type of its settings
says. Here is what needs no more than these functions: episodes by seed, the simulator as a world, the expert's episodes
and the policy's. Rollouts are compiled programs, policy and simulator in one. They come from ``imagine.imagine`` with
the simulator as the world; this file gives it its start states and turns what it returns into ``Episode`` records.
"""

from __future__ import annotations

import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax.core import sharding
from wovr_jax.core.pixels import to_uint8
from wovr_jax.data import episodes as disk
from wovr_jax.data.starts import Starts
from wovr_jax.sim.arena import Actor, Course, Groups, Measured, add_halves, layouts
from wovr_jax.sim.relay import expert as relay_expert
from wovr_jax.sim.relay import table as relay
from wovr_jax.sim.relay.table import RelayConfig
from wovr_jax.sim.tabletop import expert as tabletop_expert
from wovr_jax.sim.tabletop import table as tabletop
from wovr_jax.sim.tabletop.expert import ExpertConfig, disturb
from wovr_jax.sim.tabletop.table import TabletopConfig
from wovr_jax.types import NULL_ACTION, Array, Episode, Imagined, Start, World

Simulator = TabletopConfig | RelayConfig
"""The settings of an embedded simulator: ``size`` in pixels, ``horizon`` in steps, and what is its own."""


class Suite(NamedTuple):
    """A deterministic simulator and its expert; the state is a pytree, and no function knows a batch axis.

    Attributes:
      name: of the suite, for manifests and statistics.
      instructions: what the robot may be asked to do; a task index is an index into it.
      reset: ``reset(key, sim) -> state``, a random layout.
      step: ``step(state, action_A, sim) -> state``.
      success: ``success(state, sim)``, a bool.
      render: ``render(state, sim)``: (size, size, 3) float32 in [-1, 1].
      task_of: ``task_of(state)``, the int32 task index.
      subgoals: ``subgoals(states_S, sim)``: which sub-goals an episode reached, by name and in their order.
      begin: ``begin(key, expert)``: what the expert carries through an episode.
      act: ``act(carried, state, expert, sim) -> (carried, label_A)``: the expert's clean action.
    """

    name: str
    instructions: tuple[str, ...]
    reset: Callable[[Array, Any], Any]
    step: Callable[[Any, Array, Any], Any]
    success: Callable[[Any, Any], Array]
    render: Callable[[Any, Any], Array]
    task_of: Callable[[Any], Array]
    subgoals: Callable[[Any, Any], dict[str, Array]]
    begin: Callable[[Array, ExpertConfig], Any]
    act: Callable[[Any, Any, ExpertConfig, Any], tuple[Any, Array]]


def _join(name: str, table: ModuleType, expert: ModuleType) -> Suite:
    """Returns the suite of a module that simulates and one that demonstrates, whose functions have the same names."""
    of_both = {part: getattr(expert if part in ("begin", "act") else table, part) for part in Suite._fields[2:]}
    return Suite(name, table.INSTRUCTIONS, **of_both)


SUITES: dict[type, Suite] = {
    TabletopConfig: _join("tabletop", tabletop, tabletop_expert),
    RelayConfig: _join("relay", relay, relay_expert),
}


def suite_of(sim: Simulator) -> Suite:
    """Returns the suite that these settings are of."""
    return SUITES[type(sim)]


# ---------------------------------------------------------------- states and worlds


def reset_batch(seed_B: Array, sim: Simulator) -> Any:
    """Resets by integer seeds: one seed gives one layout, wherever and whenever it is computed."""
    return jax.vmap(lambda seed: suite_of(sim).reset(jax.random.key(seed), sim))(seed_B)


def roll(state: Any, action_SA: Array, sim: Simulator) -> Any:
    """Returns the states after each of S actions, stacked on a leading axis."""
    step = suite_of(sim).step

    def body(state: Any, action_A: Array) -> tuple[Any, Any]:
        state = step(state, action_A, sim)
        return state, state

    return jax.lax.scan(body, state, action_SA)[1]


def replay(seed_B: Array, action_BSA: Array, step_B: Array, sim: Simulator) -> Any:
    """Returns the states after ``step_B`` actions of recorded episodes: how ``Start.sim`` is rebuilt."""
    # All S + 1 states, then one of them: rows stop at different steps, and a program has one length.
    first_B = reset_batch(seed_B, sim)
    state_BS = jax.vmap(lambda first, action_SA: _put_first(first, roll(first, action_SA, sim)))(first_B, action_BSA)
    return jax.tree.map(lambda leaf: leaf[jnp.arange(len(step_B)), step_B], state_BS)


def _put_first(first: Any, states_S: Any) -> Any:
    """Returns S + 1 states of an episode from its first one and those after each step."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, states_S)


def world(sim: Simulator) -> World:
    """Returns the true simulator behind the interface of the learned world model.

    The state is ``Start.sim`` (a batch of the simulator's states); the true predicate comes back with the frames.
    """
    suite = suite_of(sim)

    def begin(start: Start) -> Any:
        if start.sim is None:
            raise ValueError(
                "the true simulator needs Start.sim, the simulator state; got None. Build the start states with sim=..."
            )
        return start.sim

    def chunk(state: Any, action_BTA: Array, key_B: Array) -> tuple[Any, Array, Array]:
        del key_B  # the simulator is deterministic
        # Rolled first, rendered afterwards: the scan over steps carries a few numbers and no pictures.
        states_BT = jax.vmap(lambda s, a: roll(s, a, sim))(state, action_BTA)
        frame_BTHWC = jax.vmap(jax.vmap(lambda s: suite.render(s, sim)))(states_BT)
        truth_BT = jax.vmap(jax.vmap(lambda s: suite.success(s, sim)))(states_BT)
        return jax.tree.map(lambda leaf: leaf[:, -1], states_BT), frame_BTHWC, truth_BT

    return World(begin=begin, step=chunk)


def demonstrate(seed: Array, key: Array, expert: ExpertConfig, sim: Simulator) -> tuple[Any, Array, Array]:
    """Plays one demonstration: states (S + 1 leading), clean labels (S, 7), executed actions (S, 7)."""
    # The policy imitates the clean action in states that noisy ones led to: so it learns to come back.
    suite = suite_of(sim)
    first = suite.reset(jax.random.key(seed), sim)
    k_flaw, k_noise = jax.random.split(key)

    def body(carry: tuple[Any, Any], key: Array) -> tuple[tuple[Any, Any], tuple[Any, Array, Array]]:
        carried, state = carry
        carried, label = suite.act(carried, state, expert, sim)
        executed = disturb(label, key, expert)
        after = suite.step(state, executed, sim)
        return (carried, after), (after, label, executed)

    keys = jax.random.split(k_noise, sim.horizon)
    _, (states, label_SA, action_SA) = jax.lax.scan(body, (suite.begin(k_flaw, expert), first), keys)
    return _put_first(first, states), label_SA, action_SA


# ---------------------------------------------------------------- the arena


class Embedded:
    """The embedded simulator of a run; see ``sim.arena.Arena``.

    Args:
      sim: the simulator.
      expert: who demonstrates.
      seed: of the run.
      batch: episodes rolled at once.
      memory: M, memory frames of a start state.
      prompt_KL: (tasks, L) int32 prompt tokens of every instruction.
    """

    hold = 1
    explore: Callable[[int, Actor, Groups], Imagined] | None = None

    def __init__(self, sim: Simulator, expert: ExpertConfig, *, seed: int, batch: int, memory: int, prompt_KL: Array):
        self.sim, self.expert, self.seed, self.batch, self.memory = sim, expert, seed, batch, memory
        self.prompt_KL, self.steps = prompt_KL, sim.horizon
        self.name, self.instructions = suite_of(sim).name, suite_of(sim).instructions

    def demonstrate(self, folder: pathlib.Path, key: Array, count: int, validation: int) -> dict[str, Any]:
        """Writes scripted episodes, a share of them flawed."""
        seeds = layouts(self.seed, "demonstrations", count + validation)
        # One generator feeds both folders, so that the two are parts of the same batches.
        episodes = play_demonstrations(seeds, key, self.expert, self.sim)
        halves = {"episodes": itertools.islice(episodes, count), "validation": episodes}
        return add_halves([self._write(folder / name, half) for name, half in halves.items()])

    def collect(self, folder: pathlib.Path, purpose: str, count: int, actor: Actor) -> dict[str, Any]:
        """Writes rollouts from fresh layouts."""
        parts = self.roll(layouts(self.seed, purpose, count), actor)
        split = functools.partial(split_episodes, actor=actor.name, instructions=self.instructions)
        episodes = (episode for seeds, rollout in parts for episode in split(rollout, seeds))
        facts = self._write(folder, episodes)
        return {"episodes": count, "successes": facts["successes"], "true_steps": count * self.steps}

    def measure(self, folder: pathlib.Path, count: int, actor: Actor) -> Measured:
        """Returns success, and sub-goals by replaying what was done."""
        del folder  # a minute's work, and nothing to keep of it
        seeds = layouts(self.seed, "evaluate", count)
        parts = [sharding.host(rollout) for _, rollout in self.roll(seeds, actor)]
        rollout = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)  # without the last padding
        rates = measure_subgoals(rollout.action_BNTA, jnp.asarray(seeds), self.sim)
        rates = {name: float(rate) for name, rate in rates.items()}
        return Measured(rollout.truth_BNT.any(axis=(1, 2)), rates, count * self.steps)

    def follow(self, table: Starts, row_K: np.ndarray, action_KSA: np.ndarray, film: bool = False) -> Course:
        """Returns true success after each action, all rows in one program."""
        reached = (np.asarray(column)[row_K] for column in (table.seed_K, table.played_KSA, table.step_K))
        success_KS, frame_KSHWC = _follow(*reached, action_KSA, self.sim, film)
        return np.asarray(success_KS), to_uint8(frame_KSHWC) if film else None

    def roll(self, seeds: np.ndarray, actor: Actor) -> Iterator[tuple[np.ndarray, Imagined]]:
        """Yields rollouts in equal batches of seeds, so that one program does; rows beyond the seeds are padding."""
        for low in range(0, len(seeds), self.batch):
            part = seeds[low : low + self.batch]
            padded_B = jnp.asarray(np.resize(part, self.batch))
            key = jax.random.fold_in(actor.key, low)
            yield part, actor.acting.roll(actor.params, padded_B, key, actor.temperature)

    def _write(self, folder: pathlib.Path, episodes: Iterator[Episode]) -> dict[str, Any]:
        return disk.write(folder, episodes, meta={"sim": self.name}, overwrite=True)


def make_starts(seed_B: Array, prompt_KL: Array, sim: Simulator, memory: int = 4) -> Start:
    """Makes the start states of episodes for integer seeds.

    Args:
      seed_B: (B,) int32 reset seeds.
      prompt_KL: (tasks, L) int32 prompt tokens of every task.
      sim: the simulator.
      memory: M, how many copies of the first frame fill the memory.
    """
    state = reset_batch(seed_B, sim)
    frame_BHWC = jax.vmap(lambda s: suite_of(sim).render(s, sim))(state)
    task_B = suite_of(sim).task_of(state)
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
        sim=state,
    )


def begin_episodes(seeds: np.ndarray, sim: Simulator) -> list[Episode]:
    """Returns an episode for each reset seed in which nothing has happened yet; a beginning costs no step."""
    suite, state = suite_of(sim), reset_batch(jnp.asarray(seeds), sim)
    frame_BHWC = to_uint8(jax.vmap(lambda s: suite.render(s, sim))(state))
    none, rest = np.zeros(1, bool), np.asarray([NULL_ACTION], np.float32)
    rows = zip(frame_BHWC, np.asarray(suite.task_of(state)).tolist(), np.asarray(seeds).tolist(), strict=True)
    return [
        Episode(frame_HWC[None], rest, none, suite.instructions[task], task, seed, "nobody", rest)
        for frame_HWC, task, seed in rows
    ]


def play_demonstrations(
    seeds: Sequence[int] | np.ndarray,
    key: Array,
    expert: ExpertConfig,
    sim: Simulator,
    batch: int = 128,
    play: Callable = demonstrate,
) -> Iterator[Episode]:
    """Yields scripted episodes, one for each reset seed; ``play`` is ``demonstrate`` or ``wander.wander``."""
    for low in range(0, len(seeds), batch):
        part = np.asarray(seeds[low : low + batch], np.int32)
        padded = np.resize(part, batch)  # one compiled shape; the padding is dropped below
        out = sharding.host(play_batch(padded, jax.random.fold_in(key, low), play, expert, sim))
        for b in range(len(part)):
            yield Episode(
                frame_SHWC=to_uint8(out["frame"][b]),
                action_SA=out["action"][b],
                success_S=out["success"][b],
                instruction=suite_of(sim).instructions[int(out["task"][b])],
                task=int(out["task"][b]),
                seed=int(part[b]),
                actor="expert",
                label_SA=out["label"][b],
            )


# Of the module, so that the runs of a study, which differ in their seeds, share one program.
@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def play_batch(seed_B: Array, key: Array, play: Callable, expert: ExpertConfig, sim: Simulator) -> dict[str, Array]:
    """Plays one scripted episode for each reset seed, as columns with the batch in front."""
    suite = suite_of(sim)
    # The seed decides the layout, the key flaw and noise: the same layouts can be shown under other noise.
    keys = jax.random.split(key, seed_B.shape[0])
    states, label, action = jax.vmap(lambda s, k: play(s, k, expert, sim))(seed_B, keys)
    return {
        "frame": jax.vmap(jax.vmap(lambda s: suite.render(s, sim)))(states),
        "success": jax.vmap(jax.vmap(lambda s: suite.success(s, sim)))(states),
        "task": suite.task_of(states)[:, 0],
        "action": action,
        "label": label,
    }


def split_episodes(
    rollout: Imagined, seeds: Sequence[int] | np.ndarray, actor: str, instructions: Sequence[str]
) -> Iterator[Episode]:
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
            success_S=np.concatenate([[False], truth_BS[b]]),  # no layout begins with a success
            instruction=instructions[task],
            task=task,
            seed=int(seeds[b]),
            actor=actor,
            label_SA=action_BSA[b],
        )


@functools.partial(jax.jit, static_argnums=(4, 5))
def _follow(seed_B: Array, played_BSA: Array, step_B: Array, action_BSA: Array, sim: Simulator, film: bool) -> Any:
    # As one chunk of all steps. Frames that nobody asks for are not rendered.
    _, frame_BSHWC, success_BS = world(sim).step(replay(seed_B, played_BSA, step_B, sim), action_BSA, None)
    return success_BS, frame_BSHWC if film else None


@functools.partial(jax.jit, static_argnums=2)
def measure_subgoals(action_BNTA: Array, seed_B: Array, sim: Simulator) -> dict[str, Array]:
    """Returns the share of true episodes that reached each sub-goal, by replaying their actions."""
    # Sub-goals are in the state (what is held) and not in the pictures, so the state is made again from the actions.
    state, action_BSA = reset_batch(seed_B, sim), action_BNTA.reshape(len(seed_B), -1, action_BNTA.shape[-1])
    states = jax.vmap(lambda s, a: roll(s, a, sim))(state, action_BSA)
    reached = jax.vmap(lambda s: suite_of(sim).subgoals(s, sim))(states)
    # A share of episodes each: how far the policy comes on the way to a success.
    return jax.tree.map(lambda flag_B: flag_B.mean(), reached)
