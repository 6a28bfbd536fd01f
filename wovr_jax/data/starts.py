"""Start states of imagined rollouts: episode starts, and keyframes out of failed episodes (KIR).

A keyframe-initialised rollout begins in the middle of an episode, close to where it went
wrong, so that a group of rollouts from it is neither all failure nor all success (WoVR,
section 4.2; file semantics of RLinf:rlinf/data/datasets/world_model.py). The anchor is the
true first frame of the episode, as in training of the world model.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from wovr_jax.core import processes
from wovr_jax.core.disk import fresh_folder, read_json, replace_folder, settle_folder, write_json
from wovr_jax.core.pixels import to_float
from wovr_jax.data import episodes as disk
from wovr_jax.data.batches import NoDataError
from wovr_jax.types import NULL_ACTION, Array, Episode, Start

RULES = ("initial", "before_failure", "gripper_event", "progress", "uniform", "contact", "release")
PROGRESS = (0.25, 0.5, 0.75)
FINGERS = (6, 7)
"""Places of the two finger joints in LIBERO's proprioception, metres."""
SHUT, STILL = 2e-3, 5e-4
"""Fingers nearer than this hold nothing; those that closed by less than that in a step have met something."""
CARRIED = 8
"""Steps for which a thing has to be held, or letting go of it is a finger's tremor."""
INDEX = "starts.json"

Column = Array | np.ndarray


@struct.dataclass
class Starts:
    """K start states with where each comes from; host or device arrays.

    Attributes:
      anchor_KHWC: uint8, first frame of the episode.
      memory_KMHWC: uint8, the last M frames up to ``step_K``; frame 0 repeated before the episode.
      action_KMA: float32, the actions that produced them; null where none did.
      played_KSA: float32, the actions from the reset up to ``step_K`` and null actions after
        that: with ``seed_K`` they bring the true simulator to this state.
      task_K, step_K, seed_K: int32.
      episode_K: int32, row of the episode among those given.
      rule_K: int32, index into ``RULES``.
      initials: how many of the first rows are episode starts; the others are keyframes.
    """

    anchor_KHWC: Column
    memory_KMHWC: Column
    action_KMA: Column
    played_KSA: Column
    task_K: Column
    step_K: Column
    seed_K: Column
    episode_K: Column
    rule_K: Column
    initials: int = struct.field(pytree_node=False)

    def __len__(self) -> int:
        return len(self.task_K)

    def provenance(self) -> list[dict[str, Any]]:
        """Where each start comes from: episode, seed, task, step, rule."""
        columns = (self.episode_K, self.seed_K, self.task_K, self.step_K, self.rule_K)
        rows = zip(*(np.asarray(column).tolist() for column in columns), strict=True)
        return [
            {"episode": e, "seed": seed, "task": task, "step": step, "rule": RULES[rule]}
            for e, seed, task, step, rule in rows
        ]


def initial(episodes: Sequence[Episode], *, memory: int = 4) -> Starts:
    """One start at the reset of each episode."""
    if not episodes:
        raise NoDataError("no episodes to take start states from.")
    return _build(episodes, [(e, 0, "initial") for e in range(len(episodes))], memory)


def keyframes(
    episodes: Sequence[Episode],
    rule: str = "before_failure",
    before: int = 6,
    rng: np.random.Generator | int = 0,
    *,
    each: int = 1,
    least: int = 1,
    successes: bool = False,
    event: str = "any",
    memory: int = 4,
) -> Starts:
    """Starts in the middle of failed episodes.

    Rules, each giving a step t in [1, S); ``u`` is uniform on ``least`` ... ``before``:

    * ``gripper_event``: t = i - u (at least 1), i a step whose action opens or closes the gripper;
    * ``before_failure``: the same for the last such i, the attempt that failed; u steps before
      the end of an episode that never moved the gripper;
    * ``contact``: the same, i a step in which fingers that close meet something; needs the robot's state;
    * ``release``: the same, i a step whose action lets go of what was carried; a policy that failed goes on opening and
      closing, and the last time says little about why;
    * ``progress``: a quarter, half or three quarters of the episode;
    * ``uniform``: any step.

    Args:
      episodes: rollouts; those without a success are used.
      rule: which.
      before: how far before the event at most, in steps.
      rng: generator or seed.
      each: keyframes drawn from each episode.
      least: how far before the event at least; ``least=8`` stays one chunk away from it.
      successes: use successful episodes too, up to the step before their first success.
      event: ``"any"``, ``"open"`` or ``"close"``: gripper changes that count.
      memory: M.

    Raises:
      NoDataError: when no episode gives a keyframe.
      ValueError: for an unknown rule or event, or unless 1 <= ``least`` <= ``before``.
    """
    check_rule(rule, least, before, event)
    rng = np.random.default_rng(rng)
    picks = []
    for e, episode in enumerate(episodes):
        if episode.success_S.any() and not successes:
            continue
        # A start where the goal already holds is won before it begins.
        end = int(np.argmax(episode.success_S)) if episode.success_S.any() else len(episode.action_SA)
        steps = [_pick(episode, rule, (least, before), event, end, rng) for _ in range(each)]
        picks += [(e, step, rule) for step in steps if step is not None]
    if not picks:
        failed = sum(not episode.success_S.any() for episode in episodes)
        raise NoDataError(
            f"rule {rule!r} finds no keyframe in {len(episodes)} episodes, of which {failed} failed. "
            f"Use successes=True, another rule, or no keyframe starts."
        )
    return _build(episodes, picks, memory)


def check_rule(rule: str, least: int, before: int, event: str) -> None:
    """Refuses what ``keyframes`` does not know, with a ValueError."""
    if rule not in RULES[1:]:
        raise ValueError(f"unknown keyframe rule {rule!r}; one of {', '.join(RULES[1:])}.")
    if event not in ("any", "open", "close"):
        raise ValueError(f"unknown gripper event {event!r}; one of any, open, close.")
    if not 1 <= least <= before:
        raise ValueError(f"expected 1 <= least <= before, got least {least} and before {before}.")


def gripper_events(action_SA: np.ndarray, event: str = "any") -> np.ndarray:
    """Steps whose action changes the gripper command; it counts as open before the first step."""
    closed_S = action_SA[:, -1] > 0
    was_S = np.concatenate([[False], closed_S[:-1]])
    wanted = {"any": closed_S != was_S, "close": closed_S & ~was_S, "open": was_S & ~closed_S}
    return np.flatnonzero(wanted[event])


def contacts(episode: Episode) -> np.ndarray:
    """Steps in which closing fingers stop at something between them: a grasp, of whatever it is.

    Raises:
      NoDataError: an episode without the robot's state.
    """
    if episode.state_SD is None:
        raise NoDataError("contact and release: the rule reads the fingers off the robot's state, which is not here.")
    width_S = np.abs(np.diff(episode.state_SD[:, FINGERS], axis=1))[:, 0]
    closes_S = episode.action_SA[:, -1] > 0
    held_S = closes_S & (width_S[1:] > SHUT) & (width_S[:-1] - width_S[1:] < STILL)
    # Fingers that were only just told to close have not moved yet; they stand still at the full width.
    held_S &= width_S[1:] < width_S.max() - 4 * STILL
    return np.flatnonzero(held_S & ~np.concatenate([[False], held_S[:-1]]))


def releases(episode: Episode) -> np.ndarray:
    """Steps whose action opens fingers that have held something for ``CARRIED`` steps.

    Raises:
      NoDataError: an episode without the robot's state.
    """
    open_E = gripper_events(episode.action_SA, "open")
    ends = [(step, open_E[open_E > step]) for step in contacts(episode)]
    return np.unique([after[0] for step, after in ends if len(after) and after[0] - step >= CARRIED]).astype(int)


def _pick(
    episode: Episode, rule: str, back: tuple[int, int], event: str, end: int, rng: np.random.Generator
) -> int | None:
    """A step in [1, end), or None where the rule finds none."""
    if end < 2:
        return None
    if rule == "uniform":
        return int(rng.integers(1, end))
    if rule == "progress":
        return int(np.clip(round(end * rng.choice(PROGRESS)), 1, end - 1))
    told = {"contact": contacts, "release": releases}.get(rule)
    found = told(episode) if told else gripper_events(episode.action_SA, event)
    found = found[(found >= 1) & (found < end)]
    if rule == "before_failure":
        found = found[-1:] if len(found) else np.array([end])
    if not len(found):
        return None
    return int(np.clip(rng.choice(found) - rng.integers(back[0], back[1] + 1), 1, end - 1))


def _build(episodes: Sequence[Episode], picks: Sequence[tuple[int, int, str]], memory: int) -> Starts:
    null = np.asarray(NULL_ACTION, np.float32)
    horizon = max(len(episode.action_SA) for episode in episodes)
    memories, actions, played = [], [], []
    for e, step, _ in picks:
        episode = episodes[e]
        back_M = step - np.arange(memory)[::-1]
        memories.append(episode.frame_SHWC[np.maximum(back_M, 0)])
        actions.append(np.where((back_M > 0)[:, None], episode.action_SA[np.maximum(back_M - 1, 0)], null))
        played.append(np.where((np.arange(horizon) < step)[:, None], _longer(episode.action_SA, horizon), null))
    chosen = [episodes[e] for e, _, _ in picks]
    return Starts(
        anchor_KHWC=np.stack([episode.frame_SHWC[0] for episode in chosen]),
        memory_KMHWC=np.stack(memories),
        action_KMA=np.stack(actions).astype(np.float32),
        played_KSA=np.stack(played).astype(np.float32),
        task_K=np.array([episode.task for episode in chosen], np.int32),
        step_K=np.array([step for _, step, _ in picks], np.int32),
        seed_K=np.array([episode.seed for episode in chosen], np.int32),
        episode_K=np.array([e for e, _, _ in picks], np.int32),
        rule_K=np.array([RULES.index(rule) for _, _, rule in picks], np.int32),
        initials=sum(rule == "initial" for _, _, rule in picks),
    )


def _longer(action_SA: np.ndarray, length: int) -> np.ndarray:
    return np.pad(action_SA, [(0, length - len(action_SA)), (0, 0)])


def join(initials: Starts, keys: Starts) -> Starts:
    """Episode starts followed by keyframes, in one table."""
    if initials.initials != len(initials) or keys.initials:
        raise ValueError("join takes episode starts first and keyframes second.")
    length = max(initials.played_KSA.shape[1], keys.played_KSA.shape[1])

    def longer(table: Starts) -> Starts:
        played = np.tile(np.asarray(NULL_ACTION, np.float32), (len(table), length, 1))
        played[:, : table.played_KSA.shape[1]] = table.played_KSA
        return dataclasses.replace(table, played_KSA=played, initials=0)

    joined = jax.tree.map(lambda a, b: np.concatenate([a, b]), longer(initials), longer(keys))
    return dataclasses.replace(joined, initials=len(initials))


def draw(table: Starts, key: Array, groups: int, size: int, *, share: float = 1 / 3) -> Array:
    """(groups * size,) int32 rows for one iteration: ``size`` equal consecutive rows a group.

    A ``share`` of the groups, rounded, begins at keyframes; all where the table has no episode
    starts, none where it has no keyframes. A third is the share in RLinf's released Goal bundle.
    """
    kir = round(groups * share) if table.initials and len(table) > table.initials else 0
    kir = groups if not table.initials else kir
    k_initial, k_keyframe = jax.random.split(key)
    parts = []
    if groups - kir:
        parts.append(jax.random.randint(k_initial, (groups - kir,), 0, table.initials))
    if kir:
        parts.append(jax.random.randint(k_keyframe, (kir,), table.initials, len(table)))
    return jnp.repeat(jnp.concatenate(parts).astype(jnp.int32), size)


def gather(table: Starts, row_B: Array, prompt_KL: Array) -> Start:
    """The starts of ``row_B`` on the device.

    Args:
      table: start states; a device table is indexed there, also under jit, a host table (one
        too large for the device) on the host.
      row_B: (B,) rows, from :func:`draw` for instance.
      prompt_KL: (tasks, L) int32 prompt tokens of every task.
    """

    def pick(column_K: Column) -> Array:
        return column_K[row_B] if isinstance(column_K, jax.Array) else jnp.asarray(column_K[np.asarray(row_B)])

    picked = jax.tree.map(pick, table)
    return Start(
        anchor_BHWC=to_float(picked.anchor_KHWC),
        memory_BMHWC=to_float(picked.memory_KMHWC),
        action_BMA=picked.action_KMA,
        prompt_BL=jnp.asarray(prompt_KL)[picked.task_K],
        task_B=picked.task_K,
        keyframe_B=picked.rule_K > 0,
        step_B=picked.step_K,
    )


def save(
    folder: str | os.PathLike, table: Starts, *, meta: dict[str, Any] | None = None, overwrite: bool = False
) -> None:
    """Writes the table as one ``.npy`` a column and a JSON index; whole or not at all. Process 0 does.

    ``meta`` keeps facts such as the manifest's hash of the episodes that the starts come from.
    """
    if not processes.first():
        return
    folder = settle_folder(folder, _complete)
    if folder.exists() and not (overwrite and _complete(folder)):
        raise disk.EpisodesError(f"{folder} exists already; pass overwrite=True to replace start states.")
    fresh = fresh_folder(folder)
    columns = [field.name for field in dataclasses.fields(Starts) if field.name != "initials"]
    for name in columns:
        np.save(fresh / f"{name}.npy", np.asarray(getattr(table, name)), allow_pickle=False)
    facts = {"format": "wovr_jax starts", "schema": 1, "initials": table.initials, "rows": len(table)}
    facts |= {"rules": list(RULES), "meta": meta or {}, "starts": table.provenance()}
    write_json(fresh / INDEX, facts)
    replace_folder(fresh, folder)


def load(folder: str | os.PathLike) -> Starts:
    """Reads what :func:`save` wrote.

    Raises:
      EpisodesError: no folder, a folder of something else, a column missing or cut short.
    """
    folder = settle_folder(folder, _complete)
    if not _complete(folder):
        raise disk.EpisodesError(f"no start states at {folder}: {INDEX} is missing.")
    facts = read_json(folder / INDEX)
    columns = [field.name for field in dataclasses.fields(Starts) if field.name != "initials"]
    arrays = {name: _column(folder / f"{name}.npy", facts["rows"]) for name in columns}
    return Starts(**arrays, initials=facts["initials"])


def _column(path: pathlib.Path, rows: int) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise disk.EpisodesError(f"{path} is missing or cut short: {error}") from error
    if len(array) != rows:
        raise disk.EpisodesError(f"{path}: expected {rows} rows, got {len(array)}.")
    return array


def _complete(folder: pathlib.Path) -> bool:
    return (folder / INDEX).is_file()
