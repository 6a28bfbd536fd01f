"""Several runs on one page: true success, what it took, what imagination paid, and the settings that differ.

Run folders of one suite go in, one page comes out. What is compared is what each run found out by itself; nothing is
measured again. Where two runs were evaluated on the same layouts (equal seeds), their difference is paired by layout.
"""

from __future__ import annotations

import dataclasses
import html
import json
import math
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from wovr_jax.core import stats
from wovr_jax.core.disk import read_json, replace_file
from wovr_jax.core.log import read_metrics
from wovr_jax.core.tables import text_table
from wovr_jax.report import figures, tables
from wovr_jax.report.pieces import fill, render_table, side_by_side
from wovr_jax.report.tables import Results, Rows

MEASURING = ("evaluate", "compare", "closed")
"""Kinds of stages whose true episodes teach nobody."""
CHARTED = {
    "true_success": "true success, watched",
    "success_start": "paid, from episode starts",
    "success_keyframe": "paid, from keyframes",
    "false_success": "false share of what is paid",
}
"""Curves of the learner that are rates, so that all of them share one axis."""
VALUE_LETTERS = 60


class CompareError(ValueError):
    """Tells which folders cannot be compared, and why."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A run of the comparison.

    Attributes:
      name: the shortest end of its path that no other one has.
      results: what its ``results.json`` holds.
      settings: of its ``config.json``.
      curves: lines of ``metrics.jsonl``.
    """

    name: str
    results: Results
    settings: Mapping[str, Any]
    curves: Sequence[Mapping[str, Any]]


def read(folders: Sequence[pathlib.Path]) -> list[Entry]:
    """Reads the runs that are to be compared.

    Raises:
      CompareError: naming every folder that has no results of policies, is named twice or is of another suite.
    """
    where = [folder.absolute().resolve() for folder in folders]
    wrong = [f"{folder}: the same run as {folders[where.index(path)]}" for folder, path in _repeated(folders, where)]
    wrong += filter(None, map(_judge, folders))
    if not wrong:
        known = [(folder, _name_suite(read_json(folder / "config.json"))) for folder in folders]
        wrong = [
            f"{folder}: a run of {suite}, and {folders[0]} is one of {known[0][1]}; success there and here is not alike"
            for folder, suite in known
            if suite != known[0][1]
        ]
    if wrong:
        raise CompareError("\n".join(["These runs cannot be compared:", *wrong]))
    names = _shorten(where)
    parts = ((folder / "results.json", folder / "config.json") for folder in folders)
    read_all = [(read_json(results), read_json(settings)) for results, settings in parts]
    return [Entry(name, *both, read_metrics(folder)) for name, both, folder in zip(names, read_all, folders)]


def write(entries: Sequence[Entry], path: pathlib.Path) -> pathlib.Path:
    """Writes the page of a comparison, and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as fresh:
        fresh.write_text(render(entries), encoding="utf-8")
    return path


def render(entries: Sequence[Entry]) -> str:
    """Returns the whole page as HTML."""
    differing = setting_rows(entries)
    parts = {
        "title": html.escape(" and ".join(entry.name for entry in entries)),
        "facts": html.escape(f"{len(entries)} runs of {_name_suite(entries[0].settings)}"),
        "lead": "".join(f'<p class="lead">{html.escape(said)}</p>\n' for said in state_findings(entries)),
        "success": _draw_success(entries) + render_table(success_rows(entries)),
        "closed": _render_closed(entries),
        "curves": _render_curves(entries),
        "ledger": render_table(ledger_rows(entries)),
        "settings": render_table(differing) if len(differing) > 1 else "<p>None.</p>",
    }
    return fill("compare.html", parts)


def render_text(entries: Sequence[Entry]) -> str:
    """Returns the comparison as plain text, for a terminal."""
    shown = (success_rows(entries), closed_rows(entries), ledger_rows(entries))
    settings = setting_rows(entries)
    parts = [
        text_table(rows, left=(0, 1) if rows[0][1].startswith("policy") else (0,)) for rows in shown if len(rows) > 1
    ]
    parts += [text_table(settings, left=range(len(settings[0])))] if len(settings) > 1 else ["All settings are equal."]
    return "\n\n".join(["\n".join(textwrap.fill(said, 110) for said in state_findings(entries)), *parts])


# ---------------------------------------------------------------- sentences and tables


def state_findings(entries: Sequence[Entry]) -> list[str]:
    """Says whose final policy truly does best, both ways of acting, and how far the others are from it."""
    said = [_state_best(entries, "true_success", "as it samples"), _state_best(entries, "greedy", "greedy")]
    said.append(
        "Intervals are over start states, of one training each: they say nothing of another seed of the same settings."
    )
    return said


def _state_best(entries: Sequence[Entry], kind: str, how: str) -> str:
    rates = {entry.name: _final(entry)[kind] for entry in entries}
    best = max(entries, key=lambda entry: rates[entry.name]["rate"])
    others = []
    for entry in entries:
        if entry is not best:
            lead, paired = _lead_over(best, entry, kind)
            verdict = ", which may be chance" if lead["low"] <= 0.0 else ""
            ends = " to ".join(tables.format_points(lead[end]) for end in ("low", "high"))
            before = f"{tables.format_points(lead['gain'])} points over {entry.name} ({rates[entry.name]['rate']:.1%}"
            others.append(f"{before}; 95% {ends}{', paired by layout' * paired}){verdict}")
    rate = rates[best.name]
    top = f"{best.name}, {rate['rate']:.1%} ({_final(best)['name']}, {rate['n']} start states)"
    return f"Highest true success {how}: {top}; {'; '.join(others)}."


def success_rows(entries: Sequence[Entry]) -> Rows:
    """Returns a row for every policy of every run: true success both ways, with intervals, and imagined success."""
    rows: Rows = [("run", "policy", "episodes", "sampled", "95%", "greedy", "95%", "imagined")]
    for entry in entries:
        for phase in entry.results["phases"]:
            cells = (*_rate(phase["true_success"]), *_rate(phase["greedy"]))
            episodes = f"{phase['true_success']['n']:,}"
            imagined = tables.format_rate(phase.get("imagined_success"))
            rows.append((entry.name, phase["name"], episodes, *cells, imagined))
    return rows


def closed_rows(entries: Sequence[Entry]) -> Rows:
    """Returns a row for each run that was audited: what its final policy was paid for in its newest world."""
    shares = {"false_success": "failures paid", "forced_false_success": tables.FORCED, "precision": "paid ones true"}
    rows: Rows = [("run", "policy, world of", *(cell for words in shares.values() for cell in (words, "95%")))]
    for entry in entries:
        if closed := entry.results.get("closed_loop"):
            parts = (closed[-1]["all"].get(share) for share in shares)
            cells = (cell for part in parts for cell in (_rate(part) if part else ("-", "-")))
            rows.append((entry.name, tables.name_pair(closed[-1]), *cells))
    return rows


def ledger_rows(entries: Sequence[Entry]) -> Rows:
    """Returns a row for each run: true episodes that somebody learns from, those that only measure, and the rest."""
    head = ("run", "demonstrations", "collected", "by the learner", "in all", "true steps", "only measured")
    rows: Rows = [(*head, "imagined frames", "time")]
    for entry in entries:
        ledger = entry.results.get("ledger") or {}

        def total(what: str, *kinds: str, without: bool = False, ledger: Mapping[str, Results] = ledger) -> int:
            return sum(n.get(what, 0) for stage, n in ledger.items() if stage.startswith(kinds) != without)

        taught = total("episodes", *MEASURING, without=True)
        parts = [total("episodes", kind) for kind in ("demonstrations", "collect", tables.LEARNER)]
        steps, frames = total("true_steps", *MEASURING, without=True), total("imagined_frames", "")
        counts = (*parts, taught, steps, total("episodes", *MEASURING), frames)
        rows.append((entry.name, *(f"{n:,}" for n in counts), tables.format_duration(total("seconds", ""))))
    return rows


def setting_rows(entries: Sequence[Entry]) -> Rows:
    """Returns a row for each setting that is not the same in all runs."""
    flat = [dict(_flatten(entry.settings)) for entry in entries]
    names = dict.fromkeys(name for settings in flat for name in settings)
    differing = [name for name in names if len({settings.get(name, "-") for settings in flat}) > 1]
    return [
        ("setting", *(entry.name for entry in entries)),
        *((name, *(settings.get(name, "-") for settings in flat)) for name in differing),
    ]


# ---------------------------------------------------------------- pictures


def _draw_success(entries: Sequence[Entry]) -> str:
    rows = []
    for entry in entries:
        for phase in entry.results["phases"]:
            pairs = (("hollow", phase["greedy"]), ("true", phase["true_success"]))
            marks = [(kind, rate["rate"], rate["low"], rate["high"]) for kind, rate in pairs]
            said = tables.format_rate(phase["true_success"]["rate"])
            rows.append((f"{entry.name}: {phase['name']}", marks, said))
    return figures.draw_intervals(rows)


def _render_closed(entries: Sequence[Entry]) -> str:
    rows = []
    for entry in entries:
        if closed := entry.results.get("closed_loop"):
            false = closed[-1]["all"]["false_success"]
            paid = f"{false['rate']:.0%} of failures paid" if false else "no failure"
            rows.append((f"{entry.name}: {closed[-1]['policy']}", closed[-1]["all"], paid))
    return figures.draw_agreement(rows) + render_table(closed_rows(entries)) if rows else ""


def _render_curves(entries: Sequence[Entry]) -> str:
    """Rates over the learner's updates, the runs beside each other on the same axis."""
    stages = dict.fromkeys(line["stage"] for entry in entries for line in entry.curves)
    blocks = ""
    for stage in (stage for stage in stages if stage.startswith(tables.LEARNER)):
        for name, words in CHARTED.items():
            drawn = []
            for entry in entries:
                lines = [line for line in entry.curves if line["stage"] == stage and name in line]
                points = [(line["step"], line[name]) for line in lines]
                if len(points) > 1 and (svg := figures.draw_curve(points, f"{entry.name}: {words}", span=(0.0, 1.0))):
                    drawn.append(f"<figure>{svg}<figcaption>{html.escape(entry.name)}</figcaption></figure>")
            blocks += f"<h3>{html.escape(f'{stage}: {words}')}</h3>{side_by_side(drawn)}" if drawn else ""
    return blocks


# ---------------------------------------------------------------- small pieces


def _repeated(
    folders: Sequence[pathlib.Path], where: Sequence[pathlib.Path]
) -> list[tuple[pathlib.Path, pathlib.Path]]:
    pairs = zip(folders, where, strict=True)
    return [(folder, path) for i, (folder, path) in enumerate(pairs) if where.index(path) != i]


def _judge(folder: pathlib.Path) -> str | None:
    """Says why a folder is no run whose policies can be compared; None where it is one."""
    for name in ("results.json", "config.json"):
        if not (folder / name).is_file():
            return f"{folder}: holds no {name}; launch/train.py writes it when a run is finished"
        try:
            content = read_json(folder / name)
        except ValueError as error:
            return f"{folder / name}: cannot be read ({error})"
        if not isinstance(content, dict):
            return f"{folder / name}: expected a map, got {type(content).__name__}"
    results = read_json(folder / "results.json")
    if not results.get("phases"):
        return f"{folder}: results of a job {results.get('job', '?')!r}, which measured no policy's true success"
    return None


def _name_suite(settings: Mapping[str, Any]) -> str:
    # A run has one environment; LIBERO, relay and a robot are chosen by settings of their own.
    if robot := settings.get("recorded"):
        return str(robot["name"])
    if libero := settings.get("libero"):
        return str(libero["suite"])
    return "relay" if settings.get("relay") else "tabletop"


def _shorten(where: Sequence[pathlib.Path]) -> list[str]:
    """Returns the shortest ends of paths by which all of them can be told apart."""
    for parts in range(1, max(len(path.parts) for path in where)):
        names = ["/".join(path.parts[-parts:]) for path in where]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in where]


def _final(entry: Entry) -> Results:
    return entry.results["phases"][-1]


def _lead_over(best: Entry, other: Entry, kind: str) -> tuple[Mapping[str, float], bool]:
    """Returns the difference of two final policies with its 95 % interval, and whether it is paired by layout."""
    ours, theirs = (_outcomes(entry, kind) for entry in (best, other))
    alike = best.settings.get("seed") == other.settings.get("seed") and _arena(best) == _arena(other)
    if alike and ours and theirs and len(ours) == len(theirs):
        return stats.gain(ours, theirs), True
    # Newcombe's hybrid score interval of independent rates (Statistics in Medicine 17:873, 1998, method 10).
    a, b = _final(best)[kind], _final(other)[kind]
    gap = a["rate"] - b["rate"]
    low = gap - math.hypot(a["rate"] - a["low"], b["high"] - b["rate"])
    return {"gain": gap, "low": low, "high": gap + math.hypot(a["high"] - a["rate"], b["rate"] - b["low"])}, False


def _outcomes(entry: Entry, kind: str) -> Sequence[bool] | None:
    phase = _final(entry)
    if kind == "true_success":
        return phase.get("outcomes")
    # The last of the temperatures is greedy; runs of earlier versions did not keep it.
    levels = phase.get("temperatures") or ()
    return levels[-1]["outcomes"] if levels and not levels[-1]["temperature"] else None


def _arena(entry: Entry) -> tuple[Any, ...]:
    return tuple(entry.settings.get(name) for name in ("sim", "relay", "libero", "recorded"))


def _rate(rate: Results) -> tuple[str, str]:
    return tables.format_rate(rate["rate"]), f"{rate['low']:.1%} - {rate['high']:.1%}"


def _flatten(settings: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Returns every setting by its whole path, as text."""
    flat = []
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat += _flatten(value, f"{above}{name}.")
        else:
            flat.append((f"{above}{name}", textwrap.shorten(json.dumps(value), VALUE_LETTERS, placeholder=" ...")))
    return flat
