"""What a conversion believed: facts with their evidence, and a warning for each thing that looks odd.

A data set says little about itself, and a wrong guess (a gripper of the other sign, a picture of depth, a success that
nobody recorded) spoils a policy without a word. So each conversion ends with what was taken for what, and why.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.demos import GRIPPERS, Conventions, Demo, one_sided
from wovr_jax.types import Episode

DIMENSIONS = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
EMPTY_WORDS = re.compile(
    r"(n/?a|none|null|nan|unknown|todo|tbd|dummy|default|test|task|demo|data|image|low[ _]dim|episode|instruction)"
    r"[ _\d.]*",
    re.IGNORECASE,
)
"""Instructions that ask for nothing: what recorders put where nobody wrote one, and names of files."""


@dataclasses.dataclass
class Told:
    """What a reader learned of a data set before it read the episodes.

    Attributes:
      facts: name -> what was believed of it, for the summary.
      warnings: what looks odd, each a sentence.
      problems: what keeps episodes out that no source speaks of; refused, unless the command says to skip.
    """

    facts: dict[str, str] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)


def note(demo: Demo, episode: Episode) -> dict[str, Any]:
    """Returns what is to be remembered of a demonstration and the episode made of it, as JSON."""
    gripper_T, frame_SHWC = np.asarray(demo.action_TA)[:, -1], episode.frame_SHWC
    middle = frame_SHWC[len(frame_SHWC) // 2]
    return {
        "name": demo.name,
        "instruction": episode.instruction,
        "task": int(episode.task),
        "recorded": len(demo.action_TA),
        "kept": len(episode.action_SA),
        "frame": list(frame_SHWC.shape[1:3]),
        "gripper": [float(gripper_T.min()), float(gripper_T.max())],
        "begins_open": bool(episode.action_SA[0, -1] < 0),
        "opens": bool((episode.action_SA[:, -1] < 0).any()),
        "closes": bool((episode.action_SA[:, -1] >= 0).any()),
        "won": bool(episode.success_S.any()),
        # The frame before the first action has no success of its own where frames come before their actions.
        "won_at_once": bool(episode.success_S[:2].any()) and len(episode.success_S) > 3,
        "flat": bool(np.ptp(middle) < 4),
        "frozen": len(frame_SHWC) > 3 and all(np.array_equal(frame_SHWC[0], frame_SHWC[i]) for i in (1, -3, -1)),
        # Motion alone: two recordings never agree in it to the last bit.
        "digest": hashlib.sha256(episode.action_SA.tobytes()).hexdigest()[:16],
        "odd": list(demo.odd),
    }


def judge(
    notes: Sequence[Mapping[str, Any]],
    action_NA: np.ndarray,
    statistics: Mapping[str, Any],
    refused: Sequence[str],
    how: Conventions,
    told: Told,
) -> tuple[dict[str, str], list[str]]:
    """Returns what was believed, name -> evidence, and a warning for each thing that looks odd.

    Args:
      notes: of :func:`note`, one an episode.
      action_NA: (N, 7) the actions of all episodes.
      statistics: of the actions: ``q01``, ``q99``, ``min`` and ``max``.
      refused: why episodes were left out.
      how: the conventions.
      told: what the reader learned.
    """
    count, warnings = len(notes), list(told.warnings)
    facts = dict(told.facts)
    facts["gripper"] = _gripper(notes, how, warnings)
    won = sum(note["won"] for note in notes)
    facts["successes"] = f"{won} of {count} episodes"
    if not won:
        warnings.append("no episode succeeds: no success was found in what was read; see how it is told.")
    _some(notes, "won_at_once", "success at the first step already; is its flag the other way round?", warnings)
    facts["instructions"] = _instructions(notes, warnings)
    recorded, kept = (sum(note[name] for note in notes) for name in ("recorded", "kept"))
    facts["steps"] = f"{kept} kept of {recorded}, {'no-ops dropped' if how.drop_noops else 'no-ops kept'}"
    if how.drop_noops and kept < recorded / 2:
        warnings.append(
            f"more than half of all steps are no-ops and were dropped ({recorded - kept} of {recorded}); --keep-noops "
            "keeps them."
        )
    facts["episodes"] = f"{count} kept, {len(refused)} refused" if refused else f"{count} kept, none refused"
    if len(refused) > count:
        warnings.append(f"more was left out ({len(refused)}) than kept ({count}).")
    sizes = sorted({tuple(note["frame"]) for note in notes})
    facts["frames"] = ", ".join(f"{height} x {width}" for height, width in sizes) + f", rotation {how.rotation}"
    _some(notes, "flat", "pictures of one shade only; is the camera the right one?", warnings)
    _some(notes, "frozen", "pictures that never change; did the camera stand still?", warnings)
    copies = [name for name, copies in collections.Counter(note["digest"] for note in notes).items() if copies > 1]
    if copies:
        twins = [note["name"] for note in notes if note["digest"] == copies[0]]
        warnings.append(f"{len(copies)} episodes are there more than once, with equal actions: {', '.join(twins[:3])}.")
    odd: dict[str, list[str]] = {}
    for one in notes:
        for clause in one["odd"]:
            # Numbers differ from episode to episode and are no reason for a line each.
            odd.setdefault(re.sub(r"[\d.]+", "#", clause), []).append(f"{one['name']}: {clause}")
    warnings += [f"{len(lines)} of {count} episodes look odd: {lines[0]}." for lines in odd.values()]
    facts["actions"] = _actions(action_NA, statistics, warnings)
    return facts, warnings


def contradict(notes: Sequence[Mapping[str, Any]], how: Conventions) -> str:
    """Returns why all episodes together cannot be what the conventions say; empty where they can.

    Of one episode an analogue gripper may well stay on one side; of a whole set it does not.
    """
    low, high = min(note["gripper"][0] for note in notes), max(note["gripper"][1] for note in notes)
    if min(GRIPPERS[how.gripper]) < 0 and -0.1 < low < 0.9:
        return f"all {len(notes)} episodes: {one_sided(low, high, how.gripper)}"
    return ""


def _some(notes: Sequence[Mapping[str, Any]], name: str, text: str, warnings: list[str]) -> None:
    names = [note["name"] for note in notes if note[name]]
    if names:
        warnings.append(
            f"{len(names)} of {len(notes)} episodes ({names[0]}{', ...' if len(names) > 1 else ''}) have {text}"
        )


def _gripper(notes: Sequence[Mapping[str, Any]], how: Conventions, warnings: list[str]) -> str:
    """Returns the convention with its evidence; a command that never comes, or comes first, looks odd."""
    opened, closed = GRIPPERS[how.gripper]
    low, high = min(note["gripper"][0] for note in notes), max(note["gripper"][1] for note in notes)
    count = len(notes)
    sums = {name: sum(note[name] for note in notes) for name in ("begins_open", "opens", "closes")}
    for name, word in (("opens", "open"), ("closes", "closed")):
        if not sums[name]:
            warnings.append(
                f"the gripper is {'closed' if word == 'open' else 'open'} in every step of every episode: raw values "
                f"{low:.3g} to {high:.3g}, read as {how.gripper!r} ({opened:g} open, {closed:g} closed); another "
                f"convention ({', '.join(GRIPPERS)})?"
            )
    # Hands are empty before a task begins, nearly always.
    if sums["opens"] and sums["closes"] and sums["begins_open"] < count / 2:
        warnings.append(
            f"the gripper is closed in the first step of {count - sums['begins_open']} of {count} episodes, read as "
            f"{how.gripper!r} ({opened:g} open, {closed:g} closed); is it the other way round?"
        )
    return (
        f"{how.gripper} ({opened:g} open, {closed:g} closed): raw values {low:.3g} to {high:.3g}; open at first in "
        f"{sums['begins_open']}, open somewhere in {sums['opens']}, closed somewhere in {sums['closes']} of {count}"
    )


def _instructions(notes: Sequence[Mapping[str, Any]], warnings: list[str]) -> str:
    texts = sorted({note["instruction"] for note in notes})
    alike: dict[str, list[str]] = {}
    for text in texts:
        alike.setdefault(" ".join(re.findall(r"\w+", text.lower())), []).append(text)
    for same in alike.values():
        if len(same) > 1:
            warnings.append(f"{len(same)} instructions are alike and count as tasks of their own: {same}.")
    empty = [text for text in texts if EMPTY_WORDS.fullmatch(text)]
    if empty:
        warnings.append(f"instructions that ask for nothing: {empty}; --instruction gives one.")
    # A decoder of another encoding leaves these behind.
    broken = [text for text in texts if "\ufffd" in text or re.search(r"Ã.|â€", text)]
    if broken:
        warnings.append(f"instructions whose letters were read by another encoding: {broken[:3]}.")
    return f"{len(texts)}: {'; '.join(texts[:5])}{'; ...' if len(texts) > 5 else ''}"


def _actions(action_NA: np.ndarray, statistics: Mapping[str, Any], warnings: list[str]) -> str:
    """Returns the range of the motions; what cannot be a command of this robot, or cannot be learned, looks odd."""
    low, high, q01, q99 = (np.asarray(statistics[name], float)[:-1] for name in ("min", "max", "q01", "q99"))
    names = np.array(DIMENSIONS[:-1])
    still = high == low
    if still.any():
        warnings.append(f"dimensions that never move: {', '.join(names[still])}.")
    # Tokens span q01 to q99: what is rarer than one step in a hundred is cut off there.
    tight = ~still & (q99 - q01 < 0.1 * (high - low))
    if tight.any():
        warnings.append(
            "dimensions whose quantiles leave no room for rare motions, which a policy with these statistics cannot "
            "make: "
            + ", ".join(
                f"{name} ({a:.3g} to {b:.3g} of {c:.3g} to {d:.3g})"
                for name, a, b, c, d in zip(names[tight], q01[tight], q99[tight], low[tight], high[tight])
            )
            + "."
        )
    beyond = (np.abs(action_NA[:, :-1]) > 1.0 + 1e-3).any(1).mean()
    if beyond:
        warnings.append(
            f"motions beyond -1 to 1 in {beyond:.1%} of the steps, which the simulator cuts off: positions in place of "
            "changes, or another scale?"
        )
    elif np.abs(np.concatenate([q01[:3], q99[:3]])).max() < 0.05:
        warnings.append(
            f"shifts of at most {np.abs(np.concatenate([low[:3], high[:3]])).max():.3g}: metres in place of commands "
            "from -1 to 1?"
        )
    return f"{low.min():.3g} to {high.max():.3g} over six motions, 1 % to 99 %: {q01.min():.3g} to {q99.max():.3g}"


def render(facts: Mapping[str, str], warnings: Sequence[str]) -> str:
    """Returns the summary as text."""
    width = max(map(len, facts))
    lines = ["What was believed:", *(f"  {name.ljust(width)}  {text}" for name, text in facts.items())]
    return "\n".join([*lines, *(f"warning: {text}" for text in warnings)])
