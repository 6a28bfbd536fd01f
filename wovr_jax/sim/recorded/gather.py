"""What a stage of a run wants of a robot, looked for among the recordings; and in words, what is missing.

An episode counts for a policy if the policy server wrote the hash of that policy's weights into it, and the temperature
that was asked for. What another policy did is not counted, and how many episodes that are is said.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import pathlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from wovr_jax.data import episodes as disk
from wovr_jax.data.recordings import Place, Recordings, plain, read_recordings
from wovr_jax.data.records import EpisodesError
from wovr_jax.data.senses import make_senses, measure_bounds
from wovr_jax.sim.recorded.arena import RecordedConfig
from wovr_jax.types import Episode

EVALUATE = "evaluate"
"""Begins the names of the stages that measure."""
BOUNDS = "proprio"
"""What of the robot's state its manifests keep: ``data.senses.measure_bounds``."""
ACTOR = "demonstration"
"""Who acted in a demonstration, whoever it was."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """A policy that is to be recorded.

    Attributes:
      name: what the run calls it.
      bundle: the folder that it was exported to.
      weights: the hash of its weights, which the policy server writes into what it records.
      temperature: of its sampling.
    """

    name: str
    bundle: pathlib.Path
    weights: str
    temperature: float


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a stage wants.

    Attributes:
      cfg: the robot and its tasks.
      run: the run's folder.
      stage: such as ``demonstrations``, ``collect-0``, ``evaluate-1``.
      parts: folder -> how many episodes go into it, one after another.
      policy: who has to have acted; None for demonstrations.
    """

    cfg: RecordedConfig
    run: pathlib.Path
    stage: str
    parts: Mapping[pathlib.Path, int]
    policy: Policy | None

    @property
    def folder(self) -> pathlib.Path:
        """Where its recordings lie."""
        return pathlib.Path(self.cfg.folder).expanduser() / self.stage

    @property
    def count(self) -> int:
        """Episodes in all."""
        return sum(self.parts.values())

    @property
    def measures(self) -> bool:
        """Whether this is an evaluation, in which nobody may help the robot."""
        return self.stage.startswith(EVALUATE)

    def quotas(self) -> list[int]:
        """Returns how many episodes of each task are wanted: the tasks take turns."""
        tasks = len(self.cfg.instructions)
        return [self.count // tasks + (k < self.count % tasks) for k in range(tasks)]


@dataclasses.dataclass(frozen=True)
class Found:
    """What of that is there.

    Attributes:
      places: the episodes to use, in their order; as many as are wanted, or fewer.
      there: of each task, how many episodes count.
      others: reason -> how many episodes do not.
    """

    places: tuple[Place, ...]
    there: tuple[int, ...]
    others: Mapping[str, int]


def find(wanted: Wanted) -> Found:
    """Looks for what is wanted.

    Raises:
      EpisodesError: recordings that cannot be used, see ``data.recordings``, or that do not fit the settings.
    """
    cfg, others = wanted.cfg, collections.Counter[str]()
    number = {plain(text): task for task, text in enumerate(cfg.instructions)}
    of_task: list[list[Place]] = [[] for _ in cfg.instructions]
    for place in read_recordings(wanted.folder, last=cfg.last, instructions=cfg.instructions).places:
        _check_fits(place, cfg)
        if reason := _disqualify(place, wanted):
            others[reason] += 1
        else:
            of_task[number[place.task]].append(place)
    there = tuple(map(len, of_task))
    if wanted.policy:
        # A task that is easy to set up must not crowd out the others.
        of_task = [places[:quota] for places, quota in zip(of_task, wanted.quotas(), strict=True)]
    # In turn, so that the first so many are balanced as well as can be.
    turns = itertools.zip_longest(*of_task)
    chosen = [place for turn in turns for place in turn if place is not None][: wanted.count]
    if wanted.measures:
        # By where they began, so that outcomes of two policies are pairs where both began alike.
        chosen.sort(key=lambda place: (number[place.task], place.header["seed"]))
    return Found(tuple(chosen), there, dict(others))


def _check_fits(place: Place, cfg: RecordedConfig) -> None:
    where, side = f"{place.folder}, episode {place.number}", place.header["frame"][1:3]
    if side != [cfg.size, cfg.size]:
        raise EpisodesError(f"{where}: frames of {side} pixels, the run has {cfg.size} (recorded.size).")
    wrist, numbers = place.header.get("wrist", [0])[1:], place.header.get("state", [0, 0])[1]
    if cfg.views > 1 and wrist != place.header["frame"][1:]:
        has = f"frames of {wrist[:2]} pixels of it" if wrist else "none"
        raise EpisodesError(f"{where}: the run sees a camera in the hand too (recorded.views), and there are {has}.")
    if cfg.state and numbers != cfg.state:
        raise EpisodesError(f"{where}: a state of {numbers} numbers, the run has {cfg.state} (recorded.state).")
    if place.steps > cfg.steps:
        raise EpisodesError(
            f"{where} has {place.steps} steps, the longest episode of the run {cfg.steps} (recorded.steps). Label it "
            "discard, or begin a run of longer ones."
        )


def _disqualify(place: Place, wanted: Wanted) -> str:
    """Returns why an episode does not count for the policy; empty if it does."""
    if wanted.policy is None:
        return ""
    origin = place.header.get("origin", {})
    if "weights" not in origin:
        return "do not say whose actions they are; record with launch/serve.py --record, which notes it"
    if origin["weights"] != wanted.policy.weights:
        return f"are of another policy ({origin.get('policy', 'without a name')})"
    if (temperature := origin.get("temperature", wanted.policy.temperature)) != wanted.policy.temperature:
        return f"were sampled at temperature {temperature:g}"
    if wanted.measures and origin.get("intervened"):
        return "had a person's help, which is not the policy's success"
    return ""


def write(wanted: Wanted, found: Found) -> None:
    """Writes what was found as the episode folders that are wanted, under the labels that are there now.

    Labels that change later change nothing in a stage that is finished.
    """
    places, low = found.places, 0
    number = {plain(text): task for task, text in enumerate(wanted.cfg.instructions)}
    # Seeds tell placements apart; where nobody noted any, all would be taken for one.
    same = len({place.header["seed"] for place in places}) == 1

    bounds = _find_bounds(wanted, places)
    senses = make_senses(wanted.cfg.views, wanted.cfg.state, wanted.cfg.strip, bounds)

    def episodes(low: int, high: int) -> Iterator[Episode]:
        for row, episode in enumerate(Recordings(places[low:high], wanted.cfg.last), low):
            task, where = number[places[row].task], f"{places[row].folder}, episode {places[row].number}"
            yield dataclasses.replace(
                senses.compose_episode(episode, where),
                instruction=wanted.cfg.instructions[task],
                task=task,
                seed=row if same else episode.seed,
                actor=wanted.policy.name if wanted.policy else ACTOR,
                origin={**episode.origin, "recording": places[row].folder.name, "recorded": episode.actor},
            )

    for folder, count in wanted.parts.items():
        part = places[low : low + count]
        starts = [[number[place.task], row if same else place.header["seed"]] for row, place in enumerate(part, low)]
        meta: dict[str, Any] = {"sim": wanted.cfg.name, "outcomes": [int(place.won) for place in part]}
        # Without noted placements two policies never begin alike.
        meta["starts"] = [wanted.stage] if same and count > 1 else starts
        meta |= {BOUNDS: bounds} if bounds else {}
        disk.write(folder, episodes(low, low + count), meta=meta, overwrite=True)
        low += count


def _find_bounds(wanted: Wanted, places: Sequence[Place]) -> Mapping[str, Any] | None:
    """Returns what scales the state: measured on demonstrations, and kept for all that comes after them."""
    if not wanted.cfg.state:
        return None
    if wanted.policy is None:
        return measure_bounds([episode.state_SD for episode in Recordings(places, 1) if episode.state_SD is not None])
    return disk.manifest(wanted.run / "stages" / "demonstrations" / "episodes")["meta"][BOUNDS]


def describe(wanted: Wanted, found: Found) -> str:
    """Returns what is missing and what to do about it, for whoever records."""
    cfg, policy, missing = wanted.cfg, wanted.policy, wanted.count - len(found.places)
    quotas = wanted.quotas() if policy else None
    what = f"recorded episodes of its policy {policy.name}" if policy else "recorded demonstrations"
    lines = [f"{_near(wanted.run)} waits for {missing} of {wanted.count} {what}.", ""]
    for task, text in enumerate(cfg.instructions):
        there = found.there[task]
        lines += [f"  task {task}        {text!r}: {there if quotas is None else f'{there} of {quotas[task]}'} there"]
    lines += [f"  folder        {_near(wanted.folder)}"]
    if policy:
        lines += [f"  policy        {_near(policy.bundle)} (weights {policy.weights[:12]})"]
    lines += [f"  a success is  {cfg.success}"]
    minutes = missing * cfg.steps / cfg.hz / 60
    lines += [f"  an episode    at most {cfg.steps} steps at {cfg.hz:g} Hz; at most {minutes:.1f} minutes in all"]
    lines += [f"  not counted   {count} that {reason}" for reason, count in found.others.items()]
    if policy:
        lines += ["", "Serve the policy, and let the robot's program record while it acts:", ""]
        lines += [f"  {shlex.join(command_of(wanted))}"]
        lines += ["", "and say what came of the episodes:", "", f"  python launch/label.py {_near(wanted.folder)}"]
    else:
        lines += ["", "Record them, or convert those that there are (python -m data_prep.lerobot --help)."]
    lines += ["", "The same command goes on when the episodes are there."]
    return "\n".join(lines)


def command_of(wanted: Wanted) -> list[str]:
    """Returns the command that serves the policy and records what is wanted, word by word."""
    assert wanted.policy is not None
    words = ["python", "launch/serve.py", str(_near(wanted.policy.bundle))]
    words += ["--temperature", f"{wanted.policy.temperature:g}"] if wanted.policy.temperature else []
    return [*words, "--record", str(_near(wanted.folder))]


def _near(path: pathlib.Path) -> pathlib.Path:
    """Returns a path as somebody in this folder would write it."""
    path, here = path.absolute(), pathlib.Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def note(wanted: Wanted, found: Found) -> dict[str, Any]:
    """Returns the same for a program, ready for JSON: ``wanted.json`` in the run's folder."""
    cfg, policy = wanted.cfg, wanted.policy
    # Of demonstrations it is free how many show which task.
    quotas = wanted.quotas() if policy else [None] * len(cfg.instructions)
    facts: dict[str, Any] = {
        "stage": wanted.stage,
        "folder": str(wanted.folder.absolute()),
        "episodes": wanted.count,
        "missing": wanted.count - len(found.places),
        "tasks": [
            {"instruction": text, "wanted": quotas[task], "there": found.there[task]}
            for task, text in enumerate(cfg.instructions)
        ],
        "success": cfg.success,
        "steps": cfg.steps,
        "hz": cfg.hz,
    }
    if policy:
        facts["policy"] = dataclasses.asdict(policy) | {"bundle": str(policy.bundle)}
        facts["command"] = command_of(wanted)
    return facts
