"""What several trainings of one variant say together: intervals over seeds, and the tables and sentences of a study.

A seed is a training. Two trainings with the same settings differ by several points, so whether a variant would do the
same again is told by the spread over its seeds alone: Student's interval of the mean of n numbers, one a seed. The
interval over layouts, all seeds pooled, is given beside it as what it is: how well layouts measured these trainings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from wovr_jax.core import stats
from wovr_jax.report.results import best_level
from wovr_jax.report.tables import format_points, format_rate

Results = dict[str, Any]

_QUANTILES = """
    12.706 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262 2.228 2.201 2.179 2.160 2.145 2.131
    2.120 2.110 2.101 2.093 2.086 2.080 2.074 2.069 2.064 2.060 2.056 2.052 2.048 2.045 2.042
"""
STUDENT = tuple(map(float, _QUANTILES.split()))
"""97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom; for more the last one, which is a little wide."""

DECODINGS = {"sampled": "as sampled in training", "greedy": "greedy", "best": "at the temperature that suits each best"}
"""Ways in which policies are held against each other, and what a reader calls them."""
LAYOUTS = "layouts of these trainings"
"""Head of the column that says nothing about another training."""


class Ends(NamedTuple):
    """What one seed of a variant came to.

    Attributes:
      seed: of the run.
      episodes: true episodes that its training took.
      base, final: outcomes of the base policy and of the last one, layout by layout, by the names of ``DECODINGS``.
    """

    seed: int
    episodes: int
    base: Mapping[str, Sequence[int]]
    final: Mapping[str, Sequence[int]]


def read_outcomes(facts: Mapping[str, Any]) -> dict[str, list[int]]:
    """Returns the outcomes of an evaluation by the names of ``DECODINGS``; runs of before kept those as sampled."""
    levels = facts.get("temperatures")
    lower = {"greedy": levels[-1]["outcomes"], "best": best_level(levels)["outcomes"]} if levels else {}
    return {"sampled": facts["outcomes"]} | lower


def student(values: Sequence[float]) -> dict[str, Any]:
    """Returns the mean of one number a seed, ``low`` and ``high`` of its 95 % interval over seeds, and ``n``.

    One seed has no spread, so its ends are None.
    """
    n, mean = len(values), float(np.mean(values))
    if n == 1:
        return {"mean": mean, "low": None, "high": None, "n": 1}
    half = STUDENT[min(n - 1, len(STUDENT)) - 1] * float(np.std(values, ddof=1)) / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def summarize(variant: str, says: str, ends: Sequence[Ends], reference: Sequence[Ends] | None) -> Results:
    """Returns a row of a study: for each decoding rates, gain over the base and difference to the reference.

    Args:
      variant, says: its name, and how a reader calls it.
      ends: what its seeds came to.
      reference: what those of the reference came to; None for the reference itself. The difference is taken on the
        seeds that both have.
    """
    row: Results = {"variant": variant, "says": says, "reference": reference is None}
    row |= {"seeds": [end.seed for end in ends], "episodes": [end.episodes for end in ends]}
    others = {end.seed: end for end in reference or ()}
    both = [(end, others[end.seed]) for end in ends if end.seed in others]
    for how in DECODINGS:
        # A seed that an earlier version measured has no greedy outcomes; a mean over the others would hide it.
        if not all(how in end.base and how in end.final for end in ends):
            row[how] = None
            continue
        rates = [float(np.mean(end.final[how])) for end in ends]
        row[how] = {
            "base": [float(np.mean(end.base[how])) for end in ends],
            "rates": rates,
            "rate": student(rates),
            "gain": _compare([(end.final[how], end.base[how]) for end in ends]),
            "against": _compare([(end.final[how], other.final[how]) for end, other in both if how in other.final]),
        }
    return row


def _compare(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Results | None:
    """Returns the difference of two success rates, seed by seed and with all layouts pooled; None without a seed."""
    if not pairs:
        return None
    seeds = [float(np.mean(ours) - np.mean(theirs)) for ours, theirs in pairs]
    # Paired by layout: what makes a layout hard is the same on both sides and cancels.
    pooled = stats.gain(*(np.concatenate([np.asarray(part, bool) for part in side]) for side in zip(*pairs)))
    return student(seeds) | {"seeds": seeds, "layouts": [pooled["low"], pooled["high"]]}


# ---------------------------------------------------------------- for a reader


def tables(rows: Sequence[Results]) -> list[Results]:
    """Returns the tables of a study: all variants at a glance, then each decoding seed by seed."""
    reference = _name_reference(rows)
    head = ("variant", "true episodes", *DECODINGS, *(f"gain, {how}" for how in DECODINGS))
    glance = [
        (
            row["says"],
            f"{np.mean(row['episodes']):,.0f}",
            *(format_rate(row[how]["rate"]["mean"]) if row[how] else "-" for how in DECODINGS),
            *(_format_mean(row[how]["gain"]) if row[how] else "-" for how in DECODINGS),
        )
        for row in rows
    ]
    marks = [[row["says"], _marks(row), format_points(row["sampled"]["gain"]["mean"])] for row in rows]
    why = (
        "True success, mean over seeds, and the gain over the base in points with its 95% interval over seeds "
        "(Student's t, one number a seed). True episodes are those of training: collections and true rollouts of the "
        "learner. The filled mark is as sampled, the hollow one greedy."
    )
    found = [{"title": "Variants", "why": why, "rows": [head, *glance], "intervals": marks}]
    for how, words in DECODINGS.items():
        if shown := [row for row in rows if row[how]]:
            found.append(_decoding_table(how, words, shown, reference))
    return found


def _decoding_table(how: str, words: str, rows: Sequence[Results], reference: str) -> Results:
    head = (f"variant, {words}", "success by seed", "gain, 95% over seeds", LAYOUTS)
    lines: list[tuple[str, ...]] = [(*head, f"against {reference} by seed", "95% over seeds", LAYOUTS)]
    for row in rows:
        gain, against = row[how]["gain"], row[how]["against"]
        rates = " ".join(f"{100 * rate:.1f}" for rate in row[how]["rates"])
        cells = [row["says"], rates, _format_mean(gain), _format_layouts(gain)]
        # The reference is held against no other, nor is a variant before one of its seeds has run in both.
        if against:
            by_seed = " ".join(map(format_points, against["seeds"]))
            cells += [by_seed, _format_mean(against), _format_layouts(against)]
        lines.append((*cells, "", "", "")[: len(lines[0])])
    why = (
        "An interval over seeds is Student's, of one difference a seed: it says what another training would do. One "
        "over layouts pools all episodes as if they were of one policy: it says how well these trainings were measured "
        "and nothing about another one."
    )
    return {"title": f"Success {words}, seed by seed", "why": why, "rows": lines}


def curves(rows: Sequence[Results], names: Mapping[str, str]) -> list[Results]:
    """Returns pictures of true success against true episodes, a line for each curve that rows belong to.

    Args:
      rows: of the study.
      names: variant -> its curve.
    """
    found = []
    for how in ("sampled", "greedy"):
        lines: dict[str, list[list[float]]] = {}
        for row in rows:
            if row[how] and (name := names.get(row["variant"])):
                rate = row[how]["rate"]
                ends = [rate["mean"] if end is None else min(max(end, 0.0), 1.0) for end in (rate["low"], rate["high"])]
                lines.setdefault(name, []).append([float(np.mean(row["episodes"])), rate["mean"], *ends])
        if lines:
            title = f"Success {DECODINGS[how]}, against true episodes"
            why = "Mean over seeds, with its 95% interval over seeds where there are several."
            shown = [[name, sorted(points)] for name, points in lines.items()]
            table = [("curve", "true episodes", "success"), *_list_points(shown)]
            found.append({"title": title, "why": why, "rows": table, "lines": shown, "label": "true episodes"})
    return found


def _list_points(lines: Sequence[Any]) -> list[tuple[str, ...]]:
    return [(name, f"{x:,.0f}", format_rate(y)) for name, points in lines for x, y, *_ in points]


def state(rows: Sequence[Results]) -> list[str]:
    """Says which variant gained most, and which differ from the reference by more than their seeds spread."""
    said = []
    for how, words in DECODINGS.items():
        shown = [row for row in rows if row[how]]
        if not shown:
            continue
        best = max(shown, key=lambda row: row[how]["gain"]["mean"])
        apart = [row for row in shown if _is_apart(row[how]["against"])]
        differ = ", ".join(f"{row['says']} ({_format_mean(row[how]['against'])})" for row in apart) or "none"
        gain = f"{best['says']} gained most over the base, {_format_mean(best[how]['gain'])} points"
        said.append(
            f"{words.capitalize()}: {gain}. Set apart from {_name_reference(rows)} by the spread over seeds: {differ}."
        )
    if min(len(row["seeds"]) for row in rows) == 1:
        said.append("A variant with one seed has no interval over seeds: nothing says how another training would end.")
    return said


def _is_apart(compared: Results | None) -> bool:
    """Whether a difference has an interval over seeds, and zero lies outside it."""
    return compared is not None and compared["low"] is not None and compared["low"] * compared["high"] > 0


def _name_reference(rows: Sequence[Results]) -> str:
    return next((row["says"] for row in rows if row["reference"]), "the reference")


def _format_mean(compared: Results) -> str:
    """Returns ``-12.6 [-33.4, +8.2]``; of one seed that there is no interval."""
    mean = format_points(compared["mean"])
    if compared["low"] is None:
        return f"{mean} [one seed]"
    return f"{mean} [{format_points(compared['low'])}, {format_points(compared['high'])}]"


def _format_layouts(compared: Results) -> str:
    return " to ".join(map(format_points, compared["layouts"]))


def _marks(row: Results) -> list[list[Any]]:
    """Returns the marks of a row's gains, greedy first: where two meet, the later one lies on top."""
    marks = []
    for how, kind in (("greedy", "hollow"), ("sampled", "true")):
        if row[how]:
            gain = row[how]["gain"]
            ends = [gain["mean"] if end is None else min(max(end, -1.0), 1.0) for end in (gain["low"], gain["high"])]
            marks.append([kind, gain["mean"], *ends])
    return marks
