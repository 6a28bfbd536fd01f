"""One self-contained page from a run folder, and one table for the terminal.

``results.json``, ``metrics.jsonl``, ``config.json`` and the videos go in; ``report.html`` comes out: no script, no
network, everything inside, light or dark as the reader has it. The words of the page are in ``assets/report.html``; a
section for which the results have nothing is left out, so that single jobs and studies use the same page. Every
function here is pure but :func:`write`.
"""

from __future__ import annotations

import base64
import html
import importlib.resources
import itertools
import json
import math
import os
import pathlib
import re
import string
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wovr_jax.core.log import read_metrics
from wovr_jax.core.stats import wilson
from wovr_jax.report import figures

Results = Mapping[str, Any]
Rows = list[tuple[str, ...]]
"""A table, its head first."""

FIRST_CURVES = ("success", "return_mean", "loss", "kl", "entropy", "accuracy")
"""Shown at once when a stage has them, and other curves to fill up; the rest is behind a fold."""
CURVES_AT_ONCE = 3
LEARNER = "grpo-"
"""How the learner's stages begin."""
LOOSE = {"open_fingers": "never close", "dropped": "let go half way"}
"""What a comparison says of the same arm with other fingers."""


def write(run: str | os.PathLike) -> pathlib.Path:
    """Writes ``report.html`` into the run folder ``run`` and returns its path.

    Raises:
      FileNotFoundError: when ``results.json`` is not there.
    """
    run = pathlib.Path(run)
    source, config = run / "results.json", run / "config.json"
    if not source.exists():
        raise FileNotFoundError(f"{source}: a report needs the results of a run; run the job first.")
    settings = json.loads(config.read_text()) if config.exists() else None
    beside = run / "report.html.tmp"
    beside.write_text(page(json.loads(source.read_text()), read_metrics(run), settings, run), encoding="utf-8")
    return beside.replace(run / "report.html")


def page(
    results: Results,
    curves: Sequence[Mapping[str, Any]] = (),
    config: Mapping[str, Any] | None = None,
    folder: str | os.PathLike = ".",
) -> str:
    """The whole page as HTML.

    Args:
      results: what ``results.json`` holds.
      curves: lines of ``metrics.jsonl``: stage, step, and numbers or None by name.
      config: the settings of the run.
      folder: what the paths of the videos are relative to.
    """
    assets = importlib.resources.files("wovr_jax").joinpath("assets")
    settings = {"versions": results.get("versions"), "config": config}
    parts = {
        "title": html.escape(str(results.get("name", "run"))),
        "style": assets.joinpath("report.css").read_text(),
        "facts": _facts(results),
        "lead": "".join(f'<p class="lead">{html.escape(sentence)}</p>\n' for sentence in findings(results)),
        "success": _success(results.get("phases") or ()),
        "study": _study(results.get("study") or ()),
        "tables": "".join(map(_titled, results.get("tables") or ())),
        "comparison": _comparison(results.get("comparison") or ()),
        "films": _films(results.get("comparison") or (), pathlib.Path(folder)),
        "curves": _curves(curves),
        "reward": _reward(results.get("reward") or {}),
        "keyframes": _keyframes(results.get("keyframes") or {}),
        "ledger": _ledger(results.get("ledger") or {}),
        "settings": html.escape(json.dumps(settings, indent=2)) if any(settings.values()) else "",
    }
    words = assets.joinpath("report.html").read_text()
    told = re.sub(r'(?s)<section id="(\w+)">.*?</section>\n', lambda one: one[0] * bool(parts[one[1]]), words)
    return string.Template(told).substitute(parts)


def table(results: Results) -> str:
    """The same results in few lines of plain text, for the end of a run."""
    tables = (
        _policies(results.get("phases") or ()),
        _variants(results.get("study") or ()),
        *(one["rows"] for one in results.get("tables") or ()),
        _worlds(results.get("comparison") or ()),
        _accounts(results.get("ledger") or {}),
    )
    said = [textwrap.fill(sentence, 110) for sentence in findings(results)]
    return "\n\n".join([_aligned(rows) for rows in tables if len(rows) > 1] + said)


# ---------------------------------------------------------------- what was found, in sentences


def findings(results: Results) -> list[str]:
    """What was reached, whether imagination can be believed and what it cost, as far as the results tell."""
    phases, ledger, remarks = results.get("phases"), results.get("ledger") or {}, results.get("remarks") or []
    said = [_reached(phases)] if phases else []
    said += [_gained(results["study"])] if results.get("study") else []
    said += [_believed(results["comparison"][-1])] if results.get("comparison") else []
    said += [_spent(ledger)] if any(stage.startswith(LEARNER) for stage in ledger) else []
    return [*said, *remarks]


def _reached(phases: Sequence[Results]) -> str:
    last, gain = phases[-1], phases[-1].get("gain")
    now = f"{last['true_success']['rate']:.1%} ({last['name']})"
    where = f"over {last['true_success']['n']} start states that no stage trained on"
    if not gain:
        return f"True success is {now}, {where}."
    verdict = _verdict(gain, "The policy truly got better.", "The policy truly got worse.", "That may be chance.")
    before = f"{phases[0]['true_success']['rate']:.1%} ({phases[0]['name']})"
    likely = f"With its most likely actions: {phases[0]['greedy']['rate']:.1%}, then {last['greedy']['rate']:.1%}."
    return f"True success went from {before} to {now}: {_points(gain)}, {where}. {verdict} {likely}"


def _gained(study: Sequence[Results]) -> str:
    best = max(study, key=lambda row: row["gain"])
    won, lost = sum(row["low"] > 0 for row in study), sum(row["high"] < 0 for row in study)
    count = f"Of {len(study)} variants on {len(best['seeds'])} seeds, {won} truly gained and {lost} truly lost."
    return f"{count} Best: {best['says']}, {_points(best)}."


def _believed(row: Results) -> str:
    verdict = _verdict(
        row["bias"], "Imagination flattered the policy", "Imagination was too strict", "The difference may be chance"
    )
    imagined, true, everything = _rates(row)
    said = [f"{row[how]:.1%} with fingers that {words}" for how, words in LOOSE.items() if row.get(how) is not None]
    loose = f" It also calls {' and '.join(said)} a success." if said else ""
    return (
        f"Same actions, two worlds ({row['policy']}, {row['world']}): imagination calls {imagined:.1%} of {everything} "
        f"episodes a success, the truth {true:.1%}, a difference of {_points(row['bias'])}. {verdict}; "
        f"{row['fp'] + row['fn']} episodes were misjudged.{loose}"
    )


def _spent(ledger: Mapping[str, Results]) -> str:
    def total(kind: str, what: str) -> int:
        return sum(account[what] for stage, account in ledger.items() if stage.startswith(kind))

    return (
        f"The collections took {total('collect-', 'true_steps'):,} steps of the true simulator. The learner took "
        f"{total(LEARNER, 'true_steps'):,}; it learnt from {total(LEARNER, 'imagined_frames'):,} imagined frames."
    )


def _verdict(difference: Results, above: str, below: str, neither: str) -> str:
    return above if difference["low"] > 0 else below if difference["high"] < 0 else neither


# ---------------------------------------------------------------- tables, for the page and for the terminal


def _policies(phases: Sequence[Results]) -> Rows:
    rows: Rows = [("policy", "true success", "95%", "gain", "95%", "greedy", "imagined")]
    for phase in phases:
        rates = (_percent(phase["greedy"]["rate"]), _percent(phase["imagined_success"]))
        rows.append((phase["name"], *_spread(phase["true_success"]), *_gain(phase.get("gain")), *rates))
    return rows


def _subgoals(phases: Sequence[Results]) -> Rows:
    """How far the episodes came; nothing where the environment knows no sub-goals."""
    first = phases[0]["subgoals"]
    if not first:
        return []
    names = sorted(first, key=lambda name: -first[name])
    rows = [(phase["name"], *(_percent(phase["subgoals"][name]) for name in names)) for phase in phases]
    return [("episodes with", *(name.replace("_", " ") for name in names)), *rows]


def _variants(study: Sequence[Results]) -> Rows:
    """Seeds pooled, each seed's own gain, and the difference from the row that is nothing changed."""
    reference = next((row["says"] for row in study if not row.get("against")), "the reference")
    rows: Rows = [
        ("variant", "episodes", "base", "success", "95%", "gain", "95%", "gain by seed", f"against {reference}")
    ]
    for row in study:
        low, high = wilson(round(row["final"] * row["n"]), row["n"])
        final = _spread({"rate": row["final"], "low": low, "high": high})
        seeds = " ".join(_signed(after - before) for before, after in row["seeds"])
        against = _points(row["against"]) if row.get("against") else ""
        rows.append((row["says"], str(row["n"]), _percent(row["base"]), *final, *_gain(row), seeds, against))
    return rows


def _worlds(comparison: Sequence[Results]) -> Rows:
    title = ("policy, world of", "both", "imagined only", "true only", "neither", "bias", "95%", *LOOSE.values())
    rows: Rows = [(*title, "PSNR by chunk")]
    for row in comparison:
        values = [f"{value:.1f}" for value in row.get("psnr") or ()]
        psnr = " ".join(values if len(values) < 5 else (values[0], "to", values[-1]))
        name = f"{row['policy']}, {row['world'].removeprefix('world model of ')}"
        counts = (str(row[part]) for part in ("tp", "fp", "fn", "tn"))
        rows.append((name, *counts, *_gain(row["bias"]), *(_percent(row.get(how)) for how in LOOSE), psnr))
    return rows


def _accounts(ledger: Mapping[str, Results]) -> Rows:
    names = ("true_steps", "imagined_frames", "seconds")
    total = {name: sum(one[name] for one in ledger.values()) for name in names}
    rows = [
        (stage, *(f"{one[name]:,}" for name in names[:2]), _time(one["seconds"]))
        for stage, one in ({**ledger, "all": total} if ledger else {}).items()
    ]
    return [("stage", "true steps", "imagined frames", "time"), *rows]


# ---------------------------------------------------------------- sections of the page


def _facts(results: Results) -> str:
    facts = [results.get("job"), results.get("device"), f"seed {results['seed']}" if "seed" in results else None]
    facts += [_time(results["seconds"])] if results.get("seconds") else []
    facts += [f"{results['peak_rss_gb']:.1f} GB of memory at most"] if results.get("peak_rss_gb") else []
    return " · ".join(html.escape(str(fact)) for fact in facts if fact)


def _success(phases: Sequence[Results]) -> str:
    rows = []
    for phase in phases:
        true, greedy, imagined = (phase[name] for name in ("true_success", "greedy", "imagined_success"))
        marks = [(kind, one["rate"], one["low"], one["high"]) for kind, one in (("hollow", greedy), ("true", true))]
        marks += [("imagined", imagined, imagined, imagined)] if imagined is not None else []
        rows.append((phase["name"], marks, _percent(true["rate"])))
    if not rows:
        return ""
    reached = _subgoals(phases)
    return figures.intervals(rows) + _table(_policies(phases)) + (_table(reached) if reached else "")


def _study(study: Sequence[Results]) -> str:
    rows = [(row["says"], [("true", row["gain"], row["low"], row["high"])], _signed(row["gain"])) for row in study]
    low, high = (edge([row[end] for row in study], default=0) for edge, end in ((min, "low"), (max, "high")))
    return figures.intervals(rows, min(low, -0.1), max(high, 0.1)) + _table(_variants(study)) if rows else ""


def _titled(table: Results) -> str:
    """A table that a job brings along, with its own title and explanation."""
    title, why = (html.escape(table[part]) for part in ("title", "why"))
    return f'<h2>{title}</h2>\n<p class="why">{why}</p>\n{_table(table["rows"])}'


def _comparison(comparison: Sequence[Results]) -> str:
    rows = []
    for row in comparison:
        imagined, true, _ = _rates(row)
        rows.append((f"{row['policy']}, {row['world']}", row, f"{imagined:.0%} imagined, {true:.0%} true"))
    return figures.agreement(rows) + _table(_worlds(comparison)) if rows else ""


def _films(comparison: Sequence[Results], folder: pathlib.Path) -> str:
    shown = ""
    for row in (row for row in comparison if row.get("videos")):
        title = html.escape(f"policy: {row['policy']}; true left, imagined right ({row['world']})")
        shown += f"<h3>{title}</h3>{_side_by_side([_film(film, folder) for film in row['videos']])}"
    return shown


def _film(film: Results, folder: pathlib.Path) -> str:
    """A video with the verdicts under its halves; a wrong verdict of imagination is marked."""
    path, (true, imagined) = folder / film["path"], (film.get("true"), film.get("imagined"))
    if not path.exists():
        return f'<figure class="why">{html.escape(path.name)} is not there.</figure>'
    source = f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
    said = {None: "", True: ": success", False: ": failure"}
    lies = " lies" * (None not in (true, imagined) and true != imagined)
    under = f'<b class="true">true{said[true]}</b><b class="imagined{lies}">imagined{said[imagined]}</b>'
    shown = f'<video src="{source}" autoplay loop muted playsinline></video>'
    return f'<figure class="film">{shown}<figcaption>{under}</figcaption></figure>'


def _curves(lines: Iterable[Mapping[str, Any]]) -> str:
    stages: dict[str, dict[str, list[tuple[float, float | None]]]] = {}
    for line in lines:
        stage = stages.setdefault(line["stage"], {})
        for name, value in line.items():
            if name not in ("stage", "step", "time"):
                stage.setdefault(name, []).append((line["step"], value))
    return "".join(_stage_curves(stage, found) for stage, found in stages.items())


def _stage_curves(stage: str, found: Mapping[str, list[tuple[float, float | None]]]) -> str:
    first = [name for name in FIRST_CURVES if name in found]
    drawn = [
        f"<figure>{svg}<figcaption>{html.escape(name)}</figcaption></figure>"
        for name in (*first, *(name for name in found if name not in first))
        if len(found[name]) > 1 and (svg := figures.curve(found[name], f"{stage}: {name}"))
    ]
    shown, folded = drawn[:CURVES_AT_ONCE], drawn[CURVES_AT_ONCE:]
    more = f"<details><summary>{len(folded)} more</summary>{_side_by_side(folded)}</details>" if folded else ""
    return f"<h3>{html.escape(stage)}</h3>{_side_by_side(shown)}{more}" if drawn else ""


def _reward(rewards: Mapping[str, Results]) -> str:
    shown = []
    for name, reward in rewards.items():
        kinds = {kind: reward[key] for kind, key in (("true", "real"), ("imagined", "imagined")) if key in reward}
        drawn = figures.reliability({kind: one["reliability"] for kind, one in kinds.items()}, reward["threshold"])
        rows: Rows = [("", *kinds)]
        for words, level, part in (
            ("successful episodes found", "episode", "tpr"),
            ("failures taken for success", "episode", "fpr"),
            ("calibration error", "reliability", "error"),
        ):
            rows.append((words, *(_percent(one[level][part]) for one in kinds.values())))
        title = f"{html.escape(name)}: threshold {reward['threshold']:.4g}"
        shown.append(f"<figure><h3>{title}</h3>{drawn}{_table(rows)}</figure>")
    return _side_by_side(shown)


def _keyframes(keyframes: Mapping[str, Results]) -> str:
    shown = []
    for name, one in keyframes.items():
        rules = ", ".join(f"{count:,} {rule.replace('_', ' ')}" for rule, count in one["rules"].items())
        drawn = figures.histogram(one["steps"], "step of the episode")
        shown.append(f"<figure><h3>{html.escape(f'{name}: {rules}')}</h3>{drawn}</figure>")
    return _side_by_side(shown)


def _ledger(ledger: Mapping[str, Results]) -> str:
    longest = max((account["seconds"] for account in ledger.values()), default=0) or 1.0
    styles = [f'style="--share:{account["seconds"] / longest:.3f}"' for account in ledger.values()]
    kinds = ['class="learner"' if stage.startswith(LEARNER) else "" for stage in ledger]
    return _table(_accounts(ledger), map(" ".join, zip(kinds, styles, strict=True))) if ledger else ""


# ---------------------------------------------------------------- small pieces


def _rates(row: Results) -> tuple[float, float, int]:
    """Imagined success, true success, and of how many episodes."""
    everything = max(sum(row[part] for part in figures.SEGMENTS), 1)
    return (row["tp"] + row["fp"]) / everything, (row["tp"] + row["fn"]) / everything, everything


def _side_by_side(drawn: Sequence[str]) -> str:
    return f'<div class="row">{"".join(drawn)}</div>' if drawn else ""


def _table(rows: Rows, attributes: Iterable[str] = ()) -> str:
    kinds = itertools.zip_longest(rows[1:], attributes, fillvalue="")
    lines = [f"<tr {kind}>{_cells(row)}</tr>" for row, kind in kinds]
    return f'<div class="wide"><table><tr>{_cells(rows[0], "th")}</tr>{"".join(lines)}</table></div>'


def _cells(row: Iterable[str], kind: str = "td") -> str:
    return "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in row)


def _percent(rate: float | None) -> str:
    return "-" if rate is None or math.isnan(rate) else f"{rate:.1%}"


def _spread(rate: Results) -> tuple[str, str]:
    """A rate and its interval."""
    return _percent(rate["rate"]), f"{rate['low']:.1%} - {rate['high']:.1%}"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}"


def _gain(gain: Results | None) -> tuple[str, str]:
    """A difference and its interval, in points."""
    return (_signed(gain["gain"]), f"{_signed(gain['low'])} to {_signed(gain['high'])}") if gain else ("-", "-")


def _points(gain: Results) -> str:
    return "{} points (95% between {} and {})".format(*(_signed(gain[end]) for end in ("gain", "low", "high")))


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _aligned(rows: Rows) -> str:
    """Columns of equal width, the first to the left, numbers to the right, a line under the head."""
    width = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(width[0]), *map(str.rjust, row[1:], width[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
