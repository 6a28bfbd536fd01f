"""Start states of imagined rollouts: episode starts, and keyframes out of failed episodes (KIR).

A keyframe-initialised rollout begins in the middle of an episode, close to where it went wrong, so that a group of
rollouts from it is neither all failure nor all success (WoVR, section 4.2; file semantics of
RLinf:rlinf/data/datasets/world_model.py). The anchor is the true first frame, as in training of the world model.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import typing
from collections.abc import Sequence
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from wovr_jax.core import processes
from wovr_jax.core.config import Count, Faults, Natural, Share, checked
from wovr_jax.core.disk import fresh_folder, read_json, replace_folder, settle_folder, write_json
from wovr_jax.core.pixels import to_float
from wovr_jax.data import episodes as disk
from wovr_jax.data.batches import NoDataError
from wovr_jax.types import NULL_ACTION, Array, Episode, Start

Rule = Literal["last_event", "gripper_event", "progress", "uniform", "contact", "release", "last_chance"]
RULES = ("initial", *typing.get_args(Rule))
Event = Literal["any", "open", "close"]
PROGRESS = (0.25, 0.5, 0.75)
"""Shares of an episode at which the rule ``progress`` begins."""
FINGERS = (6, 7)
"""Places of the two finger joints in LIBERO's proprioception, metres."""
SHUT, STILL = 2e-3, 5e-4
"""Fingers nearer than this hold nothing; those that closed by less than that in a step have met something."""
CARRIED = 8
"""Steps for which a thing has to be held, or letting go of it is a finger's tremor."""
BY_SEED, UNKNOWN = -1, -2
"""In the place of an initial state's number: the seed alone says where the episode began, or nothing does."""
INDEX = "starts.json"

Column = Array | np.ndarray
"""One array of a table, on the host or on the device."""


@checked
@dataclasses.dataclass(frozen=True)
class StartsConfig:
    """Where imagined rollouts begin.

    A rule gives a step t of a failed episode, at least 1 and at least ``room`` steps before the end of its time; ``u``
    is uniform on ``least`` ... ``before``:

    * ``gripper_event``: t = i - u, i a step whose action opens or closes the gripper;
    * ``last_event``: the same for the last such i, which may come long after the failure; the end where there is none;
    * ``last_chance``: the same for the last such i that leaves the room; the latest t that does where none does;
    * ``contact``: the same, i a step in which fingers that close meet something; needs the robot's state;
    * ``release``: the same, i a step whose action lets go of what was carried; a policy that failed goes on opening and
      closing, and the last time says little about why;
    * ``progress``: a quarter, half or three quarters of the episode;
    * ``uniform``: any step.

    Attributes:
      share: of the groups that begin at keyframes (KIR); 0 switches KIR off.
      rule: which.
      before: how far before the event at most, in steps.
      event: gripper changes that count.
      each: keyframes drawn from each episode.
      least: how far before the event at least; ``least=8`` stays one chunk away from it.
      room: steps of its episode that are left to a keyframe at least. From one without time every rollout fails.
      deadline: whether a rollout may succeed only in what is left of its episode; RLinf gives all of them equal time.
    """

    share: Share = 1 / 3
    rule: Rule = "last_chance"
    before: Count = 6
    event: Event = "any"
    each: Count = 2
    least: Count = 1
    room: Natural = 8
    deadline: bool = True

    def faults(self) -> Faults:
        """Yields an interval of steps without a step."""
        if self.least > self.before:
            yield "least", f"expected at most before={self.before}, got {self.least}"


@struct.dataclass
class Starts:
    """K start states with where each comes from; host or device arrays.

    Attributes:
      anchor_KHWC: uint8, first frame of the episode.
      memory_KMHWC: uint8, the last M frames up to ``step_K``; frame 0 repeated before the episode.
      action_KMA: float32, the actions that produced them; null where none did.
      played_KSA: float32, actions up to ``step_K``, then null ones: with ``seed_K`` they bring the simulator here.
      task_K, step_K, seed_K: int32.
      init_K: int32, number of the initial state that the episode's simulator has, or ``BY_SEED`` or ``UNKNOWN``.
      episode_K: int32, row of the episode among those given.
      rule_K: int32, index into ``RULES``; it is on disk too, so new rules go to the end.
      initials: how many of the first rows are episode starts; the others are keyframes.
    """

    anchor_KHWC: Column
    memory_KMHWC: Column
    action_KMA: Column
    played_KSA: Column
    task_K: Column
    step_K: Column
    seed_K: Column
    init_K: Column
    episode_K: Column
    rule_K: Column
    initials: int = struct.field(pytree_node=False)

    def __len__(self) -> int:
        return len(self.task_K)

    def provenance(self) -> list[dict[str, Any]]:
        """Returns where each start comes from: episode, seed, task, step, rule."""
        names = ("episode", "seed", "task", "step", "rule")
        columns = (np.asarray(getattr(self, f"{name}_K")).tolist() for name in names)
        rows = (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))
        return [row | {"rule": RULES[row["rule"]]} for row in rows]


COLUMNS = [field.name for field in dataclasses.fields(Starts) if field.name != "initials"]
"""The arrays of a table, each a file of its own."""


def is_intervened(episode: Episode) -> bool:
    """Whether somebody else's hand was in it: what it came to is not the policy's doing, and not for it to mend."""
    return bool(episode.origin.get("intervened"))


def initial(episodes: Sequence[Episode], *, memory: int = 4, intervened: bool = False) -> Starts:
    """Returns one start at the reset of each episode; of intervened ones only where asked for.

    Raises:
      NoDataError: when there are no episodes.
    """
    rows = [e for e, episode in enumerate(episodes) if intervened or not is_intervened(episode)]
    if not rows:
        raise NoDataError(f"no episodes to take start states from: {len(episodes)} were given, all intervened in.")
    # Step 0: nothing was played, so the memory is M copies of the first frame and all its actions are null.
    return _build(episodes, [(e, 0, "initial") for e in rows], memory)


def keyframes(
    episodes: Sequence[Episode], cfg: StartsConfig, rng: np.random.Generator | int = 0, *, steps: int, memory: int = 4
) -> Starts:
    """Returns starts in the middle of failed episodes.

    Args:
      episodes: rollouts; only those without a success and without an intervention are used. A group of rollouts that
        begins in a success would mostly succeed, and a group that ends alike teaches nothing.
      cfg: the rule, and how far before an event.
      rng: generator or seed.
      steps: of an episode that runs to its end, from which ``cfg.room`` is counted.
      memory: M.

    Raises:
      NoDataError: when no episode gives a keyframe.
    """
    rng = np.random.default_rng(rng)
    failed = [e for e, episode in enumerate(episodes) if not (episode.success_S.any() or is_intervened(episode))]
    picks = []
    for e in failed:
        found = [_pick(episodes[e], cfg, rng, steps) for _ in range(cfg.each)]
        picks += [(e, step, cfg.rule) for step in found if step is not None]
    if not picks:
        raise NoDataError(
            f"rule {cfg.rule!r} finds no keyframe in {len(episodes)} episodes, of which {len(failed)} failed by "
            f"themselves. Use another rule, less room ({cfg.room} of {steps} steps), or no keyframe starts."
        )
    return _build(episodes, picks, memory)


def gripper_events(action_SA: np.ndarray, event: str = "any") -> np.ndarray:
    """Returns the steps whose action changes the gripper command; it counts as open before the first step."""
    # -1 is open and +1 closed; between the two a command counts for the nearer one.
    closed_S = action_SA[:, -1] > 0
    was_S = np.concatenate([[False], closed_S[:-1]])
    changes = {"any": closed_S != was_S, "close": closed_S & ~was_S, "open": was_S & ~closed_S}
    return np.flatnonzero(changes[event])


def contacts(episode: Episode) -> np.ndarray:
    """Returns the steps in which closing fingers stop at something between them: a grasp, of whatever it is.

    Raises:
      NoDataError: an episode without the robot's state.
    """
    if episode.state_SD is None:
        raise NoDataError("contact and release: the rule reads the fingers off the robot's state, which is not here.")
    # The two joints have opposite signs, so their difference is the width between the fingers.
    width_S = np.abs(np.diff(episode.state_SD[:, FINGERS], axis=1))[:, 0]
    closes_S = episode.action_SA[:, -1] > 0
    # Told to close, not closed to nothing, and hardly moving any more.
    held_S = closes_S & (width_S[1:] > SHUT) & (width_S[:-1] - width_S[1:] < STILL)
    # Fingers that were only just told to close have not moved yet; they stand still at the full width.
    held_S &= width_S[1:] < width_S.max() - 4 * STILL
    # Only the first step of each grasp.
    return np.flatnonzero(held_S & ~np.concatenate([[False], held_S[:-1]]))


def releases(episode: Episode) -> np.ndarray:
    """Returns the steps whose action opens fingers that have held something for ``CARRIED`` steps; see ``contacts``."""
    opens = gripper_events(episode.action_SA, "open")
    steps = []
    for grasp in contacts(episode):
        later = opens[opens > grasp]
        if len(later) and later[0] - grasp >= CARRIED:
            steps.append(later[0])
    # Fingers that slip and close again make several grasps that end in one release.
    return np.unique(steps).astype(int)


def _pick(episode: Episode, cfg: StartsConfig, rng: np.random.Generator, steps: int) -> int | None:
    """Draws a step of an episode that might have had ``steps``, as the rule says; None where it finds none."""
    end = len(episode.action_SA)
    latest = min(end - 1, steps - cfg.room)
    # Step 0 is the reset, which is an episode start and no keyframe.
    if latest < 1:
        return None
    if cfg.rule == "uniform":
        return int(rng.integers(1, latest + 1))
    if cfg.rule == "progress":
        return int(np.clip(round(end * rng.choice(PROGRESS)), 1, latest))
    if cfg.rule == "contact":
        events = contacts(episode)
    elif cfg.rule == "release":
        events = releases(episode)
    else:
        events = gripper_events(episode.action_SA, cfg.event)
    events = events[(events >= 1) & (events < end)]  # one in step 0 leaves no start before it
    if cfg.rule == "last_event":
        events = events[-1:] if len(events) else np.array([end])
    if cfg.rule == "last_chance":
        # Later ones came when it was over; from a little before this one the policy could still have done otherwise.
        events = events[events - cfg.least <= latest][-1:]
    if not len(events):
        return latest if cfg.rule == "last_chance" else None
    # The event is drawn before the distance: the order of the draws is part of what a seed means.
    return int(np.clip(rng.choice(events) - rng.integers(cfg.least, cfg.before + 1), 1, latest))


def _build(episodes: Sequence[Episode], picks: Sequence[tuple[int, int, str]], memory: int) -> Starts:
    """Builds the table of (episode, step, rule) rows."""
    null = np.asarray(NULL_ACTION, np.float32)
    horizon = max(len(episode.action_SA) for episode in episodes)
    memories, actions, played = [], [], []
    for e, step, _ in picks:
        episode = episodes[e]
        # The last M frames, the newest one last; before the episode its first frame is repeated, as in training.
        back_M = step - np.arange(memory)[::-1]
        memories.append(episode.frame_SHWC[np.maximum(back_M, 0)])
        actions.append(np.where((back_M > 0)[:, None], episode.action_SA[np.maximum(back_M - 1, 0)], null))
        # Up to the step what was played, null actions after it: all rows have one length.
        action_SA = np.pad(episode.action_SA, [(0, horizon - len(episode.action_SA)), (0, 0)])
        played.append(np.where((np.arange(horizon) < step)[:, None], action_SA, null))
    sources = [episodes[e] for e, _, _ in picks]
    return Starts(
        anchor_KHWC=np.stack([episode.frame_SHWC[0] for episode in sources]),
        memory_KMHWC=np.stack(memories),
        action_KMA=np.stack(actions).astype(np.float32),
        played_KSA=np.stack(played).astype(np.float32),
        task_K=np.array([episode.task for episode in sources], np.int32),
        step_K=np.array([step for _, step, _ in picks], np.int32),
        seed_K=np.array([episode.seed for episode in sources], np.int32),
        init_K=np.array([episode.origin.get("init", UNKNOWN) for episode in sources], np.int32),
        episode_K=np.array([e for e, _, _ in picks], np.int32),
        # As a number, so that the table is arrays only and goes to the device as a whole.
        rule_K=np.array([RULES.index(rule) for _, _, rule in picks], np.int32),
        initials=sum(rule == "initial" for _, _, rule in picks),
    )


def join(initials: Starts, keys: Starts) -> Starts:
    """Joins episode starts and keyframes, in this order and no other (ValueError), into one table."""
    if initials.initials != len(initials) or keys.initials:
        raise ValueError("join takes episode starts first and keyframes second.")
    # Keyframes may come from longer episodes than the episode starts do.
    length = max(initials.played_KSA.shape[1], keys.played_KSA.shape[1])

    def lengthen(table: Starts) -> Starts:
        played = np.tile(np.asarray(NULL_ACTION, np.float32), (len(table), length, 1))
        played[:, : table.played_KSA.shape[1]] = table.played_KSA
        return dataclasses.replace(table, played_KSA=played, initials=0)

    # The count of episode starts is no array and has to be equal on both sides for the two trees to match.
    joined = jax.tree.map(lambda a, b: np.concatenate([a, b]), lengthen(initials), lengthen(keys))
    return dataclasses.replace(joined, initials=len(initials))


def draw(table: Starts, key: Array, groups: int, size: int, *, share: float = 1 / 3) -> Array:
    """Draws (groups * size,) int32 rows for one iteration: ``size`` equal consecutive rows for each of ``groups``.

    So many groups as ``count_keyframes`` says, the last ones, begin at keyframes. A third is the share in RLinf's
    released Goal bundle.
    """
    kir = count_keyframes(table, groups, share)
    k_initial, k_keyframe = jax.random.split(key)
    # Of a kind from which no group begins nothing is drawn, from however empty a range.
    initial_P = jax.random.randint(k_initial, (groups - kir,), 0, table.initials)
    keyframe_P = jax.random.randint(k_keyframe, (kir,), table.initials, len(table))
    # All rollouts of a group begin in one state: their returns are compared with each other.
    return jnp.repeat(jnp.concatenate([initial_P, keyframe_P]).astype(jnp.int32), size)


def count_keyframes(table: Starts, groups: int, share: float) -> int:
    """Returns ``share`` of the groups, rounded; all of them where there are no episode starts, 0 without keyframes."""
    # Fixed and not drawn, since the shapes of a program cannot depend on a draw.
    if not table.initials:
        return groups
    return round(groups * share) if len(table) > table.initials else 0


def gather(table: Starts, row_B: Array, prompt_KL: Array) -> Start:
    """Gathers the starts of ``row_B`` on the device.

    Args:
      table: start states, indexed where they lie: on the device, also under jit, or on the host if they are too large.
      row_B: (B,) rows, from :func:`draw` for instance.
      prompt_KL: (tasks, L) int32 prompt tokens of every task.
    """
    chex.assert_rank([row_B, prompt_KL], [1, 2])
    chex.assert_type([table.anchor_KHWC, table.memory_KMHWC], np.uint8)

    def take(column_K: Column) -> Array:
        return column_K[row_B] if isinstance(column_K, jax.Array) else jnp.asarray(column_K[np.asarray(row_B)])

    rows = jax.tree.map(take, table)
    return Start(
        anchor_BHWC=to_float(rows.anchor_KHWC),
        memory_BMHWC=to_float(rows.memory_KMHWC),
        action_BMA=rows.action_KMA,
        prompt_BL=jnp.asarray(prompt_KL)[rows.task_K],
        task_B=rows.task_K,
        # Rule 0 is an episode start.
        keyframe_B=rows.rule_K > 0,
        step_B=rows.step_K,
    )


def save(
    folder: str | os.PathLike, table: Starts, *, meta: dict[str, Any] | None = None, overwrite: bool = False
) -> None:
    """Writes a table as one ``.npy`` a column and a JSON index; whole or not at all. The first process does.

    Args:
      folder, table: where, and what.
      meta: facts to keep, such as the manifest's hash of the episodes that the starts come from.
      overwrite: whether start states that are there may be replaced.

    Raises:
      EpisodesError: when the folder is there and may not be replaced.
    """
    if not processes.first():
        return
    folder = settle_folder(folder, _complete)
    if folder.exists() and not (overwrite and _complete(folder)):
        raise disk.EpisodesError(f"{folder} exists already; pass overwrite=True to replace start states.")
    fresh = fresh_folder(folder)
    for name in COLUMNS:
        # No pickle: a folder from elsewhere must not be able to run anything when it is read.
        np.save(fresh / f"{name}.npy", np.asarray(getattr(table, name)), allow_pickle=False)
    facts = {"format": "wovr_jax starts", "schema": 1, "initials": table.initials, "rows": len(table)}
    facts |= {"rules": list(RULES), "meta": meta or {}, "starts": table.provenance()}
    write_json(fresh / INDEX, facts)
    replace_folder(fresh, folder)


def load(folder: str | os.PathLike) -> Starts:
    """Reads the table that :func:`save` wrote.

    Raises:
      EpisodesError: no folder, a folder of something else, a column missing or cut short.
    """
    folder = settle_folder(folder, _complete)
    if not _complete(folder):
        raise disk.EpisodesError(f"no start states at {folder}: {INDEX} is missing.")
    facts = read_json(folder / INDEX)
    arrays = {}
    for name in COLUMNS:
        path = folder / f"{name}.npy"
        try:
            arrays[name] = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise disk.EpisodesError(f"{path} is missing or cut short: {error}") from error
        # A whole array of another length: a column of another table, which somebody copied here.
        if len(arrays[name]) != facts["rows"]:
            raise disk.EpisodesError(f"{path}: expected {facts['rows']} rows, got {len(arrays[name])}.")
    return Starts(**arrays, initials=facts["initials"])


def _complete(folder: pathlib.Path) -> bool:
    return (folder / INDEX).is_file()
